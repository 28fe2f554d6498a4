"""What grip_hf knows of transformers: names of arguments, outputs and cache methods, and since when each holds.

No other module holds such a name. Names are resolved from the modules at hand when a model is patched; one that cannot
be resolved raises, so that a rename upstream never reads as "there is none".
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import find_packed_sequence_indices

from ..errors import UnsupportedModelError

# The releases that CI runs the fast suite on.
TESTED = ("5.16.1", "5.19.0", "5.24.0")

# The KV cache among arguments and outputs: `cache` since 5.24, `past_key_values` before (an alias until 5.40).
CACHE_NAMES = ("cache", "past_key_values")
# The cache of continuous batching, which is none of transformers' other caches.
PAGED = "PagedAttentionCache"
# Pictures that were encoded before the call, and the release that brought them.
ENCODED, ENCODED_SINCE = "mm_encoder_outputs", "5.18"
# What language models read of them: one row per visual token, and the same of earlier layers of the tower.
FEATURES, DEEPSTACK = "pooler_output", "deepstack_features"
# Arguments with which pictures or videos come, and the methods that encode them.
PICTURES = ("pixel_values", "image_hidden_states")
ENCODERS = ("get_image_features", "get_video_features")
# Of vision towers: the pictures' frames, rows and columns of patches, where they are packed and where they are padded;
# cumulative lengths of packed sequences (the longest of them, `max_seqlen`, is a bound that may stay); attention masks
# that have no rows to cut.
GRID, SHAPES, LENGTHS = "grid_thw", "spatial_shapes", ("cu_seqlens",)
OPAQUE_MASKS = ("BlockMask",)
# What a call of the language model must be able to take; all else is passed on or refused.
NEEDED = ("inputs_embeds", "attention_mask", "position_ids")
# Arguments of the language model with one entry per token, [B, L, ...].
# Kinds of tokens [B, L]: 0 is text.
TOKEN_TYPES = "mm_token_type_ids"
PER_TOKEN = ("per_layer_inputs", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
# Those that are passed on as they are, and those that have code of their own.
UNTOUCHED = ("labels", "shift_labels", "input_ids", "logits_to_keep")
HANDLED = (*NEEDED, "visual_pos_masks", "deepstack_visual_embeds")
# Layers that carry a state from token to token; their mask is that of the call's own tokens, [B, L], or None.
RECURRENT = ("linear_attention", "conv")
# Kinds of layers, as masks by kind name them.
FULL, SLIDING = "full_attention", "sliding_attention"
# What the router of each layer's experts said of each token, in outputs [B * L, experts].
ROUTER_LOGITS = "router_logits"
# Where a decoder layer has its attention.
ATTENTION = ("self_attn", "attention", "attn")

# What says of a transformers model that its own `load_adapter` or `add_adapter` gave it some.
ADAPTERS_LOADED = "_hf_peft_config_loaded"

# Name of the attention implementation of a config.
KERNEL = "_attn_implementation"
attention_kernel = attrgetter(KERNEL)
# Sequence numbers [B, L] of positions that jump, as transformers tells packed sequences apart; None if there is one.
packed_segments = find_packed_sequence_indices


def versions() -> str:
    """The installed and the tested releases of transformers, for messages."""
    return f"transformers {transformers.__version__} is installed, {TESTED[0]} to {TESTED[-1]} are tested"


def is_untested() -> bool:
    """Whether the installed transformers is newer than the newest tested."""
    return Version(transformers.__version__) > Version(TESTED[-1])


def unknown(what: str) -> UnsupportedModelError:
    """The error for something upstream that is not as grip_hf knows it."""
    return UnsupportedModelError(f"{what} ({versions()})")


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
    return reach if reach is not None and (layers is None or "sliding_attention" in layers) else None


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


def without_slicing(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a language model that keep it from leaving out positions between its layers (Gemma4 does).

    Whoever asked for the last logits only takes them off the whole.
    """
    return {name: value for name, value in arguments.items() if name != "logits_to_keep"}


def has_adapters(model: Any) -> bool:
    """Whether adapters were put into a transformers model, by PEFT or by its own method."""
    return hasattr(model, "peft_config")


def saves_adapters_alone(model: Any) -> bool:
    """Whether `save_pretrained` of a transformers model writes the adapters that it was given, and nothing else.

    Raises:
        UnsupportedModelError: The model does not tell.
    """
    if not hasattr(model, ADAPTERS_LOADED):
        raise unknown(f"{type(model).__name__} has no {ADAPTERS_LOADED!r}, which tells whether it was given adapters")
    return bool(getattr(model, ADAPTERS_LOADED))
