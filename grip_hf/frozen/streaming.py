"""Rows of a dataset as they come, without the rest of it: what is wanted goes to one file that is mapped to memory."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError
from ..files import make_folder, write_whole

BLOCK = 128  # rows in memory at a time, with the bytes of their pictures; rows are shuffled within a block


def rows_as_they_come(stream: Any, limit: int, seed: int | None, told: Any, folder: Path | None = None) -> Any:
    """The first rows of a stream, or of one that was shuffled, as a dataset on disk.

    Memory holds a few rows at a time, however many there are; pictures are never decoded. What was read before is not
    read again.

    Args:
        stream: A `datasets.IterableDataset`.
        limit: How many rows.
        seed: Shuffles the stream's files, and its rows within blocks of 128; None takes them from the start.
        told: What tells this stream from others, such as its name and split.
        folder: Where the file goes; None takes a folder in the cache of `datasets`.

    Returns:
        A `datasets.Dataset` of at most `limit` rows.

    Raises:
        DatasetError: The stream has no rows.
        FileError: The disk is full.
    """
    from datasets import Dataset, config

    if limit < 1:
        raise DatasetError(f"at least one row must be read of a stream, got limit={limit}")
    place = Path(config.HF_DATASETS_CACHE) / "grip_hf_streams" if folder is None else folder
    key = hashlib.sha256(json.dumps([told, limit, seed], default=str).encode()).hexdigest()[:16]
    path = place / f"{key}.arrow"
    if not path.is_file():
        make_folder(place)
        write_whole(path, partial(_write, stream, limit, seed))
    return Dataset.from_file(str(path))


def _write(stream: Any, limit: int, seed: int | None, path: Path) -> None:
    from datasets.arrow_writer import ArrowWriter
    from datasets.table import embed_table_storage

    tables = _tables(stream, limit, seed)
    first = next(tables, None)
    if first is None:
        raise DatasetError("the dataset has no rows")
    with ArrowWriter(path=str(path), features=stream.features) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(embed_table_storage(table))  # pictures by their bytes, wherever they lie
        writer.finalize()


def _tables(stream: Any, limit: int, seed: int | None) -> Iterator[Any]:
    left = limit
    if seed is not None:
        # Upstream draws from several shards at once, which are whole files unless it is asked for groups of rows. It
        # gets no buffer of its own, in which a row would hold the whole group that it came from.
        stream, order = stream.reshard().shuffle(seed=seed, buffer_size=1), np.random.default_rng(seed)
    for table in stream.with_format("arrow").iter(batch_size=min(BLOCK, limit)):
        # Taken and not sliced: copies hold nothing but themselves.
        rows = np.arange(table.num_rows) if seed is None else order.permutation(table.num_rows)
        yield table.take(rows).slice(0, left)
        left -= min(left, table.num_rows)
        if not left:
            return
