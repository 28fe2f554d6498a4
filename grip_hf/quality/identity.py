"""Of what a promise is made: the model, and what chooses its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import GripConfig

if TYPE_CHECKING:
    from ..tower.drop import TowerDrops


def identity(model: Any, base: Mapping[str, Any], config: GripConfig, scorer: nn.Module | None) -> dict[str, Any]:
    """What must be the same for a promise to hold, as plain data; what `of_tower` says comes to it.

    Args:
        model: The model.
        base: What it is called, and its types, as scorers remember them.
        config: The settings of its patch.
        scorer: The learned scorer behind the selector, or None.
    """
    text = model.config.get_text_config()
    return {
        "model": base.get("id"),
        "weights": weights_of(model),
        "model_type": base.get("model_type"),
        "text_model_type": base.get("text_model_type"),
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
        "selector": config.selector,
        "selector_kwargs": {name: value for name, value in config.selector_kwargs.items() if name != "scorer"},
        "scorer": None if scorer is None else fingerprint(scorer),
        "scope": config.scope,
        "position_ids": config.position_ids,
        "seed": config.seed,
    }


def of_tower(keep_ratio: float | str | None, drops: TowerDrops | None) -> dict[str, Any] | None:
    """How many rows of the vision tower stay, and what chooses them where; None if all do.

    Args:
        keep_ratio: How many, as settings have it.
        drops: The part of the patch that drops rows, or None.
    """
    if keep_ratio is None or drops is None:
        return None
    scorer = getattr(drops.selector, "scorer", None)
    return {
        "keep_ratio": keep_ratio,
        "selector": getattr(drops.selector, "name", None),
        "scorer": fingerprint(scorer) if isinstance(scorer, nn.Module) else None,
        "depth": drops.tower.first,
    }


def told(name: str, fact: Any) -> str:
    """A fact for people."""
    if name != "tower" or not (fact is None or isinstance(fact, Mapping)):
        return repr(fact)
    if fact is None:
        return "whole (tower_keep_ratio=None)"
    by = f"{fact.get('selector')!r}" + (f" {fact['scorer']}" if fact.get("scorer") else "")
    return f"pruned (tower_keep_ratio={fact.get('keep_ratio')!r}, by {by} after {fact.get('depth')} layers)"


def weights_of(model: nn.Module) -> str | None:
    """What tells a model from one that was tuned further, merged, adapted or quantized: a few numbers of each weight.

    Names do not count, which differ between releases of transformers.

    Returns:
        None where weights are not at hand: offloaded, or shared out among devices.
    """
    ends = [weight.detach().flatten()[[0, -1]] for weight in model.parameters() if weight.numel()]
    if any(one.is_meta for one in ends) or len(ends) < sum(1 for _ in model.parameters()):
        return None
    digest = hashlib.sha256()
    for numbers in sorted(_bytes(one) for one in ends):
        digest.update(numbers)
    return digest.hexdigest()[:16]


def fingerprint(scorer: nn.Module) -> str:
    """What tells the weights of a scorer from all others, in whichever precision they lie."""
    digest = hashlib.sha256()
    for name, weight in sorted(scorer.state_dict().items()):
        digest.update(name.encode())
        digest.update(str(tuple(weight.shape)).encode())
        digest.update(_bytes(weight))
    return digest.hexdigest()[:16]


def _bytes(weight: Tensor) -> bytes:
    # bfloat16 holds the leading bits of float32, so that a scorer beside a model in half precision is the same.
    return weight.detach().to("cpu", torch.bfloat16).flatten().view(torch.uint8).numpy().tobytes()
