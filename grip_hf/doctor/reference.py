"""The independent reference: the *unpatched* model, with dropped tokens masked out and original positions.

Where layers carry a state from token to token (convolutions, linear attention), a masked token still counts as a step
of its own. There the reference is the unpatched language model on the embeddings that stay, at their original
positions, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .pictures import IMAGE_ID, Arguments
from .tiny import TINY

# Families that magnify rounding: Gemma4 (in double precision it agrees to 1e-6 too), and linear attention, which
# always computes in single precision, one way for many tokens and another way for one.
LOOSE = {"gemma4": 5e-4, "qwen3_5": 4e-4, "qwen3_5_moe": 4e-4}


def assert_close(family: str, ours: Tensor, theirs: Tensor) -> None:
    """Equal up to rounding."""
    torch.testing.assert_close(ours, theirs, atol=LOOSE.get(family, 5e-5), rtol=1e-4 if family not in LOOSE else 1e-3)


def visual_mask(inputs: Arguments) -> Tensor:
    """[B, L] bool: picture tokens."""
    return inputs["input_ids"] == IMAGE_ID


def held_positions(inputs: Arguments, kept: Sequence[Tensor]) -> Tensor:
    """[B, L] bool: real tokens that stay, given the kept visual tokens of each row."""
    held = inputs["attention_mask"].bool()
    for row, (visual, indices) in enumerate(zip(visual_mask(inputs), kept, strict=True)):
        columns = visual.nonzero().flatten()
        gone = torch.ones(len(columns), dtype=torch.bool, device=columns.device)
        gone[indices] = False
        held[row, columns[gone]] = False
    return held


def lengthen_types(family: str, inputs: Arguments, steps: int) -> None:
    """Token types, if the family has them, for `steps` text tokens more; in place."""
    name, kinds = TINY[family].types, TINY[family].type_ids
    if name in inputs:
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, steps), value=kinds[2])
    if "moe_mm_token_type_ids" in inputs:
        inputs["moe_mm_token_type_ids"] = torch.nn.functional.pad(inputs["moe_mm_token_type_ids"], (0, steps))


def original_positions(model: Any, inputs: Arguments) -> Tensor:
    """Position ids of the unpruned call."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if hasattr(model.model, "get_rope_index") and "image_grid_thw" in inputs:
        return model.model.get_rope_index(
            ids, inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"], attention_mask=mask
        )[0]
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


def positions_and_next(model: Any, inputs: Arguments, steps: int) -> Tensor:
    """Position ids of the call and of `steps` tokens after it: [..., B, L + steps]."""
    positions = original_positions(model, inputs)
    last = positions.amax(dim=(0, -1) if positions.ndim == 3 else -1)
    lead = positions.shape[:-2]
    after = last[:, None] + 1 + torch.arange(steps, device=last.device)
    return torch.cat([positions, after.expand(*lead, *after.shape)], -1)


@torch.no_grad()
def reference_logits(model: Any, inputs: Arguments, held: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits of the unpatched model on `inputs` when only the positions `held` [B, L] exist."""
    positions = original_positions(model, inputs) if positions is None else positions
    if is_recurrent(model):
        return logits_of_what_stays(model, inputs, held, positions)
    return model(**{**inputs, "attention_mask": held.long()}, position_ids=positions).logits


def is_recurrent(model: Any) -> bool:
    """Whether layers carry a state from token to token."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return "conv" in kinds or "linear_attention" in kinds


def logits_of_what_stays(model: Any, inputs: Arguments, held: Tensor, positions: Tensor) -> Tensor:
    """Logits [B, L, V] at `held` [B, L] of the unpatched language model on the held embeddings alone; else zero."""
    decoder: Any = model.get_decoder()
    seen: dict[str, Any] = {}
    hook = decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    plain = model(**{**inputs, "attention_mask": held.long()}, position_ids=positions, use_cache=False).logits
    hook.remove()
    logits = torch.zeros_like(plain)
    for row, places in enumerate(held):
        hidden = decoder(
            inputs_embeds=seen["inputs_embeds"][row : row + 1, places],
            position_ids=seen["position_ids"][..., row : row + 1, :][..., places],
            attention_mask=torch.ones(1, int(places.sum()), dtype=torch.long, device=held.device),
            use_cache=False,
        ).last_hidden_state
        logits[row, places] = model.lm_head(hidden[0])
    return logits


@torch.no_grad()
def reference_generate(model: Any, inputs: Arguments, held: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, steps] of the unpatched model without a cache, and the logits [B, steps, V] they come from."""
    positions = positions_and_next(model, inputs, steps)
    start = inputs["input_ids"].shape[1]
    inputs, tokens, logits = dict(inputs), [], []
    for step in range(steps):
        out = reference_logits(model, inputs, held, positions[..., : start + step])[:, -1]
        logits.append(out)
        tokens.append(out.argmax(-1))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[-1][:, None]], 1)
        lengthen_types(model.config.model_type, inputs, 1)
        held = torch.nn.functional.pad(held, (0, 1), value=True)
    return torch.stack(tokens, 1), torch.stack(logits, 1)
