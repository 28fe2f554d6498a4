"""What the folder that `grip-hf train` left a scorer in knows of its training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..tables import Column, Table

PLAN, TABLE = "plan.json", "eval_table.json"


def left_by_training(scorer: Any, results: bool = True, training: bool = True) -> dict[str, Any]:
    """Facts for the card of a scorer, from the folder that it was loaded from; none where that says nothing.

    Args:
        scorer: The scorer, or None.
        results: Whether the table is wanted.
        training: Whether the settings are.
    """
    folder = Path(str(getattr(getattr(scorer, "config", None), "_name_or_path", "") or ""))
    if scorer is None or not (folder / PLAN).is_file():
        return {}
    found: dict[str, Any] = {}
    if results and (folder / TABLE).is_file():
        found["results"] = folder / TABLE
    if training:
        try:
            found["training"] = describe_run(json.loads((folder / PLAN).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return found  # a file of that name that is another's
    return found


def describe_run(saved: Mapping[str, Any]) -> str:
    """What `plan.json` says of a run, as Markdown."""
    rows = []
    for name, value in saved["plan"].items():
        inside = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [
            {"setting": f"{name}.{key}" if key else name, "value": f"`{json.dumps(one)}`"}
            for key, one in inside
            if one is not None
        ]
    table = Table([Column("setting", "setting", left=True), Column("value", "value", left=True)], rows)
    return f"By `grip-hf train` of grip_hf {saved.get('grip_hf')} with these settings:\n\n{table.markdown()}"
