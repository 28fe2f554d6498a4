"""What a KV cache remembers about the positions that were dropped from it.

Towards its owner (`generate`, the model around the language model) a cache that took part in a pruned call answers
with *logical* lengths, those of the sequence as the caller counts it: its class changes to one that adds what was
dropped. The language model gets a view of the same cache with the class that it had before, so that it sees *physical*
lengths, those of what the cache holds; nothing else differs, since both share one `__dict__`. The state goes wherever
the cache goes: beam reordering, repetition, cropping, copies and pickles.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import CacheError
from . import upstream
from .masks import KeyMap, Window


@dataclasses.dataclass(frozen=True)
class CacheState:
    """What lies in the first P0 physical slots; slot p >= P0 holds logical position p + dropped.

    Attributes:
        index: [B, P0] long, the logical position in each slot.
        valid: [B, P0] bool, False at fillers.
        visual: [B, P0 + dropped] bool, which logical positions are visual tokens.
        dropped: logical minus physical length.
        full: True if every slot is valid.
        shift: [B, 1] long, how far later positions move back, if positions are compact; else None.
        columns: for a static cache, what will lie in each of its slots, so that decoding need not look at lengths.
    """

    index: Tensor
    valid: Tensor
    visual: Tensor
    dropped: int
    full: bool
    shift: Tensor | None = None
    columns: KeyMap | None = None

    @property
    def trivial(self) -> bool:
        """True if physical and logical are the same, so that nothing needs to be translated."""
        return self.dropped == 0 and self.full

    def rows(self, rows: Tensor) -> CacheState:
        """State of a cache whose batch rows were picked by `rows` (long)."""
        rows = rows.to(self.index.device)
        shift = None if self.shift is None else self.shift[rows]
        picked = {name: getattr(self, name)[rows] for name in ("index", "valid", "visual")}
        columns = None if self.columns is None else self.columns.rows(rows)
        return dataclasses.replace(self, **picked, shift=shift, columns=columns)

    def crop(self, slots: int) -> CacheState:
        """State of a cache cut down to `slots` physical slots; only slots after the last dropped position may go."""
        cut = self.index.shape[1] - slots
        if cut <= 0:
            return self
        end = self.visual.shape[1]
        tail = torch.arange(end - cut, end, device=self.index.device)
        if cut > self.index.shape[1] or not bool((self.valid[:, -cut:] & (self.index[:, -cut:] == tail)).all()):
            raise CacheError(
                f"cannot crop this cache to {slots} entries: the cut lies among its {self.dropped} dropped "
                "positions. Crop less, or start again from an empty cache"
            )
        return dataclasses.replace(
            self, index=self.index[:, :-cut], valid=self.valid[:, :-cut], visual=self.visual[:, :-cut]
        )

    def with_columns(self, slots: int) -> CacheState:
        """This state with `columns` for a static cache of `slots` slots."""
        keys = self.keys(slots)
        inside = keys.index < slots
        columns = KeyMap(keys.index.clamp(max=slots - 1), keys.valid & inside, full=False)
        return dataclasses.replace(self, columns=columns)

    def keys(self, slots: int) -> KeyMap:
        """The first `slots` >= P0 physical keys in logical terms."""
        batch, known = self.index.shape
        if slots == known:
            return KeyMap(self.index, self.valid, self.full)
        tail = torch.arange(known, slots, device=self.index.device) + self.dropped
        index = torch.cat([self.index, tail.expand(batch, -1)], 1)
        return KeyMap(index, torch.cat([self.valid, self.valid.new_ones(batch, slots - known)], 1), self.full)


class PrunedCache:
    """Mixin of every cache that took part in a pruned call; see the module's docstring.

    Attributes:
        grip_states: What each layer holds, from the layer of that number on: {0: ...} if all hold the same.
        grip_view: The same cache as the language model sees it.
    """

    grip_states: dict[int, CacheState]
    grip_view: Any
    layers: list[Any]  # the cache's own

    def _grip_dropped(self, layer_idx: int) -> int:
        return self.grip_states[self._grip_start(layer_idx)].dropped if layer_idx < len(self.layers) else 0

    def _grip_start(self, layer_idx: int) -> int:
        starts = list(self.grip_states)
        return starts[bisect.bisect_right(starts, layer_idx) - 1]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Number of positions seen by whoever counts dropped ones too."""
        length = super().get_seq_length(layer_idx)  # type: ignore[misc]
        dropped = self._grip_dropped(layer_idx)
        return length + dropped if dropped else length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number and offset of the keys of a layer, dropped ones counted too."""
        own = super().get_mask_sizes  # type: ignore[misc]
        return upstream.mask_sizes(own, self.layers, query_length, layer_idx, self._grip_dropped(layer_idx))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick batch rows, as beam search does."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._grip_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Pick batch rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._grip_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        batch = len(self.grip_states[0].index)
        self._grip_rows(torch.arange(batch).repeat_interleave(repeats))

    def _grip_rows(self, rows: Tensor) -> None:
        _change(self, {start: state.rows(rows) for start, state in self.grip_states.items()})

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last entries; those among dropped visual tokens cannot go."""
        length = int(self.get_seq_length())
        removed = upstream.removed_by_crop(tokens_to_remove, length)
        states = {n: state.crop(length - state.dropped - removed) for n, state in self.grip_states.items()}
        super().crop(-removed)  # type: ignore[misc]
        _change(self, states)  # now that recurrent layers have not refused

    def reset(self) -> None:
        """Empty the cache and forget what was dropped."""
        super().reset()  # type: ignore[misc]
        restore_class(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on the fly, so copies and pickles name the original one; they get a view of their own.
        state = {name: value for name, value in self.__dict__.items() if name not in ("grip_view", "grip_logical")}
        return _rebuild, (_original_class(self),), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _make_view(self)


_classes: dict[type, Any] = {}


def _original_class(cache: Any) -> type:
    return type(cache).__mro__[2]


def _pruned_class(cls: type) -> Any:
    if cls not in _classes:
        upstream.check_cache_class(cls)
        _classes.setdefault(cls, type(f"Pruned{cls.__name__}", (PrunedCache, cls), {"__module__": __name__}))
    return _classes[cls]


def _rebuild(cls: type) -> Any:
    return object.__new__(_pruned_class(cls))


def _make_view(cache: Any) -> None:
    view: Any = object.__new__(_original_class(cache))
    view.__dict__ = cache.__dict__
    cache.grip_view, cache.grip_logical = view, cache


def restore_class(cache: Any) -> None:
    """Make a cache what it was before it took part in a pruned call."""
    if isinstance(cache, PrunedCache):
        for name in ("grip_view", "grip_logical", "grip_states"):
            cache.__dict__.pop(name, None)
        cache.__class__ = _original_class(cache)


def find(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a call, or None; a paged one is none that anything is dropped from.

    Raises:
        UnsupportedModelError: A cache comes under an unknown name, or something else under a known one.
    """
    for name, value in arguments.items():
        if isinstance(value, Cache):
            if name not in upstream.CACHE_NAMES:
                raise upstream.unknown(f"a KV cache was given as {name!r}, known names are {upstream.CACHE_NAMES}")
            return value
        if value is not None and name in upstream.CACHE_NAMES and not upstream.is_paged(arguments):
            raise upstream.unknown(f"the argument {name!r} is a {type(value).__name__}, not a cache of transformers")
    return None


def returned(output: Any) -> Any:
    """The KV cache in a model's output, or None."""
    values: Iterable[Any] = output.values() if isinstance(output, Mapping) else output
    return next((value for value in values if isinstance(value, Cache)), None)


def given_back(output: Any, cache: Any) -> Any:
    """A model's output with `cache` in place of its view."""
    if isinstance(output, tuple):
        return tuple(cache if isinstance(value, Cache) else value for value in output)
    for name in upstream.CACHE_NAMES:
        if name in output:
            output[name] = cache
            return output
    return output


def states_of(cache: Any) -> dict[int, CacheState]:
    """What each layer holds after earlier pruned calls, from the layer of that number on; {} if there were none."""
    return cache.grip_states if isinstance(cache, PrunedCache) else {}


def state_of(cache: Any) -> CacheState | None:
    """What the first layers hold, if earlier pruned calls left anything to know."""
    return cache.grip_states[0] if isinstance(cache, PrunedCache) else None


def set_states(cache: Any, states: dict[int, CacheState]) -> None:
    """Let a cache know what its layers hold; its class changes to one that knows logical and physical lengths."""
    if not isinstance(cache, PrunedCache):
        cache.__class__ = _pruned_class(type(cache))
        _make_view(cache)
    _change(cache, states)


def _change(cache: Any, states: dict[int, CacheState]) -> None:
    if cache.is_compileable and upstream.first_layer(cache, sliding=False) is not None:
        states = {
            start: state if state.trivial else state.with_columns(upstream.static_length(cache))
            for start, state in states.items()
        }
    cache.grip_states = states


def logical_of(view: Any) -> Any:
    """The cache as its owner knows it, from the view that the language model gets, or itself."""
    return None if view is None else view.__dict__.get("grip_logical", view)


def physical(cache: Any) -> Any:
    """The cache as the language model is to see it: with physical lengths."""
    return cache.grip_view if isinstance(cache, PrunedCache) else cache


def physical_length(cache: Any) -> int:
    """Number of keys that the first layers of a cache hold."""
    return 0 if cache is None else int(physical(cache).get_seq_length())


def logical_length(cache: Any) -> int:
    """Number of positions before the next call, dropped ones counted too."""
    return 0 if cache is None else int(cache.get_seq_length())


def window(cache: Any, query_length: int, layer_idx: int, taken: int = 0) -> Window:
    """The keys that a mask for `query_length` new tokens covers in a layer of a cache, or of its view.

    Args:
        cache: The cache, or None.
        query_length: Tokens of the call.
        layer_idx: The layer.
        taken: Keys of this call that the layer holds already, because another layer reads them after it.
    """
    if cache is None:
        return Window(query_length, 0)
    if not taken:
        return Window(*cache.get_mask_sizes(query_length, layer_idx))
    dropped = cache._grip_dropped(layer_idx) if isinstance(cache, PrunedCache) else 0
    own = physical(cache).get_mask_sizes
    return Window(*upstream.mask_sizes(own, cache.layers, query_length, layer_idx, dropped - taken))
