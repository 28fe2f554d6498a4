"""The self-check that `apply_grip` makes on a transformers release newer than the newest tested."""

from __future__ import annotations

import threading
import warnings
from typing import Any

from ..engine.upstream import attention_kernel, unknown, versions
from .check import Prune, examine_own
from .findings import Report

_lock = threading.Lock()  # one check at a time; who comes meanwhile waits for its outcome
_reports: dict[tuple[str, ...], Report] = {}


def vouch(config: Any, prune: Prune) -> None:
    """Check a model's family, once per process: warn if that passes, raise if it fails.

    The check runs on the CPU in single precision, on a tiny model of the same type, text backbone and attention.

    Args:
        config: The model's config.
        prune: Puts the patch on a model, without calling this.

    Raises:
        UnsupportedModelError: The check fails; the message names the installed and the tested releases.
    """
    name, text = str(config.model_type), str(config.get_text_config().model_type)
    attention = "eager" if attention_kernel(config) == "eager" else "sdpa"  # no other runs on every machine
    key = (name, text, attention)
    with _lock:
        first = key not in _reports
        if first:
            _reports[key] = examine_own(config, prune, attention=attention)
        report = _reports[key]
    if not report.passed:
        told = "; ".join(f"{one.check}: {one.message}" for one in report.failures)
        raise unknown(f"{name} with a {text} language model failed its self-check, see `grip-hf doctor`: {told}")
    if first:
        warnings.warn(
            f"{versions()}; {name} with a {text} language model passed its self-check, see `grip-hf doctor`",
            UserWarning,
            stacklevel=3,  # who called apply_grip
        )
