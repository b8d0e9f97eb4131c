"""Finds, checks and reads published weights: *.safetensors files in a folder.

Only JSON and arrays are read. Nothing in the folder is executed.
"""

import dataclasses
import json
import logging
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from slam_jax.errors import InputError, first_line, shorten
from slam_jax.runtime.files import read_limited

_INDEX = "model.safetensors.index.json"
# In bytes. Of DeepSeek-V3, which has 91,000 tensors, the index has 9 MB.
_LARGEST_CONFIG, _LARGEST_INDEX = 1 << 20, 1 << 24
# Older libraries saved these constants with the weights; they follow from the configuration.
_CONSTANTS = "rotary_emb.inv_freq"
# No variant such as model.fp16.safetensors, and no adapter.
_OWN = re.compile(r"model[^.]*\.safetensors")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHOWN = 5

_NUMPY: dict[str, Any] = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
}


class Stored(NamedTuple):
    """A stored tensor. dtype: as safetensors spells it, such as "F32", "BF16" or "F8_E4M3"."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@runtime_checkable
class Source(Protocol):
    """Where weights come from.

    name: what errors name. stored: the tensors by their published names. read: the tensor of that
    shape. It may have more bits than the stored dtype says, which is the one that parameters get.
    It may be a view of a file, of which only the parts that are used are read.
    """

    @property
    def name(self) -> Path: ...

    @property
    def stored(self) -> Mapping[str, Stored]: ...

    def read(self, key: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Weights:
    """The *.safetensors files of a folder, as a `Source`.

    name: the folder. starts: where the bytes of each tensor begin in its file.
    """

    name: Path
    stored: Mapping[str, Stored]
    starts: Mapping[str, int]

    def read(self, key: str) -> np.ndarray:
        """A read-only view of the file. Raises InputError for a dtype that is no float or int8."""
        file, shape, dtype = self.stored[key]
        if dtype not in _NUMPY:
            raise InputError(f"{file}: {shown(key)} is {dtype}; expected F32, BF16 or F16")
        if not math.prod(shape):
            return np.empty(shape, _NUMPY[dtype])
        try:
            mapped = np.memmap(file, _NUMPY[dtype], "r", self.starts[key], shape)
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: {first_line(error)}; expected a safetensors file") from None
        return np.asarray(mapped)

    def without(self, prefixes: tuple[str, ...]) -> "Weights":
        """Those whose names do not begin so; one warning says that the others are not read."""
        kept = {key: found for key, found in self.stored.items() if not key.startswith(prefixes)}
        if count := len(self.stored) - len(kept):
            names = ", ".join(f"{prefix}*" for prefix in prefixes)
            logging.getLogger("slam_jax").warning(
                "%s: %d weights are not read, which predict further tokens (%s)",
                *(self.name, count, names),
            )
        return dataclasses.replace(self, stored=kept)


@dataclasses.dataclass(frozen=True)
class _Fewer:
    """A source of which only some tensors are read."""

    source: Source
    stored: Mapping[str, Stored]

    @property
    def name(self) -> Path:
        return self.source.name

    def read(self, key: str) -> np.ndarray:
        return self.source.read(key)


def without_head(
    source: Source, head: str = "lm_head.weight", embeddings: str = "model.embed_tokens.weight"
) -> Source:
    """The source without an output head, for a model whose head is its table of embeddings.

    Some files have it nevertheless. A warning says so where it is not equal to the embeddings.
    """
    if head not in source.stored or embeddings not in source.stored:
        return source
    shapes = [source.stored[key].shape for key in (head, embeddings)]
    equal = shapes[0] == shapes[1]
    if equal and len(shapes[0]) == 2:  # else the model names the shape that it expected
        ours, theirs = source.read(embeddings), source.read(head)
        blocks = (slice(i, i + 1_024) for i in range(0, len(ours), 1_024))
        equal = all(np.array_equal(ours[each], theirs[each]) for each in blocks)
    if not equal:
        logging.getLogger("slam_jax").warning(
            "%s: %s is not read: config.json says tie_word_embeddings, and it differs from %s",
            *(source.name, head, embeddings),
        )
    return _Fewer(source, {key: found for key, found in source.stored.items() if key != head})


def require_as_many(source: Source, config: Any, *fields: str) -> None:
    """Raises InputError for a count of the configuration that is larger than that of weights.

    A mistyped size must not build a model that is far larger than the files.
    """
    for field in fields:
        count, most = getattr(config, field, 0), len(source.stored)
        if count > most:
            expected = f"but there are only {most:,} weights"
            raise InputError(f"{source.name}: config.json has {field} {count:,}, {expected}")


def find_folder(folder: str | Path) -> Path:
    """The folder of a published model. Raises InputError for the name of a model on the hub."""
    if not os.path.lexists(folder) and _HUB_NAME.fullmatch(name := str(folder)):
        raise InputError(
            f"{shorten(name, 200)}: no such folder; if it is a model of the hub, download it with "
            f"`hf download {shorten(name, 200)} --local-dir DIR`, and give DIR"
        )
    return Path(folder)


def find_weights(folder: Path) -> Weights:
    """The weights of a folder. Only the headers of its files are read.

    The index decides which files are read; without one those named model*.safetensors, or the only
    one of another name. One warning names the other *.safetensors, such as adapters and variants.

    Raises InputError where there are none, or they are no safetensors.
    """
    stored, starts = {}, {}
    for file in _files(folder):
        for key, (found, start) in _read_header(file).items():
            if key.endswith(_CONSTANTS):
                continue
            if key in stored:
                raise InputError(f"{folder}: {shown(key)} is in two files; expected one")
            stored[key], starts[key] = found, start
    return Weights(folder, stored, starts)


def read_json(path: Path, largest: int = _LARGEST_CONFIG) -> Any:
    """What a JSON file has. Raises InputError for none, or one of more than `largest` bytes."""
    try:
        return json.loads(read_limited(path, largest))
    except InputError as error:
        if path.exists():
            raise
        raise InputError(f"{error}; expected the folder of a published model") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({first_line(error)})") from None


def shown(key: str) -> str:
    """A key from a file, safe to print."""
    return shorten(key if key and key.isprintable() else repr(key), 120)


def _files(folder: Path) -> list[Path]:
    """The files with weights; see `find_weights`."""
    try:
        each = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    except OSError as error:
        raise InputError(f"{folder}: {first_line(error)}; expected a folder") from None
    each = [name for name in each if not name.startswith(".")]  # macOS adds files ._NAME
    if os.path.lexists(folder / _INDEX):
        names = _indexed(folder)
    elif not each:
        raise InputError(f"{folder}: no *.safetensors; expected the weights beside config.json")
    else:
        names = [name for name in each if _OWN.fullmatch(name)] or each
        if len(names) > 1 and not _OWN.fullmatch(names[0]):
            raise InputError(
                f"{folder}: which files have the weights? There is neither {_INDEX} nor "
                f"model.safetensors, but {_listed(names)}; remove the others"
            )
    if others := [name for name in each if name not in names]:
        logging.getLogger("slam_jax").warning(
            "%s: %s %s not read", folder, _listed(others), "is" if len(others) == 1 else "are"
        )
    return [folder / name for name in names]


def _indexed(folder: Path) -> list[str]:
    """The files that the index names."""
    index = read_json(folder / _INDEX, _LARGEST_INDEX)
    names = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(names, Mapping) or not names:
        raise InputError(f"{folder / _INDEX}: no weight_map; expected keys and their files")
    files = sorted(set(map(str, names.values())))
    for name in files:
        plain = len(name) <= 255 and name == Path(name).name and "\0" not in name
        if not plain or not (folder / name).is_file():
            found = shorten(repr(name), 120)
            raise InputError(f"{folder / _INDEX}: {found} is not a file of the folder")
    return files


def _listed(names: list[str]) -> str:
    return ", ".join(map(shown, names[:_SHOWN])) + (", .." if len(names) > _SHOWN else "")


def _read_header(file: Path) -> dict[str, tuple[Stored, int]]:
    """Each tensor of a file, and where its bytes begin."""
    try:
        if not file.is_file():  # a directory, a pipe, a device, or a link to nothing
            raise InputError(f"{file}: not a file; expected a safetensors file")
        with open(file, "rb") as opened:
            length = struct.unpack("<Q", opened.read(8).ljust(8, b"\0"))[0]
            if length > _LARGEST_INDEX:
                problem = f"a header of {length:,} bytes, at most {_LARGEST_INDEX:,} are read"
                raise InputError(f"{file}: {problem}; expected a safetensors file")
            header = opened.read(length)
        # The library checks that the tensors are as long as they say, and cover the file.
        with safe_open(file, framework="numpy"):
            tensors = json.loads(header)
    except InputError:
        raise
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: {first_line(error)}; expected a safetensors file") from None
    tensors.pop("__metadata__", None)
    return {
        key: (Stored(file, tuple(x["shape"]), x["dtype"]), 8 + length + x["data_offsets"][0])
        for key, x in sorted(tensors.items())
    }
