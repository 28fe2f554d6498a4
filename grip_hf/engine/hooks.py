"""The hooks of a patched model, around the one call `language_model(inputs_embeds=...)` inside its base model.

base model called      remember the token ids of this call
language model called  choose tokens, drop the others from every argument; cache lengths turn physical
language model done    lengths turn logical, the cache remembers what it holds, hidden states grow back
base model done        forget the call, also after an exception
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GripError
from ..families.layouts import Scene
from ..families.table import Parts
from . import taps
from .arguments import decode_inputs, decodes_simply, prune_inputs, real_tokens
from .attention_masks import Step, refuse_mixed_rows
from .budgets import Budget
from .cache import CacheState, PrunedCache, physical_length, set_state, state_of
from .calls import Answer, Call, calls, prompt_text, taps_of
from .choice import Score, choose
from .masks import KeyMap
from .outputs import expand_output
from .plan import Plan, identity_plan, make_plan
from .upstream import encoded_outputs, find_cache, has_pictures, parameters, returned_cache


@dataclasses.dataclass(eq=False)
class Boundary:
    """The hooks of one patched model and what they need to know.

    Attributes:
        parts: the modules to hook.
        selector: scores visual tokens.
        per_image: True if every image has its own budget.
        compact: True if positions are re-numbered.
        budget: gives the budget of the call at hand.
    """

    parts: Parts
    selector: Score
    per_image: bool
    compact: bool
    budget: Callable[[], Budget]

    def __post_init__(self) -> None:
        self.parameters = parameters(self.parts.base)

    def attach(self) -> list[Any]:
        """Register the hooks; returns their handles."""
        owner, base, language_model = self.parts.owner, self.parts.base, self.parts.language_model
        return [
            *([] if owner is base else [owner.register_forward_pre_hook(self.before_owner, with_kwargs=True)]),
            base.register_forward_pre_hook(self.before_base, with_kwargs=True),
            base.register_forward_hook(self.after_base, with_kwargs=True, always_call=True),
            language_model.register_forward_pre_hook(self.before_language_model, with_kwargs=True),
            language_model.register_forward_hook(self.after_language_model, with_kwargs=True, always_call=True),
        ]

    def before_owner(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember what tells the answer from the prompt."""
        if calls.answers:
            calls.answers.pop(id(self), None)
        labels, rows = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
        if labels is not None or (isinstance(rows, int) and rows > 1):
            calls.answers[id(self)] = Answer(labels, max(rows - 1, 0) if isinstance(rows, int) else 0)

    def before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember what the visual tokens can be told from."""
        if args:
            kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        input_ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = embeds if input_ids is None else input_ids
        if tokens is not None and tokens.shape[1] > 1:
            self._remember(kwargs, input_ids, embeds)

    @torch.compiler.disable
    def _remember(self, kwargs: dict[str, Any], input_ids: Tensor | None, embeds: Tensor | None) -> None:
        """The part of `before_base` that decoding has not; a compiled prefill runs it as it stands."""
        outputs = encoded_outputs(kwargs)
        if not outputs:
            taps.clear()  # the pictures of this call are encoded within it
        mask, answer = kwargs.get("attention_mask"), calls.answers.pop(id(self), None)
        cache = find_cache(kwargs)
        if cache is not None and cache.get_seq_length() and not outputs and not has_pictures(kwargs):
            # Text: candidates of assisted decoding may repeat the placeholders of the prompt's pictures.
            input_ids = embeds = None
        calls.running[id(self)] = Call(input_ids, embeds, mask, outputs, answer)

    def after_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forget the call, also after an exception."""
        if calls.running.pop(id(self), None) is not None:
            taps.clear()

    def before_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Drop tokens from the call; returns its new arguments, or None to leave it as it is."""
        cache, embeds = find_cache(kwargs), kwargs.get("inputs_embeds")
        state = state_of(cache)
        if calls.running.get(id(self)) is None:
            if cache is None or state is None or state.trivial or embeds is None:
                return None
            if embeds.shape[1] == 1 and decodes_simply(kwargs.get("attention_mask"), module.config, cache, state):
                kwargs = decode_inputs(kwargs, cache, state)
                cache.grip_inside = True  # type: ignore[attr-defined]
                return args, kwargs
        return self._prune(module, args, kwargs)

    @torch.compiler.disable  # the choice depends on the data, so a compiled model would break into many graphs here
    def _prune(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The part of `before_language_model` that decoding has not."""
        cache, call = find_cache(kwargs), calls.running.get(id(self))
        if args or kwargs.get("inputs_embeds") is None:
            raise GripError("cannot prune: the language model was called without inputs_embeds=...")
        call = call if call is not None else Call(None, None, None, [])
        plan, call.state, call.step = self._plan(call, kwargs, state_of(cache))
        if plan is None:
            return None
        assert call.step is not None
        kwargs = prune_inputs(kwargs, call.step, module.config)
        if isinstance(cache, PrunedCache):
            cache.grip_inside = True
        return args, kwargs

    def after_language_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Bring the hidden states back to their length and let the cache know what it holds."""
        cache = find_cache(kwargs)
        if isinstance(cache, PrunedCache):
            cache.grip_inside = False
        call = calls.running.get(id(self))
        return None if call is None or output is None else self._restore(call, cache, output)

    @torch.compiler.disable
    def _restore(self, call: Call, cache: Any, output: Any) -> Any:
        """The part of `after_language_model` that decoding has not."""
        if call.state is None:
            return None
        cache = cache if cache is not None else returned_cache(output)
        if cache is not None:
            set_state(cache, call.state)
        return None if call.step is None else expand_output(output, call.step.plan)

    def visual_tokens(self, call: Call, embeds: Tensor) -> Tensor:
        """[B, L] bool: which tokens of a call stand for pictures or videos."""
        if call.input_ids is not None:
            wanted = torch.tensor(self.parts.token_ids, device=embeds.device)
            return torch.isin(call.input_ids.to(embeds.device), wanted)
        if call.inputs_embeds is None:  # a decoding step
            return torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        table = self.parts.base.get_input_embeddings()  # type: ignore[operator]
        ids = torch.tensor(self.parts.token_ids, device=call.inputs_embeds.device)
        return (call.inputs_embeds[:, :, None] == table(ids)).all(-1).any(-1)

    def _plan(
        self, call: Call, kwargs: dict[str, Any], state: CacheState | None
    ) -> tuple[Plan | None, CacheState | None, Step | None]:
        """What stays of this call, what its cache will hold, and how to rewrite its arguments (None: leave them)."""
        embeds, cache = kwargs["inputs_embeds"], find_cache(kwargs)
        batch, length = embeds.shape[:2]
        past_logical = 0 if cache is None else int(cache.get_seq_length())
        past = 0 if cache is None else physical_length(cache)
        visual = self.visual_tokens(call, embeds)
        seen = bool(visual.any())
        if not seen and (state is None or state.trivial):
            return None, None, None
        if call.attention_mask is None:
            refuse_mixed_rows(kwargs, self.parts.language_model.config)
        mask = kwargs.get("attention_mask") if call.attention_mask is None else call.attention_mask
        real = real_tokens(mask, past_logical, visual)
        stays = self._stays(call, kwargs, state, visual, real) if seen else None
        keep = torch.ones_like(visual) if stays is None else real & (~visual | stays)
        plan = identity_plan(batch, length, embeds.device) if stays is None else make_plan(keep)
        before = _keys_before(state, batch, past, embeds.device)
        keys = KeyMap(
            torch.cat([before.index, plan.index + past_logical], 1),
            torch.cat([before.valid, plan.valid], 1),
            before.full and plan.full,
        )
        step = Step(plan, past, past_logical, keys, cache, state, keep, real, self.compact)
        after = _state_after(step, visual) if seen or stays is not None else None
        if after is not None and after.trivial:
            return None, after, None
        return plan, after, step

    def _stays(
        self, call: Call, kwargs: dict[str, Any], state: CacheState | None, visual: Tensor, real: Tensor
    ) -> Tensor | None:
        """[B, L] bool: the visual tokens that the selector keeps, or None if all stay."""
        budget = self.budget()
        if budget.everything or budget.keep_ratio == 1:
            return None
        text = prompt_text(call, kwargs, real & ~visual)
        features = taps_of(call)
        cache = find_cache(kwargs)
        _refuse_split_picture(state, visual, 0 if cache is None else int(cache.get_seq_length()))
        base, family = self.parts.base, self.parts.family
        tile = family.tile(base.config)
        scene = Scene(visual, call.input_ids, kwargs["inputs_embeds"], kwargs.get("position_ids"), base, tile)
        choice = choose(self.selector, budget, self.per_image, family.layout, scene, text, features)
        if choice is None:
            return None
        if choice.embeds is not None:
            kwargs["inputs_embeds"] = torch.where(choice.keep[..., None], choice.embeds, kwargs["inputs_embeds"])
        return choice.keep


def _refuse_split_picture(state: CacheState | None, visual: Tensor, past: int) -> None:
    """A picture whose tokens come in two calls (chunked prefill) cannot be pruned as a whole."""
    if state is not None and state.visual.shape[1] == past and bool((state.visual[:, -1:] & visual[:, :1]).any()):
        raise GripError(
            "a picture is split over two calls of the model, so that its tokens cannot be compared; choose "
            "prefill_chunk_size=None or a size that does not cut it, or use `with model.grip.disabled()`"
        )


def _keys_before(state: CacheState | None, batch: int, past: int, device: torch.device) -> KeyMap:
    """The cached keys in logical terms."""
    if state is not None:
        return state.keys(past)
    index = torch.arange(past, device=device).expand(batch, -1)
    return KeyMap(index, torch.ones_like(index, dtype=torch.bool), full=True)


def _state_after(step: Step, visual: Tensor) -> CacheState:
    """What the cache holds after `step`; `visual` [B, L] marks the visual tokens of this call."""
    earlier = visual.new_zeros(visual.shape[0], step.past_logical)
    if step.state is not None:
        earlier[:, : step.state.visual.shape[1]] = step.state.visual
    dropped = step.past_logical + step.plan.length - step.keys.index.shape[1]
    shift = None
    if step.compact:
        shift = (step.real & ~step.keep).sum(1, keepdim=True)
        if step.state is not None and step.state.shift is not None:
            shift = shift + step.state.shift
    return CacheState(
        step.keys.index, step.keys.valid, torch.cat([earlier, visual], 1), dropped, step.keys.full, shift
    )
