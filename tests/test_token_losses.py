"""Losses of a few tokens at a time are those of all at once, and never hold more logits."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slam_jax.data import Batch
from slam_jax.errors import ConfigError
from slam_jax.language_models import SYSTEMS, make_config, make_model
from slam_jax.protocol import Headed
from slam_jax.slam_v3 import Inputs
from slam_jax.training import LossConfig, language_model_loss, slam_v3_loss
from slam_jax.training.losses import token_losses, token_losses_in_chunks

TOKENS, DIM, VOCAB = (3, 7), 8, 50
slow = pytest.mark.slow


def close(x: Any, y: Any, tolerance: float = 2e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), x, y)


@pytest.fixture
def given():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (*TOKENS, DIM))
    kernel = jax.random.normal(keys[1], (DIM, VOCAB))
    return kernel, hidden, jax.random.randint(keys[2], TOKENS, 0, VOCAB)


def weighted(losses: Any) -> Any:
    """A scalar to which every token contributes by its own share."""
    share = jnp.arange(1.0, losses.z.size + 1).reshape(losses.z.shape) / losses.z.size
    return jnp.sum(share * losses.cross_entropy) + 0.1 * jnp.sum(losses.z / share)


def full(kernel, hidden, targets):
    return token_losses(hidden @ kernel, targets)


def in_chunks(kernel, hidden, targets, chunk_tokens=4):
    return token_losses_in_chunks(lambda h: h @ kernel, hidden, targets, chunk_tokens)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 21, 64])
def test_chunks_of_any_size_give_the_losses_and_gradients_of_full_logits(given, chunk_tokens):
    chunked = functools.partial(in_chunks, chunk_tokens=chunk_tokens)
    close(jax.jit(chunked)(*given), jax.jit(full)(*given))
    gradients = [
        jax.jit(jax.grad(lambda *z, loss=loss: weighted(loss(*z)), (0, 1)))(*given)
        for loss in (full, chunked)
    ]
    close(*gradients)


def test_the_most_probable_token_is_the_right_one_or_not(given):
    kernel, hidden, _ = given
    best = jnp.argmax(hidden @ kernel, axis=-1)
    targets = jnp.where(jnp.arange(TOKENS[1]) < 3, best, (best + 1) % VOCAB)
    right = in_chunks(kernel, hidden, targets).correct
    np.testing.assert_array_equal(right, np.broadcast_to(np.arange(7) < 3, TOKENS))


def sizes(jaxpr: Any) -> list[int]:
    """Of every array that a program makes, the programs within it included."""
    found = []
    for equation in jaxpr.eqns:
        found += [v.aval.size for v in equation.outvars]
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            found += sizes(inner) if hasattr(inner, "eqns") else []
    return found


def test_there_are_never_more_logits_than_those_of_a_chunk(given):
    def largest(loss):
        program = jax.make_jaxpr(jax.grad(lambda *z: weighted(loss(*z)), (0, 1)))(*given)
        return max(sizes(program.jaxpr))

    tokens, kernel = TOKENS[0] * TOKENS[1], DIM * VOCAB
    assert largest(full) == tokens * VOCAB
    assert largest(in_chunks) == kernel  # 4 tokens of 50 are fewer


# All systems but slam_v3_text share one forward pass.
FAST = ("standard", "slam_v3_text")


@pytest.mark.release
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in FAST else slow) for x in SYSTEMS]
)
def test_every_language_model_is_its_head_on_its_hidden_states(name):
    model = nnx_model(name)
    tokens = jnp.arange(14).reshape(2, 7) % model.config.vocab_size
    mask = jnp.arange(7)[None] < jnp.array([[7], [5]])
    assert isinstance(model, Headed)

    @jax.jit
    def both(model):
        hidden = model.hidden(tokens, mask)
        output = model(tokens, mask)
        return (model.logits(hidden.states), hidden.aux_loss), (output.logits, output.aux_loss)

    close(*both(model))


# A head of its own, one tied to the embeddings, and windows whose pads have to be moved.
@pytest.mark.release
@pytest.mark.parametrize(
    "name", ["moe", *(pytest.param(x, marks=slow) for x in ("hunyuan_large", "slam_v3_text"))]
)
def test_a_language_model_learns_the_same_from_chunks(name):
    model = nnx_model(name)
    tokens = jnp.arange(16).reshape(2, 8) * 7 % model.config.vocab_size
    mask = jnp.arange(8)[None] >= jnp.array([[0], [3]])

    def learned(chunk_tokens):
        def loss(model):
            parts = language_model_loss(model, tokens, mask, chunk_tokens=chunk_tokens)
            return parts.total, parts

        gradient, parts = jax.jit(jax.grad(loss, has_aux=True))(model)
        return nnx.to_pure_dict(nnx.state(gradient)), parts

    close(learned(5), learned(None))


@pytest.mark.release
def test_slam_v3_learns_the_same_from_chunks(build, make_inputs):
    prompt = np.array([[2, 3], [4, 2]], np.int32)
    tokens = np.random.default_rng(0).integers(3, 13, (2, 2, 7), np.int32)
    batch = Batch(Inputs(aux=make_inputs(2).aux), tokens, prompt, prompt + 2)

    def learned(chunk_tokens):
        config = LossConfig(z_loss=0.1, chunk_tokens=chunk_tokens)

        def loss(model):
            parts = slam_v3_loss(model, batch, config, key=jax.random.key(1))
            return parts.total, parts

        gradient, parts = jax.jit(jax.grad(loss, has_aux=True))(
            build(dropout=0.1, num_decoder_layers=1)
        )
        return nnx.to_pure_dict(nnx.state(gradient)), parts

    found, expected = learned(5), learned(None)
    assert expected[1].z_loss > 0
    close(found, expected, 1e-4)


def test_a_mask_that_would_broadcast_is_refused():
    tokens, mask = np.zeros((2, 8), np.int32), np.ones((1, 8), bool)
    # Without the types that are checked in tests alone.
    with pytest.raises(AssertionError, match="shape"):
        inspect.unwrap(language_model_loss)(None, tokens, mask)


def test_a_chunk_has_at_least_one_token():
    with pytest.raises(ConfigError, match="loss.chunk_tokens is 0"):
        LossConfig(chunk_tokens=0)
    assert dataclasses.asdict(LossConfig())["chunk_tokens"] is None


@functools.cache
def nnx_model(name: str) -> Any:
    config = make_config(name, "tiny")
    return jax.jit(lambda: make_model(config, rngs=nnx.Rngs(0)))()
