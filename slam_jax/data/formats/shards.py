"""Tar shards as WebDataset writes them, read by an index of where each file begins."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slam_jax.data.formats.base import (
    HUB_NAMES,
    MOST_PICTURE_BYTES,
    Found,
    Located,
    Record,
    StoredPicture,
)
from slam_jax.data.formats.classes import PICTURES
from slam_jax.data.records import DataError
from slam_jax.data.splits import split_of_name
from slam_jax.errors import InputError, WriteError, first_line, write_whole

_BLOCK = 512
_TEXTS = ("json", "txt", "cls")
_MOST_TEXT_BYTES = 1 << 20
_MOST_HEADER_BYTES = 1 << 16
_MOST_INDEX_BYTES = 1 << 30
_INDEX_VERSION = 1
_ADVICE = "expected a .tar that is not compressed"
_NAMES: Mapping[str, tuple[str, ...]] = {
    **HUB_NAMES,
    "image": ("image", *(suffix[1:] for suffix in PICTURES)),
    # `.cls` is a class, `.txt` a caption; a question in `.json` is about one of them.
    "answer": ("answer", "answers", "cls", "label", "caption", "txt", "text"),
    "text": ("text", "context", "txt"),
}


class Member(NamedTuple):
    """A file in a tar: its name, and the offset and the number of its bytes."""

    name: str
    offset: int
    size: int


def tar_shards(path: Path, files: Sequence[Path], cache: Path | None) -> Found:
    """The files of one key make a row: pictures, and `.json`, `.txt` or `.cls`.

    The headers alone are read, once: the index is kept in the folder `cache`, if it can be. A name
    such as `train-0000.tar` says the split; otherwise the key decides, as comparing pictures would
    read everything. Source: github.com/webdataset/webdataset, "The WebDataset Format".
    """
    read = functools.partial(_read, path, tuple(files), cache)
    return Found("WebDataset shards", path, tuple(files), read, _NAMES, compared=False)


def _read(path: Path, files: Sequence[Path], cache: Path | None) -> Iterator[Located]:
    for file in files:
        inside = file.relative_to(path) if path.is_dir() else Path(file.name)
        split, line = split_of_name(inside), 0
        with _opening(file) as descriptor:
            for key, members in _samples(index_of(file, cache)):
                line += 1
                record = _record(descriptor, file, f"{inside} {key}", members)
                if split and isinstance(record, dict):
                    record["split"] = split
                yield Located(file, line, record)


def _samples(members: Sequence[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Neighbours of one key, by extension. A key is a path up to the first dot of its name."""
    key, files = "", {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if not stem or not suffix:
            continue
        new = f"{folder}/{stem}" if folder else stem
        if new != key and files:
            yield key, files
            files = {}
        key = new
        files[suffix.lower()] = member
    if files:
        yield key, files


def _record(
    descriptor: int, file: Path, identity: str, members: Mapping[str, Member]
) -> Record | str:
    record: Record = {}
    pictures: dict[str, TarPicture] = {}
    for suffix, member in members.items():
        last = suffix.rpartition(".")[2]
        if f".{last}" in PICTURES:
            place = str(file), member.offset, member.size
            pictures[suffix] = TarPicture(*place, f"{identity} {suffix}")
        if last not in _TEXTS:
            continue
        if member.size > _MOST_TEXT_BYTES:
            return (
                f"{member.name:.200}: {member.size:,} bytes; at most {_MOST_TEXT_BYTES:,} are read"
            )
        try:
            text = os.pread(descriptor, member.size, member.offset).decode()
            found = json.loads(text) if last == "json" else text.strip()
        except (ValueError, RecursionError) as error:
            return f"{member.name:.200} is no {last} ({first_line(error)})"
        if isinstance(found, dict):
            record = {**found, **record}
        elif last == "json":
            return f"{member.name:.200}: a {type(found).__name__}; expected an object"
        else:
            record[suffix] = found
    if len(pictures) == 1:
        [pictures["image"]] = pictures.values()
    return {**record, **pictures}


@dataclasses.dataclass(frozen=True)
class TarPicture(StoredPicture):
    """A picture in a tar file. key: of its sample, with the shard and the extension."""

    file: str
    offset: int
    size: int
    key: str

    @property
    def identity(self) -> str:
        return self.key

    def read_bytes(self) -> bytes:
        if self.size > MOST_PICTURE_BYTES:
            raise InputError(f"a picture of {self.size:,} bytes; at most 256 MiB are read")
        with _opening(Path(self.file)) as descriptor:
            return os.pread(descriptor, self.size, self.offset)


class _opening:
    """A file descriptor, without a buffer that would read ahead."""

    def __init__(self, file: Path):
        self._file = file

    def __enter__(self) -> int:
        try:
            self._descriptor = os.open(self._file, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self._file} cannot be read ({first_line(error)})") from error
        return self._descriptor

    def __exit__(self, *_: Any) -> None:
        os.close(self._descriptor)


def index_of(file: Path, cache: Path | None = None) -> list[Member]:
    """The files in a tar, from the folder `cache` if its index is there and the tar is unchanged.

    Raises DataError: it is no tar, or breaks off.
    """
    state = file.stat()
    stamp = [_INDEX_VERSION, state.st_size, state.st_mtime_ns]
    name = hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:32]
    kept = None if cache is None else cache / f"{name}.json"
    if kept is not None and kept.is_file() and kept.stat().st_size <= _MOST_INDEX_BYTES:
        try:
            found = json.loads(kept.read_text(encoding="utf-8"))
            if found["stamp"] == stamp:
                return [Member(*each) for each in found["members"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # a damaged index is made again
    with _opening(file) as descriptor:
        members = list(_headers(file, descriptor, state.st_size))
    if kept is not None:
        with contextlib.suppress(WriteError):  # it is made again next time
            write_whole(kept, json.dumps({"stamp": stamp, "members": members}))
    return members


def _headers(file: Path, descriptor: int, size: int) -> Iterator[Member]:
    """The files of a tar. Between two headers nothing is read."""
    at, name, length = 0, None, None
    if size < _BLOCK:
        raise DataError(f"{file}: no tar header at byte 0; {_ADVICE}")
    while at + _BLOCK <= size:
        block = os.pread(descriptor, _BLOCK, at)
        if block == bytes(_BLOCK):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise DataError(
                f"{file}: no tar header at byte {at:,} ({first_line(error)}); {_ADVICE}"
            ) from error
        start = at + _BLOCK
        if header.size < 0:
            raise DataError(f"{file}: a file of {header.size:,} bytes at byte {at:,}")
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            if header.size > _MOST_HEADER_BYTES:
                raise DataError(f"{file}: a name of {header.size:,} bytes at byte {at:,}")
            content = os.pread(descriptor, header.size, start)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                name, length = _extended(content, name, length)
        elif header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            found = Member(name or header.name, start, header.size if length is None else length)
            if found.size < 0 or start + found.size > size:
                raise DataError(f"{file} breaks off in {found.name!r:.200}; copy it again")
            yield found
        taken = header.size
        if header.type not in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            taken = taken if length is None else length
            name = length = None
        at = start + -(-taken // _BLOCK) * _BLOCK


def _extended(
    content: bytes, name: str | None, length: int | None
) -> tuple[str | None, int | None]:
    """The name and the size that an extended header (POSIX pax) gives to the next file."""
    at = 0
    while at < len(content):
        digits, _, _ = content[at : at + 8].partition(b" ")
        # The shortest record is "5 a=\n".
        if not digits.isdigit() or len(digits) > 6 or int(digits) < 5:
            break
        record = content[at + len(digits) + 1 : at + int(digits) - 1]
        key, _, value = record.partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit() and len(value) < 20:
            length = int(value)
        at += int(digits)
    return name, length
