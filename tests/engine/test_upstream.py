"""What is known of transformers is checked when it is used: a simulated rename raises and never returns numbers."""

import functools
import inspect
import pathlib

import pytest
import torch
from tiny import IMAGE, build, make_inputs, select_by_content
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from versions import CACHE

import grip_hf
from grip_hf import apply_grip, remove_grip
from grip_hf.engine.cache import returned
from grip_hf.errors import GripError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("no_grad")
ROOT = pathlib.Path(grip_hf.__file__).parent
PROMPT = [[3, IMAGE, 4]]
NAMES = ("past_key_values", "cache_params", "mm_encoder_outputs", "cumulative_length", "_attn_implementation")


def patch(model, **settings):
    return apply_grip(model, **{"keep_ratio": 0.25, "selector": select_by_content, **settings})


def rename(model, old, new):
    """Let a tiny model's language model take an argument under another name, and its base model give it so."""
    language_model = model.model.language_model
    forward = language_model.forward
    parameters = [
        one.replace(name=new) if one.name == old else one for one in inspect.signature(forward).parameters.values()
    ]

    @functools.wraps(forward)
    def renamed(*args, **kwargs):
        if new in kwargs:
            kwargs[old] = kwargs.pop(new)
        return forward(*args, **kwargs)

    renamed.__signature__ = inspect.Signature(parameters)
    language_model.forward = renamed

    class Renaming(type(language_model)):
        def __call__(self, *args, **kwargs):
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
            return super().__call__(*args, **kwargs)

    language_model.__class__ = Renaming


@pytest.mark.parametrize("old", [CACHE, "inputs_embeds", "attention_mask", "position_ids"])
def test_an_argument_renamed_before_patching_is_refused(old):
    model, inputs = build("llava"), make_inputs("llava", PROMPT)
    expected = model(**inputs).logits
    rename(model, old, "memory")
    assert torch.equal(model(**inputs).logits, expected)  # the unpatched model works as before
    before = set(vars(model))
    with pytest.raises(UnsupportedModelError, match=r"memory.*is installed, .* are tested"):
        patch(model)
    assert set(vars(model)) == before and not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("selector", [select_by_content, "fastv"])
def test_a_cache_under_a_name_that_nobody_knows_raises_in_each_call(selector):
    """As if the name had changed between patching and calling."""
    model, inputs = build("llava"), make_inputs("llava", PROMPT)
    patch(model, selector=selector, selector_kwargs={"layers": 1} if selector == "fastv" else {})
    rename(model, CACHE, "memory")
    for call in (
        lambda: model.generate(**inputs, max_new_tokens=3),
        lambda: model(**inputs, **{CACHE: DynamicCache(config=model.config.get_text_config())}),
    ):
        with pytest.raises(UnsupportedModelError, match="a KV cache was given as 'memory'"):
            call()


def test_what_stands_where_the_cache_should_is_refused():
    model, inputs = patch(build("llava")), make_inputs("llava", PROMPT)
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, CACHE: seen["cache"]}), with_kwargs=True, prepend=True
    )
    for seen["cache"] in ((torch.zeros(1),), "a string"):
        with pytest.raises(UnsupportedModelError, match="not a cache of transformers"):
            model(**inputs)
    hook.remove()


@pytest.mark.parametrize(
    "sizes",
    [
        lambda self, query_length, layer_idx: (query_length, 0),  # forgets what is cached
        lambda self, query_length, layer_idx: (query_length + 7, 0),
        lambda self, query_length, layer_idx: (query_length + 3, 3),
        lambda self, query_length, layer_idx: query_length,
    ],
    ids=["forgets", "adds", "offset", "number"],
)
def test_mask_sizes_that_mean_something_else_raise(sizes, monkeypatch):
    model, inputs = patch(build("llava")), make_inputs("llava", PROMPT)
    cache = model(**inputs, use_cache=True)[CACHE]
    monkeypatch.setattr(DynamicCache, "get_mask_sizes", sizes)
    turn = {**inputs, "attention_mask": torch.ones(1, 2 * inputs["input_ids"].shape[1], dtype=torch.long)}
    with pytest.raises(UnsupportedModelError, match="get_mask_sizes"):
        model(**turn, **{CACHE: cache})


def test_mask_sizes_with_other_arguments_are_refused_when_patching(monkeypatch):
    monkeypatch.setattr(DynamicCache, "get_mask_sizes", lambda self, cache_position, layer_idx: (1, 0))
    model = build("llava")
    with pytest.raises(UnsupportedModelError, match=r"DynamicCache\.get_mask_sizes takes"):
        patch(model)
    assert not hasattr(model, "grip")


@pytest.mark.parametrize("missing", ["crop", "reorder_cache", "batch_select_indices", "reset"])
def test_a_cache_without_a_method_is_refused(missing, monkeypatch):
    monkeypatch.setattr(DynamicCache, missing, None, raising=False)
    with pytest.raises(UnsupportedModelError, match=missing):
        patch(build("llava"))


@pytest.mark.parametrize("wanted", [False, True], ids=["not asked for", "with more in it"])
def test_a_cache_that_nobody_gave_raises(wanted):
    model, inputs = patch(build("llava")), make_inputs("llava", PROMPT)
    other = DynamicCache(config=model.config.get_text_config())
    model.model.language_model(inputs_embeds=torch.zeros(1, 3, 32), use_cache=True, **{CACHE: other})

    def give(module, args, kwargs, output):
        output[CACHE] = other
        return output

    model.model.language_model.register_forward_hook(give, with_kwargs=True, prepend=True)
    with pytest.raises(UnsupportedModelError, match="that nobody gave"):
        model(**inputs, use_cache=wanted)


def test_another_cache_than_the_one_given_raises():
    model, inputs = patch(build("llava")), make_inputs("llava", PROMPT)
    config = model.config.get_text_config()

    def swap(module, args, kwargs, output):
        output[CACHE] = DynamicCache(config=config)
        return output

    model.model.language_model.register_forward_hook(swap, with_kwargs=True, prepend=True)
    with pytest.raises(UnsupportedModelError, match="another DynamicCache than it was given"):
        model(**inputs, **{CACHE: DynamicCache(config=config)})


def test_an_argument_per_token_that_is_not_known_raises():
    model, inputs = patch(build("llava")), make_inputs("llava", PROMPT)
    length = inputs["input_ids"].shape[1]
    for value in (torch.zeros(1, length), torch.zeros(1, length, 4), torch.arange(length)):
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs, value=value: (args, {**kwargs, "new_per_token": value}),
            with_kwargs=True,
            prepend=True,
        )
        with pytest.raises(GripError, match="'new_per_token'"):
            model(**inputs)
        hook.remove()


def test_a_language_model_put_in_place_later_raises():
    model, other, inputs = build("llava"), build("llava", seed=1), make_inputs("llava", PROMPT)
    patch(model)
    model.model.language_model = other.model.language_model
    with pytest.raises(GripError, match="was not called: another module stands in its place"):
        model(**inputs)
    remove_grip(model)
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_only_one_folder_knows_the_names_of_transformers():
    """Neither in quotes nor as an attribute; the self-check, which calls models as users do, builds inputs by name."""
    for path in ROOT.rglob("*.py"):
        if "upstream" in path.parts or "doctor" in path.parts:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = [name for name in NAMES if f'"{name}"' in line or f".{name}" in line or f"{name}=" in line]
            assert not found, f"{path.relative_to(ROOT)}:{number} knows {found}"


def test_the_output_is_known_by_its_type():
    out = BaseModelOutputWithPast(**{"last_hidden_state": torch.zeros(1, 1, 1), CACHE: DynamicCache()})
    assert isinstance(returned(out), DynamicCache) and isinstance(returned((1, DynamicCache())), DynamicCache)
    assert returned((1, 2)) is None
