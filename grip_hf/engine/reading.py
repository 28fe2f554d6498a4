"""From the arguments of a language model's call to a `Call`, from a choice to a `Step` and to what a cache holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import GripError
from . import upstream
from .arguments import real_tokens
from .attention_masks import refuse_mixed_rows
from .cache import CacheState, find, logical_length, physical_length, state_of, states_of
from .call import Call, Step
from .choice import Choice
from .context import CallContext, prompt_of_generation
from .growing import Growth, growth
from .masks import KeyMap
from .plan import identity_plan, make_plan

if TYPE_CHECKING:
    from .layers import LayerDrops


def read(context: CallContext | None, module: nn.Module, arguments: dict[str, Any]) -> Call:
    """What is known of a call before pruning.

    Args:
        context: The base model's call around it, if it brings several tokens.
        module: The language model.
        arguments: What it is called with.
    """
    cache, config = find(arguments), module.config
    state, past = state_of(cache), logical_length(cache)
    visual = visual_tokens(context, arguments["inputs_embeds"], past)
    if upstream.is_paged(arguments) and bool(visual.any()):
        raise GripError(
            "cannot prune pictures on a paged KV cache (generate_batch, continuous batching); use generate, or "
            "remove_grip(model) first"
        )
    compact = context.boundary.compact if context is not None else state is not None and state.shift is not None
    call = Call(arguments, config, visual, visual, cache, state, physical_length(cache), past, compact)
    if not bool(visual.any()) and (state is None or state.trivial):
        return call  # nobody will ask what is padding
    outer = None if context is None or context.arguments is None else context.arguments.get("attention_mask")
    if outer is None:
        refuse_mixed_rows(call)
    real = real_tokens(arguments.get("attention_mask") if outer is None else outer, past, visual)
    return Call(arguments, config, visual, real, cache, state, call.past, past, compact)


def visual_tokens(context: CallContext | None, embeds: Tensor, past: int) -> Tensor:
    """[B, L] bool: which tokens of a call stand for pictures or videos.

    Placeholders do, if pictures come with the call; otherwise they are text that happens to look like one. Embeddings
    that a caller has merged with pictures are told by the ids or token types that come with them.
    """
    none = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    if context is None or context.arguments is None:
        return none
    arguments, boundary = context.arguments, context.boundary
    ids, wanted = arguments.get("input_ids"), torch.tensor(boundary.parts.token_ids, device=embeds.device)
    if upstream.has_pictures(arguments):
        if ids is not None:
            return torch.isin(ids.to(embeds.device), wanted)
        return _placeholders(arguments["inputs_embeds"], boundary.parts.base, wanted)
    if ids is not None or arguments.get("inputs_embeds") is None:
        return none
    types, prompt = arguments.get(upstream.TOKEN_TYPES), prompt_of_generation(boundary)
    if isinstance(types, Tensor) and types.shape[1] == none.shape[1]:
        marked = types.to(embeds.device) > 0
    elif prompt is not None and prompt.shape[1] == none.shape[1] and len(none) % len(prompt) == 0:
        repeated = prompt.repeat_interleave(len(none) // len(prompt), 0)
        marked = torch.isin(repeated.to(embeds.device), wanted)
    else:
        if past == 0 and not boundary.budget().everything:
            boundary.warn_once(
                "embeddings without token ids were given to a patched model, so that it cannot tell which are visual: "
                "nothing is pruned. Give pixels, or the ids too: generate(input_ids=..., inputs_embeds=...)"
            )
        return none
    return marked & ~_placeholders(arguments["inputs_embeds"], boundary.parts.base, wanted)


def _placeholders(embeds: Tensor, base: Any, ids: Tensor) -> Tensor:
    """[B, L] bool: which embeddings are those of a placeholder, so that no picture was put in its place."""
    table = base.get_input_embeddings()
    return (embeds[:, :, None] == table(ids.to(table.weight.device)).to(embeds)).all(-1).any(-1)


def make_step(call: Call, choice: Choice | None) -> Step:
    """What stays of a call: all but padding, where tokens go, and all of it, where none do."""
    batch, length = call.visual.shape
    device = call.visual.device
    if choice is None or choice.scores is None:  # all stay, or some go later, between the layers
        keep, plan = torch.ones_like(call.visual), identity_plan(batch, length, device)
    else:
        keep = call.real & (~call.visual | choice.keep)
        plan = make_plan(keep)
    before = _keys_before(call)
    index = torch.cat([before.index, plan.index + call.past_logical], 1)
    keys = KeyMap(index, torch.cat([before.valid, plan.valid], 1), before.full and plan.full)
    return Step(call, keep, plan, keys)


def _keys_before(call: Call) -> KeyMap:
    """The cached keys in logical terms."""
    if call.state is not None:
        return call.state.keys(call.past)
    index = torch.arange(call.past, device=call.visual.device).expand(len(call.visual), -1)
    return KeyMap(index, torch.ones_like(index, dtype=torch.bool), full=True)


def states_after(step: Step, layers: LayerDrops | None) -> dict[int, CacheState]:
    """What the layers of the cache hold after a step, from the layer of each number on."""
    call = step.call
    earlier = call.visual.new_zeros(call.visual.shape[0], call.past_logical)
    if call.state is not None:
        earlier[:, : call.state.visual.shape[1]] = call.state.visual
    visual = torch.cat([earlier, call.visual], 1)
    shift = None
    if call.compact:
        shift = (call.real & ~step.keep).sum(1, keepdim=True)
        if call.state is not None and call.state.shift is not None:
            shift = shift + call.state.shift
    states = {0: _state(step.keys, visual, shift)}
    if layers is not None:
        for start, plan in layers.plans.items():
            states[start] = _state(KeyMap(plan.index, plan.valid, plan.full), visual, None)
        return states
    for start, state in states_of(call.cache).items():
        if start:  # this call dropped nothing between layers, but an earlier one did
            states[start] = _state(state.keys(visual.shape[1] - state.dropped), visual, None)
    return states


def _state(keys: KeyMap, visual: Tensor, shift: Tensor | None) -> CacheState:
    return CacheState(keys.index, keys.valid, visual, visual.shape[1] - keys.index.shape[1], keys.full, shift)


def growths(step: Step, layers: LayerDrops | None) -> dict[int, Growth | None]:
    """From the layer of each number on, how what it puts out gets the length of the call."""
    total = step.call.past_logical + step.plan.length
    found = {0: growth(step.plan, step.keys, total)}
    if layers is not None:
        for start, plan in layers.plans.items():
            found[start] = growth(plan, KeyMap(plan.index, plan.valid, plan.full), total)
    return found
