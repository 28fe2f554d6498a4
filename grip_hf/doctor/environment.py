"""What there is on this machine that decides how a model runs."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

PACKAGES = ("transformers", "trl", "peft", "accelerate", "bitsandbytes")
KERNELS = ("flash-attn", "flash-attn-3", "flash-linear-attention", "causal-conv1d", "kernels", "triton", "xformers")


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of the packages among `names` that are installed."""
    there = {one.name.lower().replace("_", "-"): one.version for one in importlib.metadata.distributions() if one.name}
    return {name: there[name] for name in names if name in there}


def python_and_packages() -> dict[str, str]:
    """Versions of Python and of the libraries that grip_hf stands on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), **installed(PACKAGES)}


def devices() -> dict[str, str]:
    """The devices that torch can use, by name."""
    found = {"cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            found[f"cuda:{index}"] = (
                f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}"
            )
    if torch.backends.mps.is_available():
        found["mps"] = platform.machine()
    return found


def kernels() -> dict[str, str]:
    """Attention kernels: what torch's SDPA may choose from on a GPU, and packages with kernels of their own."""
    switches = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    chosen = [name for name, enabled in switches.items() if enabled]
    sdpa = ", ".join(chosen) if torch.cuda.is_available() else "on CPU"
    return {"eager": "transformers", "sdpa": sdpa, **installed(KERNELS)}
