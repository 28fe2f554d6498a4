"""`grip-hf doctor`: does pruning work with what is installed here?"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from ..files import write_json
from .screen import JsonFile, console, split_list

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("sdpa", "eager")
SIGNS = {"passed": "[green]✓[/green]", "absent": "–", "failed": "[bold red]✗[/bold red]"}


def doctor(
    model: Annotated[str | None, typer.Argument(help="Directory or Hub id of a model; without one, all.")] = None,
    families: Annotated[str | None, typer.Option(help="Only these families, separated by commas.")] = None,
    device: Annotated[str, typer.Option(help="Where the tiny models run.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Dtype of the tiny models: {', '.join(DTYPES)}.")] = "float32",
    attention: Annotated[str, typer.Option(help=f"Their attention: {', '.join(ATTENTION)}.")] = "sdpa",
    json_file: JsonFile = None,
) -> None:
    """Compare tiny pruned models with themselves unpatched, the dropped tokens masked out where they were.

    With MODEL, one tiny model of its type and text backbone, after its config.json; no weights are read.
    """
    import torch
    from transformers.utils.logging import set_verbosity_error

    from ..doctor.check import examine, examine_own
    from ..doctor.tiny import TINY, is_present
    from ..patch import prune

    if model is not None and families is not None:
        raise typer.BadParameter("give a model or --families, not both")
    names = sorted(TINY) if families is None else split_list(families)
    if not names:
        raise typer.BadParameter("names no family", param_hint="--families")
    wanted = [_known("--families", name, sorted(TINY)) for name in names]
    kind: torch.dtype = getattr(torch, _known("--dtype", dtype, DTYPES))
    how: dict[str, Any] = {
        "device": _usable(device),
        "dtype": kind,
        "attention": _known("--attention", attention, ATTENTION),
    }
    config = None if model is None else _config(model)
    absent = [] if config is not None else [name for name in wanted if not is_present(name)]
    set_verbosity_error()  # what transformers says about tiny models helps nobody
    reports = []
    with console.status("starting") as status:
        for name in [config.model_type] if config is not None else [name for name in wanted if name not in absent]:
            status.update(f"checking {name}")
            reports.append(examine(name, prune, **how) if config is None else examine_own(config, prune, **how))
    result = _result(reports, absent, {"device": device, "dtype": dtype, "attention": attention})
    if json_file is not None:
        write_json(json_file, result)
    _show(result)
    if not result["passed"]:
        raise typer.Exit(1)


def _known(option: str, value: str, allowed: Any) -> str:
    if value not in allowed:
        raise typer.BadParameter(f"{value!r} is not known; choose from {', '.join(allowed)}", param_hint=option)
    return value


def _usable(device: str) -> str:
    """Refuse a device that torch cannot use here."""
    import torch

    try:
        torch.zeros(1, device=device).sum().item()
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"{device!r} cannot be used here: {reason}", param_hint="--device") from error
    return device


def _config(model: str) -> Any:
    """The config of a model of a supported family."""
    from transformers import AutoConfig

    from ..families.table import FAMILIES

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"the config of {model!r} cannot be read: {reason}", param_hint="MODEL") from error
    if config.model_type not in FAMILIES:
        raise typer.BadParameter(
            f"{model!r} is of type {config.model_type!r}, which is not supported; supported model types: "
            f"{', '.join(sorted(FAMILIES))}",
            param_hint="MODEL",
        )
    return config


def _result(reports: list[Any], absent: list[str], setting: dict[str, str]) -> dict[str, Any]:
    """All that was found, as data."""
    from ..doctor.environment import devices, kernels, python_and_packages
    from ..engine.upstream import TESTED

    return {
        "versions": python_and_packages(),
        "tested_transformers": list(TESTED),
        "devices": devices(),
        "kernels": kernels(),
        "setting": setting,
        "families": [report.to_dict() for report in reports],
        "absent": absent,
        "passed": bool(reports) and all(report.passed for report in reports),
    }


def _show(result: dict[str, Any]) -> None:
    """The same for people."""
    from ..doctor.findings import CHECKS
    from ..engine.upstream import is_untested, versions

    setting = result["setting"]
    table = Table(title=f"pruned against masked: {setting['dtype']}, {setting['device']}")
    for heading in ("family", "language model", "attention"):
        table.add_column(heading)
    for check in CHECKS[1:]:
        table.add_column(check, justify="right")
    table.add_column("s", justify="right")
    for one in result["families"]:
        found = {finding["check"]: finding for finding in one["findings"]}
        cells = [_cell(found.get(check)) for check in CHECKS[1:]]
        table.add_row(one["family"], one["text"], one["attention"], *cells, f"{one['seconds']:.2f}")
    console.print(table)
    for one in result["families"]:
        for finding in one["findings"]:
            if finding["message"]:
                console.print(f"{SIGNS[finding['status']]} {one['family']}, {finding['check']}: ", end="")
                console.print(finding["message"], markup=False, highlight=False)
        if one["note"]:
            console.print(f"{one['family']}: {one['note']}", markup=False, highlight=False)
    if result["absent"]:
        console.print(f"not in this release of transformers: {', '.join(result['absent'])}")
    facts = Table(show_header=False)
    for name in ("versions", "devices", "kernels"):
        facts.add_row(name, "\n".join(f"{key} {value}" for key, value in result[name].items()))
    console.print(facts)
    if is_untested():
        console.print(f"[yellow]{versions()}[/yellow]")
    count, passed = len(result["families"]), sum(one["passed"] for one in result["families"])
    verdict = "[green]pruning works here[/green]" if result["passed"] else "[bold red]do not prune here[/bold red]"
    console.print(f"{verdict}: {passed} of {count} tiny models equal their reference")


def _cell(finding: dict[str, Any] | None) -> str:
    if finding is None:
        return "–"
    error = finding["error"]
    return SIGNS[finding["status"]] + (f" {error:.0e}" if error else "")
