"""`grip-hf bench`: what pruning saves on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from .screen import JsonFile, console, numbers, split_list

COLUMNS = {
    "selector": ("selector", "{}"),
    "kept": ("kept", "{}"),
    "TTFT ms": ("ttft_ms", "{:.1f}"),
    "of unpruned": ("ttft_ratio", "{:.1%}"),
    "vision": ("vision_ms", "{:.1f}"),
    "selector ms": ("selector_ms", "{:.2f}"),
    "of unpruned TTFT": ("selector_share", "{:.2%}"),
    "prefill": ("prefill_ms", "{:.1f}"),
    "/ floor": ("prefill_over_floor", "{:.3f}"),
    "TTFT / floor": ("ttft_over_floor", "{:.3f}"),
    "FLOPs": ("flop_ratio", "{:.1%}"),
    "decode ms": ("decode_ms", "{:.2f}"),
    "hooks us": ("hook_us", "{:.0f}"),
    "cache MiB": ("cache_bytes", "{:.1f}"),
    "peak MiB": ("peak_bytes", "{:.0f}"),
}


def bench(
    model: Annotated[
        str, typer.Option(help="Shape: pocket, small, llava-1.5-7b, llava-next, qwen2.5-vl-7b.")
    ] = "small",
    selectors: Annotated[str, typer.Option(help="Selectors or downsampling, separated by commas.")] = (
        "grip,random,grid,cls_attention,similarity,diversity"
    ),
    num_tokens: Annotated[str, typer.Option(help="Visual tokens to keep, separated by commas.")] = "64,192",
    budgets: Annotated[str | None, typer.Option(help="Or: keep ratios, separated by commas.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Paired rounds; medians are taken over them.")] = 5,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens to time after the first.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Samples per call.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Dtype of the model.")] = "float32",
    attention: Annotated[str, typer.Option(help="Attention implementation of the model.")] = "sdpa",
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and inputs.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Measure time to first token, time per further token, cache and memory, beside the unpruned model and a floor."""
    from ..config import check_keep_ratio, count_kept
    from ..errors import GripError
    from ..evaluation.latency import run_bench
    from ..evaluation.shapes import get_shape

    names = split_list(selectors)
    try:
        if budgets is None:
            counts = numbers(num_tokens, int, "whole numbers")
        else:
            total = get_shape(model).tokens
            counts = [count_kept(total, check_keep_ratio(ratio)) for ratio in numbers(budgets)]
        with console.status("starting") as status:
            result = run_bench(
                model, names, counts, rounds, decode_tokens, batch, device, dtype, attention, seed, status.update
            )
    except GripError as error:
        raise typer.BadParameter(str(error)) from error
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(as_table(result))
    console.print(
        "floor: the unpatched language model on the kept embeddings; '/ floor': prefill with all that the patch adds, "
        "without the selector; 'TTFT / floor': against unpruned vision tower + selector + floor"
    )


def as_table(result: dict[str, Any]) -> Table:
    """The figures of `run_bench` for people."""
    setting, full = result["setting"], result["unpruned"]
    title = (
        f"{setting['model']}: {setting['visual_tokens']} visual + {setting['text_tokens']} text tokens, batch "
        f"{setting['batch']}, {setting['dtype']}, {setting['device']}, {setting['threads']} threads"
    )
    table = Table(title=title)
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading == "selector" else "right")
    unpruned = {"selector": "unpruned", "kept": setting["visual_tokens"], **full}
    for row in (unpruned, *result["rows"]):
        table.add_row(*(_cell(row.get(key), form, heading) for heading, (key, form) in COLUMNS.items()))
    return table


def _cell(value: Any, form: str, heading: str) -> str:
    if value is None:
        return "-"
    return form.format(value / 2**20 if heading.endswith("MiB") else value)
