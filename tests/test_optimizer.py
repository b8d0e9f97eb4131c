"""The optimizer: which arrays it treats how, how far it goes, and when it stands still."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from helpers import assert_same, compiled

from slam_jax.slam_v3 import SlamV3, SlamV3Config
from slam_jax.training import OptimizerConfig, make_optimizer, split_model
from slam_jax.training.optimizer import (
    clip_by_global_norm,
    decay_mask,
    global_norm,
    make_schedule,
    muon_axes,
)


def close(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def first_updates(config, grads, params) -> Any:
    optimizer = make_optimizer(config, 10)
    return compiled(
        lambda *given: optimizer.update(given[0], optimizer.init(given[1]), given[1])[0],
        grads,
        params,
    )


@pytest.fixture(scope="module")
def params():
    """The shapes of a model that has parameters of every kind."""
    config = SlamV3Config.preset("tiny", 13, aux_slots=True, num_memory_tokens=5)
    return split_model(nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0))))[1]


def test_weight_decay_is_for_kernels_alone(params):
    flat = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    decayed = {path[-1].key for path, yes in flat if yes}
    kept = {path[-1].key for path, yes in flat if not yes}
    assert decayed == {"kernel"}
    assert kept == {
        *("scale", "bias", "embedding", "query_bias", "instruction"),
        *("type", "slot", "queries", "log_temperature", "filter"),
    }


def test_schedule_warms_up_then_falls_as_a_cosine():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, final_fraction=0.1)
    schedule = make_schedule(config, 110)
    close([schedule(s) for s in (0, 5, 10, 60, 110)], [0.0, 1.0, 2.0, 1.1, 0.2])
    # A run shorter than its warm-up is all warm-up.
    close(make_schedule(config, 5)(4), 2.0)


def test_the_rate_may_stay_at_its_peak_before_it_falls():
    config = OptimizerConfig(
        learning_rate=2.0, warmup_steps=10, final_fraction=0.1, constant_fraction=0.5
    )
    schedule = make_schedule(config, 210)
    close([schedule(s) for s in (5, 10, 60, 115, 210)], [1.0, 2.0, 2.0, 2.0, 0.2])
    # Half-way between the peak and the end it is half-way between their rates.
    close((schedule(162) + schedule(163)) / 2, 1.1, 1e-3)
    # It falls in the last step at least, however long it should stay.
    whole = make_schedule(dataclasses.replace(config, constant_fraction=1.0), 20)
    close([whole(s) for s in (19, 20)], [2.0, 0.2])


def test_gradients_are_clipped_by_their_global_norm_before_adam():
    grads = {"kernel": jnp.full(4, 100.0)}
    params = {"kernel": jnp.zeros(4)}
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, epsilon=1.0)
    # Clipped to 0.5 each: 0.5 / (0.5 + epsilon).
    close(first_updates(config, grads, params)["kernel"], -np.full(4, 1 / 3), 1e-4)
    config = dataclasses.replace(config, clip_norm=None)
    close(first_updates(config, grads, params)["kernel"], -np.full(4, 100 / 101), 1e-4)


def test_the_norm_and_the_clipping_are_those_of_optax():
    gradients = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.float32(-2)}}
    close(global_norm(gradients), optax.tree.norm(gradients))
    for most in (1.0, 100.0):
        found, theirs = clip_by_global_norm(most), optax.clip_by_global_norm(most)
        assert found.init(gradients) == theirs.init(gradients)
        clipped = found.update(gradients, found.init(gradients))[0]
        jax.tree.map(close, clipped, theirs.update(gradients, theirs.init(gradients))[0])
    assert_same(clipped, gradients)  # too small to be clipped
    half = {"a": jnp.full(4, 1e3, jnp.bfloat16)}
    assert global_norm(half).dtype == jnp.float32
    clipped = clip_by_global_norm(1.0).update(half, optax.EmptyState())[0]
    assert [x.dtype for x in jax.tree.leaves(clipped)] == [jnp.bfloat16]


MUON = OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0)


def test_muon_takes_every_kernel_but_the_head_as_a_map_from_inputs_to_outputs(params):
    axes = muon_axes(params)

    def axes_of(name):
        node: Any = axes
        for part in name.split("."):
            node = node[int(part) if part.isdigit() else part]
        return node.reduction_axis, node.output_axis

    expected = {
        "fusion.concat.kernel": ((0,), (1,)),  # (D, D)
        "level_one.key.kernel": ((0,), (1, 2)),  # (D, N, H)
        "level_one.block.attention.out.kernel": ((0, 1), (2,)),  # (N, H, D)
        "streams.image.stem.kernel": ((0, 1, 2), (3,)),  # (h, w, C, D)
        "processes.stack.layers.0.mlp.up.kernel": ((1,), (2,)),  # (P, D, F)
        "processes.stack.layers.0.query.kernel": ((1,), (2, 3)),  # (P, D, N, H)
        "processes.stack.layers.0.out.kernel": ((1, 2), (3,)),  # (P, N, H, D)
    }
    assert {name: axes_of(name) for name in expected} == expected

    is_leaf = lambda x: x is None or hasattr(x, "output_axis")  # noqa: E731
    flat, _ = jax.tree_util.tree_flatten_with_path(axes, is_leaf=is_leaf)
    for (path, kernel), (_, chosen) in zip(
        jax.tree_util.tree_leaves_with_path(params), flat, strict=True
    ):
        names = [key.key for key in path]
        assert (chosen is None) == (names[-1] != "kernel" or names[0] == "head"), names
        if chosen is not None:
            # No axis twice and none left out.
            stacked = ("stack" in names) * 1
            assert (*range(stacked), *chosen.reduction_axis, *chosen.output_axis) == (
                *range(kernel.ndim),
            ), names


def test_adam_updates_the_head_of_a_decoder_that_is_a_language_model():
    kernel = jnp.zeros((4, 8))
    model = {"head": {"kernel": kernel}, "out": {"kernel": kernel}}
    axes = muon_axes({"decoder": {"language_model": model}})["decoder"]["language_model"]
    assert axes["head"]["kernel"] is None and axes["out"]["kernel"] is not None


def test_a_muon_update_is_near_orthogonal_and_as_large_as_one_of_adam():
    grads = {"up": {"kernel": jax.random.normal(jax.random.key(0), (8, 3, 16))}}
    update = first_updates(MUON, grads, grads)["up"]["kernel"].reshape(8, 48)
    # An orthogonal update has all singular values alike; five Newton-Schulz steps come near.
    singular = jnp.linalg.svd(update, compute_uv=False)
    raw = jnp.linalg.svd(grads["up"]["kernel"].reshape(8, 48), compute_uv=False)
    assert singular.max() / singular.min() < 1.8 < raw.max() / raw.min()
    # 0.2 times the sign-like size of Adam's update: sqrt(48) * 0.2 spread over 8 x 48 entries.
    close(jnp.sqrt(jnp.mean(update**2)), 0.2, 0.1)
    assert jnp.sum(update * grads["up"]["kernel"].reshape(8, 48)) < 0


def test_muon_is_that_of_optax():
    """Which has the same iterations one after the other, where ours are a loop."""
    grads = {"up": {"kernel": jax.random.normal(jax.random.key(0), (8, 16))}}
    config = dataclasses.replace(MUON, clip_norm=None)
    theirs = optax.contrib.muon(
        config.learning_rate, beta=config.momentum, eps=config.epsilon, consistent_rms=0.2
    )
    expected: Any = theirs.update(grads, theirs.init(grads), grads)[0]
    close(first_updates(config, grads, grads)["up"]["kernel"], expected["up"]["kernel"])


def test_each_process_is_a_matrix_of_its_own():
    """Another process's gradient changes nothing, also where it is a thousand times as large."""
    key = jax.random.key(0)
    small = jax.random.normal(key, (2, 6, 4))
    config = dataclasses.replace(MUON, clip_norm=None)
    large = small.at[1].multiply(1_000.0)

    def update(grads):
        tree = {"processes": {"stack": {"up": {"kernel": grads}}}}
        return first_updates(config, tree, tree)["processes"]["stack"]["up"]["kernel"]

    close(update(small), update(large))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_array_that_a_batch_does_not_reach_stands_still(name):
    """Momentum of the last image is no reason to change the image stream on a batch of texts."""
    key = jax.random.key(0)
    params = {
        part: {"kernel": jax.random.normal(key, (4, 4)), "bias": jnp.ones(4)}
        for part in ("image", "text")
    }
    config = OptimizerConfig(name=name, warmup_steps=0)
    optimizer = make_optimizer(config, 10)
    _, state = optimizer.update(params, optimizer.init(params), params)
    absent = {**params, "image": jax.tree.map(jnp.zeros_like, params["image"])}
    updates: Any = optimizer.update(absent, state, params)[0]
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates["image"]))
    assert all(jnp.all(u != 0) for u in jax.tree.leaves(updates["text"]))
