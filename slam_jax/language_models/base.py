"""What all language models share: their settings, and how tokens go through a stack of blocks.

A model is a stack of blocks. A block says once what it computes, in terms of `ForwardPass.mix`, and
thereby serves the full forward pass, the prefill of a prompt and a decoding step:

    def __call__(self, h, forward, cache, key):
        a, cache = forward.mix(self.attention, self.norm(h), cache)
        return h + a, cache, ()
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slam_jax.array_typing import AnyArray
from slam_jax.errors import InputError, require, require_count
from slam_jax.layers.attention import causal_layout
from slam_jax.layers.constrain import constrain
from slam_jax.layers.dropout import split
from slam_jax.layers.experts import MixtureOfExperts
from slam_jax.layers.kv_cache import check_prompts
from slam_jax.layers.linear import Initializer, Linear, project_to_float32
from slam_jax.layers.masks import without_unknown_pads
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.remat import POLICIES, remat
from slam_jax.layers.router import Routing
from slam_jax.protocol import Hidden, Output

DTYPES = ("float32", "bfloat16", "float64")

# The largest value of each count, for every model that has a field of this name.
_MOST = {
    **dict.fromkeys(
        ("vocab_size", "embed_dim", "context_length", "mlp_dim", "expert_dim"), 1 << 20
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "dt_rank", "head_dim", "v_head_dim"), 1 << 20),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "text_window"), 1 << 20),
    **dict.fromkeys(("num_heads", "num_kv_heads", "num_experts"), 4_096),
    **dict.fromkeys(("state_dim", "conv_width", "expand"), 4_096),
    **dict.fromkeys(("num_layers", "level_layers", "num_blocks", "num_cycles"), 512),
    **dict.fromkeys(("share_factor", "attention_period", "expert_period"), 512),
    **dict.fromkeys(("num_dense_layers", "num_shared_experts"), 512),
}
_MAY_BE_0 = ("num_dense_layers", "num_shared_experts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """The settings of every language model.

    vocab_size: V. embed_dim: D. context_length: the most tokens of a prompt with its answer.
    norm_epsilon: of the norms. tie_embeddings: the head is the table of embeddings.
    remat: what a block keeps for its gradient, of `slam_jax.layers.remat.POLICIES`; None = all.
    dtype, param_dtype: of the computation and of the parameters.

    Raises ConfigError for a value that cannot be built. Fields of the same name mean the same in
    every model, and are checked here: counts by their name, rates and weights of losses by theirs.
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
        for field in dataclasses.fields(self):
            name = field.name
            value: Any = getattr(self, name)
            if name.endswith("balance_loss"):
                require(value >= 0, name, value, "0 (off) or more")
            if name == "dropout":
                require(0 <= value < 1, name, value, "a rate in [0, 1)")
            absent = value is None and field.default is None
            if name in _MOST and not absent:
                require_count(name, value, least=0 if name in _MAY_BE_0 else 1, most=_MOST[name])
        require(self.norm_epsilon > 0, "norm_epsilon", self.norm_epsilon, "a number above 0")
        policies = (None, *POLICIES)
        require(self.remat in policies, "remat", self.remat, f"one of {policies}")
        for name in ("dtype", "param_dtype"):
            dtype = getattr(self, name)
            require(dtype in DTYPES, name, dtype, f"one of {DTYPES}")
            known = dtype != "float64" or jax.dtypes.canonicalize_dtype(dtype) == dtype
            require(known, name, dtype, "another, or JAX_ENABLE_X64=1 in the environment")

    def body_flops(self, num_tokens: int) -> int:
        """Floating-point operations of one row of so many tokens, without the head; see `flops`."""
        raise NotImplementedError(f"{type(self).__name__} does not count its operations")

    def check_heads(self) -> None:
        """Raises ConfigError for heads that do not divide the width, or not each other; with
        rotary positions (a field `rope`) also for a head of odd width."""
        heads, width = self._get("num_heads"), self._get("head_dim")
        expected = f"a divisor of num_heads={heads}"
        kv_heads = self._get("num_kv_heads") or heads
        require(heads % kv_heads == 0, "num_kv_heads", kv_heads, expected)
        if width is None:
            expected = f"a multiple of num_heads={heads}, or give head_dim"
            require(self.embed_dim % heads == 0, "embed_dim", self.embed_dim, expected)
        if self._get("rope") is not None:
            field = "embed_dim" if width is None else "head_dim"
            even = (width or self.embed_dim // heads) % 2 == 0
            expected = "such that a head's width is even, for the rotary positions"
            require(even, field, getattr(self, field), expected)

    def check_experts(self) -> None:
        """Raises ConfigError where there are fewer experts than a token takes, or for a capacity
        that no expert can have."""
        most, k = self._get("num_experts"), self._get("num_experts_per_token")
        require(1 <= k <= most, "num_experts_per_token", k, f"1 to num_experts={most}")
        factor = self._get("capacity_factor")
        within = factor is None or 0 < factor <= most
        require(within, "capacity_factor", factor, f"None, or above 0 and at most {most}")

    def _get(self, field: str) -> Any:
        return getattr(self, field, None)

    @property
    def dtypes(self) -> dict[str, Any]:
        """The two dtypes as keyword arguments of a layer."""
        return {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.param_dtype)}

    def sizes(self, *fields: str) -> dict[str, Any]:
        """Fields as keyword arguments, of a layer or of its count in `layers.flops`."""
        return {field: getattr(self, field) for field in fields}


def rms_norm(config: LanguageModelConfig) -> RMSNorm:
    """A norm of the width D."""
    param_dtype = config.dtypes["param_dtype"]
    return RMSNorm(config.embed_dim, epsilon=config.norm_epsilon, param_dtype=param_dtype)


def layer_norm(config: LanguageModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """The same with a mean and a bias."""
    return nnx.LayerNorm(config.embed_dim, epsilon=config.norm_epsilon, **config.dtypes, rngs=rngs)


def within_context(positions: Int[Array, "*B T"], config: LanguageModelConfig) -> Any:
    """Positions for a table with `context_length` rows: pads may be beyond it, and must not be
    NaN."""
    return jnp.minimum(positions, config.context_length - 1)


def check_length(num_tokens: int, config: LanguageModelConfig) -> None:
    """Raises InputError for more tokens than the context has."""
    if num_tokens > config.context_length:
        raise InputError(f"{num_tokens:,} tokens; the context is {config.context_length:,}")


def check_prefill(num_tokens: int, lengths: Any, stored: Any, config: LanguageModelConfig) -> None:
    """Raises InputError for what `prefill` cannot read: a length outside of the row, more tokens
    than the context has, or a cache that already stores tokens.

    Only concrete `lengths` and `stored` are checked; under `jax.jit` the caller must see to them.
    """
    check_prompts(lengths, stored, num_tokens)
    if lengths is None:
        check_length(num_tokens, config)
    elif not isinstance(lengths, Tracer):
        check_length(int(np.max(lengths)), config)


class ForwardPass(NamedTuple):
    """What the blocks have to know of one call of a model.

    mix(mixer, x, cache) -> (y, cache): calls a token mixer, such as an attention. It is the only
      thing that differs between the full forward pass, the prefill and a decoding step.
    positions: of the tokens in their rows. mask: True = real, None = all are.
    training: whether the call has a key for dropout.
    """

    mix: Callable[[Any, jax.Array, Any], tuple[Any, Any]]
    positions: Int[Array, "*#B T"]
    mask: Bool[Array, "*B T"] | None
    training: bool


Pass = ForwardPass  # its name in version 0.11


def feed_forward(mlp: Any, x: Float[Array, "*B T D"], forward: ForwardPass) -> tuple[Any, Any]:
    """The output of an MLP or of a mixture of experts, and how the experts routed their tokens."""
    if not isinstance(mlp, MixtureOfExperts):
        return mlp(x), ()
    y, routing = mlp(x, mask=forward.mask, training=forward.training)
    return y, (routing,)


class PreNormBlock(nnx.Module):
    """h += attention(norm(h)); h += mlp(norm(h)), where the MLP may be a mixture of experts."""

    def __init__(
        self,
        *,
        attention_norm: nnx.Module,
        mlp_norm: nnx.Module,
        attention: nnx.Module,
        mlp: nnx.Module,
    ):
        self.attention_norm: Any = attention_norm
        self.mlp_norm: Any = mlp_norm
        self.attention: Any = attention
        self.mlp: Any = mlp

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> Any:
        return self.attention.init_cache(batch_shape, max_length)

    def __call__(self, h, forward: ForwardPass, cache, key):
        a, cache = forward.mix(self.attention, self.attention_norm(h), cache)
        h = h + a
        y, routings = feed_forward(self.mlp, self.mlp_norm(h), forward)
        return h + y, cache, routings


@struct.dataclass
class Cache:
    """blocks: the cache of each block, in the order of the model. length: tokens in each row, which
    is the position of the next one."""

    blocks: tuple[Any, ...]
    length: Int[Array, "*B"]


class Transformer(nnx.Module):
    """Embedding, blocks, norm and head, with the protocol of a language model.

    A subclass gives the blocks, each `block(h, forward, cache, key) -> (h, cache, routings)` with
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
        self.norm = norm or rms_norm(config)
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
        pads do not count.
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
        """The hidden states before the head, for the same arguments as a forward pass."""
        mask = None if mask is None else jnp.asarray(mask)
        tokens = without_unknown_pads(tokens, mask, self.config.vocab_size)
        if mask is None:
            check_length(tokens.shape[-1], self.config)
        layout = causal_layout(tokens.shape[-1], mask)

        def mix(mixer, x, cache):
            return mixer(x, layout), None

        forward = ForwardPass(mix, layout.positions, mask, training=key is not None)
        h, _, routings = self._run(tokens, forward, (None,) * len(self.blocks), key)
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
        """The logits of right-padded prompts, and the empty cache filled with them.

        Raises InputError as `check_prefill` does.
        """
        num_tokens, mask = tokens.shape[-1], None
        check_prefill(num_tokens, lengths, cache.length, self.config)
        if lengths is not None:
            lengths = jnp.asarray(lengths, jnp.int32)
            mask = jnp.arange(num_tokens) < lengths[..., None]
        tokens = without_unknown_pads(tokens, mask, self.config.vocab_size)

        def mix(mixer, x, cache):
            return mixer.prefill(x, cache, lengths)

        forward = ForwardPass(mix, jnp.arange(num_tokens), mask, training=False)
        h, blocks, _ = self._run(tokens, forward, cache.blocks, None)
        length = jnp.full_like(cache.length, num_tokens) if lengths is None else lengths
        return self.logits(h), Cache(blocks, length)

    def decode_step(
        self, tokens: Int[AnyArray, "*B"], cache: Cache, memory: None = None
    ) -> tuple[Float[Array, "*B V"], Cache]:
        """The logits after one more token per row, and the cache with these tokens.

        Rows must not grow beyond the context or the cache: learned positions end with the context.
        """

        def mix(mixer, x, cache):
            return mixer.decode_step(x, cache)

        forward = ForwardPass(mix, cache.length[..., None], None, training=False)
        h, blocks, _ = self._run(jnp.asarray(tokens)[..., None], forward, cache.blocks, None)
        return self.logits(h)[..., 0, :], Cache(blocks, cache.length + 1)

    def logits(self, states: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The head: logits (float32 or wider) of hidden states."""
        if self.head is None:
            return project_to_float32(states, self.embedding.embedding[...].T)
        return project_to_float32(states, self.head.kernel[...])

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
        """The auxiliary loss; `routings`: how each layer with experts routed its tokens."""
        return 0.0

    def _run(self, tokens, forward: ForwardPass, caches, key):
        """Embedding, all blocks and the norm: hidden states, new caches and all routings."""
        keys = split(key, len(self.blocks) + 1)
        h = self.embed(jnp.asarray(tokens), forward.positions, keys[-1])
        new_caches, routings = [], []
        for block, cache, block_key in zip(self.blocks, caches, keys, strict=False):

            def call(h, cache, key, block=block):
                return block(constrain(h, ("batch",)), forward, cache, key)

            h, cache, routed = remat(call, self.config.remat)(h, cache, block_key)
            new_caches.append(cache)
            routings += routed
        return self.norm(h), tuple(new_caches), routings
