"""Reading the table of a user, a .jsonl or .csv file, as one record per row."""

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slam_jax.data.records import DataError
from slam_jax.errors import InputError, first_line, shorten

Record = dict[str, Any]
COLUMNS = {
    "image": ("imagepath", "imagefile", "filename", "file", "path", "picture", "photo", "img"),
    "text": ("context", "passage", "sentence", "document"),
    "prompt": ("question", "query", "instruction"),
    "answer": ("label", "target", "output", "response", "caption", "class"),
    "kind": ("type", "category"),
    "split": ("subset", "fold", "partition"),
}
"""The columns that a table may have, each with names that other tables have for it."""

_MOST_BYTES = 1 << 30
_SUFFIXES = (".jsonl", ".csv")
_SHOWN = 110  # letters of a value in a message


def quote(value: Any) -> str:
    """The value as messages show it, shortened."""
    return shorten(repr(value), _SHOWN)


def find_table(path: Path) -> Path:
    """The table at `path`: the file itself, or the only table of that folder.

    Hidden files, such as the `._data.csv` of macOS, are ignored. Raises DataError where there is
    not exactly one table.
    """
    if path.is_file():
        if path.suffix.lower() in (*_SUFFIXES, ".json", ".ndjson", ""):
            return path
        raise DataError(f"{path}: tables are read from .jsonl and .csv; save it as one of them")
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; give data.path a folder with a .jsonl or .csv")
    names = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    tables = [name for name in names if name.lower().endswith(_SUFFIXES)]
    if len(tables) == 1:
        return path / tables[0]
    if tables:
        advice = "give data.path one of them, or join them into one table with a column 'split'"
    else:
        advice = f"the folder holds {shorten(', '.join(names)) or 'nothing'}; write a table"
    found = shorten(", ".join(tables)) or "none"
    raise DataError(f"{path}: expected one .jsonl or .csv in it, found {found}; {advice}")


def read_records(path: Path) -> list[tuple[int, Record | str]]:
    """(line, record) for each row that is not empty, or (line, reason) if it cannot be read.

    Lines count from 1, and the header of a CSV is line 1. A row that spans several lines has the
    number of its first line.

    Raises:
      DataError: the file cannot be read, is no UTF-8, is larger than 1 GiB, is a JSON array, has a
        quote that is not closed or two columns of one name.
    """
    limit = csv.field_size_limit(_MOST_BYTES)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; split it: 1 GiB is read")
        read = _read_csv if path.suffix.lower() == ".csv" else _read_jsonl
        return list(read(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({first_line(error)})") from error
    finally:
        csv.field_size_limit(limit)


def _read_csv(path: Path) -> Iterator[tuple[int, Record | str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict: otherwise a quote that is not closed takes in the rows that follow.
        reader = csv.reader(file, skipinitialspace=True, strict=True)
        names, line = [], 1
        try:
            for cells in reader:
                if not names:
                    names = [name.strip() for name in cells]
                    if twice := _repeated([name for name in names if name]):
                        raise DataError(
                            f"{path}, row {line}: two columns have the name {quote(twice)}; "
                            "rename or delete one"
                        )
                elif len(cells) > len(names):
                    yield line, "more values than columns"
                elif cells:
                    record = dict(itertools.zip_longest(names, cells, fillvalue=""))
                    record.pop("", None)  # the index that pandas writes has no name
                    yield line, record
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}: the row that begins in line {line} is no CSV ({first_line(error)}); "
                "close every quote, write quotes within a text twice, and nothing after a closing "
                "quote but a comma"
            ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, Record | str]]:
    with path.open(encoding="utf-8-sig") as file:
        filled = ((line, text) for line, text in enumerate(file, 1) if text.strip())
        for i, (line, text) in enumerate(filled):
            if not i and text.lstrip().startswith("["):
                raise DataError(
                    f"{path} is one JSON array; write one object a line, as does "
                    f"`jq -c '.[]' {path.name}`"
                )
            yield line, _parse(text)


def _parse(text: str) -> Record | str:
    try:
        record = json.loads(text, object_pairs_hook=_record)
    except InputError as error:
        return str(error)
    except (ValueError, RecursionError) as error:
        return f"no JSON ({first_line(error)}); write one object a line"
    if not isinstance(record, dict):
        return f"a {type(record).__name__}; expected an object such as " + '{"answer": "yes"}'
    return record


def _record(pairs: list[tuple[str, Any]]) -> Record:
    if twice := _repeated([name for name, _ in pairs]):
        raise InputError(f"the name {quote(twice)} is there twice; rename or delete one")
    return dict(pairs)


def _repeated(names: list[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)
