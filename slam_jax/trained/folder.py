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
from safetensors import SafetensorError

from slam_jax.data.hub_files import CONFIG
from slam_jax.data.hub_tokenizer import HubTokenizer, tokenizer_from_json
from slam_jax.errors import InputError, first_line, require, shorten, writing
from slam_jax.interop.pretrained import OWN_TYPE, is_published, write_shards
from slam_jax.interop.weights import find_weights
from slam_jax.layers.quantization import WEIGHTS as KINDS
from slam_jax.runtime.files import read_limited
from slam_jax.version import __version__

WEIGHTS, ABOUT, TOKENIZER, CARD = "model.safetensors", "config.json", "tokenizer.json", "README.md"
_OLD_ABOUT = "model.json"
"""Where versions up to 0.21 wrote what is now in config.json."""

_PUBLIC = {"uint16": "bfloat16"}
"""The dtypes in files of arrays that have others in memory."""

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_STORED = {"int8": ("I8",), "uint16": ("BF16",)}
SHIPPED = ("quickstart",)
"""Models that come with the package, made by the configs of these names."""

_MOST_BYTES = 1 << 24  # of a file of JSON
_FIELDS = {"config": dict, "step": int, "max_new_tokens": int, "aux": dict | None}


class Trained(NamedTuple):
    """What a folder holds besides the weights.

    config: of the run, as nested dicts. step: of the checkpoint. max_new_tokens: the longest answer
    of the training data in tokens, its <eos> included. aux: the format of auxiliary vectors, None
    where they have no names. tokenizer: its JSON. weights: as `slam_jax.quantize`
    takes them.
    """

    config: dict[str, Any]
    step: int
    max_new_tokens: int
    aux: dict[str, Any] | None
    tokenizer: str
    weights: str = "float32"


def find_folder(model: str | Path) -> Path | None:
    """The folder of a trained model: one of `SHIPPED`, unless there is a folder of that name, or
    the path of a folder that `write_folder` wrote. None for anything else."""
    path = Path(model)
    if str(model) in SHIPPED and not path.exists():
        return Path(__file__).with_name(str(model))
    if (path / _OLD_ABOUT).is_file():
        return path
    config = path / ABOUT
    return path if config.is_file() and not is_published(path) else None


def write_folder(
    folder: str | Path,
    trained: Trained,
    weights: Mapping[str, Any],
    card: str,
    *,
    dtype: str | None = "float16",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model as a new folder.

    weights: arrays by name. card: the text of its README.md. dtype: of the stored weights, None =
    that of each array.

    Raises:
      InputError: the folder is not empty, or a weight is too large for the dtype.
      WriteError: the folder cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    known = dtype is None or dtype in DTYPES
    require(known, "dtype", dtype, f"None or one of {', '.join(DTYPES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: it is not empty; give a new or an empty folder")
    kinds = {
        name: jnp.dtype(dtype or _PUBLIC.get(x.dtype.name, x.dtype)) for name, x in weights.items()
    }
    sizes = {name: kinds[name].itemsize * x.size for name, x in weights.items()}

    def stored(name: str) -> np.ndarray:
        array = _converted(np.asarray(weights[name]), kinds[name])
        if not np.isfinite(array).all():
            raise InputError(f"{name} has weights that {dtype} cannot hold; take another dtype")
        return array

    about = {"model_type": OWN_TYPE, "slam_jax_version": __version__}
    trained = trained._replace(config=_without_paths(trained.config))
    about |= {name: getattr(trained, name) for name in _FIELDS}
    if trained.weights != "float32":
        about["weights"] = trained.weights
    tokenizer = tokenizer_from_json(trained.tokenizer)
    texts = {TOKENIZER: trained.tokenizer}
    if isinstance(tokenizer, HubTokenizer):
        texts = tokenizer.to_files()
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            write_shards(sizes, stored, temporary, max_shard_bytes)
            (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            for name, text in {**texts, CARD: card}.items():
                (temporary / name).write_text(text, encoding="utf-8")
            temporary.chmod(0o755)
            os.replace(temporary, folder)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _converted(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The numbers in this dtype; those of uint16 are bits. In C order, as they are written."""
    with np.errstate(over="ignore"):
        array = array.view(dtype) if array.dtype == np.uint16 else array.astype(dtype)
    return np.asarray(array, order="C")


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run without the folders of published parts, whose weights are here."""
    model = dict(config["model"])
    for group in ("decoder", "image"):
        if model.get(group, {}).get("pretrained") is not None:
            model[group] = {**model[group], "pretrained": None}
    return {**config, "model": model}


def read_folder(folder: Path) -> Trained:
    """All of a folder but the weights. Raises InputError where it is damaged."""
    path = folder / (_OLD_ABOUT if (folder / _OLD_ABOUT).is_file() else ABOUT)
    try:
        about = json.loads(read_limited(path, _MOST_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON ({first_line(error)})") from None
    if not isinstance(about, Mapping):
        raise InputError(f"{path}: expected an object with {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        value = about.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{path}: {name} is {shorten(repr(value), 60)}")
    fields = {name: about[name] for name in _FIELDS}
    if (weights := about.get("weights", "float32")) not in KINDS:
        found, expected = shorten(repr(weights), 60), ", ".join(KINDS)
        raise InputError(f"{path}: weights is {found}; expected one of {expected}")
    if (folder / CONFIG).exists():
        tokenizer = HubTokenizer.load(folder).to_json()
    else:
        tokenizer = read_limited(folder / TOKENIZER, _MOST_BYTES)
    return Trained(**fields, tokenizer=tokenizer, weights=weights)


def read_weights(folder: Path, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The weights of a folder in the dtypes of `shapes`, which has a shape and a dtype by name.

    Those of int8 and uint16 are stored as int8 and bfloat16.

    Raises InputError, naming what is missing, left over or of another shape.
    """
    source = find_weights(folder)
    if source.stored.keys() != shapes.keys():
        one = min(source.stored.keys() ^ shapes.keys())
        what = "have no" if one in shapes else "have an unknown"
        raise InputError(
            f"{folder}: its weights {what} {shorten(repr(one), 120)}; they fit another model"
        )
    for name, leaf in shapes.items():
        file, found, dtype = source.stored[name]
        known = _STORED.get(leaf.dtype.name, tuple(DTYPES.values()))
        if found != leaf.shape or dtype not in known:
            expected = f"{list(leaf.shape)} in one of {', '.join(known)}"
            raise InputError(f"{file}: {name} is {dtype} {list(found)}; expected {expected}")

    def array(name: str) -> np.ndarray:
        x, dtype = source.read(name), shapes[name].dtype
        return x.view(dtype) if dtype == np.uint16 else x.astype(dtype)

    return {name: array(name) for name in shapes}
