"""Formats that users have their data in, recognised by what a folder or a file holds.

Each file reads one kind and gives a `Found`: where the data is, and a function that iterates over
its records. A record is a dict of columns; a picture in it is a path, or a `StoredPicture` within a
file, which is read when it is shown. `slam_jax.data.folder.read_table` turns records of any format
into rows, so that columns, splits, numbers and messages are the same for all of them.

A new format is a function that takes a folder and returns a `Found` or None, called in `find`.
"""

import itertools
from pathlib import Path

from slam_jax.data.formats.arrow import saved_dataset
from slam_jax.data.formats.base import Found, Located, Record, StoredPicture, open_picture
from slam_jax.data.formats.classes import class_folders, visible_folders
from slam_jax.data.formats.conversations import as_turns, holds_conversations
from slam_jax.data.formats.parquet import parquet_files
from slam_jax.data.formats.shards import tar_shards
from slam_jax.data.formats.tables import find_tables, image_folder, one_table, tables_by_split
from slam_jax.data.records import DataError
from slam_jax.data.splits import SPLIT_NAMES
from slam_jax.data.tables import TABLE_SUFFIXES
from slam_jax.errors import shorten

__all__ = ["Found", "Located", "Record", "StoredPicture", "find", "open_picture"]


def find(path: Path, cache: Path | None = None) -> Found:
    """The data at `path`: a file, or a folder that holds one data set.

    Hidden files, such as the `._data.csv` of macOS, are ignored. cache: the folder in which indices
    of tar shards are kept.

    Raises:
      DataError: there is nothing that can be read, or more than one thing.
    """
    if not path.is_file() and not path.is_dir():
        raise DataError(f"{path}: no such folder; give data.path a folder with a .jsonl or .csv")
    found = _find_file(path, cache) if path.is_file() else _find_folder(path, cache)
    records = (each.record for each in itertools.islice(found.read(), 100))
    first = next((record for record in records if isinstance(record, dict)), {})
    return as_turns(found) if holds_conversations(first) else found


def _find_file(path: Path, cache: Path | None) -> Found:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_files(path, [path])
    if suffix == ".tar":
        return tar_shards(path, [path], cache)
    if suffix in (*TABLE_SUFFIXES, ""):
        return one_table(path)
    raise DataError(
        f"{path}: data is read from .jsonl, .json, .csv, .tsv, .parquet and .tar; save it as one "
        "of them"
    )


def _find_folder(path: Path, cache: Path | None) -> Found:
    names = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    below = visible_folders(path)
    by_split = [folder for folder in below if folder.name.lower() in SPLIT_NAMES]
    found = saved_dataset(path) or image_folder(path, [path, *by_split])
    if found is not None:
        return found
    tables = find_tables(path, names)
    if len(tables) == 1:
        return one_table(path / tables[0])
    if tables and (found := tables_by_split(path, tables)):
        return found
    if tables:
        raise _no_table(
            path,
            tables,
            "give data.path one of them, join them into one table with a column 'split', or name "
            "each after its split, such as train.csv and test.csv",
        )
    for suffix in (".tar", ".parquet"):
        files = [file for folder in (path, *below) for file in sorted(folder.glob(f"*{suffix}"))]
        files = [file for file in files if not file.name.startswith(".") and file.is_file()]
        if files and suffix == ".tar":
            return tar_shards(path, files, cache)
        if files:
            return parquet_files(path, files)
    if (found := class_folders(path)) is not None:
        return found
    holds = shorten(", ".join(names)) or "nothing"
    raise _no_table(path, tables, f"the folder holds {holds}; write a table, or see docs/data.md")


def _no_table(path: Path, tables: list[str], advice: str) -> DataError:
    found = shorten(", ".join(tables)) or "none"
    return DataError(f"{path}: expected one .jsonl or .csv in it, found {found}; {advice}")
