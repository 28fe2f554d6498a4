"""`grip-hf bench`: what pruning saves on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import write_json
from ..tables import Column, Table
from . import options
from .screen import JsonFile, budget_list, console, failures, quiet, say, split_list, tower_choice


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f}"


def _layers(drops: list[int]) -> str:
    return ", ".join(map(str, drops))


COLUMNS = (
    Column("selector", "selector", left=True),
    Column("kept", "kept"),
    Column("TTFT ms", "ttft_ms", "{:.1f}"),
    Column("of full", "ttft_ratio", "{:.1%}"),
    Column("selector ms", "selector_ms", "{:.2f}"),
    Column("decode ms", "decode_ms", "{:.2f}"),
    Column("cache MiB", "cache_bytes", _mebibytes),
)
PARTS = (
    *COLUMNS[:4],
    Column("tower ms", "tower_ms", "{:.1f}"),
    Column("tower scorer ms", "tower_selector_ms", "{:.2f}"),
    Column("selector ms", "selector_ms", "{:.2f}"),
    Column("prefill ms", "prefill_ms", "{:.1f}"),
)
WIDE = (
    *COLUMNS,
    Column("vision ms", "vision_ms", "{:.1f}"),
    Column("tower ms", "tower_ms", "{:.1f}"),
    Column("tower scorer ms", "tower_selector_ms", "{:.2f}"),
    Column("prefill ms", "prefill_ms", "{:.1f}"),
    Column("selector, of full", "selector_share", "{:.2%}"),
    Column("prefill / floor", "prefill_over_floor", "{:.3f}"),
    Column("TTFT / floor", "ttft_over_floor", "{:.3f}"),
    Column("FLOPs", "flop_ratio", "{:.1%}"),
    Column("token-layers", "token_layers", "{:.1%}"),
    Column("drops at", "drops", _layers),
    Column("hooks us", "hook_us", "{:.0f}"),
    Column("peak MiB", "peak_bytes", _mebibytes),
)


def bench(
    model: Annotated[
        str,
        typer.Option(
            help="pocket2, pocket, small, llava-1.5-7b, llava-next, qwen2.5-vl-7b; or a model's id or folder."
        ),
    ] = "small",
    picture: Annotated[Path | None, typer.Option(help="With your model: a picture; else noise, 672 x 672.")] = None,
    prompt: Annotated[str, typer.Option(help="With your model: the question.")] = "Describe the picture.",
    selectors: Annotated[
        str, typer.Option(help="Selectors, downsampling, pooled, or label=folder of a scorer, separated by commas.")
    ] = "grip,random,grid,similarity,diversity",
    budgets: options.Budgets = "64,192",
    rounds: Annotated[int, typer.Option(min=1, help="Paired rounds; medians are taken over them.")] = 5,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens to time after the first.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per call.")] = 1,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    device_map: options.DeviceMap = None,
    attn_implementation: options.Attention = None,
    depth_of: Annotated[
        int | None,
        typer.Option(min=1, help="Drop inside the model at the shares of layers used in a model of so many layers."),
    ] = None,
    seed: options.Seed = 0,
    tower_keep_ratio: options.TowerRatio = None,
    tower_selector: options.TowerSelector = None,
    tower_depth: options.TowerDepth = None,
    cpu_time: options.CpuTime = False,
    wide: Annotated[bool, typer.Option("--wide", help="Show every figure that --json has.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure time to first token, time per further token and cache, beside the unpruned model and a floor."""
    asked = budget_list(budgets)
    quiet()
    from ..evaluation.latency import run_bench
    from ..evaluation.shapes import SHAPES, get_shape, loaded
    from ..frozen.sources import load_model
    from .loading import find_device

    with failures():
        place = find_device(device)
        tower = tower_choice(tower_keep_ratio, tower_selector, tower_depth)
        if model not in SHAPES and not Path(model).is_dir() and "/" not in model:
            get_shape(model)  # tells the known ones
        with console.status("starting") as status:
            subject: Any = model
            if model not in SHAPES:
                shown = _picture(picture)
                parts = load_model(model, quantize, device_map, dtype, attn_implementation, place)
                subject = loaded(model, *parts, shown, prompt, batch_size)
            if dtype == "auto":
                dtype = "bfloat16" if place.type == "cuda" else "float32"
            result = run_bench(
                subject, split_list(selectors), asked, rounds, decode_tokens, batch_size, str(place), dtype,
                attn_implementation or "sdpa", seed, status.update, depth_of, tower, cpu_time,
            )  # fmt: skip
        if json_file is not None:
            write_json(json_file, result)
    if wide and not console.is_terminal:
        console.width = 200
    columns = COLUMNS if tower is None else PARTS
    console.print(as_table(result, WIDE if wide else columns).rich())
    for name, row in {row["selector"]: row for row in result["rows"] if row["drops"]}.items():
        say(f"{name} drops tokens at layer {_layers(row['drops'])} of {row['layers']}; all of them pass those before")
    if wide:
        say(
            "floor: the unpatched language model on the kept embeddings; prefill / floor: with all that the patch "
            "adds, without the selector; TTFT / floor: against unpruned vision tower + selector + floor"
        )


def _picture(file: Path | None) -> Any:
    """The picture of a file, or noise, which any processor cuts into as many pieces as a photo of its size."""
    import numpy as np
    from PIL import Image

    from ..frozen.pictures import open_picture

    if file is not None:
        return open_picture(str(file))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (672, 672, 3), dtype=np.uint8))


def as_table(result: dict[str, Any], columns: tuple[Column, ...] = COLUMNS) -> Table:
    """The figures of `run_bench` for people."""
    setting, full = result["setting"], result["unpruned"]
    title = (
        f"{setting['model']}: {setting['visual_tokens']} visual + {setting['text_tokens']} text tokens, batch "
        f"{setting['batch']}, {setting['dtype']}, {setting['device']}, {setting['threads']} threads"
    )
    unpruned = {"selector": "unpruned", "kept": setting["visual_tokens"], **full}
    return Table(columns, [unpruned, *result["rows"]], title)
