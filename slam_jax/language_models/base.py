"""What the language models have in common: the way of tokens through them, not what is in them.

A model is a stack of blocks. A block says once what it does, in terms of `Pass.mix`, and thereby
does it for a whole sequence, for a prompt that is to be remembered, and for one more token:

    def __call__(self, h, to, cache, key):
        a, cache = to.mix(self.attention, self.norm(h), cache)
        return h + a, cache, ()
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slam_jax.array_typing import AnyArray
from slam_jax.errors import InputError, require, require_count
from slam_jax.layers.attention import causal_layout
from slam_jax.layers.constrain import constrain
from slam_jax.layers.dropout import split
from slam_jax.layers.linear import Initializer, Linear, project_wide
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.remat import POLICIES, remat
from slam_jax.layers.router import Routing
from slam_jax.protocol import Hidden, Output

DTYPES = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """What every language model is told.

    vocab_size: V. embed_dim: D. context_length: the most tokens, of a prompt with its answer.
    norm_epsilon: of the norms. tie_embeddings: logits are made with the table of the embeddings.
    remat: what a block keeps for its gradient, of `slam_jax.layers.remat.POLICIES`; None = all.
    dtype, param_dtype: of the computation and of the parameters.
    """

    vocab_size: int
    embed_dim: int
    context_length: int = 2_048
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = False
    remat: str | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for field in ("vocab_size", "embed_dim", "context_length"):
            require_count(field, getattr(self, field))
        require(self.norm_epsilon > 0, "norm_epsilon", self.norm_epsilon, "a number above 0")
        policies = (None, *POLICIES)
        require(self.remat in policies, "remat", self.remat, f"one of {policies}")
        for field in ("dtype", "param_dtype"):
            dtype = getattr(self, field)
            require(dtype in DTYPES, field, dtype, f"one of {DTYPES}")
            known = dtype != "float64" or jax.dtypes.canonicalize_dtype(dtype) == dtype
            require(known, field, dtype, "another, or JAX_ENABLE_X64=1 in the environment")

    def body_flops(self, num_tokens: int) -> int:
        """Floating-point operations of one row of so many tokens, all but the head; see `flops`."""
        raise NotImplementedError(f"{type(self).__name__} does not count its operations")

    def check_heads(
        self, num_heads: int, num_kv_heads: int, head_dim: int | None, *, turned: bool = False
    ) -> None:
        """Raises ConfigError for heads that do not divide, or not into pairs if they are turned."""
        for field, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            require_count(field, value, most=4_096)
        expected = f"a divisor of num_heads={num_heads}"
        require(num_heads % num_kv_heads == 0, "num_kv_heads", num_kv_heads, expected)
        if head_dim is None:
            expected = f"a multiple of num_heads={num_heads}, or give head_dim"
            require(self.embed_dim % num_heads == 0, "embed_dim", self.embed_dim, expected)
        else:
            require_count("head_dim", head_dim)
        width = head_dim or self.embed_dim // num_heads
        field = "embed_dim" if head_dim is None else "head_dim"
        expected = "such that a head's width is even, for the rotary positions"
        require(not turned or width % 2 == 0, field, getattr(self, field), expected)

    def check_experts(self, num_experts: int, num_experts_per_token: int) -> None:
        """Raises ConfigError where there are fewer experts than a token takes."""
        require_count("num_experts", num_experts, most=4_096)
        ok = 1 <= num_experts_per_token <= num_experts
        expected = f"1 to num_experts={num_experts}"
        require(ok, "num_experts_per_token", num_experts_per_token, expected)

    @property
    def dtypes(self) -> dict[str, Any]:
        """The two dtypes as keyword arguments of a layer."""
        return {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.param_dtype)}


def last_at_most(positions: Int[Array, "*B T"], config: LanguageModelConfig):
    """`positions` within a table of `context_length` of them."""
    return jnp.minimum(positions, config.context_length - 1)


class Pass(NamedTuple):
    """One way of tokens through a model.

    mix(mixer, x, cache) -> (y, cache): the only thing that differs between the three ways; `mixer`
    is whatever looks at other tokens. positions: of the tokens in their rows. mask: True = real,
    None = all are. training: whether a key was given.
    """

    mix: Callable[[Any, jax.Array, Any], tuple[Any, Any]]
    positions: Int[Array, "*#B T"]
    mask: Bool[Array, "*B T"] | None
    training: bool


@struct.dataclass
class Cache:
    """blocks: the cache of each block, in the order of the model. length: tokens seen by each row;
    the position of the next one."""

    blocks: tuple[Any, ...]
    length: Int[Array, "*B"]


class Transformer(nnx.Module):
    """Embedding, blocks, norm and head, with the model protocol over them.

    A subclass gives the blocks, each `block(h, to: Pass, cache, key) -> (h, cache, routings)` with
    `init_cache(batch_shape, max_length)`, and may override `embed` and `balance`.
    """

    config: Any

    def __init__(
        self,
        config: LanguageModelConfig,
        blocks: Sequence[nnx.Module],
        *,
        norm: nnx.Module | None = None,
        embedding_init: Initializer,
        head_init: Initializer,
        rngs: nnx.Rngs,
    ):
        kw: Any = dict(**config.dtypes, rngs=rngs)
        self.config = config
        self.embedding = nnx.Embed(
            config.vocab_size, config.embed_dim, embedding_init=embedding_init, **kw
        )
        self.blocks: Any = nnx.List(blocks)
        self.norm = norm or RMSNorm(
            config.embed_dim, epsilon=config.norm_epsilon, param_dtype=kw["param_dtype"]
        )
        tied, sizes = config.tie_embeddings, (config.embed_dim, config.vocab_size)
        self.head = None if tied else Linear(*sizes, kernel_init=head_init, **kw)

    def __call__(
        self,
        tokens: Int[AnyArray, "*B T"],
        mask: Bool[AnyArray, "*B T"] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Output:
        """Logits (float32 or wider) at every position; see `slam_jax.protocol.LanguageModel`.

        Raises InputError for more tokens than the context has, unless a mask says which are real:
        pads need no room in it.
        """
        hidden = self.hidden(tokens, mask, key=key)
        return Output(self.logits(hidden.states), hidden.aux_loss)

    def hidden(
        self,
        tokens: Int[AnyArray, "*B T"],
        mask: Bool[AnyArray, "*B T"] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Hidden:
        """What the head makes logits of, for the same arguments as a forward pass."""
        mask = None if mask is None else jnp.asarray(mask)
        if mask is None:
            self._check_length(tokens)
        layout = causal_layout(tokens.shape[-1], mask)

        def mix(mixer, x, cache):
            return mixer(x, layout), None

        to = Pass(mix, layout.positions, mask, training=key is not None)
        h, _, routings = self._through(tokens, to, (None,) * len(self.blocks), key)
        return Hidden(h, self.balance(routings, mask))

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> Cache:
        """An empty cache for rows of `batch_shape`, each of at most `max_length` tokens."""
        blocks = tuple(block.init_cache(batch_shape, max_length) for block in self.blocks)
        return Cache(blocks, jnp.zeros(batch_shape, jnp.int32))

    def prefill(
        self,
        tokens: Int[AnyArray, "*B T"],
        cache: Cache,
        memory: None = None,
        *,
        lengths: Int[AnyArray, "*B"] | None = None,
    ) -> tuple[Float[Array, "*B T V"], Cache]:
        """The logits of right-padded prompts, and an empty cache filled with them.

        Raises InputError for more tokens than the context has, unless `lengths` says which are
        real.
        """
        num_tokens, mask = tokens.shape[-1], None
        if lengths is None:
            self._check_length(tokens)
        else:
            lengths = jnp.asarray(lengths, jnp.int32)
            mask = jnp.arange(num_tokens) < lengths[..., None]

        def mix(mixer, x, cache):
            return mixer.prefill(x, cache, lengths)

        to = Pass(mix, jnp.arange(num_tokens), mask, training=False)
        h, blocks, _ = self._through(tokens, to, cache.blocks, None)
        length = jnp.full_like(cache.length, num_tokens) if lengths is None else lengths
        return self.logits(h), Cache(blocks, length)

    def decode_step(
        self, tokens: Int[AnyArray, "*B"], cache: Cache, memory: None = None
    ) -> tuple[Float[Array, "*B V"], Cache]:
        """The logits after one more token per row, and the cache that remembers it.

        Rows do not grow beyond the context or the cache: learned positions end with the context.
        """

        def mix(mixer, x, cache):
            return mixer.decode_step(x, cache)

        to = Pass(mix, cache.length[..., None], None, training=False)
        h, blocks, _ = self._through(jnp.asarray(tokens)[..., None], to, cache.blocks, None)
        return self.logits(h)[..., 0, :], Cache(blocks, cache.length + 1)

    def logits(self, states: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The head: logits (float32 or wider) of hidden states."""
        if self.head is None:
            return project_wide(states, self.embedding.embedding[...].T)
        return project_wide(states, self.head.kernel[...])

    def embed(
        self,
        tokens: Int[Array, "*B T"],
        positions: Int[Array, "*#B T"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "*B T D"]:
        return self.embedding(tokens)

    def balance(
        self, routings: Sequence[Routing], mask: Bool[Array, "*B T"] | None
    ) -> Float[Array, ""] | float:
        """The auxiliary loss, from how each layer with experts routed its tokens."""
        return 0.0

    def _check_length(self, tokens):
        if tokens.shape[-1] > self.config.context_length:
            raise InputError(
                f"{tokens.shape[-1]:,} tokens; the context is {self.config.context_length:,}"
            )

    def _through(self, tokens, to: Pass, caches, key):
        keys = split(key, len(self.blocks) + 1)
        h = self.embed(jnp.asarray(tokens), to.positions, keys[-1])
        new, routings = [], []
        for block, cache, block_key in zip(self.blocks, caches, keys, strict=False):

            def call(h, cache, key, block=block):
                return block(constrain(h, ("batch",)), to, cache, key)

            h, cache, routed = remat(call, self.config.remat)(h, cache, block_key)
            new.append(cache)
            routings += routed
        return self.norm(h), tuple(new), routings
