import json
import resource

import pytest
import torch
from classroom import make_scorer, make_store
from versions import TRAINING

from grip_hf.engine.keepsets import topk_mask
from grip_hf.errors import FileError
from grip_hf.scorer.model import GripScorer, GripScorerConfig, ScorerError
from grip_hf.selectors.grip import GripSelector
from grip_hf.training.checkpoints import CheckpointError, last_checkpoint, save_scorer
from grip_hf.training.pipeline import train_scorer
from grip_hf.training.plan import TrainingPlan, keep_plan, read_plan
from grip_hf.training.rewards import closeness
from grip_hf.training.rollout import BudgetRange


def write(folder, step, complete=True, width=16, nested=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    config = {"scorer": {"hidden_size": width}} if nested else {"hidden_size": width}
    (path / "config.json").write_text(json.dumps(config))
    (path / "trainer_state.json").write_text("{}" if complete else '{"global_')
    return str(path)


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    assert last_checkpoint(tmp_path / "none", 16) is None
    wanted = write(tmp_path, 100)
    write(tmp_path, 20, nested=False)
    write(tmp_path, 300, complete=False)
    (tmp_path / "checkpoint-400").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert last_checkpoint(tmp_path, 16) == wanted


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    write(tmp_path, 5, width=32)
    with pytest.raises(CheckpointError, match="width 32, this model has 16"):
        last_checkpoint(tmp_path, 16)


def test_an_interrupted_save_leaves_the_old_scorer(tmp_path, monkeypatch):
    old, new = make_scorer(0), make_scorer(1)
    save_scorer(old, tmp_path / "scorer")

    def cut_off(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(new, "save_pretrained", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save_scorer(new, tmp_path / "scorer")
    kept = GripScorer.from_pretrained(tmp_path / "scorer").state_dict()
    assert all((value == old.state_dict()[name]).all() for name, value in kept.items())
    with pytest.raises(ScorerError):
        GripScorer.from_pretrained(tmp_path / "scorer.new")
    monkeypatch.undo()
    save_scorer(new, tmp_path / "scorer")
    kept = GripScorer.from_pretrained(tmp_path / "scorer").state_dict()
    assert all((value == new.state_dict()[name]).all() for name, value in kept.items())
    assert not (tmp_path / "scorer.new").exists()


def plan(folder, **changes):
    """Three steps of warm-up and two of GRPO, a checkpoint after each."""
    shared = {"use_cpu": True, "disable_tqdm": True}
    settings = {
        "warmup_steps": 3, "steps": 2, "save_every": 1, "scorer": {"width": 16},
        "warmup_args": {**shared, "per_device_train_batch_size": 2},
        "args": {**shared, "per_device_train_batch_size": 4, "num_generations": 4},
    }  # fmt: skip
    return TrainingPlan(output=folder, **{**settings, **changes})


class Stop(Exception):
    """What ends a run in its middle."""


def stopped_after(step, stage=3):
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == step and state.max_steps == stage:
                raise Stop

    return Stopper()


@TRAINING
def test_the_same_plan_goes_on_and_another_one_is_refused(tmp_path):
    said, store = [], make_store()
    with pytest.raises(Stop):
        train_scorer(plan(tmp_path), store, [stopped_after(2)], say=said.append)
    assert said == [] and read_plan(tmp_path)["scorer"] == {"width": 16}
    for changes, message in (
        ({"scorer": {"width": 32}}, "scorer.width is 16 there, 32 here"),
        ({"method": "relaxed", "args": {}}, "method is 'grpo' there, 'relaxed' here"),
        ({"steps": 4, "seed": 1}, "steps is 2 there, 4 here; seed is 0 there, 1 here"),
        ({"budgets": BudgetRange(0.1, 0.6)}, r"budgets is \[0.03, 0.6\] there, \[0.1, 0.6\] here"),
        ({"options": {"rewards": [closeness]}}, "options.rewards is None there, .*closeness"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train_scorer(plan(tmp_path, **changes), store)
    with pytest.raises(CheckpointError, match="questions is 8 there, 6 here"):
        train_scorer(plan(tmp_path), make_store(6))
    train_scorer(plan(tmp_path), store, say=said.append)
    assert said == ["warmup: resuming from step 2"]
    weights = (tmp_path / "model.safetensors").read_bytes()
    again = plan(tmp_path, args={**plan(tmp_path).args, "report_to": "none"})  # decides nothing that is learnt
    train_scorer(again, store, say=said.append)
    assert said[1:] == [f"{tmp_path}: finished, nothing to do"]
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert json.loads((tmp_path / "grip_config.json").read_text())["keep_ratio"] == 0.25
    assert not list(tmp_path.rglob("README.md"))


@TRAINING
def test_a_run_goes_on_from_another_scorer(tmp_path):
    store, given = make_store(), make_scorer()
    save_scorer(given, tmp_path / "given")
    more = {"start": str(tmp_path / "given"), "scorer": {}, "warmup_steps": 0}
    untouched = train_scorer(plan(tmp_path / "none", **more, steps=0), store)
    assert all((value == given.state_dict()[name]).all() for name, value in untouched.state_dict().items())
    trained = train_scorer(plan(tmp_path / "more", **more), store)
    assert any((value != given.state_dict()[name]).any() for name, value in trained.state_dict().items())
    remembering = train_scorer(plan(tmp_path / "memory", **{**more, "scorer": {"memory_width": 4}}, steps=0), store)
    assert remembering.config.width == 16 and remembering.config.memory_width == 4
    batch = store.visual([0, 1], torch.tensor([4, 7]))
    scores = [GripSelector(one)(batch) for one in (given, remembering)]
    assert torch.equal(*(topk_mask(one, batch.mask, batch.budgets) for one in scores))
    # Another scorer in the same place is another run; sizes of its own and another model are refused.
    save_scorer(make_scorer(1), tmp_path / "given")
    with pytest.raises(CheckpointError, match=r"start is '.*given .* there, '.*given .* here"):
        train_scorer(plan(tmp_path / "more", **more), store)
    with pytest.raises(ScorerError, match=r"sizes of its own: \{'width': 16\}, got \{'width': 32\}"):
        train_scorer(plan(tmp_path / "wide", **{**more, "scorer": {"width": 32}}), store)
    other = GripScorer(GripScorerConfig(hidden_size=8, width=16, attention_width=16, num_heads=2))
    save_scorer(other, tmp_path / "given")
    with pytest.raises(ScorerError, match="made for hidden_size 8"):
        train_scorer(plan(tmp_path / "other", **more), store)
    assert not (tmp_path / "wide" / "plan.json").exists()


def test_a_run_without_its_plan_is_refused(tmp_path):
    save_scorer(make_scorer(), tmp_path / "warmup" / "scorer")
    with pytest.raises(CheckpointError, match="unknown settings"):
        keep_plan(tmp_path, {})
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"plan.json cannot be read"):
        keep_plan(tmp_path, {})


@TRAINING
@pytest.mark.parametrize("stage", ["warmup", "grpo"])
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, stage):
    """No file may grow beyond what the second checkpoint of a stage has room for; then there is room again."""
    store, limits = make_store(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(Stop):
        train_scorer(plan(tmp_path), store, [stopped_after(1, 3 if stage == "warmup" else 2)])
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a scorer's weights are larger
        with pytest.raises(FileError, match=r"checkpoint-2 cannot be written .* checkpoint-1 is kept; make room"):
            train_scorer(plan(tmp_path), store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / stage).iterdir() if path.is_dir()] == ["checkpoint-1"]
    said = []
    train_scorer(plan(tmp_path), store, say=said.append)
    assert said == [f"{stage}: resuming from step 1"]


def test_other_errors_of_a_run_are_their_own(tmp_path):
    write(tmp_path / "warmup", 7, complete=False)  # left behind by a run that was killed
    from grip_hf.training.checkpoints import saving

    with pytest.raises(RuntimeError, match="out of memory"), saving(tmp_path / "warmup"):
        raise RuntimeError("out of memory")
    assert (tmp_path / "warmup" / "checkpoint-7").is_dir()
