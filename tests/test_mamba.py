"""Mamba: the chunks, the cache and the pads change nothing; the recurrence is the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import compiled, make

from slam_jax.layers.attention import causal_layout
from slam_jax.layers.mamba import Mamba, selective_scan

WIDTH, STATE, DIM = 6, 3, 8


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def arguments(num_tokens, seed=0):
    lead = (2, num_tokens)
    x, b, c = normal(seed, *lead, WIDTH), normal(1, *lead, STATE), normal(2, *lead, STATE)
    dt, a = jax.nn.softplus(normal(3, *lead, WIDTH)), -jnp.exp(normal(4, WIDTH, STATE))
    return x, dt, a, b, c, normal(5, 2, WIDTH, STATE)


def plain(x, dt, a, b, c, state):
    """The recurrence as the paper writes it, one token and one channel after the other."""
    outputs = []
    for t in range(x.shape[1]):
        state = jnp.stack(
            [
                jnp.exp(dt[:, t, i, None] * a[None, i]) * state[:, i]
                + dt[:, t, i, None] * b[:, t] * x[:, t, i, None]
                for i in range(WIDTH)
            ],
            axis=1,
        )
        outputs.append((state * c[:, t, None, :]).sum(axis=-1))
    return jnp.stack(outputs, axis=1), state


@pytest.mark.parametrize(
    ("num_tokens", "chunk_size"),
    [
        (7, 3),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((5, 16), (1, 1), (8, 4), (6, 1))
        ),
    ],
)
def test_the_chunked_scan_is_the_plain_recurrence(num_tokens, chunk_size):
    given = arguments(num_tokens)

    def total(scan):
        def of(*given):
            y, state = scan(*given)
            weight = jnp.arange(y.size).reshape(y.shape) % 5 - 2.0
            return (y * weight).sum() + (state**2).sum()

        return of

    def chunked(*given):
        return selective_scan(*given, chunk_size=chunk_size)

    for ours, theirs in zip(compiled(chunked, *given), compiled(plain, *given), strict=True):
        close(ours, theirs)
    every = tuple(range(len(given)))
    ours, theirs = (compiled(jax.grad(total(scan), every), *given) for scan in (chunked, plain))
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, 1e-4)


@pytest.fixture(scope="module", params=[None, 1e-6], ids=["mamba", "jamba"])
def mamba(request):
    fields = dict(norm_epsilon=request.param, proj_bias=request.param is None, chunk_size=4)
    layer = make(Mamba, DIM, state_dim=STATE, dt_rank=2, **fields)
    graphdef, params = nnx.split(layer)
    # Biases and norms that are 0 and 1 would hide where they are left out.
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + rng.normal(0, 0.3, p.shape).astype(p.dtype), params)
    return nnx.merge(graphdef, params)


def test_it_is_what_the_paper_writes(mamba):
    """Against a token by token form with NumPy's own convolution."""
    x = np.asarray(normal(1, 5, DIM), np.float64)
    p = {name: np.asarray(v, np.float64) for name, v in flat(mamba).items()}

    def linear(z, name):
        return z @ p[f"{name}.kernel"] + p.get(f"{name}.bias", 0.0)

    def norm(z, name):
        if mamba.norm_epsilon is None:
            return z
        root = np.sqrt((z**2).mean(-1, keepdims=True) + mamba.norm_epsilon)
        return z / root * p[f"{name}.scale"]

    def silu(z):
        return z / (1 + np.exp(-z))

    value = linear(x, "value")
    filters, bias = p["conv_filter"], p["conv_bias"]
    mixed = [np.convolve(value[:, i], filters[::-1, i])[:5] for i in range(value.shape[1])]
    v = silu(np.stack(mixed, -1) + bias)
    dt = np.log1p(np.exp(linear(norm(linear(v, "dt_down"), "dt_norm"), "dt_up")))
    b, c = norm(linear(v, "b"), "b_norm"), norm(linear(v, "c"), "c_norm")
    state, outputs = np.zeros((v.shape[1], STATE)), []
    for t in range(5):
        decay = np.exp(dt[t, :, None] * -np.exp(p["a_log"]))
        state = decay * state + (dt[t] * v[t])[:, None] * b[t]
        outputs.append(state @ c[t] + p["skip"] * v[t])
    expected = linear(np.stack(outputs) * silu(linear(x, "gate")), "out")
    close(compiled(mamba, jnp.asarray(x, jnp.float32)), expected, 1e-4)


def flat(layer):
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(layer)))
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def test_prompts_of_any_length_and_steps_after_them_are_the_whole_sequence(mamba):
    x, lengths = np.asarray(normal(2, 3, 11, DIM)), np.array([1, 6, 3])
    whole = np.asarray(compiled(mamba, x))
    # What pads hold is no matter.
    prompt = np.where(np.arange(6)[:, None] < lengths[:, None, None], x[:, :6], 1e3)
    y, cache = compiled(
        lambda x, n: mamba.prefill(x, mamba.init_cache((3,), 0), n), prompt, lengths
    )
    for row, length in enumerate(lengths):
        close(y[row, :length], whole[row, :length])
    step = jax.jit(lambda m, x, cache: m.decode_step(x, cache))
    for i in range(5):
        place = (lengths + i)[:, None, None]
        y, cache = step(mamba, np.take_along_axis(x, place, axis=1), cache)
        close(y, np.take_along_axis(whole, place, axis=1))
    assert cache.state.dtype == jnp.float32 and cache.state.shape == (3, 2 * DIM, STATE)


@jax.jit
@functools.partial(jax.grad, has_aux=True)
def gradient_and_output(x, mamba):
    y = mamba(x)
    return (y**2).sum(), y


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 5)])
def test_pads_on_either_side_leave_no_trace(mamba, left, right):
    x, places = normal(3, 2, 6, DIM), slice(left, left + 6)
    padded = jnp.pad(x, [(0, 0), (left, right), (0, 0)], constant_values=7.0)
    mask = jnp.broadcast_to((jnp.arange(left + 6 + right) - left) % 100 < 6, padded.shape[:2])

    def total(padded):
        y = mamba(padded, causal_layout(padded.shape[1], mask))[:, places]
        return (y**2).sum(), y

    gradient, y = jax.jit(jax.grad(total, has_aux=True))(padded)
    expected_gradient, expected = gradient_and_output(x, mamba)
    close(y, expected)
    assert not gradient[:, :left].any() and not gradient[:, left + 6 :].any()
    close(gradient[:, places], expected_gradient, 1e-4)


def test_the_state_is_float32_in_a_bfloat16_model():
    def compute(x, v):
        layer = Mamba(DIM, state_dim=STATE, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return layer.prefill(x, layer.init_cache((1,), 0)), layer._coefficients(v)

    shapes = jnp.zeros((1, 40, DIM)), jnp.zeros((1, 2 * DIM), jnp.bfloat16)
    (y, cache), (v, dt, *_) = jax.eval_shape(compute, *shapes)
    assert y.dtype == jnp.bfloat16 and cache.state.dtype == jnp.float32
    assert v.dtype == dt.dtype == jnp.float32


def test_dt_starts_between_a_thousandth_and_a_tenth():
    layer = make(Mamba, 64)
    assert layer.dt_up.bias is not None
    dt = np.log1p(np.exp(layer.dt_up.bias[...]))
    assert 0.9e-3 < dt.min() < 4e-3 and 0.05 < dt.max() < 0.101
    close(layer.a_log[...], np.log(np.broadcast_to(np.arange(1.0, 17.0), (128, 16))))
    assert (layer.skip[...] == 1).all()
