"""What `python -m benchmarks --device` measures, in order of importance; all of it in bfloat16.

Operations are counted as in `training`: attention whole, and a gradient as two forward passes.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import latent_cache, ours
from benchmarks.comparison import Arm, Comparison
from benchmarks.sizes import LARGER, training_flops
from benchmarks.training import ROWS
from slam_jax.batch import Batch
from slam_jax.kernels.backend import for_accelerators, has_tokamax, on_cpu
from slam_jax.kernels.fused_attention import kernel_of
from slam_jax.kernels.grouped_matmul import grouped_matmul
from slam_jax.language_models import make_config, make_model
from slam_jax.layers import flops
from slam_jax.layers.attention import attend, plain_attend
from slam_jax.layers.masks import Causal, Mask, prefix_mask
from slam_jax.slam_v3 import Inputs, SlamV3, SlamV3Config
from slam_jax.training.flops import forward_flops
from slam_jax.training.losses import LossConfig, slam_v3_loss
from slam_jax.training.state import split_model

DTYPE = "bfloat16"
# A share of the largest number: bfloat16 keeps 8 bits, and sums are in another order.
TOLERANCE = 0.05
# The parts of the preset "base" that "tiny" lacks, with one layer of each kind.
_TINY_BASE: Mapping[str, Any] = dict(
    vocab_size=64,
    num_decoder_layers=1,
    num_memory_tokens=4,
    dropout=0.1,
    remat="maps",
    image=dict(encoder="vit", size=16, patch_size=4, num_layers=1),
)


def comparisons(quick: bool) -> list[Comparison]:
    """Tiny ones if `quick`."""
    rows, context = (2, 32) if quick else (64, 4_096)
    return [
        _attention(quick, padded=True, gradient=True),
        _language_model(quick, "130M"),
        _slam_v3(quick),
        _latents(quick, rows, context),
        _mixture(quick, gradient=True),
        _attention(quick, padded=False, gradient=True),
        _language_model(quick, "400M"),
        _language_model(quick, "50M"),
        _attention(quick, padded=True, gradient=False),
        _mixture(quick, gradient=False),
        _attention(quick, padded=False, gradient=False),
        _latents(quick, rows // 2, 2 * context),
    ]


def _attention(quick: bool, padded: bool, gradient: bool) -> Comparison:
    """Four processes read the inputs of eight examples; or a decoder reads long texts."""
    rows, tokens, heads, groups, width = (32, 708, 12, 4, 64) if padded else (8, 2_048, 16, 16, 64)
    if quick:
        rows, tokens, heads, groups, width = 2, 128, 4, 2 if padded else 4, 16
    mask: Mask = Causal()
    if padded:
        lengths = np.random.default_rng(0).integers(tokens // 2, tokens + 1, rows)
        mask = prefix_mask(jnp.asarray(lengths), tokens)[:, None]
    with _for_accelerators():
        q = jnp.zeros((rows, tokens, heads, width), DTYPE)
        kernel = kernel_of(q, tokens, width, mask)

    def build(read: Callable[..., Any]) -> ours.Call:
        q, dy = (_normal(i, rows, tokens, heads, width) for i in (0, 1))
        k, v = (_normal(i, rows, tokens, groups, width) for i in (2, 3))
        return _call(read, gradient, (q, k, v), dy, mask)

    arms = [Arm(kernel, build, {"read": attend})] if kernel else []
    kind = f"pads, {heads // groups} heads a group" if padded else "causal"
    return Comparison(
        f"attention, {rows} x {tokens:,}, {kind}, {_direction(gradient)}",
        [*arms, Arm("plain form", build, {"read": plain_attend})],
        tolerance=TOLERANCE,
        relative=True,
        repeats=10,
        flops=_passes(gradient) * rows * flops.scores(tokens, tokens, heads * width, heads * width),
        tokens=rows * tokens,
    )


def _mixture(quick: bool, gradient: bool) -> Comparison:
    """The experts of DeepSeek-V2-Lite with uneven loads, 6 of 64 for each of 8,192 tokens."""
    rows, experts, inputs, outputs = (256, 4, 16, 32) if quick else (49_152, 64, 2_048, 1_408)
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(rows, rng.dirichlet(np.full(experts, 4.0)))

    def loop(x, kernels, _):
        parts = jnp.split(x, np.cumsum(sizes)[:-1])
        return jnp.concatenate([part @ kernels[i] for i, part in enumerate(parts)])

    def build(product: Callable[..., Any]) -> ours.Call:
        x, dy = _normal(0, rows, inputs), _normal(1, rows, outputs)
        kernels = _normal(2, experts, inputs, outputs) * inputs**-0.5
        return _call(product, gradient, (x, kernels), dy, jnp.asarray(sizes, jnp.int32))

    return Comparison(
        f"mixture, {rows:,} rows to {experts} experts, {_direction(gradient)}",
        [
            Arm("grouped_matmul", build, {"product": grouped_matmul}),
            Arm("jax.lax.ragged_dot", build, {"product": jax.lax.ragged_dot}),
            Arm("one product an expert", build, {"product": loop}),
        ],
        tolerance=TOLERANCE,
        relative=True,
        repeats=10,
        flops=_passes(gradient) * flops.linear(rows, inputs, outputs),
    )


def _latents(quick: bool, rows: int, context: int) -> Comparison:
    """A layer of DeepSeek-V2-Lite's size, as in `benchmarks.decoding`."""
    sizes = latent_cache.SEED if quick else latent_cache.LITE
    given = {"rows": rows, "context": context, "sizes": sizes, "dtype": DTYPE}
    return Comparison(
        f"latent attention, one token, {rows} x {context:,} cached",
        [
            Arm("latents", latent_cache.latents, given),
            Arm("keys and values", latent_cache.plain, given),
        ],
        tolerance=TOLERANCE,
        relative=True,
        checked=2,
        repeats=10,
        bytes_moved=latent_cache.bytes_read(**given),
        tokens=rows,
    )


def _language_model(quick: bool, name: str) -> Comparison:
    rows, length = (2, 16) if quick else (ROWS[name], 1_024)
    changes = {"num_layers": 1} if quick else LARGER[name]
    config = make_config("standard", "tiny", **{**changes, "dtype": DTYPE})

    def build() -> ours.Call:
        model = jax.jit(lambda: make_model(config, rngs=nnx.Rngs(0)))()
        tokens = jnp.asarray(ours.tokens(config.vocab_size, rows, length + 1))
        return ours.repeated(*ours.make_step(*split_model(model)), tokens)

    return Comparison(
        f"standard {name}, training step, {rows} x {length:,}",
        [Arm("slam_jax", build)],
        tolerance=None,
        unchecked="one arm",
        repeats=5,
        flops=training_flops(config, rows, length),
        tokens=rows * length,
    )


def _slam_v3(quick: bool) -> Comparison:
    preset, rows, text, answer = ("tiny", 2, 8, 4) if quick else ("base", 8, 512, 64)
    changes = _TINY_BASE if quick else {"vocab_size": 32_000}
    config = SlamV3Config.preset(preset, **changes, dtype=DTYPE)
    size, lengths = config.image.size, np.ones((rows, 1), np.int32)
    pixels = np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)
    inputs = Inputs(text=ours.tokens(config.vocab_size, rows, text), image=pixels)
    tokens = ours.tokens(config.vocab_size, rows, 1, answer + 1)
    batch = Batch(inputs, tokens, lengths, (answer + 1) * lengths)
    image = math.prod(config.image.grid(size, size))

    def build() -> ours.Call:
        model = jax.jit(lambda: SlamV3(config, rngs=nnx.Rngs(0)))()
        loss = functools.partial(slam_v3_loss, config=LossConfig())
        return ours.repeated(*ours.make_step(*split_model(model), loss), jax.device_put(batch))

    return Comparison(
        f"slam_v3 {preset}, training step, {rows} x ({text} text + {image} image + {answer})",
        [Arm("slam_jax", build)],
        tolerance=None,
        unchecked="one arm",
        repeats=5,
        flops=3 * rows * forward_flops(config, LossConfig(), batch),
        tokens=rows * (text + image + answer),
    )


def _call(
    function: Callable[..., Any], gradient: bool, inputs: tuple[Any, ...], dy: Any, other: Any
) -> ours.Call:
    """The call of `function(*inputs, other)`; with its gradients for `dy` if `gradient`."""

    @jax.jit
    def run(inputs, dy, other):
        def forward(*inputs):
            with _for_accelerators():
                return function(*inputs, other)

        if not gradient:
            return forward(*inputs)
        y, pull = jax.vjp(forward, *inputs)
        return y, *pull(dy)

    return lambda: run(inputs, dy, other)


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, DTYPE)


def _direction(gradient: bool) -> str:
    return "forward + gradient" if gradient else "forward"


def _passes(gradient: bool) -> int:
    return 3 if gradient else 1


def _for_accelerators() -> contextlib.AbstractContextManager[None]:
    """On a CPU, the forms for accelerators; a GPU has them by itself."""
    if not on_cpu():
        return contextlib.nullcontext()
    return for_accelerators("xla_chunked" if has_tokamax() else "xla")
