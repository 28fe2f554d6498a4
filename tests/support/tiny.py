"""The tiny models of `grip_hf.doctor`, for tests and for scripts beside them: `import tiny; tiny.build("llava")`."""

import torch
from transformers import AutoModelForImageTextToText

from grip_hf.doctor.pictures import END_ID, IMAGE_ID, PAD, START_ID, VIDEO_ID
from grip_hf.doctor.tiny import EAGER_ONLY, VARIANTS, is_present, join_pictures, make, make_inputs, select_by_content
from grip_hf.doctor.tiny import TINY as ALL
from grip_hf.doctor.tiny_core import CORE, HIDDEN, IMAGE, TEXT, VISION, VOCAB
from grip_hf.doctor.tiny_late import LATE
from grip_hf.doctor.tiny_more import MORE

__all__ = [
    "CORE",
    "EAGER_ONLY",
    "END_ID",
    "EVERY",
    "HIDDEN",
    "IMAGE",
    "IMAGE_ID",
    "LATE",
    "MORE",
    "PAD",
    "START_ID",
    "TEXT",
    "AutoModelForImageTextToText",
]
__all__ += ["TINY", "VARIANTS", "VIDEO_ID", "VISION", "VOCAB", "build", "join_pictures", "make", "make_inputs"]
__all__ += ["select_by_content"]

EVERY = sorted(ALL)
TINY = {name: tiny for name, tiny in ALL.items() if is_present(name)}  # what the installed transformers has


def build(family, attention="sdpa", seed=0, dtype=torch.float32):
    """Build a tiny model in eval mode; the same weights for the same seed, which random numbers go on from."""
    torch.manual_seed(seed)
    return make(family, attention, dtype)
