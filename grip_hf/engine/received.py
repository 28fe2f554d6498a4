"""How much attention the last tokens of a call pay to each of its tokens, over all decoder layers.

Each layer is asked by `ranking.attention_of`, so the model keeps its own kernel, and no map of all tokens by all
tokens is made: 32 layers of 32 heads would take 17 GB for 2,900 tokens in half precision (32 x 32 x 2,900^2 numbers).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from . import upstream
from .ranking import attention_of, register


@dataclasses.dataclass
class Received:
    """What was seen of a call.

    Attributes:
        weights: [B, Q, L] float32, attention of the last Q tokens but one, summed over layers and averaged over heads;
            None before the call.
    """

    weights: Tensor | None = None


@contextlib.contextmanager
def received(language_model: nn.Module, asking: int) -> Iterator[Received]:
    """Watch the calls of a language model made within; each starts anew.

    Args:
        language_model: It; calls must hold no KV cache.
        asking: Q, how many tokens ask: those whose next token is one of the call's last Q.

    Yields:
        What is seen, filled in by the call.

    Raises:
        UnsupportedModelError: A layer has no attention that is known here, or one that cannot be asked.
    """
    layers: Any = getattr(language_model, "layers", None)
    found = [upstream.attention_module(layer) for layer in layers] if isinstance(layers, nn.ModuleList) else []
    modules = [module for module in found if module is not None]
    # Layers that carry a state from token to token have none; of all others it must be known.
    if not modules or (len(modules) < len(found) and not upstream.is_recurrent(language_model.config)):
        raise UnsupportedModelError(
            f"{type(language_model).__name__} has layers without an attention of a known name "
            f"({', '.join(upstream.ATTENTION)})"
        )
    seen = Received()

    def start(*_: Any) -> None:
        seen.weights = None

    @torch.no_grad()
    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        slots = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        weights = attention_of(module, args, kwargs, slots[:, -asking - 1 : -1], slots)
        seen.weights = weights if seen.weights is None else seen.weights + weights

    register()
    with contextlib.ExitStack() as handles:
        handles.enter_context(language_model.register_forward_pre_hook(start))
        for module in modules:
            handles.enter_context(module.register_forward_pre_hook(ask, with_kwargs=True))
        yield seen
