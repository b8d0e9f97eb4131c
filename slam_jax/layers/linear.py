"""The linear map between features of any shape."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from slam_jax.kernels.row_product import quantized_product
from slam_jax.layers.precision import upcast
from slam_jax.layers.quantized_array import dequantize, is_quantized
from slam_jax.layers.remat import LINEAR

Shape = int | tuple[int, ...]
Initializer = jax.nn.initializers.Initializer
"""How weights start: a function (key, shape, dtype) -> array, such as `jax.nn.initializers` has."""

LECUN_NORMAL = jax.nn.initializers.lecun_normal()


def project(
    x: Float[Array, "..."], kernel: Float[Array, "..."], in_axes: int = 1
) -> Float[Array, "..."]:
    """Contracts the last `in_axes` axes of x with the first `in_axes` axes of the kernel.

    The result has the name that `slam_jax.layers.remat` stores.
    """
    return checkpoint_name(_contract(x, kernel, in_axes), LINEAR)


def _contract(x: jax.Array, kernel: jax.Array, in_axes: int) -> jax.Array:
    contracted = tuple(range(x.ndim - in_axes, x.ndim)), tuple(range(in_axes))
    return jax.lax.dot_general(x, kernel, (contracted, ((), ())))


def project_to_float32(
    x: Float[Array, "*B I"], kernel: Float[Array, "I O"]
) -> Float[Array, "*B O"]:
    """x @ kernel with sums and result in float32 or wider; the kernel is cast to the dtype of x.

    For logits: in bfloat16 a logit of 16 would be rounded by up to 0.06.
    """
    dtype = upcast(x.dtype)
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=dtype)


class Linear(nnx.Module):
    """y = x W (+ b), from features of shape `in_features` to `out_features` (ints or tuples).

    Attention uses tuples: `Linear(D, (N, H))` gives heads, `Linear((N, H), D)` takes them back.
    The kernel has the shape (*in_features, *out_features). It is initialised by `kernel_init` as a
    matrix of the same number of inputs and outputs, times `init_scale`.

    `slam_jax.layers.lora.add_lora` gives it an adapter: y = x W + lora_scale (x A) B (+ b) with
    `lora_a` A of shape (*in_features, r) and `lora_b` B of shape (r, *out_features). The leading
    axes of a stack of maps come before these.

    `slam_jax.quantize` makes the kernel int8 with a `scale` of shape (*out_features,), or uint16,
    the bits of bfloat16; see `slam_jax.layers.quantized_array`. Such a map has no adapter.
    """

    # Class attributes, so that maps without these have no further ones of their own.
    scale: nnx.Param | None = None
    lora_a: nnx.Param | None = None
    lora_b: nnx.Param | None = None
    lora_scale: float = 1.0

    def __init__(
        self,
        in_features: Shape,
        out_features: Shape,
        *,
        use_bias: bool = False,
        init_scale: float = 1.0,
        kernel_init: Initializer = LECUN_NORMAL,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        inputs, outputs = (
            (shape,) if isinstance(shape, int) else tuple(shape)
            for shape in (in_features, out_features)
        )
        self.in_axes, self.out_axes, self.dtype = len(inputs), len(outputs), dtype
        fan_in, fan_out = math.prod(inputs), math.prod(outputs)
        kernel = init_scale * kernel_init(rngs.params(), (fan_in, fan_out), param_dtype)
        self.kernel = nnx.Param(kernel.reshape(*inputs, *outputs))
        self.bias = nnx.Param(jnp.zeros(outputs, param_dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        x = x.astype(self.dtype)
        if is_quantized(self.kernel):
            return self._with_bias(self._quantized_product(x).astype(self.dtype))
        y = project(x, self.kernel[...].astype(self.dtype), self.in_axes)
        if self.lora_a is not None and self.lora_b is not None:
            low = project(x, self.lora_a[...].astype(self.dtype), self.in_axes)
            # Not stored for the gradient: it is as large as y, and recomputed from few numbers.
            y = y + self.lora_scale * _contract(low, self.lora_b[...].astype(self.dtype), 1)
        return self._with_bias(y)

    def logits(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """The outputs without the bias, in float32 or wider; see `project_to_float32`."""
        if is_quantized(self.kernel):
            return self._quantized_product(x)
        return project_to_float32(x, self.weight)

    def _quantized_product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.kernel[...]
        outputs, batch = kernel.shape[self.in_axes :], x.shape[: x.ndim - self.in_axes]
        flat = kernel.reshape(-1, math.prod(outputs))
        y = quantized_product(x.reshape(*batch, len(flat)), flat).reshape(*batch, *outputs)
        if self.scale is None:
            return y
        return y * jax.lax.broadcast_to_rank(self.scale[...].astype(y.dtype), y.ndim)

    def _with_bias(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.bias is None:
            return y
        return y + jax.lax.broadcast_to_rank(self.bias[...].astype(self.dtype), y.ndim)

    @property
    def summed_axes(self) -> tuple[int, ...]:
        """The axes of the kernel that a product sums over, also of a stack of maps."""
        outputs = self.kernel.ndim - self.out_axes
        return tuple(range(outputs - self.in_axes, outputs))

    @property
    def weight(self) -> Float[Array, "..."]:
        """The kernel with its adapter, W + lora_scale A B, also of a stack of maps.

        Without an adapter it is the kernel, in float32 if that is quantised. Otherwise it has the
        wider dtype of the two.
        """
        kernel = self.kernel[...]
        if is_quantized(kernel):
            scale = None if self.scale is None else self.scale[...]
            return dequantize(kernel, scale, self.summed_axes)
        if self.lora_a is None or self.lora_b is None:
            return kernel
        a, b = self.lora_a[...], self.lora_b[...]
        stack = kernel.shape[: kernel.ndim - self.in_axes - self.out_axes]
        a, b = a.reshape(*stack, -1, a.shape[-1]), b.reshape(*stack, a.shape[-1], -1)
        product = jnp.matmul(a, b, precision="highest")
        return kernel + self.lora_scale * product.reshape(kernel.shape)
