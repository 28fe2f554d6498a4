"""A first glance, and a second look: what `generate` gives is, row by row, what the budget of its last look gives."""

import pytest
import torch
from asking import RAGGED, generate
from matrix import every_family
from promised import at, promise, promised
from tiny import IMAGE, build, make_inputs

from grip_hf.errors import UnsupportedModelError
from grip_hf.families.table import find_parts
from grip_hf.quality import again

pytestmark = pytest.mark.usefixtures("no_grad")
PROMPTS = [*RAGGED, [2, IMAGE, 6], [4, IMAGE, 1]]


class Towers:
    """Counts the calls of the vision tower: of what stands beside the language model."""

    def __init__(self, model):
        parts, self.calls = find_parts(model), []
        for name, child in parts.base.named_children():
            words = child is parts.base.get_input_embeddings() or name.startswith("embed_")  # of ids too, in Gemma 3n
            if child is not parts.language_model and not words:
                child.register_forward_hook(lambda *_, name=name: self.calls.append(name))

    def during(self, action):
        self.calls.clear()
        return action(), list(self.calls)


def picks(monkeypatch):
    """The rows of each second look whose arguments could be told apart."""
    found, own = [], again.Rows.pick
    monkeypatch.setattr(again.Rows, "pick", lambda self, rows, *more: (own(self, rows, *more), found.append(rows))[0])
    return found


def between(model, inputs, ratio):
    """A threshold that doubts some answers at a budget and not others."""
    promised(model, promise((ratio, 1.0), (0.0,)))
    generate(model, inputs)
    last = model.grip.last
    found = sorted(one for one, total in zip(last.confidence, last.total, strict=True) if total)
    return (found[1] + found[2]) / 2


@every_family(("llava", "qwen2_vl"))
def test_a_ladder_gives_what_its_rungs_give(family, monkeypatch):
    model, inputs = build(family), make_inputs(family, PROMPTS)
    if family == "janus":
        with pytest.raises(UnsupportedModelError, match="does not heed"):
            generate(promised(model), inputs)
        return
    towers, picked = Towers(model), picks(monkeypatch)
    threshold = between(model, inputs, 0.25)
    rungs = [at(model, inputs, ratio) for ratio in (0.25, 0.5, 1)]
    kept = [model.grip.kept_tokens(one) for one in rungs]
    _, once = towers.during(lambda: at(model, inputs, 0.25))

    for thresholds, end in (((0.0, 0.0), 0), ((1.0, 0.0), 1), ((1.0, 1.0), 2)):
        promised(model, promise((0.25, 0.5, 1.0), thresholds))
        found, calls = towers.during(lambda: generate(model, inputs))
        assert torch.equal(found.sequences, rungs[end].sequences)
        assert calls == once
        pictures = [total > 0 for total in model.grip.last.total]
        assert model.grip.last.looks == [end + 1 if seen else 1 for seen in pictures]
        assert all(map(torch.equal, model.grip.kept_tokens(found), kept[end]))

    picked.clear()
    promised(model, promise((0.25, 0.5, 1.0), (threshold, 1.0)))
    mixed, calls = towers.during(lambda: generate(model, inputs))
    last = model.grip.last
    assert set(last.looks) == {1, 3} and calls == once
    assert len(picked) == 2 and len(picked[0]) == last.looks.count(3), "all rows were looked at again"
    for row, number in enumerate(last.looks):
        assert torch.equal(mixed.sequences[row], rungs[number - 1].sequences[row])
        for step, scores in enumerate(mixed.logits):
            torch.testing.assert_close(scores[row], rungs[number - 1].logits[step][row], rtol=1e-4, atol=1e-4)
        assert torch.equal(last.kept[row], kept[number - 1][row])
        assert torch.equal(model.grip.kept_tokens(mixed)[row], kept[number - 1][row])
