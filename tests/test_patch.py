"""apply_grip and its handle: bad input, wrappers, copies, saving, and the less usual ways to call a model."""

import copy
import inspect
import json
import pickle

import pytest
import torch
from asking import RAGGED
from reference import held_positions, reference_generate, reference_logits
from safetensors.torch import load_file
from tiny import HIDDEN, IMAGE, IMAGE_ID, build, make_inputs, select_by_content
from transformers import DynamicCache, LlavaForConditionalGeneration
from versions import CACHE, RESET_EMPTIES

from grip_hf import GripConfig, GripScorer, apply_grip, remove_grip
from grip_hf.engine.taps import publish
from grip_hf.errors import CacheError, ConfigError, GripError, NonFiniteScoreError, ScorerError, UnsupportedModelError
from grip_hf.scorer.model import GripScorerConfig

pytestmark = pytest.mark.usefixtures("no_grad")

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture
def model():
    return build("llava")


@pytest.fixture
def inputs():
    return make_inputs("llava", RAGGED)


def tiny_scorer(hidden=HIDDEN):
    return GripScorer(GripScorerConfig(hidden_size=hidden, width=16, attention_width=8, num_heads=2)).eval()


def select_by_text(batch):
    """A selector whose choice depends on the question."""
    question = (batch.text * batch.text_mask[..., None]).sum(1) / batch.text_mask.sum(1, keepdim=True).clamp(min=1)
    return (batch.tokens * question[:, None]).sum(-1)


# Bad input


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({}, ConfigError, "needs a budget"),
        ({"config": 3}, ConfigError, "expected a GripConfig"),
        ({"scorer": "/no/such/folder"}, ScorerError, "/no/such/folder"),
    ],
)
def test_bad_sources(model, inputs, arguments, error, match):
    with pytest.raises(error, match=match):
        apply_grip(model, **arguments)
    assert_untouched(model, inputs)


@pytest.mark.parametrize(
    "settings, error, match",
    [
        ({"keep_ratio": 0}, ConfigError, "keep_ratio"),
        ({"keep_ratio": 1.5}, ConfigError, "keep_ratio"),
        ({"keep_ratio": float("nan")}, ConfigError, "keep_ratio"),
        ({"num_tokens": 0}, ConfigError, "num_tokens"),
        ({"keep_ratio": 0.5, "ratio": 1}, ConfigError, "'ratio'"),
        ({"keep_ratio": 0.5, "selector": "grip"}, ScorerError, "needs a scorer"),
        ({"keep_ratio": 0.5, "selector": "telepathy"}, ConfigError, "unknown selector 'telepathy'.*random"),
        ({"keep_ratio": 0.5, "selector": 3}, ConfigError, "selector must be"),
    ],
)
def test_bad_settings(model, inputs, settings, error, match):
    with pytest.raises(error, match=match):
        apply_grip(model, **settings)
    assert_untouched(model, inputs)


def test_scorer_of_another_width(model, inputs):
    with pytest.raises(ScorerError, match=f"hidden_size 48.*{HIDDEN}"):
        apply_grip(model, scorer=tiny_scorer(48), keep_ratio=0.5)
    assert_untouched(model, inputs)


@pytest.mark.parametrize("damage", ["missing", "cut", "text"])
def test_damaged_scorer_files(model, inputs, tmp_path, damage):
    tiny_scorer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:100] if damage == "cut" else b"not weights at all")
    with pytest.raises(ScorerError):
        apply_grip(model, scorer=tmp_path, keep_ratio=0.5)
    assert_untouched(model, inputs)


def test_a_failing_selector_keeps_the_patch_that_was_there(model, inputs):
    class Picky:
        def prepare(self, model):
            raise UnsupportedModelError("no tower to look into")

    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    before, handle = model(**inputs).logits, model.grip
    picky = Picky()
    with pytest.raises(ConfigError, match="selector must be"):
        apply_grip(model, keep_ratio=0.5, selector=picky)
    Picky.__call__ = lambda self, batch: select_by_content(batch)
    with pytest.raises(UnsupportedModelError, match="no tower"):
        apply_grip(model, keep_ratio=0.5, selector=picky)
    assert model.grip is handle and torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_scores(model, inputs, value):
    logits = model(**inputs).logits
    apply_grip(model, keep_ratio=0.5, selector=lambda batch: torch.full(batch.mask.shape, value))
    with pytest.raises(NonFiniteScoreError, match="group 0"):
        model(**inputs)
    with pytest.raises(NonFiniteScoreError):
        model.generate(**inputs, max_new_tokens=2)
    with model.grip.disabled():
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize(
    "scores, match",
    [
        (lambda batch: torch.zeros(1, 1), r"shape \(2, 32\).*\(1, 1\)"),
        (lambda batch: batch.mask, "bool"),
        (lambda batch: [0.0], "list"),
        (lambda batch: None, "NoneType"),
    ],
)
def test_scores_of_the_wrong_form(model, inputs, scores, match):
    apply_grip(model, keep_ratio=0.5, selector=scores)
    with pytest.raises(GripError, match=match):
        model(**inputs)


def test_bad_budgets_are_refused_before_the_block(model):
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    for bad in ({}, {"keep_ratio": 2}, {"num_tokens": [1, 0]}, {"keep_ratio": 0.5, "num_tokens": 1}):
        with pytest.raises(ConfigError):
            model.grip.budget(**bad)


def test_budgets_for_another_batch(model, inputs):
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    with model.grip.budget(num_tokens=[1, 2]), pytest.raises(ConfigError, match="2 values for a batch of 3"):
        model(**inputs)


def test_kept_tokens_needs_a_cache_with_pictures(model, inputs):
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    for nothing in (model(**inputs, use_cache=False), None, DynamicCache(), torch.zeros(1)):
        with pytest.raises(CacheError, match="no kept tokens"):
            model.grip.kept_tokens(nothing)


def test_unknown_arguments_per_token_are_refused(model, inputs):
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    for name, value in (("extra", torch.zeros_like(inputs["input_ids"])), ("cu_seq_lens_q", torch.tensor([0, 3]))):
        with pytest.raises(GripError, match=f"'{name}'"):
            model(**inputs, **{name: value})


def test_a_mask_of_the_wrong_length(model, inputs):
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    with pytest.raises(GripError, match="attention_mask covers 4 positions, expected 39"):
        model(**{**inputs, "attention_mask": inputs["attention_mask"][:, :4]})


def test_compact_positions_of_several_axes_are_refused():
    model = build("qwen2_vl")
    with pytest.raises(UnsupportedModelError, match="several axes"):
        apply_grip(model, keep_ratio=0.5, selector=select_by_content, position_ids="compact")
    assert not hasattr(model, "grip")


def assert_untouched(model, inputs):
    assert "grip" not in vars(model)
    fresh = build("llava")
    assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)


# The handle and the model around it


def test_patch_is_invisible(model, inputs):
    signature, keys = inspect.signature(model.forward), list(model.state_dict())
    modules = [name for name, _ in model.named_modules()]
    apply_grip(model, scorer=tiny_scorer(), keep_ratio=0.5)
    assert inspect.signature(model.forward) == signature and type(model) is LlavaForConditionalGeneration
    assert list(model.state_dict()) == keys and [name for name, _ in model.named_modules()] == modules
    assert (
        model.grip.config == GripConfig(keep_ratio=0.5, selector="grip")
        and model.grip.scorer is model.grip.selector.scorer
    )


def test_deepcopy_uses_its_own_weights(model, inputs):
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    before = model(**inputs).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, before) and twin.grip is not model.grip
    for parameter in twin.parameters():
        parameter.mul_(1.5)
    assert torch.equal(model(**inputs).logits, before)
    changed = twin(**inputs)
    assert not torch.allclose(changed.logits, before)
    assert len(twin.grip.kept_tokens(changed)[0]) == 8
    with model.grip.budget(num_tokens=1):
        assert len(twin.grip.kept_tokens(twin(**inputs))[0]) == 8  # the copy has its own budget
    twin.grip.remove()
    assert not hasattr(twin, "grip") and torch.equal(model(**inputs).logits, before)


def test_pickled_models_stay_pruned(model, inputs):
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    remove_grip(twin)
    assert_untouched(twin, inputs)


def test_saved_models_are_plain(model, inputs, tmp_path):
    logits = model(**inputs).logits
    apply_grip(model, scorer=tiny_scorer(), keep_ratio=0.5)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and "grip" not in config
    assert not any("scorer" in name for name in load_file(tmp_path / "model.safetensors"))
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, logits)


def test_handle_round_trip(model, inputs, tmp_path):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    logits = model(**inputs).logits
    model.grip.save_pretrained(tmp_path)
    apply_grip(model, scorer=tmp_path)
    assert model.grip.config == GripConfig(num_tokens=3, selector="grip")
    assert torch.equal(model(**inputs).logits, logits)
    apply_grip(model, scorer=str(tmp_path), keep_ratio=1.0)
    assert model.grip.config.keep_ratio == 1.0 and model.grip.config.num_tokens is None
    given = GripConfig(keep_ratio=0.7, scope="image")  # before those saved with the scorer
    assert apply_grip(model, given, scorer=tmp_path).grip.config == given.replace(selector="grip")
    apply_grip(model, keep_ratio=0.5, selector="grid")
    plain = tmp_path / "plain"
    model.grip.save_pretrained(plain)
    assert apply_grip(model, scorer=plain).grip.config == GripConfig(keep_ratio=0.5, selector="grid")


def test_the_grip_part_of_a_checkpoint_is_found(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    logits = model(**inputs).logits
    model.grip.save_pretrained(tmp_path / "grip")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(apply_grip(again)(**inputs).logits, logits)
    assert again.grip.config == GripConfig(num_tokens=3, selector="grip")
    apply_grip(again, num_tokens=5)
    assert again.grip.scorer is not None and again.grip.config == GripConfig(num_tokens=5, selector="grip")
    assert apply_grip(again, GripConfig(keep_ratio=0.5)).grip.scorer is not None
    assert apply_grip(again, keep_ratio=0.5, selector="grid").grip.scorer is None
    assert apply_grip(again, keep_ratio=0.5, selector=select_by_content).grip.scorer is None


def test_peft_before_and_after(model, inputs):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=2)
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    after = peft.get_peft_model(model, lora).eval()
    pruned = after(**inputs)
    assert [len(kept) for kept in after.grip.kept_tokens(pruned)] == [8, 16, 0]
    remove_grip(after)
    assert not hasattr(model, "grip")
    full = after(**inputs).logits
    assert not torch.allclose(full, pruned.logits)
    assert apply_grip(after, keep_ratio=0.5, selector=select_by_content) is after
    assert torch.equal(after(**inputs).logits, pruned.logits)
    merged = after.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, pruned.logits, **CLOSE)
    remove_grip(merged)
    torch.testing.assert_close(merged(**inputs).logits, full, **CLOSE)


# Less usual calls


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "smolvlm"])
def test_base_model_positional_arguments_and_tuples(family):
    model, inputs = build(family), make_inputs(family, RAGGED)
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    expected = model.model(**inputs).last_hidden_state
    names = list(inspect.signature(type(model.model).forward).parameters)[1:]
    count = max(names.index(name) for name in inputs) + 1
    positional = [inputs.get(name) for name in names[:count]]
    assert torch.equal(model.model(*positional).last_hidden_state, expected)
    assert torch.equal(model.model(**inputs, return_dict=False)[0], expected)
    logits = model(**inputs).logits
    assert torch.equal(model(**inputs, return_dict=False)[0], logits)
    for rows in (1, torch.tensor([-1])):
        torch.testing.assert_close(model(**inputs, logits_to_keep=rows).logits, logits[:, -1:], **CLOSE)


def test_hidden_states_keep_their_length(model, inputs):
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    shape = inputs["input_ids"].shape
    assert len(out.hidden_states) == 3 and all(state.shape[:2] == shape for state in out.hidden_states)
    assert torch.equal(out.logits, model(**inputs).logits)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_choice_ignores_generated_text(model, use_cache):
    """A selector that reads the question chooses the same tokens at every step."""
    inputs = make_inputs("llava", RAGGED)
    apply_grip(model, keep_ratio=0.5, selector=select_by_text)
    kept = model.grip.kept_tokens(model(**inputs))
    out = model.generate(
        **inputs, max_new_tokens=6, use_cache=use_cache, return_dict_in_generate=True, output_logits=True
    )
    remove_grip(model)
    tokens, logits = reference_generate(model, inputs, held_positions(inputs, kept), 6)
    assert torch.equal(out.sequences[:, -6:], tokens)
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, **CLOSE)


def test_the_choice_ignores_labelled_text(model):
    inputs = make_inputs("llava", [[3, IMAGE, 4]])
    answered = dict(inputs)
    answer = torch.tensor([[40, 41, 42]])
    answered["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    answered["attention_mask"] = torch.ones_like(answered["input_ids"])
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
    apply_grip(model, num_tokens=5, selector=select_by_text)
    asked = model.grip.kept_tokens(model(**inputs))[0]
    assert torch.equal(model.grip.kept_tokens(model(**answered, labels=labels))[0], asked)
    assert not torch.equal(model.grip.kept_tokens(model(**answered))[0], asked)  # here it is all one question


def test_compact_positions(model):
    inputs = make_inputs("llava", RAGGED)
    apply_grip(model, keep_ratio=0.5, selector=select_by_content, position_ids="compact")
    out = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
    kept = model.grip.kept_tokens(out)
    remove_grip(model)
    # Reference: rows without the dropped tokens, as if they had never been there.
    held = held_positions(inputs, kept)
    embeds = merged_embeddings(model, inputs)
    for row in range(3):
        state, positions = embeds[row][held[row]][None], None
        for step in range(4):
            positions = torch.arange(state.shape[1])[None]
            hidden = model.model.language_model(inputs_embeds=state, position_ids=positions, use_cache=False)
            logits = model.lm_head(hidden.last_hidden_state[:, -1])
            torch.testing.assert_close(out.logits[step][row], logits[0], **CLOSE)
            state = torch.cat([state, model.get_input_embeddings()(logits.argmax(-1, keepdim=True))], 1)


def merged_embeddings(model, inputs):
    """What enters the language model of an unpatched model."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    return seen[0]


def test_taps_reach_the_selector_also_through_generate(model):
    """A tap from inside the vision tower, for beams, with and without a cache."""
    inputs = make_inputs("llava", RAGGED)
    seen = []

    class Tapper:
        def prepare(self, model):
            def tap(module, args, output):
                publish("first", output, lambda: output.flatten(0, 1)[..., 0])

            return [model.model.multi_modal_projector.register_forward_hook(tap)]

        def __call__(self, batch):
            seen.append(batch)
            return select_by_content(batch)

    apply_grip(model, keep_ratio=0.5, selector=Tapper())
    model(**inputs)
    for use_cache in (True, False):
        model.generate(**inputs, max_new_tokens=2, num_beams=2, use_cache=use_cache)
    assert len(seen) == 4
    for batch in seen:
        assert torch.equal(batch.taps["first"], batch.tokens[..., 0])
    hooks = model.model.multi_modal_projector._forward_hooks
    assert len(hooks) == 1
    remove_grip(model)
    assert not hooks


def test_cropping_within_the_answer_and_within_the_picture(model):
    inputs = make_inputs("llava", [[3, IMAGE, 4]])
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    cache = model(**inputs, use_cache=True)[CACHE]
    length = cache.get_seq_length()
    held = held_positions(inputs, model.grip.kept_tokens(cache))
    cache.crop(-2)
    assert cache.get_seq_length() == length - 2
    out = model(input_ids=inputs["input_ids"][:, -2:], **{CACHE: cache})
    with pytest.raises(CacheError, match="cannot crop"):
        cache.crop(-10)
    assert cache.get_seq_length() == length
    remove_grip(model)
    torch.testing.assert_close(out.logits, reference_logits(model, inputs, held)[:, -2:], **CLOSE)
    plain = model(**inputs, use_cache=True)[CACHE]
    for one in (cache, plain):
        one.reset()
    assert (plain.get_seq_length() == 0) == (cache.get_seq_length() == 0) == RESET_EMPTIES


def test_batch_rows_of_a_cache_can_be_picked_and_repeated(model, inputs):
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    cache = model(**inputs, use_cache=True)[CACHE]
    kept = model.grip.kept_tokens(cache)
    cache.batch_repeat_interleave(2)
    assert all(torch.equal(a, kept[i // 2]) for i, a in enumerate(model.grip.kept_tokens(cache)))
    cache.batch_select_indices(torch.tensor([2, 4]))
    token = torch.tensor([[5], [5]])
    mask = torch.nn.functional.pad(inputs["attention_mask"][[1, 2]], (0, 1), value=1)
    picked = model(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits
    rows = {name: value[[1, 2]] for name, value in inputs.items() if name != "pixel_values"}
    rows["pixel_values"] = inputs["pixel_values"][1:]
    again = model(**rows, use_cache=True)[CACHE]
    expected = model(input_ids=token, attention_mask=mask, **{CACHE: again}).logits
    torch.testing.assert_close(picked, expected, **CLOSE)


def test_image_tokens_are_found_by_id(model, inputs):
    assert int((inputs["input_ids"] == IMAGE_ID).sum()) == 48
    apply_grip(model, num_tokens=1, selector=select_by_content)
    assert sum(len(kept) for kept in model.grip.kept_tokens(model(**inputs))) == 2
