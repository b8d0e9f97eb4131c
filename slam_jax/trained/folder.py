"""A trained model as a folder: one file of weights and two of JSON.

Only arrays and JSON are read. Nothing in the folder is executed.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slam_jax.errors import InputError, first_line, require, shorten, writing

WEIGHTS, ABOUT, TOKENIZER, CARD = "model.safetensors", "model.json", "tokenizer.json", "README.md"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHIPPED = ("quickstart",)
"""Models that come with the package, made by the configs of these names."""

_MOST_BYTES = 1 << 24  # of a file of JSON
_FIELDS = {"config": dict, "step": int, "max_new_tokens": int, "aux": dict | None}


class Trained(NamedTuple):
    """What a folder holds besides the weights.

    config: of the run, as nested dicts. step: of the checkpoint. max_new_tokens: the longest answer
    of the training data in tokens, its <eos> included. aux: the format of auxiliary vectors, None
    where they have no names. tokenizer: its JSON.
    """

    config: dict[str, Any]
    step: int
    max_new_tokens: int
    aux: dict[str, Any] | None
    tokenizer: str


def find_folder(model: str | Path) -> Path | None:
    """The folder of a trained model: one of `SHIPPED`, unless there is a folder of that name, or
    the path of a folder that `write_folder` wrote. None for anything else."""
    path = Path(model)
    if str(model) in SHIPPED and not path.exists():
        return Path(__file__).with_name(str(model))
    return path if (path / ABOUT).is_file() else None


def write_folder(
    folder: str | Path,
    trained: Trained,
    weights: Mapping[str, Any],
    card: str,
    *,
    dtype: str = "float16",
) -> None:
    """Writes a model as a new folder.

    weights: arrays by name. card: the text of its README.md. dtype: of the stored weights.

    Raises:
      InputError: the folder is not empty, or a weight is too large for the dtype.
      WriteError: the folder cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: it is not empty; give a new or an empty folder")
    arrays = {}
    for name, value in weights.items():
        value = np.asarray(value)
        with np.errstate(over="ignore"):
            # `order`: safetensors writes the memory of an array as it is.
            arrays[name] = np.asarray(value.astype(jnp.dtype(dtype)), order="C")
        if not np.isfinite(arrays[name]).all():
            raise InputError(f"{name} has weights that {dtype} cannot hold; take another dtype")
    about = {name: getattr(trained, name) for name in _FIELDS}
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            save_file(arrays, temporary / WEIGHTS)
            (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            (temporary / TOKENIZER).write_text(trained.tokenizer, encoding="utf-8")
            (temporary / CARD).write_text(card, encoding="utf-8")
            temporary.chmod(0o755)
            (temporary / WEIGHTS).chmod(0o644)  # safetensors lets the owner alone read it
            os.replace(temporary, folder)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def read_folder(folder: Path) -> Trained:
    """All of a folder but the weights. Raises InputError where it is damaged."""
    text = _read_text(folder / ABOUT)
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / ABOUT}: not JSON ({first_line(error)})") from None
    if not isinstance(about, Mapping):
        raise InputError(f"{folder / ABOUT}: expected an object with {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        value = about.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{folder / ABOUT}: {name} is {shorten(repr(value), 60)}")
    fields = {name: about[name] for name in _FIELDS}
    return Trained(**fields, tokenizer=_read_text(folder / TOKENIZER))


def read_weights(folder: Path, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The weights of a folder in the dtypes of `shapes`, which has a shape and a dtype by name.

    Raises InputError, naming what is missing, left over or of another shape.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="numpy") as tensors:
            names = set(tensors.keys())
            if names != shapes.keys():
                one = min(names ^ shapes.keys())
                what = "has no" if one in shapes else "has an unknown"
                raise InputError(f"{path} {what} {shorten(repr(one), 120)}; it fits another model")
            for name, leaf in shapes.items():
                part = tensors.get_slice(name)
                found, dtype = tuple(part.get_shape()), part.get_dtype()
                if found != leaf.shape or dtype not in DTYPES.values():
                    expected = f"{list(leaf.shape)} in one of {', '.join(DTYPES)}"
                    raise InputError(
                        f"{path}: {name} is {dtype} {list(found)}; expected {expected}"
                    )
            return {n: tensors.get_tensor(n).astype(x.dtype) for n, x in shapes.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: {first_line(error)}; expected a file of weights") from None


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise InputError(f"{path}: {size:,} bytes; expected at most {_MOST_BYTES:,}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {first_line(error)}; copy the whole folder again") from None
    except ValueError as error:
        raise InputError(f"{path}: not UTF-8 ({first_line(error)})") from None
