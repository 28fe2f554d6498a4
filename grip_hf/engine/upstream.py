"""What grip_hf knows of transformers: names of arguments, outputs and cache methods, and since when each holds.

No other module holds such a name. Names are resolved from the modules at hand when a model is patched; one that cannot
be resolved raises, so that a rename upstream never reads as "there is none".
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from ..errors import UnsupportedModelError

# The releases that CI runs the fast suite on; `apply_grip` warns above the last one (see `doctor`).
TESTED = ("5.16.1", "5.19.0", "5.24.0")

# The KV cache among arguments and outputs: `cache` since 5.24, `past_key_values` before (an alias until 5.40).
CACHE_NAMES = ("cache", "past_key_values")
# Pictures that were encoded before the call; since 5.18.
ENCODED = "mm_encoder_outputs"
# Arguments with which pictures or videos come.
PICTURES = ("pixel_values", "image_hidden_states")


def versions() -> str:
    """The installed and the tested releases of transformers, for messages."""
    return f"transformers {transformers.__version__} is installed, {TESTED[0]} to {TESTED[-1]} are tested"


def unknown(what: str) -> UnsupportedModelError:
    """The error for something upstream that is not as grip_hf knows it."""
    return UnsupportedModelError(f"{what} ({versions()})")


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's `forward`."""
    return tuple(inspect.signature(module.forward).parameters)


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


def find_cache(arguments: Mapping[str, Any]) -> Cache | None:
    """The KV cache among the arguments of a call.

    Raises:
        UnsupportedModelError: A cache comes under an unknown name, or something else under a known one.
    """
    for name, value in arguments.items():
        if isinstance(value, Cache):
            if name not in CACHE_NAMES:
                raise unknown(f"a KV cache was given as {name!r}, known names are {CACHE_NAMES}")
            return value
        if name in CACHE_NAMES and value is not None:
            raise unknown(f"the argument {name!r} is a {type(value).__name__}, not a cache of transformers")
    return None


def returned_cache(output: Any) -> Cache | None:
    """The KV cache in a model's output."""
    values: Iterable[Any] = output.values() if isinstance(output, Mapping) else output
    return next((value for value in values if isinstance(value, Cache)), None)


def encoded_outputs(arguments: Mapping[str, Any]) -> list[Any]:
    """Pictures that were encoded before this call."""
    encoded = arguments.get(ENCODED)
    return [one for one in encoded.values() if one is not None] if isinstance(encoded, Mapping) else []


def has_pictures(arguments: Mapping[str, Any]) -> bool:
    """Whether pictures or videos come with a call."""
    return any(value is not None for name, value in arguments.items() if name.startswith(PICTURES))


def attention_kernel(config: Any) -> str:
    """Name of the attention implementation that a config asks for."""
    return str(config._attn_implementation)


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
