"""vLLM's greedy tokens are those of the patched transformers model, family by family, on tiny random models."""

import pytest
import torch
from vllm_checkpoints import HIDDEN, PROMPTS, write
from vllm_engines import Ask, ask, engine, picture, reference, write_scorer

pytestmark = pytest.mark.vllm

SIZES = ((64, 40), (40, 64), (64, 64))
SERVED = [family for family in PROMPTS if family != "gemma3"]


def load(folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def asks_of(family):
    """Twelve questions about pictures of three shapes, and three requests with two pictures each."""
    mark = PROMPTS[family]
    ones = [Ask(picture(n, size), f"{mark} w{n} w{n + 7} w{2 * n}") for n in range(4) for size in SIZES]
    if family == "llava_onevision":
        return ones, []  # with several pictures vLLM cuts each into tiles, transformers none
    twos = [Ask([picture(9), picture(n, size)], f"{mark} w{n} {mark} w3 w{n}") for n, size in enumerate(SIZES)]
    return ones, twos


@pytest.mark.parametrize("family", SERVED)
def test_the_learned_scorer_keeps_what_it_keeps_in_transformers(family, tmp_path):
    folder, scorer = write(family, tmp_path / "model"), write_scorer(tmp_path / "scorer", HIDDEN)
    model, processor = load(folder)
    ones, twos = asks_of(family)
    settings = {"keep_ratio": 0.3, "scope": "image"}
    want = reference(model, processor, ones + twos, scorer=scorer, **settings)
    unpruned = reference(model, processor, ones, scorer=scorer, keep_ratio=1.0)
    grid = reference(model, processor, ones, selector="grid", **settings)
    # What is kept, and what is not, shows in the answers; else their equality would say little.
    assert sum(a != b for a, b in zip(want, unpruned, strict=False)) >= 9
    assert sum(a != b for a, b in zip(want, grid, strict=False)) >= 9
    if "qwen" not in family:  # whose positions have several axes, and cannot be made compact
        compact = reference(model, processor, ones, scorer=scorer, position_ids="compact", **settings)
        assert sum(a != b for a, b in zip(want, compact, strict=False)) >= 3
    with engine(folder, {"scorer": scorer, **settings}) as llm:
        assert ask(llm, ones + twos) == want
        everything = [Ask(one.pictures, one.prompt, {"keep_ratio": 1.0}) for one in ones]
        assert ask(llm, everything) == unpruned
        counted = [Ask(one.pictures, one.prompt, {"num_tokens": 5}) for one in ones + twos]
        assert ask(llm, counted) == reference(model, processor, counted, scorer=scorer, **settings)


@pytest.mark.parametrize("selector", ["similarity", "diversity", "cdpruner", "grid", "random"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_selectors_without_training_are_served_too(family, selector, tmp_path):
    folder = write(family, tmp_path / "model")
    ones, twos = asks_of(family)
    settings = {"selector": selector, "num_tokens": 9, "scope": "image", "seed": 3}
    want = reference(*load(folder), ones + twos, **settings)
    with engine(folder, settings) as llm:
        assert ask(llm, ones + twos) == want


def test_positions_of_several_axes_are_kept_by_a_compiled_model_too(tmp_path):
    """M-RoPE positions are moved in the runner's own buffer, which torch.compile wants as it is."""
    folder, scorer = write("qwen2_5_vl", tmp_path / "model"), write_scorer(tmp_path / "scorer", HIDDEN)
    ones, _ = asks_of("qwen2_5_vl")
    want = reference(*load(folder), ones, scorer=scorer, keep_ratio=0.3)
    with engine(folder, {"scorer": scorer, "keep_ratio": 0.3}, enforce_eager=False) as llm:
        assert ask(llm, ones) == want
        assert [answer for one in ones for answer in ask(llm, [one])] == want


def test_a_scorer_that_reads_no_question_is_served(tmp_path):
    folder = write("llava", tmp_path / "model")
    scorer = write_scorer(tmp_path / "scorer", HIDDEN, query_aware=False)
    ones, _ = asks_of("llava")
    want = reference(*load(folder), ones, scorer=scorer, keep_ratio=0.3)
    with engine(folder, {"scorer": scorer, "keep_ratio": 0.3}) as llm:
        assert ask(llm, ones) == want


def test_without_settings_a_model_is_served_as_it_is(tmp_path):
    folder = write("llava", tmp_path / "model")
    ones, _ = asks_of("llava")
    want = reference(*load(folder), ones, selector="grid", keep_ratio=1.0)
    with engine(folder) as llm:
        assert ask(llm, ones) == want
        assert llm.llm_engine.model_config.uses_mrope is False


def test_a_family_that_is_not_served_is_refused(tmp_path):
    folder = write("gemma3", tmp_path / "model")
    with (
        pytest.raises(Exception, match=r"does not prune Gemma3ForConditionalGeneration.*LlavaForConditionalGen"),
        engine(folder, {"selector": "grid", "keep_ratio": 0.5}),
    ):
        pass
