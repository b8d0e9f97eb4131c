"""Base weights: files with frozen parameters, which checkpoints name and do not store.

A checkpoint has a `BaseRecord` of each base: where its files are and their sha256. When it is
opened, `locate` finds the files and checks them. `slam_jax.training.pretrained` reads them.
"""

import dataclasses
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jax
import numpy as np

from slam_jax.errors import InputError, first_line, shorten
from slam_jax.runtime.files import sha256
from slam_jax.training.state import TrainState
from slam_jax.training.trainable import Tree, merge, names_in, partition


class BaseRecord(NamedTuple):
    """What a checkpoint stores of a base.

    name: such as "model.decoder.pretrained". path: the folder of its files. files: their sha256 by
    their name in the folder. prefix: of the paths of its parameters.
    """

    name: str
    path: str
    files: Mapping[str, str]
    prefix: tuple[str, ...]

    @classmethod
    def from_json(cls, value: Any) -> "BaseRecord":
        """Raises InputError where a checkpoint has something else."""
        fields = {"name": str, "path": str, "files": dict, "prefix": list}
        ok = isinstance(value, dict) and value.keys() == fields.keys()
        ok = ok and all(isinstance(value[name], kind) for name, kind in fields.items())
        texts = (*value["files"], *value["files"].values(), *value["prefix"]) if ok else ()
        inside = ok and all(
            not PurePath(name).is_absolute() and ".." not in PurePath(name).parts
            for name in map(str, value["files"])
        )
        if not inside or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"bases.json has {shorten(repr(value), 80)}; expected {', '.join(fields)}"
            )
        return cls(value["name"], value["path"], value["files"], tuple(value["prefix"]))


class Base(NamedTuple):
    """Files that provide parameters of a model.

    arrays: shape and stored dtype of each by its name below `record.prefix`, such as
    "layers/0/mlp/up/kernel" (names of single layers). load: takes a nested dict of some of these,
    as shapes with a dtype and a sharding below the prefix, in which layers may be stacked; returns
    the same structure with arrays of JAX or NumPy. They are cast and placed here unless they fit
    already; the run deletes those of JAX.
    """

    record: BaseRecord
    arrays: Mapping[str, jax.ShapeDtypeStruct]
    load: Callable[[Tree], Tree]

    @property
    def provided(self) -> dict[str, jax.ShapeDtypeStruct]:
        """`arrays` by their whole names."""
        return {"/".join((*self.record.prefix, name)): x for name, x in self.arrays.items()}


Bases = Sequence[Base]


def sha256_of(folder: str | Path, names: Sequence[str]) -> dict[str, str]:
    """The sha256 of files in a folder, by name. Links to files are followed.

    Raises InputError for what is missing, is no file or cannot be read.
    """
    found = {}
    for name in names:
        path = Path(folder) / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputError(f"{path}: not a file; expected a file of base weights")
            found[name] = sha256(path)
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path}: {first_line(error)}; give the folder that has the base weights now as "
                "--base=FOLDER"
            ) from None
    return found


def locate(records: Sequence[Any], moved: Sequence[str | Path] = ()) -> dict[str, BaseRecord]:
    """The records of a checkpoint by name, each with the folder that has its files unchanged.

    records: as JSON holds them. moved: folders in which to look first, also for a folder in them
    with the name of the stored one; or files, for the folders that they are in.

    Raises InputError, naming the file, where one is missing or has another sha256.
    """
    found = {}
    for value in records:
        record = BaseRecord.from_json(value)
        problems = []
        for folder in _candidates(record, moved):
            problem = _difference(record, folder)
            if problem is None:
                found[record.name] = record._replace(path=str(folder))
                break
            problems.append(problem)
        else:
            # A file that was changed says more than one that is elsewhere.
            changed = [each for each in problems if "sha256" in str(each)]
            raise (changed or problems)[0]
    return found


def _candidates(record: BaseRecord, moved: Sequence[str | Path]) -> list[Path]:
    folders = [each.parent if each.is_file() else each for each in map(Path, moved)]
    named = [folder / Path(record.path).name for folder in folders]
    return [*folders, *named, Path(record.path)]


def _difference(record: BaseRecord, folder: Path) -> InputError | None:
    for name, expected in record.files.items():
        try:
            found = sha256_of(folder, [name])[name]
        except InputError as error:
            return error
        if found != expected:
            return InputError(
                f"{folder / name}: its sha256 is {found[:12]} and was {expected[:12]}; give the "
                f"file that {record.name} was loaded from, or its folder as --base=FOLDER"
            )
    return None


def provided_by(bases: Bases) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and stored dtype of all parameters that bases provide, by name."""
    return {name: x for base in bases for name, x in base.provided.items()}


def without_bases(state: TrainState, bases: Bases) -> TrainState:
    """The state as checkpoints have it: without the frozen parameters that bases provide."""
    if not bases or not state.frozen:
        return state
    stored = partition(state.frozen, provided_by(bases))[0]
    return dataclasses.replace(state, frozen=stored or None)


def records_of(bases: Bases, frozen: Tree | None) -> list[dict[str, Any]]:
    """What a checkpoint has to store about the bases that provide some of the frozen parameters."""
    names = names_in(frozen)
    return [each.record._asdict() for each in bases if names & each.provided.keys()]


def load_bases(bases: Bases, like: Tree | None) -> Tree:
    """The parameters among `like` that bases provide, in its structure, dtypes and shardings.

    like: a tree of shapes with shardings. Raises InputError where a base gives something else.
    """
    loaded: Tree = {}
    for base in bases:
        wanted = partition(like or {}, base.provided)[1]
        if not wanted:
            continue
        keys: list[Any] = []  # those of the prefix, in which layers of a list have numbers
        for _ in base.record.prefix:
            [(key, wanted)] = wanted.items()
            keys.append(key)
        arrays = base.load(wanted)
        if jax.tree.structure(arrays) != jax.tree.structure(wanted):
            raise InputError(f"{base.record.path}: other parameters than {base.record.name} has")
        arrays = jax.tree.map(_placed, arrays, wanted)
        for key in reversed(keys):
            arrays = {key: arrays}
        loaded = merge(loaded, arrays)
    return loaded


def _placed(x: Any, like: Any) -> jax.Array:
    if x.shape != like.shape:
        raise InputError(f"base weights of shape {list(x.shape)}; expected {list(like.shape)}")
    if isinstance(x, jax.Array):
        return jax.device_put(x.astype(like.dtype), like.sharding)
    # A step deletes its state, which must not be the memory of others.
    return jax.device_put(np.asarray(x, like.dtype), like.sharding, may_alias=False)
