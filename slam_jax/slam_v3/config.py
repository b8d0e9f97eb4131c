"""The configuration of SLAM v3: frozen and checked when it is built."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from slam_jax.errors import require, require_count
from slam_jax.layers.remat import POLICIES

ENCODERS = ("resnet", "vit")
DTYPES = ("float32", "bfloat16", "float64")
# Parts that an ablation can leave out: a process's attention to its own stream or to the bank, each
# term of the fusion, and the compression of the decoder's cache and memory.
PARTS = ("isolated", "shared", "residual", "mean", "concat", "cross_modal", "fusion_mlp", "latent")
# Bounds: layers are built one by one in Python; a side of an image in pixels.
MOST_LAYERS, MOST_PIXELS = 512, 1 << 14


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """The image stream.

    encoder: "resnet" halves the image once a stage, from `patch_size` on; "vit" projects patches
      and runs `num_layers` transformer blocks over them.
    size: height and width in pixels the model is trained on; the "vit" and its positions take any
      multiple of the patch, the "resnet" any size that leaves more than one position (its last norm
      removes what is the same all over a picture).
    patch_size: pixels a side of one patch ("vit") or of one step of the stem ("resnet").
    stage_widths: channels of each residual stage of the "resnet".
    blocks_per_stage: residual blocks a stage.
    num_layers: transformer blocks of the "vit".
    """

    encoder: str = "resnet"
    size: int = 75
    patch_size: int = 3
    stage_widths: tuple[int, ...] = (32, 64, 96)
    blocks_per_stage: int = 1
    num_layers: int = 4

    def __post_init__(self):
        object.__setattr__(self, "stage_widths", tuple(self.stage_widths))
        require(self.encoder in ENCODERS, "image.encoder", self.encoder, f"one of {ENCODERS}")
        require_count("image.size", self.size, most=MOST_PIXELS)
        require_count("image.patch_size", self.patch_size, most=MOST_PIXELS)
        require_count("image.blocks_per_stage", self.blocks_per_stage, most=MOST_LAYERS)
        require_count("image.num_layers", self.num_layers, least=0, most=MOST_LAYERS)
        if self.encoder == "vit":
            low = self.size - self.size % self.patch_size
            near = f"a multiple of image.patch_size, such as {low or self.patch_size}"
            require(self.size % self.patch_size == 0, "image.size", self.size, near)
        widths = self.stage_widths
        require(
            0 < len(widths) <= 16, "image.stage_widths", widths, "at least one width, at most 16"
        )
        bad = [w for w in widths if not 8 <= w <= 1 << 20 or w % 8]
        require(not bad, "image.stage_widths", widths, "multiples of 8 (the width of a norm group)")
        if self.encoder == "resnet":
            more = f"more than {self.reach}, or fewer stages, or a smaller patch_size"
            require(self.size > self.reach, "image.size", self.size, more)

    @property
    def reach(self) -> int:
        """The total stride of the "resnet" in pixels."""
        return self.patch_size * 2 ** (len(self.stage_widths) - 1)


@dataclasses.dataclass(frozen=True)
class SlamV3Config:
    """The configuration of a SLAM v3.

    vocab_size: V of text and answers. embed_dim: D. num_heads: N of every attention.
    mlp_dim: F of every gated MLP. num_processes: P. num_process_layers: layers a process.
    process_mlp_dim: F of the processes alone, None = mlp_dim. num_decoder_layers: layers of the
      decoder.
    num_memory_tokens: M, the bottleneck; 0 = the fused tokens themselves are the memory.
    kv_lora_rank: R, of the cache and of the memory bank. q_lora_rank: of the decoder's queries,
      None = full rank. qk_nope_head_dim, qk_rope_head_dim, v_head_dim: None = the head width, half
      of it (made even), the head width.
    window: the decoder's sliding window in tokens, None = all.
    context_length: the most tokens of a text, and of a prompt with its answer, that users may give;
      the model itself has no such bound.
    aux_dim: numbers an auxiliary vector. max_aux: with aux_slots, the number of slots.
    aux_slots: True = the row of an auxiliary vector has its own meaning.
    image: the image stream.
    alignment_dim: width of the retrieval embedding.
    dropout: rate on what each sublayer adds and on the embeddings.
    without: some of PARTS, for ablations: the model is built without them and their parameters.
      Without "latent" the decoder has plain multi-head attention with rotary positions, and the
      memory keeps its full width.
    remat: what layers store for their gradient, one of `slam_jax.layers.remat.POLICIES`; None =
      everything.
    dtype, param_dtype: of the computation and of the parameters.
    """

    vocab_size: int
    embed_dim: int = 96
    num_heads: int = 4
    mlp_dim: int = 256
    num_processes: int = 4
    num_process_layers: int = 1
    process_mlp_dim: int | None = None
    num_decoder_layers: int = 2
    num_memory_tokens: int = 0
    kv_lora_rank: int = 48
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    window: int | None = None
    aux_dim: int = 10
    aux_slots: bool = False
    max_aux: int = 16
    image: ImageConfig = ImageConfig()
    context_length: int = 1_024
    alignment_dim: int = 64
    dropout: float = 0.0
    without: tuple[str, ...] = ()
    remat: str | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "without", tuple(self.without))
        for field in ["vocab_size", "embed_dim", "mlp_dim", "kv_lora_rank"]:
            require_count(field, getattr(self, field))
        for field in ["context_length", "aux_dim", "max_aux", "alignment_dim"]:
            require_count(field, getattr(self, field))
        for field in ["num_heads", "num_processes", "num_process_layers", "num_decoder_layers"]:
            require_count(field, getattr(self, field), most=MOST_LAYERS)
        near = self.embed_dim - self.embed_dim % self.num_heads or self.num_heads
        even = f"a multiple of num_heads={self.num_heads}, such as {near}"
        require(self.embed_dim % self.num_heads == 0, "embed_dim", self.embed_dim, even)
        require(
            self.head_dim % 2 == 0,
            "embed_dim",
            self.embed_dim,
            f"num_heads times an even width, such as {self.num_heads * (self.head_dim + 1)}",
        )
        require(
            self.embed_dim % 4 == 0,
            "embed_dim",
            self.embed_dim,
            "a multiple of 4, for the 2-D positions",
        )
        for field, width in self.latent_widths.items():
            require_count(field, width)
        rope = self.latent_widths["qk_rope_head_dim"]
        require(rope % 2 == 0, "qk_rope_head_dim", rope, f"an even number, such as {rope + 1}")
        for field in ("q_lora_rank", "window", "process_mlp_dim"):
            value = getattr(self, field)
            require(value is None or value >= 1, field, value, "None or at least 1")
            require_count(field, 1 if value is None else value)
        memory = self.num_memory_tokens
        require(memory >= 0, "num_memory_tokens", memory, "0 (no bottleneck) or more")
        require_count("num_memory_tokens", memory, least=0)
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a rate in [0, 1)")
        require(set(self.without) <= {*PARTS}, "without", self.without, f"some of {PARTS}")
        carried = {"residual", "mean", "concat"} - {*self.without}
        left = "one of residual, mean and concat to be left"
        require(bool(carried), "without", self.without, left)
        plain = "latent" in self.without
        require(not (plain and self.window), "window", self.window, 'None without "latent"')
        policies = (None, *POLICIES)
        require(self.remat in policies, "remat", self.remat, f"one of {policies}")
        for field in ("dtype", "param_dtype"):
            dtype = getattr(self, field)
            require(dtype in DTYPES, field, dtype, f"one of {DTYPES}")
            known = dtype != "float64" or jax.dtypes.canonicalize_dtype(dtype) == dtype
            require(known, field, dtype, "another, or JAX_ENABLE_X64=1 in the environment")

    @property
    def head_dim(self) -> int:
        """H = D / N."""
        return self.embed_dim // self.num_heads

    @property
    def latent_widths(self) -> dict[str, int]:
        """The decoder's widths a head by name: those given, or derived from H."""
        given = {
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
        }
        half = max(2, self.head_dim // 4 * 2)
        derived = {**dict.fromkeys(given, self.head_dim), "qk_rope_head_dim": half}
        return {name: derived[name] if width is None else width for name, width in given.items()}

    def has(self, part: str) -> bool:
        """Whether one of PARTS is there."""
        return part not in self.without

    @property
    def memory_dim(self) -> int:
        """R of the memory bank; D where nothing is compressed."""
        return self.kv_lora_rank if self.has("latent") else self.embed_dim

    @property
    def encoder_out_scale(self) -> float:
        """Initial scale of each sublayer of the encoder: 1 / sqrt(number of sublayers), which are 2
        in level 1, 3 in each process layer and 3 in the fusion.

        So the residual stream is still dominated by the input tokens at the start of training.
        Source: Radford et al. 2019 (GPT-2), section 2.3.
        """
        return (2 + 3 * self.num_process_layers + 3) ** -0.5

    @property
    def decoder_out_scale(self) -> float:
        """The same for the decoder."""
        return (3 * self.num_decoder_layers) ** -0.5

    @property
    def dtypes(self) -> dict[str, Any]:
        """The two dtypes as keyword arguments of a layer."""
        return {
            "dtype": jnp.dtype(self.dtype),
            "param_dtype": jnp.dtype(self.param_dtype),
        }

    @classmethod
    def preset(cls, name: str, vocab_size: int, **overrides: Any) -> "SlamV3Config":
        """One of `PRESETS`, with some fields changed."""
        fields = {**PRESETS[name], **overrides}
        image = fields.get("image", {})
        if not isinstance(image, ImageConfig):
            fields["image"] = ImageConfig(**image)
        return cls(vocab_size, **fields)


PRESETS: dict[str, dict[str, Any]] = {
    # Tests: every part present, milliseconds a call.
    "tiny": dict(
        embed_dim=32,
        num_heads=2,
        mlp_dim=48,
        kv_lora_rank=12,
        q_lora_rank=20,
        aux_dim=5,
        alignment_dim=8,
        image=dict(size=24, stage_widths=(8, 16)),
    ),
    # About a million parameters: a laptop.
    "small": dict(),
    # One accelerator.
    "medium": dict(
        embed_dim=256,
        num_heads=8,
        mlp_dim=688,
        num_process_layers=2,
        num_decoder_layers=4,
        kv_lora_rank=128,
        alignment_dim=128,
        image=dict(stage_widths=(64, 128, 256)),
    ),
    # As wide as ViT-B: 768 in 12 heads, 224-pixel images in patches of 16, a bottleneck.
    "base": dict(
        embed_dim=768,
        num_heads=12,
        mlp_dim=2_048,
        num_process_layers=6,
        num_decoder_layers=12,
        num_memory_tokens=128,
        kv_lora_rank=256,
        q_lora_rank=384,
        aux_dim=64,
        alignment_dim=512,
        dropout=0.1,
        dtype="bfloat16",
        image=dict(encoder="vit", size=224, patch_size=16, num_layers=12),
    ),
}
