"""Methods of one module instance that something else stands in for, and comes off again without a trace."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .context import generation, running
from .once import keep, known
from .taps import Encoding, attach_taps, encoding


class InstanceMethod:
    """Stands in for a method of one module. It lies on the instance, so that copies and pickles carry their own.

    Args:
        module: The module.
        name: The method.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.before: Any = None  # what lay on the instance before, if anything

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the module's own method."""
        return inspect.signature(self.own)

    @property
    def own(self) -> Any:
        """The module's own method."""
        return self.before or getattr(type(self.module), self.name).__get__(self.module)

    def __getattr__(self, name: str) -> Any:
        # Decorators leave marks on methods that callers ask for.
        if name.startswith("__") or name in ("module", "name", "before"):
            raise AttributeError(name)
        return getattr(self.own, name)

    def attach(self) -> None:
        """Put itself on the module."""
        self.before = vars(self.module).get(self.name)
        setattr(self.module, self.name, self)

    def remove(self) -> None:
        """Leave the module as it was."""
        if vars(self.module).get(self.name) is not self:
            return
        if self.before is None:
            delattr(self.module, self.name)
        else:
            setattr(self.module, self.name, self.before)


class Generate(InstanceMethod):
    """`generate`, which lets the calls in it know what it was given."""

    def __init__(self, module: nn.Module, boundary: Any) -> None:
        super().__init__(module, "generate")
        self.boundary = boundary

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model itself does."""
        given = {**dict(zip(self.__signature__.parameters, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        ids = given.get("inputs") if ids is None else ids
        with generation(self.boundary, ids, given.get("attention_mask")):
            return self.own(*args, **kwargs)


class Encode(InstanceMethod):
    """A method that encodes pictures, whose result carries what the vision tower's hooks publish of them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode as the model itself does, or give what was encoded before of the same pictures."""
        before = known(self.name)
        if before is not None:
            output, rows = before
            taps = Encoding({name: [(one, one)] for name, one in rows.items()})
        else:
            with encoding(self.name) as taps:
                output = self.own(*args, **kwargs)
            keep(self.name, output, taps.joined())
        context = running()
        if context is not None:
            context.taps.add(taps)  # this call's own pictures
        elif taps.parts:
            attach_taps(output, taps.joined())  # encoded ahead of a call, as `generate` does
        return output
