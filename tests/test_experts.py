"""Mixtures of experts: each token gets what its experts make of it, whatever the loads."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import compiled, make

from slam_jax.kernels.backend import for_accelerators
from slam_jax.kernels.grouped_matmul import grouped_matmul, ragged_dot
from slam_jax.kernels.row_product import picked_row_product, plain_row_product
from slam_jax.layers.experts import Experts, MixtureOfExperts
from slam_jax.layers.router import (
    Router,
    Routing,
    communication_balance_loss,
    device_balance_loss,
    load_balancing_loss,
    sequence_balance_loss,
)

DIM, MLP, EXPERTS = 6, 10, 8
FORMS = {"cpu": contextlib.nullcontext, "accelerator": for_accelerators}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def experts():
    return make(Experts, EXPERTS, DIM, MLP)


def make_routing(chosen, seed=1):
    chosen = jnp.asarray(chosen)
    weights = jax.random.uniform(jax.random.key(seed), chosen.shape, minval=0.1)
    return Routing(weights, chosen, jnp.full((*chosen.shape[:-1], EXPERTS), 1 / EXPERTS))


def dense(experts, x, routing, mask=None):
    """The plain twin: every expert on every token, summed by weight."""
    gate, up, down = (m.kernel[...] for m in (experts.gate, experts.up, experts.down))
    h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
    y = jnp.einsum("btef,efd->bted", h, down)
    weights = jnp.einsum("btk,btke->bte", routing.weights, jax.nn.one_hot(routing.experts, EXPERTS))
    y = jnp.einsum("bte,bted->btd", weights, y)
    return y if mask is None else jnp.where(jnp.asarray(mask)[..., None], y, 0)


def draw(num_tokens, k, seed=0):
    """k different experts a token."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(EXPERTS)[:k] for _ in range(2 * num_tokens)]
    return np.stack(chosen).reshape(2, num_tokens, k)


ROUTES = {
    "few tokens": draw(2, 2),
    "random": draw(20, 2),
    "even loads": np.arange(80).reshape(2, 20, 2) % EXPERTS,
    "one expert takes all": np.full((2, 20, 2), 5),
    "most experts idle": draw(20, 2) // 3,
}


def _pulled(f, weights, *inputs):
    """The output of f, and its gradients for a sum of the outputs by `weights`."""
    y, pull = jax.vjp(f, *inputs)
    return y, pull(weights)


@pytest.fixture(scope="module")
def gradients():
    """Output and gradients of `Experts` in each form and of `dense`, jitted once for each shape."""

    def of(function, form):
        def call(weights, mask, routing, experts, x):
            def f(experts, x, routing_weights):
                return function(experts, x, routing._replace(weights=routing_weights), mask=mask)

            with FORMS[form]():
                return _pulled(f, weights, experts, x, routing.weights)

        return jax.jit(call)

    compiled = {form: of(Experts.__call__, form) for form in FORMS}
    return compiled | {"dense": of(dense, "cpu")}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("form", FORMS)
def test_dropless_experts_are_the_dense_sum(experts, gradients, form, name, masked):
    routing = make_routing(ROUTES[name])
    x = normal(2, *routing.experts.shape[:2], DIM)
    lengths = np.array([[x.shape[1] - 1], [1]]) if masked else x.shape[1]
    mask = np.arange(x.shape[1]) < np.broadcast_to(lengths, (2, 1))
    weights = normal(3, *x.shape)
    found, expected = (
        gradients[which](weights, mask, routing, experts, x) for which in (form, "dense")
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_models_side_by_side_are_the_same_one_by_one(form):
    keys, x = jax.random.split(jax.random.key(0)), normal(9, 2, 2, 9, DIM)
    routing = make_routing(np.stack([draw(9, 2, seed) for seed in (1, 2)]))

    def gradient(key, x, routing):
        experts = Experts(EXPERTS, DIM, MLP, rngs=nnx.Rngs(key))
        return jax.grad(lambda experts, x: (experts(x, routing) ** 2).sum(), (0, 1))(experts, x)

    with FORMS[form]():
        both = jax.jit(jax.vmap(gradient))(keys, x, routing)
        single = jax.jit(gradient)
        for i in range(2):
            one = single(keys[i], x[i], jax.tree.map(lambda leaf, i=i: leaf[i], routing))
            jax.tree.map(lambda all_, leaf, i=i: close(all_[i], leaf, 1e-4), both, one)


SIZES = {
    "few rows": (5, (2, 0, 1)),
    "one block a group": (70, (30, 0, 32)),
    "several blocks": (200, (100, 1, 67)),
    "all in the last group": (200, (0, 0, 200)),
    "no rows": (40, (0, 0, 0)),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_grouped_product_is_ragged_dot(name):
    num_rows, sizes = SIZES[name]
    given = normal(3, num_rows, 7), normal(1, num_rows, 5), normal(2, 3, 5, 7)
    found, expected = (
        compiled(lambda *given, f=f: _pulled(lambda *a: f(*a, jnp.array(sizes)), *given), *given)
        for f in (grouped_matmul, ragged_dot)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(a, b, 1e-4)
    assert not found[0][sum(sizes) :].any()


def test_the_ragged_dot_of_tokamax_is_that_of_jax(monkeypatch):
    """The last rows belong to no group: they get zeros, and no gradient."""
    pytest.importorskip("tokamax")
    given = normal(1, 40, 5), normal(2, 3, 5, 7), jnp.array((10, 0, 12)), normal(3, 40, 7)

    def pulled(x, kernels, sizes, weights):
        return _pulled(lambda x, kernels: ragged_dot(x, kernels, sizes), weights, x, kernels)

    expected = pulled(*given)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "custom_vjp" in str(jax.make_jaxpr(ragged_dot)(*given[:3]))
    found = pulled(*given)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(a, b, 1e-4)
    assert not found[0][22:].any() and not found[1][0][22:].any()


@pytest.mark.parametrize(("inputs", "dtype"), [(7, "float32"), (48, "bfloat16")])
def test_the_picked_row_product_is_a_plain_product(inputs, dtype):
    row, kernels = (
        jax.random.normal(jax.random.key(i), shape).astype(dtype)
        for i, shape in enumerate([(inputs,), (3, inputs, 5)])
    )
    exact: Any = dict(rtol=1e-5, atol=1e-5) if dtype == "float32" else dict(rtol=0.02, atol=0.1)
    weights = jnp.arange(1.0, 6.0).astype(dtype)
    plain, picked = (
        jax.jit(lambda *given, pick, f=f: _pulled(lambda *a: f(*a, pick), *given))
        for f in (plain_row_product, picked_row_product)
    )
    for pick in jnp.arange(3):
        expected, found = (
            jax.tree.leaves(each(weights, row, kernels, pick=pick)) for each in (plain, picked)
        )
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(jnp.float32(a), jnp.float32(b), **exact)


def test_gradients_of_bfloat16_kernels_are_summed_in_float32():
    """A sum of ones in bfloat16 stops growing at 256."""
    x, kernels = jnp.ones((2_000, 3), jnp.bfloat16), jnp.ones((2, 3, 4), jnp.bfloat16)

    def total(kernels):
        return grouped_matmul(x, kernels, jnp.array([1_500, 500])).sum(dtype=jnp.float32)

    gradient = compiled(jax.grad(total), kernels)
    assert gradient.dtype == jnp.bfloat16
    close(jnp.float32(gradient[:, 0, 0]), [1_500, 500], 1e-2)


def test_beyond_its_capacity_an_expert_leaves_out_the_least_weight(experts):
    chosen = np.array([[[0, 1], [0, 2], [0, 1], [0, 3], [1, 0]]])
    weights = jnp.array([[[0.5, 0.3], [0.9, 0.1], [0.7, 0.2], [0.4, 0.6], [0.8, 0.6]]])
    routing = make_routing(chosen)._replace(weights=weights)
    x = normal(3, 1, 5, DIM)
    kept = weights.at[0, 0, 0].set(0).at[0, 3, 0].set(0)  # expert 0 has five, takes three
    kept = kept.at[0, 4, 1].set(0.6)
    all_of_them = jax.jit(dense)
    expected = all_of_them(experts, x, routing._replace(weights=kept))
    close(compiled(experts, x, routing, capacity=3), expected)
    close(compiled(experts, x, routing, capacity=5), all_of_them(experts, x, routing))


def test_capacity_is_for_training_alone():
    layer, free = (
        make(MixtureOfExperts, DIM, MLP, EXPERTS, 2, capacity_factor=factor)
        for factor in (0.5, None)
    )
    x = normal(4, 2, 8, DIM)
    close(compiled(layer, x)[0], compiled(free, x)[0])
    trained, of_free = (compiled(each, x, training=True)[0] for each in (layer, free))
    assert np.abs(trained - of_free).max() > 1e-3


def test_tokens_that_are_not_there_take_no_room():
    layer = make(MixtureOfExperts, DIM, MLP, EXPERTS, 2, capacity_factor=1.0)
    x = normal(5, 1, 4, DIM)
    row = jnp.concatenate([x, 50 * jnp.ones((1, 4, DIM))], axis=1)
    mask = jnp.arange(8) < 4
    y, _ = compiled(layer, row, mask=mask[None], training=True)
    assert not y[0, 4:].any()
    capacity = 2  # ceil(1.0 * 8 tokens * 2 / 8 experts)
    close(y[:, :4], compiled(lambda x: layer.experts(x, layer.router(x), capacity=capacity), x))


def test_a_shared_mlp_is_added():
    layer = make(MixtureOfExperts, DIM, MLP, EXPERTS, 2, shared_dim=5)
    x = normal(6, 2, 3, DIM)
    y, routing = compiled(layer, x)
    assert layer.shared is not None
    close(y, compiled(layer.shared, x) + compiled(dense, layer.experts, x, routing))


def softmax(router, x):
    return np.asarray(jax.nn.softmax(x @ router.scores.kernel[...], axis=-1))


def test_the_router_takes_the_most_probable():
    x = normal(7, 2, 5, DIM)
    for renormalize, scale in ((False, 1.0), (False, 2.5), (True, 1.0)):
        router = make(Router, DIM, EXPERTS, 3, renormalize=renormalize, scale=scale)
        routing, probs = compiled(router, x), softmax(router, x)
        close(routing.probs, probs)
        best = np.argsort(-probs, axis=-1)[..., :3]
        np.testing.assert_array_equal(routing.experts, best)
        weights = np.take_along_axis(probs, best, axis=-1)
        divisor = weights.sum(-1, keepdims=True) if renormalize else 1 / scale
        close(routing.weights, weights / divisor)


def test_groups_limit_the_choice():
    router = make(Router, DIM, EXPERTS, 3, num_groups=4, top_groups=2)
    x = normal(8, 1, 40, DIM)
    routing, probs = compiled(router, x), softmax(router, x)
    limited = 0
    for t in range(40):
        groups = sorted(range(4), key=lambda g: -max(probs[0, t, 2 * g : 2 * g + 2]))[:2]
        allowed = [e for g in groups for e in (2 * g, 2 * g + 1)]
        best = sorted(allowed, key=lambda e: -probs[0, t, e])[:3]
        assert routing.experts[0, t].tolist() == best
        close(routing.weights[0, t], probs[0, t, best])
        limited += best != np.argsort(-probs[0, t])[:3].tolist()
    assert limited > 5


@pytest.mark.parametrize("renormalize", [False, True])
def test_sigmoids_are_chosen_by_their_bias_and_weighed_without_it(renormalize):
    kw: Any = dict(num_groups=4, top_groups=2, renormalize=renormalize, scale=2.5)
    router = make(Router, DIM, EXPERTS, 3, sigmoid=True, **kw)
    router.choice_bias = nnx.Param(0.3 * normal(9, EXPERTS))
    x = normal(8, 1, 40, DIM)
    routing = compiled(router, x)
    scores = np.asarray(jax.nn.sigmoid(x @ router.scores.kernel[...]))[0]
    choice, changed = scores + np.asarray(router.choice_bias[...]), 0
    for t in range(40):
        # A group counts as both of its experts together.
        groups = sorted(range(4), key=lambda g: -choice[t, 2 * g : 2 * g + 2].sum())[:2]
        allowed = [e for g in groups for e in (2 * g, 2 * g + 1)]
        best = sorted(allowed, key=lambda e: -choice[t, e])[:3]
        assert routing.experts[0, t].tolist() == best
        weights = scores[t, best] / (scores[t, best].sum() if renormalize else 1)
        close(routing.weights[0, t], 2.5 * weights)
        changed += best != np.argsort(-scores[t])[:3].tolist()
    assert changed > 5
    close(routing.probs[0], scores / scores.sum(-1, keepdims=True))
    gradients = compiled(jax.grad(lambda router: router(x).weights.sum()), router)
    assert not np.any(gradients.choice_bias[...]) and np.any(gradients.scores.kernel[...])


def test_losses_are_those_of_the_papers():
    """Each against its formula in loops, over the real tokens only."""
    lengths, k, devices, top = [5, 3], 2, 4, 2
    mask = jnp.arange(6)[None] < jnp.array(lengths)[:, None]
    routings = []
    for seed in (1, 2):
        probs = jax.nn.softmax(normal(seed, 2, 6, EXPERTS))
        routings.append(Routing(*jax.lax.top_k(probs, k), probs))
    size = EXPERTS // devices

    @jax.jit
    def balance(routing):
        communication = communication_balance_loss(routing, devices, top, mask)
        by_devices = device_balance_loss(routing, devices, mask)
        return sequence_balance_loss(routing, mask), by_devices, communication

    pooled_f, pooled_p, count = np.zeros(EXPERTS), np.zeros(EXPERTS), 0
    for routing in routings:
        expert_loss, device_loss, communication_loss = [], [], []
        for b, length in enumerate(lengths):
            f, p, sent = np.zeros(EXPERTS), np.zeros(EXPERTS), np.zeros(devices)
            for t in range(length):
                chosen = np.asarray(routing.experts[b, t])
                f[chosen] += 1
                p += np.asarray(routing.probs[b, t])
                sent[np.unique(chosen // size)] += 1
            pooled_f, pooled_p, count = pooled_f + f, pooled_p + p, count + length
            f, p = f * EXPERTS / (k * length), p / length
            expert_loss.append((f * p).sum())
            groups_f, groups_p = f.reshape(devices, size).mean(1), p.reshape(devices, size).sum(1)
            device_loss.append((groups_f * groups_p).sum())
            sent = sent * devices / (top * length)
            communication_loss.append((sent * groups_p).sum())
        found = balance(routing)
        for loss, means in zip(found, (expert_loss, device_loss, communication_loss), strict=True):
            close(loss, np.mean(means))
    expected = EXPERTS * (pooled_f / count * pooled_p / count).sum()
    close(compiled(load_balancing_loss, routings, mask), expected)


def test_even_loads_have_the_least_loss():
    even = Routing(
        jnp.ones((1, EXPERTS, 1)),
        jnp.arange(EXPERTS)[None, :, None],
        jnp.full((1, EXPERTS, EXPERTS), 1 / EXPERTS),
    )

    @jax.jit
    def losses(even):
        by_devices = device_balance_loss(even, 4), communication_balance_loss(even, 4, 1)
        return load_balancing_loss([even]), sequence_balance_loss(even), *by_devices

    for loss in losses(even):
        close(loss, 1.0)
