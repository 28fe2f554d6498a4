"""What the READMEs say of adding a selector and a family, done once with their own words."""

import importlib
import sys

import pytest
import torch
from asking import RAGGED
from readme import ROOT, fenced
from reference import assert_close, held_positions, reference_logits
from tiny import IMAGE, IMAGE_ID, TINY, build, make_inputs, select_by_content
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from grip_hf import GripConfig, apply_grip
from grip_hf.errors import ConfigError, UnsupportedModelError
from grip_hf.families.table import FAMILIES
from grip_hf.selectors import SELECTORS

pytestmark = pytest.mark.usefixtures("no_grad")


def snippet(folder):
    """The one Python snippet of a folder's README."""
    [found] = fenced("python", (ROOT / "grip_hf" / folder / "README.md").read_text(encoding="utf-8"))
    return found


# A selector in a file of its own


@pytest.fixture
def centre(tmp_path, monkeypatch):
    """The module `centre.py` of the README, imported from a folder that has nothing to do with the package."""
    (tmp_path / "centre.py").write_text(snippet("selectors"))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("centre")
    SELECTORS.pop("centre", None)
    sys.modules.pop("centre", None)


def middle(power, count, side=4):
    """The tokens next to the middle of a square picture, calculated from the grid alone."""

    def far(token):
        places = (token // side, token % side)
        return sum(abs((place + 0.5) / side - 0.5) ** power for place in places)

    return sorted(sorted(range(side * side), key=far)[:count])


def test_a_new_selector_by_the_readme(centre, tmp_path):
    model, inputs = build("llava"), make_inputs("llava", [[3, IMAGE, 4]])
    apply_grip(model, keep_ratio=0.25, selector="centre", selector_kwargs={"power": 1.0})
    [kept] = model.grip.kept_tokens(model(**inputs))
    assert kept.tolist() == middle(1.0, 4) == [5, 6, 9, 10] and model.grip.selector.power == 1.0
    logits = model(**inputs).logits
    model.grip.save_pretrained(tmp_path / "saved")
    again = apply_grip(build("llava"), GripConfig.from_pretrained(tmp_path / "saved"))
    assert torch.equal(again(**inputs).logits, logits) and type(again.grip.selector) is centre.CentreSelector
    with pytest.raises(ConfigError, match="takes the arguments"):
        apply_grip(model, keep_ratio=0.25, selector="centre", selector_kwargs={"powers": 1.0})


def test_the_new_selector_keeps_what_the_page_asks_of_scores(centre):
    """A picture's tokens are the same alone and in a batch with other pictures and padding."""
    model = build("llava")
    apply_grip(model, keep_ratio=0.25, selector="centre", scope="image")
    together = model.grip.kept_tokens(model(**make_inputs("llava", RAGGED)))
    for prompt, kept in zip(RAGGED, together, strict=True):
        if IMAGE in prompt:
            [alone] = model.grip.kept_tokens(model(**make_inputs("llava", [prompt])))
            assert alone.tolist() == kept.tolist() and len(kept) == 4 * prompt.count(IMAGE)


def test_the_selector_is_unknown_before_its_file_is_imported():
    with pytest.raises(ConfigError, match="unknown selector 'centre'"):
        apply_grip(build("llava"), keep_ratio=0.25, selector="centre")


# A family of one row


class MyLlavaConfig(LlavaConfig):
    model_type = "my_llava"


class MyLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = MyLlavaConfig


@pytest.fixture
def mine():
    """LLaVA under another name, as its author would have it."""
    settings = TINY["llava"].config().to_dict()
    settings.pop("model_type")
    torch.manual_seed(0)
    AutoConfig.register("my_llava", MyLlavaConfig, exist_ok=True)
    model = MyLlavaForConditionalGeneration(MyLlavaConfig(**settings)).eval()
    model.lm_head.weight[89:] = 0
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def row():
    """The row of the README, added by its own snippet."""
    before = dict(FAMILIES)
    exec(compile(snippet("families"), "grip_hf/families/README.md", "exec"), {})
    assert set(FAMILIES) - set(before) == {"my_llava"}
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def test_a_model_without_a_row_is_refused(mine):
    with pytest.raises(UnsupportedModelError, match="'my_llava'"):
        apply_grip(mine, keep_ratio=0.5)


def test_a_new_family_by_the_readme(mine, row):
    """Its three checks: all tokens change nothing, the reference agrees, and each picture has its own budget."""
    inputs = make_inputs("llava", RAGGED)
    full = mine(**inputs).logits
    said = mine.generate(**inputs, max_new_tokens=4, do_sample=False)
    apply_grip(mine, keep_ratio=1.0, selector=select_by_content)
    assert torch.equal(mine(**inputs).logits, full)
    assert torch.equal(mine.generate(**inputs, max_new_tokens=4, do_sample=False), said)

    apply_grip(mine, keep_ratio=0.5, selector=select_by_content)
    out = mine(**inputs)
    held = held_positions(inputs, mine.grip.kept_tokens(out))
    assert int(held.sum()) < int(inputs["attention_mask"].sum())
    mine.grip.remove()
    assert_close("llava", out.logits[held], reference_logits(mine, inputs, held)[held])

    apply_grip(mine, keep_ratio=0.5, selector=select_by_content, scope="image")
    pictures = (inputs["input_ids"] == IMAGE_ID).sum(1) // 16
    for kept, count in zip(mine.grip.kept_tokens(mine(**inputs)), pictures.tolist(), strict=True):
        assert [int(((kept >= 16 * i) & (kept < 16 * (i + 1))).sum()) for i in range(count)] == [8] * count


def test_the_default_selector_works_for_the_new_family_too(mine, row):
    apply_grip(mine, GripConfig(keep_ratio=0.25))
    assert len(mine.grip.kept_tokens(mine(**make_inputs("llava", [[3, IMAGE, 4]])))[0]) == 4
    with pytest.raises(UnsupportedModelError, match="'my_llava'"):  # it has no row among the towers
        apply_grip(mine, keep_ratio=0.25, selector="cls_attention")
