"""From one call's tensors to a `VisualBatch`, and from scores and budgets to the tokens that stay.

Pure tensor functions. A *group* is a sample, or one image of it. `scores` is [G, N] float, `mask` [G, N] bool (True =
real token), `budgets` [G] long.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import GripError, NonFiniteScoreError


@dataclasses.dataclass(frozen=True)
class VisualBatch:
    """What a selector sees: one row per group; all tensors on one device.

    Attributes:
        tokens: [G, N, D] projected visual tokens, zeros at padding.
        mask: [G, N] bool, True at real tokens.
        text: [G, T, D] embeddings of the prompt's text tokens (no visual tokens, no padding), zeros at padding.
        text_mask: [G, T] bool, True at real text tokens.
        budgets: [G] long, tokens to keep.
        positions: [G, N, 2] float, (row, column) of the token within its image, in [0, 1].
        image_index: [G, N] long, which image of the sample the token belongs to.
        taps: extra features per token that the selector asked for, each [G, N, ...].
        text_index: [G, T] long, where each text token stands in its row of the call, 0 at padding; None where there
            is no call.
        token_index: [G, N] long, where each visual token stands there, 0 at padding; None where there is no call.
        totals: [G] long, visual tokens of each group, those too that cannot stay since the vision tower dropped their
            rows; None where all are here.
    """

    tokens: Tensor
    mask: Tensor
    text: Tensor
    text_mask: Tensor
    budgets: Tensor
    positions: Tensor
    image_index: Tensor
    taps: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    text_index: Tensor | None = None
    token_index: Tensor | None = None
    totals: Tensor | None = None

    @property
    def keep_ratio(self) -> Tensor:
        """[G] float32 share of each group's visual tokens that stays, at most 1."""
        totals = self.mask.sum(1) if self.totals is None else self.totals
        return (self.budgets / totals.clamp(min=1)).clamp(max=1).float()


def check_finite(scores: Tensor, mask: Tensor) -> None:
    """Raise `NonFiniteScoreError` if a real token has a score that is NaN or infinite."""
    bad = ~torch.isfinite(scores) & mask
    if bool(bad.any()):
        group, token = (int(i) for i in bad.nonzero()[0])
        raise NonFiniteScoreError(
            f"the selector gave score {float(scores[group, token])} to visual token {token} of group {group} "
            f"({int(bad.sum())} non-finite scores in all); scores must be finite"
        )


def topk_mask(scores: Tensor, mask: Tensor, budgets: Tensor) -> Tensor:
    """Keep the best-scored tokens of each group.

    Returns:
        [G, N] bool with exactly `min(budget, real tokens)` True per row; ties go to the lower index.

    Raises:
        NonFiniteScoreError: A real token has a NaN or infinite score.
    """
    check_finite(scores, mask)
    ranked = scores.masked_fill(~mask, 0).argsort(dim=1, descending=True, stable=True)
    # A second stable sort moves padding behind every real token, whatever its score.
    ranked = ranked.gather(1, mask.gather(1, ranked).byte().argsort(dim=1, descending=True, stable=True))
    wanted = torch.minimum(budgets.clamp(min=0), mask.sum(1))
    chosen = torch.arange(scores.shape[1], device=scores.device) < wanted[:, None]
    return torch.zeros_like(mask).scatter(1, ranked, chosen)


@dataclasses.dataclass(frozen=True)
class Groups:
    """The visual tokens of a batch, one row per group (a sample, or one image of a sample).

    Attributes:
        row: [G] long, the batch row of each group.
        place: [G, N] long, the position of each token in its row; 0 at padding.
        mask: [G, N] bool, True at real tokens.
    """

    row: Tensor
    place: Tensor
    mask: Tensor

    def key(self, values: Tensor) -> Tensor:
        """[G] the row of each group together with its value of `values` [B, L] long, as one number."""
        if not len(self.row):
            return self.row
        return self.row * (int(values.max()) + 1) + values[self.row, self.place[:, 0]]

    def pick(self, values: Tensor) -> Tensor:
        """[B, L, ...] values of the tokens: [G, N, ...], zeros at padding."""
        picked = values[self.row[:, None], self.place]
        mask = self.mask.view(*self.mask.shape, *[1] * (picked.ndim - 2))
        return picked.masked_fill(~mask, 0)

    def per_row(self, rows: int) -> list[int]:
        """How many tokens the groups of each row have."""
        counts = torch.zeros(rows, dtype=torch.long).index_add(0, self.row.cpu(), self.mask.sum(1).cpu())
        return [int(count) for count in counts]

    def within(self, some: Tensor, values: Tensor) -> tuple[Groups, Tensor]:
        """The groups of the tokens that `some` [B, L] bool marks, and the `values` [G, ...] of those that have any."""
        marked = self.mask & some[self.row[:, None], self.place]
        left = marked.any(1)
        marked, width = marked[left], int(marked.sum(1).max()) if marked.numel() else 0
        order = marked.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
        mask = marked.gather(1, order)
        return Groups(self.row[left], self.place[left].gather(1, order) * mask, mask), values[left]

    def place_values(self, values: Tensor, embeds: Tensor, keep: Tensor) -> Tensor:
        """[B, L, D]: `embeds` with `values` [G, N, D] in place of the tokens that `keep` [G, N] marks."""
        result, chosen = embeds.clone(), keep & self.mask
        result[self.row[:, None].expand_as(chosen)[chosen], self.place[chosen]] = values[chosen].to(embeds)
        return result

    def scatter(self, keep: Tensor, visual: Tensor) -> Tensor:
        """[B, L] bool: the tokens of `visual` that `keep` [G, N] bool keeps."""
        result = torch.zeros_like(visual)
        chosen = keep & self.mask
        result[self.row[:, None].expand_as(chosen)[chosen], self.place[chosen]] = True
        return result


def group_tokens(visual: Tensor, key: Tensor | None = None) -> Groups:
    """Group the True positions of `visual` [B, L] by row, or by (row, key) if `key` [B, L] long is given.

    Rows without such positions have no group.

    Raises:
        GripError: A key is negative, which would make two rows one group.
    """
    rows, places = visual.nonzero(as_tuple=True)
    own = torch.zeros_like(rows) if key is None else key[rows, places]
    if len(own) and int(own.min()) < 0:
        raise GripError(f"cannot tell which picture each visual token belongs to: got the number {int(own.min())}")
    keys = rows if key is None else rows * (int(key.max()) + 1) + own
    # The positions of a group need not adjoin; a stable sort brings them together in their order.
    keys, order = keys.sort(stable=True)
    rows, places = rows[order], places[order]
    _, group, counts = keys.unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    slot = torch.arange(len(keys), device=keys.device) - starts[group]
    width = int(counts.max()) if len(counts) else 0
    place = places.new_zeros(len(counts), width)
    place[group, slot] = places
    mask = torch.arange(width, device=visual.device) < counts[:, None]
    return Groups(rows[starts], place, mask)


def spread_taps(tap: Tensor, visual: Tensor, name: str) -> Tensor:
    """[B, L, ...] from the rows of a tap [tokens, ...], which `generate` may have repeated for beams since.

    Raises:
        GripError: The tap has another number of rows than the batch has visual tokens.
    """
    total, rows = int(visual.sum()), len(visual)
    repeats = total // max(len(tap), 1)
    if repeats == 0 or len(tap) * repeats != total or rows % repeats:
        raise GripError(f"tap {name!r} has {len(tap)} rows for {total} visual tokens in {rows} samples")
    spread = tap.new_zeros(*visual.shape, *tap.shape[1:], device=visual.device)
    spread[visual] = tap[_repeat_rows(visual, repeats)].to(visual.device)
    return spread


def _repeat_rows(visual: Tensor, repeats: int) -> Tensor:
    """[total] long: the tap row of each visual token if every sample of the batch stands `repeats` times in a row."""
    counts = visual.sum(1)
    first = counts[::repeats]
    if not torch.equal(first.repeat_interleave(repeats), counts):
        raise GripError("the batch does not repeat its samples evenly, so its taps cannot be assigned")
    starts = (first.cumsum(0) - first).repeat_interleave(repeats)
    own = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum()), device=visual.device) + (starts - own).repeat_interleave(counts)
