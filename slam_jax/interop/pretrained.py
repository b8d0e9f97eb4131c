"""Published weights in and out: a folder with config.json and *.safetensors.

Only JSON and arrays are read. Nothing in the folder is executed.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from slam_jax.errors import InputError, first_line, writing
from slam_jax.interop.configs import read_config, write_config
from slam_jax.interop.layouts import LAYOUTS, Layout
from slam_jax.language_models import make_model

_INDEX = "model.safetensors.index.json"
_LARGEST_JSON = 1 << 28  # an index of every expert of every layer is some tens of megabytes
# Constants that older libraries saved beside the weights; they follow from the configuration.
_CONSTANTS = "rotary_emb.inv_freq"
_SHOWN = 5

Params = dict[tuple[str | int, ...], Any]


def load_pretrained(
    folder: str | Path, *, dtype: str = "float32", param_dtype: str | None = None
) -> tuple[Any, Any]:
    """The model of a folder as it is on the hub, and its configuration.

    model_type may be llama, mixtral, jamba, deepseek_v2, hunyuan or hunyuan_v1_moe. Experts may be
    one tensor each, or one for all of a layer. Tensors are read one by one, and each parameter goes
    to the device when it is whole: beside the model there is never more than one of them.

    Args:
      dtype: of the computation. param_dtype: of the parameters, None = as config.json says.

    Raises:
      InputError, ConfigError: what in the folder is missing, left over, of another shape or not
        understood; nothing is loaded then.
    """
    folder = Path(folder)
    kind, config = read_config(_read_json(folder / "config.json"))
    changes = {"dtype": dtype} | ({} if param_dtype is None else {"param_dtype": param_dtype})
    config = _replace(config, changes)
    model = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    shapes: Params = flatten_dict(nnx.to_pure_dict(state))
    files = _files(folder)
    headers = {key: file for file in files for key in _keys(file)}
    _check_once(files, headers)
    stored = {key for key in headers if not key.endswith(_CONSTANTS)}
    fused = any(key.endswith("experts.gate_up_proj") for key in stored)
    layout = LAYOUTS[kind](config, fused=fused)
    _check_keys(layout, stored, folder)
    _check_shapes(layout, shapes, files)
    params = _assemble(layout, shapes, files)
    return nnx.merge(graphdef, nnx.State(unflatten_dict(params))), config


def save_pretrained(
    model: Any, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes a model as its publisher would: config.json and one or several *.safetensors.

    What training adds (losses and capacities that the publisher's configuration has no word for)
    and the dtype of the computation are not part of it.

    Raises:
      InputError: the model was never published in this form, or the folder is not empty.
      WriteError: it cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    kind, data = write_config(model.config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: there is something; give a new or an empty folder")
    params: Params = flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    layout = LAYOUTS[kind](model.config)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write(layout, params, temporary, max_shard_bytes)
            (temporary / "config.json").write_text(json.dumps(data, indent=2) + "\n")
            temporary.chmod(0o755)
            os.replace(temporary, folder)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes; expected a short JSON file")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = first_line(error)
        raise InputError(f"{path}: {reason}; expected the folder of a published model") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({first_line(error)})") from None


def _replace(config: Any, changes: Mapping[str, Any]) -> Any:
    return type(config)(**{**vars(config), **changes})


def _files(folder: Path) -> list[Path]:
    """The shards: those of the index where there is one, else all *.safetensors."""
    if not (folder / _INDEX).exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"{folder}: no *.safetensors; expected the weights beside config.json")
        return files
    index = _read_json(folder / _INDEX)
    names = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(names, Mapping) or not names:
        raise InputError(f"{folder / _INDEX}: no weight_map; expected keys and their files")
    files = []
    for name in sorted(set(map(str, names.values()))):
        if name != Path(name).name or not (folder / name).is_file():
            raise InputError(f"{folder / _INDEX}: {name!r} is no file of the folder")
        files.append(folder / name)
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="flax")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: {first_line(error)}; expected a safetensors file") from None


def _keys(file: Path) -> list[str]:
    with _open(file) as tensors:
        return list(tensors.keys())


def _check_once(files: list[Path], headers: Mapping[str, Path]) -> None:
    if sum(len(_keys(file)) for file in files) > len(headers):
        raise InputError(f"{files[0].parent}: a weight is in two files; expected each once")


def _check_keys(layout: Layout, stored: set[str], folder: Path) -> None:
    missing = [key for key in layout if key not in stored]
    left_over = sorted(stored - layout.keys())
    told = [
        f"{len(keys):,} {what} ({', '.join(keys[:_SHOWN])}{', ..' if len(keys) > _SHOWN else ''})"
        for what, keys in (("missing", missing), ("left over", left_over))
        if keys
    ]
    if told:
        raise InputError(f"{folder}: weights do not fit config.json: {'; '.join(told)}")


def _check_shapes(layout: Layout, shapes: Params, files: list[Path]) -> None:
    for file in files:
        with _open(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                if key not in layout:
                    continue
                found = tuple(tensors.get_slice(key).get_shape())
                expected = layout[key].shape(shapes)
                if found != expected:
                    raise InputError(
                        f"{file}: {key} is {list(found)}; config.json makes it {list(expected)}"
                    )


def _assemble(layout: Layout, shapes: Params, files: list[Path]) -> Params:
    left = dict.fromkeys(shapes, 0)
    for tensor in layout.values():
        for piece in tensor.pieces:
            left[piece.path] += 1
    unfinished: Params = {}
    params: Params = {}
    for file in files:
        with _open(file) as tensors:
            for key in sorted(tensors.keys()):
                if key not in layout:
                    continue
                parts = layout[key].parts(_read(tensors, key), shapes)
                for piece, part in zip(layout[key].pieces, parts, strict=True):
                    path, like = piece.path, shapes[piece.path]
                    if path not in unfinished:
                        unfinished[path] = np.empty(like.shape, like.dtype)
                    unfinished[path][... if piece.index is None else piece.index] = part
                    left[path] -= 1
                    if not left[path]:
                        params[path] = jax.device_put(unfinished.pop(path))
    return params


def _read(tensors: Any, key: str) -> np.ndarray:
    # Only JAX's arrays have bfloat16 for this library; the device is not to hold what passes by.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(tensors.get_tensor(key))


def _write(layout: Layout, params: Params, folder: Path, max_shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    size = total = 0
    for key, tensor in layout.items():
        first = params[tensor.pieces[0].path]
        num_bytes = int(np.prod(tensor.shape(params))) * first.dtype.itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size, total = size + num_bytes, total + num_bytes
    weight_map = {}
    for i, keys in enumerate(shards):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(keys, name)
        tensors = {key: layout[key].publish(params) for key in keys}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
