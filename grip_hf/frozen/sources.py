"""Models and datasets by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import SourceError as SourceError
from .data import DatasetError, DatasetExamples


def load_model(name: str, quantize: str | None = None, device_map: str | None = None) -> tuple[Any, Any]:
    """Load a vision-language model and its processor.

    Args:
        name: Id on the Hub, or a folder.
        quantize: "4bit" or "8bit" loads the model with bitsandbytes.
        device_map: As transformers takes it; None keeps the model on one device.

    Raises:
        SourceError: It cannot be loaded.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    if quantize not in (None, "4bit", "8bit"):
        raise SourceError(f"quantize must be 4bit or 8bit, got {quantize!r}")
    kwargs: dict[str, Any] = {"dtype": "auto"}
    if device_map is not None:
        kwargs["device_map"] = device_map
    if quantize is not None:
        kwargs["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{quantize}": True})
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, **kwargs)
        return model, AutoProcessor.from_pretrained(name)
    except Exception as error:
        raise SourceError(f"cannot load the model {name!r}: {error}") from error


def load_rows(name: str, split: str, limit: int | None = None) -> DatasetExamples:
    """Load a dataset: an id on the Hub, or a folder written by `save_to_disk` or with data files in it.

    Args:
        name: The id or folder.
        split: Which split, where there are several.
        limit: Take only so many rows, from the start.

    Raises:
        DatasetError: It cannot be loaded, or is not one that can be trained on.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        written = any((Path(name) / file).exists() for file in ("state.json", "dataset_dict.json"))
        dataset = load_from_disk(name) if written else load_dataset(name, split=split)
        if isinstance(dataset, DatasetDict):
            dataset = dataset[split]
    except Exception as error:
        raise DatasetError(f"cannot load the split {split!r} of the dataset {name!r}: {error}") from error
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return DatasetExamples(dataset)
