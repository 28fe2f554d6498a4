import math

import pytest
import torch
from classroom import TOKENS, make_scorer, make_store
from versions import TRAINING

from grip_hf.config import ConfigError
from grip_hf.training.checkpoints import last_checkpoint
from grip_hf.training.grpo import grpo_config, make_grpo_trainer
from grip_hf.training.policy import score_groups
from grip_hf.training.rewards import RewardError
from grip_hf.training.supervised import training_arguments
from grip_hf.training.warmup import WarmupTrainer

pytestmark = TRAINING


@pytest.fixture(scope="module")
def store():
    return make_store()


def config(folder, **overrides):
    small = {"per_device_train_batch_size": 16, "num_generations": 4, "max_steps": 4, "learning_rate": 3e-3}
    quiet = {"use_cpu": True, "disable_tqdm": True, "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no"}
    return grpo_config(str(folder), **{**small, **quiet, **overrides})


def test_grpo_learns_which_token_is_rewarded(store, tmp_path):
    """The reward is known: how many of the tokens 2, 3 and 4 are kept."""

    def wanted(completion_ids, **columns):
        return [float(len({2, 3, 4} & set(picks))) for picks in completion_ids]

    scorer = make_scorer()
    batch = store.visual(list(range(8)), torch.full((8,), 3))

    def kept():
        with torch.no_grad():
            return float(
                (torch.isin(score_groups(scorer, batch).topk(3).indices, torch.tensor([2, 3, 4]))).float().mean()
            )

    before = kept()
    args = config(tmp_path, max_steps=60, learning_rate=1e-2, lr_scheduler_type="constant", entropy_coef=0.0)
    trainer = make_grpo_trainer(scorer, store, args, [wanted], (0.19, 0.19))
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert kept() > before + 0.3 and sum(rewards[-5:]) > sum(rewards[:5]) + 3


def test_metrics_of_a_run(store, tmp_path):
    trainer = make_grpo_trainer(make_scorer(), store, config(tmp_path), budgets=(0.1, 0.6), greedy=True)
    trainer.train()
    entry = trainer.state.log_history[0]
    for name in ("reward", "reward_std", "entropy", "rewards/closeness/mean", "rewards/correctness/mean"):
        assert math.isfinite(entry[name])
    assert any(name.startswith("agreement/keep_") for name in entry)
    assert trainer.args.max_completion_length == round(0.6 * TOKENS)


def test_stopping_and_going_on_equals_going_through(tmp_path):
    store = make_store(count=32)

    def run(folder, checkpoint=None, stop=None):
        scorer = make_scorer()
        args = config(folder, save_strategy="steps", save_steps=2)
        trainer = make_grpo_trainer(scorer, store, args, budgets=(0.1, 0.6))
        if stop is not None:
            from transformers import TrainerCallback

            class Stop(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    control.should_training_stop = state.global_step >= stop

            trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=checkpoint)
        return scorer.state_dict()

    through = run(tmp_path / "a")
    run(tmp_path / "b", stop=2)
    checkpoint = last_checkpoint(tmp_path / "b", 16)
    assert checkpoint is not None and checkpoint.endswith("checkpoint-2")
    again = run(tmp_path / "b", checkpoint)
    start = make_scorer().state_dict()
    for name, value in through.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(start[name], value) for name, value in through.items())


def test_a_reference_policy(store, tmp_path):
    scorer = make_scorer()
    trainer = make_grpo_trainer(scorer, store, config(tmp_path, beta=0.1, max_steps=3), budgets=(0.1, 0.6))
    for name, value in trainer.ref_model.scorer.state_dict().items():
        assert torch.equal(value, scorer.state_dict()[name])
    trainer.train()
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergences[0] == pytest.approx(0, abs=1e-6) and divergences[-1] > 0


def broken_length(completion_ids, **columns):
    return [1.0]


def broken_value(completion_ids, **columns):
    return [float("nan")] * len(completion_ids)


@pytest.mark.parametrize("reward", [broken_length, broken_value])
def test_a_broken_reward_stops_the_first_step(store, tmp_path, reward):
    scorer = make_scorer()
    trainer = make_grpo_trainer(scorer, store, config(tmp_path), [reward])
    with pytest.raises(RewardError, match=reward.__name__):
        trainer.train()
    for name, value in make_scorer().state_dict().items():
        assert torch.equal(scorer.state_dict()[name], value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_generations": 1}, "at least 2 generations"),
        ({"num_generations": 3}, "divisible"),
        ({"bf16": True}, "'bf16': True"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions"),
    ],
)
def test_settings_that_cannot_work(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **overrides)


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launch_that_would_share_out_the_scorer(store, tmp_path, monkeypatch, flag):
    stages = [(grpo_config, make_grpo_trainer), (training_arguments, WarmupTrainer)]
    prepared = [(make(str(tmp_path / "run"), use_cpu=True), trainer) for make, trainer in stages]
    monkeypatch.setenv(flag, "true")
    for args, trainer in prepared:
        with pytest.raises(ConfigError, match="as a whole copy in each process: launch with DDP"):
            trainer(make_scorer(), store, args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rewards", [["nonsense"], []])
def test_unknown_rewards(store, tmp_path, rewards):
    with pytest.raises(ConfigError, match="rewards must be"):
        make_grpo_trainer(make_scorer(), store, config(tmp_path), rewards)
