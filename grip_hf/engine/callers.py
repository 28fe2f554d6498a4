"""What the callers of a model know about the answer in a batch.

Trainers take the labels out of the batch before they call the model (label smoothing, a loss of their own), or give
none at all (preference optimisation, GRPO); adapters call the model's `forward`, past its hooks. What they hold is
still there, in the frames around the call: those of a `transformers.Trainer` and of the model itself, under a few
names that are the same everywhere. Nothing of transformers or TRL is patched for it, and nothing is looked for in
`generate` or on a cache that holds a prompt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
# transformers and TRL 1.8 to 1.16: labels [B, L]; or a mask of the answer [B, L]; or prompt and answer, one after the
# other (GRPO), padded on the left and on the right.
LABELS, MASK, PROMPT_AND_ANSWER = "labels", "completion_mask", ("prompt_ids", "completion_ids")
DEFAULT_ADAPTER = "default"  # PEFT saves this one at the top of the folder, others below it
PATCH = "grip"  # the attribute of a patched model
DEPTH = 80  # frames; a trainer's loss stands 10 to 40 above the language model


def answer_of_callers(owner: nn.Module, shape: torch.Size) -> Tensor | None:
    """The answer in a batch, as the nearest caller that knows it holds it.

    Args:
        owner: The model that was patched.
        shape: That of the call, (B, L).

    Returns:
        [B, L] bool, or None if no caller tells.
    """
    for caller, frame in _methods_around():
        if caller is not owner and not _is_trainer(caller):
            continue
        held = frame.f_locals
        for known in (held, *(value for value in held.values() if isinstance(value, Mapping))):
            answer = _answer(known, shape)
            if answer is not None:
                return answer
    return None


def has_unpruned_reference(owner: nn.Module) -> bool:
    """Whether a trainer of this model is around the call, with a reference model that has no patch.

    Args:
        owner: The model that was patched.
    """
    for caller, _ in _methods_around():
        reference = getattr(caller, "ref_model", None) if _is_trainer(caller) else None
        if isinstance(reference, nn.Module):
            policy: nn.Module = caller.model
            return any(one is owner for one in policy.modules()) and not any(
                PATCH in vars(one) for one in reference.modules()
            )
    return False


def saving_adapters(owner: nn.Module) -> list[tuple[str, Any]]:
    """The adapters around a model that are being saved: by PEFT, or by a trainer that shares out weights.

    Args:
        owner: The model that was patched, whose weights are being collected.

    Returns:
        The folder of each, and PEFT's configuration of it; nothing in a process that does not write.
    """
    kind = getattr(sys.modules.get("peft"), "PeftModel", ())
    for caller, frame in _methods_around():
        held = frame.f_locals
        if isinstance(caller, kind) and frame.f_code.co_name == "save_pretrained":
            if not held.get("is_main_process", True) or caller.get_base_model() is not owner:
                return []
            names, top = held.get("selected_adapters") or [DEFAULT_ADAPTER], os.fspath(held["save_directory"])
            folders = [top if name == DEFAULT_ADAPTER else os.path.join(top, name) for name in names]
            return [(folder, caller.peft_config[name]) for folder, name in zip(folders, names, strict=True)]
        if _is_trainer(caller) and frame.f_code.co_name == "save_model":
            model = caller.accelerator.unwrap_model(caller.model)
            if not isinstance(model, kind) or not caller.args.should_save:
                return []
            return [(held["output_dir"], model.peft_config[model.active_adapter])]
    return []


def loading_adapter(owner: nn.Module) -> tuple[str, Any, str, dict[str, Any]] | None:
    """The adapter that PEFT is putting around a model.

    Args:
        owner: The model that was patched, whose weights are being loaded.

    Returns:
        Its name, PEFT's configuration of it, its folder or Hub id, and where on the Hub to look; None if nobody loads
        one.
    """
    kind = getattr(sys.modules.get("peft"), "PeftModel", ())
    for caller, frame in _methods_around():
        if isinstance(caller, kind) and frame.f_code.co_name == "load_adapter" and caller.get_base_model() is owner:
            held, name = frame.f_locals, frame.f_locals["adapter_name"]
            hub = dict(held.get("hf_hub_download_kwargs") or {})
            return name, caller.peft_config[name], os.fspath(held["model_id"]), hub
    return None


def active_adapters(model: nn.Module) -> dict[str, Any]:
    """The adapters that take part in a model's calls, by whomever they were put there.

    transformers' own method for this asks for newer releases of PEFT than those around whose models it stands.

    Args:
        model: A `PeftModel`, or a transformers model, which PEFT lets know what is injected into it.

    Returns:
        PEFT's configuration of each, by name; nothing where they are switched off.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return {}
    kind = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    layer: Any = next((module for module in model.modules() if isinstance(module, kind)), None)
    if layer is not None:  # all layers know the same
        names = [] if layer.disable_adapters else layer.active_adapters
    else:  # prompts and the like, which are of the `PeftModel` alone
        names = getattr(model, "active_adapter", None)
    names = [names] if isinstance(names, str) else names if isinstance(names, list) else []
    return {name: configs[name] for name in names if name in configs}


def _is_trainer(caller: Any) -> bool:
    # A trainer can only be around the call if its module was imported.
    return isinstance(caller, getattr(sys.modules.get("transformers.trainer"), "Trainer", ()))


def _methods_around() -> Iterator[tuple[Any, FrameType]]:
    """The methods that run around this one, from the inside out: what they are of, and their frames."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(DEPTH):
        if frame is None:
            return
        if frame.f_code.co_varnames[:1] == ("self",):
            yield frame.f_locals.get("self"), frame
        frame = frame.f_back


def _answer(known: Mapping[Any, Any], shape: torch.Size) -> Tensor | None:
    labels, mask = known.get(LABELS), known.get(MASK)
    if isinstance(labels, Tensor) and _fits(labels, shape):
        return labels.ne(IGNORED)
    if isinstance(mask, Tensor) and _fits(mask, shape):
        return mask.bool()
    prompt, answer = (known.get(name) for name in PROMPT_AND_ANSWER)
    if isinstance(prompt, Tensor) and isinstance(answer, Tensor) and prompt.ndim == answer.ndim == 2:
        length = prompt.shape[1]
        if length + answer.shape[1] == shape[1]:
            return (torch.arange(shape[1], device=prompt.device) >= length).expand(shape)
    return None


def _fits(value: Tensor, shape: torch.Size) -> bool:
    return value.shape == shape and not value.is_floating_point()
