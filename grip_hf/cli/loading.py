"""What the commands load: a model on its device, and examples that have been read once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import options
from .screen import console, say

if TYPE_CHECKING:
    from ..frozen.screening import Screened

LISTED = 20


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """Which model, and how it is loaded: options of every command that loads one, by their names.

    Raises:
        BadParameter: Not exactly one model is chosen, or a setting does not go with the pocket model.
    """

    pocket: bool
    pocket_model: Path | None
    model: str | None
    dataset: str | None
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    testbed: str = options.TESTBED

    def __post_init__(self) -> None:
        if self.pocket == (self.model is not None) or (self.model is None) != (self.dataset is None):
            raise typer.BadParameter("give either --pocket, or --model and --dataset")
        if self.pocket and (self.quantize or self.device_map):
            raise typer.BadParameter("--quantize and --device-map go with --model, not with --pocket")

    @classmethod
    def of(cls, context: typer.Context, **changes: Any) -> ModelChoice:
        """What the options of a command say, with some changed."""
        names = [field.name for field in dataclasses.fields(cls) if field.name in context.params]
        return cls(**{**{name: context.params[name] for name in names}, **changes})

    @property
    def name(self) -> str:
        """What tables call the model."""
        return self.testbed if self.model is None else self.model

    def facts(self) -> dict[str, Any]:
        """How it was loaded, as plain data, without where."""
        found: dict[str, Any] = {"model": self.name}
        if self.pocket_model is not None:
            found["pocket_model"] = str(self.pocket_model)
        asked = {"dtype": self.dtype, "quantize": self.quantize, "attn_implementation": self.attn_implementation}
        return found | {name: value for name, value in asked.items() if value not in (None, "auto")}

    def load(self) -> tuple[Any, Any]:
        """The model, on its device, and its processor."""
        from ..frozen.sources import load_model
        from ..pocket.examples import load_pocket_model

        device = find_device(self.device)
        if self.model is None:
            model, processor = load_pocket_model(self.pocket_model, self.testbed)
            return model.to(device), processor
        return load_model(self.model, self.quantize, self.device_map, self.dtype, self.attn_implementation, device)


def goes_on() -> bool:
    """Whether this process goes on alone, once what several of a launch have shared is done; the others are to end."""
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes > 1:
        state.destroy_process_group()
    return state.is_main_process


def find_device(name: str) -> Any:
    """The device of this process; raises `BadParameter` if it is not there."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if name == "auto":
        alone = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        return PartialState(cpu=alone).device
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"--device {name} is not available here")
    return PartialState(cpu=True).device if device.type == "cpu" else device


def load_examples(
    dataset: str,
    split: str | None,
    limit: int,
    seed: int,
    on_bad_row: str,
    wanted: Sequence[str],
    cache: Path | None = None,
    streaming: bool = False,
) -> Screened:
    """Questions of a dataset, drawn by seed if there are more than `limit`, each read once; says what was found."""
    from accelerate import PartialState

    from ..frozen.screening import screen
    from ..frozen.sources import load_rows

    state = PartialState()
    with state.main_process_first():
        examples = load_rows(dataset, split, limit, seed, wanted, streaming)
        found = screen(examples, on_bad_row, cache, progress=state.is_main_process and console.is_terminal)
    if state.is_main_process:
        say(f"{dataset}: {len(examples)} questions; {examples.format}")
        if found.bad:
            shown = "; ".join(list(found.bad.values())[:LISTED])
            more = f"; and {len(found.bad) - LISTED} more" if len(found.bad) > LISTED else ""
            say(f"{len(found.bad)} of {len(examples.dataset)} rows are left out: {shown}{more}")
    return found
