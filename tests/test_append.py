"""A prefill that continues a filled cache is one prefill of all tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct

from slam_jax.errors import ConfigError, InputError
from slam_jax.language_models import SYSTEMS, make_config, make_model
from slam_jax.language_models.slam_v3_text import TextCache
from slam_jax.layers import GroupedQueryAttention, MultiHeadLatentAttention
from slam_jax.layers.kv_cache import KVCache, write_prompt, write_token, write_tokens
from slam_jax.layers.masks import prefix_mask
from slam_jax.slam_v3.decoder import Memory
from tests.test_language_models import build as build_tiny

# Rows in chunks of 7, of which each row gets some tokens, at first and at last also none. Some end
# in the window of 8 tokens of slam_v3_text in which they began. A decoding step reads one more.
LENGTH, CHUNK, WINDOW = 20, 7, 3
PARTS = np.array([[[3, 7, 6], [0, 7, 7]], [[7, 3, 2], [7, 5, 0]]])  # [2, 2, chunks]
TEXT = np.random.default_rng(0).integers(0, 61, (2, 2, LENGTH), np.int32)
TOTAL = PARTS.sum(axis=-1)


def chunks(text: np.ndarray = TEXT) -> tuple[np.ndarray, np.ndarray]:
    """[chunks, 2, 2, CHUNK] tokens with pads beyond the vocabulary, and where each one is in its
    row."""
    starts = np.cumsum(PARTS, axis=-1) - PARTS
    places = np.moveaxis(starts, -1, 0)[..., None] + np.arange(CHUNK)
    found = [np.take_along_axis(text, np.minimum(at, LENGTH - 1), axis=-1) for at in places]
    real = np.arange(CHUNK) < np.moveaxis(PARTS, -1, 0)[..., None]
    return np.where(real, found, 99), places


def close(x: Any, y: Any) -> None:
    np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)


def kept(x: jax.Array, count: jax.Array) -> jax.Array:
    """x [*B, .., T, C] with zeros after the first `count` [*B] entries."""
    rows = count.reshape(*count.shape, *[1] * (x.ndim - 2 - count.ndim))
    return jnp.where(prefix_mask(rows, x.shape[-2])[..., None], x, 0)


def stored(cache: Any) -> Any:
    """The cache with zeros in all entries in which no token is stored."""

    def of_layer(x: Any) -> Any:
        if not hasattr(x, "capacity"):
            return x
        names = [name for name in vars(x) if name != "length"]
        return dataclasses.replace(x, **{name: kept(getattr(x, name), x.length) for name in names})

    if isinstance(cache, TextCache):
        size = cache.window.shape[-1]
        known = jnp.where(cache.length < size, 0, size)
        window = kept(cache.window[..., None], cache.length % size)
        cache = dataclasses.replace(cache, c_mem=kept(cache.c_mem, known), window=window)
    return jax.tree.map(of_layer, cache, is_leaf=lambda x: hasattr(x, "capacity"))


@struct.dataclass
class Results:
    """logits of the chunks, the caches after all of them and after one prefill, the logits of a
    decoding step from both, and the logits of the full pass."""

    chunks: Any
    caches: Any
    steps: Any
    full: Any


@jax.jit
def read(model: Any, memory: Any, text: Any, each: Any, lengths: Any) -> Results:
    """The chunks one after the other, all tokens at once, and a step after both."""

    def more(cache: Any, chunk: Any) -> tuple[Any, Any]:
        tokens, lengths = chunk
        logits, cache = model.prefill(tokens, cache, memory, lengths=lengths, append=True)
        return cache, logits

    empty = model.init_cache(TOTAL.shape, LENGTH)
    appended, logits = jax.lax.scan(more, empty, (each, lengths))
    at_once = model.prefill(text, empty, memory, lengths=lengths.sum(axis=0))[1]
    last = jnp.take_along_axis(text, lengths.sum(axis=0)[..., None], axis=-1)[..., 0]
    steps = [model.decode_step(last, cache, memory)[0] for cache in (appended, at_once)]
    full = model(text).logits if memory is None else model.decode(text, memory)
    return Results(logits, [stored(appended), stored(at_once)], steps, full)


def check(model: Any, memory: Any = None, text: np.ndarray = TEXT) -> None:
    each, places = chunks(text)
    found = read(model, memory, text, each, np.moveaxis(PARTS, -1, 0))
    full = np.asarray(found.full)
    for logits, at, real in zip(found.chunks, places, each != 99, strict=True):
        expected = np.take_along_axis(full, np.minimum(at, LENGTH - 1)[..., None], axis=-2)
        close(logits[real], expected[real])
    close(found.steps[0], found.steps[1])
    close(found.steps[0], np.take_along_axis(full, TOTAL[..., None, None], axis=-2)[..., 0, :])
    jax.tree.map(close, *found.caches)


FLOAT64: Any = dict(dtype="float64", param_dtype="float64")
ALTERNATING: Any = dict(num_layers=4, window=WINDOW, window_layers=(True, True, False, False))
# As few layers as have all that a model consists of.
MODELS: dict[str, tuple[str, Any]] = {
    **{name: (name, {}) for name in SYSTEMS},
    "jamba": ("jamba", dict(num_layers=3)),
    "deepseek_v2": ("deepseek_v2", dict(num_layers=2)),
    "sigmoid": ("deepseek_v2", dict(num_layers=2, sigmoid=True)),
    **{name: (name, dict(num_layers=2)) for name in ("hunyuan_large", "hunyuan_v1_moe", "moe")},
    **{
        name: (name, dict(level_layers=1)) for name in SYSTEMS if name[:6] in ("slam_v4", "slam_v5")
    },
    "windows": ("standard", ALTERNATING),
    "windows, scanned": ("standard", dict(ALTERNATING, scan_layers=True)),
    "jamba, scanned": ("jamba", dict(num_layers=8, scan_layers=True)),
}
# One of each kind of cache, and of learned positions; the others have nothing else.
FAST = ("jamba", "deepseek_v2", "hunyuan_large", "slam_v4", "slam_v5", "slam_v3_text")


@pytest.mark.release
@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=() if key in (*FAST, "windows, scanned") else pytest.mark.slow)
        for key in MODELS
    ],
)
def test_a_language_model_reads_chunks_as_it_reads_the_whole(key):
    name, changes = MODELS[key]
    with jax.enable_x64(True):
        check(build_tiny(name, **changes, **FLOAT64))


# The decoder's cache of latents, with rings, and of keys and values.
@pytest.mark.parametrize(
    "changes",
    [
        dict(window=WINDOW),
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(dict(without=("latent",)), marks=pytest.mark.slow),
    ],
    ids=["window", "plain", "without latent"],
)
def test_the_decoder_of_slam_v3_reads_chunks_as_it_reads_the_whole(build, changes):
    with jax.enable_x64(True):
        model = build(**changes, **FLOAT64)
        rng, width = np.random.default_rng(0), model.config.memory_dim
        mask = jnp.array([[True] * 5, [True, True, False, False, False]])
        check(model, Memory(jnp.asarray(rng.normal(size=(2, 5, width))), mask), TEXT % 13)


def test_a_cache_takes_the_new_tokens_of_each_row_and_no_other():
    """Entries are numbered as they come; the window of 3 makes rings of the second cache."""
    old, new = (jnp.arange(first, first + 6.0).reshape(2, 3, 1, 1) for first in (1, 11))
    append = jax.jit(KVCache.appended, static_argnames="window")

    def entries(lengths, more, capacity, window=None):
        cache = KVCache.empty((2,), capacity, 1, 1, jnp.float32)
        cache = cache.filled(old, old, jnp.array(lengths), window)
        (k, _), after = append(cache, new, new, jnp.array(more), window)
        np.testing.assert_array_equal(
            k[..., 0, 0], np.hstack([cache.k[:, 0, :, 0], new[..., 0, 0]])
        )
        assert after.length.tolist() == np.add(lengths, more).tolist()
        return cache.k[:, 0, :, 0].tolist(), after.k[:, 0, :, 0].tolist()

    assert entries([2, 3], [2, 0], 4)[1] == [[1, 2, 11, 12], [4, 5, 6, 0]]
    # Row 0 has room for one of its three tokens.
    before, after = entries([3, 1], [3, 3], 4)
    assert after == [[1, 2, 3, 11], [4, 14, 15, 16]]
    assert before == [[1, 2, 3, 0], [4, 5, 6, 0]]
    assert entries([3, 2], [2, 0], 3, window=3)[1] == [[11, 12, 3], [4, 5, 6]]
    assert entries([1, 2], [3, 2], 3, window=3)[1] == [[13, 11, 12], [15, 5, 14]]
    cache = KVCache.empty((2,), 4, 1, 1, jnp.float32).filled(old, old, jnp.array([3, 1]))
    with pytest.raises(InputError, match="would store 5 tokens and there is room for 4"):
        cache.appended(new, new, jnp.array([2, 3]))


# --- What is refused


def make_sizes(name: str, **changes: Any) -> Any:
    """A model without parameters: nothing can be computed with it."""
    config = make_config(name, "tiny", **changes)
    return nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))


def filled(model: Any, max_length: int, *lengths: int) -> Any:
    """A cache whose two rows are said to store so many tokens."""
    cache = model.init_cache((2, 1), max_length)
    length = jnp.array(lengths).reshape(cache.length.shape)
    return dataclasses.replace(cache, length=length)


@pytest.mark.parametrize("name", ["standard", "slam_v3_text"])
@pytest.mark.parametrize(
    ("num_tokens", "lengths", "message"),
    [
        (4, [4, -1], "a prompt length is -1; expected 0 to 4"),
        (4, [4, 5], "a prompt length is 5; expected 0 to 4"),
        (0, None, "prefill of 0 tokens; give at least one a row"),
        (11, [11, 0], "17 tokens; the context is 16"),
        (11, None, "17 tokens; the context is 16"),
    ],
)
def test_tokens_that_cannot_follow_are_refused(name, num_tokens, lengths, message):
    model, text = make_sizes(name, context_length=16), np.ones((2, 1, num_tokens), np.int32)
    lengths = None if lengths is None else np.array(lengths)[:, None]
    with pytest.raises(InputError, match=message):
        model.prefill(text, filled(model, 40, 6, 2), lengths=lengths, append=True)


def test_a_chunk_needs_room_in_the_caches_that_are_no_rings(monkeypatch):
    logits, text = jnp.zeros((2, 1, 4, 61)), np.ones((2, 1, 4), np.int32)
    lengths = np.array([[4], [1]])

    def extend(model, cache):
        monkeypatch.setattr(type(model), "_prefill", lambda *given: (logits, None))
        return model.prefill(text, cache, lengths=lengths, append=True)[0] is logits

    full = "a row of the cache would store 10 tokens and there is room for 9: .*max_length=10 or"
    for layers in ((True, False), (False, True), (False, False), (True, True)):
        model = make_sizes("standard", num_layers=2, window=WINDOW, window_layers=layers)
        assert extend(model, filled(model, 10, 6, 9))
        if all(layers):
            assert extend(model, filled(model, 9, 6, 9))
            continue
        with pytest.raises(InputError, match=full):
            extend(model, filled(model, 9, 6, 2))
    # Without its attention Jamba has no cache that can be full, and windows of text have none.
    for name, changes in (("jamba", dict(num_layers=2)), ("slam_v3_text", {})):
        model = make_sizes(name, **changes, context_length=10)
        assert extend(model, filled(model, 1, 6, 9))


def test_the_decoder_of_slam_v3_refuses_a_chunk_without_room(build):
    text, model = np.ones((2, 2, 4), np.int32), build()
    memory = Memory(jnp.zeros((2, 1, model.config.memory_dim)))
    model, memory = jax.eval_shape(lambda *given: given, model, memory)
    cache = model.init_cache((2, 2), 9)
    cache = tuple(dataclasses.replace(x, length=x.length + 6) for x in cache)
    with pytest.raises(InputError, match="would store 10 tokens and there is room for 9"):
        model.prefill(text, cache, memory, lengths=np.array([[3, 4], [0, 1]]), append=True)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 1, 4), (2, 2, 3)])
def test_tokens_that_a_cache_would_broadcast_are_refused(shape):
    """Other rows, other features, and more than one token in a step."""
    buffers, tokens, length = (jnp.zeros((2, 4, 3)),), (jnp.ones(shape),), jnp.zeros(2, jnp.int32)
    with pytest.raises(InputError, match="expected as many rows|a step of 2 tokens"):
        write_token(buffers, tokens, length)
    if shape[1] == 1:
        for write in (write_prompt, write_tokens):
            with pytest.raises(InputError, match="expected as many rows"):
                write(buffers, tokens, length, None)


def test_a_layer_without_a_window_or_with_half_a_pair_is_refused():
    widths: Any = dict(kv_lora_rank=2, qk_nope_head_dim=2, v_head_dim=2, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="qk_rope_head_dim is 3; expected an even number"):
        MultiHeadLatentAttention(4, 2, qk_rope_head_dim=3, **widths)
    with pytest.raises(ConfigError, match="window is 0; expected at least 1"):
        MultiHeadLatentAttention(4, 2, qk_rope_head_dim=2, window=0, **widths)
    with pytest.raises(ConfigError, match="window is 0; expected at least 1"):
        GroupedQueryAttention(4, 2, window=0, rngs=nnx.Rngs(0))
