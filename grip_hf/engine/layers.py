"""Drop visual tokens between layers of the language model.

All tokens enter it. A selector of this kind says after which layers some go, and which tokens' attention tells which:
hooks on the decoder layers rank the visual tokens, cut every later layer's input down to what is left, and give its
output the length of the call back, so that whatever stands between the layers sees nothing of it. The KV cache
remembers what each layer holds.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import GripError, UnsupportedModelError
from . import masks, upstream
from .arguments import outgrows_window, uses_flash
from .cache import find, logical_of, physical, states_of, window
from .context import Hook, running
from .drops import LayerDrops
from .plan import Plan, expand, source_slots, take, take_last
from .ranking import Ranked, register

if TYPE_CHECKING:
    from ..selectors.inside import InsideSelector


def check_layers(language_model: nn.Module, selector: InsideSelector) -> list[tuple[int, int]]:
    """Where a selector ranks and drops tokens between the decoder layers of a language model.

    Raises:
        UnsupportedModelError: The decoder has no list of layers, too few of them, or a layer that ranks lacks an
            attention of its own.
    """
    layers: Any = getattr(language_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"selector {selector.name!r} needs decoder layers; {type(language_model).__name__} has no list `layers`"
        )
    stages = selector.stages(len(layers))
    if not stages or not all(0 <= rank <= drop < len(layers) for rank, drop in stages):
        raise UnsupportedModelError(
            f"selector {selector.name!r} ranks and drops tokens at layers {stages}, this model has {len(layers)}"
        )
    reason = upstream.layers_that_cannot_drop(language_model, stages)
    if reason is not None:
        raise UnsupportedModelError(
            f"selector {selector.name!r} cannot drop between the layers of {type(language_model).__name__}: {reason}"
        )
    return stages


def hook_layers(language_model: nn.Module, selector: InsideSelector) -> list[Any]:
    """Hook the decoder layers for a selector that drops between them; returns the handles."""
    stages = check_layers(language_model, selector)
    layers: Any = language_model.layers
    register()
    handles: list[Any] = []
    for number, (layer, source) in enumerate(zip(layers, upstream.key_layers(layers) or (), strict=True)):
        hook = LayerHook(number, source, tuple(stages))
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        # First of all hooks, so that those of whoever records hidden states see them at their length.
        handles.append(layer.register_forward_hook(AfterLayerHook(number), prepend=True))
        if any(number == rank for rank, _ in stages):
            attention = upstream.attention_module(layer)
            assert attention is not None
            handles.append(attention.register_forward_pre_hook(RankingHook(number, tuple(stages)), with_kwargs=True))
    return handles


@dataclasses.dataclass(frozen=True)
class LayerHook(Hook):
    """Before a decoder layer: drop what its stage drops, and cut its input down to what is left.

    Attributes:
        number: The layer.
        source: The layer whose keys it reads; itself, in most models.
        stages: Per drop the layer that ranks, and the first one without the dropped tokens.
    """

    number: int
    source: int
    stages: tuple[tuple[int, int], ...]

    def taken(self, tokens: int) -> int:
        """How many keys of a call of so many tokens are there before this layer runs."""
        return tokens if self.source != self.number else 0

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """New arguments of the layer, or None."""
        context = running()
        if context is None or context.layers is None:
            return self._later(layer, args, kwargs)
        return self._first(context.layers, layer, args, kwargs)

    @torch.compiler.disable
    def _first(self, drops: LayerDrops, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for stage, (rank, drop) in enumerate(self.stages):
            if drop != self.number:
                continue
            if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
                raise GripError(
                    f"selector {drops.selector.name!r} drops tokens between layers, which gradient checkpointing runs "
                    "again without knowing; train with gradient_checkpointing=False"
                )
            if rank == drop:  # ranked by what comes in, before anything of the layer has run
                self._rank_ahead(drops, layer, args, kwargs)
            drops.drop(self.number, stage, len(self.stages))
        if drops.plan is None:
            return self._later(layer, args, kwargs) if drops.earlier else None
        return cut(drops, self, layer, args, kwargs)

    def _rank_ahead(self, drops: LayerDrops, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if drops.plan is not None:
            args, kwargs = cut(drops, self, layer, args, kwargs)
        elif drops.earlier:
            args, kwargs = self._later(layer, args, kwargs) or (args, kwargs)
        try:
            # Its forward, not a call: the hooks around it belong to the real run. It ends in its attention.
            type(layer).forward(layer, *args, **kwargs)
        except Ranked:
            return
        raise upstream.unknown(f"{type(layer).__name__} does not call its attention")

    def _later(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The mask of a later call for a layer whose cache lacks what was dropped."""
        view = find(kwargs)
        states = states_of(logical_of(view))
        start = 0
        for one in states:  # rising; torch.compile follows no less plain a way to find the last that is not above
            start = one if one <= self.source else start
        if not start:
            return None
        cache, state, mask = logical_of(view), states[start], kwargs.get("attention_mask")
        windowed = cache.is_sliding[self.source]
        if mask is not None and mask.ndim == 4 and state.columns is not None and not windowed:
            return args, {**kwargs, "attention_mask": masks.pick_columns(mask, state.columns)}
        hidden = args[0] if args else kwargs["hidden_states"]
        queries = hidden.shape[-2]
        taken = self.taken(queries)
        keys = state.keys(int(physical(cache).get_seq_length(self.source)) + queries - taken)
        flash = _runs_flash(layer, keys.index.shape[1] + state.dropped)
        if mask is None and state.full:
            return None
        if flash:
            new = masks.mask_2d(mask, keys)
        elif mask is None:
            new = masks.causal_4d(keys, queries, window(physical(cache), queries, self.source, taken))
        elif mask.ndim == 2:
            new = masks.mask_2d(mask, keys)
        else:
            rows = torch.arange(queries, device=mask.device).expand(len(keys.index), -1)
            logical = window(cache, queries, self.source, taken)
            new = masks.mask_4d(mask, rows, keys, logical, window(physical(cache), queries, self.source, taken))
        return args, {**kwargs, "attention_mask": new}


@dataclasses.dataclass(frozen=True)
class AfterLayerHook(Hook):
    """After a decoder layer: give its output the length of the call back."""

    number: int

    def __call__(self, layer: Any, args: tuple[Any, ...], output: Any) -> Any:
        """The output with hidden states of the whole call, or None."""
        context = running()
        plan = None if context is None or context.layers is None else context.layers.plan
        if plan is None:
            return None
        source = source_slots(plan)
        if isinstance(output, tuple):
            return (expand(output[0], source, -2), *output[1:])
        return expand(output, source, -2)


@dataclasses.dataclass(frozen=True)
class RankingHook(Hook):
    """Before the attention of a layer that ranks.

    Attributes:
        number: The layer.
        stages: See `LayerHook`.
    """

    number: int
    stages: tuple[tuple[int, int], ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Rank; a layer that is run ahead for it ends here."""
        context = running()
        if context is not None and context.layers is not None:
            self._rank(context.layers, module, args, kwargs)

    @torch.compiler.disable
    def _rank(self, drops: LayerDrops, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for rank, drop in self.stages:
            if rank == self.number and drop not in drops.plans:
                drops.rank(self.number, module, args, kwargs)
                if rank == drop:
                    raise Ranked(drops.ranks)  # type: ignore[arg-type]
                return


def cut(
    drops: LayerDrops, hook: LayerHook, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a decoder layer for the tokens that are left of a call."""
    view, plan = find(kwargs), drops.left
    new = {name: value if value is view else _tokens(name, value, plan) for name, value in kwargs.items()}
    if "attention_mask" in kwargs:
        new["attention_mask"] = _layer_mask(kwargs["attention_mask"], drops, hook, view, layer)
    return tuple(_tokens("hidden_states", value, plan) for value in args), new


def _tokens(name: str, value: Any, plan: Plan) -> Any:
    """Those of an argument's entries that belong to the tokens of a plan; what has none per token is left alone."""
    if isinstance(value, (tuple, list)):
        return type(value)(_tokens(name, one, plan) for one in value)
    if not isinstance(value, Tensor):
        return value
    if name == "position_ids" or value.ndim <= 2:
        return take_last(value, plan.index) if value.ndim and value.shape[-1] == plan.length else value
    if value.shape[-2] != plan.length:
        return value
    moved = value.movedim((-3, -2), (0, 1))
    return take(moved, plan.index).movedim((0, 1), (-3, -2))


def _layer_mask(mask: Tensor | None, drops: LayerDrops, hook: LayerHook, view: Any, layer: Any) -> Tensor | None:
    plan, cache = drops.left, logical_of(view)
    kept, keys = plan.index.shape[1], drops.keys(hook.source, plan)
    total = drops.step.call.past_logical + plan.length
    if _runs_flash(layer, total):
        # Also where all stay: without a mask it would read the gaps between positions as packing.
        return masks.mask_2d(None if mask is None else mask[:, :total], keys)
    if mask is None and keys.full:
        return None
    if mask is not None and mask.ndim == 2:
        return masks.mask_2d(mask[:, :total], keys)
    taken = hook.taken(kept)
    present = window(physical(cache), kept, hook.source, taken)
    if mask is None:
        made = masks.causal_4d(keys, kept, present)
    else:
        made = masks.mask_4d(mask, plan.index, keys, window(cache, plan.length, hook.source, taken), present)
    return masks.let_fillers_see(made, plan.valid, keys.index.shape[1] - kept)


def _runs_flash(layer: Any, length: int) -> bool:
    """Whether a decoder layer runs flash attention, which counts kept tokens only.

    Raises:
        GripError: It does, and `length` positions outgrow a sliding window.
    """
    attention = upstream.attention_module(layer)
    if attention is None or not uses_flash(attention.config):
        return False
    if outgrows_window(attention.config, length):
        raise GripError(
            f"cannot prune {length} positions with flash attention and a sliding window of "
            f"{upstream.sliding_window(attention.config)}: it would count kept tokens only; use sdpa"
        )
    return True
