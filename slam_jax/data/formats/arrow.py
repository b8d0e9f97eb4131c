"""Data sets that the library `datasets` has saved (`save_to_disk`): Arrow files, memory-mapped."""

import contextlib
import dataclasses
import functools
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slam_jax.data.formats.base import Found, Located, StoredPicture
from slam_jax.data.formats.parquet import (
    check_rows,
    class_names,
    features_with_classes,
    import_pyarrow,
    named,
    picture_bytes,
    picture_kind,
    require_names,
    state_of,
)
from slam_jax.data.records import DataError
from slam_jax.data.splits import SPLIT_NAMES
from slam_jax.errors import UserError, first_line

_ROWS_AT_ONCE = 1_024
_MOST_BATCH_BYTES = 1 << 28
_DICTIONARY, _ROWS = 2, 3  # kinds of messages
_MOST_STATE_BYTES = 1 << 24
_COMPARED_BYTES = 1 << 32


def saved_dataset(folder: Path) -> Found | None:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote; None if it is none.

    Source: the library `datasets`, arrow_dataset.py and dataset_dict.py.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _read_json(folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(map(_is_name, names)):
            raise DataError(f"{folder / 'dataset_dict.json'} names no splits; save it again")
        parts = [(SPLIT_NAMES.get(name.lower(), ""), folder / name) for name in names]
    elif (folder / "state.json").is_file():
        parts = [("", folder)]
    else:
        return None
    files: list[tuple[str, Path]] = []
    for split, part in parts:
        files += [(split, file) for file in _files_of(part)]
    paths = tuple(file for _, file in files)
    compared = sum(file.stat().st_size for file in paths) <= _COMPARED_BYTES
    read = functools.partial(_read, tuple(files))
    return Found("data set saved by `datasets`", folder, paths, read, compared=compared)


def _files_of(folder: Path) -> list[Path]:
    state = _read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(f"{folder} holds a selection of rows; save `flatten_indices()` of it")
    files = state.get("_data_files")
    files = files if isinstance(files, list) else []
    names = [x.get("filename") for x in files if isinstance(x, dict)]
    if not names or not all(map(_is_name, names)):
        raise DataError(f"{folder / 'state.json'} names no files of the folder; save it again")
    paths = [folder / str(name) for name in names]
    if missing := [path for path in paths if not path.is_file()]:
        raise DataError(f"{missing[0]} is missing; save the data set again")
    return paths


def _is_name(name: Any) -> bool:
    """Whether it names a file or a folder here, and not elsewhere."""
    return isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _MOST_STATE_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}); save it again") from error


def _read(files: Sequence[tuple[str, Path]]) -> Iterator[Located]:
    rows = size = 0
    for split, file in files:
        table = _open(str(file))
        rows, size = rows + table.num_rows, size + file.stat().st_size
        check_rows(file, rows, size)
        pictures = {field.name: kind for field in table.schema if (kind := picture_kind(field))}
        classes = class_names(table.schema.metadata)
        if not classes and (file.parent / "dataset_info.json").is_file():
            classes = features_with_classes(_read_json(file.parent / "dataset_info.json"))
        plain = table.select([name for name in table.schema.names if name not in pictures])
        try:
            step = _rows_at_once(plain.schema, file.stat().st_size)
            for start in range(0, table.num_rows, step):
                count = min(step, table.num_rows - start)
                counts = {
                    name: _counts(table.column(name).slice(start, count), kind)
                    for name, kind in pictures.items()
                }
                records = plain.slice(start, count).to_pylist() or [{} for _ in range(count)]
                for i, record in enumerate(records):
                    for name, found in counts.items():
                        place = str(file), start + i, name
                        record[name] = _pictures(found[i], place)
                    if split:
                        record["split"] = split
                    yield Located(file, start + i + 1, named(record, classes))
        except UserError:
            raise
        except Exception as error:  # of Arrow, or of a value that Python cannot hold
            raise DataError(f"{file} cannot be read ({first_line(error)})") from error


def _rows_at_once(schema: Any, size: int) -> int:
    """So many rows that their values take at most 256 MiB, where types let rows share a value."""
    kinds = " ".join(map(str, schema.types))
    shared = any(word in kinds for word in ("dictionary", "run_end", "view"))
    return (
        max(1, min(_ROWS_AT_ONCE, _MOST_BATCH_BYTES // max(1, size))) if shared else _ROWS_AT_ONCE
    )


def _counts(column: Any, kind: str) -> list[int | None]:
    """The number of pictures of each value of a list, -1 of one that is no list, None of a null."""
    if kind == "several":
        # Offsets say the lengths; the values, which hold the bytes, are not looked at.
        compute: Any = import_pyarrow().compute
        return compute.list_value_length(column).to_pylist()
    return [-1 if valid else None for valid in column.is_valid().to_pylist()]


def _pictures(count: int | None, place: tuple[str, int, str]) -> Any:
    if count is None or count < 0:
        return None if count is None else ArrowPicture(*place)
    return [ArrowPicture(*place, i) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class ArrowPicture(StoredPicture):
    """A picture of a row of a file; index: its place in a list, None where it is no list."""

    file: str
    row: int
    column: str
    index: int | None = None

    @property
    def identity(self) -> str:
        return f"{self.file}, row {self.row}, {self.column} {self.index}"

    def read_bytes(self) -> bytes:
        value = _open(self.file).column(self.column)[self.row].as_py()
        return picture_bytes(value, self.index, Path(self.file))


def _open(file: str) -> Any:
    """The table of a file, whose pages the system reads when they are needed."""
    return _open_as(file, state_of(file))


def _messages(reader: Any) -> Iterator[Any]:
    with contextlib.suppress(StopIteration):
        while True:
            yield reader.read_next_message()


def is_compressed(metadata: Any) -> bool:
    """Whether the buffers of a message of an Arrow stream are compressed.

    The columns of a stream are read as they lie in the file, without a copy; compressed ones may
    become any size. pyarrow does not tell, so this reads the flatbuffer.
    Source: the Arrow project, format/Message.fbs.
    """
    data = memoryview(metadata)

    def follow(place: int) -> int:
        return place + struct.unpack_from("<I", data, place)[0]

    def field(table: int, number: int) -> int:
        """The place of a field of a table; 0 where it is left out."""
        fields = table - struct.unpack_from("<i", data, table)[0]
        length = struct.unpack_from("<H", data, fields)[0]
        slot = 4 + 2 * number
        offset = struct.unpack_from("<H", data, fields + slot)[0] if slot + 2 <= length else 0
        return table + offset if offset else 0

    message = follow(0)
    kind, header = data[field(message, 1)], follow(field(message, 2))
    if kind == _DICTIONARY:
        header = follow(field(header, 1))
    return kind in (_DICTIONARY, _ROWS) and field(header, 3) != 0


@functools.lru_cache(maxsize=64)
def _open_as(file: str, state: tuple[int, int, int]) -> Any:
    arrow = import_pyarrow()
    try:
        source = arrow.memory_map(file)
        # A file is a stream with 8 bytes before it and a footer.
        start = 8 if source.read(6) == b"ARROW1" else 0
        source.seek(start)
        for message in _messages(arrow.ipc.MessageReader.open_stream(source)):
            if is_compressed(message.metadata):
                raise DataError(f"{file} is compressed; save it without compression")
        source.seek(start)
        table = arrow.ipc.open_stream(source).read_all()
        # Offsets that lead out of the file would end the process.
        table.validate(full=True)
        require_names(table.schema.names, file)
        return table
    except DataError:
        raise
    except Exception as error:  # ArrowInvalid, OSError and others
        raise DataError(f"{file} is no Arrow file ({first_line(error)})") from error
