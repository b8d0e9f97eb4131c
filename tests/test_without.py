"""SLAM v3 with a part left out: the part is gone, and everything else is as it was."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slam_jax.errors import ConfigError
from slam_jax.layers.kv_cache import KVCache
from slam_jax.slam_v3 import SlamV3, SlamV3Config
from slam_jax.slam_v3.config import PARTS

TOKENS = np.random.default_rng(1).integers(0, 13, (2, 3, 7), np.int32)

# What a part adds goes through one of these maps.
OUT = {
    "isolated": "processes.stack.layers.0.isolated.out.kernel",
    "shared": "processes.stack.layers.0.out.kernel",
    "concat": "fusion.concat.kernel",
    "cross_modal": "fusion.cross_modal.attention.out.kernel",
    "fusion_mlp": "fusion.mlp.down.kernel",
}


def parameters(tree):
    """By dotted path; of a model or of what has its form."""
    pure = nnx.to_pure_dict(nnx.state(tree) if isinstance(tree, nnx.Module) else tree)
    return {dotted(path): value for path, value in jax.tree.leaves_with_path(pure)}


def dotted(path):
    return ".".join(str(key.key) for key in path)


def size(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model)))


def build(**changes):
    return SlamV3(SlamV3Config.preset("tiny", 13, **changes), rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def inputs(make_inputs):
    return make_inputs()


@pytest.mark.parametrize("part", OUT)
def test_without_a_part_the_model_is_that_whose_part_adds_nothing(part, inputs):
    full, cut = build(), build(without=(part,))
    values = parameters(full)
    assert OUT[part] in values and size(cut) < size(full)
    state = nnx.to_pure_dict(nnx.state(full))

    def silenced(path, x):
        return jnp.zeros_like(x) if dotted(path) == OUT[part] else x

    silent = nnx.merge(nnx.graphdef(full), nnx.State(jax.tree.map_with_path(silenced, state)))
    # The same values in what both have.
    kept = parameters(cut)
    assert kept.keys() < values.keys()

    def taken(path, x):
        return values[dotted(path)]

    mine = jax.tree.map_with_path(taken, nnx.to_pure_dict(nnx.state(cut)))
    cut = nnx.merge(nnx.graphdef(cut), nnx.State(mine))
    expected = silent(TOKENS, inputs).logits
    np.testing.assert_allclose(cut(TOKENS, inputs).logits, expected, atol=1e-5)
    assert not np.allclose(full(TOKENS, inputs).logits, expected, atol=1e-3)


@pytest.mark.parametrize("part", ["residual", "mean"])
def test_the_sum_of_the_fusion_lacks_one_term(part, inputs):
    full, cut = build(), build(without=(part,))
    inputs = jax.tree.map(jnp.asarray, inputs)
    embedded = full.embedding(inputs.text)
    streams, bank = full.level_one(full.streams(inputs, embedded))
    y, _ = full.processes(streams, bank)
    x = jnp.concatenate([stream.tokens for stream in streams], axis=1)
    fusion: Any = cut.fusion
    f = (x if part == "mean" else 0.0) + (jnp.mean(y, axis=0) if part == "residual" else 0.0)
    f += fusion.concat(jnp.concatenate(list(y), axis=-1))
    f += fusion.cross_modal(jnp.mean(y, axis=0), streams)
    f += fusion.mlp(fusion.norm(f))
    np.testing.assert_allclose(fusion(y, streams)[0], f, atol=1e-5)
    assert size(cut) == size(full)


def test_without_latents_the_decoder_keeps_keys_and_values(inputs):
    model = build(without=("latent",))
    memory = jax.jit(SlamV3.encode)(model, inputs)
    assert memory.c_mem.shape[-1] == model.config.embed_dim
    full = model.decode(TOKENS, memory)
    cache = model.init_cache(TOKENS.shape[:-1], 9)
    assert all(isinstance(layer, KVCache) for layer in cache)
    lengths = np.array([[2, 3, 4], [4, 1, 2]])
    prefilled, cache = model.prefill(TOKENS[..., :4], cache, memory, lengths=lengths)
    step = jax.jit(SlamV3.decode_step)
    for i in range(3):
        token = np.take_along_axis(TOKENS, lengths[..., None] + i, axis=-1)[..., 0]
        logits, cache = step(model, token, cache, memory)
        place = (lengths + i)[..., None, None]
        expected = np.take_along_axis(np.asarray(full), place, axis=-2)[..., 0, :]
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(prefilled[0, 2], full[0, 2, :4], atol=1e-5)


@pytest.mark.parametrize("part", PARTS)
def test_every_gradient_without_a_part_is_finite_and_there(part, inputs):
    model = build(without=(part,))

    @jax.jit
    def gradients(model):
        return nnx.state(jax.grad(lambda m: jnp.sum(m(TOKENS, inputs).logits ** 2))(model))

    for path, gradient in parameters(gradients(model)).items():
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient) or path.startswith("alignment"), path


def test_without_a_bank_there_are_no_weights_of_shared_attention(inputs):
    model = build(without=("shared",))
    assert model(TOKENS, inputs, attention=True).attention.processes is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": ("nothing",)}, "without is .*; expected some of"),
        ({"without": ("residual", "mean", "concat")}, "expected one of residual, mean and concat"),
        ({"without": ("latent",), "window": 3}, "window is 3; expected None without"),
        ({"process_mlp_dim": 0}, "process_mlp_dim is 0"),
    ],
)
def test_what_cannot_be_left_out_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(**changes)
