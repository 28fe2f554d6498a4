"""Hangs the hooks of a patch on a model, and takes them off."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import upstream
from .choice import drops_inside
from .context import Hook, forget_hook
from .hooks import AfterHook, BeforeHook, Boundary, LanguageModelHook
from .layers import hook_layers
from .methods import Encode, Generate


def attach(boundary: Boundary, selector_hooks: list[Any]) -> None:
    """Register the hooks of a patch.

    Args:
        boundary: It.
        selector_hooks: Handles of the selector's own, which publish taps.
    """
    owner, base, language_model = boundary.parts.owner, boundary.parts.base, boundary.parts.language_model
    before_owner, before_base = (BeforeHook(boundary, name) for name in ("before_owner", "before_base"))
    after_owner, after_base = (AfterHook(boundary, name) for name in ("after_owner", "after_base"))
    boundary.removable, boundary.tapped = list(selector_hooks), bool(selector_hooks)
    if owner is not base:
        boundary.removable += [
            owner.register_forward_pre_hook(before_owner, with_kwargs=True),
            owner.register_forward_hook(after_owner, with_kwargs=True, always_call=True),
        ]
    boundary.removable += [
        base.register_forward_pre_hook(before_base, with_kwargs=True),
        base.register_forward_hook(after_base, with_kwargs=True, always_call=True),
        language_model.register_forward_pre_hook(LanguageModelHook("before"), with_kwargs=True),
        language_model.register_forward_hook(LanguageModelHook("after"), with_kwargs=True, always_call=True),
    ]
    if drops_inside(boundary.selector):
        boundary.removable += hook_layers(language_model, boundary.selector)
    methods: list[Any] = [Generate(owner, boundary)] if hasattr(type(owner), "generate") else []
    if selector_hooks or boundary.encodes_once:
        methods += _encoders(base)
    _attach_methods(boundary, methods)


def attach_tower(boundary: Boundary, hooks: list[Any], methods: list[Any]) -> None:
    """Add hooks within the vision tower.

    Args:
        boundary: The patch.
        hooks: Their handles.
        methods: What stands in for methods of the base model.
    """
    known = any(isinstance(one, Encode) for one in boundary.removable)
    boundary.removable += hooks
    _attach_methods(boundary, [*([] if known else _encoders(boundary.parts.base)), *methods])


def detach(boundary: Boundary) -> None:
    """Remove the hooks of a patch, those too that copies of modules carried to other places of the model."""
    for one in reversed(boundary.removable):
        one.remove()
    boundary.removable = []
    for module in boundary.parts.owner.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [number for number, hook in hooks.items() if isinstance(hook, Hook)]:
                forget_hook(module, number)


def patch_of(module: nn.Module) -> Boundary | None:
    """The patch whose hooks a module carries, if any."""
    hooks = module._forward_pre_hooks.values()
    return next((hook.boundary for hook in hooks if isinstance(hook, BeforeHook)), None)


def _encoders(base: nn.Module) -> list[Any]:
    return [Encode(base, name) for name in upstream.ENCODERS if hasattr(type(base), name)]


def _attach_methods(boundary: Boundary, methods: list[Any]) -> None:
    for method in methods:
        method.attach()
        boundary.removable.append(method)
