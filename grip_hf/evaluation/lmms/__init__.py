"""The lmms-eval plug-in: `lmms-eval --model grip --model_args pretrained=...,keep_ratio=0.25 --tasks pope`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval asks for at its entry point `lmms_eval.models`: the name `grip` and the class behind it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="grip", chat_class_path="grip_hf.evaluation.lmms.model.GripModel")
