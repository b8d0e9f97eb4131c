"""The header of a GGUF file: its metadata, and where each tensor is.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the library
`gguf` believes every count and length of a file. Here each of them is compared with the size of the
file before anything is read or allocated.
"""

import functools
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from slam_jax.errors import InputError, first_line, is_whole, shorten

# The largest vocabularies have 260,000 tokens and 510,000 merges, which take 15 MB.
_LARGEST_HEADER = 1 << 26  # bytes
_MOST_STRINGS = 1 << 21
_MOST_ENTRIES = 1 << 16
_LONGEST_NAME = 1 << 10  # bytes
_VERSIONS = (2, 3)

_BOOL, _STRING, _ARRAY = 7, 8, 9
# The numbers' types, as `struct` and NumPy name them.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}
_NUMBERS |= {6: "f", 12: "d", _BOOL: "?"}


class Block(NamedTuple):
    """Where a tensor is in the file.

    kind: the type of its elements, see `gguf.GGMLQuantizationType`. shape: rows first. offset and
    num_bytes: in the file.
    """

    kind: int
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class Header(NamedTuple):
    """The metadata of a file by their names, and its tensors by theirs.

    Metadata are numbers, texts, lists of texts, or arrays of numbers.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Block]

    def wrong(self, key: str, expected: str) -> InputError:
        value = self.metadata.get(key)
        value = value[:100] if isinstance(value, str) else value
        value = f"{len(value):,} values" if isinstance(value, (list, np.ndarray)) else repr(value)
        return InputError(f"{self.file}: {shown(key)} is {shorten(value, 80)}; expected {expected}")


def library() -> ModuleType:
    """The library `gguf`. Raises InputError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise InputError("GGUF files need gguf: pip install 'slam_jax[gguf]'") from None
    return gguf


def shown(name: str) -> str:
    """A name from a file, safe to print."""
    return shorten(name if name and name.isprintable() else repr(name), 120)


@functools.cache
def _sizes(kind: int) -> tuple[int, int]:
    """The values and the bytes of a block. Raises an error for a type that is not dequantised."""
    gguf = library()
    quantisation = gguf.GGMLQuantizationType(kind)
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), quantisation)
    return per_block, block_bytes


def read_header(file: Path) -> Header:
    """The header of a GGUF file of version 2 or 3, little-endian.

    Raises InputError for a file that is not one, that ends too early, or whose tensors do not fit
    it: each is inside of the file, no two share bytes, and all types can be dequantised.
    """
    try:
        if file.exists() and not file.is_file():
            raise InputError(f"{file}: expected a file")
        with file.open("rb") as stream:
            return _Reader(file, stream, file.stat().st_size).header()
    except (OSError, ValueError) as error:  # ValueError: the path has a null byte
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: {first_line(error)}; expected a GGUF file") from None


class _Reader:
    """Reads a header from its beginning. Nothing is read beyond the end of the file."""

    def __init__(self, file: Path, stream: BinaryIO, size: int):
        self.file, self.stream, self.size = file, stream, size
        self.position = self.strings = 0

    def header(self) -> Header:
        if self.take(min(4, self.size), "the file") != b"GGUF":
            raise self.wrong("it does not begin with GGUF; expected a GGUF file")
        version = self.number("I", "the version")
        if version not in _VERSIONS:
            swapped = version & 0xFFFF == 0
            found = "its numbers are big-endian" if swapped else f"it has version {version}"
            raise self.wrong(f"{found}; expected a little-endian GGUF file of version 2 or 3")
        num_tensors = self.count("Q", "tensors", _MOST_ENTRIES, least_bytes=24)
        num_values = self.count("Q", "metadata", _MOST_ENTRIES, least_bytes=13)
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self.string("the name of a value", _LONGEST_NAME)
            if key in metadata:
                raise self.wrong(f"{shown(key)} is there twice; expected one")
            metadata[key] = self.value(self.number("I", "a type"), shown(key))
        alignment = metadata.get("general.alignment", 32)
        if not is_whole(alignment) or not 0 < alignment <= self.size:
            raise self.wrong("general.alignment is no number of bytes within the file")
        infos = self.infos(num_tensors)
        start = -(-self.position // alignment) * alignment
        return Header(self.file, metadata, self.blocks(infos, start, alignment))

    def infos(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """The shape, type and offset of each tensor, as they are in the file."""
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self.string("the name of a tensor", _LONGEST_NAME)
            if name in infos:
                raise self.wrong(f"the tensor {shown(name)} is there twice; expected one")
            axes = self.number("I", "the number of axes")
            if not 1 <= axes <= 4:
                raise self.wrong(f"{shown(name)} has {axes:,} axes; expected 1 to 4")
            shape = tuple(self.number("Q", "a size") for _ in range(axes))[::-1]
            infos[name] = shape, self.number("I", "a type"), self.number("Q", "an offset")
        return infos

    def blocks(self, infos: Mapping[str, Any], start: int, alignment: int) -> dict[str, Block]:
        """Where the tensors are. Raises InputError for any that is not in a place of its own."""
        blocks = {}
        for name, (shape, kind, offset) in infos.items():
            if offset % alignment:
                raise self.wrong(f"{shown(name)} is not aligned to {alignment} bytes")
            num_bytes = self.num_bytes(shown(name), shape, kind)
            if start + offset + num_bytes > self.size:
                place = f"{num_bytes:,} bytes at {start + offset:,}"
                raise self.wrong(f"{shown(name)} has {place}, and the file only {self.size:,}")
            blocks[name] = Block(kind, shape, start + offset, num_bytes)
        end = 0
        for name, block in sorted(blocks.items(), key=lambda item: item[1].offset):
            if block.offset < end:
                raise self.wrong(f"{shown(name)} begins inside of another tensor")
            end = block.offset + block.num_bytes
        return blocks

    def num_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        try:
            per_block, block_bytes = _sizes(kind)
        except (KeyError, NotImplementedError, ValueError):
            raise self.wrong(f"{name} has type {kind}, which gguf cannot dequantise") from None
        if 0 in shape or shape[-1] % per_block:
            rows = f"rows of a multiple of {per_block:,} values"
            raise self.wrong(f"{name} is {list(shape)}; expected {rows}, and at least one")
        return math.prod(shape) // per_block * block_bytes

    def value(self, kind: int, key: str) -> Any:
        """A value of the metadata. float32 become the shortest decimals that round to them."""
        if kind in _NUMBERS:
            number = self.number(_NUMBERS[kind], key)
            return float(str(np.float32(number))) if _NUMBERS[kind] == "f" else number
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY:
            raise self.wrong(f"{key} has the unknown type {kind}")
        kind = self.number("I", key)
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind]).newbyteorder("<")
            count = self.count("Q", key, self.size, dtype.itemsize)
            return np.frombuffer(self.take(count * dtype.itemsize, key), dtype)
        if kind != _STRING:
            nested = (
                "arrays in an array" if kind == _ARRAY else f"values of the unknown type {kind}"
            )
            raise self.wrong(f"{key} has {nested}; expected numbers or texts")
        count = self.count("Q", key, _MOST_STRINGS - self.strings, least_bytes=8)
        self.strings += count
        return [self.string(key) for _ in range(count)]

    def count(self, kind: str, what: str, most: int, least_bytes: int) -> int:
        """A number of things. Raises InputError where the rest of the file has no room for them."""
        count = self.number(kind, what)
        if count > min(most, (self.size - self.position) // least_bytes):
            size = f"a file of {self.size:,} bytes"
            raise self.wrong(f"it says that there are {count:,} {what}, too many for {size}")
        return count

    def string(self, what: str, longest: int = _LARGEST_HEADER) -> str:
        length = self.number("Q", what)
        if length > longest:
            raise self.wrong(f"{what} has {length:,} bytes; expected at most {longest:,}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is not UTF-8") from None

    def number(self, kind: str, what: str) -> Any:
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}"), what))
        return value

    def take(self, count: int, what: str) -> bytes:
        """The next bytes. `what`: they are."""
        self.position += count
        if min(self.position, self.size) > _LARGEST_HEADER:
            raise self.wrong(f"its header is larger than {_LARGEST_HEADER:,} bytes")
        taken = b"" if self.position > self.size else self.stream.read(count)
        if len(taken) < count:
            raise self.wrong(f"the file ends inside of {what}; expected a whole GGUF file")
        return taken

    def wrong(self, problem: str) -> InputError:
        return InputError(f"{self.file}: {problem}")
