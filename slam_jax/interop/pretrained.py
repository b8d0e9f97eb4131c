"""Reads and writes published weights: a folder with config.json and *.safetensors, or a GGUF file.

Only JSON and arrays are read. Nothing in the folder is executed.
"""

import dataclasses
import functools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from slam_jax.errors import InputError, writing
from slam_jax.interop.filling import fill, main_dtype
from slam_jax.interop.formats import make_layout, read_config, skipped_layers, write_config
from slam_jax.interop.fp8 import dequantise, read_quantization
from slam_jax.interop.gguf import GGUF
from slam_jax.interop.tensors import Layout, Params, Tensor
from slam_jax.interop.weights import (
    Source,
    find_folder,
    find_weights,
    read_json,
    require_as_many,
    without_head,
)
from slam_jax.language_models import make_model
from slam_jax.layers.lora import merge_lora
from slam_jax.layers.quantization import published_form, quantize, weights_of
from slam_jax.layers.stacked import names_of

OWN_TYPE = "slam_v3"
"""The model_type of a SLAM v3 in a config.json."""

_WEIGHTS = "slam_jax_weights"
"""The field of a config.json that says how `quantize` made the weights."""
_OWN_FIELDS: dict[str, dict[str, Any]] = {
    "bfloat16": {_WEIGHTS: "bfloat16"},
    # Other libraries refuse a method of quantization that they do not know.
    "int8": {_WEIGHTS: "int8", "quantization_config": {"quant_method": "slam_jax"}},
}

_INDEX = "model.safetensors.index.json"


class Published(NamedTuple):
    """A published model whose weights were not read yet.

    config: ours. source: of its weights. layout_of: from the shapes of its parameters to the
    tensors behind them.
    """

    config: Any
    source: Source
    layout_of: Callable[[Params], Layout]


def open_pretrained(path: str | Path) -> Published:
    """The language model in a folder of the hub or in a GGUF file; only headers are read.

    Raises InputError and ConfigError as `load_pretrained` does.
    """
    if str(path).endswith(".gguf"):
        file, fp8 = GGUF(path), None
        kind, config = read_config(file.config)
        source: Source = file
    else:
        folder = find_folder(path)
        data, fp8 = read_quantization(read_json(folder / "config.json"))
        kind, config = read_config(data)
        source = find_weights(folder).without(skipped_layers(data, kind, config))
    if fp8 is not None:
        source = dequantise(source, *fp8)
    if config.tie_embeddings:
        source = without_head(source)
    config = dataclasses.replace(config, param_dtype=main_dtype(source))
    fused = any(key.endswith("experts.gate_up_proj") for key in source.stored)
    require_as_many(source, config, "num_layers", *(() if fused else ("num_experts",)))
    layout_of = functools.partial(make_layout, kind, config, fused=fused)
    return Published(config, source, layout_of)


def load_pretrained(
    path: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    scan_layers: bool | None = None,
    mesh: Mesh | None = None,
    check_finite: bool = True,
) -> tuple[Any, Any]:
    """The model in a folder downloaded from the hub or in a GGUF file, and its configuration.

    model_type may be each of `slam_jax.interop.formats.FORMATS`. Experts may be one tensor each, or
    one tensor for all experts of a layer. Weights of eight bits with a scale for each block, as
    DeepSeek-V3 has them, become bfloat16; quantised ones of GGUF files float32. A folder that
    `save_pretrained` wrote of a model of `slam_jax.quantize` gives such a model again. One
    parameter is read after the other and sent to the device, so the host holds only that one, such
    as the stacked experts of one layer.

    Args:
      dtype: of the computation. param_dtype: of the parameters, None = that of each stored tensor,
        with float32 for float16. scan_layers: whether equal layers are stacked, see
        `LanguageModelConfig`. mesh: the devices that hold the parameters, each its own part of
        them by `slam_jax.training.sharding`; None = the default device. All processes of the mesh
        call it, and each reads only its own parts. check_finite: whether NaN and infinity in what
        is read are refused.

    Raises:
      InputError, ConfigError: names what in the folder is missing, left over, of another shape or
        not understood; nothing is loaded then.
    """
    weights = _own_weights(path)
    if weights == "int8":
        if param_dtype is not None or mesh is not None:
            raise InputError(f"{path}: its weights are int8; load it without param_dtype and mesh")
        return _load_int8(find_folder(path), dtype, scan_layers)
    found = open_pretrained(path)
    own: Any = dict(param_dtype=param_dtype or found.config.param_dtype)
    config = dataclasses.replace(found.config, dtype=dtype, scan_layers=scan_layers, **own)
    model = fill(
        lambda: make_model(config, rngs=nnx.Rngs(0)),
        found.layout_of,
        found.source,
        param_dtype=param_dtype,
        mesh=mesh,
        check_finite=check_finite,
    )
    if weights == "bfloat16" and param_dtype is None and mesh is None:
        model = quantize(model, weights)
    return model, model.config


def _own_weights(path: str | Path) -> str | None:
    """How `quantize` made the weights of a folder; None = it did not."""
    if str(path).endswith(".gguf"):
        return None
    data = read_json(find_folder(path) / "config.json")
    return data.get(_WEIGHTS) if isinstance(data, Mapping) else None


def _load_int8(folder: Path, dtype: str, scan_layers: bool | None) -> tuple[Any, Any]:
    """A model whose arrays have our names, in our shapes; see `_own_layout`."""
    data = read_json(folder / "config.json")
    _, config = read_config({key: x for key, x in data.items() if key not in _OWN_FIELDS["int8"]})
    source = find_weights(folder)
    require_as_many(source, config, "num_layers", "num_experts")
    config = dataclasses.replace(config, dtype=dtype, scan_layers=scan_layers)

    def make() -> Any:
        return quantize(make_model(config, rngs=nnx.Rngs(0)), "int8")

    model = fill(make, _own_layout, source)
    return model, model.config


def _own_layout(params: Params) -> Layout:
    """Each parameter by its own name, those of stacked layers one by one."""
    layout: Layout = {}
    for path, x in params.items():
        names, axis = names_of("/".join(map(str, path)))
        axes = " ".join(f"a{i}" for i in range(x.ndim if axis is None else x.ndim - 1))
        for i, name in enumerate(names):
            index = () if axis is None else (i,)
            layout[name] = Tensor((path,), f"{axes} -> {axes}", index)
    return layout


def is_published(path: str | Path) -> bool:
    """Whether a path is that of a GGUF file, or of a folder with the config.json of a model that is
    not SLAM v3."""
    if str(path).endswith(".gguf"):
        return True
    config = Path(path) / "config.json"
    data = read_json(config) if config.is_file() else None
    return isinstance(data, Mapping) and data.get("model_type") != OWN_TYPE


def save_pretrained(
    model: Any,
    folder: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    files: Mapping[str, str | bytes] | None = None,
) -> None:
    """Writes a model as its publisher would: config.json and one or several *.safetensors.

    files: the content of further files by name, such as those of its tokenizer.

    Settings of training that the publisher's configuration has no field for (losses, capacities)
    and the dtype of the computation are not written. Adapters are merged into their kernels. The
    config.json of a model of `slam_jax.quantize` also says how to load it. With int8 its arrays
    have our names, and no other library opens it.

    Raises:
      InputError: the model was never published in this form, or the folder is not empty.
      WriteError: the folder cannot be written; nothing is left behind.
    """
    (kind, data), weights = write_config(model.config), weights_of(model)
    own = weights == "int8"
    write_folder(
        folder,
        model if own else published_form(model),
        _own_layout if own else lambda params: make_layout(kind, model.config, params),
        {"config.json": data | _OWN_FIELDS.get(weights, {})},
        max_shard_bytes=max_shard_bytes,
        files=files,
    )


def write_folder(
    folder: str | Path,
    model: Any,
    layout_of: Callable[[Params], Layout],
    texts: Mapping[str, Any],
    *,
    max_shard_bytes: int,
    files: Mapping[str, str | bytes] | None = None,
) -> None:
    """Writes the parameters of a model as *.safetensors, and other files; see `save_pretrained`.
    Adapters are merged.

    layout_of: from its parameters. texts: what each JSON file has, by its name. files: the content
    of further files, by their names.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: it is not empty; give a new or an empty folder")
    params: Any = flatten_dict(nnx.to_pure_dict(nnx.state(merge_lora(model), nnx.Param)))
    layout = layout_of(params)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write(layout, params, temporary, max_shard_bytes)
            for name, data in texts.items():
                (temporary / name).write_text(json.dumps(data, indent=2) + "\n")
            for name, content in (files or {}).items():
                is_text = isinstance(content, str)
                (temporary / name).write_bytes(content.encode() if is_text else content)
            temporary.chmod(0o755)
            os.replace(temporary, folder)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(layout: Layout, params: Params, folder: Path, max_shard_bytes: int) -> None:
    sizes = {
        key: math.prod(tensor.shape(params)) * params[tensor.paths[0]].dtype.itemsize
        for key, tensor in layout.items()
    }
    write_shards(sizes, lambda key: layout[key].publish(params), folder, max_shard_bytes)


def write_shards(
    sizes: Mapping[str, int],
    tensor_of: Callable[[str], np.ndarray],
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """Writes tensors as model.safetensors, or as several files with an index.

    sizes: bytes of each. tensor_of: must return contiguous arrays; those of one file are in memory
    at a time.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for key, num_bytes in sizes.items():
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += num_bytes
    weight_map = {}
    for i, keys in enumerate(shards):
        part = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"model{part}.safetensors"
        weight_map |= dict.fromkeys(keys, name)
        save_file({key: tensor_of(key) for key in keys}, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors lets the owner alone read it
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
