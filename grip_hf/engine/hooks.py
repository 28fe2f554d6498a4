"""The hooks of a patched model, around the one call `language_model(inputs_embeds=...)` inside its base model.

owner called           remember the labels
base model called      remember what comes in
language model called  read the call, choose tokens, plan, rewrite the arguments; the cache shows its physical lengths
language model done    hidden states grow back, the cache remembers what it holds and shows its logical lengths
base, owner done       forget the call, also after an exception
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import GripError
from ..families.table import Parts
from . import routing, upstream
from .arguments import check, prune_arguments
from .budget import Budget
from .cache import find, given_back, logical_of, physical, returned, set_states, state_of, states_of
from .choice import Score, choose, drops_inside, last_call, make_step
from .context import (
    CallContext,
    Hook,
    budget_of,
    forget,
    innermost,
    interrupted,
    push,
    remember_last,
    running,
)
from .decoding import decode_arguments, decodes_simply
from .drops import LayerDrops
from .plan import grow_output, growths
from .reading import labels_of, read, states_after


@dataclasses.dataclass(eq=False)
class Boundary:
    """The patch of one model: what its hooks need to know.

    Attributes:
        parts: the modules to hook.
        selector: scores visual tokens.
        per_image: True if every image has its own budget.
        compact: True if positions are re-numbered.
        usual: the budget of a call of which nothing else is said.
        key: whose budgets and prompts count.
        leader: the patch whose count too, if another one is followed.
        tapped: True if the selector taps the vision tower.
        tower: the part of the patch that drops rows within the vision tower, if any.
        encodes_once: True if pictures may be encoded once for several calls of `generate`.
        before_choice: runs before tokens are chosen, where the model has adapters.
        removable: what hangs on the model for this patch, in the order in which it was hung there.
    """

    parts: Parts
    selector: Score
    per_image: bool
    compact: bool
    usual: Budget
    key: object
    leader: Boundary | None = None
    tapped: bool = False
    tower: Any = None
    encodes_once: bool = False
    before_choice: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.base_parameters = upstream.parameters(self.parts.base)
        self.owner_parameters = upstream.parameters(self.parts.owner)
        self.tile = self.parts.family.tile(self.parts.base.config)
        self.said: set[str] = set()
        self.removable: list[Any] = []

    def warn_once(self, message: str) -> None:
        """Warn, once per patch."""
        if message not in self.said:
            self.said.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)

    def budget(self) -> Budget:
        """The budget of the call at hand."""
        return budget_of(self)

    def trains(self, context: CallContext) -> bool:
        """Whether a call looks like one of a training step."""
        if not context.gradients:
            return False
        config: Any = self.parts.language_model.config
        return self.parts.owner.training or not upstream.uses_cache(context.arguments or {}, config)

    def before_owner(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Remember what tells the answer from the prompt; returns new arguments where a loss counts the experts."""
        _refuse_export()
        given = _bound(self.owner_parameters, args, kwargs)
        return self._enter(given) if _several(given) or interrupted() else None

    @torch.compiler.disable
    def _enter(self, given: dict[str, Any]) -> Any:
        """The part of `before_owner` that a decoding step has not, unless a call was interrupted before it."""
        forget(self)
        if not _several(given):
            return None
        routed = upstream.router_loss(self.parts.owner.config, given) and not self.budget().everything
        mask = routing.own_mask(given, drops_inside(self.selector)) if routed else None
        push(CallContext(self, labels=labels_of(given), router_mask=mask))
        return None if mask is None else ((), {**given, "attention_mask": mask})

    def after_owner(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forget the call, also after an exception."""
        if interrupted():
            forget(self)

    def before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember what the visual tokens can be told from."""
        _refuse_export()
        given = _bound(self.base_parameters, args, kwargs)
        if _several(given):
            self._remember(given)

    @torch.compiler.disable
    def _remember(self, given: dict[str, Any]) -> None:
        """The part of `before_base` that a decoding step has not; a compiled prefill runs it as it stands."""
        context = innermost()
        if context is None or context.boundary is not self or context.arguments is not None or not interrupted():
            if not self.budget().everything:
                routing.refuse_without_owner(self.parts.owner.config, given)
            context = CallContext(self, labels=labels_of(given), by_base=True)  # called without its owner
            push(context)
        context.arguments, context.gradients = given, torch.is_grad_enabled()

    def after_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forget the call, also after an exception."""
        context = running()
        if context is not None:
            self._done(context, output)

    @torch.compiler.disable
    def _done(self, context: CallContext, output: Any) -> None:
        reached = context.call is not None
        context.arguments = context.call = context.step = context.layers = None
        if context.by_base:
            forget(self)
        if output is not None and not reached:
            raise GripError(
                "the patched language model was not called: another module stands in its place since apply_grip; "
                "apply it again"
            )


class BoundaryHook(Hook):
    """A hook with a patch behind it. A copy of a whole model gets a patch of its own, that of one module shares it.

    Args:
        boundary: The patch.
        name: Its method.
    """

    def __init__(self, boundary: Boundary, name: str) -> None:
        self.boundary, self.name = boundary, name

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundaryHook:
        whole = id(self.boundary.parts.owner) in memo
        return type(self)(copy.deepcopy(self.boundary, memo) if whole else self.boundary, self.name)


# Two classes, since torch compiles the hooks of a model by themselves, once for each number of arguments.
class BeforeHook(BoundaryHook):
    """One that runs before a module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it."""
        return getattr(self.boundary, self.name)(module, args, kwargs)


class AfterHook(BoundaryHook):
    """One that runs after a module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Run it."""
        return getattr(self.boundary, self.name)(module, args, kwargs, output)


class LanguageModelHook(Hook):
    """The hooks around the language model; they find their call by the thread that it runs in.

    Args:
        when: "before" or "after".
    """

    def __init__(self, when: str) -> None:
        self.when = when

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        return before_language_model(*args) if self.when == "before" else after_language_model(*args)


def before_language_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Drop tokens from the call; returns its new arguments, or None to leave it as it is."""
    if running() is None:
        cache, embeds = find(kwargs), kwargs.get("inputs_embeds")
        state = state_of(cache)
        if state is None or state.trivial or embeds is None:
            return None  # where only later layers lack something, their own hooks know
        if embeds.shape[1] == 1 and decodes_simply(kwargs.get("attention_mask"), module.config, cache, state):
            return args, _shown(decode_arguments(kwargs, cache, state), cache)
    return _prune(module, args, kwargs)


@torch.compiler.disable  # the choice depends on the data, so a compiled model would break into many graphs here
def _prune(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The part of `before_language_model` that decoding has not."""
    context = running()
    if args or kwargs.get("inputs_embeds") is None:
        raise GripError("cannot prune: the language model was called without inputs_embeds=...")
    call = read(context, module, kwargs)
    if context is not None:
        context.call = call
    if not bool(call.visual.any()) and (call.state is None or call.state.trivial):
        return (args, upstream.without_slicing(kwargs)) if len(states_of(call.cache)) > 1 else None
    check(call)
    choice = choose(context, call) if context is not None and bool(call.visual.any()) else None
    if choice is not None and choice.embeds is not None:
        # Out here, where gradients are on: they go on through the embeddings that stay as they are.
        merged = torch.where(choice.keep[..., None], choice.embeds, call.embeds)
        call = dataclasses.replace(call, arguments={**kwargs, "inputs_embeds": merged}, embeds=merged)
    step = make_step(call, choice)
    if context is not None:
        context.step = step
        if choice is not None and choice.scores is None:
            context.layers = LayerDrops.of(context.boundary.selector, choice, step)
        remember_last(context.boundary, last_call(step, choice))
    if context is not None and context.layers is not None:
        return args, upstream.without_slicing(kwargs)
    return None if step.changes_nothing else (args, _shown(prune_arguments(step), call.cache))


def _shown(arguments: dict[str, Any], cache: Any) -> dict[str, Any]:
    """Arguments with the cache as the language model is to see it."""
    if cache is None:
        return arguments
    return {name: physical(cache) if value is cache else value for name, value in arguments.items()}


def after_language_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Bring the hidden states back to their length and let the cache know what it holds."""
    if output is None:
        return None  # it raised
    view = find(kwargs)
    cache = logical_of(view)
    if running() is not None:
        return _restore(module, kwargs, cache, output)
    if view is None and states_of(returned(output)):
        raise upstream.unknown("the language model used a pruned KV cache that was not among its arguments")
    return None if cache is view else given_back(output, cache)


@torch.compiler.disable
def _restore(module: nn.Module, kwargs: dict[str, Any], cache: Any, output: Any) -> Any:
    """The part of `after_language_model` that decoding has not."""
    context = running()
    assert context is not None
    step, layers = context.step, context.layers
    made = returned(output)
    if made is not None and cache is not None and logical_of(made) is not cache:
        raise upstream.unknown(f"the language model returned another {type(made).__name__} than it was given")
    if step is None:
        return None
    if cache is None and made is not None:
        upstream.check_new_cache(made, kwargs, module.config, step.kept)
    later = None if layers is None else layers.later
    total = step.call.past_logical + step.plan.length
    grown = grow_output(output, step.plan, growths(step.plan, step.keys, total, later or {}), later is not None)
    if context.router_mask is not None:
        routing.mark_dropped(context.router_mask, step)
    cache = made if cache is None else cache
    if cache is None:
        return grown
    if bool(step.call.visual.any()):
        keys = None if later is None else {start: seen for start, (_, seen) in later.items()}
        set_states(cache, states_after(step, keys))
    return given_back(grown, cache)


def _bound(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, however they were given."""
    return {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs


def _several(given: dict[str, Any]) -> bool:
    """Whether a call brings more than one token."""
    ids = given.get("input_ids")
    tokens = given.get("inputs_embeds") if ids is None else ids
    return tokens is not None and tokens.shape[1] > 1


def _refuse_export() -> None:
    # While it compiles, torch 2.11 says that it exports; exporting without Dynamo is what torch does by default.
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        raise GripError(
            "a patched model cannot be exported, since which tokens stay depends on the data: remove_grip(model) first"
        )
