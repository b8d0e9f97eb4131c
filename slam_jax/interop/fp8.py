"""Weights in eight bits with a scale for each block, as DeepSeek-V3 publishes them.

Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report" (arXiv 2412.19437), section 3.3, and the
fields of `FineGrainedFP8Config` in transformers.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slam_jax.errors import InputError
from slam_jax.interop.fields import Field, Group, only
from slam_jax.interop.weights import Source, Stored, shown

_KEY = "quantization_config"
_DTYPE, _SCALE = "F8_E4M3", "_scale_inv"
_SCALE_DTYPES = ("F32", "BF16", "F16")
Block = tuple[int, int] | None


def _read_block(group: Group, key: str) -> Block:
    """The rows and columns of a block. Null is one scale for each tensor."""
    value: Any = group.data.get(key, [128, 128])
    sizes = value if isinstance(value, list) else [0]
    if value is not None and (len(sizes) != 2 or not all(type(x) is int and x > 0 for x in sizes)):
        raise group.wrong(key, "two whole numbers, or null")
    return None if value is None else (sizes[0], sizes[1])


_FIELDS = (
    only("fmt", "e4m3"),
    # The other scheme rounds activations with stored scales.
    only("activation_scheme", "dynamic"),
    # Which numbers the scales may be; the files have them as floats.
    only("scale_fmt", "float", "ue8m0"),
    only("expert_dtype", "fp8"),
    Field("weight_block_size", "block", read=_read_block),
)
# The files say which weights have scales.
_HARMLESS = {"dequantize", "modules_to_convert", "modules_to_not_convert"}


def dequantise(source: Source, block: Block) -> Source:
    """A source in which each weight of eight bits is multiplied by its scales when it is read.

    They count as bfloat16, and `read` gives float32. block: the rows and columns that share a
    scale, None = one scale for each weight. The last block of a row or column may be shorter.

    Raises InputError for a weight without scales, or with scales of another shape.
    """
    narrow = [key for key, found in source.stored.items() if found.dtype == _DTYPE]
    for key in narrow:
        _check_scale(source, key, block)
    scales = {key + _SCALE for key in narrow}
    stored = {key: found for key, found in source.stored.items() if key not in scales}
    stored |= {key: stored[key]._replace(dtype="BF16") for key in narrow}
    logging.getLogger("slam_jax").info(
        "%s: %d weights are %s, and are dequantised", source.name, len(narrow), _DTYPE
    )
    return _Dequantised(source, stored, block)


@dataclasses.dataclass(frozen=True)
class _Dequantised:
    source: Source
    stored: Mapping[str, Stored]
    block: Block

    @property
    def name(self) -> Path:
        return self.source.name

    def read(self, key: str) -> np.ndarray:
        tensor = self.source.read(key)
        if self.source.stored[key].dtype != _DTYPE:
            return tensor
        scale = self.source.read(key + _SCALE).astype(np.float32)
        if self.block is None:
            return tensor.astype(np.float32) * scale.reshape(())
        (rows, columns), width = self.block, tensor.shape[-1]
        result = np.empty(tensor.shape, np.float32)
        for i in range(scale.shape[-2]):
            part = np.s_[..., i * rows : (i + 1) * rows, :]
            each = np.repeat(scale[..., i, :], min(columns, width), axis=-1)[..., :width]
            np.multiply(tensor[part].astype(np.float32), each[..., None, :], out=result[part])
        return result


def _check_scale(source: Source, key: str, block: Block) -> None:
    file, shape, _ = source.stored[key]
    name, scale = shown(key + _SCALE), source.stored.get(key + _SCALE)
    if scale is None:
        raise InputError(f"{file}: {shown(key)} is {_DTYPE}, but there is no {name}")
    if scale.dtype not in _SCALE_DTYPES:
        expected = f"expected one of {', '.join(_SCALE_DTYPES)}"
        raise InputError(f"{file}: {name} is {scale.dtype}; {expected}")
    if block is None:
        fits, expected = math.prod(scale.shape) == 1, "one number"
    else:
        grid = [-(-size // each) for size, each in zip(shape[-2:], block, strict=False)]
        expected = [*shape[:-2], *grid]
        fits = len(shape) >= 2 and [*scale.shape] == expected
    if not fits:
        problem = f"{name} is {list(scale.shape)}; expected {expected}"
        raise InputError(f"{file}: {problem}, as the weight is {list(shape)}")


def read_quantization(data: Any) -> tuple[Any, tuple[Block] | None]:
    """config.json without its `quantization_config`, and the size of blocks, None = no such field.

    Raises InputError for every other kind of quantization, naming the field.
    """
    if not isinstance(data, Mapping) or not data.get(_KEY):
        return data, None
    if not isinstance(data[_KEY], Mapping):
        raise Group(data).wrong(_KEY, "a group of fields")
    group = Group(data[_KEY], f"{_KEY}.")
    if group.data.get("quant_method") != "fp8":
        raise group.wrong("quant_method", "'fp8', which is all that is built")
    found = group.read(_FIELDS)
    known = {"quant_method"} | {field.key for field in _FIELDS} | _HARMLESS
    for key in sorted(group.data.keys() - known, key=str):
        if group.data[key] is not None:
            raise group.wrong(key, "nothing: it is not built")
    return {key: value for key, value in data.items() if key != _KEY}, (found["block"],)
