"""Compare a pruned tiny model with the reference, in the ways in which users call it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..engine.upstream import attention_kernel
from .findings import ABSENT, FAILED, PASSED, Finding, Report, describe, worst
from .isolation import Drawing, undisturbed
from .reference import original_positions
from .runs import STATIC, Case, Run, WrongError, attempt, distance, forward, generate
from .shrink import family_of, make_tiny
from .tiny import Prompts, make, make_inputs, select_by_content
from .tiny_core import IMAGE

# (model, selector, keep ratio) -> the handle of the patch. It is handed in: `apply_grip` calls the self-check, so the
# self-check stands below it and cannot import it.
Prune = Callable[[Any, Callable[..., Tensor], float], Any]

ROWS: dict[str, Prompts] = {"one row": [[3, IMAGE, 4]], "unequal rows": [[3, IMAGE, 4], [2, IMAGE, 2, IMAGE, 3], [5]]}
RATIO = 0.5


def examine(
    family: str,
    prune: Prune,
    config: Any = None,
    attention: str = "sdpa",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    note: str = "",
) -> Report:
    """Build a tiny model, prune it, and compare it with itself unpatched when the dropped tokens are masked out.

    The caller's random numbers, gradients, default device and warnings stay as they are. What fails is in the report
    and not raised.

    Args:
        family: One of `grip_hf.doctor.tiny.TINY`.
        prune: Puts the patch on a model.
        config: Another config of this family (see `shrink`).
        attention: "eager" or "sdpa".
        device: Where the model runs.
        dtype: Of its weights.
        note: Goes into the report.
    """
    start, text = time.perf_counter(), "?"
    with undisturbed(), Drawing(seed=0):
        try:
            model = _build(family, config, attention, device, dtype)
        except Exception as error:
            findings = [Finding("build", FAILED, message=describe(error))]
        else:
            text, attention = str(model.config.get_text_config().model_type), attention_kernel(model.config)
            findings = worst([Finding("build", PASSED), *_findings(family, prune, model)])
    return Report(family, text, attention, tuple(findings), time.perf_counter() - start, note)


def examine_own(config: Any, prune: Prune, **how: Any) -> Report:
    """The same for a model's own type and text backbone.

    Args:
        config: The model's config; of its family, which must be supported.
        prune: Puts the patch on a model.
        **how: `attention`, `device` and `dtype` of `examine`.
    """
    text = config.get_text_config().model_type
    with undisturbed():
        family = family_of(config)
        tiny = attempt(lambda: make_tiny(config))
    if isinstance(tiny, Exception):
        why = describe(tiny)
    else:
        report = examine(family, prune, tiny, **how)
        built = report.findings[0]
        if built.status == PASSED:
            return report
        why = built.message
    note = f"checked with the usual language model of {family}, since {text} could not be made tiny: {why}"
    return examine(family, prune, note=note, **how)


def _build(family: str, config: Any, attention: str, device: str, dtype: torch.dtype) -> Any:
    """The model."""
    try:
        return make(family, attention, dtype, config).to(device)
    except ValueError:  # some text backbones have eager attention alone
        if attention == "eager":
            raise
        return make(family, "eager", dtype, config).to(device)


def _findings(family: str, prune: Prune, model: Any) -> Iterator[Finding]:
    """All findings: one per check and kind of batch."""
    device = next(model.parameters()).device
    for rows, prompts in ROWS.items():
        given = make_inputs(family, prompts)
        inputs = {name: value.to(device, _kind(value, model)) for name, value in given.items()}
        try:
            # One row takes the positions that the model counts; of padded rows, `generate` too gives them.
            call = inputs if len(prompts) == 1 else {**inputs, "position_ids": original_positions(model, inputs)}
            case = Case(family, model, inputs, call, model(**call).logits)
            runs = _pruned_runs(prune, case)
        except Exception as error:
            yield Finding("prefill", FAILED, message=f"{rows}: {describe(error)}")
            continue
        for check, run in runs.items():
            yield _judge(case, check, run, rows)
        yield _unharmed(case, rows)


def _kind(value: Tensor, model: Any) -> torch.dtype:
    """The dtype that an argument of a model has."""
    return model.dtype if value.is_floating_point() else value.dtype


def _pruned_runs(prune: Prune, case: Case) -> dict[str, Any]:
    """What the pruned model says in each way of calling it: a run, or the exception that it raised."""
    model = case.model
    handle = prune(model, select_by_content, RATIO)
    try:
        cached = attempt(lambda: forward(model, case.call, handle))
        kept = cached.kept if isinstance(cached, Run) else []  # without a cache nothing tells what was kept
        return {
            "prefill": cached,
            "no cache": attempt(lambda: Run(model(**case.call, use_cache=False).logits, kept)),
            "dynamic cache": attempt(lambda: generate(model, case.inputs, handle)),
            "static cache": attempt(lambda: generate(model, case.inputs, handle, **STATIC)),
        }
    finally:
        handle.remove()


def _judge(case: Case, check: str, run: Any, rows: str) -> Finding:
    """Compare one run with the reference."""
    error = allowed = None
    try:
        if isinstance(run, Exception):
            raise run
        return Finding(check, PASSED, *case.compare(run, RATIO))
    except WrongError as wrong:
        error, allowed, message = wrong.error, wrong.allowed, f"{rows}: {wrong}"
    except Exception as raised:
        message = f"{rows}: {describe(raised)}"
    if check == "static cache":
        reason = case.lacks_static_cache()
        if reason is not None:
            return Finding(check, ABSENT, message=reason)
    return Finding(check, FAILED, error, allowed, message)


def _unharmed(case: Case, rows: str) -> Finding:
    """Whether the model is as it was before it was pruned."""
    try:
        error = distance(case.model(**case.call).logits, case.plain)
    except Exception as raised:
        return Finding("removal", FAILED, message=f"{rows}: {describe(raised)}")
    if error == 0 and not hasattr(case.model, "grip"):
        return Finding("removal", PASSED, 0.0, 0.0)
    return Finding("removal", FAILED, error, 0.0, f"{rows}: the model is not as before")
