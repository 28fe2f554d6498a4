"""How much memory a piece of code takes at its peak, and how much a KV cache holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_PROCESS = Path("/proc/self")


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Within the block, the function given tells the peak in bytes since its start.

    On a GPU that is what torch allocated, on Linux what the process had resident; elsewhere None.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    try:
        (_PROCESS / "clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        yield lambda: None
        return
    yield _high_water_mark


def _high_water_mark() -> int | None:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a KV cache."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
