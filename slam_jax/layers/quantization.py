"""Models with weights of fewer bits, for inference."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slam_jax.errors import InputError
from slam_jax.layers.embedding import Embedding
from slam_jax.layers.experts import ExpertLinear
from slam_jax.layers.linear import Linear
from slam_jax.layers.lora import merge_lora
from slam_jax.layers.precision import upcast
from slam_jax.layers.quantized_array import dequantize, to_bits, to_int8
from slam_jax.layers.router import Router

WEIGHTS = ("float32", "bfloat16", "int8")
"""What `quantize` makes of the weights of a model."""


def quantize(model: Any, weights: str | None) -> Any:
    """The same model with other weights, for inference alone; the given model is not changed.

    Kernels of linear maps and of experts, and tables of embeddings get the dtype `weights`, one of
    WEIGHTS. All others, such as norms, biases and routers, and all activations keep their dtype, or
    become float32 where that was of fewer bits. int8 has a scale in float32 for each output of a
    map and for each token of a table: the largest weight of each becomes 127. Adapters of LoRA are
    merged first. float32 of a quantised model are the numbers that it computes with.

    model: what `slam_jax.load` returned, a `ModelAndTokenizer`, or a model alone. weights: None
    returns `model` itself. Parameters that a mesh of devices holds stay where they are.

    Raises InputError for other weights.
    """
    if weights is None:
        return model
    if weights not in WEIGHTS:
        raise InputError(f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}")
    if isinstance(model, nnx.Module):
        return _quantized(model, weights)
    own = _quantized(model.model, weights)
    if hasattr(model, "_replace"):
        return model._replace(model=own)
    return dataclasses.replace(model, model=own)


def weights_of(model: nnx.Module) -> str:
    """How `quantize` made the weights of a model; "float32" also where it did not."""
    found = {kernel.dtype.name for _, kernel, _ in _kernels(model)}
    return "int8" if "int8" in found else "bfloat16" if "uint16" in found else "float32"


def published_form(model: Any) -> Any:
    """A model of `quantize(.., "bfloat16")` with parameters of the dtype bfloat16, as files and
    other libraries have them; any other model itself."""
    if weights_of(model) != "bfloat16":
        return model
    model = nnx.merge(*nnx.split(model))
    for module, kernel, _ in _kernels(model):
        _replace(module, jax.lax.bitcast_convert_type(kernel[...], jnp.bfloat16))
    return model


def _kernels(model: nnx.Module) -> list[tuple[Any, nnx.Param, tuple[int, ...]]]:
    """The modules with kernels or tables, these, and the axes that a product with them sums over.

    A lookup in a table sums over nothing; as a head, a table is summed over its last axis.
    """
    modules = [module for _, module in nnx.iter_modules(model)]
    routers = {id(module.scores) for module in modules if isinstance(module, Router)}
    found: list[tuple[Any, nnx.Param, tuple[int, ...]]] = []
    for module in modules:
        if isinstance(module, Linear) and id(module) not in routers:
            found.append((module, module.kernel, module.summed_axes))
        elif isinstance(module, ExpertLinear):
            found.append((module, module.kernel, (module.kernel.ndim - 2,)))
        elif isinstance(module, Embedding):
            found.append((module, module.embedding, (module.embedding.ndim - 1,)))
    return found


def _quantized(given: nnx.Module, weights: str) -> Any:
    graphdef, state = nnx.split(merge_lora(given))
    model: Any = nnx.merge(graphdef, jax.tree.map(_upcast, state))
    if hasattr(getattr(model, "config", None), "param_dtype"):
        model.config = dataclasses.replace(model.config, param_dtype="float32")
    for module, kernel, axes in _kernels(model):
        scale = None if module.scale is None else module.scale[...]
        values = _dequantize(kernel[...], scale, axes)
        if module.scale is not None:
            del module.scale
        if weights == "int8":
            values, scale = _to_int8(values, axes)
            module.scale = nnx.Param(scale)
        elif weights == "bfloat16":
            values = _to_bits(values)
        _replace(module, values)
    return model


def _replace(module: Any, values: jax.Array) -> None:
    """A new variable, since the old one is that of another model too."""
    setattr(module, "embedding" if isinstance(module, Embedding) else "kernel", nnx.Param(values))


# Compiled, so that no array of the size of a table is made for each of their steps.
_dequantize = functools.partial(jax.jit, static_argnums=2)(dequantize)
_to_int8 = functools.partial(jax.jit, static_argnums=1)(to_int8)
_to_bits = jax.jit(to_bits)


def _upcast(x: Any) -> Any:
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(upcast(x.dtype)) if is_float else x
