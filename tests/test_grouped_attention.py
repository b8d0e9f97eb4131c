"""Grouped-query and cross-layer attention, and the ways in which rotary positions are stretched."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slam_jax.errors import InputError
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
    layer = GroupedQueryAttention(
        DIM,
        HEADS,
        num_kv_heads=GROUPS,
        head_dim=WIDTH,
        rope=Rope(100.0),
        qk_norm_epsilon=request.param,
        rngs=nnx.Rngs(0),
    )
    if request.param is not None:
        layer.q_norm.scale = nnx.Param(normal(1, WIDTH))
        layer.k_norm.scale = nnx.Param(normal(2, WIDTH))
    return layer


def test_queries_and_keys_are_turned_and_then_normed(attention):
    x, positions = normal(3, 2, LENGTH, DIM), jnp.arange(LENGTH)
    q, k = (rotary(m(x), positions, Rope(100.0)) for m in (attention.query, attention.key))
    if attention.qk_norm_epsilon is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    read = attend(q, k, attention.value(x), jnp.tril(jnp.ones((LENGTH, LENGTH), bool)))
    close(attention(x), attention.out(read))


def test_heads_that_do_not_divide_into_groups_are_refused():
    """Four heads over three of keys would be cut in the middle of a head's tokens."""
    attention = GroupedQueryAttention(8, 4, num_kv_heads=3, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="4 heads of queries and 3 of keys; expected a multiple"):
        attention(jnp.ones((1, 6, 8)))


def test_a_cache_that_is_too_small_is_said(attention):
    with pytest.raises(InputError, match=r"7 tokens into a cache of 4.*max_length=7"):
        attention.prefill(normal(4, 1, LENGTH, DIM), attention.init_cache((1,), 4))


def test_a_full_cache_takes_no_token_and_says_so(attention):
    x = normal(5, 1, LENGTH, DIM)
    _, cache = attention.prefill(x, attention.init_cache((1,), LENGTH))
    with pytest.raises(InputError, match="stores 7 tokens and there is room for 7.*max_length=8"):
        attention.decode_step(x[:, :1], cache)
    _, after = jax.jit(GroupedQueryAttention.decode_step)(attention, x[:, :1], cache)
    assert after.length.tolist() == [after.capacity + 1]
    np.testing.assert_array_equal(after.k, cache.k)


def test_a_layer_that_reads_its_own_keys_is_the_plain_one(attention):
    """Cross-layer attention keeps keys as they are made; each reader turns and norms its own."""
    shared = SharedKeyValues(DIM, GROUPS, WIDTH, rngs=nnx.Rngs(1))
    reader = CrossLayerAttention(
        DIM,
        HEADS,
        WIDTH,
        rope=attention.rope,
        qk_norm_epsilon=attention.qk_norm_epsilon,
        rngs=nnx.Rngs(2),
    )
    shared.key, shared.value = attention.key, attention.value
    reader.query, reader.out = attention.query, attention.out
    if attention.qk_norm_epsilon is not None:
        reader.q_norm, reader.k_norm = attention.q_norm, attention.k_norm
    x = normal(6, 2, LENGTH, DIM)
    close(reader(x, shared(x), jnp.arange(LENGTH)), attention(x))
    _, cache = shared.prefill(x[:, :4], shared.init_cache((2,), LENGTH), jnp.array([4, 2]))
    made, cache = shared.decode_step(x[:, 4:5], cache)
    expected = attention(jnp.concatenate([x[1:, :2], x[1:, 4:5]], axis=1))[:, -1:]
    positions = jnp.array([[4], [2]])
    close(reader(x[:, 4:5], made, positions)[1:], expected)
    close(cache.tokens_first()[0][0, :5], shared.key(x[0, :5]))


def test_a_query_bias_is_added_to_queries_before_all_else():
    layer = CrossLayerAttention(DIM, HEADS, WIDTH, query_bias=True, rngs=nnx.Rngs(0))
    shared = SharedKeyValues(DIM, HEADS, WIDTH, rngs=nnx.Rngs(1))
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
    layer = GroupedQueryAttention(DIM, HEADS, rope=Rope(), head_dim=WIDTH, rngs=nnx.Rngs(0))
    x = normal(10, 1, LENGTH, DIM)
    padded = jnp.concatenate([100 * jnp.ones((1, 3, DIM)), x], axis=1)
    mask = jnp.arange(LENGTH + 3)[None] >= 3
    y = layer(padded, causal_layout(LENGTH + 3, mask))
    close(y[:, 3:], layer(x))
    assert not y[:, :3].any()  # a pad has nothing to attend to
