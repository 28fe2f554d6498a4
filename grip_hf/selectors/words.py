"""Which words of a prompt can see its pictures."""

from __future__ import annotations

from torch import Tensor

from ..engine.keepsets import VisualBatch


def words_behind(batch: VisualBatch) -> Tensor:
    """[G, T] bool: the text tokens behind the last visual token of their group; all where places are not known."""
    if batch.text_index is None or batch.token_index is None:
        return batch.text_mask
    return batch.text_mask & (batch.text_index > batch.token_index.amax(1, keepdim=True))
