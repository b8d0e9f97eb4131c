"""The slots on the device: rows of one cache, and the step that continues all of them.

A slot's answer depends neither on its place nor on its neighbours. One compiled step serves all
slots; prompts are read one by one, in pieces whose sizes depend on the prompt alone.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from slam_jax.array_typing import AnyArray
from slam_jax.generation.decode import LEAST_LENGTH, bucket, only_allowed
from slam_jax.generation.sampling import Rules, Sampling, choose

MOST_TOP = 20
"""The most tokens a step whose log-probabilities a request may ask for."""


@struct.dataclass
class Rows:
    """The state of S slots between two steps.

    token: the last one of each, which the cache does not store yet. index: tokens that the answer
    has. seen: tokens of the prompt and the answer. top: whether the request asks for the most
    probable tokens. memory: of the encoder, [S, ..], None without one.
    """

    cache: Any
    memory: Any
    token: Int[Array, "S"]
    index: Int[Array, "S"]
    keys: Key[Array, "S"]
    seen: Bool[Array, "S V"]
    rules: Rules
    top: Bool[Array, "S"]


class Chosen(NamedTuple):
    """The next token of each slot and its log-probability under the model itself, in nats; and the
    K most probable tokens where they are asked for."""

    token: Int[AnyArray, "S"]
    logprob: Float[AnyArray, "S"]
    top_ids: Int[AnyArray, "S K"]
    top_logprobs: Float[AnyArray, "S K"]


class Start(NamedTuple):
    """What a sample needs to begin in a slot; its cache has all of the prompt but the last token.

    number: of the sample in its request.
    """

    cache: Any
    memory: Any
    token: int
    seed: int
    number: int
    seen: Bool[np.ndarray, "V"]
    sampling: Sampling
    top: bool


class Axes(NamedTuple):
    """The axis of the rows of one leaf of the cache, and the axis of its tokens.

    tokens is None where the leaf does not grow with its rows' tokens: it is a state, or a ring.
    """

    row: int
    tokens: int | None


def axes_of(model: Any, length: int) -> Any:
    """The `Axes` of each leaf of the model's cache for rows of `length` tokens, as a list."""

    def shapes(rows: int, length: int) -> list[Any]:
        return jax.tree.leaves(jax.eval_shape(lambda: model.init_cache((rows,), length)))

    found = []
    # A ring of at most `length` tokens is as large for longer rows.
    for leaf, more, longer in zip(
        shapes(2, length), shapes(3, length), shapes(2, length + 1), strict=True
    ):
        rows = [i for i, (a, b) in enumerate(zip(leaf.shape, more.shape, strict=True)) if a != b]
        grown = [i for i, (a, b) in enumerate(zip(leaf.shape, longer.shape, strict=True)) if a != b]
        [row] = rows
        tokens = grown[0] if len(grown) == 1 and leaf.shape[grown[0]] == length else None
        found.append(Axes(row, tokens))
    return found


class Slots:
    """The cache and the rules of all slots, and the compiled functions that change them.

    context: tokens that a slot has room for. memory: the shape of one row's memory, None without.
    Only one thread may use it.
    """

    def __init__(self, model: Any, count: int, context: int, allowed: Any, memory: Any):
        self.count, self.context = count, context
        leaves, self._tree = jax.tree.flatten(model)
        self._leaves = jax.device_put(leaves)
        self._allowed = None if allowed is None else jnp.asarray(allowed)
        self.axes = tuple(axes_of(model, context))
        self._memory = memory
        self.vocabulary = model.config.vocab_size
        self.any_token = jnp.ones((count, self.vocabulary), bool)
        self.rows = self._empty()

    def reset(self) -> None:
        """Empties all slots, also after a step that failed."""
        self.rows = self._empty()

    def empty_row(self) -> Any:
        """The cache of one row without tokens."""
        return _empty_cache(1, self.context, self._tree, self._shapes())

    def read(self, cache: Any, memory: Any, tokens: list[int]) -> Any:
        """The cache of one row with these tokens after those that it has; the given one is gone.

        Their number is rounded up to a power of two from 16 on.
        """
        padded = np.zeros((1, bucket(len(tokens), LEAST_LENGTH)), np.int32)
        padded[0, : len(tokens)] = tokens
        length = np.array([len(tokens)], np.int32)
        return _read(self._leaves, cache, memory, padded, length, tree=self._tree)

    def place(self, slot: int, start: Start) -> None:
        """Puts a sample into a slot."""
        row = (np.int32(start.token), np.uint32(start.seed), np.uint32(start.number))
        rest = (start.seen, start.sampling.rules, np.bool_(start.top))
        given = (np.int32(slot), start.cache, start.memory, *row, *rest)
        self.rows = _place(self.rows, *given, axes=self.axes)

    def step(self, mask: Any, active: Bool[np.ndarray, "S"]) -> Chosen:
        """One more token of all active slots; those of the others have no meaning.

        mask: [S, V], the tokens that may come next; `any_token` where there is no constraint.
        """
        given = (self._leaves, self.rows, self._allowed, mask, active)
        self.rows, chosen = _step(*given, tree=self._tree)
        return Chosen(*jax.device_get(chosen))

    def _shapes(self) -> tuple[Any, ...]:
        return tuple((leaf.shape, leaf.dtype) for leaf in self._leaves)

    def _empty(self) -> Rows:
        count = self.count
        rules = jax.tree.map(lambda x: jnp.full((count,), x), Sampling().rules)
        return Rows(
            cache=_empty_cache(count, self.context, self._tree, self._shapes()),
            memory=jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), self._memory),
            token=jnp.zeros((count,), jnp.int32),
            index=jnp.zeros((count,), jnp.int32),
            keys=jax.random.split(jax.random.key(0), count),
            seen=jnp.zeros((count, self.vocabulary), bool),
            rules=rules,
            top=jnp.zeros((count,), bool),
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_cache(count: int, length: int, tree: Any, shapes: tuple[Any, ...]) -> Any:
    model = tree.unflatten([jax.ShapeDtypeStruct(*each) for each in shapes])
    return model.init_cache((count,), length)


@functools.partial(jax.jit, static_argnames="tree", donate_argnums=1)
def _read(leaves, cache, memory, tokens, length, tree):
    # The logits are not used, so that they are not computed.
    model = tree.unflatten(leaves)
    return model.prefill(tokens, cache, memory, lengths=length, append=True)[1]


@functools.partial(jax.jit, static_argnames="axes", donate_argnums=0)
def _place(rows: Rows, slot, cache, memory, token, seed, number, seen, rules, top, axes) -> Rows:
    leaves, tree = jax.tree.flatten(rows.cache)
    news = jax.tree.leaves(cache)
    put = jax.lax.dynamic_update_slice_in_dim
    placed = [
        put(leaf, new, slot, axis.row) for leaf, new, axis in zip(leaves, news, axes, strict=True)
    ]
    key = jax.random.fold_in(jax.random.key(seed), number)
    return Rows(
        cache=tree.unflatten(placed),
        memory=jax.tree.map(lambda x, new: put(x, new, slot, 0), rows.memory, memory),
        token=rows.token.at[slot].set(token),
        index=rows.index.at[slot].set(0),
        keys=rows.keys.at[slot].set(key),
        seen=rows.seen.at[slot].set(seen),
        rules=jax.tree.map(lambda x, new: x.at[slot].set(new), rows.rules, rules),
        top=rows.top.at[slot].set(top),
    )


@functools.partial(jax.jit, static_argnames="tree", donate_argnums=1)
def _step(leaves, rows: Rows, allowed, mask, active, tree) -> tuple[Rows, Chosen]:
    model = tree.unflatten(leaves)
    logits, cache = model.decode_step(rows.token, rows.cache, rows.memory)
    logits = only_allowed(logits, allowed)
    keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.index)
    # An empty slot must not ask for the work of its last sample.
    temperature = jnp.where(active, rows.rules.temperature, 0)
    rules = dataclasses.replace(rows.rules, temperature=temperature)
    token = choose(jnp.where(mask, logits, -jnp.inf), rows.seen, keys, rules)
    logprobs = jax.nn.log_softmax(logits)
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    count = min(MOST_TOP, logits.shape[-1])

    def most_probable() -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(logprobs, count)
        return ids, values

    def none() -> tuple[Array, Array]:
        shape = (len(token), count)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, logprobs.dtype)

    top_ids, top_logprobs = jax.lax.cond(jnp.any(rows.top & active), most_probable, none)
    rows = dataclasses.replace(
        rows,
        cache=cache,
        token=token,
        index=rows.index + 1,
        seen=rows.seen | jax.nn.one_hot(token, logits.shape[-1], dtype=bool),
    )
    return rows, Chosen(token, logprob, top_ids, top_logprobs)
