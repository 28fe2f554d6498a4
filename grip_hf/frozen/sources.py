"""Models and datasets by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError, GripError, SourceError
from .data import DatasetExamples
from .streaming import rows_as_they_come

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("test", "validation", "val", "dev", "eval")


def load_model(
    name: str,
    quantize: str | None = None,
    device_map: str | None = None,
    dtype: str = "auto",
    attention: str | None = None,
    device: Any = None,
) -> tuple[Any, Any]:
    """Load a vision-language model and its processor.

    Args:
        name: Id on the Hub, or a folder.
        quantize: "4bit" or "8bit" loads the model with bitsandbytes.
        device_map: As transformers takes it; None keeps the model on one device.
        dtype: Name of a dtype, or "auto" for that of the checkpoint.
        attention: Attention implementation; None leaves the choice to transformers.
        device: Where the whole model goes, if there is no `device_map`; None leaves it where it is loaded.

    Raises:
        SourceError: It cannot be loaded.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    if quantize not in (None, "4bit", "8bit"):
        raise SourceError(f"quantize must be 4bit or 8bit, got {quantize!r}")
    kwargs: dict[str, Any] = {"dtype": dtype}
    if device_map is not None:
        kwargs["device_map"] = device_map
    if attention is not None:
        kwargs["attn_implementation"] = attention
    if quantize is not None:
        if device is not None:
            kwargs.setdefault("device_map", {"": device})  # it cannot be moved later
        kwargs["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{quantize}": True})
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(name, **kwargs)
        if device is not None and "device_map" not in kwargs:
            model = model.to(device)
        return model, AutoProcessor.from_pretrained(name)
    except Exception as error:
        raise SourceError(f"cannot load the model {name!r}: {error}") from error


def load_rows(
    name: str,
    split: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    wanted: Sequence[str] = TRAIN_SPLITS,
    streaming: bool = False,
) -> DatasetExamples:
    """Load a dataset: an id on the Hub, a folder that `save_to_disk` wrote or with data files in it, or one file.

    Args:
        name: The id, folder or file (`.json`, `.jsonl`, `.parquet`, `.csv`); paths of pictures in a file or folder
            are relative to it.
        split: Which split; None takes the first of `wanted` that there is, or the only one.
        limit: Take only so many questions.
        seed: Draws these at random; None takes them from the start.
        wanted: Names of splits, the best first.
        streaming: Read `limit` rows as they come, and nothing beyond them; `seed` shuffles them within a buffer.

    Raises:
        DatasetError: It cannot be loaded, or is not one that can be trained on.
    """
    if streaming and limit is None:
        raise DatasetError("streaming needs a number of rows to read")
    try:
        loaded = _load(name, split, wanted, streaming)
    except Exception as error:
        part = "" if split is None else f" (split {split!r})"
        raise DatasetError(f"cannot load the dataset {name!r}{part}: {error}") from error
    if hasattr(loaded, "keys"):
        split = _chosen(list(loaded), split, wanted, name)
        loaded = loaded[split]
    place = Path(name)
    if not hasattr(loaded, "__len__") and limit is not None:
        version = place.stat().st_mtime_ns if place.exists() else None
        try:
            loaded = rows_as_they_come(
                loaded, limit, seed, [str(place.absolute()) if version else name, split, version]
            )
        except (GripError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise DatasetError(f"cannot stream the dataset {name!r}: {error}") from error
    root = place.parent if place.is_file() else place if place.is_dir() else None
    examples = DatasetExamples(loaded, root=root)
    if limit is None or limit >= len(examples):
        return examples
    if seed is None:
        return examples.subset(range(limit))
    return examples.subset(np.sort(np.random.default_rng(seed).permutation(len(examples))[:limit]))


def _load(name: str, split: str | None, wanted: Sequence[str], streaming: bool) -> Any:
    """A dataset, or a dict of them by split; streams, where these are asked for and not on disk already."""
    from datasets import get_dataset_split_names, load_dataset, load_from_disk

    place = Path(name)
    if any((place / file).exists() for file in ("state.json", "dataset_dict.json")):
        return load_from_disk(name)
    if place.is_dir():
        return load_dataset(name, streaming=streaming)
    if not place.is_file():
        if split is None:  # do not download splits that nobody reads
            split = _chosen(get_dataset_split_names(name), None, wanted, name)
        return load_dataset(name, split=split, streaming=streaming)
    if place.suffix not in BUILDERS:
        raise DatasetError(f"a file must be one of {', '.join(BUILDERS)}, got {place.name!r}")
    try:
        return load_dataset(BUILDERS[place.suffix], data_files=name, split="train", streaming=streaming)
    except Exception:
        if BUILDERS[place.suffix] != "json":
            raise
        return _read_json(place)  # contents that are now a text and now a list are no columns, but are read by Python


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DatasetError("it must hold a list of rows")
    return rows


def _chosen(splits: list[str], split: str | None, wanted: Sequence[str], name: str) -> str:
    """The name of the split to take."""
    best = [one for one in wanted if one in splits]
    if split is not None and split not in splits:
        raise DatasetError(f"cannot load the split {split!r} of the dataset {name!r}: it has {', '.join(splits)}")
    if split is None and not best and len(splits) > 1:
        raise DatasetError(f"the dataset {name!r} has the splits {', '.join(splits)}: choose one with --split")
    return split or next(iter(best), splits[0])
