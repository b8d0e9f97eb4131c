"""Own tables, several of them named after splits, and image folders of the hub."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from slam_jax.data.formats.base import HUB_NAMES, Found, Located
from slam_jax.data.splits import split_of_name
from slam_jax.data.tables import COLUMNS, TABLE_SUFFIXES, first_record, read_records

# `answers` holds a list, and `images` too; other names are suggested, not assumed.
_OWN_NAMES = {name: (name,) for name in COLUMNS} | {"answer": ("answer", "answers")}
_OWN_NAMES["image"] = ("image", "images")
_KINDS = {".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSONL", ".ndjson": "JSONL", ".json": "JSON"}
# Files that other programs write beside data.
_NO_TABLES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def find_tables(folder: Path, names: Sequence[str]) -> list[str]:
    """The tables among the files of a folder. Its .jsonl and .csv are preferred to the others."""
    found = [name for name in names if name.lower().endswith(TABLE_SUFFIXES[:2])]
    others = (n for n in names if n.lower().endswith(TABLE_SUFFIXES) and n not in _NO_TABLES)
    return found or [name for name in others if (folder / name).is_file()]


def one_table(path: Path) -> Found:
    """A table of one's own."""
    kind = _KINDS.get(path.suffix.lower(), "JSONL")
    read = functools.partial(_read_tables, (path,), False)
    return Found(f"{kind} table", path, (path,), read, _OWN_NAMES, own=True)


def tables_by_split(folder: Path, names: Sequence[str]) -> Found | None:
    """Tables whose names say their splits, such as train.csv and test.csv; None if one does not."""
    files = tuple(folder / name for name in names)
    if not all(split_of_name(Path(name)) for name in names):
        return None
    read = functools.partial(_read_tables, files, True)
    return Found("tables named after splits", folder, files, read, _OWN_NAMES, own=True)


def image_folder(folder: Path, folders: Sequence[Path]) -> Found | None:
    """Folders with `metadata.jsonl`, `.csv` or `.parquet`, whose column `file_name` (or
    `file_names`, a list) has the pictures of a row, as the hub writes them; None if there is none.

    Source: huggingface.co/docs/datasets, "Create an image dataset".
    """
    files = []
    for each in folders:
        here = [each / f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet")]
        files += [file for file in here if file.is_file()][:1]
    if not files or not all(_names_pictures(file) for file in files):
        return None
    names = {**HUB_NAMES, "image": ("file_name", "file_names", "image", "images")}
    read = functools.partial(_read_metadata, folder, tuple(files))
    return Found("image folder with metadata", folder, tuple(files), read, names)


def _names_pictures(file: Path) -> bool:
    if file.suffix == ".parquet":
        from slam_jax.data.formats.parquet import columns_of

        names = columns_of(file)
    else:
        names = list(first_record(file))
    # A table of one's own has `answer`, and may have a column of any name beside `image`.
    return not {"file_name", "file_names"}.isdisjoint(names) and "image" not in names


def _read_tables(files: Sequence[Path], by_name: bool) -> Iterator[Located]:
    for file in files:
        split = split_of_name(Path(file.name)) if by_name else ""
        for line, record in read_records(file):
            if split and isinstance(record, dict):
                record["split"] = split
            yield Located(file, line, record)


def _read_metadata(folder: Path, files: Sequence[Path]) -> Iterator[Located]:
    for file in files:
        if file.suffix == ".parquet":
            from slam_jax.data.formats.parquet import read_file

            found = read_file(file)
        else:
            found = (Located(file, line, record) for line, record in read_records(file))
        split = split_of_name(file.relative_to(folder).parent / "metadata")
        for each in found:
            if split and isinstance(each.record, dict):
                each.record["split"] = split
            yield each
