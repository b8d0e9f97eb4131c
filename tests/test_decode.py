"""Greedy decoding: its tokens, when it stops, and that neither the cache nor pads change it."""

import dataclasses
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slam_jax.errors import InputError
from slam_jax.generation import Sampling, greedy_decode
from slam_jax.generation.decode import Ends, start_decoding
from slam_jax.language_models import make_config, make_model
from slam_jax.layers import LatentCache
from slam_jax.layers.masks import prefix_mask
from slam_jax.slam_v3 import Inputs, SlamV3, SlamV3Config

VOCAB, PAD, EOS = 11, 0, 1


class Cache(NamedTuple):
    total: jax.Array  # sum of the tokens seen by each row
    room: jax.Array


@jax.tree_util.register_static
class Adder:
    """The next token is (sum of all tokens so far + memory) mod VOCAB: a wrong history shows."""

    def __init__(self):
        self.steps = []

    def init_cache(self, batch_shape, max_length):
        return Cache(jnp.zeros(batch_shape, jnp.int32), jnp.full(batch_shape, max_length))

    def _logits(self, total, memory):
        offset = 0 if memory is None else memory.reshape(-1, *[1] * (total.ndim - 1))
        return jax.nn.one_hot((total + offset) % VOCAB, VOCAB)

    def prefill(self, tokens, cache, memory, *, lengths):
        width = tokens.shape[-1]
        total = jnp.sum(jnp.where(prefix_mask(lengths, width), tokens, 0), axis=-1)
        logits = self._logits(jnp.cumsum(tokens, axis=-1), memory)
        return logits, Cache(total, cache.room - lengths)

    def decode_step(self, tokens, cache, memory):
        jax.debug.callback(lambda room: self.steps.append(room), cache.room)
        cache = Cache(cache.total + tokens, cache.room - 1)
        return self._logits(cache.total, memory), cache


def expected(prompt, offset, max_new_tokens):
    tokens, new = list(prompt), []
    while len(new) < max_new_tokens and EOS not in new:
        new.append((sum(tokens) + offset) % VOCAB)
        tokens.append(new[-1])
    return new + [PAD] * (max_new_tokens - len(new))


def decode(model, memory, prompts, lengths, max_new_tokens):
    settings: Any = {"max_new_tokens": max_new_tokens, "eos_id": EOS, "pad_id": PAD}
    return jax.jit(partial(greedy_decode, model, **settings))(memory, prompts, lengths).tokens


@pytest.mark.parametrize("question_shape", [(), (4,), (2, 2)])
def test_continues_every_row_of_any_shape_by_its_own_history(question_shape):
    rng = np.random.default_rng(0)
    shape = (3, *question_shape)
    prompts = rng.integers(2, VOCAB, (*shape, 5), dtype=np.int32)
    lengths = rng.integers(1, 6, shape, dtype=np.int32)
    memory = np.array([3, 5, 9], np.int32)
    new = decode(Adder(), memory, prompts, lengths, 6)
    assert new.shape == (*shape, 6)
    for row in np.ndindex(shape):
        assert new[row].tolist() == expected(prompts[row][: lengths[row]], memory[row[0]], 6)


def test_a_model_without_memory_decodes_too():
    new = decode(Adder(), None, jnp.array([[2, 3, 4]]), jnp.array([3]), 4)
    assert new[0].tolist() == expected([2, 3, 4], 0, 4)


def test_nothing_after_a_prompt_changes_its_continuation():
    lengths = jnp.array([2, 2])
    new = decode(Adder(), None, jnp.array([[4, 5, PAD, PAD], [4, 5, 7, 9]]), lengths, 5)
    assert new[0].tolist() == new[1].tolist()


def test_a_row_yields_pads_after_its_eos_while_the_others_continue():
    # Sums 12, 5 and 7: the first row says EOS at once, the second 5 10 9 .., the third 7 3 6 EOS.
    new = decode(Adder(), None, jnp.array([[12], [5], [7]]), jnp.array([1, 1, 1]), 5)
    assert new.tolist() == [[EOS, 0, 0, 0, 0], [5, 10, 9, 7, 3], [7, 3, 6, EOS, 0]]


@pytest.mark.parametrize(("prompts", "steps"), [([[12], [12]], 0), ([[12], [7]], 3), ([[2]], 7)])
def test_the_loop_ends_with_the_last_row_and_never_outgrows_the_cache(prompts, steps):
    model = Adder()
    prompts = jnp.array(prompts)
    decode(model, None, prompts, jnp.ones(len(prompts), jnp.int32), 8)
    jax.effects_barrier()
    assert len(model.steps) == steps
    assert all((room > 0).all() for room in model.steps)


def test_asking_for_no_token_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens is 0; ask for at least 1"):
        decode(Adder(), None, jnp.array([[2]]), jnp.array([1]), 0)


def test_slam_v3_decodes_the_same_with_its_cache_as_with_a_full_forward_pass_per_token():
    config = SlamV3Config.preset("tiny", vocab_size=VOCAB)
    shapes = nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(shapes, nnx.Param)
    rng = np.random.default_rng(0)
    # Larger weights than an initialisation has, around 1 where they scale the output of a norm:
    # otherwise the history hardly counts.
    params = jax.tree.map(
        lambda p: jnp.array(rng.normal(p.ndim == 1, 0.3, p.shape), p.dtype), shapes
    )
    inputs = Inputs(aux=jnp.array(rng.normal(size=(2, 3, 5)), jnp.float32))
    prompts = jnp.array(rng.integers(2, VOCAB, (2, 3, 4)), jnp.int32)
    lengths = jnp.array(rng.integers(1, 5, (2, 3)), jnp.int32)
    new_tokens = 6

    @jax.jit
    def cached(params):
        model = nnx.merge(graphdef, params)
        settings: Any = {"max_new_tokens": new_tokens, "eos_id": EOS, "pad_id": PAD}
        return greedy_decode(model, model.encode(inputs), prompts, lengths, **settings).tokens

    @jax.jit
    def forward(params, tokens):
        return nnx.merge(graphdef, params)(tokens, inputs).logits

    tokens = np.pad(prompts, ((0, 0), (0, 0), (0, new_tokens)))
    naive = np.full((2, 3, new_tokens), PAD)
    for i in range(new_tokens):
        logits = np.asarray(forward(params, tokens))
        for row in np.ndindex(2, 3):
            if EOS not in naive[row]:
                naive[row][i] = logits[row][lengths[row] + i - 1].argmax()
                tokens[row][lengths[row] + i] = naive[row][i]
    assert len({tuple(row) for row in naive.reshape(6, -1)}) > 3
    np.testing.assert_array_equal(cached(params), naive)


@cache
def language_model(name: str, **changes: Any) -> Any:
    """A tiny model of random weights, larger than an initialisation's: its answers differ."""
    config = make_config(name, "tiny", **changes)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return nnx.merge(
        graphdef, jax.tree.map(lambda p: jnp.array(rng.normal(0, 0.3, p.shape), p.dtype), shapes)
    )


@pytest.mark.release
def test_a_bucket_of_shapes_is_compiled_once():
    """Greedy decoding of ids, called by itself; each answer is that of a call under `jax.jit`."""
    model, rng = language_model("standard"), np.random.default_rng(0)
    compiled: Any = start_decoding
    before = compiled._cache_size()
    for rows, length, new in ((3, 4, 5), (4, 9, 3), (3, 16, 16)):
        prompts, lengths = rng.integers(2, 61, (rows, length), np.int32), np.full(rows, length)
        lengths[0] -= 1
        settings: Any = {"max_new_tokens": new, "eos_id": -1, "pad_id": 0}
        found = greedy_decode(model, None, prompts, lengths, **settings)
        assert found.tokens.shape == found.logprobs.shape == (rows, new)
    assert compiled._cache_size() == before + 1
    expected = jax.jit(partial(greedy_decode, **settings))(model, None, prompts, lengths)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    with pytest.raises(InputError, match="a prompt length is 0; expected 1 to 16"):
        greedy_decode(model, None, prompts, np.array([16, 0, 16]), **settings)
    with pytest.raises(InputError, match="prompt of 16 tokens and 16 new ones; the context is 20"):
        short = language_model("standard", context_length=20)
        greedy_decode(short, None, prompts, lengths, **settings)
    # Under jit lengths are not known: a row ends where the context does.
    cut = jax.jit(partial(greedy_decode, **settings))(short, None, prompts, lengths).tokens
    kept = np.arange(16) < 20 - lengths[:, None]
    np.testing.assert_array_equal(cut, np.where(kept, found.tokens, 0))
    limit = np.full(3, 99)
    keys, rules = jnp.broadcast_to(jax.random.key(0), (3,)), Sampling().rules
    state = start_decoding(
        model, None, prompts, lengths, keys, rules, Ends(np.array([-1]), 0), limit, 16
    )
    assert state.limit.tolist() == [16] * 3


@pytest.mark.parametrize("name", ["standard", "slam_v3_text"])
def test_a_step_beyond_the_context_is_refused(name):
    model = language_model(name, context_length=16)
    cache = dataclasses.replace(model.init_cache((2,), 40), length=jnp.array([1, 16]))
    with pytest.raises(InputError, match="17 tokens; the context is 16"):
        model.decode_step(np.ones(2, np.int32), cache)


@pytest.mark.parametrize("name", ["standard", "slam_v3_text"])
def test_pads_change_nothing_whatever_their_id(name):
    model, lengths = language_model(name), np.array([4, 6])
    real = np.arange(6) < lengths[:, None]
    text = np.random.default_rng(0).integers(2, 61, real.shape, np.int32)

    @jax.jit
    def read(tokens):
        logits, _ = model.prefill(tokens, model.init_cache((2,), 6), None, lengths=lengths)
        return model(tokens, real).logits, logits

    # -100 is the usual label of a pad, and 128,256 the first id beyond a usual vocabulary.
    usual, *others = (read(np.where(real, text, pad)) for pad in (0, -100, 128_256))
    for other in others:
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[real], y[real]), usual, other)


@pytest.mark.parametrize("name", ["standard", "slam_v3_text"])
@pytest.mark.parametrize(
    ("num_tokens", "lengths", "stored", "message"),
    [
        (4, [4, 0], 0, "a prompt length is 0; expected 1 to 4"),
        (4, [-1, 4], 0, "a prompt length is -1; expected 1 to 4"),
        (4, [4, 5], 0, "a prompt length is 5; expected 1 to 4"),
        (40, None, 0, "40 tokens; the context is 16"),
        (40, [40, 1], 0, "40 tokens; the context is 16"),
        (0, None, 0, "prefill of 0 tokens; give at least one a row"),
        (4, None, 3, "cache that stores 3 tokens; .* or continue it with append=True"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(name, num_tokens, lengths, stored, message):
    model = language_model(name, context_length=16)
    empty = model.init_cache((2,), 40)
    filled = dataclasses.replace(empty, length=empty.length + stored)
    lengths = None if lengths is None else np.array(lengths)
    with pytest.raises(InputError, match=message):
        model.prefill(np.ones((2, num_tokens), np.int32), filled, None, lengths=lengths)


def test_the_cache_of_a_layer_is_filled_once():
    latents = jnp.ones((1, 2, 4))
    cache = LatentCache.empty((1,), 8, 4, 4, jnp.float32).filled(latents, latents, None)
    with pytest.raises(InputError, match="prefill into a cache that stores 2 tokens"):
        cache.filled(latents, latents, None)
