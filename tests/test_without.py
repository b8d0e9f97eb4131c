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
from slam_jax.slam_v3.config import PARTS, ImageConfig

pytestmark = pytest.mark.release

VIT = ImageConfig("vit", size=6, num_layers=1)
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
    """A model of random parameters: its initialisers would have to be compiled."""
    config = SlamV3Config.preset("tiny", 13, image=VIT, num_decoder_layers=1, **changes)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(3)

    def draw(path, p):
        return jnp.asarray(("scale" in str(path)) + rng.normal(0, 0.2, p.shape), p.dtype)

    return nnx.merge(graphdef, jax.tree.map_with_path(draw, shapes))


@jax.jit
def forward(model, inputs):
    return model(TOKENS, inputs).logits


@pytest.fixture(scope="module")
def inputs(make_inputs):
    return make_inputs(size=6)


@pytest.fixture(scope="module")
def full():
    return build()


@pytest.mark.parametrize("part", OUT)
def test_without_a_part_the_model_is_that_whose_part_adds_nothing(part, full, inputs):
    cut = build(without=(part,))
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
    expected = forward(silent, inputs)
    np.testing.assert_allclose(forward(cut, inputs), expected, atol=1e-5)
    assert not np.allclose(forward(full, inputs), expected, atol=1e-3)


@pytest.mark.parametrize("part", ["residual", "mean"])
def test_the_sum_of_the_fusion_lacks_one_term(part, full, inputs):
    cut = build(without=(part,))

    @jax.jit
    def fused_and_its_terms(full, fusion: Any, inputs):
        streams, bank = full.level_one(full.streams(inputs, full.embedding(inputs.text)))
        y, _ = full.processes(streams, bank)
        x = jnp.concatenate([stream.tokens for stream in streams], axis=1)
        f = (x if part == "mean" else 0.0) + (jnp.mean(y, axis=0) if part == "residual" else 0.0)
        f += fusion.concat(jnp.concatenate(list(y), axis=-1))
        f += fusion.cross_modal(jnp.mean(y, axis=0), streams)
        return fusion(y, streams)[0], f + fusion.mlp(fusion.norm(f))

    fused, terms = fused_and_its_terms(full, cut.fusion, inputs)
    np.testing.assert_allclose(fused, terms, atol=1e-5)
    assert size(cut) == size(full)


def test_without_latents_the_decoder_keeps_keys_and_values(inputs):
    model = build(without=("latent",))
    memory = jax.jit(SlamV3.encode)(model, inputs)
    assert memory.c_mem.shape[-1] == model.config.embed_dim
    full = jax.jit(SlamV3.decode)(model, TOKENS, memory)
    cache = model.init_cache(TOKENS.shape[:-1], 9)
    assert all(isinstance(layer, KVCache) for layer in cache)
    lengths = np.array([[2, 3, 4], [4, 1, 2]])
    prefill, step = jax.jit(SlamV3.prefill), jax.jit(SlamV3.decode_step)
    prefilled, cache = prefill(model, TOKENS[..., :4], cache, memory, lengths=lengths)
    for i in range(3):
        token = np.take_along_axis(TOKENS, lengths[..., None] + i, axis=-1)[..., 0]
        logits, cache = step(model, token, cache, memory)
        place = (lengths + i)[..., None, None]
        expected = np.take_along_axis(np.asarray(full), place, axis=-2)[..., 0, :]
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(prefilled[0, 2], full[0, 2, :4], atol=1e-5)


# Each of PARTS is in one of the first two.
SEVERAL = (
    ("isolated", "residual", "cross_modal", "latent"),
    ("shared", "mean", "concat", "fusion_mlp"),
)


@pytest.mark.parametrize(
    "parts", [*SEVERAL, *(pytest.param((part,), marks=pytest.mark.slow) for part in PARTS)], ids=str
)
def test_every_gradient_without_some_parts_is_finite_and_there(parts, inputs):
    assert {*SEVERAL[0], *SEVERAL[1]} == set(PARTS)
    model = build(without=parts)

    @jax.jit
    def gradients(model):
        return nnx.state(jax.grad(lambda m: jnp.sum(m(TOKENS, inputs).logits ** 2))(model))

    for path, gradient in parameters(gradients(model)).items():
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient) or path.startswith("alignment"), path


def test_without_a_bank_there_are_no_weights_of_shared_attention(inputs):
    model = build(without=("shared",))
    found = jax.eval_shape(lambda: model(TOKENS, inputs, attention=True).attention)
    assert found.processes is None


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
