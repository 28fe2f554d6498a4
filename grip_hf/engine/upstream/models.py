"""What is asked of a model when it is patched: its signatures, its caches' methods, its layers, its adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers.cache_utils import DynamicCache

from .calls import is_recurrent
from .names import ADAPTERS_LOADED, ATTENTION, CACHE_NAMES, ENCODED, ENCODED_SINCE, NEEDED, unknown


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's `forward`."""
    return tuple(inspect.signature(module.forward).parameters)


def parameters_of(module: nn.Module, method: str) -> tuple[str, ...]:
    """Names of the arguments of a method of a module; none if it has no such method."""
    found = getattr(module, method, None)
    return () if found is None else tuple(inspect.signature(found).parameters)


def cache_name(module: nn.Module) -> str:
    """What the KV cache is called in a module's `forward`.

    Raises:
        UnsupportedModelError: `forward` has no argument of a known name.
    """
    names = [name for name in CACHE_NAMES if name in parameters(module)]
    if not names:
        raise unknown(
            f"{type(module).__name__}.forward has no argument for the KV cache of a known name {CACHE_NAMES}: "
            f"it takes {parameters(module)}"
        )
    return names[0]


def check_language_model(module: nn.Module) -> None:
    """Check that a language model can be called as grip_hf calls it.

    Raises:
        UnsupportedModelError: Its `forward` lacks an argument, or its caches have methods of another form.
    """
    module = getattr(module, "original_module", module)  # inside the wrapper of PEFT's `modules_to_save`
    cache_name(module)
    known = inspect.signature(module.forward).parameters
    lacking = [name for name in NEEDED if name not in known]
    if lacking:
        raise unknown(f"{type(module).__name__}.forward does not take {lacking}: it takes {tuple(known)}")
    check_cache_class(DynamicCache)


def check_cache_class(cls: type) -> None:
    """Check that a class of caches has the methods that grip_hf overrides, in the form that it knows.

    Raises:
        UnsupportedModelError: One is missing or takes other arguments.
    """
    forms = {
        "get_seq_length": ("layer_idx",),
        "get_mask_sizes": ("query_length", "layer_idx"),
        "reorder_cache": ("beam_idx",),
        "batch_select_indices": ("indices",),
        "batch_repeat_interleave": ("repeats",),
        "crop": ("tokens_to_remove",),
        "reset": (),
    }
    for name, form in forms.items():
        method = getattr(cls, name, None)
        found = None if method is None else tuple(inspect.signature(method).parameters)[1:]
        if found != form:
            raise unknown(f"{cls.__name__}.{name} takes {found}, expected {form}")


def check_takes_encoded(module: nn.Module) -> None:
    """Make sure that a module takes pictures that were encoded before the call; older releases ignore them in silence.

    Raises:
        UnsupportedModelError: transformers is older than 5.18, or the family is built otherwise.
    """
    if ENCODED in parameters(module):
        return
    what = f"{type(module).__name__} cannot take pictures that were encoded before"
    if Version(transformers.__version__) < Version(ENCODED_SINCE):
        what += f": training and `grip-hf eval` need transformers >= {ENCODED_SINCE}"
    raise unknown(what)


def attention_module(layer: nn.Module) -> Any:
    """The attention of a decoder layer, or None if it has none of a known name."""
    return next(
        (getattr(layer, name) for name in ATTENTION if isinstance(getattr(layer, name, None), nn.Module)), None
    )


def key_layers(layers: nn.ModuleList) -> list[int] | None:
    """By decoder layer, the layer whose keys it reads: itself, or the last one of its kind with keys of its own.

    Returns:
        None if a layer reads keys that nobody here tells whose.
    """
    own: dict[Any, int] = {}
    found = []
    for number, layer in enumerate(layers):
        attention = attention_module(layer)
        kind = getattr(attention, "layer_type", None)
        if not getattr(attention, "is_kv_shared_layer", False):
            own[kind] = number
        elif kind is None or kind not in own:
            return None
        found.append(own[kind])
    return found


def layers_that_cannot_drop(language_model: nn.Module, stages: Iterable[tuple[int, int]]) -> str | None:
    """Why tokens cannot be dropped between the decoder layers of a language model, or None if they can.

    Args:
        language_model: It.
        stages: Per drop the layer that ranks, and the first one without the dropped tokens.
    """
    layers: Any = language_model.layers
    if is_recurrent(language_model.config):
        return "some of its layers carry a state from token to token"
    for number in sorted({rank for rank, _ in stages}):
        attention = attention_module(layers[number])
        if attention is None or not hasattr(attention, "config"):
            return f"layer {number} has no attention of a known name"
    sources = key_layers(layers)
    if sources is None:
        return "some of its layers read keys that are not known to be those of an earlier one"
    read = [source for number, source in enumerate(sources) if source != number]
    last = max(drop for _, drop in stages)
    if read and last > min(read):
        return (
            f"its layers {sources.index(min(read), min(read) + 1)} to {len(sources) - 1} read the keys of earlier "
            f"ones, from layer {min(read)} on, after which no token can go; some would at layer {last}"
        )
    return None


def saves_adapters_alone(model: Any) -> bool:
    """Whether `save_pretrained` of a transformers model writes the adapters that it was given, and nothing else.

    Raises:
        UnsupportedModelError: The model does not tell.
    """
    if not hasattr(model, ADAPTERS_LOADED):
        raise unknown(f"{type(model).__name__} has no {ADAPTERS_LOADED!r}, which tells whether it was given adapters")
    return bool(getattr(model, ADAPTERS_LOADED))
