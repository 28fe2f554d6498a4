"""What an adapter was trained with, as its files tell it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from ..config import GripConfig
from ..engine.callers import active_adapters
from ..errors import ConfigError, ScorerError
from .download import CONFIG_FILE, SUBFOLDER, fetch

ADAPTER_FILE = "adapter_config.json"
# The field of that file that PEFT keeps, where a dict may stand, and our key in it.
KEPT_BY_PEFT, OURS = "auto_mapping", "grip_hf"
# Where on the Hub to look, of what PEFT and we both take.
PLACES = ("revision", "token", "cache_dir", "local_files_only")
REMEDY = "apply_grip(model) around it, without a selector or scorer, takes the adapter's own"


@dataclasses.dataclass(frozen=True)
class AdapterPart:
    """What an adapter was trained with.

    Attributes:
        name: The adapter.
        settings: The settings of the patch.
        scorer: Fingerprint of the scorer, if one chose.
        place: Its folder or Hub id, and where on the Hub to look; None if PEFT alone has loaded it, which forgets it.
        config: PEFT's configuration of it, by which it is known again.
    """

    name: str
    settings: GripConfig
    scorer: str | None
    place: tuple[str, dict[str, Any]] | None = None
    config: Any = dataclasses.field(default=None, compare=False, repr=False)

    def beside(self) -> str | None:
        """The folder with the part that lies beside it, if the patch saw where it came from."""
        if self.place is None:
            return None
        source, hub = self.place
        if os.path.isdir(source):
            found: Path | None = Path(source, hub.get("subfolder") or "", SUBFOLDER)
        else:
            inside = "/".join(part for part in (hub.get("subfolder"), SUBFOLDER) if part)
            found = fetch(source, subfolder=inside, **{name: hub[name] for name in PLACES if name in hub})
        return str(found) if found is not None and (found / CONFIG_FILE).is_file() else None

    def folder(self, base_folder: str | None) -> str:
        """Where its scorer lies.

        Args:
            base_folder: The GRIP part of the base model's checkpoint, which may be the same one.

        Raises:
            ScorerError: It is not found.
        """
        found = self.beside()
        if found is not None:
            return found
        if base_folder is not None and fingerprint_of(Path(base_folder)) == self.scorer:
            return base_folder
        raise ScorerError(
            f"the adapter {self.name!r} was trained with a scorer, which lies beside it, and PEFT does not keep where "
            "an adapter was loaded from: apply_grip(model, scorer=...) with the adapter's folder or Hub id"
        )


def part_of(model: Any) -> AdapterPart | None:
    """What the active adapter of a model was trained with; of several, the first that was trained with pruning.

    Args:
        model: A `PeftModel`, or a transformers model that was given adapters.

    Returns:
        None if there is no adapter, or it was trained without pruning.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = getattr(vars(owner).get("grip"), "adapters", {})
    found = (part_named(name, config, known) for name, config in active_adapters(model).items())
    return next((part for part in found if part is not None), None)


def part_named(name: str, config: Any, known: Mapping[str, AdapterPart]) -> AdapterPart | None:
    """What one adapter was trained with; None if it was without pruning.

    Args:
        name: The adapter.
        config: PEFT's configuration of it.
        known: What is known of those whose loading the patch saw; another one may have got its name since.
    """
    part = known.get(name)
    return part if part is not None and part.config is config else read_part(name, config)


def facts_of(handle: Any) -> dict[str, Any] | None:
    """What `adapter_config.json` is to tell of a patch; None if it cannot be saved."""
    if not handle.can_be_saved:
        return None
    scorer = handle.scorer
    return {
        "settings": handle.config.to_dict(),
        "scorer": None if scorer is None else fingerprint(scorer.state_dict()),
    }


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """A number that tells scorers apart."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def fingerprint_of(folder: Path) -> str | None:
    """That of the scorer in a folder, if there is one."""
    path = folder / "model.safetensors"
    return fingerprint(load_file(path)) if path.is_file() else None


def stored(source: str, hub: Mapping[str, Any]) -> dict[str, Any]:
    """What lies in the `adapter_config.json` that PEFT has just read."""
    folder = Path(source, hub.get("subfolder") or "")
    path = folder / ADAPTER_FILE
    if not folder.is_dir():
        path = Path(hf_hub_download(source, ADAPTER_FILE, **{**hub, "local_files_only": True}))
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def read_part(
    name: str, config: Any, told: Any = None, place: tuple[str, dict[str, Any]] | None = None
) -> AdapterPart | None:
    """The part that an adapter's configuration tells of.

    Args:
        name: The adapter.
        config: PEFT's configuration of it.
        told: Its file, where that is known; a configuration may be the user's own.
        place: Where the file lies.

    Raises:
        ConfigError: It tells of one that is damaged.
    """
    kept = getattr(config, KEPT_BY_PEFT, None) if told is None else told.get(KEPT_BY_PEFT)
    facts = kept.get(OURS) if isinstance(kept, Mapping) else None
    if facts is None:
        return None
    if not isinstance(facts, Mapping):
        raise ConfigError(f"{ADAPTER_FILE} of the adapter {name!r}: {OURS!r} must be a dict, got {facts!r}")
    return AdapterPart(name, GripConfig.from_dict(facts.get("settings") or {}), facts.get("scorer"), place, config)


def warn_if_it_differs(part: AdapterPart, handle: Any) -> None:
    """Warn if an adapter was trained with another choice than a patch makes; the budget is each call's own."""
    mine, budget = facts_of(handle), {"keep_ratio": None, "num_tokens": 1}
    same = mine is not None and mine["scorer"] == part.scorer
    if not same or handle.config.replace(**budget) != part.settings.replace(**budget):
        warn(
            f"the adapter {part.name!r} was trained with other settings or another scorer "
            f"({part.settings.selector!r}) than this patch has ({handle.config.selector!r}): {REMEDY}"
        )


def warn(message: str) -> None:
    """Say so to whoever loads or patches."""
    warnings.warn(message, UserWarning, stacklevel=3)
