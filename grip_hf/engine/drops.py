"""What is dropped between the layers of the language model in one call: who is ranked by whom, and what is left.

The plans are those of a call that drops before the language model, one for each layer after which some tokens go. In a
later call on a cache the layers hold different numbers of keys, so that each has a map of its own.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import GripError
from . import upstream
from .cache import physical, states_of
from .call import Call, Step
from .choice import Choice
from .keepsets import topk_mask
from .masks import KeyMap
from .plan import Plan, make_plan, then
from .ranking import attention_of

if TYPE_CHECKING:
    from ..selectors.inside import InsideSelector


@dataclasses.dataclass(eq=False)
class LayerDrops:
    """What is dropped between the layers in one call.

    Attributes:
        selector: Says where, and how many are left.
        choice: The visual tokens, their groups and budgets.
        step: The call; all of its tokens enter.
        asking: [G, L] bool, the tokens whose attention ranks the visual tokens of each group.
        plans: What is left from the layer of each number on, in terms of the whole call.
        earlier: What the cache holds of calls before it, from the layer of each number on.
        ranks: By layer: attention [G, N] to the visual tokens of each group, where it has just ranked them.
    """

    selector: InsideSelector
    choice: Choice
    step: Step
    asking: Tensor
    plans: dict[int, Plan] = dataclasses.field(default_factory=dict)
    earlier: dict[int, KeyMap] = dataclasses.field(default_factory=dict)
    ranks: Tensor | None = None

    @classmethod
    def of(cls, selector: Any, choice: Choice, step: Step) -> LayerDrops:
        """The drops of a call; refuses one that comes after others on a cache whose keys have no plain order."""
        call = step.call
        if call.past_logical and not _grows_plainly(call):
            raise GripError(
                f"selector {selector.name!r} cannot take pictures after the first call on a static cache, or on one "
                "with sliding windows; start a new one, or use `with model.grip.disabled()`"
            )
        found = cls(selector, choice, step, _asking(selector, choice, call.visual.shape[1]))
        if call.past_logical:
            starts = {0, *states_of(call.cache), *(drop for _, drop in selector.stages(len(call.cache.layers)))}
            found.earlier = {start: _held(call.cache, start, call) for start in sorted(starts)}
        return found

    def before(self, layer: int) -> KeyMap | None:
        """What the cache holds for a layer of calls before this one; None if there were none."""
        return next((keys for start, keys in reversed(self.earlier.items()) if start <= layer), None)

    def keys(self, layer: int, plan: Plan) -> KeyMap:
        """All keys that a layer sees where a plan is left of this call."""
        before = self.before(layer)
        if before is None:
            return KeyMap(plan.index, plan.valid, plan.full)
        index = torch.cat([before.index, plan.index + self.step.call.past_logical], 1)
        return KeyMap(index, torch.cat([before.valid, plan.valid], 1), before.full and plan.full)

    @property
    def plan(self) -> Plan | None:
        """What is left now."""
        return next(reversed(self.plans.values()), None)

    @property
    def left(self) -> Plan:
        """The same, also before the first drop."""
        return self.step.plan if self.plan is None else self.plan

    @property
    def later(self) -> dict[int, tuple[Plan, KeyMap]]:
        """What is left from the layer of each number on, and its keys; also where the cache alone differs."""
        starts, found, left = sorted({*self.plans, *self.earlier} - {0}), {}, self.step.plan
        for start in starts:
            left = self.plans.get(start, left)
            found[start] = (left, self.keys(start, left))
        return found

    def rank(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Rank the visual tokens by the attention of those that ask, in the attention module of a layer."""
        here, groups, before = self.left, self.choice.groups, self.before(layer)
        stays = here.valid & (self.step.call.real.gather(1, here.index))
        asks = self.asking.new_zeros(stays.shape)
        asks.index_put_((groups.row,), self.asking.gather(1, here.index[groups.row]), accumulate=True)
        who = make_plan(asks & stays)
        earlier = 0 if before is None else before.index.shape[1]
        weights = attention_of(module, args, kwargs, who.index, here.index, earlier)
        place = here.index.gather(1, who.index)
        mine = self.asking.gather(1, place[groups.row]) & who.valid[groups.row]
        mean = (weights[groups.row] * mine[..., None]).sum(1) / mine.sum(1, keepdim=True).clamp(min=1)
        whole = mean.new_zeros(len(mean), here.length).scatter(1, here.index[groups.row], mean)
        self.ranks = whole.gather(1, groups.place).masked_fill(~groups.mask, 0)

    def drop(self, layer: int, stage: int, stages: int) -> None:
        """Drop what is ranked lowest before a layer."""
        assert self.ranks is not None
        groups, call, here = self.choice.groups, self.step.call, self.left
        held = call.visual.new_zeros(call.visual.shape).scatter(1, here.index, here.valid) & call.visual
        left = groups.pick(held)
        count = self.selector.left(groups.mask.sum(1), self.choice.batch.budgets, stage, stages)
        keep = groups.scatter(topk_mask(self.ranks, left, count), call.visual)
        real = call.real.gather(1, here.index) & here.valid
        stays = real & (~call.visual | keep).gather(1, here.index)
        self.plans[layer] = then(here, make_plan(stays))


def _asking(selector: Any, choice: Choice, length: int) -> Tensor:
    """[G, L] bool: the tokens whose attention ranks: words that the selector names, else the prompt's last token."""
    batch, groups = choice.batch, choice.groups
    index = batch.text_index
    assert index is not None
    named = selector.asking(batch)
    asked = torch.zeros(len(groups.row), length, dtype=torch.bool, device=groups.place.device)
    if named is not None and index.shape[1]:
        # Added up, because padding has index 0 too: it must not overwrite what is said of the first token.
        asked = torch.zeros_like(asked, dtype=torch.long).scatter_add(1, index, (named & batch.text_mask).long()) > 0
    last = (groups.place * groups.mask).amax(1)
    if index.shape[1]:
        last = last.maximum((index * batch.text_mask).amax(1))
    last_token = torch.zeros_like(asked).scatter_(1, last[:, None], True)
    return torch.where(asked.any(1, keepdim=True), asked, last_token)


def _grows_plainly(call: Call) -> bool:
    """Whether the keys of all layers of a cache lie one after the other, and none goes but those that were dropped."""
    cache, first = call.cache, call.state
    plain = not cache.is_compileable and not any(cache.is_sliding) and upstream.sliding_window(call.config) is None
    return plain and (first is None or first.trivial)


def _held(cache: Any, layer: int, call: Call) -> KeyMap:
    """The keys of earlier calls that a layer holds, in logical terms."""
    states = states_of(cache)
    start = max((one for one in states if one <= layer), default=None)
    held = int(physical(cache).get_seq_length(layer))
    if start is not None:
        return states[start].keys(held)
    index = torch.arange(held, device=call.visual.device).expand(len(call.visual), -1)
    return KeyMap(index, torch.ones_like(index, dtype=torch.bool), full=True)
