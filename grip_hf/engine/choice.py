"""Ask the selector which visual tokens of one call stay, and what that makes of the call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from ..errors import ConfigError, GripError
from ..families.layouts import View
from . import upstream
from .budget import Budget
from .call import Call, LastCall, Step
from .context import CallContext
from .keepsets import Groups, VisualBatch, group_tokens, spread_taps, topk_mask
from .masks import KeyMap
from .plan import identity_plan, make_plan
from .reading import Question, read_question
from .taps import attached_taps

if TYPE_CHECKING:
    from ..selectors.inside import InsideSelector

Score = Callable[[VisualBatch], Tensor | None]


def drops_inside(selector: object) -> TypeGuard[InsideSelector]:
    """Whether a selector drops tokens between the layers of the language model, and not before it."""
    return bool(getattr(selector, "inside", False))


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a selector made of one call.

    Attributes:
        groups: The visual tokens, by sample or image, and by turn.
        batch: What the selector saw of them.
        scores: [G, N] float32, or None if it drops tokens between layers.
        keep: [B, L] bool, the visual tokens that stay.
        embeds: [B, L, D] what enters the language model, if kept tokens were merged with others; else None.
        text: [B, L] bool, the prompt's text.
        milliseconds: What the selector took; on a GPU, until it had been asked, not until it was done.
    """

    groups: Groups
    batch: VisualBatch
    scores: Tensor | None
    keep: Tensor
    embeds: Tensor | None
    text: Tensor
    milliseconds: float


@torch.no_grad()
def choose(context: CallContext, call: Call) -> Choice | None:
    """Choose the visual tokens of a call that stay, or None if all do.

    Raises:
        GripError: The selector's scores have another shape or type than [groups, tokens] of floats, or what it needs
            of the vision tower is not known of these pictures.
        NonFiniteScoreError: A score is NaN or infinite.
    """
    boundary = context.boundary
    budget = boundary.budget()
    alive = None if boundary.tower is None else boundary.tower.survivors(context, call, budget)
    if (budget.everything or budget.keep_ratio == 1) and alive is None:
        return None
    if boundary.before_choice is not None and upstream.has_adapters(boundary.parts.owner):
        boundary.before_choice()
    _refuse_split_picture(call)
    question = read_question(context, call.visual, call.real, first=call.past_logical == 0)
    arguments = context.arguments or {}
    view = View(
        call.visual, arguments.get("input_ids"), call.embeds, call.positions, boundary.parts.base, boundary.tile
    )
    image, positions = boundary.parts.family.layout(view)
    groups = group_tokens(call.visual, _group_key(question, image if boundary.per_image else None))
    wanted = _counts(budget, groups, call)
    if alive is not None:  # counted of all tokens, chosen from those that have rows
        totals = groups.mask.sum(1)
        groups, both = groups.within(alive, torch.stack([totals if wanted is None else wanted, totals], 1))
        wanted, totals = both.unbind(1)
    elif wanted is None:
        if budget.most is not None:
            boundary.warn_once(
                f"num_tokens={budget.most} keeps all visual tokens: the largest picture or sample has "
                f"{int(groups.mask.sum(1).max())}"
            )
        return None
    batch = _visual_batch(groups, wanted, question, call, image, positions, _taps(context))
    batch = batch if alive is None else dataclasses.replace(batch, totals=totals)
    return _ask(boundary.selector, groups, batch, question, call)


def _ask(selector: Score, groups: Groups, batch: VisualBatch, question: Question, call: Call) -> Choice:
    start = time.perf_counter()
    scores = selector(batch)
    milliseconds = 1000 * (time.perf_counter() - start)
    if scores is None and drops_inside(selector):
        return Choice(groups, batch, None, call.visual, None, question.text, milliseconds)  # it drops between layers
    if not isinstance(scores, Tensor) or scores.shape != groups.mask.shape or not scores.is_floating_point():
        got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise GripError(f"the selector must return float scores of shape {tuple(groups.mask.shape)}, got {got}")
    scores = scores.float()
    keep = topk_mask(scores, groups.mask, batch.budgets)
    merge = getattr(selector, "merge", None)
    embeds = None if merge is None else groups.place_values(merge(batch, keep), call.embeds, keep)
    return Choice(groups, batch, scores, groups.scatter(keep, call.visual), embeds, question.text, milliseconds)


def _group_key(question: Question, image: Tensor | None) -> Tensor:
    """[B, L] long: what tells the groups of a row apart: the turn, and the image if each has its own budget."""
    return question.turn if image is None else question.turn * (image.max() + 1) + image


def _counts(budget: Budget, groups: Groups, call: Call) -> Tensor | None:
    """[G] long: tokens to keep per group, or None if all stay."""

    def repeated(times: int) -> bool:
        rows = call.embeds[::times].repeat_interleave(times, 0)
        return torch.equal(rows, call.embeds)

    totals = groups.mask.sum(1)
    counts = counts_of(budget, totals, groups.row, len(call.visual), repeated)
    return None if torch.equal(counts, totals) else counts


def counts_of(budget: Budget, totals: Tensor, rows: Tensor, batch: int, repeated: Callable[[int], bool]) -> Tensor:
    """[G] long: tokens to keep per group, each as `config.count_kept` counts them.

    Args:
        budget: The budget.
        totals: [G] long, visual tokens of each group, at least 1.
        rows: [G] long, the row of each group in the batch.
        batch: Number of rows.
        repeated: Whether each sample of the batch stands so many times in a row, as `generate` repeats them for
            beams; these keep the per-sample budgets of the original samples.

    Raises:
        ConfigError: Budgets per sample are not as many as the samples.
    """
    if budget.everything:
        return totals
    if budget.num_tokens is not None:
        numbers = torch.tensor(_per_row(budget.num_tokens, "num_tokens", batch, repeated))
        return numbers.to(rows.device)[rows].minimum(totals)
    # On the CPU, in double precision, which some devices lack.
    ratios = torch.tensor(_per_row(budget.keep_ratio, "keep_ratio", batch, repeated), dtype=torch.float64)
    counts = (ratios[rows.cpu()] * totals.cpu() + 0.5).floor().long().clamp(min=1)
    return counts.to(totals.device).minimum(totals)


def _per_row(value: Any, name: str, batch: int, repeated: Callable[[int], bool]) -> list[Any]:
    if not isinstance(value, tuple):
        return [value] * batch
    repeats = batch // len(value)
    if batch % len(value) or (repeats > 1 and not repeated(repeats)):
        raise ConfigError(f"{name} has {len(value)} values for a batch of {batch} samples; give one per sample")
    return [one for one in value for _ in range(repeats)]


def _visual_batch(
    groups: Groups,
    budgets: Tensor,
    question: Question,
    call: Call,
    image: Tensor,
    positions: Tensor,
    taps: dict[str, Tensor],
) -> VisualBatch:
    texts = group_tokens(question.text, question.turn)
    own, mine = groups.key(question.turn), texts.key(question.turn)
    match = own[:, None] == mine[None]
    if match.numel():
        first = match.byte().argmax(1)
        mask = texts.mask[first] & match.any(1, keepdim=True)
        index = texts.place[first] * mask
        words = texts.pick(call.embeds)[first] * mask[..., None]
    else:  # no sample has text
        mask = groups.mask.new_zeros(len(own), 0)
        index, words = mask.long(), call.embeds.new_zeros(len(own), 0, call.embeds.shape[-1])
    return VisualBatch(
        tokens=groups.pick(call.embeds),
        mask=groups.mask,
        text=words,
        text_mask=mask,
        budgets=budgets,
        positions=groups.pick(positions),
        image_index=groups.pick(image),
        taps={name: groups.pick(spread_taps(tap, call.visual, name)) for name, tap in taps.items()},
        text_index=index,
        token_index=groups.place,
    )


def _taps(context: CallContext) -> dict[str, Tensor]:
    """What the selector needs of the vision tower, of the pictures of this call.

    Raises:
        GripError: It is not known: they were encoded without the patch, or cut into chunks since.
    """
    needs = getattr(context.boundary.selector, "needs", ())
    if (not needs and not context.boundary.tapped) or context.boundary.tower is not None:
        return {}  # where the tower drops rows, no selector taps it
    encoded = upstream.encoded_outputs(context.arguments or {})
    taps = context.taps.joined()
    for output in encoded:
        for name, tap in attached_taps(output).items():
            taps[name] = torch.cat([taps[name], tap]) if name in taps else tap
    lacking = sorted(set(needs) - set(taps))
    if lacking:
        raise GripError(
            f"the selector needs {lacking} of the vision tower, which is not known of these pictures: they were "
            "encoded before the model was patched, or a prefill was cut into chunks; give pixels, and "
            "prefill_chunk_size=None"
        )
    return taps


def _refuse_split_picture(call: Call) -> None:
    """A picture whose tokens come in two calls (chunked prefill) cannot be pruned as a whole."""
    state, visual = call.state, call.visual
    if state is None or state.visual.shape[1] != call.past_logical:
        return
    if bool((state.visual[:, -1:] & visual[:, :1]).any()):
        raise GripError(
            "a picture is split over two calls of the model, so that its tokens cannot be compared; choose "
            "prefill_chunk_size=None or a size that does not cut it, or use `with model.grip.disabled()`"
        )


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
    kept = plan.index.shape[1]
    nothing = keys.full and keys.index.shape[1] == call.past_logical + length
    return Step(call, keep, plan, keys, kept, nothing)


def _keys_before(call: Call) -> KeyMap:
    """The cached keys in logical terms."""
    if call.state is not None:
        return call.state.keys(call.past)
    index = torch.arange(call.past, device=call.visual.device).expand(len(call.visual), -1)
    return KeyMap(index, torch.ones_like(index, dtype=torch.bool), full=True)


def last_call(step: Step, choice: Choice | None) -> LastCall:
    """What a step keeps, and what the selector said."""
    visual, held = step.call.visual, step.keep & step.call.real
    total: list[int] = visual.sum(1).tolist()
    return LastCall(
        kept=[stays[seen].nonzero().flatten() for stays, seen in zip(held & visual, visual, strict=True)],
        total=total,
        candidates=total if choice is None else choice.groups.per_row(len(visual)),
        held=held,
        scores=None if choice is None else choice.scores,
        milliseconds=0.0 if choice is None else choice.milliseconds,
    )
