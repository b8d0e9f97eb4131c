"""Low-rank adapters (LoRA) of the linear maps of any model.

Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685), section 4.1.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slam_jax.errors import ConfigError, require, require_count
from slam_jax.layers.linear import Linear
from slam_jax.layers.precision import upcast
from slam_jax.layers.quantized_array import is_quantized
from slam_jax.layers.stacked import names_of
from slam_jax.patterns import matching

_KIND = "linear map (experts and embeddings have no adapters)"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the linear maps that one of the patterns matches.

    rank: r of the two factors A and B; 0 = no adapters. alpha: alpha / r is the factor of x A B.
    patterns: of the paths of linear maps, as in `OptimizerConfig.train`, such as
      "decoder/language_model/blocks/*/attention/query". They name single layers.
    """

    rank: int = 0
    alpha: float = 16.0
    patterns: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "patterns", tuple(self.patterns))
        require_count("lora.rank", self.rank, least=0, most=1 << 16)
        positive = math.isfinite(self.alpha) and self.alpha > 0
        require(positive, "lora.alpha", self.alpha, "a number above 0")
        some = "some, or () while lora.rank is 0"
        require(bool(self.rank) == bool(self.patterns), "lora.patterns", self.patterns, some)


def add_lora(
    model: nnx.Module, rank: int, alpha: float | int, patterns: Sequence[str], rngs: nnx.Rngs
) -> None:
    """Gives the linear maps that the patterns match adapters, which change no output at first.

    A starts uniform in +-1/sqrt(inputs), as in peft, and B at 0. Both are float32 or wider. Each
    layer of a stack starts with the same values as that layer alone.

    model: any, such as a language model; it is changed. rank, alpha, patterns: see `LoraConfig`.

    Raises ConfigError for a pattern that matches no linear map, or a part of stacked layers.
    """
    linears = dict(_linears(model))
    names = {name for path in linears for name in names_of(path)[0]}
    chosen, key = matching(names, patterns, "lora.patterns", _KIND), rngs.params()
    for path, linear in linears.items():
        layers, axis = names_of(path)
        wanted = [layer for layer in layers if layer in chosen]
        if not wanted:
            continue
        if is_quantized(linear.kernel):
            raise ConfigError(
                f"lora.patterns match {path}, which is quantised; adapt it before that"
            )
        if len(wanted) < len(layers):
            raise ConfigError(
                f"lora.patterns match {wanted[0]} and not all layers that are stacked with it; "
                "set model.scan_layers=False, or choose all of them"
            )
        _adapt(linear, rank, [_key_of(key, layer) for layer in layers], axis)
        linear.lora_scale = alpha / rank


def merge_lora(model: Any) -> Any:
    """The model with the adapters added to its kernels, W + alpha / r A B, and without adapters.

    Kernels keep their dtype, so those of bfloat16 are rounded. `model` itself is not changed.
    """
    if all(linear.lora_a is None for _, linear in _linears(model)):
        return model
    merged: Any = nnx.merge(*nnx.split(model))
    for _, linear in _linears(merged):
        if linear.lora_a is not None:
            # A new variable, since the old one is that of `model` too.
            linear.kernel = nnx.Param(linear.weight.astype(linear.kernel.dtype))
            del linear.lora_a, linear.lora_b, linear.lora_scale
    config: Any = getattr(merged, "config", None)
    if isinstance(getattr(config, "lora", None), LoraConfig):
        merged.config = dataclasses.replace(config, lora=LoraConfig())
    return merged


def is_adapter(name: str) -> bool:
    """Whether this is the path of a parameter of an adapter."""
    return name.rsplit("/", 1)[-1] in ("lora_a", "lora_b")


def _linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """All linear maps by their paths."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield "/".join(map(str, path)), module


def _adapt(linear: Linear, rank: int, keys: list[Any], axis: int | None) -> None:
    """keys: of the layers that are stacked along `axis`, or one of a layer alone."""
    shape, dtype = linear.kernel.shape, upcast(linear.kernel.dtype)
    outputs = len(shape) - linear.out_axes
    inputs = outputs - linear.in_axes
    of_layer = (*shape[:outputs], rank)
    if axis is not None:
        of_layer = (*of_layer[:axis], *of_layer[axis + 1 :])
    bound = math.prod(shape[inputs:outputs]) ** -0.5
    a = [jax.random.uniform(key, of_layer, dtype, -bound, bound) for key in keys]
    linear.lora_a = nnx.Param(a[0] if axis is None else jnp.stack(a, axis))
    linear.lora_b = nnx.Param(jnp.zeros((*shape[:inputs], rank, *shape[outputs:]), dtype))


def _key_of(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
