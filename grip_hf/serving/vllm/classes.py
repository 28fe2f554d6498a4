"""The model classes that the plug-in registers: `classes.LlavaForConditionalGeneration`, made when asked for."""

from __future__ import annotations

import importlib
from functools import cache

from vllm.multimodal import MULTIMODAL_REGISTRY

from .families import SERVED
from .model import GripModel
from .processor import factories


@cache
def _make(architecture: str) -> type:
    served = SERVED[architecture]
    stock = getattr(
        importlib.import_module(f"vllm.model_executor.models.{served.module}"), served.name or architecture
    )
    made = type(architecture, (GripModel, stock), {"architecture": architecture, "__module__": __name__})
    return MULTIMODAL_REGISTRY.register_processor(**factories(stock._processor_factory, architecture))(made)


def __getattr__(name: str) -> type:
    if name not in SERVED:
        raise AttributeError(name)
    return _make(name)
