"""What a KV cache remembers about the positions that were dropped from it.

Inside the language model a cache must answer with *physical* lengths (what it holds), outside with *logical* ones
(the sequence as `generate` counts it). So a cache that takes part in a pruned call changes its class to one that knows
both. Its state goes wherever the cache goes: beam reordering, repetition, cropping, copies and pickles.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import CacheError
from .masks import KeyMap, Window
from .upstream import removed_by_crop, static_length


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
        return dataclasses.replace(self, **picked, shift=shift, columns=None)

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
    """Mixin of every cache that took part in a pruned call; see the module's docstring."""

    grip_state: CacheState | None
    grip_inside: bool
    layers: list[Any]  # the cache's own

    def _grip_dropped(self) -> int:
        return 0 if self.grip_inside or self.grip_state is None else self.grip_state.dropped

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Number of positions seen: physical inside the language model, logical outside."""
        length = super().get_seq_length(layer_idx)  # type: ignore[misc]
        dropped = self._grip_dropped()
        return length + dropped if dropped and layer_idx < len(self.layers) else length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number and offset of the keys of a layer: physical inside the language model, logical outside."""
        sizes = super().get_mask_sizes  # type: ignore[misc]
        dropped = self._grip_dropped()
        if not dropped or layer_idx >= len(self.layers):
            return sizes(query_length, layer_idx)
        layer = self.layers[layer_idx]
        if not hasattr(layer, "get_seq_length"):  # a recurrent layer: the first one with keys answers
            layer = next(one for one in self.layers if hasattr(one, "get_seq_length"))
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
        if self.grip_state is not None:
            self._grip_rows(torch.arange(self.grip_state.index.shape[0]).repeat_interleave(repeats))

    def _grip_rows(self, rows: Tensor) -> None:
        if self.grip_state is not None:
            self.grip_state = self.grip_state.rows(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last entries; those among dropped visual tokens cannot go."""
        state = self.grip_state
        removed = removed_by_crop(tokens_to_remove, int(self.get_seq_length()))
        if state is not None and removed:
            physical = int(super().get_seq_length())  # type: ignore[misc]
            state = state.crop(physical - removed)
        super().crop(-removed)  # type: ignore[misc]
        self.grip_state = state  # now that recurrent layers have not refused

    def reset(self) -> None:
        """Empty the cache and forget what was dropped."""
        super().reset()  # type: ignore[misc]
        self.grip_state = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on the fly, so copies and pickles name the original one.
        return _rebuild, (type(self).__mro__[2],), dict(self.__dict__)


_classes: dict[type, Any] = {}


def _pruned_class(cls: type) -> Any:
    if cls not in _classes:
        _classes.setdefault(cls, type(f"Pruned{cls.__name__}", (PrunedCache, cls), {"__module__": __name__}))
    return _classes[cls]


def _rebuild(cls: type) -> Any:
    return object.__new__(_pruned_class(cls))


def state_of(cache: Any) -> CacheState | None:
    """The state that earlier pruned calls left on this cache, if any."""
    return cache.grip_state if isinstance(cache, PrunedCache) else None


def set_state(cache: Any, state: CacheState) -> None:
    """Put `state` on a cache; its class changes to one that knows logical and physical lengths."""
    if not isinstance(cache, PrunedCache):
        cache.__class__ = _pruned_class(type(cache))
        cache.grip_inside = False
    if cache.is_compileable and not any(cache.is_sliding) and not state.trivial:
        state = state.with_columns(static_length(cache))
    cache.grip_state = state


def physical_length(cache: Cache) -> int:
    """Number of keys that a cache holds, seen from outside the language model."""
    state = state_of(cache)
    return int(cache.get_seq_length()) - (0 if state is None else state.dropped)


def window(cache: Cache | None, query_length: int, layer_idx: int, inside: bool) -> Window:
    """The keys that a mask for `query_length` new tokens covers in a layer, physical (`inside`) or logical."""
    if cache is None:
        return Window(query_length, 0)
    if not isinstance(cache, PrunedCache):
        return Window(*cache.get_mask_sizes(query_length, layer_idx))
    before, cache.grip_inside = cache.grip_inside, inside
    try:
        return Window(*cache.get_mask_sizes(query_length, layer_idx))
    finally:
        cache.grip_inside = before
