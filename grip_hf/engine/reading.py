"""Read a call of the language model: what is visual, what padding, what the cache holds, which text is the prompt.

The prompt is told so that what is kept never hangs on an answer that the call has too. In this order: what
`with model.grip.prompt(...)` says; the labels given to the model; what `generate` was given; what the callers hold
(see `callers`). A call of which nothing of this is known is prompt as a whole. `logits_to_keep` says nothing about it.

A conversation with several answers runs as it would on one KV cache: a picture is chosen, within a budget of its own,
by the text of the turn that it comes in, which ends where the next answer begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, GripError
from . import upstream
from .cache import CacheState, find, logical_length, physical_length, state_of, states_of
from .call import Call, Step
from .callers import IGNORED, answer_of_callers, has_unpruned_reference
from .context import CallContext, prompt_of_generation, told_prompt
from .masks import KeyMap

UNPRUNED = (
    "the trainer compares a patched model with a reference model that sees all visual tokens; prune that one too: "
    "trainer.add_callback(grip_hf.training.PruneReference(trainer))"
)

ALL_ANSWER = (
    "the labels of a training call cover all text of a picture's turn, so that the answer, too, chooses its visual "
    "tokens; put -100 at the prompt (TRL: assistant_only_loss=True or completion_only_loss=True), or say where the "
    "prompt is: `with model.grip.prompt(mask_or_lengths): ...`"
)


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
    embeds, mask, positions = (arguments.get(name) for name in upstream.NEEDED)
    assert embeds is not None
    call = Call(
        arguments, config, visual, visual, cache, state, physical_length(cache), past, compact, embeds, mask, positions
    )
    if not bool(visual.any()) and (state is None or state.trivial):
        return call  # nobody will ask what is padding
    outer = None if context is None or context.arguments is None else context.arguments.get("attention_mask")
    if outer is None:
        refuse_mixed_rows(call)
    real = real_tokens(mask if outer is None else outer, past, visual)
    return dataclasses.replace(call, real=real, segments=packing(call))


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


def real_tokens(mask: Any, past: int, visual: Tensor) -> Tensor:
    """[B, L] bool: which tokens of this call are not padding, from the attention mask(s) of the unpruned call."""
    batch, length = visual.shape
    if isinstance(mask, dict):
        mask = mask.get(upstream.FULL, next(iter(mask.values()), None))
    if mask is None:
        return torch.ones_like(visual)
    if mask.ndim == 2:
        if mask.shape[1] != past + length:
            raise GripError(
                f"attention_mask covers {mask.shape[1]} positions, expected {past + length} "
                f"({past} before this call and {length} in it)"
            )
        return (mask[:, past:] != 0).expand(batch, -1)
    own = mask[:, 0].diagonal(mask.shape[-1] - length if mask.shape[-1] < past + length else past, -2, -1)
    return (own if own.dtype == torch.bool else own == 0).expand(batch, -1)  # a token that is no padding sees itself


def packing(call: Call) -> Tensor | None:
    """[B, L] sequence number of each token if the call packs several sequences into a row, else None.

    transformers sees packing in jumps of the positions when there is neither a mask nor a cache. Dropping tokens makes
    such jumps too, so it is looked for here, before, and a pruned call always has a mask.
    """
    positions = call.positions
    if call.mask is not None or positions is None or call.cache is not None:
        return None
    if upstream.uses_cache(call.arguments, call.config):
        return None
    if positions.ndim == 3:
        if positions.shape[0] == 3:
            return None  # three kinds of M-RoPE positions without text positions: transformers does not look either
        positions = positions[0]
    return upstream.packed_segments(positions)


def refuse_mixed_rows(call: Call) -> None:
    """Refuse a call without a mask whose model makes one that mixes the sequences packed into a row."""
    positions = call.positions
    if call.mask is None or positions is None or positions.ndim != 2 or call.cache is not None:
        return
    segments = None if upstream.uses_cache(call.arguments, call.config) else upstream.packed_segments(positions)
    if segments is not None and not keeps_apart(call.mask, segments, upstream.sliding_window(call.config)):
        raise GripError(
            "cannot prune a packed batch of this model: its own attention mask does not keep the sequences of a row "
            "apart; use a padded batch"
        )


def keeps_apart(given: Any, segments: Tensor, reach: int | None) -> bool:
    """Whether prepared masks are right for packed rows, of which `segments` [B, L] has the number of each token.

    They are not if a token sees another sequence, or if sliding layers see something else of their window than full
    ones do: in transformers 5.24, pictures of Gemma 3 see each other at the places that they have in the first one.
    """
    kinds = given if isinstance(given, dict) else {upstream.FULL: given}
    square = (segments.shape[1],) * 2
    if not all(isinstance(one, Tensor) and one.ndim == 4 and one.shape[2:] == square for one in kinds.values()):
        return False
    seen = {kind: one if one.dtype == torch.bool else one == 0 for kind, one in kinds.items()}
    apart = segments[:, None, :, None] != segments[:, None, None]
    if any(bool((one & apart).any()) for one in seen.values()):
        return False
    if reach is None or not {upstream.FULL, upstream.SLIDING} <= set(seen):
        return True
    slots = torch.arange(segments.shape[1], device=segments.device)
    near = (slots[:, None] - slots).abs() < reach
    return not bool(((seen[upstream.FULL] != seen[upstream.SLIDING]) & near).any())


@dataclasses.dataclass(frozen=True)
class Question:
    """What a call asks.

    Attributes:
        text: [B, L] bool, the tokens of the prompt that are neither padding nor visual.
        turn: [B, L] long, which turn each position belongs to.
    """

    text: Tensor
    turn: Tensor


def labels_of(given: Mapping[str, Any]) -> Tensor | None:
    """[B, L] the labels of a call, if it has any; also where each position is given the label of the next one."""
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if labels is not None or not isinstance(shifted, Tensor) or shifted.ndim != 2:
        return labels
    return torch.nn.functional.pad(shifted[:, :-1], (1, 0), value=IGNORED)


def read_question(context: CallContext, visual: Tensor, real: Tensor, first: bool) -> Question:
    """The question of a call.

    Args:
        context: The call.
        visual: [B, L] bool, its visual tokens.
        real: [B, L] bool, False at padding.
        first: Whether no cache came with it, so that an answer may be in it.
    """
    text = real & ~visual
    boundary = context.boundary
    if UNPRUNED not in boundary.said and boundary.trains(context) and has_unpruned_reference(boundary.parts.owner):
        boundary.warn_once(UNPRUNED)
    answer = find_answer(context, text, real, first)
    if answer is None:
        return Question(text, torch.zeros_like(text, dtype=torch.long))
    answer = answer & real
    ends = answer & ~torch.nn.functional.pad(answer[:, 1:], (0, 1))
    turn = torch.nn.functional.pad(ends.long().cumsum(1), (1, -1))
    asked = text & ~answer
    # A picture without any word of a prompt in its turn is asked for by all there is.
    turns = torch.arange(int(turn.max()) + 1, device=turn.device)
    spoken = ((turn[:, None] == turns[:, None]) & asked[:, None]).any(2).gather(1, turn)
    shown = ((turn[:, None] == turns[:, None]) & visual[:, None]).any(2).gather(1, turn)
    unasked = text & shown & ~spoken
    if ALL_ANSWER not in boundary.said and boundary.trains(context) and bool(unasked.any()):
        boundary.warn_once(ALL_ANSWER)
    return Question(asked | unasked, turn)


def find_answer(context: CallContext, text: Tensor, real: Tensor, first: bool) -> Tensor | None:
    """[B, L] bool: the tokens that are an answer, or None if nobody tells."""
    batch, length = text.shape
    slots = torch.arange(length, device=text.device)
    prompt = told_prompt(context.boundary)
    if prompt is not None:
        return ~_as_mask(prompt, real)
    if context.labels is not None and context.labels.shape == text.shape:
        return context.labels.to(text.device) != IGNORED
    generated = prompt_of_generation(context.boundary)
    if generated is not None:
        # Beams repeat rows; candidates of assisted decoding, and what was said without a cache, follow the prompt.
        inside = generated.shape[1] < length and batch % max(len(generated), 1) == 0 and first
        return (slots >= generated.shape[1]).expand_as(text) if inside else None
    if not first:
        return None
    answer = answer_of_callers(context.boundary.parts.owner, text.shape)
    if answer is not None:
        return answer.to(text.device)
    if context.boundary.trains(context):
        context.boundary.warn_once(
            "a training call of a patched model tells neither labels nor prompt, so that all of its text, an answer "
            "too, chooses its visual tokens; pass labels to the model, or say where the prompt is: "
            "`with model.grip.prompt(mask_or_lengths): ...`"
        )
    return None


def _as_mask(prompt: Tensor | Sequence[int], real: Tensor) -> Tensor:
    if isinstance(prompt, Tensor):
        if prompt.shape != real.shape:
            raise ConfigError(f"prompt must have the shape of the call {tuple(real.shape)}, got {tuple(prompt.shape)}")
        return prompt.to(real.device).bool()
    if len(prompt) != len(real):
        raise ConfigError(f"prompt must have one length per row of the call ({len(real)}), got {list(prompt)}")
    return real.long().cumsum(1) <= torch.tensor(prompt, device=real.device)[:, None]


def states_after(step: Step, later: Mapping[int, KeyMap] | None) -> dict[int, CacheState]:
    """What the layers of the cache hold after a step, from the layer of each number on, for later calls to read.

    Args:
        step: The step.
        later: All keys from the layer of each number on, if this call drops tokens between layers.
    """
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
    if later is not None:
        for start, keys in later.items():
            states[start] = _state(keys, visual, None)
        return states
    for start, state in states_of(call.cache).items():
        if start:  # this call dropped nothing between layers, but an earlier one did
            states[start] = _state(state.keys(visual.shape[1] - state.dropped), visual, None)
    return states


def _state(keys: KeyMap, visual: Tensor, shift: Tensor | None) -> CacheState:
    return CacheState(keys.index, keys.valid, visual, visual.shape[1] - keys.index.shape[1], keys.full, shift)
