"""Parquet files, with pictures as the hub stores them: columns of bytes, or of bytes and a path."""

import collections
import dataclasses
import functools
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slam_jax.data.formats.base import MOST_PICTURE_BYTES, Found, Located, Record, StoredPicture
from slam_jax.data.records import DataError
from slam_jax.data.splits import split_of_name
from slam_jax.errors import ConfigError, InputError, UserError, first_line
from slam_jax.runtime.files import require_file

_ROWS_AT_ONCE = 1_024
_MOST_BATCH_BYTES = 1 << 28
_MOST_GROUP_BYTES = 1 << 32
_LARGE_GROUP_BYTES = 1 << 26
_MOST_ROWS_OF_NO_BYTES = 1_000_000
_KEPT_BYTES = 1 << 28
_COMPARED_BYTES = 1 << 32


def import_pyarrow() -> Any:
    """`pyarrow`. Raises ConfigError with the command that installs it."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "Parquet and Arrow files are read with pyarrow, and it is not installed: "
            "`pip install 'slam_jax[parquet]'`"
        ) from None
    return pyarrow


def parquet_files(path: Path, files: Sequence[Path]) -> Found:
    """The rows of these files. A name such as `train-00000-of-00002.parquet` says the split."""
    size = sum(file.stat().st_size for file in files)
    largest = max((_picture_bytes(file) for file in files), default=0)
    check_rows(path, sum(_open(file).metadata.num_rows for file in files), size)
    notes = ()
    if largest > _LARGE_GROUP_BYTES:
        notes = (
            f"a row group has {largest / 1e6:,.0f} MB of pictures, and reading one picture reads "
            "its row group; write the files with row_group_size=100",
        )
    read = functools.partial(_read_files, path, tuple(files))
    compared = size <= _COMPARED_BYTES
    return Found("Parquet files", path, tuple(files), read, compared=compared, notes=notes)


def columns_of(file: Path) -> list[str]:
    """The names of its columns."""
    return list(_open(file).schema_arrow.names)


def _read_files(path: Path, files: Sequence[Path]) -> Iterator[Located]:
    for file in files:
        inside = file.relative_to(path) if path.is_dir() else Path(file.name)
        split = split_of_name(inside)
        for each in read_file(file):
            if split and isinstance(each.record, dict):
                each.record["split"] = split
            yield each


def read_file(file: Path) -> Iterator[Located]:
    """The records of a file. Bytes of pictures are not read."""
    opened, line = _open(file), 0
    schema = opened.schema_arrow
    pictures = {field.name: kind for field in schema if (kind := picture_kind(field))}
    # Only the paths of pictures are read here. They say how many there are.
    leaves = [opened.schema.column(i).path for i in range(len(opened.schema))]
    paths = [x for x in leaves if x.split(".")[0] in pictures and x.endswith(".path")]
    names = [name for name in schema.names if name not in pictures] + paths
    classes = class_names(schema.metadata)
    for group in range(opened.num_row_groups):
        _check_group(file, opened, group)
        first = line
        try:
            for batch in _batches(opened, group, names):
                for record in batch.to_pylist() or [{}] * batch.num_rows:
                    line += 1
                    for name, kind in pictures.items():
                        found = record.get(name, True)
                        place = str(file), group, line - 1 - first, name
                        record[name] = _pictures(found, kind, place)
                    yield Located(file, line, named(record, classes))
        except UserError:
            raise
        except Exception as error:  # of Arrow, or of a value that Python cannot hold
            raise DataError(f"{file} cannot be read ({first_line(error)})") from error


def _batches(opened: Any, group: int, names: Sequence[str]) -> Iterator[Any]:
    """The rows of a group, so many at a time that their values take at most 256 MiB.

    A file holds equal values once, in a dictionary, and Arrow repeats them in each row.
    """
    roots = {name.split(".")[0] for name in names}
    found = opened.metadata.row_group(group)
    columns = map(found.column, range(found.num_columns))
    sizes = [c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in roots]
    rows = max(1, min(_ROWS_AT_ONCE, _MOST_BATCH_BYTES // max([1, *sizes])))
    return opened.iter_batches(rows, row_groups=[group], columns=names)


def _pictures(found: Any, kind: str, place: tuple[str, int, int, str]) -> Any:
    """References to what a column holds; found: its value without the bytes, or True."""
    if kind == "several" and isinstance(found, list):
        return [ParquetPicture(*place, i) for i in range(len(found))]
    return None if found is None else ParquetPicture(*place)


def named(record: Record, classes: Mapping[str, Sequence[str]]) -> Record:
    """The record with class names in place of their numbers; -1 is no class."""
    for name, names in classes.items():
        value = record.get(name)
        if isinstance(value, int):
            record[name] = names[value] if 0 <= value < len(names) else None
    return record


def class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names of classes by column, from what the library `datasets` stores in a schema."""
    try:
        return features_with_classes(json.loads((metadata or {})[b"huggingface"])["info"])
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}


def features_with_classes(info: Any) -> dict[str, list[str]]:
    """The names of classes by column, from the content of a `dataset_info.json`."""
    features = info.get("features") if isinstance(info, dict) else None
    found = {}
    for name, feature in features.items() if isinstance(features, dict) else ():
        names = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(names, list) and feature.get("_type") == "ClassLabel":
            found[name] = list(map(str, names))
    return found


def picture_kind(field: Any) -> str | None:
    """ "one" or "several" for a column of pictures: of bytes, or of bytes and a path; else None."""
    import pyarrow.types as types

    kind, several = field.type, False
    if types.is_list(kind) or types.is_large_list(kind):
        kind, several = kind.value_type, True
    if types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        is_picture = names == {"bytes", "path"}
    else:
        is_picture = types.is_binary(kind) or types.is_large_binary(kind)
    return None if not is_picture else "several" if several else "one"


@dataclasses.dataclass(frozen=True)
class ParquetPicture(StoredPicture):
    """A picture of a row of a row group; index: its place in a list, None where it is no list."""

    file: str
    group: int
    row: int
    column: str
    index: int | None = None

    @property
    def identity(self) -> str:
        return f"{self.file}, row {self.row} of group {self.group}, {self.column} {self.index}"

    def read_bytes(self) -> bytes:
        value = _GROUPS.column(self.file, self.group, self.column)[self.row].as_py()
        return picture_bytes(value, self.index, Path(self.file))


def picture_bytes(value: Any, index: int | None, file: Path) -> bytes:
    """The bytes of a value of a column of pictures. Raises InputError where there are none."""
    if index is not None:
        value = value[index]
    if isinstance(value, dict):
        if value["bytes"] is None and value["path"]:
            return read_inside(file.parent, value["path"])
        value = value["bytes"]
    if not value:
        raise InputError("the row has no picture")
    return value


def read_inside(folder: Path, name: str) -> bytes:
    """The bytes of a picture in a folder. Raises InputError for a path that leaves the folder."""
    path = inside(folder, name)
    try:
        require_file(path, MOST_PICTURE_BYTES)
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {first_line(error)}") from error


def inside(folder: Path, name: Any) -> Path:
    """A path in a folder. Raises InputError for one that leaves it."""
    if not isinstance(name, str) or "\0" in name:
        raise InputError(f"{name!r:.100} is no path of a picture")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{name!r:.100} leads out of the folder; give a path within it")
    return folder / path


class _Groups:
    """The columns of row groups that were read last, of up to 256 MiB together, or one."""

    def __init__(self):
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[tuple[Any, ...], Any] = collections.OrderedDict()

    def column(self, file: str, group: int, name: str) -> Any:
        key = file, state_of(file), group, name
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            opened = _open(Path(file))
            _check_group(Path(file), opened, group)
            try:
                found = _read_column(file, opened, group, name)
            except UserError:
                raise
            except Exception as error:  # of Arrow
                raise InputError(f"{file} cannot be read ({first_line(error)})") from error
            self._kept[key] = found
            while sum(x.nbytes for x in self._kept.values()) > _KEPT_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
            return found


_GROUPS = _Groups()


def _read_column(file: str, opened: Any, group: int, name: str) -> Any:
    parts, size = [], 0
    for batch in _batches(opened, group, [name]):
        parts.append(batch.column(0))
        if (size := size + parts[-1].nbytes) > _MOST_GROUP_BYTES:
            raise _too_large(file, group, f"more than {_MOST_GROUP_BYTES:,}")
    kind = opened.schema_arrow.field(name).type
    return import_pyarrow().chunked_array(parts, kind)


def state_of(file: str | Path) -> tuple[int, int, int]:
    """Changes when the file is written again."""
    found = os.stat(file)
    return found.st_mtime_ns, found.st_size, found.st_ino


def check_rows(path: str | Path, rows: int, size: int) -> None:
    """Raises DataError for many rows in few bytes, which would take memory without end."""
    if rows > max(_MOST_ROWS_OF_NO_BYTES, size):
        raise DataError(
            f"{path}: {rows:,} rows in {size:,} bytes; more than {_MOST_ROWS_OF_NO_BYTES:,} rows "
            "are read where they have at least a byte each"
        )


def require_names(names: Sequence[str], file: str | Path) -> None:
    """Raises DataError for two columns of one name."""
    if len(set(names)) < len(names):
        raise DataError(f"{file}: two columns have the same name; rename or delete one")


def _open(file: Path) -> Any:
    parquet = import_pyarrow().parquet
    try:
        require_file(file)
        opened = parquet.ParquetFile(file, memory_map=True)
        require_names(opened.schema_arrow.names, file)
        return opened
    except DataError:
        raise
    except Exception as error:  # ArrowInvalid, OSError and others
        raise DataError(f"{file} is no Parquet file ({first_line(error)})") from error


def _check_group(file: Path, opened: Any, group: int) -> None:
    """Refuses a row group that would fill the memory."""
    size = opened.metadata.row_group(group).total_byte_size
    if size > _MOST_GROUP_BYTES:
        raise _too_large(file, group, f"{size:,}")


def _too_large(file: str | Path, group: int, size: str) -> DataError:
    return DataError(
        f"{file}: row group {group} has {size} bytes; at most 4 GiB are read: write it with "
        "row_group_size=100"
    )


def _picture_bytes(file: Path) -> int:
    """The bytes of the pictures of the largest row group."""
    opened = _open(file)
    pictures = {field.name for field in opened.schema_arrow if picture_kind(field)}
    most = 0
    for group in map(opened.metadata.row_group, range(opened.num_row_groups)):
        columns = map(group.column, range(group.num_columns))
        try:
            sizes = [
                c.total_uncompressed_size
                for c in columns
                if c.path_in_schema.split(".")[0] in pictures
            ]
        except Exception as error:  # names that are no text
            raise DataError(f"{file} is no Parquet file ({first_line(error)})") from error
        most = max(most, sum(sizes))
    return most
