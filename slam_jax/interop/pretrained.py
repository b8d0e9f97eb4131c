"""Reads and writes published weights: a folder with config.json and *.safetensors.

Only JSON and arrays are read. Nothing in the folder is executed.
"""

import dataclasses
import json
import logging
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slam_jax.errors import InputError, first_line, shorten, writing
from slam_jax.interop.formats import make_layout, read_config, skipped_layers, write_config
from slam_jax.interop.tensors import Layout, Params
from slam_jax.language_models import make_model

_INDEX = "model.safetensors.index.json"
_LARGEST_CONFIG, _LARGEST_INDEX = 1 << 20, 1 << 25  # bytes; DeepSeek-V2 has an index of 3 MB
_DTYPES = ("F32", "BF16", "F16")
# Older libraries saved these constants with the weights; they follow from the configuration.
_CONSTANTS = "rotary_emb.inv_freq"
_SHOWN = 5

# The file, shape and dtype of each stored tensor.
_Stored = dict[str, tuple[Path, tuple[int, ...], str]]


class Weights(NamedTuple):
    """The weights in a folder: its files, and what their headers say."""

    folder: Path
    files: list[Path]
    stored: _Stored

    def without(self, prefixes: tuple[str, ...]) -> "Weights":
        """Those whose names do not begin so; one warning says that the others are not read."""
        kept = {key: found for key, found in self.stored.items() if not key.startswith(prefixes)}
        if count := len(self.stored) - len(kept):
            names = ", ".join(f"{prefix}*" for prefix in prefixes)
            logging.getLogger("slam_jax").warning(
                "%s: %d weights are not read, which predict further tokens (%s)",
                *(self.folder, count, names),
            )
        return self._replace(stored=kept)

    def require_as_many(self, config: Any, *fields: str) -> None:
        """Raises InputError for a count of the configuration that is larger than that of weights.

        A mistyped size must not build a model that is far larger than the files.
        """
        for field in fields:
            count, most = getattr(config, field, 0), len(self.stored)
            if count > most:
                expected = f"but there are only {most:,} weights"
                raise InputError(f"{self.folder}: config.json has {field} {count:,}, {expected}")


def load_pretrained(
    folder: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    scan_layers: bool | None = None,
) -> tuple[Any, Any]:
    """The model in a folder downloaded from the hub, and its configuration.

    model_type may be each of `slam_jax.interop.formats.FORMATS`. Experts may be one tensor each, or
    one tensor for all experts of a layer. Tensors are read one by one, and a parameter is sent to
    the device when it is complete, so the host holds only the parameters that are being read, such
    as the stacked experts of one layer.

    Args:
      dtype: of the computation. param_dtype: of the parameters, None = as config.json says, with
        float32 for float16. scan_layers: whether equal layers are stacked, see
        `LanguageModelConfig`; the host then holds the whole model while it is read.

    Raises:
      InputError, ConfigError: names what in the folder is missing, left over, of another shape or
        not understood; nothing is loaded then.
    """
    folder = Path(folder)
    data = read_json(folder / "config.json")
    kind, config = read_config(data)
    options: Any = dict(dtype=dtype, scan_layers=scan_layers)
    config = dataclasses.replace(config, param_dtype=param_dtype or config.param_dtype, **options)
    weights = find_weights(folder).without(skipped_layers(data, kind, config))
    fused = any(key.endswith("experts.gate_up_proj") for key in weights.stored)
    weights.require_as_many(config, "num_layers", *(() if fused else ("num_experts",)))
    model = fill(
        lambda: make_model(config, rngs=nnx.Rngs(0)),
        lambda shapes: make_layout(kind, config, shapes, fused=fused),
        weights,
        may_round=param_dtype is not None,
    )
    return model, config


def save_pretrained(
    model: Any, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes a model as its publisher would: config.json and one or several *.safetensors.

    Settings of training that the publisher's configuration has no field for (losses, capacities)
    and the dtype of the computation are not written.

    Raises:
      InputError: the model was never published in this form, or the folder is not empty.
      WriteError: the folder cannot be written; nothing is left behind.
    """
    kind, data = write_config(model.config)
    write_folder(
        folder,
        model,
        lambda params: make_layout(kind, model.config, params),
        {"config.json": data},
        max_shard_bytes=max_shard_bytes,
    )


def find_weights(folder: Path) -> Weights:
    """Raises InputError where the folder has no weights, or they are no safetensors."""
    files = _files(folder)
    return Weights(folder, files, _headers(files))


def fill(
    make: Callable[[], Any],
    layout_of: Callable[[Params], Layout],
    weights: Weights,
    *,
    may_round: bool,
) -> Any:
    """The model that `make` makes, with stored weights; it is never built with others.

    layout_of: from the shapes of its parameters. may_round: whether parameters may have fewer bits
    than the weights. Raises InputError where weights do not fit.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    shapes: Any = flatten_dict(nnx.to_pure_dict(state))
    layout = layout_of(shapes)
    _check(layout, shapes, weights.stored, weights.folder, may_round)
    params = _assemble(layout, shapes, weights.files)
    return nnx.merge(graphdef, nnx.State(unflatten_dict(params)))


def write_folder(
    folder: str | Path,
    model: Any,
    layout_of: Callable[[Params], Layout],
    texts: Mapping[str, Any],
    *,
    max_shard_bytes: int,
) -> None:
    """Writes the parameters of a model as *.safetensors, and JSON files; see `save_pretrained`.

    layout_of: from its parameters. texts: what each JSON file has, by its name.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: it is not empty; give a new or an empty folder")
    params: Any = flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    layout = layout_of(params)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write(layout, params, temporary, max_shard_bytes)
            for name, data in texts.items():
                (temporary / name).write_text(json.dumps(data, indent=2) + "\n")
            temporary.chmod(0o755)
            os.replace(temporary, folder)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path, largest: int = _LARGEST_CONFIG) -> Any:
    """What a JSON file has. Raises InputError for none, or one of more than `largest` bytes."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: expected a file")
        if path.stat().st_size > largest:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes; expected at most {largest:,}")
        return json.loads(path.read_text(encoding="utf-8-sig"))  # some begin with a byte-order mark
    except OSError as error:
        reason = first_line(error)
        raise InputError(f"{path}: {reason}; expected the folder of a published model") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({first_line(error)})") from None


def _files(folder: Path) -> list[Path]:
    """The files with weights: those that the index names, or without an index all of them."""
    if not (folder / _INDEX).exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"{folder}: no *.safetensors; expected the weights beside config.json")
        return files
    index = read_json(folder / _INDEX, _LARGEST_INDEX)
    names = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(names, Mapping) or not names:
        raise InputError(f"{folder / _INDEX}: no weight_map; expected keys and their files")
    files = []
    for name in sorted(set(map(str, names.values()))):
        if len(name) > 255 or name != Path(name).name or not (folder / name).is_file():
            shown = shorten(repr(name), 120)
            raise InputError(f"{folder / _INDEX}: {shown} is not a file of the folder")
        files.append(folder / name)
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: {first_line(error)}; expected a safetensors file") from None


def _headers(files: list[Path]) -> _Stored:
    """The stored tensors, without constants that follow from the configuration."""
    stored: _Stored = {}
    for file in files:
        with _open(file) as tensors:
            for key in sorted(tensors.keys()):
                if key.endswith(_CONSTANTS):
                    continue
                if key in stored:
                    raise InputError(f"{file.parent}: {_shown(key)} is in two files; expected one")
                found = tensors.get_slice(key)
                stored[key] = file, tuple(found.get_shape()), found.get_dtype()
    return stored


def _shown(key: str) -> str:
    """A key from a file, safe to print."""
    return shorten(key if key.isprintable() else repr(key), 120)


def _check(layout: Layout, shapes: Params, stored: _Stored, folder: Path, may_round: bool) -> None:
    """Checks keys, shapes and dtypes; `may_round`: the caller chose the dtype of the parameters."""
    problems, missing = [], [key for key in layout if key not in stored]
    left_over = sorted(stored.keys() - layout.keys())
    for what, keys in (("missing", missing), ("left over", left_over)):
        shown = ", ".join(map(_shown, keys[:_SHOWN])) + (", .." if len(keys) > _SHOWN else "")
        problems += [f"{len(keys):,} {what} ({shown})"] if keys else []
    if problems:
        raise InputError(f"{folder}: weights do not fit config.json: {'; '.join(problems)}")
    for key, tensor in layout.items():
        (file, found, dtype), expected = stored[key], tensor.shape(shapes)
        if found != expected:
            expected = f"config.json makes it {list(expected)}"
            raise InputError(f"{file}: {key} is {list(found)}; {expected}")
        if dtype not in _DTYPES:
            raise InputError(f"{file}: {key} is {dtype}; expected one of {', '.join(_DTYPES)}")
        rounds = any(shapes[path].dtype == jnp.bfloat16 for path in tensor.paths)
        if rounds and dtype != "BF16" and not may_round:
            raise InputError(
                f"{file}: {key} is {dtype}, and config.json makes it BF16: bits would be lost; "
                "choose a dtype with param_dtype"
            )


def _assemble(layout: Layout, shapes: Params, files: list[Path]) -> dict[Any, jax.Array]:
    """Reads all tensors, and puts each parameter on the device when its last part was read."""
    left = Counter(path for tensor in layout.values() for path in tensor.paths)
    unfinished, params = {}, {}
    for file in files:
        with _open(file) as tensors:
            for key in sorted(layout.keys() & set(tensors.keys())):
                tensor = layout[key]
                parts = tensor.parts(tensors.get_tensor(key), shapes)
                for path, part in zip(tensor.paths, parts, strict=True):
                    if path not in unfinished:
                        unfinished[path] = np.empty(shapes[path].shape, shapes[path].dtype)
                    unfinished[path][tensor.index] = part
                    left[path] -= 1
                    if not left[path]:
                        params[path] = jax.device_put(unfinished.pop(path))
    return params


def _write(layout: Layout, params: Params, folder: Path, max_shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    size = total = 0
    for key, tensor in layout.items():
        num_bytes = math.prod(tensor.shape(params)) * params[tensor.paths[0]].dtype.itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size, total = size + num_bytes, total + num_bytes
    weight_map = {}
    for i, keys in enumerate(shards):
        part = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"model{part}.safetensors"
        weight_map |= dict.fromkeys(keys, name)
        # `publish` returns contiguous arrays: safetensors writes the memory of an array as it is.
        tensors = {key: layout[key].publish(params) for key in keys}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
