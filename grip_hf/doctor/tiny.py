"""Tiny models of every supported family, built in code, and inputs for them.

    model = make("llava", attention="eager")
    inputs = make_inputs("llava", [[3, IMAGE, 4], [5]], seed=0)

A prompt is a list of parts: an int n stands for n random text tokens, `IMAGE` for one picture. Rows are left-padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..engine.keepsets import VisualBatch
from .pictures import END_ID, IMAGE_ID, PAD, START_ID, Arguments
from .tiny_core import CORE, IMAGE, Tiny
from .tiny_late import LATE
from .tiny_more import MORE

Prompts = Sequence[Sequence[int | str]]

TINY: dict[str, Tiny] = {**CORE, **MORE, **LATE}
EAGER_ONLY = {"got_ocr2", "paligemma2"}  # transformers has no other attention for them
VARIANTS = {"paligemma2": "paligemma"}  # of the same family with another text decoder


def is_present(family: str) -> bool:
    """Whether the installed transformers has this family."""
    return VARIANTS.get(family, family) in CONFIG_MAPPING


def make(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, config: Any = None) -> Any:
    """A tiny model in eval mode, with random weights.

    Args:
        family: One of `TINY`.
        attention: Attention implementation.
        dtype: Of the weights.
        config: Another config of this family than the one in `TINY`.
    """
    attention = "eager" if family in EAGER_ONLY else attention
    config = TINY[family].config() if config is None else config
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention, dtype=dtype)
    with torch.no_grad():
        model.lm_head.weight[89:] = 0  # such a model never says a placeholder or marker token
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


def make_inputs(family: str, prompts: Prompts, seed: int = 0, pad_to: int | None = None) -> Arguments:
    """Inputs for a left-padded batch; each prompt is a list of ints (that many text tokens) and `IMAGE`.

    A prompt's text and pictures depend on the seed and the prompt's own content only, so that a row of a batch can be
    compared with the same prompt alone.
    """
    rows: list[list[int]] = []
    pictures: list[Arguments] = []
    for prompt in prompts:
        count = prompt.count(IMAGE)
        arguments, drawn = TINY[family].pictures(count, seed + 7 * len(prompt)) if count else ({}, [])
        generator = torch.Generator().manual_seed(seed + 1000 * len(prompt))
        runs = iter(drawn)
        row: list[int] = []
        for part in prompt:
            row += next(runs) if isinstance(part, str) else _words(part, generator)
        rows.append(row)
        if count:
            pictures.append(arguments)
    length = max(max(map(len, rows)), pad_to or 0)
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, **join_pictures(family, pictures)}
    types = TINY[family].types
    if types is not None:
        text, picture, _ = TINY[family].type_ids
        inputs[types] = torch.where(ids == IMAGE_ID, picture, text).int()
    if TINY[family].experts:
        around = torch.tensor([START_ID, IMAGE_ID, END_ID])
        inputs["moe_mm_token_type_ids"] = torch.isin(ids, around).int()
    return inputs


def join_pictures(family: str, pictures: Sequence[Arguments]) -> Arguments:
    """Picture arguments of several prompts as one batch, or of several turns that are not `stacked` as one prompt."""
    if not pictures:
        return {}
    if TINY[family].stacked:  # empty pictures are zeros
        most = max(one["pixel_values"].shape[1] for one in pictures)
        pad = [
            torch.nn.functional.pad(p["pixel_values"], (0,) * 7 + (most - p["pixel_values"].shape[1],))
            for p in pictures
        ]
        return {"pixel_values": torch.cat(pad)}
    joined = {name: torch.cat([one[name] for one in pictures]) for name in pictures[0]}
    if TINY[family].crops:  # numbers of patches go on from prompt to prompt
        ends = torch.tensor([len(one["image_grids"]) * TINY[family].crops for one in pictures]).cumsum(0).tolist()
        parts = [one["image_token_pooling"] + start for one, start in zip(pictures, [0, *ends], strict=False)]
        joined["image_token_pooling"] = torch.cat(parts)
    return joined


def select_by_content(batch: VisualBatch) -> Tensor:
    """A selector: scores depend on each token alone, without ties or dependence on the batch."""
    weights = torch.linspace(-1, 1, batch.tokens.shape[-1], dtype=batch.tokens.dtype)
    return (batch.tokens * weights).sum(-1).float()


def _words(count: int, generator: torch.Generator) -> list[int]:
    """Random text tokens."""
    return torch.randint(3, 89, (count,), generator=generator).tolist()
