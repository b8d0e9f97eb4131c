"""Reading a table from a JSONL, JSON, CSV or TSV file, as one record per row."""

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from slam_jax.data.records import DataError
from slam_jax.errors import InputError, first_line, shorten
from slam_jax.runtime.files import require_file

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

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".json", ".ndjson")
_MOST_BYTES = 1 << 30
_MOST_ELEMENT = 1 << 26  # letters of an element of a JSON array
_CHUNK = 1 << 20
_BLANKS = re.compile(r"\s*")
_SHOWN = 110  # letters of a value in a message


def quote(value: Any) -> str:
    """The value as messages show it, shortened."""
    return shorten(repr(value), _SHOWN)


def read_records(path: Path) -> Iterator[tuple[int, Record | str]]:
    """(line, record) for each row that is not empty, or (line, reason) if it cannot be read.

    Lines count from 1, and the header of a CSV is line 1. A row that spans several lines has the
    number of its first line.

    Raises:
      DataError: the file cannot be read, is no UTF-8, is larger than 1 GiB, has a quote that is not
        closed or two columns of one name, or is a JSON array that breaks off.
    """
    limit = csv.field_size_limit(_MOST_BYTES)
    try:
        if require_file(path).st_size > _MOST_BYTES:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; split it: 1 GiB is read")
        yield from _read_csv(path) if path.suffix.lower() in (".csv", ".tsv") else _read_json(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error.reason}); save it as UTF-8") from error
    except InputError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({first_line(error)})") from error
    finally:
        csv.field_size_limit(limit)


def first_record(path: Path) -> Record:
    """The first record of a table that can be read; empty where there is none."""
    records = (record for _, record in itertools.islice(read_records(path), 100))
    return next((record for record in records if isinstance(record, dict)), {})


def _read_csv(path: Path) -> Iterator[tuple[int, Record | str]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict: otherwise a quote that is not closed takes in the rows that follow.
        reader = csv.reader(file, skipinitialspace=True, strict=True, delimiter=delimiter)
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
                f"quote but a {'tab' if delimiter != ',' else 'comma'}"
            ) from error


def _read_json(path: Path) -> Iterator[tuple[int, Record | str]]:
    """An object a line, or an array of objects."""
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if text.lstrip().startswith("["):
                break
            if text.strip():
                yield from _read_lines(line, itertools.chain([text], file))
                return
        else:
            return
    with path.open(encoding="utf-8-sig") as file:
        yield from _read_array(path, file)


def _read_lines(first: int, texts: Iterator[str]) -> Iterator[tuple[int, Record | str]]:
    for line, text in enumerate(texts, first):
        if text.strip():
            yield line, _parse(text)


def _read_array(path: Path, file: TextIO) -> Iterator[tuple[int, Record | str]]:
    """The elements of an array one by one, so that memory holds few of them."""
    decoder = json.JSONDecoder(object_pairs_hook=_record)
    text, at, line, separator = file.read(_CHUNK), 0, 1, "["
    while True:
        start = _skip_blanks(text, at)
        closes = separator != "[" and text.startswith("]", start)
        begin = _skip_blanks(text, start + 1)
        if closes or (separator == "[" and text.startswith("]", begin)):
            return
        element, end, reason = None, 0, "it breaks off"
        if text.startswith(separator, start):
            try:
                element, end = decoder.raw_decode(text, begin)
            except (ValueError, RecursionError) as error:  # InputError is a ValueError
                reason = first_line(error)
        elif start < len(text):
            reason = f"{separator!r} or ']' is missing before it"
        # What follows shows that the element is whole.
        if not end or _skip_blanks(text, end) == len(text):
            more = file.read(max(_CHUNK, len(text) - at))
            if not more or len(text) - at > _MOST_ELEMENT:
                line += text.count("\n", at, begin)
                raise DataError(
                    f"{path}: the element of the array in line {line} is no JSON ({reason}); "
                    "repair it, or write one object a line"
                )
            text, at = text[at:] + more, 0
            continue
        line += text.count("\n", at, begin)
        yield line, element if isinstance(element, dict) else _no_object(element)
        line += text.count("\n", begin, end)
        at, separator = end, ","


def _skip_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return found.end() if found else at


def _parse(text: str) -> Record | str:
    try:
        record = json.loads(text, object_pairs_hook=_record)
    except InputError as error:
        return str(error)
    except (ValueError, RecursionError) as error:
        return f"no JSON ({first_line(error)}); write one object a line"
    return record if isinstance(record, dict) else _no_object(record)


def _no_object(value: Any) -> str:
    return f"a {type(value).__name__}; expected an object such as " + '{"answer": "yes"}'


def _record(pairs: list[tuple[str, Any]]) -> Record:
    if twice := _repeated([name for name, _ in pairs]):
        raise InputError(f"the name {quote(twice)} is there twice; rename or delete one")
    return dict(pairs)


def _repeated(names: list[str]) -> str | None:
    if len(set(names)) == len(names):
        return None
    return next((name for name, count in Counter(names).items() if count > 1), None)
