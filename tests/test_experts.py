"""Mixtures of experts: each token gets what its experts make of it, whatever the loads."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slam_jax.layers.expert_blocks import (
    cut,
    gated_mlp,
    looped_gated_mlp,
    picked_product,
    read_product,
)
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
PRODUCTS = (read_product, picked_product)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def experts():
    return Experts(EXPERTS, DIM, MLP, rngs=nnx.Rngs(0))


def make_routing(chosen, seed=1):
    chosen = jnp.asarray(chosen)
    weights = jax.random.uniform(jax.random.key(seed), chosen.shape, minval=0.1)
    return Routing(weights, chosen, jnp.full((*chosen.shape[:-1], EXPERTS), 1 / EXPERTS))


def loop(experts, x, routing, mask=None):
    """Token after token, choice after choice."""
    rows = []
    gate, up, down = (m.kernel[...] for m in (experts.gate, experts.up, experts.down))
    for b, t in np.ndindex(*x.shape[:2]):
        y = jnp.zeros(DIM)
        for weight, e in zip(routing.weights[b, t], routing.experts[b, t], strict=True):
            if mask is None or mask[b, t]:
                h = jax.nn.silu(x[b, t] @ gate[e]) * (x[b, t] @ up[e])
                y += weight * (h @ down[e])
        rows.append(y)
    return jnp.stack(rows).reshape(x.shape)


def draw(num_tokens, k, seed=0):
    """k different experts a token."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(EXPERTS)[:k] for _ in range(2 * num_tokens)]
    return np.stack(chosen).reshape(2, num_tokens, k)


ROUTES = {
    "a few tokens": draw(2, 2),
    "every expert sees all": draw(3, 4),
    "even loads": np.arange(32).reshape(2, 8, 2) % EXPERTS,
    "one expert takes all": np.concatenate([np.full((2, 9, 1), 5), draw(9, 1) * 0], axis=-1),
    "some experts idle": draw(9, 2) // 3,
}


# The most tokens that all experts look at, and whether blocks are gone through one by one.
WAYS = {"_by_token": (99, True), "_by_block, in a loop": (3, True), "_by_block": (3, False)}


@pytest.fixture
def go(monkeypatch):
    """Chooses one of WAYS; gives the list of the ways that were really gone."""

    def choose(way):
        few, loops = WAYS[way]
        monkeypatch.setattr("slam_jax.layers.experts._FEW", few)
        monkeypatch.setattr("slam_jax.layers.experts._loops", lambda: loops)
        return taken

    taken = []
    for method in ("_by_choice", "_by_token", "_by_block"):
        original = getattr(Experts, method)

        def seen(self, *args, method=method, original=original):
            taken.append(method)
            return original(self, *args)

        monkeypatch.setattr(Experts, method, seen)
    return choose


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("way", WAYS)
def test_dropless_is_the_loop_over_experts(experts, go, way, name, masked):
    taken = go(way)
    routing = make_routing(ROUTES[name])
    x = normal(2, *routing.experts.shape[:2], DIM)
    mask = None
    if masked:
        mask = np.arange(x.shape[1]) < np.array([[x.shape[1] - 1], [1]])

    def total(f):
        def of(experts, x, weights):
            y = f(experts, x, routing._replace(weights=weights), mask=mask)
            return (y * (jnp.arange(y.size).reshape(y.shape) % 7 - 3.0)).sum()

        return of

    def ours(experts, x, routing, mask):
        return experts(x, routing, mask=None if mask is None else jnp.asarray(mask))

    close(jax.jit(ours)(experts, x, routing, mask), loop(experts, x, routing, mask))
    given = (experts, x, routing.weights)
    one = jax.jit(jax.grad(total(ours), (0, 1, 2)))(*given)
    other = jax.jit(jax.grad(total(loop), (0, 1, 2)))(*given)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        close(a, b, 1e-4)
    assert set(taken) == {"_by_choice" if name == "a few tokens" else way.split(",")[0]}


@pytest.mark.parametrize("way", WAYS)
def test_models_side_by_side_are_the_same_one_by_one(go, way):
    go(way)
    keys, x = jax.random.split(jax.random.key(0)), normal(9, 2, 2, 9, DIM)
    routing = make_routing(np.stack([draw(9, 2, seed) for seed in (1, 2)]))

    def gradient(key, x, routing):
        experts = Experts(EXPERTS, DIM, MLP, rngs=nnx.Rngs(key))
        return jax.grad(lambda experts, x: (experts(x, routing) ** 2).sum(), (0, 1))(experts, x)

    both = jax.vmap(gradient)(keys, x, routing)
    for i in range(2):
        one = gradient(keys[i], x[i], jax.tree.map(lambda leaf, i=i: leaf[i], routing))
        jax.tree.map(lambda all_, leaf, i=i: close(all_[i], leaf, 1e-4), both, one)


def test_blocks_taken_together_are_blocks_one_by_one():
    """An expert of 23 blocks takes 8, 8, 4, 2 and 1 of them at once."""
    size, loads = 3, (23, 0, 6, 9, 1)
    chosen = jnp.repeat(jnp.arange(len(loads)), size * jnp.array(loads))
    blocks = cut(chosen, len(loads), size)
    x = normal(1, *blocks.choices.shape, DIM) * (blocks.choices < chosen.size)[..., None]
    shapes = ((DIM, MLP), (DIM, MLP), (MLP, DIM))
    gate, up, down = (normal(2 + i, len(loads), *shape) for i, shape in enumerate(shapes))
    kernels = (gate, up, down)
    weights = normal(5, *x.shape)

    def gradients(mlp):
        return jax.grad(lambda x, kernels: (mlp(x, blocks, kernels) * weights).sum(), (0, 1))

    close(looped_gated_mlp(x, blocks, kernels), gated_mlp(x, blocks, kernels))
    for one, other in zip(
        jax.tree.leaves(gradients(looped_gated_mlp)(x, kernels)),
        jax.tree.leaves(gradients(gated_mlp)(x, kernels)),
        strict=True,
    ):
        close(one, other, 1e-4)


@pytest.mark.parametrize(("inputs", "dtype"), [(48, "float32"), (7, "float32"), (48, "bfloat16")])
def test_a_kernel_read_where_it_stands_multiplies_like_its_copy(inputs, dtype):
    row, kernels = (
        jax.random.normal(jax.random.key(i), shape).astype(dtype)
        for i, shape in enumerate([(inputs,), (3, inputs, 5)])
    )
    exact = dict(rtol=1e-5, atol=1e-5) if dtype == "float32" else dict(rtol=0.02, atol=0.1)
    for pick in jnp.arange(3):
        read, plain = (_with_derivatives(f, row, kernels, pick) for f in PRODUCTS)
        chex.assert_trees_all_equal_dtypes(read, plain)
        chex.assert_trees_all_close(read, plain, **exact)


def _with_derivatives(product, row, kernels, pick):
    def picked(row, kernels):
        return product(row, kernels, pick)

    gradients = jax.grad(lambda *given: (picked(*given) ** 2).sum(), (0, 1))(row, kernels)
    return picked(row, kernels), gradients, jax.jvp(picked, (row, kernels), (row, kernels))


def test_bfloat16_kernels_sum_the_gradients_of_their_blocks_in_float32():
    """A sum of equal numbers in bfloat16 stops growing at 256 of them."""
    x = jnp.broadcast_to(normal(8, 2, DIM), (1_000, 2, DIM)).astype(jnp.bfloat16)
    shapes = ((1, DIM, MLP), (1, DIM, MLP), (1, MLP, DIM))
    kernels = tuple(normal(i, *shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes))

    def gradient(x):
        blocks = cut(jnp.zeros(2 * len(x), int), 1, 2)
        return jax.grad(lambda kernels: looped_gated_mlp(x, blocks, kernels).mean())(kernels)

    for all_, one in zip(gradient(x), gradient(x[:1]), strict=True):
        assert all_.dtype == jnp.bfloat16
        close(all_.astype(jnp.float32), one.astype(jnp.float32), 0.02)


def test_beyond_its_capacity_an_expert_leaves_out_the_least_weight(experts):
    chosen = np.array([[[0, 1], [0, 2], [0, 1], [0, 3], [1, 0]]])
    weights = jnp.array([[[0.5, 0.3], [0.9, 0.1], [0.7, 0.2], [0.4, 0.6], [0.8, 0.6]]])
    routing = make_routing(chosen)._replace(weights=weights)
    x = normal(3, 1, 5, DIM)
    kept = weights.at[0, 0, 0].set(0).at[0, 3, 0].set(0)  # expert 0 has five, takes three
    kept = kept.at[0, 4, 1].set(0.6)
    expected = loop(experts, x, routing._replace(weights=kept))
    close(experts(x, routing, capacity=3), expected)
    close(experts(x, routing, capacity=5), loop(experts, x, routing))


def test_capacity_is_for_training_alone():
    kw = dict(capacity_factor=0.5, rngs=nnx.Rngs(0))
    layer, free = (
        MixtureOfExperts(DIM, MLP, EXPERTS, 2, **{**kw, **change})
        for change in ({}, {"capacity_factor": None, "rngs": nnx.Rngs(0)})
    )
    x = normal(4, 2, 8, DIM)
    close(layer(x)[0], free(x)[0])
    trained, _ = layer(x, training=True)
    assert np.abs(trained - free(x, training=True)[0]).max() > 1e-3


def test_tokens_that_are_not_there_take_no_room():
    layer = MixtureOfExperts(DIM, MLP, EXPERTS, 2, capacity_factor=1.0, rngs=nnx.Rngs(0))
    x = normal(5, 1, 4, DIM)
    row = jnp.concatenate([x, 50 * jnp.ones((1, 4, DIM))], axis=1)
    mask = jnp.arange(8) < 4
    y, _ = layer(row, mask=mask[None], training=True)
    assert not y[0, 4:].any()
    capacity = 2  # ceil(1.0 * 8 tokens * 2 / 8 experts)
    close(y[:, :4], layer.experts(x, layer.router(x), capacity=capacity))


def test_a_shared_mlp_is_added():
    layer = MixtureOfExperts(DIM, MLP, EXPERTS, 2, shared_dim=5, rngs=nnx.Rngs(0))
    x = normal(6, 2, 3, DIM)
    y, routing = layer(x)
    assert layer.shared is not None
    close(y, layer.shared(x) + loop(layer.experts, x, routing))


def softmax(router, x):
    return np.asarray(jax.nn.softmax(x @ router.scores.kernel[...], axis=-1))


def test_the_router_takes_the_most_probable():
    x = normal(7, 2, 5, DIM)
    for renormalize, scale in ((False, 1.0), (False, 2.5), (True, 1.0)):
        router = Router(DIM, EXPERTS, 3, renormalize=renormalize, scale=scale, rngs=nnx.Rngs(0))
        routing, probs = router(x), softmax(router, x)
        close(routing.probs, probs)
        best = np.argsort(-probs, axis=-1)[..., :3]
        np.testing.assert_array_equal(routing.experts, best)
        weights = np.take_along_axis(probs, best, axis=-1)
        divisor = weights.sum(-1, keepdims=True) if renormalize else 1 / scale
        close(routing.weights, weights / divisor)


def test_groups_limit_the_choice():
    router = Router(DIM, EXPERTS, 3, num_groups=4, top_groups=2, rngs=nnx.Rngs(0))
    x = normal(8, 1, 40, DIM)
    routing, probs = router(x), softmax(router, x)
    limited = 0
    for t in range(40):
        groups = sorted(range(4), key=lambda g: -max(probs[0, t, 2 * g : 2 * g + 2]))[:2]
        allowed = [e for g in groups for e in (2 * g, 2 * g + 1)]
        best = sorted(allowed, key=lambda e: -probs[0, t, e])[:3]
        assert routing.experts[0, t].tolist() == best
        close(routing.weights[0, t], probs[0, t, best])
        limited += best != np.argsort(-probs[0, t])[:3].tolist()
    assert limited > 5


def test_losses_are_those_of_the_papers():
    """Each against its formula in loops, over the real tokens only."""
    lengths, k, devices, top = [5, 3], 2, 4, 2
    mask = jnp.arange(6) < jnp.array(lengths)[:, None]
    routings = []
    for seed in (1, 2):
        probs = jax.nn.softmax(normal(seed, 2, 6, EXPERTS))
        routings.append(Routing(*jax.lax.top_k(probs, k), probs))
    size = EXPERTS // devices
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
        close(sequence_balance_loss(routing, mask), np.mean(expert_loss))
        close(device_balance_loss(routing, devices, mask), np.mean(device_loss))
        loss = communication_balance_loss(routing, devices, top, mask)
        close(loss, np.mean(communication_loss))
    expected = EXPERTS * (pooled_f / count * pooled_p / count).sum()
    close(load_balancing_loss(routings, mask), expected)


def test_even_loads_have_the_least_loss():
    even = Routing(
        jnp.ones((1, EXPERTS, 1)),
        jnp.arange(EXPERTS)[None, :, None],
        jnp.full((1, EXPERTS, EXPERTS), 1 / EXPERTS),
    )
    close(load_balancing_loss([even]), 1.0)
    close(sequence_balance_loss(even), 1.0)
    close(device_balance_loss(even, 4), 1.0)
    close(communication_balance_loss(even, 4, 1), 1.0)
