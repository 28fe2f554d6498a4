"""What the mapping of keep-sets to completions relies on in TRL; holds for the range named in pyproject.toml."""

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
import trl
from classroom import TOKENS, make_scorer, make_store
from packaging.specifiers import SpecifierSet
from trl import GRPOConfig
from versions import TRAINING

from grip_hf.training.grpo import GRPO_DEFAULTS, GRPO_FIXED, grpo_config, make_grpo_trainer
from grip_hf.training.policy import score_groups

TEMPERATURE, RATE, COUNT = 0.7, 0.5, 3
RANGE = SpecifierSet(re.findall(r'"trl([^"]+)"', (Path(__file__).parents[2] / "pyproject.toml").read_text())[0])


def test_the_installed_trl_is_in_the_range_that_the_package_names():
    assert RANGE.contains(trl.__version__)
    assert not any(RANGE.contains(other) for other in ("1.7.0", "1.15.0", "1.15.2", "1.17.0"))


def test_settings_that_are_relied_on_exist():
    names = set(inspect.signature(GRPOConfig).parameters)
    assert set(GRPO_DEFAULTS) | set(GRPO_FIXED) | {"beta", "reward_weights", "max_completion_length"} <= names


def plackett_luce(scores, picks):
    """Log-probs of the picks of a list: a softmax over those that are left, each time. Scores [N], a list of ints."""
    left, logs = list(range(len(scores))), []
    for pick in picks:
        logs.append(scores[pick] - torch.logsumexp(scores[left], 0))
        left.remove(pick)
    return torch.stack(logs)


def step(store, folder, greedy):
    """One step of plain gradient descent by GRPO; what went in and out of it."""
    scorer, given, asked = make_scorer(), {}, []

    def reward(completion_ids, prompts, **columns):
        given.update(rows=[prompt[-1]["row"] for prompt in prompts], picks=completion_ids, **columns)
        given["rewards"] = [float(sum(picks) % 7) for picks in completion_ids]
        return given["rewards"]

    settings = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "lr_scheduler_type": "constant"}
    quiet = {"use_cpu": True, "disable_tqdm": True, "warmup_steps": 0, "save_strategy": "no", "entropy_coef": 0.0}
    sizes = {"per_device_train_batch_size": 16, "num_generations": 4, "max_steps": 1, "learning_rate": RATE}
    args = grpo_config(str(folder), temperature=TEMPERATURE, **settings, **quiet, **sizes)
    ratio = COUNT / TOKENS
    trainer = make_grpo_trainer(scorer, store, args, [reward], (ratio, ratio), greedy=greedy)
    ask = trainer._get_per_token_logps_and_entropies

    def spy(model, input_ids, attention_mask, *rest, **named):
        found = ask(model, input_ids, attention_mask, *rest, **named)
        asked.append((input_ids, found[0].detach()))
        return found

    trainer._get_per_token_logps_and_entropies = spy
    before = copy.deepcopy(scorer)
    trainer.train()
    return before, scorer, given, asked


@TRAINING
@pytest.mark.parametrize("greedy", [False, True])
def test_a_step_is_that_of_plackett_luce(tmp_path, greedy):
    """TRL's log-probs, and the weights after its step, equal those of loops over picks and groups."""
    store = make_store()
    before, after, given, asked = step(store, tmp_path, greedy)
    assert len(given["rows"]) == 16 and given["budget"] == [COUNT] * 16  # the rollout's columns reach the rewards

    def logs_of(row, picks):
        return plackett_luce(score_groups(before, store.visual([row], torch.tensor([COUNT])))[0] / TEMPERATURE, picks)

    assert asked
    for input_ids, found in asked:
        for (row, *picks), logs in zip(input_ids.tolist(), found, strict=True):
            torch.testing.assert_close(logs, logs_of(row, picks).detach(), atol=1e-5, rtol=0)

    loss = torch.zeros(())
    for first in range(0, 16, 4):  # groups are neighbours
        assert len(set(given["rows"][first : first + 4])) == 1
        rewards = torch.tensor(given["rewards"][first : first + 4])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for i in range(4):
            if not (greedy and i == 0):  # the leader counts for the mean alone
                logs = logs_of(given["rows"][first + i], given["picks"][first + i])
                loss = loss - advantages[i] * logs.sum() / (16 * COUNT)
    loss.backward()
    moved = 0.0
    for (name, start), end in zip(before.named_parameters(), after.parameters(), strict=True):
        change = RATE * start.grad if start.grad is not None else torch.zeros_like(start)
        torch.testing.assert_close(start - end, change, atol=2e-6, rtol=1e-3, msg=name)
        moved = max(moved, float(change.detach().abs().max()))
    assert moved > 1e-3
