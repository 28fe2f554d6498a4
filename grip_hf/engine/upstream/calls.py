"""What is asked while a call runs: of its arguments, its config, its KV cache, and whether the model has adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .names import CACHE_NAMES, ENCODED, HANDLED, PAGED, PER_TOKEN, PICTURES, RECURRENT, SLIDING, UNTOUCHED, unknown


def check_mask_sizes(cache: Cache | None, query_length: int, held: int) -> None:
    """Check that a cache counts its keys as grip_hf does: `held` in its full layers, and those of the call at hand.

    Raises:
        UnsupportedModelError: It counts otherwise.
    """
    layer = None if cache is None else first_layer(cache, sliding=False)
    if cache is None or layer is None:
        return
    sizes = cache.get_mask_sizes(query_length, layer)
    keys = static_length(cache) if cache.is_compileable else held + query_length
    if not isinstance(sizes, tuple) or len(sizes) != 2 or (int(sizes[0]), int(sizes[1])) != (keys, 0):
        raise unknown(
            f"{type(cache).__name__}.get_mask_sizes gives {sizes} for {query_length} tokens after {held}, "
            f"expected {(keys, 0)}"
        )


def check_new_cache(cache: Cache, arguments: Mapping[str, Any], config: Any, held: int) -> None:
    """Check a cache that the language model returned and nobody gave: it must be a new one, with what stayed.

    Raises:
        UnsupportedModelError: It was not asked for, or holds another number of positions.
    """
    if not uses_cache(arguments, config):
        raise unknown("the language model returned a KV cache that nobody gave or asked for")
    if int(cache.get_seq_length()) != held:
        raise unknown(
            f"the language model returned a KV cache of {int(cache.get_seq_length())} positions that nobody gave, "
            f"expected a new one of {held}"
        )


def first_layer(cache: Cache, sliding: bool) -> int | None:
    """The first layer of a cache that keeps keys, with or without a sliding window; None if there is none."""
    windows = list(cache.is_sliding)
    # `is_linear` and `is_dummy` mark layers without keys; the second came with 5.23.
    keyless = [list(getattr(cache, name, ())) or [False] * len(windows) for name in ("is_linear", "is_dummy")]
    for index, (has_window, *others) in enumerate(zip(windows, *keyless, strict=True)):
        if has_window == sliding and not any(others):
            return index
    return None


def mask_sizes(
    sizes: Callable[[int, int], tuple[int, int]], layers: list[Any], query_length: int, layer_idx: int, dropped: int
) -> tuple[int, int]:
    """Number and offset of the keys that the mask of a layer covers, as if more positions had been seen, or fewer.

    Args:
        sizes: The cache's own `get_mask_sizes`.
        layers: Its layers.
        query_length: Tokens of the call.
        layer_idx: The layer.
        dropped: Positions to add; negative ones are taken off.
    """
    if not dropped:
        return sizes(query_length, layer_idx)
    layer = layers[layer_idx]
    if not hasattr(layer, "get_seq_length"):  # a recurrent layer: the first one with keys answers
        layer = next(one for one in layers if hasattr(one, "get_seq_length"))
    if getattr(layer, "is_sliding", False):
        # A sliding layer answers from its running length: let it answer for the logical one.
        name = "cumulative_length_int" if hasattr(layer, "cumulative_length_int") else "cumulative_length"
        length = getattr(layer, name)
        setattr(layer, name, length + dropped)
        try:
            return sizes(query_length, layer_idx)
        finally:
            setattr(layer, name, length)
    keys, offset = sizes(query_length, layer_idx)
    return (keys if layer.is_compileable else keys + dropped), offset


def removed_by_crop(argument: int, length: int) -> int:
    """How many of `length` entries `cache.crop(argument)` removes.

    A negative argument has always been that number. A positive one was the length to keep in older releases; which of
    the two it is, a small cache tells.
    """
    argument = int(argument)
    if argument > 0 and _crop_takes_a_length():
        return max(length - argument, 0)
    return abs(argument)


@functools.cache
def _crop_takes_a_length() -> bool:
    probe = DynamicCache()
    probe.update(torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), 0)
    probe.crop(1)
    return int(probe.get_seq_length()) == 1


def static_length(cache: Cache) -> int:
    """Number of slots of a static cache."""
    return int(cache.get_max_length())


def is_paged(arguments: Mapping[str, Any]) -> bool:
    """Whether a call belongs to continuous batching."""
    return any(type(arguments.get(name)).__name__ == PAGED for name in CACHE_NAMES)


def encoded_outputs(arguments: Mapping[str, Any]) -> list[Any]:
    """Pictures that were encoded before this call."""
    encoded = arguments.get(ENCODED)
    return [one for one in encoded.values() if one is not None] if isinstance(encoded, Mapping) else []


def has_pictures(arguments: Mapping[str, Any]) -> bool:
    """Whether pictures or videos come with a call, as pixels or encoded before it."""
    pixels = (value for name, value in arguments.items() if name.startswith(PICTURES))
    return any(value is not None for value in pixels) or bool(encoded_outputs(arguments))


def uses_cache(arguments: Mapping[str, Any], config: Any) -> bool:
    """Whether a call of the language model makes a cache if it is given none."""
    use = arguments.get("use_cache")
    return bool(getattr(config, "use_cache", True) if use is None else use)


def is_recurrent(config: Any) -> bool:
    """Whether the language model has layers that carry a state from token to token."""
    return any(kind in RECURRENT for kind in getattr(config, "layer_types", None) or ())


def sliding_window(config: Any) -> int | None:
    """Positions that the language model's sliding layers see; None if it has no such layer."""
    reach = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    return reach if reach is not None and (layers is None or SLIDING in layers) else None


def router_loss(config: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a call adds a loss of the router of its experts, which compares it with the mask of all tokens."""
    text = config.get_text_config()
    routed = any(getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    given = arguments.get("output_router_logits")
    return bool(routed and (getattr(text, "output_router_logits", False) if given is None else given))


def per_token_names(arguments: Mapping[str, Any], batch: int, length: int) -> list[str]:
    """Arguments of a language model's call with one entry per token that grip_hf does not know."""
    known = {*PER_TOKEN, *UNTOUCHED, *HANDLED}
    named = [(name, value) for name, value in arguments.items() if name not in known and isinstance(value, Tensor)]
    return [
        name
        for name, value in named
        if name.startswith("cu_seq_lens")
        or (value.ndim >= 2 and value.shape[0] in (1, batch) and value.shape[1] == length)
        or (value.ndim == 1 and value.shape[0] == length)
    ]


class ReadOnly:
    """A KV cache that gives what it holds with what is added, and adds nothing.

    Args:
        cache: The cache.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, and these after them."""
        layer: Any = self._cache.layers[layer_idx]
        return torch.cat([layer.keys, key], -2), torch.cat([layer.values, value], -2)


def only_read(arguments: Mapping[str, Any], held: bool) -> dict[str, Any]:
    """Arguments of an attention module whose KV cache stays as it is; if it holds nothing, with none among them."""

    def other(value: Cache) -> Any:
        return ReadOnly(value) if held else None

    return {name: other(value) if isinstance(value, Cache) else value for name, value in arguments.items()}


def hidden_states_wanted(arguments: Mapping[str, Any], module: Any, layers: int) -> set[int] | None:
    """The layers of a vision tower whose output a caller wants, or None for all.

    Since 5.23 it may name them; the first hidden state is the input of the first layer.
    """
    wanted = arguments.get("output_hidden_states")
    wanted = getattr(module.config, "output_hidden_states", False) if wanted is None else wanted
    if isinstance(wanted, bool):
        return None if wanted else set()
    chosen = [wanted] if isinstance(wanted, int) else wanted
    return {index % (layers + 1) - 1 for index in chosen}


def without_slicing(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a language model that keep it from leaving out positions between its layers (Gemma4 does).

    Whoever asked for the last logits only takes them off the whole.
    """
    return {name: value for name, value in arguments.items() if name != "logits_to_keep"}


def has_adapters(model: Any) -> bool:
    """Whether adapters were put into a transformers model, by PEFT or by its own method."""
    return hasattr(model, "peft_config")
