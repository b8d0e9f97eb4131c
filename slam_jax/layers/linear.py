"""The linear map, between any shapes of features."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from slam_jax.layers.backend import on_cpu
from slam_jax.layers.constrain import alone
from slam_jax.layers.precision import wide
from slam_jax.layers.remat import MAP

Shape = int | tuple[int, ...]
Initializer = jax.nn.initializers.Initializer
LECUN_NORMAL = jax.nn.initializers.lecun_normal()

# Of a kernel, to be added up in one pass: of fewer and larger ones the total is larger, too.
NUM_PARTS = 16
# Sizes of kernels that XLA:CPU reads on one core to multiply one row, and several read faster.
_BY_ONE_CORE = range(2**17, 2**20)


def project(
    x: Float[Array, "..."], kernel: Float[Array, "..."], in_axes: int = 1
) -> Float[Array, "..."]:
    """Contracts the last `in_axes` axes of x with the first of the kernel, as one 2-D matmul.

    Flattened here because the gradient of a matmul over several leading axes is a contraction over
    all of them, which XLA:CPU runs much slower than the same contraction over one.
    """
    lead, out = x.shape[: x.ndim - in_axes], kernel.shape[in_axes:]
    width = math.prod(kernel.shape[:in_axes])
    y = matmul(x.reshape(-1, width), kernel.reshape(width, -1))
    return checkpoint_name(y.reshape(*lead, *out), MAP)


def project_wide(x: Float[Array, "*B I"], kernel: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """The same of one axis, and the sums are kept in float32 or wider.

    For logits: rounded to bfloat16, one of 16 would be off by 0.06. Their gradient is rounded to
    the dtype of x, as that of any other product.
    """
    y = _wide_matmul(x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype))
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def matmul(x: Float[Array, "R I"], kernel: Float[Array, "I O"]) -> Float[Array, "R O"]:
    """x @ kernel, and its gradient, as they are fastest here."""
    if _is_read(x, kernel):
        return _read_product(x, kernel)
    # XLA:CPU widens bfloat16 before it multiplies, but for products that are asked for in float32.
    narrow = x.dtype == kernel.dtype == jnp.bfloat16
    return _wide_matmul(x, kernel).astype(x.dtype) if narrow and on_cpu() else x @ kernel


def _is_read(x, kernel) -> bool:
    fits = kernel.size in _BY_ONE_CORE and len(kernel) % NUM_PARTS == 0
    single = len(x) == 1 and x.dtype == kernel.dtype == jnp.float32
    return single and fits and on_cpu() and alone()


@jax.custom_jvp
def _read_product(x: Float[Array, "1 I"], kernel: Float[Array, "I O"]) -> Float[Array, "1 O"]:
    return _read_by_parts(x, kernel)


@_read_product.defjvp
def _read_product_tangent(primals, tangents):
    (x, kernel), (of_x, of_kernel) = primals, tangents
    return _read_product(x, kernel), of_x @ kernel + x @ of_kernel


@jax.custom_batching.custom_vmap
def _read_by_parts(x, kernel):
    return sum_of_parts(x[0], kernel.reshape(NUM_PARTS, -1, kernel.shape[-1]))[None]


@_read_by_parts.def_vmap
def _read_many(_, batched, x, kernel):
    # Of many rows the pass would make a total each.
    axes = tuple(0 if one else None for one in batched)
    return jax.vmap(jnp.matmul, axes)(x, kernel), True


def sum_of_parts(row: Float[Array, "I"], parts: Iterable[Float[Array, "J O"]]) -> Float[Array, "O"]:
    """row @ kernel, of a kernel in equal parts: in one pass over it they are added up to a single
    one, whose rows a product sums. XLA:CPU shares the pass out among the cores."""
    parts = tuple(parts)
    factors = row.astype(wide(row.dtype)).reshape(len(parts), -1, 1)
    total = jnp.zeros(parts[0].shape, factors.dtype)
    for factor, part in zip(factors, parts, strict=True):
        total += factor * part
    return (jnp.ones((1, len(total)), total.dtype) @ total)[0].astype(row.dtype)


def _wide_matmul(x: Float[Array, "R I"], kernel: Float[Array, "I O"]) -> Float[Array, "R O"]:
    return _narrow_matmul(x, kernel) if x.dtype == jnp.bfloat16 else _dot(x, kernel)


@jax.custom_vjp
def _narrow_matmul(x, kernel):
    return _dot(x, kernel)


def _dot(x, y):
    return jnp.dot(x, y, preferred_element_type=wide(x.dtype))


def _narrow_forward(x, kernel):
    return _dot(x, kernel), (x, kernel)


def _narrow_backward(kept, dy):
    # The gradient of a product asked for in float32 would mix it with bfloat16.
    x, kernel = kept
    dy = dy.astype(x.dtype)
    return matmul_back(dy, kernel), _dot(transposed(x), dy).astype(x.dtype)


_narrow_matmul.defvjp(_narrow_forward, _narrow_backward)


def matmul_back(dy: Float[Array, "R O"], kernel: Float[Array, "I O"]) -> Float[Array, "R I"]:
    """dy @ kernel.T; of a kernel that is transposed first, XLA:CPU makes a copy, or widens it."""
    sums = jnp.einsum("ro,io->ri", dy, kernel, preferred_element_type=wide(dy.dtype))
    return sums.astype(dy.dtype)


def transposed(x: Float[Array, "R I"]) -> Float[Array, "I R"]:
    """x.T, to be the left factor of a product in bfloat16.

    On a CPU it is written out: XLA multiplies bfloat16 as such only where the last axis of the left
    factor is contracted, and it takes x.T for another view of x.
    """
    if on_cpu() and x.dtype == jnp.bfloat16 and alone():
        return with_layout_constraint(x.T, Layout(major_to_minor=(0, 1)))
    return x.T


class Linear(nnx.Module):
    """y = x W (+ b), from features of shape `in_features` to `out_features` (ints or tuples).

    Attention uses tuples: `Linear(D, (N, H))` gives heads, `Linear((N, H), D)` takes them back.
    The kernel has the shape (*in_features, *out_features); it starts as `kernel_init` of a plain
    matrix of as many inputs and outputs, times `init_scale`.
    """

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
        self.in_axes, self.dtype = len(inputs), dtype
        fan_in, fan_out = math.prod(inputs), math.prod(outputs)
        kernel = init_scale * kernel_init(rngs.params(), (fan_in, fan_out), param_dtype)
        self.kernel = nnx.Param(kernel.reshape(*inputs, *outputs))
        self.bias = nnx.Param(jnp.zeros(outputs, param_dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = project(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.in_axes)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)
