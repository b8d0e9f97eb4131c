"""The full forward pass, the prefill and the decoding step of a stack of blocks.

A model is a stack of blocks. A block says once what it computes, in terms of `ForwardPass.mix`, and
thereby serves the full forward pass, the prefill of a prompt or of a part of it, and a decoding
step:

    def __call__(self, h, forward, cache, key):
        a, cache = forward.mix(self.attention, self.norm(h), cache)
        return h + a, cache, ()
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slam_jax.array_typing import AnyArray
from slam_jax.errors import InputError
from slam_jax.language_models.config import LanguageModelConfig
from slam_jax.layers.attention import causal_layout
from slam_jax.layers.constrain import constrain, gather_rows, taken
from slam_jax.layers.dropout import split
from slam_jax.layers.embedding import Embedding
from slam_jax.layers.experts import MixtureOfExperts
from slam_jax.layers.kv_cache import check_appended, check_prompts, new_positions
from slam_jax.layers.linear import Initializer, Linear
from slam_jax.layers.masks import prefix_mask, without_unknown_pads
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.precision import precise
from slam_jax.layers.router import Routing, load_balancing_loss
from slam_jax.layers.stacked import collect, kinds, run_layers
from slam_jax.protocol import Hidden, Output


def rms_norm(config: LanguageModelConfig) -> RMSNorm:
    """A norm of the width D."""
    param_dtype = config.dtypes["param_dtype"]
    return RMSNorm(config.embed_dim, epsilon=config.norm_epsilon, param_dtype=param_dtype)


def layer_norm(config: LanguageModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """The same with a mean and a bias."""
    return nnx.LayerNorm(config.embed_dim, epsilon=config.norm_epsilon, **config.dtypes, rngs=rngs)


class ForwardPass(NamedTuple):
    """What the blocks have to know of one call of a model.

    mix(mixer, x, cache) -> (y, cache): calls a token mixer, such as an attention. It is the only
      thing that differs between the full forward pass, the prefills and a decoding step: it is
      `mixer(x, layout)`, `mixer.prefill`, `mixer.append` or `mixer.decode_step`.
    positions: of the tokens in their rows. mask: True = real, None = all are.
    training: whether the call has a key for dropout.
    """

    mix: Callable[[Any, jax.Array, Any], tuple[Any, Any]]
    positions: Int[Array, "*#B T"]
    mask: Bool[Array, "*B T"] | None = None
    training: bool = False


def feed_forward(mlp: Any, x: Float[Array, "*B T D"], forward: ForwardPass) -> tuple[Any, Any]:
    """The output of an MLP or of a mixture of experts, and how the experts routed their tokens."""
    if not isinstance(mlp, MixtureOfExperts):
        return mlp(x), ()
    y, routing = mlp(x, mask=forward.mask, training=forward.training)
    return y, (routing,)


class PreNormBlock(nnx.Module):
    """h += attention(norm(h)); h += mlp(norm(h)), where the MLP may be a mixture of experts.

    norms: of the two, None = RMS norms. name: attribute of the attention, and with `_norm` that of
    its norm; it is part of the paths of their parameters.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        attention: nnx.Module,
        mlp: nnx.Module,
        *,
        norms: Sequence[nnx.Module] | None = None,
        name: str = "attention",
    ):
        norm, self.mlp_norm = norms or (rms_norm(config), rms_norm(config))
        setattr(self, name, attention)
        setattr(self, f"{name}_norm", norm)
        self.mlp, self.name = mlp, name

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> Any:
        return getattr(self, self.name).init_cache(batch_shape, max_length)

    def __call__(self, h, forward: ForwardPass, cache, key):
        attention, norm = getattr(self, self.name), getattr(self, f"{self.name}_norm")
        a, cache = forward.mix(attention, norm(h), cache)
        h = h + a
        y, routings = feed_forward(self.mlp, self.mlp_norm(h), forward)
        return h + y, cache, routings


class ParallelBlocks(nnx.Module):
    """Blocks that read the output of one shared mixer, and the mean of their outputs.

    They are `config.num_blocks` of the class `block`, computed in one vmap as
    `block(h, read, positions) -> h`; only the mixer has a cache. num_cycles: how often they run.
    name: attribute of the mixer; it is part of the paths of its parameters.
    """

    def __init__(
        self,
        config: Any,
        block: Callable[..., nnx.Module],
        norm: nnx.Module,
        mixer: nnx.Module,
        *,
        num_cycles: int = 1,
        name: str = "key_values",
        rngs: nnx.Rngs,
    ):
        self.norm, self.num_cycles, self.name = norm, num_cycles, name
        setattr(self, name, mixer)
        keys = jax.random.split(rngs.params(), config.num_blocks)
        self.stack = jax.vmap(lambda key: block(config, rngs=nnx.Rngs(key)))(keys)

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> Any:
        return getattr(self, self.name).init_cache(batch_shape, max_length)

    def __call__(self, h, forward: ForwardPass, cache, key):
        read, cache = forward.mix(getattr(self, self.name), self.norm(h), cache)
        h = gather_rows(h)
        with taken("process"):  # its devices have different blocks, and the same rows
            run = jax.vmap(lambda block, h: block(h, read, forward.positions), in_axes=(0, None))
            for _ in range(self.num_cycles):
                h = jnp.mean(run(self.stack, h), axis=0)
        return h, cache, ()


@struct.dataclass
class Cache:
    """blocks: the cache of each block, in the order of the model. length: tokens in each row, which
    is the position of the next one."""

    blocks: tuple[Any, ...]
    length: Int[Array, "*B"]


Before = Callable[[int, Float[Array, "*B T D"]], Float[Array, "*B T D"]]
"""From the index of a block and its input to what it gets instead."""


class HeadedModel(nnx.Module):
    """A language model whose full forward pass is `logits(hidden(tokens).states)`.

    A subclass gives `_hidden`, `_prefill` and `_decode_step`, which get checked tokens, and
    `init_cache`. Its cache has `length`, the tokens in each row; `room` says how many fit.
    """

    config: Any
    embedding: Any
    head: Any

    def __call__(
        self,
        tokens: Int[AnyArray, "*B T"],
        mask: Bool[AnyArray, "*B T"] | None = None,
        *,
        segment_ids: Int[AnyArray, "*B T"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Output:
        """Logits (float32 or wider) at every position; see `slam_jax.protocol.LanguageModel`.

        segment_ids: instead of a mask, for rows of several texts: the number of the text of each
        token, from 1 on, and 0 for pads. Each text has the logits that it has alone.

        Raises InputError for more tokens than the context has, unless a mask or segments say which
        belong together: pads do not count. Also for both of these, and for segments where the model
        cannot separate texts.
        """
        hidden = self.hidden(tokens, mask, segment_ids=segment_ids, key=key)
        return Output(self.logits(hidden.states), hidden.aux_loss)

    @precise
    def hidden(
        self,
        tokens: Int[AnyArray, "*B T"],
        mask: Bool[AnyArray, "*B T"] | None = None,
        *,
        segment_ids: Int[AnyArray, "*B T"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Hidden:
        """The hidden states before the head, for the same arguments as a forward pass."""
        if segment_ids is not None:
            if mask is not None or segment_ids.shape != tokens.shape:
                given = "with a mask" if mask is not None else f"of shape {segment_ids.shape}"
                expected = f"expected them alone, of the shape {tokens.shape} of the tokens"
                raise InputError(f"segment_ids {given}; {expected}")
            segment_ids = jnp.asarray(segment_ids)
            mask = segment_ids > 0
        elif mask is None:
            self._check_length(tokens.shape[-1])
        else:
            mask = jnp.asarray(mask)
        tokens = without_unknown_pads(tokens, mask, self.config.vocab_size)
        return self._hidden(tokens, mask, segment_ids, key)

    @precise
    def logits(self, states: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The head: logits (float32 or wider) of hidden states."""
        if self.head is None:
            return self.embedding.logits(states)
        return self.head.logits(states)

    @precise
    def prefill(
        self,
        tokens: Int[AnyArray, "*B T"],
        cache: Any,
        memory: None = None,
        *,
        lengths: Int[AnyArray, "*B"] | None = None,
        append: bool = False,
    ) -> tuple[Float[Array, "*B T V"], Any]:
        """The logits of right-padded prompts, and the empty cache filled with them.

        append: the cache may store any number of tokens in each row, which the new ones follow.
          Logits and cache are those of one prefill of all tokens. It is static under `jax.jit`.
        lengths: new tokens of each row, None = all T; at least 1, or with `append` 0.

        Raises InputError as `check_prompts` or `check_appended` does, and for more tokens than the
        context has. Under `jax.jit` lengths are not checked; with `append`, tokens for which the
        cache has no room are then not stored, but counted in `cache.length`.
        """
        num_tokens, mask, stored = tokens.shape[-1], None, 0
        if append:
            rows = cache.length.reshape(tokens.shape[:-1])
            check_appended(lengths, rows, num_tokens, self.room(cache))
            stored = 0 if isinstance(rows, Tracer) else np.asarray(rows)
        else:
            check_prompts(lengths, cache.length, num_tokens)
        if not isinstance(lengths, Tracer):
            new = num_tokens if lengths is None else np.asarray(lengths)
            self._check_length(int(np.max(stored + new, initial=0)))
        if lengths is not None:
            lengths = jnp.asarray(lengths, jnp.int32)
            mask = prefix_mask(lengths, num_tokens)
        tokens = without_unknown_pads(tokens, mask, self.config.vocab_size)
        return self._prefill(tokens, cache, lengths, mask, append)

    @precise
    def decode_step(
        self, tokens: Int[AnyArray, "*B"], cache: Any, memory: None = None
    ) -> tuple[Float[Array, "*B V"], Any]:
        """The logits after one more token per row, and the cache with these tokens.

        Raises InputError for a row that fills the context or the cache. Under `jax.jit` lengths are
        not checked; `cache.length` counts every token, so that it shows such a row afterwards.
        """
        if not isinstance(cache.length, Tracer):
            self._check_length(int(np.max(cache.length, initial=0)) + 1)
        return self._decode_step(jnp.asarray(tokens), cache)

    def _hidden(self, tokens, mask, segment_ids, key) -> Hidden:
        raise NotImplementedError

    def _prefill(self, tokens, cache, lengths, mask, append) -> tuple[Any, Any]:
        raise NotImplementedError

    def _decode_step(self, tokens, cache) -> tuple[Any, Any]:
        raise NotImplementedError

    def room(self, cache: Any) -> int | None:
        """The most tokens that a row of the cache may have, None = any number."""
        return None

    def _check_length(self, num_tokens: int) -> None:
        most = self.config.context_length
        if num_tokens > most:
            raise InputError(f"{num_tokens:,} tokens; the context is {most:,}")


class Transformer(HeadedModel):
    """Embedding, blocks, norm and head, with the protocol of a language model.

    A subclass gives the blocks, each `block(h, forward, cache, key) -> (h, cache, routings)` with
    `init_cache(batch_shape, max_length)`, equal ones from `layers.stacked.repeat`, and
    may override `embed` and `balance`. With experts the configuration needs `balance_loss`, unless
    `balance` is overridden. Head and embeddings start as `config.init` unless it gives others.
    learned_positions: a table of them is added to the embeddings; else the blocks see to positions.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        blocks: Sequence[Any],
        *,
        norm: nnx.Module | None = None,
        embedding_init: Initializer | None = None,
        head_init: Initializer | None = None,
        learned_positions: bool = False,
        rngs: nnx.Rngs,
    ):
        kw: Any = dict(**config.dtypes, rngs=rngs)
        self.config, sizes = config, (config.vocab_size, config.embed_dim)
        embedding_init = embedding_init or config.init
        self.embedding = Embedding(*sizes, embedding_init=embedding_init, **kw)
        self.blocks = collect(blocks)
        self.norm = norm or rms_norm(config)
        tied, init = config.tie_embeddings, head_init or config.init
        self.head = None if tied else Linear(*sizes[::-1], kernel_init=init, **kw)
        rows = (config.context_length, config.embed_dim)
        table = Embedding(*rows, embedding_init=embedding_init, **kw) if learned_positions else None
        self.positions: Any = table

    def states(self, tokens: Int[Array, "*B T"], before: Before) -> Hidden:
        """The hidden states before the head, for a model that adds something between the blocks.

        before: comes before each block. All tokens are real, or right pads, whose states differ.
        """
        return self._hidden(tokens, None, None, None, before)

    def prefill_states(
        self,
        tokens: Int[Array, "*B T"],
        cache: Cache,
        before: Before,
        *,
        lengths: Int[Array, "*B"] | None = None,
        append: bool = False,
    ) -> tuple[Float[Array, "*B T D"], Cache]:
        """`prefill` without its checks, and with hidden states instead of logits; see `states`."""
        mask = None if lengths is None else prefix_mask(lengths, tokens.shape[-1])
        return self._prefill_states(tokens, cache, lengths, mask, append, before)

    def decode_states(
        self, tokens: Int[Array, "*B 1"], cache: Cache, before: Before | None
    ) -> tuple[Float[Array, "*B 1 D"], Cache]:
        """`decode_step` without its checks, and with hidden states; see `states`."""
        forward = ForwardPass(
            lambda mixer, x, cache: mixer.decode_step(x, cache), cache.length[..., None]
        )
        h, blocks, _ = self._run(tokens, forward, cache.blocks, None, unroll=True, before=before)
        return h, Cache(blocks, cache.length + 1)

    def _hidden(self, tokens, mask, segment_ids, key, before: Before | None = None) -> Hidden:
        layout = causal_layout(tokens.shape[-1], mask, segment_ids)
        forward = ForwardPass(
            lambda mixer, x, _: (mixer(x, layout), None), layout.positions, mask, key is not None
        )
        caches = (None,) * len(self.blocks)
        h, _, routings = self._run(tokens, forward, caches, key, before=before)
        return Hidden(h, self.balance(routings, mask))

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> Cache:
        """An empty cache for rows of `batch_shape`, each of at most `max_length` tokens."""
        blocks = tuple(block.init_cache(batch_shape, max_length) for block in kinds(self.blocks))
        return Cache(blocks, jnp.zeros(batch_shape, jnp.int32))

    def _prefill(self, tokens, cache: Cache, lengths, mask, append) -> tuple[jax.Array, Cache]:
        h, cache = self._prefill_states(tokens, cache, lengths, mask, append)
        return self.logits(h), cache

    def _prefill_states(
        self, tokens, cache: Cache, lengths, mask, append, before: Before | None = None
    ) -> tuple[jax.Array, Cache]:
        num_tokens = tokens.shape[-1]
        length = jnp.full_like(cache.length, num_tokens) if lengths is None else lengths
        positions = jnp.arange(num_tokens)
        if append:
            positions, length = new_positions(cache.length, num_tokens), cache.length + length

        def mix(mixer: Any, x: jax.Array, cache: Any) -> tuple[Any, Any]:
            read = mixer.append if append else mixer.prefill
            return read(x, cache, lengths)

        forward = ForwardPass(mix, positions, mask)
        h, blocks, _ = self._run(tokens, forward, cache.blocks, None, before=before)
        return h, Cache(blocks, length)

    def room(self, cache: Cache) -> int | None:
        """As of the layer whose cache is the first to be full.

        A cache that is no larger for a larger `max_length` is a ring, or a state, and never full.
        """

        def capacities(cache: Any) -> list[int]:
            layers = jax.tree.leaves(cache, is_leaf=lambda x: hasattr(x, "capacity"))
            return [x.capacity for x in layers if hasattr(x, "capacity")]

        found = capacities(cache.blocks)
        more = max(found, default=0) + 1
        larger = jax.eval_shape(lambda: self.init_cache(cache.length.shape, more))
        pairs = zip(found, capacities(larger.blocks), strict=True)
        return min((capacity for capacity, other in pairs if other > capacity), default=None)

    def _decode_step(self, tokens, cache: Cache) -> tuple[jax.Array, Cache]:
        h, cache = self.decode_states(tokens[..., None], cache, None)
        return self.logits(h)[..., 0, :], cache

    def embed(
        self,
        tokens: Int[Array, "*B T"],
        positions: Int[Array, "*#B T"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "*B T D"]:
        """The embeddings; `key`: for dropout."""
        h = self.embedding(tokens)
        return h if self.positions is None else h + self.learned(positions)

    def learned(self, positions: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Learned positions. Those of pads may be beyond the table, and must not become NaN."""
        return self.positions(jnp.minimum(positions, self.config.context_length - 1))

    def balance(
        self, routings: Sequence[Routing], mask: Bool[Array, "*B T"] | None
    ) -> Float[Array, ""] | float:
        """The auxiliary loss: here the load-balancing loss of all layers with experts at once.

        routings: how each of these layers routed its tokens.
        """
        if not routings:
            return 0.0
        return self.config.balance_loss * load_balancing_loss(routings, mask)

    def _run(
        self,
        tokens,
        forward: ForwardPass,
        caches,
        key,
        *,
        unroll: bool = False,
        before: Before | None = None,
    ):
        """Embedding, all blocks and the norm: hidden states, new caches and all routings."""
        *block_keys, key = split(key, len(self.blocks) + 1)
        positions = jax.lax.broadcast_to_rank(forward.positions, tokens.ndim)
        h = self.embed(jnp.asarray(tokens), positions, key)

        def call(block: Any, h: Any, given: Any) -> tuple[Any, Any]:
            h, *outputs = block(constrain(h, ("batch",)), forward, *given)
            return h, outputs

        given, policy = list(zip(caches, block_keys, strict=True)), self.config.remat
        if before is None:
            h, outputs = run_layers(call, self.blocks, h, given, policy=policy, unroll=unroll)
        else:
            outputs = []
            for i, (block, own) in enumerate(zip(self.blocks, given, strict=True)):
                h, found = run_layers(call, [block], before(i, h), [own], policy=policy)
                outputs += found
        new_caches, routings = zip(*outputs, strict=True)
        return self.norm(h), new_caches, [routing for each in routings for routing in each]
