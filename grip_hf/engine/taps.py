"""Extra features per visual token that a selector takes from inside the vision tower.

A selector's hooks `publish` them while the pictures are encoded; the patch hands them on when it next chooses tokens
in the same thread. One tensor row per visual token, in the order in which the visual tokens of the batch appear.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_store = threading.local()


def publish(name: str, tensor: Tensor) -> None:
    """Add rows [tokens, ...] to the tap `name`; several calls (pictures, then videos) are joined in order."""
    _store.__dict__.setdefault("taps", {}).setdefault(name, []).append(tensor)


def collect() -> dict[str, Tensor]:
    """Return all taps of this thread and forget them."""
    taps: dict[str, list[Tensor]] = _store.__dict__.pop("taps", {})
    return {name: torch.cat(parts) for name, parts in taps.items()}


def clear() -> None:
    """Forget all taps of this thread."""
    _store.__dict__.pop("taps", None)
