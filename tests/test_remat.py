"""Rematerialisation gives the same gradients and stores less."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from slam_jax.language_models.registry import SYSTEMS, make_config, make_model
from slam_jax.slam_v3 import Inputs
from slam_jax.slam_v3.config import ImageConfig
from slam_jax.training import language_model_loss, merge_model, split_model

pytestmark = pytest.mark.release

VIT = ImageConfig("vit", size=6, num_layers=1)
CHANGES = dict(num_process_layers=1, num_decoder_layers=1, dropout=0.1, image=VIT)
TOKENS = np.arange(2 * 3 * 5).reshape(2, 3, 5) % 13


@pytest.fixture(scope="module")
def make_loss(build, make_inputs):
    """`make_loss(policy)`: a loss of the parameters, and the parameters."""
    inputs = make_inputs(2, size=6)
    inputs = Inputs(text=inputs.text, text_mask=inputs.text_mask, image=inputs.image)

    @functools.cache
    def make(policy):
        graphdef, params = split_model(build(remat=policy, **CHANGES))

        def loss(params):
            model = merge_model(graphdef, params)
            logits = model(TOKENS, inputs, key=jax.random.key(1)).logits
            return (logits**2).mean()

        return loss, params

    return make


@functools.cache
def language_model(name, policy):
    """A loss of the parameters of a system, and the parameters."""
    config = make_config(name, "tiny", vocab_size=13, remat=policy)
    graphdef, params = split_model(jax.jit(lambda: make_model(config, rngs=nnx.Rngs(0)))())

    def loss(params):
        model = merge_model(graphdef, params)
        return language_model_loss(model, TOKENS[:, 0], key=jax.random.key(1)).total

    return loss, params


def assert_same_gradients(expected, actual):
    most = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6 * most), actual, expected)


def kept(loss, params):
    """The number of residuals: what the forward pass stores for the backward pass."""
    back = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    own = sum(x.size for x in jax.tree.leaves(params))
    return sum(x.size for x in jax.tree.leaves(back)) - own


@pytest.mark.parametrize("policy", [pytest.param("maps", marks=pytest.mark.slow), "layers"])
def test_gradients_are_the_same_whatever_is_kept(make_loss, policy):
    given = make_loss(None), make_loss(policy)
    assert_same_gradients(*(jax.jit(jax.grad(loss))(params) for loss, params in given))


def test_each_policy_keeps_less(make_loss):
    everything, maps, layers = (kept(*make_loss(policy)) for policy in (None, "maps", "layers"))
    assert 0 < layers < 0.7 * maps and maps < 0.6 * everything


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "standard" else pytest.mark.slow) for name in SYSTEMS],
)
def test_language_models_keep_less_for_the_same_gradients(name):
    everything, maps, layers = (
        kept(*language_model(name, policy)) for policy in (None, "maps", "layers")
    )
    assert layers < maps < everything
    given = language_model(name, None), language_model(name, "layers")
    assert_same_gradients(*(jax.jit(jax.grad(loss))(params) for loss, params in given))
