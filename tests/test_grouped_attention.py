"""Grouped-query and cross-layer attention, and the ways in which rotary positions are stretched."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import compiled, make

from slam_jax.errors import ConfigError, InputError
from slam_jax.layers import (
    CrossLayerAttention,
    GroupedQueryAttention,
    Rope,
    SharedKeyValues,
    Yarn,
    attend,
    causal_layout,
    rotary,
)
from slam_jax.layers.rotary import Llama3, LongRope

DIM, HEADS, GROUPS, WIDTH, LENGTH = 12, 6, 2, 4, 7


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_heads_of_a_group_share_keys_and_values():
    q, k, v = (normal(i, 2, LENGTH, n, WIDTH) for i, n in enumerate((HEADS, GROUPS, GROUPS)))
    mask = causal_layout(LENGTH).visible
    many_k, many_v = (jnp.repeat(x, HEADS // GROUPS, axis=-2) for x in (k, v))
    close(attend(q, k, v, mask), attend(q, many_k, many_v, mask))


@pytest.fixture(scope="module", params=[None, 1e-5], ids=["plain", "qk norm"])
def attention(request):
    fields = dict(num_kv_heads=GROUPS, head_dim=WIDTH, rope=Rope(100.0))
    layer = make(GroupedQueryAttention, DIM, HEADS, **fields, qk_norm_epsilon=request.param)
    if request.param is not None:
        layer.q_norm.scale = nnx.Param(normal(1, WIDTH))
        layer.k_norm.scale = nnx.Param(normal(2, WIDTH))
    return layer


def test_queries_and_keys_are_turned_and_then_normed(attention):
    x, positions = normal(3, 2, LENGTH, DIM), jnp.arange(LENGTH)

    @jax.jit
    def expected(x):
        q, k = (rotary(m(x), positions, Rope(100.0)) for m in (attention.query, attention.key))
        if attention.qk_norm_epsilon is not None:
            q, k = attention.q_norm(q), attention.k_norm(k)
        mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
        return attention.out(attend(q, k, attention.value(x), mask))

    close(compiled(attention, x), expected(x))


def test_queries_and_keys_may_be_normed_before_they_are_turned():
    rope = Rope(100.0)
    kw: Any = dict(num_kv_heads=GROUPS, head_dim=WIDTH, rope=rope, qk_norm_epsilon=1e-5)
    layer = make(GroupedQueryAttention, DIM, HEADS, **kw, rotate_first=False)
    layer.q_norm.scale = nnx.Param(normal(1, WIDTH))
    layer.k_norm.scale = nnx.Param(normal(2, WIDTH))
    x, positions = normal(3, 2, LENGTH, DIM), jnp.arange(LENGTH)

    @jax.jit
    def expected(x):
        normed = layer.q_norm(layer.query(x)), layer.k_norm(layer.key(x))
        q, k = (rotary(each, positions, rope) for each in normed)
        return layer.out(attend(q, k, layer.value(x), causal_layout(LENGTH).visible))

    close(compiled(layer, x), expected(x))


@pytest.mark.release
def test_a_window_keeps_as_many_tokens_and_sees_no_others():
    window = 3
    fields = dict(num_kv_heads=GROUPS, window=window, rope=Rope(100.0))
    layer = make(GroupedQueryAttention, DIM, HEADS, **fields)
    x = normal(3, 2, LENGTH, DIM)
    whole = compiled(layer, x)
    # The last tokens alone: positions count only by their distances.
    close(whole[:, -1], compiled(layer, x[:, -window:])[:, -1])
    # With pads, which `prefill` below has none of.
    mask = jnp.arange(LENGTH + 2) >= 2
    padded = jnp.concatenate([normal(4, 2, 2, DIM), x], axis=1)
    layout = causal_layout(LENGTH + 2, jnp.broadcast_to(mask, (2, LENGTH + 2)))
    close(compiled(layer, padded, layout)[:, 2:], whole)
    cache = layer.init_cache((2,), 100)
    assert cache.capacity == window
    y, cache = compiled(layer.prefill, x[:, :5], cache)
    close(y, whole[:, :5])
    step = jax.jit(layer.decode_step)
    for t in range(5, LENGTH):
        y, cache = step(x[:, t : t + 1], cache)
        close(y[:, 0], whole[:, t])


def test_heads_that_do_not_divide_into_groups_are_refused():
    """Four heads over three of keys would be cut in the middle of a head's tokens."""
    attention = make(GroupedQueryAttention, 8, 4, num_kv_heads=3)
    with pytest.raises(InputError, match="4 heads of queries and 3 of keys; expected a multiple"):
        compiled(attention, jnp.ones((1, 6, 8)))


def test_a_cache_that_is_too_small_is_said(attention):
    with pytest.raises(InputError, match=r"7 tokens into a cache of 4.*max_length=7"):
        compiled(attention.prefill, normal(4, 1, LENGTH, DIM), attention.init_cache((1,), 4))


def test_a_full_cache_takes_no_token_and_says_so(attention):
    x = normal(5, 1, LENGTH, DIM)
    _, cache = compiled(attention.prefill, x, attention.init_cache((1,), LENGTH))
    with pytest.raises(InputError, match="stores 7 tokens and there is room for 7.*max_length=8"):
        attention.decode_step(x[:, :1], cache)
    _, after = jax.jit(GroupedQueryAttention.decode_step)(attention, x[:, :1], cache)
    assert after.length.tolist() == [after.capacity + 1]
    np.testing.assert_array_equal(after.k, cache.k)


def test_a_layer_that_reads_its_own_keys_is_the_plain_one(attention):
    """Cross-layer attention keeps keys as they are made; each reader turns and norms its own."""
    shared = make(SharedKeyValues, DIM, GROUPS, WIDTH)
    fields = dict(rope=attention.rope, qk_norm_epsilon=attention.qk_norm_epsilon)
    reader = make(CrossLayerAttention, DIM, HEADS, WIDTH, **fields)
    shared.key, shared.value = attention.key, attention.value
    reader.query, reader.out = attention.query, attention.out
    if attention.qk_norm_epsilon is not None:
        reader.q_norm, reader.k_norm = attention.q_norm, attention.k_norm
    x = normal(6, 2, LENGTH, DIM)
    read = jax.jit(reader)
    close(read(x, compiled(shared, x), jnp.arange(LENGTH)), compiled(attention, x))
    empty = shared.init_cache((2,), LENGTH)
    _, cache = compiled(shared.prefill, x[:, :4], empty, jnp.array([4, 2]))
    made, cache = compiled(shared.decode_step, x[:, 4:5], cache)
    expected = compiled(attention, jnp.concatenate([x[1:, :2], x[1:, 4:5]], axis=1))[:, -1:]
    positions = jnp.array([[4], [2]])
    close(read(x[:, 4:5], made, positions)[1:], expected)
    close(cache.tokens_first()[0][0, :5], shared.key(x[0, :5]))


def test_a_query_bias_is_added_to_queries_before_all_else():
    layer = make(CrossLayerAttention, DIM, HEADS, WIDTH, query_bias=True)
    shared = make(SharedKeyValues, DIM, HEADS, WIDTH)
    x = normal(7, 1, LENGTH, DIM)
    made = shared(x)
    assert layer.query_bias is not None
    q = layer.query(x) + layer.query_bias[None, None]
    expected = layer.out(attend(q, made.k, made.v, made.visible))
    close(layer(x, made, jnp.arange(LENGTH)), expected)


def test_interleaved_pairs_are_neighbours():
    x, positions = normal(8, 1, LENGTH, 1, 6), jnp.arange(LENGTH)
    halves = jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
    turned = rotary(halves, positions, Rope())
    interleaved = rotary(x, positions, Rope(interleaved=True))
    close(interleaved[..., ::2], turned[..., :3])
    close(interleaved[..., 1::2], turned[..., 3:])


def test_ntk_slows_the_slowest_pair_most():
    plain, slowed = (Rope(ntk_alpha=a).frequencies(64) for a in (1.0, 1_000.0))
    assert slowed[0] == plain[0] == 1.0
    close(plain[-1] / slowed[-1], 1_000.0, 1e-4)  # what alpha^(d / (d - 2)) is chosen for


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    yarn = Yarn(8.0, 64, beta_fast=16.0, beta_slow=1.0)
    plain, stretched = Rope().frequencies(64), Rope(yarn=yarn).frequencies(64)
    turns = 64 * plain / (2 * math.pi)
    close(stretched[turns > 24], plain[turns > 24])
    close(stretched[turns < 0.5], plain[turns < 0.5] / 8)
    assert (np.diff(stretched / plain) <= 1e-6).all()
    close(Rope(yarn=Yarn(1.0, 64)).frequencies(64), plain)


@pytest.mark.parametrize(
    ("rope", "frequencies", "magnitude"),
    [
        (Rope(1e4, linear_factor=3.0), [0.3333333, 0.03333333, 0.003333333, 0.0003333333], 1.0),
        (
            Rope(5e5, llama3=Llama3(8.0, 1.0, 4.0, 2_048)),
            [1.0, 0.03760603, 0.00017677668, 6.647870e-06],
            1.0,
        ),
        (
            Rope(1e4, longrope=LongRope((1.0, 1.1, 1.3, 1.7), 1.0444659)),
            [1.0, 0.090909094, 0.0076923077, 0.00058823527],
            1.0444659,
        ),
    ],
    ids=["linear", "llama3", "longrope"],
)
def test_other_extensions_have_the_frequencies_of_transformers(rope, frequencies, magnitude):
    np.testing.assert_allclose(rope.frequencies(8), frequencies, rtol=1e-6)
    assert rope.magnitude == magnitude


def test_extensions_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="rope is .yarn and llama3.; expected at most one"):
        Rope(yarn=Yarn(2.0, 8), llama3=Llama3(8.0, 1.0, 4.0, 64))
    with pytest.raises(ConfigError, match="llama3.high_freq_factor is 1.0; expected above"):
        Llama3(8.0, 1.0, 1.0, 64)
    with pytest.raises(ConfigError, match="longrope.factors is 1; expected 4, as a head has so"):
        Rope(longrope=LongRope((1.0,))).frequencies(8)


def test_yarns_temperatures():
    m = 0.1 * math.log(40) + 1
    assert Rope(yarn=Yarn(40.0, 4_096)).magnitude == pytest.approx(m)
    both = Rope(yarn=Yarn(40.0, 4_096, mscale=1.0, mscale_all_dim=1.0))
    assert both.magnitude == 1.0 and both.score_scale == pytest.approx(m * m)
    x = normal(9, 1, LENGTH, 1, 6)
    rope = Rope(yarn=Yarn(40.0, 4_096))
    lengths = jnp.linalg.norm(rotary(x, jnp.arange(LENGTH), rope), axis=-1)
    close(lengths, m * jnp.linalg.norm(x, axis=-1))


def test_left_pads_are_not_seen_and_not_counted():
    layer = make(GroupedQueryAttention, DIM, HEADS, rope=Rope(), head_dim=WIDTH)
    x = normal(10, 1, LENGTH, DIM)
    padded = jnp.concatenate([100 * jnp.ones((1, 3, DIM)), x], axis=1)
    mask = jnp.arange(LENGTH + 3)[None] >= 3
    y = compiled(layer, padded, causal_layout(LENGTH + 3, mask))
    close(y[:, 3:], compiled(layer, x))
    assert not y[:, :3].any()  # a pad has nothing to attend to
