"""The entry point of `vllm.general_plugins`, which vLLM calls in the front end and in every worker."""

from __future__ import annotations

from typing import Any

from .families import SERVED
from .startup import settle_engine, settle_model, untested


def register() -> None:
    """Let vLLM prune pictures where it is asked to; without being asked it runs as it is."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    if untested() is None:
        for architecture in SERVED:
            ModelRegistry.register_model(architecture, f"{__package__}.classes:{architecture}")
    # Every architecture, so that settings for one that is not served are refused, not passed over.
    for architecture in {*ModelRegistry.get_supported_archs(), *MODELS_CONFIG_MAP}:
        MODELS_CONFIG_MAP[architecture] = _then_ours(MODELS_CONFIG_MAP.get(architecture))


def _then_ours(stock: Any) -> Any:
    """The hook of vLLM's own for an architecture, if it has one, and then ours."""
    if isinstance(stock, type) and issubclass(stock, _Hook):
        return stock
    return type("Hook", (_Hook,), {"stock": stock})


class _Hook:
    """As vLLM's `VerifyAndUpdateConfig`."""

    stock: Any = None

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        if cls.stock is not None:
            cls.stock.verify_and_update_model_config(model_config)
        settle_model(model_config)

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        if cls.stock is not None:
            cls.stock.verify_and_update_config(vllm_config)
        settle_engine(vllm_config)
