"""Selectors that drop visual tokens between layers of the language model, by its own attention.

The patch lets all tokens in (a selector that returns None keeps them all); hooks on the decoder layers rank the visual
tokens by the attention of some tokens, such as the prompt's last, drop some, and give the last layer's output its
length back. What each layer's cache lacks is remembered on the cache.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine.keepsets import VisualBatch, topk_mask
from ..engine.plan import Plan, expand, make_plan, source_slots, take, take_last
from ..engine.upstream import attention_kernel, find_cache
from ..errors import ConfigError, GripError, UnsupportedModelError
from ..families.table import find_parts
from .base import Selector

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


@dataclasses.dataclass
class Run:
    """One call of the language model, while it runs.

    Attributes:
        visual: [B, L] bool, the visual tokens.
        real: [B, L] bool, False at padding.
        prompt: [B, L] bool, the real tokens but for those of an answer, which the call has in training.
        budgets: [B] long, tokens that stay in the end; None if all stay.
        asking: [B, L] bool, the tokens whose attention ranks.
        plan: What is left at the layer at hand; None if nothing was dropped yet.
        scores: Attention to the tokens that are left, where a layer has just ranked them.
    """

    visual: Tensor
    real: Tensor
    prompt: Tensor
    budgets: Tensor | None = None
    asking: Tensor | None = None
    plan: Plan | None = None
    scores: Tensor | None = None


# Calls in flight in this thread, by selector.
_runs = threading.local()


class InsideSelector(Selector):
    """Drops tokens inside the language model. A subclass says where, and how many are left.

    The budget is what is left in the end; earlier layers see more, so that at equal budget these methods compute more
    than one that drops tokens before the language model. `kept_tokens` tells what the first layer has: all tokens.
    """

    inside = True

    @abstractmethod
    def stages(self, depth: int) -> list[tuple[int, int]]:
        """Per drop the layer whose attention ranks the tokens, and the first layer without the dropped ones."""

    @abstractmethod
    def left(self, totals: Tensor, budgets: Tensor, stage: int, stages: int) -> Tensor:
        """Tokens [B] left of `totals` [B] after drop number `stage` of `stages`."""

    def asking(self, batch: VisualBatch, run: Run) -> Tensor:
        """[B, L] bool: the tokens whose attention ranks the visual ones: the last one of each row's prompt."""
        last = run.prompt.shape[1] - 1 - run.prompt.flip(1).byte().argmax(1, keepdim=True)
        return torch.zeros_like(run.prompt).scatter(1, last, True)

    def prepare(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Hook the decoder layers.

        Raises:
            UnsupportedModelError: The decoder has no layers of the usual build, or too few.
        """
        parts = find_parts(model)
        layers: Any = getattr(parts.language_model, "layers", None)
        parts_needed = ("self_attn.q_proj", "self_attn.k_proj", "input_layernorm")
        names = {name for name, _ in layers[0].named_modules()} if layers else set()
        if not names.issuperset(parts_needed):
            raise UnsupportedModelError(f"selector {self.name!r} needs decoder layers with {', '.join(parts_needed)}")
        self._stages = self.stages(len(layers))
        if not all(0 <= rank <= drop < len(layers) for rank, drop in self._stages):
            raise UnsupportedModelError(
                f"selector {self.name!r} ranks and drops tokens at layers {self._stages}, this model has {len(layers)}"
            )
        self._token_ids = parts.token_ids
        handles = [parts.base.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for index, layer in enumerate(layers):
            before = functools.partial(self._before_layer, index)
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layers[-1].register_forward_hook(self._after_last_layer))
        return [*handles, parts.base.register_forward_hook(self._end, always_call=True)]

    def __call__(self, batch: VisualBatch) -> None:  # type: ignore[override]
        """Take note of the budgets; all tokens enter the language model."""
        run: Run | None = _runs.__dict__.get(str(id(self)))
        if run is None:
            raise GripError(
                f"selector {self.name!r} drops tokens inside the language model: use it through apply_grip"
            )
        rows = run.visual.any(1)
        if int(rows.sum()) != len(batch.budgets):
            raise ConfigError(f"selector {self.name!r} shares its budget over a sample: use scope='sample'")
        run.budgets = run.visual.sum(1).index_put((rows.nonzero().flatten(),), batch.budgets)
        asked = torch.zeros_like(run.prompt)
        asked[rows] = on_the_call(batch, batch.text_mask, run.visual.shape[1])
        run.prompt = run.prompt & (run.visual | asked | ~rows[:, None])
        run.asking = self.asking(batch, run)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._end(module, args, None)  # what a call left that failed before its hooks
        self._end(module, args, None)  # what a call left that failed before it began
        ids = kwargs["input_ids"] if "input_ids" in kwargs else (args[0] if args else None)
        if ids is None or ids.shape[1] == 1:
            return
        visual = torch.isin(ids, torch.tensor(self._token_ids, device=ids.device))
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise GripError(f"selector {self.name!r} needs a 2-D attention mask, got {tuple(mask.shape)}")
        real = torch.ones_like(visual) if mask is None else mask[:, -ids.shape[1] :].bool()
        _runs.__dict__[str(id(self))] = Run(visual & real, real, real)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _runs.__dict__.pop(str(id(self)), None)

    def _before_layer(self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run: Run | None = _runs.__dict__.get(str(id(self)))
        cache = find_cache(kwargs)
        known = {} if cache is None else cache.__dict__.setdefault("grip_layers", {})
        if run is None or run.budgets is None:
            if index not in known:
                return None
            return args, {
                **kwargs,
                "attention_mask": later_mask(kwargs.get("attention_mask"), known[index], cache, index),
            }
        if known.keys() & {index} or (cache is not None and index == 0 and int(cache.get_seq_length()) > 0):
            raise GripError(f"selector {self.name!r} cannot take pictures after the first call on a cache")
        hidden = args[0]
        inner = kwargs if run.plan is None else sliced(kwargs, run.plan, attention_kernel(layer.self_attn.config))
        for stage, (rank, drop) in enumerate(self._stages):
            if index == rank:
                real, asking = run.real, run.asking
                assert asking is not None
                if run.plan is not None:
                    real, asking = run.plan.valid, asking.gather(1, run.plan.index) & run.plan.valid
                run.scores = mean_attention(layer, hidden, inner["position_embeddings"], real, asking)
            if index == drop:
                assert run.scores is not None
                step, run.plan = self._drop(run, stage)
                hidden = take(hidden, step.index)
                inner = sliced(kwargs, run.plan, attention_kernel(layer.self_attn.config))
        if run.plan is None:
            return None
        if cache is not None:
            known[index] = run.plan
        return (hidden, *args[1:]), inner

    def _drop(self, run: Run, stage: int) -> tuple[Plan, Plan]:
        """The next plan, in terms of the tokens left before it and in terms of the whole sequence."""
        assert run.budgets is not None and run.scores is not None
        whole = torch.arange(run.visual.shape[1], device=run.visual.device).expand_as(run.visual)
        index, valid = (whole, run.real) if run.plan is None else (run.plan.index, run.plan.valid)
        visual = run.visual.gather(1, index) & valid
        count = self.left(run.visual.sum(1), run.budgets, stage, len(self._stages))
        step = make_plan(valid & (~visual | topk_mask(run.scores, visual, count)))
        return step, Plan(index.gather(1, step.index), step.valid, run.visual.shape[1], step.full)

    def _after_last_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run: Run | None = _runs.__dict__.get(str(id(self)))
        if run is None or run.plan is None:
            return None
        source = source_slots(run.plan)
        return (expand(output[0], source), *output[1:]) if isinstance(output, tuple) else expand(output, source)


def on_the_call(batch: VisualBatch, chosen: Tensor, length: int) -> Tensor:
    """[G, length] bool: where those text tokens stand that `chosen` [G, T] bool marks."""
    assert batch.text_index is not None
    where = torch.zeros(len(chosen), length, dtype=torch.bool, device=chosen.device)
    group, word = chosen.nonzero(as_tuple=True)
    where[group, batch.text_index[group, word]] = True
    return where


@torch.no_grad()
def mean_attention(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], real: Tensor, asking: Tensor) -> Tensor:
    """Attention of some tokens to every token in one decoder layer, averaged over them and over heads.

    Args:
        layer: The decoder layer.
        hidden: [B, L, D] its input.
        rotary: Cosines and sines [B or 1, L, C] of the positions.
        real: [B, L] bool, False at padding.
        asking: [B, L] bool, the tokens whose attention is meant, at least one real one in each row.

    Returns:
        [B, L] float32, 0 at padding.
    """
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    who = make_plan(asking)

    def project(which: str, states: Tensor, place: Tensor | None) -> Tensor:
        heads = getattr(attention, f"{which}_proj")(states).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{which}_norm", None)
        heads = (heads if norm is None else norm(heads)).float()
        cos, sin = (angle.float() if place is None else take(angle.float(), place) for angle in rotary)
        first, second = heads.chunk(2, -1)
        return heads * cos[:, :, None] + torch.cat([-second, first], -1) * sin[:, :, None]

    query, key = project("q", take(normed, who.index), who.index), project("k", normed, None)
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    logits = torch.einsum("bqhc,blhc->bhql", query, key) * attention.scaling
    before = torch.arange(real.shape[1], device=real.device) <= who.index[..., None]
    seen = (before & real[:, None])[:, None]
    weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1).mean(1)
    return (weights * who.valid[..., None]).sum(1).masked_fill(~real, 0) / who.valid.sum(1, keepdim=True).clamp(min=1)


def sliced(kwargs: dict[str, Any], plan: Plan, kernel: str) -> dict[str, Any]:
    """Arguments of a decoder layer for the tokens of `plan`."""
    mask, index, valid = kwargs.get("attention_mask"), plan.index, plan.valid
    if mask is not None and mask.ndim == 4:
        mask = mask.expand(len(index), -1, -1, -1)
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, index[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
        # A filler sees itself, so that no row is empty; nobody else sees it.
        seen = valid[:, None, None] | torch.eye(index.shape[1], dtype=torch.bool, device=index.device)
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
    elif mask is not None or ("flash" in kernel and not plan.full):
        mask = valid.long()
    elif not plan.full:
        raise GripError("rows of a batch that keep different numbers of tokens need an attention mask")
    new = {**kwargs, "attention_mask": mask}
    new["position_embeddings"] = tuple(take(angle, index) for angle in kwargs["position_embeddings"])
    if kwargs.get("position_ids") is not None:
        new["position_ids"] = take_last(kwargs["position_ids"], index)
    return new


def later_mask(mask: Tensor | None, plan: Plan, cache: Any, index: int) -> Tensor | None:
    """The mask of a later call for a layer whose cache lacks what `plan` dropped."""
    if mask is None:
        if plan.full:
            return None
        since = int(cache.layers[index].get_seq_length()) - plan.index.shape[1] + 1
        return torch.nn.functional.pad(plan.valid, (0, since), value=True)[:, None, None]
    tail = torch.arange(plan.length, mask.shape[-1], device=mask.device).expand(len(plan.index), -1)
    columns = torch.cat([plan.index, tail], 1)
    seen = torch.nn.functional.pad(plan.valid, (0, tail.shape[1]), value=True)
    if mask.ndim == 2:
        return mask.gather(1, columns) * seen.to(mask.dtype)
    mask = mask.expand(len(columns), -1, -1, -1)
    mask = mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
    seen = seen[:, None, None]
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
