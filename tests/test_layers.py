"""Every layer by itself: what it computes, and what it must not look at."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import compiled, make

from slam_jax.errors import InputError
from slam_jax.layers import (
    Causal,
    GatedMLP,
    LatentCrossAttention,
    MultiHeadLatentAttention,
    RMSNorm,
    Rope,
    SelfAttention,
    attend,
    latent_attend,
    masked_softmax,
    rotary,
)
from slam_jax.layers.attention import attend_rotated
from slam_jax.layers.dropout import dropout, split
from slam_jax.layers.linear import Linear, project_to_float32
from slam_jax.layers.masks import as_array, prefix_mask
from slam_jax.layers.short_convolution import ShortConvolution

DIM, HEADS, RANK, NOPE, ROPE, VALUE = 12, 2, 7, 6, 4, 5
LENGTH = 8


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@functools.cache
def make_mla(**changes):
    fields = {
        "kv_lora_rank": RANK,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        **changes,
    }
    return make(MultiHeadLatentAttention, DIM, HEADS, **fields)


VARIANTS = {"plain": {}, "query rank": {"q_lora_rank": 6}, "window": {"window": 3}}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=list(VARIANTS))
def mla(request):
    return make_mla(**request.param)


# --- Multi-head latent attention


def test_latent_attention_is_its_definition_head_by_head(mla):
    x, positions = np.asarray(normal(1, LENGTH, DIM)), jnp.arange(LENGTH)

    def weight(layer, head: Any = ...):
        return np.asarray(layer.kernel[...])[:, head]

    def turned(x):
        return np.asarray(rotary(jnp.asarray(x)[:, None], positions))[:, 0]

    latent = np.asarray(
        x if mla.q_lora_rank is None else compiled(mla.q_norm, x @ weight(mla.q_down))
    )
    c_kv = np.asarray(compiled(mla.kv_norm, x @ weight(mla.kv_down)))
    k_rope = turned(x @ weight(mla.k_rope))
    y = np.zeros((LENGTH, DIM))
    for head in range(HEADS):
        q_rope = turned(latent @ weight(mla.q_rope, head))
        q = np.concatenate([latent @ weight(mla.q_nope, head), q_rope], axis=-1)
        k = np.concatenate([c_kv @ weight(mla.k_up, head), k_rope], axis=-1)
        v = c_kv @ weight(mla.v_up, head)
        for t in range(LENGTH):
            seen = slice(0 if mla.window is None else max(0, t + 1 - mla.window), t + 1)
            probs = np.exp(k[seen] @ q[t] / np.sqrt(NOPE + ROPE))
            y[t] += probs / probs.sum() @ v[seen] @ np.asarray(mla.out.kernel[head])
    close(compiled(mla, x), y)


def test_prefill_and_steps_give_what_the_full_pass_gives_at_every_position(mla):
    x = normal(2, 2, 2, LENGTH, DIM)
    full = jax.jit(lambda mla, x: mla(x))(mla, x)
    lengths = jnp.array([[5, 1], [3, 6]])
    real = prefix_mask(lengths, 6)
    prompt = jnp.where(real[..., None], x[:, :, :6], normal(3, 2, 2, 6, DIM))
    prefill = jax.jit(MultiHeadLatentAttention.prefill)
    y, cache = prefill(mla, prompt, mla.init_cache((2, 2), LENGTH), lengths)
    close(y[real], full[:, :, :6][real])
    step = jax.jit(MultiHeadLatentAttention.decode_step, static_argnames="absorbed")
    for _ in range(LENGTH - 1):
        at = jnp.minimum(cache.length, LENGTH - 1)[..., None, None]
        token, expected = (jnp.take_along_axis(a, at, axis=-2) for a in (x, full))
        unfinished = cache.length < LENGTH
        expanded, _ = step(mla, token, cache, absorbed=False)
        y, cache = step(mla, token, cache)
        close(y[unfinished], expected[unfinished])
        close(y, expanded)
    assert cache.length.tolist() == [[5 + 7, 1 + 7], [3 + 7, 6 + 7]]  # every token is counted


# The prompts have 1, 4 and 6 tokens, and the ring turns up to 20 times.
@pytest.mark.parametrize("window", [1, 3, 6, 7])
def test_a_ring_of_the_window_gives_what_the_full_pass_gives(window):
    mla, total, lengths = make_mla(window=window), 20, jnp.array([1, 4, 6])
    x, prompt = normal(13, 3, total, DIM), normal(14, 3, 6, DIM)
    prompt = jnp.where(prefix_mask(lengths, 6)[..., None], x[:, :6], prompt)

    def step(cache, _):
        y, new = mla.decode_step(jnp.take_along_axis(x, at := place(cache), axis=1), cache)
        return new, (at, y)

    def place(cache):
        return jnp.minimum(cache.length, total - 1)[:, None, None]

    @jax.jit
    def run():
        y, cache = mla.prefill(prompt, mla.init_cache((3,), total), lengths)
        cache, (at, steps) = jax.lax.scan(step, cache, length=total - 6)
        whole, unpadded = mla(x), mla.prefill(x, mla.init_cache((3,), total))[1]
        return y, cache, steps, jax.vmap(lambda at: jnp.take_along_axis(whole, at, 1))(at), unpadded

    _, cache, steps, expected, unpadded = run()
    close(steps, expected)
    assert cache.c_kv.shape == (3, window, RANK) and cache.k_rope.shape == (3, window, ROPE)
    # The last row has got all tokens: one at a time it is stored as the prompt of 20 is.
    jax.tree.map(lambda a, b: close(a[-1], b[-1]), cache, unpadded)


def test_a_ring_that_covers_the_cache_changes_no_bit():
    """A window of the length of the cache makes a ring of it; a longer window does not."""
    x = normal(15, 2, LENGTH, DIM)

    @jax.jit
    def run(mla):
        _, cache = mla.prefill(x[:, :3], mla.init_cache((2,), LENGTH), jnp.array([3, 2]))
        return jax.lax.scan(lambda c, t: mla.decode_step(t, c)[::-1], cache, x[None, :, 3:4])

    ring, plain = (run(make_mla(window=window)) for window in (LENGTH, LENGTH + 1))
    jax.tree.map(np.testing.assert_array_equal, ring, plain)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_token_depends_on_itself_and_those_before_it_in_its_window_and_no_other(window):
    mla = make_mla(window=window)
    jacobian = jax.jit(jax.jacobian(mla))(normal(4, LENGTH, DIM))
    depends = np.abs(jacobian).max(axis=(1, 3)) > 0
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    np.testing.assert_array_equal(depends, (distance >= 0) & (distance < (window or LENGTH)))


def test_cache_is_three_small_arrays():
    cache = make_mla().init_cache((2, 3), LENGTH)
    assert {name: (x.shape, x.dtype) for name, x in vars(cache).items()} == {
        "c_kv": ((2, 3, LENGTH, RANK), jnp.float32),
        "k_rope": ((2, 3, LENGTH, ROPE), jnp.float32),
        "length": ((2, 3), jnp.int32),
    }
    assert all(not x.any() for x in jax.tree.leaves(cache))


def test_prefill_without_lengths_fills_the_first_places_and_no_other():
    mla, x = make_mla(), normal(5, 1, 3, DIM)
    _, cache = compiled(lambda x: mla.prefill(x, mla.init_cache((1,), LENGTH)), x)
    assert cache.length.tolist() == [3]
    assert cache.c_kv[:, :3].all()
    assert not cache.c_kv[:, 3:].any()
    assert not cache.k_rope[:, 3:].any()


@pytest.mark.parametrize("window", [None, LENGTH + 1])
def test_a_full_cache_takes_no_token_and_says_so(window):
    mla, x, token = make_mla(window=window), normal(6, 2, LENGTH, DIM), normal(7, 2, 1, DIM)
    _, cache = compiled(mla.prefill, x, mla.init_cache((2,), LENGTH), jnp.array([5, LENGTH]))
    with pytest.raises(InputError, match="stores 8 tokens and there is room for 8.*max_length=9"):
        mla.decode_step(token, cache)
    _, after = jax.jit(MultiHeadLatentAttention.decode_step)(mla, token, cache)
    assert (after.length > after.capacity).tolist() == [False, True]
    np.testing.assert_array_equal(after.c_kv[1], cache.c_kv[1])


def test_a_step_writes_into_the_cache_that_it_is_given_and_copies_none():
    mla, x = make_mla(kv_lora_rank=64), normal(10, 2, 1, DIM)
    cache = mla.init_cache((2,), 4_096)
    step = jax.jit(lambda mla, x, cache: mla.decode_step(x, cache), donate_argnums=2)
    memory = step.lower(mla, x, cache).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= cache.c_kv.nbytes + cache.k_rope.nbytes
    assert memory.temp_size_in_bytes < cache.c_kv.nbytes / 2


@pytest.mark.parametrize("rows", [1, 2])
def test_the_gradient_of_a_cached_step_is_that_of_the_full_pass(rows):
    mla, x, weights = make_mla(), normal(11, rows, 5, DIM), normal(12, rows, 1, DIM)

    def cached(x):
        _, cache = mla.prefill(x[:, :4], mla.init_cache((rows,), LENGTH))
        return (mla.decode_step(x[:, 4:], cache)[0] * weights).sum()

    def full(x):
        return (mla(x)[:, 4:] * weights).sum()

    close(*(jax.jit(jax.grad(loss))(x) for loss in (cached, full)))


def test_prefill_of_more_than_the_cache_holds_says_what_would_fit():
    mla = make_mla()
    with pytest.raises(ValueError, match=r"8 tokens into a cache of 4.*max_length=8"):
        compiled(mla.prefill, normal(8, 1, LENGTH, DIM), mla.init_cache((1,), 4))


def test_latent_attention_computes_in_bfloat16_and_keeps_its_parameters():
    exact, half = make_mla(), make_mla(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    x = normal(9, 2, LENGTH, DIM)
    rounded, empty = x.astype(jnp.bfloat16), half.init_cache((2,), LENGTH)
    y, cache = compiled(half.prefill, rounded[:, :-1], empty)
    step, _ = compiled(half.decode_step, rounded[:, -1:], cache)
    assert y.dtype == step.dtype == cache.c_kv.dtype == cache.k_rope.dtype == jnp.bfloat16
    y = jnp.concatenate([y, step], axis=1).astype(jnp.float32)
    close(y, compiled(exact, x), 0.05)


def test_latent_attention_goes_through_jit_grad_and_vmap():
    mla, x = make_mla(), normal(10, 3, LENGTH, DIM)
    y = mla(x)
    close(jax.jit(lambda mla, x: mla(x))(mla, x), y)
    close(jax.jit(jax.vmap(lambda mla, x: mla(x), in_axes=(None, 0)))(mla, x), y)
    grads = jax.jit(jax.grad(lambda mla: jnp.sum(mla(x) ** 2)))(mla)
    assert all(g.any() and jnp.isfinite(g).all() for g in jax.tree.leaves(nnx.state(grads)))


@pytest.mark.parametrize("with_rope", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_absorbed_is_expanded(with_rope, with_mask):
    rope = {"q_rope": normal(1, 2, 3, HEADS, ROPE), "k_rope": normal(2, 2, LENGTH, ROPE)}
    arrays = (
        normal(3, 2, 3, HEADS, NOPE),
        normal(4, 2, LENGTH, RANK),
        normal(5, RANK, HEADS, NOPE),
        normal(6, RANK, HEADS, VALUE),
    )
    mask = jax.random.bernoulli(jax.random.key(7), 0.5, (2, 3, LENGTH)).at[0, 0].set(False)
    kw: Any = (rope if with_rope else {}) | ({"mask": mask} if with_mask else {})
    expanded, absorbed = (
        compiled(latent_attend, *arrays, **kw, absorbed=absorbed) for absorbed in (False, True)
    )
    close(absorbed, expanded, 1e-4)  # values of a few tens: relative to them
    assert bool(expanded[0, 0].any()) is not with_mask


def test_cross_attention_is_attention_to_keys_and_values_made_of_the_latents():
    widths = dict(kv_lora_rank=RANK, qk_head_dim=NOPE, v_head_dim=VALUE)
    cross = make(LatentCrossAttention, DIM, HEADS, **widths)
    x, bank = normal(1, 2, 3, DIM), normal(2, 2, LENGTH, RANK)
    mask = prefix_mask(jnp.array([[5], [0]]), LENGTH)

    def plain(x, bank):
        return cross.out(attend(cross.q(x), cross.k_up(bank), cross.v_up(bank), mask))

    y = compiled(cross, x, bank, mask)
    close(y, compiled(plain, x, bank))
    close(compiled(cross, x, bank, mask, absorbed=True), y)
    close(compiled(cross, x, bank, absorbed=True), compiled(cross, x, bank))
    assert y[0].any()
    np.testing.assert_array_equal(y[1], 0)


# --- Attention


def test_a_row_that_may_attend_to_nothing_is_0_and_its_gradients_are_finite():
    q, k, v = (normal(i, 2, 3, HEADS, 4) for i in range(3))
    mask = jnp.ones((2, 3, 3), bool).at[0, 1].set(False)

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v, mask) ** 2)

    y = compiled(attend, q, k, v, mask)
    np.testing.assert_array_equal(y[0, 1], 0)
    grads = compiled(jax.grad(loss, argnums=(0, 1, 2)), q, k, v)
    assert all(jnp.isfinite(g).all() for g in grads)
    np.testing.assert_array_equal(grads[0][0, 1], 0)
    assert grads[0][0, 0].any()
    probs = compiled(masked_softmax, jnp.ones((3, 3)), mask[0])
    np.testing.assert_array_equal(probs.sum(-1) > 0.9, [1, 0, 1])


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_jax_where_every_row_has_a_key(masked):
    q, k, v = normal(1, 2, 3, HEADS, 4), normal(2, 2, 5, HEADS, 4), normal(3, 2, 5, HEADS, 4)
    mask = jax.random.bernoulli(jax.random.key(4), 0.5, (2, 3, 5)).at[..., 2].set(True)
    theirs = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None] if masked else None)
    close(compiled(attend, q, k, v, mask if masked else None), theirs)


def test_masked_keys_do_not_count_whatever_their_scores():
    q, k, v = normal(1, 1, 3, HEADS, 4), normal(2, 1, 5, HEADS, 4), normal(3, 1, 5, HEADS, 4)
    mask = jnp.arange(5)[None, None] < 3
    hidden_k, hidden_v = (x.at[:, 3:].set(1e4) for x in (k, v))
    close(attend(q, hidden_k, hidden_v, mask), attend(q, k[:, :3], v[:, :3]))


def test_self_attention_knows_places_only_where_they_are_given():
    layer = SelfAttention(DIM, HEADS, 6, rngs=nnx.Rngs(0))
    x, order = normal(1, 2, LENGTH, DIM), np.random.default_rng(0).permutation(LENGTH)
    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    close(layer(x), layer.out(attend(q, k, v)))
    close(layer(x[:, order]), layer(x)[:, order])
    positions = jnp.arange(LENGTH)
    placed = layer(x, None, positions)
    close(layer(x, None, positions + 9), placed, 1e-4)
    close(placed, layer.out(attend(rotary(q, positions), rotary(k, positions), v)))
    assert np.abs(layer(x[:, order], None, positions) - placed[:, order]).max() > 1e-3


# --- Rotary


def test_rotary_turns_each_pair_by_its_own_angle():
    x, positions = normal(1, 2, 5, HEADS, 6), jnp.array([0, 1, 2, 7, 100])
    turned = rotary(x, positions, Rope(50.0))
    frequency = 50.0 ** (-2 * np.arange(3) / 6)
    angle = np.asarray(positions)[:, None, None] * frequency
    pairs = (np.asarray(x[..., :3]) + 1j * np.asarray(x[..., 3:])) * np.exp(1j * angle)
    close(turned, np.concatenate([pairs.real, pairs.imag], axis=-1), 1e-4)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    close(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1))


def test_rotated_scores_depend_on_differences_only():
    q, k = normal(1, 5, 1, 6), normal(2, 5, 1, 6)

    def scores(shift):
        rotated = (rotary(x, jnp.arange(5) + shift)[:, 0] for x in (q, k))
        return jnp.einsum("td,sd->ts", *rotated)

    close(scores(0), scores(37), 1e-4)
    assert np.abs(scores(0) - q[:, 0] @ k[:, 0].T).max() > 0.1


def test_rotary_of_bfloat16_has_float32_angles():
    x, positions = normal(1, 1, 1, 4).astype(jnp.bfloat16), jnp.array([999])
    y = rotary(x, positions)
    assert y.dtype == jnp.bfloat16
    close(y.astype(jnp.float32), rotary(x.astype(jnp.float32), positions), 0.01)


# --- The small ones


def test_rms_norm_is_its_formula():
    norm, x = RMSNorm(DIM, epsilon=0.1, init_scale=0.5), normal(1, 3, DIM)
    norm.scale[...] += jnp.arange(DIM)
    scale = 0.5 + np.arange(DIM)[None]
    close(norm(x), x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 0.1) * scale)
    half = RMSNorm(DIM)(1000 * x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), RMSNorm(DIM)(x), 0.02)


def test_gated_mlp_is_its_formula():
    mlp = GatedMLP(DIM, 20, activation=jnp.tanh, rngs=nnx.Rngs(0))
    x = normal(1, 3, DIM)
    gate, up, down = (layer.kernel[...] for layer in (mlp.gate, mlp.up, mlp.down))
    close(mlp(x), (jnp.tanh(x @ gate) * (x @ up)) @ down)
    assert GatedMLP(DIM, 20, rngs=nnx.Rngs(0)).activation is jax.nn.silu


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(6, 4), (6, (2, 3)), ((2, 3), 4), ((2, 3), (3, 2))]
)
def test_linear_contracts_all_its_input_features(inputs, outputs):
    layer = Linear(inputs, outputs, use_bias=True, rngs=nnx.Rngs(0))
    assert layer.bias is not None
    layer.bias[...] += 1.0
    lead = (5, 1)
    x = normal(1, *lead, *(inputs if isinstance(inputs, tuple) else (inputs,)))
    axes = 1 if isinstance(inputs, int) else len(inputs)
    close(layer(x), jnp.tensordot(x, layer.kernel[...], axes) + 1.0)


def test_linear_in_bfloat16_has_forward_mode_and_gradients_of_its_dtype():
    layer = Linear((4, 25), 3, use_bias=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = normal(1, 7, 4, 25).astype(jnp.bfloat16)
    y, tangent = jax.jvp(layer, (x,), (2 * x,))
    kernel = layer.kernel[...].astype(jnp.bfloat16)
    expected = jnp.tensordot(x.astype(jnp.float32), kernel.astype(jnp.float32), 2)
    assert y.dtype == tangent.dtype == jnp.bfloat16
    close(y.astype(jnp.float32), expected, 3e-2)
    close(tangent.astype(jnp.float32), 2 * expected, 6e-2)

    def total(layer, x):
        return layer(x).sum(dtype=jnp.float32)

    traced = jax.make_jaxpr(jax.grad(total, (0, 1)))(layer, x)
    products = [each for each in traced.eqns if each.primitive.name == "dot_general"]
    # One product forward and two backward, none of mixed dtypes.
    dtypes = [{v.aval.dtype for v in (*each.invars, *each.outvars)} for each in products]
    assert dtypes == 3 * [{jnp.dtype(jnp.bfloat16)}]


def test_logits_are_summed_in_float32():
    """A sum of 1,000 ones in bfloat16 stops at 256."""
    x, kernel = jnp.ones((2, 3, 1_000), jnp.bfloat16), normal(1, 1_000, 7)

    def total(x, kernel):
        return jnp.sum(project_to_float32(x, kernel) @ jnp.arange(1.0, 8.0))

    y = compiled(project_to_float32, x, kernel)
    gradients = compiled(jax.grad(total, (0, 1)), x, kernel)
    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    assert [each.dtype for each in (y, *gradients)] == [jnp.float32, jnp.bfloat16, jnp.float32]
    close(y[0, 0], rounded.sum(axis=0), 1e-4)
    np.testing.assert_allclose(gradients[0][0, 0], rounded @ jnp.arange(1.0, 8.0), rtol=1e-2)
    close(gradients[1][0], 6 * jnp.arange(1.0, 8.0), 1e-2)
    close(jax.jvp(project_to_float32, (x, kernel), (x, 0 * kernel))[1], y, 1e-4)


def test_linear_starts_as_lecun_normal_times_its_scale():
    layer = Linear((8, 50), (20, 30), init_scale=0.5, rngs=nnx.Rngs(0))
    assert layer.bias is None
    assert jnp.std(layer.kernel[...]) == pytest.approx(0.5 * 400**-0.5, rel=0.02)
    # The scale is of the start alone: it does not act in the call.
    x = normal(1, 8, 50)
    close(layer(x), jnp.tensordot(x, layer.kernel[...], 2))


def test_dropout_keeps_the_mean_and_repeats_itself_for_the_same_key():
    x, key = jnp.ones((100, 100)), jax.random.key(0)
    y = dropout(x, 0.25, key)
    close(np.unique(y), [0, 1 / 0.75])
    assert y.mean() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(y, dropout(x, 0.25, key))
    assert (y != dropout(x, 0.25, jax.random.key(1))).any()


def test_no_key_or_no_rate_is_no_dropout():
    x = normal(1, 10)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
    assert split(None, 2) == [None, None]
    one, two = split(jax.random.key(0), 2)
    assert one is not None
    assert one != two


@pytest.mark.parametrize("masked", ["nothing", "pads", "causal"])
def test_tokens_without_a_position_are_attended_to_unrotated(masked):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 3, 8)) for i in range(3))
    positions, count = jnp.array([4, 9, 2]), 3
    mask: Any = {
        "nothing": None,
        "pads": jnp.ones((2, 1, 5), bool).at[1, :, 1].set(False),
        "causal": Causal(),
    }[masked]
    found = attend_rotated(q, k, v, mask, positions)
    rotated = (rotary(x[:, :count], positions) for x in (q, k))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k)
    scores = scores.at[..., :count, :count].set(jnp.einsum("btnh,bsnh->bnts", *rotated)) * 8**-0.5
    visible = as_array(mask, 5, 5)
    visible = None if visible is None else jnp.broadcast_to(visible, (2, 5, 5))[:, None]
    expected = jnp.einsum("bnts,bsnh->btnh", masked_softmax(scores, visible), v)
    np.testing.assert_allclose(found, expected, atol=1e-5)


# --- Short convolution


def test_a_short_convolution_is_that_of_numpy_for_each_channel():
    layer = ShortConvolution(DIM, 3, rngs=nnx.Rngs(0))
    x, weights = normal(1, 2, LENGTH, DIM), np.asarray(layer.filter[...])
    for row, mixed in zip(x, layer(x), strict=True):
        for channel in range(DIM):
            # The last weight is that of the token itself.
            expected = np.convolve(row[:, channel], weights[::-1, channel])[:LENGTH]
            close(mixed[:, channel], row[:, channel] + expected)


def test_a_short_convolution_does_not_see_absent_tokens():
    layer = ShortConvolution(DIM, 4, rngs=nnx.Rngs(0))
    x, mask = normal(1, LENGTH, DIM), np.arange(LENGTH) != 2
    close(layer(x.at[2].set(7.0), mask)[mask], layer(x.at[2].set(0.0))[mask])
