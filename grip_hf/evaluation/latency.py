"""What pruning saves on this machine: time to first token, time per further token, cache and memory.

Every figure comes from paired runs: in each round the unpruned model, the floor and every selector run one after the
other, ratios are taken within the round, and medians over the rounds, so that a busy machine disturbs all of them
alike.

The **floor** is the unpatched language model run on the very embeddings that pruning left: what no pruning before the
language model can beat.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from ..engine.upstream import attention_kernel
from ..errors import ConfigError
from ..families.table import find_parts
from .budgets import Budget, check_budget, kept_of
from .facts import versions
from .flops import prefill_flops
from .paired import Bench, Timing, Variant
from .shapes import Subject, get_shape, shaped
from .stopwatch import check_clock
from .towers import TowerChoice, goes_with_tower

Round = dict[Variant, Timing]


def run_bench(
    model: str | Subject = "small",
    selectors: Sequence[str] = ("grip", "random"),
    budgets: Sequence[Budget] = (64, 192),
    rounds: int = 5,
    decode_tokens: int = 8,
    batch: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    attention: str = "sdpa",
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
    depth_of: int | None = None,
    tower: TowerChoice | None = None,
    cpu_time: bool = False,
) -> dict[str, Any]:
    """Measure selectors at several budgets.

    Args:
        model: Name of a shape, such as "small" or "llava-1.5-7b", which gets random weights; or a model of your own
            with its inputs, for which `batch`, `device`, `dtype` and `attention` are not read.
        selectors: Names of selectors, "downsampling", "pooled", or `label=folder` for a scorer of your own; "grip" is
            the scorer that came with the model, else one with random weights, which takes as long as a trained one.
        budgets: Keep ratios in (0, 1], or numbers of visual tokens > 1.
        rounds: Paired rounds, after one that is not counted.
        decode_tokens: Further tokens to time after the first.
        batch: Samples per call.
        device: Where to run.
        dtype: Name of the model's dtype.
        attention: Attention implementation of the model.
        seed: Seed of weights and inputs.
        progress: Called with what is being done.
        depth_of: Layers of another model: selectors inside the language model drop at the shares of layers where they
            drop in that one, so that times can be joined with accuracies measured on it.
        tower: At which shares of the vision tower's rows each selector is measured too.
        cpu_time: Whether the CPU time of this process counts, on a machine that others use too; not on a GPU.

    Returns:
        `setting` (what was run and where), `unpruned` and one entry of `rows` per selector and budget, all plain data.

    Raises:
        ConfigError: An argument is not allowed.
    """
    wanted = [check_budget(budget) for budget in budgets]
    given = (("rounds", rounds), ("decode_tokens", decode_tokens), ("batch", batch))
    for name, value in (*given, *([] if depth_of is None else [("depth_of", depth_of)])):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer >= 1, got {value!r}")
    if not selectors:
        raise ConfigError("selectors must name at least one selector, got none")
    if isinstance(model, str):
        get_shape(model)
        precision = getattr(torch, dtype, None)
        if not isinstance(precision, torch.dtype) or not precision.is_floating_point:
            raise ConfigError(f"dtype must be the name of a floating-point torch dtype, got {dtype!r}")
        _check_device(device)
        progress(f"building {model}")
        model = shaped(model, batch, device, precision, attention, seed)
    built, place = model.model, model.inputs["input_ids"].device
    check_clock(cpu_time, place)
    counts = list(dict.fromkeys(kept_of(model.tokens, budget) for budget in wanted))
    bench = Bench(built, model.inputs, selectors, decode_tokens, seed, depth_of, tower, cpu_time)
    pruned = [
        Variant(name, count, share)
        for count in counts
        for name, one in bench.selectors.items()
        for share in (None, *(tower.ratios if tower is not None and goes_with_tower(one) else ()))
    ]
    variants = [Variant(), *(Variant(None, count) for count in counts), *pruned]
    found: list[Round] = []
    for number in range(rounds + 1):
        found.append({})
        for variant in variants:
            progress(f"round {number} of {rounds}: {variant}")
            found[-1][variant] = bench.run(variant)
    texts = bench.inputs["input_ids"].shape[1] - model.tokens
    language_model = find_parts(built).language_model
    full = prefill_flops(language_model, found[0][Variant()].layer_tokens)
    rows = []
    for variant in pruned:
        held = found[0][variant].layer_tokens
        share = prefill_flops(language_model, held) / full
        row = {**_row(found[1:], variant), "kept": held[-1] - texts, "flop_ratio": share}
        row["token_layers"] = sum(held) / sum(found[0][Variant()].layer_tokens)
        rows.append({**row, "drops": bench.drops(str(variant.selector)), "layers": len(held)})
    setting = {
        "model": model.name,
        "visual_tokens": model.tokens,
        "text_tokens": texts,
        "batch": len(model.inputs["input_ids"]),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or "cpu",
        "dtype": str(built.dtype).removeprefix("torch."),
        "attention": attention_kernel(find_parts(built).language_model.config),
        "threads": torch.get_num_threads(),
        "clock": "cpu" if cpu_time else "wall",
        "rounds": rounds,
        "decode_tokens": decode_tokens,
        "seed": seed,
        "versions": versions(),
    }
    return {"setting": setting, "unpruned": _medians(found[1:], Variant()), "rows": rows}


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not available here")


def _medians(rounds: list[Round], variant: Variant) -> dict[str, Any]:
    """Medians over the rounds of what a variant took."""
    timings = [one[variant] for one in rounds]
    peaks = [timing.peak_bytes for timing in timings if timing.peak_bytes is not None]
    parts = {f"{name}_ms": median(timing.ms[name] for timing in timings) for name in timings[0].ms}
    parts["ttft_ms"] = parts.pop("total_ms")
    return {**parts, "cache_bytes": timings[0].cache_bytes, "peak_bytes": max(peaks) if peaks else None}


def _row(rounds: list[Round], variant: Variant) -> dict[str, Any]:
    """Medians of a selector at a budget, and medians of its ratios within each round."""

    def ratio(value: Callable[[Timing, Timing, Timing], float]) -> float:
        floor = Variant(None, variant.num_tokens)
        return median(value(one[variant], one[Variant()], one[floor]) for one in rounds)

    return {
        "selector": variant.name,
        "tower_keep_ratio": variant.tower,
        "num_tokens": variant.num_tokens,
        **_medians(rounds, variant),
        "floor_prefill_ms": ratio(lambda mine, full, floor: floor.ms["prefill"]),
        "floor_decode_ms": ratio(lambda mine, full, floor: floor.ms["decode"]),
        "ttft_ratio": ratio(lambda mine, full, floor: mine.ms["total"] / full.ms["total"]),
        "selector_share": ratio(lambda mine, full, floor: mine.ms["selector"] / full.ms["total"]),
        "prefill_over_floor": ratio(lambda mine, full, floor: _language_model(mine) / floor.ms["prefill"]),
        "ttft_over_floor": ratio(
            lambda mine, full, floor: mine.ms["total"] / (full.ms["vision"] + floor.ms["total"] + mine.ms["selector"])
        ),
        "decode_ratio": ratio(lambda mine, full, floor: mine.ms["decode"] / full.ms["decode"]),
        "decode_over_floor": ratio(lambda mine, full, floor: mine.ms["decode"] / floor.ms["decode"]),
        "hook_us": ratio(lambda mine, full, floor: mine.hook_us - full.hook_us),
    }


def _language_model(timing: Timing) -> float:
    """Milliseconds of the language model with all that the patch adds, but without the selector."""
    return timing.ms["prune"] + timing.ms["prefill"] + timing.ms["restore"]
