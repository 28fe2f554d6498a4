"""Drop rows between the layers of a vision tower.

Hooks on the tower's layers choose the rows that stay at one of them, cut the input of that layer and of all later ones
down to those, and put them back in their places wherever the tower's hidden states are read. Rows that left keep the
state in which they did; which visual tokens they would have made is told to the language model's boundary, where these
are no candidates.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine import upstream
from ..engine.budget import Budget
from ..engine.choice import Score
from ..engine.context import Hook, prompt_of_generation, running
from ..engine.keepsets import VisualBatch
from ..engine.once import keep_test
from ..engine.taps import encoder, publish
from ..errors import GripError
from .facts import Tower
from .layout import places_of
from .places import Places, Plan, choose, cut_lengths
from .rows import drops_rows, rows_of
from .signals import Signals
from .survivors import survivors, tap_of
from .tokens import TILES, Pack, tokens_of
from .words import words_of

if TYPE_CHECKING:
    from ..engine.call import Call
    from ..engine.context import CallContext
    from ..engine.hooks import Boundary


@dataclasses.dataclass(eq=False)
class TowerCall:
    """One call of a tower.

    Attributes:
        arguments: Its arguments, by name.
        budget: How many rows stay.
        encoder: The method of the base model that called it.
        read: Layers whose output somebody reads, or None for all.
        attended: Module, input and arguments of the attention that a selector looks at.
        plan: Which rows stay, once some have left.
        around: The hidden states that they left.
    """

    arguments: dict[str, Any]
    budget: Budget
    encoder: str
    read: frozenset[int] | None
    attended: tuple[Any, Tensor, dict[str, Any]] | None = None
    plan: Plan | None = None
    around: Tensor | None = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: list[TowerCall | None] = []  # None: a call whose rows all stay


_thread = _Thread()


def _current() -> TowerCall | None:
    return _thread.calls[-1] if _thread.calls else None


@dataclasses.dataclass(eq=False)
class TowerDrops:
    """The part of a patch that stands in the vision tower.

    Attributes:
        boundary: The patch.
        tower: The tower.
        selector: Scores groups of rows, as a selector scores visual tokens.
    """

    boundary: Boundary
    tower: Tower
    selector: Score

    def hooks(self) -> list[Any]:
        """Register the hooks; returns their handles."""
        tower = self.tower
        last, names = len(tower.layers) - 1, upstream.parameters(tower.module)
        handles = [
            tower.module.register_forward_pre_hook(TowerHook(self.boundary, "before", names), with_kwargs=True),
            tower.module.register_forward_hook(TowerHook(self.boundary, "after"), always_call=True),
        ]
        if getattr(self.selector, "attends", False):
            attention = upstream.attention_module(tower.layers[tower.first - 1])
            handles.append(attention.register_forward_pre_hook(TowerHook(self.boundary, "attend"), with_kwargs=True))
        for number in range(tower.first, last + 1):
            layer = tower.layers[number]
            handles += [
                layer.register_forward_pre_hook(TowerHook(self.boundary, "cut", number), with_kwargs=True),
                # First of all hooks, so that those of whoever records hidden states see them at their length.
                layer.register_forward_hook(TowerHook(self.boundary, "restore", number), prepend=True),
            ]
        return handles

    def methods(self) -> list[Any]:
        """What stands in for methods of the base model."""
        rows = self.tower.rows
        return [Pack(self.boundary.parts.base, rows.packing)] if rows.packing else []

    def survivors(self, context: CallContext, call: Call, budget: Budget) -> Tensor | None:
        """[B, L] bool: the visual tokens of a call that have rows, or None if all do."""
        return survivors(context, call, budget)

    def before(self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Enter a call of the tower."""
        budget, name = self.boundary.budget(), encoder()
        # Called by itself, it is nobody's who would know which rows it lacks.
        if not name or not drops_rows(budget) or name in self.tower.rows.whole:
            _thread.calls.append(None)
            if name not in self.tower.rows.whole:
                keep_test(lambda other: not drops_rows(other))
            if name and drops_rows(budget):
                publish(tap_of(name), torch.empty(0), lambda: torch.ones(0, dtype=torch.bool))
            return
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        wanted = upstream.hidden_states_wanted(given, module, len(self.tower.layers))
        read = (
            None if wanted is None else frozenset(wanted | set(self.tower.rows.reads) | {len(self.tower.layers) - 1})
        )
        _thread.calls.append(TowerCall(given, budget, name, read))

    def after(self, _: None, *call: Any) -> None:
        """Leave it."""
        if _thread.calls:
            _thread.calls.pop()

    def attend(self, _: None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember an attention that the selector will look at."""
        call = _current()
        if call is not None:
            call.attended = (module, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], kwargs)

    def cut(self, number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of a layer for the rows that stay, or None if all do."""
        call = _current()
        if call is None:
            return None
        if number == self.tower.first:
            self._choose(call, layer, args, kwargs)
        if call.plan is None:
            return None
        return (
            tuple(cut_argument(call.plan, "", value) for value in args),
            {name: cut_argument(call.plan, name, value) for name, value in kwargs.items()},
        )

    def restore(self, number: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output of a layer with all rows, where somebody reads it, else None."""
        call = _current()
        if call is None or call.plan is None or (call.read is not None and number not in call.read):
            return None
        assert call.around is not None
        if isinstance(output, tuple):
            return (call.plan.put_back(output[0], call.around), *output[1:])
        return call.plan.put_back(output, call.around)

    def _choose(self, call: TowerCall, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
            raise GripError(
                "tower_keep_ratio drops rows between layers of the vision tower, which gradient checkpointing runs "
                "again without knowing; train with gradient_checkpointing=False, or tower_keep_ratio=None"
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        places = places_of(self.tower, call.arguments, hidden, args, kwargs)
        totals = places.mask.sum(1).tolist()
        shared = not self.boundary.per_image and _samples(self.boundary) == 1
        wanted = rows_of(call.budget, totals, shared)
        keep_test(lambda other: rows_of(other, totals, shared) == wanted)
        alive = places.tokens
        if wanted != totals:
            counts = torch.tensor(wanted, device=hidden.device)
            scores = self._scores(call, hidden, places, counts)
            packed = self.tower.rows.packed
            call.plan = choose(scores, places, counts, hidden.shape[-2], packed)
            call.around, alive = hidden, call.plan.alive
        if self.tower.rows.packing:
            publish(TILES, hidden, lambda: alive)
        else:
            publish(tap_of(call.encoder), hidden, lambda: tokens_of(alive, places, self.tower.rows))

    def _tokens(self, places: Places) -> Tensor | None:
        """[P] long: visual tokens that each picture makes, or None if the tower does not tell."""
        rows = self.tower.rows
        return None if rows.packing else places.tokens.sum(1) + rows.prefix * rows.keep_prefix

    @torch.no_grad()
    def _scores(self, call: TowerCall, hidden: Tensor, places: Places, counts: Tensor) -> Tensor:
        """[P, G] float32 what the selector says of the groups."""
        tokens = places.pick(hidden.detach().flatten(0, -2))
        signals = Signals(self.tower.rows, places, call.arguments, call.attended)
        needs = getattr(self.selector, "needs", ())
        text, text_mask = tokens.new_zeros(len(tokens), 0, tokens.shape[-1]), places.mask[:, :0]
        if getattr(self.selector, "reads_question", False):
            words, mask = words_of(self.boundary, call.encoder, self._tokens(places))
            text, text_mask = (one.to(tokens.device).expand(len(tokens), *one.shape[1:]) for one in (words, mask))
        batch = VisualBatch(
            tokens=tokens,
            mask=places.mask,
            text=text,
            text_mask=text_mask,
            budgets=counts,
            positions=places.positions,
            image_index=torch.zeros_like(places.mask, dtype=torch.long),
            taps={name: getattr(signals, name)() for name in needs},
        )
        scores = self.selector(batch)
        if not isinstance(scores, Tensor) or scores.shape != places.mask.shape or not scores.is_floating_point():
            got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise GripError(f"the tower selector must return float scores {tuple(places.mask.shape)}, got {got}")
        return scores.float()


class TowerHook(Hook):
    """A hook in a vision tower. A copy of a whole model gets a patch of its own, that of one module shares it.

    Args:
        boundary: The patch.
        name: The method of its `TowerDrops`.
        first: That method's first argument.
    """

    def __init__(self, boundary: Boundary, name: str, first: Any = None) -> None:
        self.boundary, self.name, self.first = boundary, name, first

    @torch.compiler.disable  # which rows stay depends on the data
    def __call__(self, *args: Any) -> Any:
        """Run it."""
        return getattr(self.boundary.tower, self.name)(self.first, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> TowerHook:
        whole = id(self.boundary.parts.owner) in memo
        return TowerHook(copy.deepcopy(self.boundary, memo) if whole else self.boundary, self.name, self.first)


def _samples(boundary: Boundary) -> int:
    """How many samples the call around the tower has; 0 if nobody tells."""
    context = running()
    ids = None if context is None else (context.arguments or {}).get("input_ids")
    ids = prompt_of_generation(boundary) if ids is None else ids
    return 0 if ids is None else len(ids)


def cut_argument(plan: Plan, name: str, value: Any) -> Any:
    """Those of an argument's entries that belong to the rows that stay.

    Args:
        plan: Which do.
        name: The argument's name, "" if it was given by its place.
        value: Of the whole call, or of the rows that stay already.

    Raises:
        UnsupportedModelError: It has one entry per row in a form that is not known.
    """
    if isinstance(value, (tuple, list)):
        return type(value)(cut_argument(plan, name, one) for one in value)
    if not isinstance(value, Tensor):
        if type(value).__name__ in upstream.OPAQUE_MASKS:
            raise upstream.unknown(f"the vision tower's attention mask is a {type(value).__name__}, which has no rows")
        return value
    if name in upstream.LENGTHS:
        return cut_lengths(value, plan.index, plan.length)
    if plan.packed:
        return plan.take(value) if value.ndim and value.shape[0] == plan.length else value
    if value.ndim == 4 and value.shape[-1] == plan.length:
        keys = value.expand(len(plan.index), *value.shape[1:])
        index = plan.index[:, None, None].expand(-1, keys.shape[1], keys.shape[2], -1)
        keys = keys.gather(3, index)
        if keys.shape[2] != plan.length:
            return keys
        return keys.gather(2, plan.index[:, None, :, None].expand(-1, keys.shape[1], -1, plan.kept))
    if value.ndim in (2, 3) and value.shape[1] == plan.length:
        return plan.take(value)
    if plan.length in value.shape and plan.kept not in value.shape:
        raise upstream.unknown(f"an argument {tuple(value.shape)} {name!r} of a vision tower's layer is not known")
    return value
