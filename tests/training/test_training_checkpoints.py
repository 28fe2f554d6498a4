import json

import pytest
from classroom import make_scorer

from grip_hf.scorer.model import GripScorer, ScorerError
from grip_hf.training.checkpoints import CheckpointError, last_checkpoint, save_scorer


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
