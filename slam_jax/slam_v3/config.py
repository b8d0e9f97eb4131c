"""The configuration of SLAM v3: frozen and checked when it is built."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from slam_jax.errors import require, require_count
from slam_jax.layers.lora import LoraConfig
from slam_jax.model_config import ModelConfig, from_fields

ENCODERS = ("resnet", "vit", "pretrained")
# Parts that an ablation can leave out: a process's attention to its own stream or to the bank, each
# term of the fusion, and the compression of the decoder's cache and memory.
PARTS = ("isolated", "shared", "residual", "mean", "concat", "cross_modal", "fusion_mlp", "latent")


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """The image stream.

    encoder: "resnet" halves the image once a stage, from `patch_size` on; "vit" projects patches
      and runs `num_layers` transformer blocks over them; "pretrained" is a published vision tower.
    pretrained: the folder of a published vision tower, which then is the encoder. Its other fields
      are read from it by `slam_jax.training.pretrained`. tower: its `VisionConfig`. preprocessing:
      how pictures are prepared for it. pretrained_size: pixels a side, None = as its publisher.
      layer: whose patch tokens are read, as in `VisionTower.patches`; None = those of its output.
    size: height and width in pixels the model is trained on; the "vit" and its positions take any
      multiple of the patch, the "resnet" any size that leaves more than one position (its last norm
      removes what is the same all over a picture).
    patch_size: pixels a side of one patch ("vit") or of one step of the stem ("resnet").
    stage_widths: channels of each residual stage of the "resnet".
    blocks_per_stage: residual blocks a stage.
    num_layers: transformer blocks of the "vit".
    max_images: the most pictures of an example. Above 1 the tokens of each picture get a learned
      embedding of its number.
    """

    encoder: str = "resnet"
    size: int = 75
    patch_size: int = 3
    stage_widths: tuple[int, ...] = (32, 64, 96)
    blocks_per_stage: int = 1
    num_layers: int = 4
    pretrained: str | None = None
    tower: Any = None
    preprocessing: Any = None
    pretrained_size: int | None = None
    layer: int | None = None
    max_images: int = 1

    def __post_init__(self):
        object.__setattr__(self, "stage_widths", tuple(self.stage_widths))
        require_count("image.max_images", self.max_images, most=256)
        if self.pretrained is not None or self.tower is not None:
            self._check_tower()
            return
        expected = '"resnet" or "vit", or give image.pretrained'
        require(self.encoder != "pretrained", "image.encoder", self.encoder, expected)
        require(self.encoder in ENCODERS, "image.encoder", self.encoder, f"one of {ENCODERS}")
        for field, most in (("size", 1 << 14), ("patch_size", 1 << 14), ("blocks_per_stage", 512)):
            require_count(f"image.{field}", getattr(self, field), most=most)
        require_count("image.num_layers", self.num_layers, least=0, most=512)
        if self.encoder == "vit":
            low = self.size - self.size % self.patch_size
            near = f"a multiple of image.patch_size, such as {low or self.patch_size}"
            require(self.size % self.patch_size == 0, "image.size", self.size, near)
        widths = self.stage_widths
        few = 0 < len(widths) <= 16
        require(few, "image.stage_widths", widths, "at least one width, at most 16")
        bad = [w for w in widths if not 8 <= w <= 1 << 20 or w % 8]
        require(not bad, "image.stage_widths", widths, "multiples of 8 (the width of a norm group)")
        if self.encoder == "resnet":
            more = f"more than {self.total_stride}, or fewer stages, or a smaller patch_size"
            require(self.size > self.total_stride, "image.size", self.size, more)

    def _check_tower(self) -> None:
        from slam_jax.vision_models import Preprocessing, VisionConfig  # only where there is one

        object.__setattr__(self, "encoder", "pretrained")
        for field, kind in (("tower", VisionConfig), ("preprocessing", Preprocessing)):
            if (value := getattr(self, field)) is not None:
                object.__setattr__(self, field, _as_config(kind, value, f"image.{field}"))
        if self.pretrained_size is not None:
            require_count("image.pretrained_size", self.pretrained_size, most=1 << 14)
        if self.tower is not None and self.layer is not None:
            total = self.tower.num_layers
            expected = f"None, or {-total - 1} to {total}"
            require(-total - 1 <= self.layer <= total, "image.layer", self.layer, expected)

    @property
    def total_stride(self) -> int:
        """Pixels of the image a side of one image token of the "resnet"."""
        return self.patch_size * 2 ** (len(self.stage_widths) - 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of an image of so many pixels."""
        if self.encoder != "resnet":
            patch = self.patch_size if self.tower is None else self.tower.patch_size
            return height // patch, width // patch
        return -(-height // self.total_stride), -(-width // self.total_stride)


def _as_config(kind: type, value: Any, field: str) -> Any:
    """A configuration of this class, which may be given as the fields that JSON has."""
    if isinstance(value, Mapping):
        return from_fields(kind, value)
    require(isinstance(value, kind), field, value, f"the fields of a {kind.__name__}")
    return value


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A published language model as the decoder. By default the decoder is SLAM v3's own.

    pretrained: its folder, or a GGUF file; `slam_jax.training.pretrained` reads the next two fields
      from it.
    system: its name in `slam_jax.language_models.SYSTEMS`. language_model: its configuration.
    memory_every: attention to the memory comes before every such block, from the first on.
    """

    pretrained: str | None = None
    memory_every: int = 4
    system: str | None = None
    language_model: Any = None

    def __post_init__(self):
        require_count("decoder.memory_every", self.memory_every, most=512)
        if self.language_model is not None:
            from slam_jax.language_models import SYSTEMS  # they import this module

            known = f"one of {', '.join(SYSTEMS)}"
            require(self.system in SYSTEMS, "decoder.system", self.system, known)
            kind: Any = SYSTEMS[self.system or ""].config
            config = _as_config(kind, self.language_model, "decoder.language_model")
            object.__setattr__(self, "language_model", config)


@dataclasses.dataclass(frozen=True)
class SlamV3Config(ModelConfig):
    """The configuration of a SLAM v3.

    vocab_size: V of text and answers. embed_dim: D. num_heads: N of every attention but the
      shared one. shared_num_heads: N of the shared attention, None = num_heads.
    mlp_dim: F of every gated MLP. num_processes: P. num_process_layers: layers a process.
    process_mlp_dim: F of the processes alone, None = mlp_dim. num_decoder_layers: layers of the
      decoder.
    num_memory_tokens: M of a bottleneck; 0 = no bottleneck, one memory token per input token.
    num_bottleneck_blocks: transformer blocks between the memory tokens of the bottleneck.
    qk_norm: RMS norms over each head of the queries and keys, in all attention of the encoder. The
      decoder has none: its cache holds latents, from which keys are linear maps.
    rotate_all_streams: True = in the joint block, image and aux tokens have position 0 of the text,
      as in version 0.11; False = the rotation concerns the text alone.
    decoder_input_norm: an RMS norm of the embedded tokens before the first layer of the decoder,
      whose standard deviation is 0.02 otherwise.
    text_kernel_size: tokens that a short causal convolution mixes each token of a text from; 0 = no
      convolution.
    kv_lora_rank: R of the decoder's cache and of the memory. q_lora_rank: of the decoder's queries,
      None = full rank. qk_nope_head_dim, qk_rope_head_dim, v_head_dim: of the decoder; None = the
      head width, half of it (made even), the head width.
    window: the decoder's sliding window in tokens, None = all.
    context_length: the most tokens of a text, and of a prompt with its answer, that users may give;
      the model itself has no such bound.
    aux_dim: numbers an auxiliary vector. max_aux: with aux_slots, the number of slots.
    aux_slots: True = the row of an auxiliary vector has its own meaning.
    image: the image stream. decoder: a published language model as the decoder. It sets the
      vocabulary and the rotary positions of the decoder, whose other fields are then not used.
    lora: low-rank adapters of linear maps, by default none.
    alignment_dim: width of the retrieval embedding.
    dropout: rate on what each sublayer adds and on the embeddings.
    without: some of PARTS, for ablations: the model is built without them and their parameters.
      Without "latent" the decoder has plain multi-head attention with rotary positions, and the
      memory keeps its full width.
    remat: what layers store for their gradient, one of `slam_jax.layers.remat.POLICIES`; None =
      everything.
    scan_layers: whether the parameters of equal layers are stacked, and the layers scanned; None =
      on GPUs and TPUs, from five equal layers on. It changes no result.
    dtype, param_dtype: of the computation and of the parameters. dtype=None: float32 on CPUs, and
      bfloat16 on GPUs and TPUs.
    matmul_precision: of products of float32 matrices on GPUs and TPUs: "float32"; "tensorfloat32",
      which is faster and keeps 10 bits of each factor; None = as JAX is configured. It concerns no
      other dtype.
    """

    vocab_size: int
    embed_dim: int = 96
    num_heads: int = 4
    shared_num_heads: int | None = dataclasses.field(default=None, kw_only=True)
    mlp_dim: int = 256
    num_processes: int = 4
    num_process_layers: int = 1
    process_mlp_dim: int | None = None
    num_decoder_layers: int = 2
    num_memory_tokens: int = 0
    num_bottleneck_blocks: int = dataclasses.field(default=0, kw_only=True)
    qk_norm: bool = dataclasses.field(default=False, kw_only=True)
    rotate_all_streams: bool = dataclasses.field(default=True, kw_only=True)
    decoder_input_norm: bool = dataclasses.field(default=False, kw_only=True)
    text_kernel_size: int = dataclasses.field(default=0, kw_only=True)
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
    decoder: DecoderConfig = dataclasses.field(default=DecoderConfig(), kw_only=True)
    lora: LoraConfig = dataclasses.field(default=LoraConfig(), kw_only=True)
    context_length: int = 1_024
    alignment_dim: int = 64
    dropout: float = 0.0
    without: tuple[str, ...] = ()
    remat: str | None = None
    scan_layers: bool | None = dataclasses.field(default=None, kw_only=True)
    dtype: str | None = "float32"
    param_dtype: str = "float32"
    matmul_precision: str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        object.__setattr__(self, "without", tuple(self.without))
        super().__post_init__()
        dim, heads, shared = self.embed_dim, self.num_heads, self.shared_heads[0]
        near = (dim - dim % heads) or heads
        multiple = f"a multiple of num_heads={heads}, such as {near}"
        require(dim % heads == 0, "embed_dim", dim, multiple)
        even = f"num_heads times an even width, such as {heads * (self.head_dim + 1)}"
        require(self.head_dim % 2 == 0, "embed_dim", dim, even)
        require(dim % 4 == 0, "embed_dim", dim, "a multiple of 4, for the 2-D positions")
        require(dim % shared == 0, "shared_num_heads", shared, f"a divisor of embed_dim={dim}")
        rope = self.latent_widths["qk_rope_head_dim"]
        require(rope % 2 == 0, "qk_rope_head_dim", rope, f"an even number, such as {rope + 1}")
        require(set(self.without) <= {*PARTS}, "without", self.without, f"some of {PARTS}")
        carried = {"residual", "mean", "concat"} - {*self.without}
        left = "one of residual, mean and concat to be left"
        require(bool(carried), "without", self.without, left)
        self._check_decoder()
        plain = "latent" in self.without
        require(not (plain and self.window), "window", self.window, 'None without "latent"')

    def _check_decoder(self) -> None:
        given = self.decoder.language_model
        if given is None:
            return
        vocab, context = given.vocab_size, given.context_length
        expected = f"at most {vocab:,}, the vocabulary of the language model"
        require(self.vocab_size <= vocab, "vocab_size", self.vocab_size, expected)
        object.__setattr__(self, "vocab_size", vocab)
        object.__setattr__(self, "context_length", min(self.context_length, context))

    @property
    def language_model(self) -> Any:
        """The configuration of the decoder's language model in this model; None without."""
        given = self.decoder.language_model
        if given is None:
            return None
        shared = self.sizes("dtype", "remat", "matmul_precision")
        # Its blocks are not stacked: attention to the memory is between them.
        return dataclasses.replace(given, scan_layers=False, **shared)

    @property
    def tower(self) -> Any:
        """The configuration of the vision tower in this model; None without."""
        given = self.image.tower
        shared = self.sizes("dtype", "remat", "scan_layers", "matmul_precision")
        return None if given is None else dataclasses.replace(given, **shared)

    @property
    def head_dim(self) -> int:
        """H = D / N, of every attention but the shared one and those of the decoder."""
        return self.embed_dim // self.num_heads

    @property
    def shared_heads(self) -> tuple[int, int]:
        """N and H of the shared attention."""
        num_heads = self.shared_num_heads or self.num_heads
        return num_heads, self.embed_dim // num_heads

    @property
    def latent_widths(self) -> dict[str, int]:
        """The decoder's widths a head by name: those given, or derived from H (at least 2)."""
        h = self.head_dim
        derived = dict(qk_nope_head_dim=h, qk_rope_head_dim=h // 4 * 2, v_head_dim=h)
        return {name: getattr(self, name) or max(2, width) for name, width in derived.items()}

    def has(self, part: str) -> bool:
        """Whether one of PARTS is there."""
        return part not in self.without

    @property
    def memory_dim(self) -> int:
        """Width of the memory: R, or D where nothing is compressed."""
        return self.kv_lora_rank if self.has("latent") else self.embed_dim

    @property
    def encoder_out_scale(self) -> float:
        """Initial scale of what each sublayer of the encoder adds: 1 / sqrt(number of sublayers).

        There are 2 in the joint block, 3 in each process layer and 3 in the fusion.
        Source: Radford et al. 2019 (GPT-2), section 2.3.
        """
        return (2 + 3 * self.num_process_layers + 3) ** -0.5

    @property
    def decoder_out_scale(self) -> float:
        """The same for the decoder."""
        return (3 * self.num_decoder_layers) ** -0.5

    @classmethod
    def preset(cls, name: str, vocab_size: int, **overrides: Any) -> "SlamV3Config":
        """One of `PRESETS`, with some fields changed."""
        fields = {**_OF_NEW_MODELS, **PRESETS[name], **overrides}
        image = fields.get("image", {})
        if not isinstance(image, ImageConfig):
            fields["image"] = ImageConfig(**image)
        return cls(vocab_size, **fields)


# Not the defaults of the fields: a stored configuration that lacks them means version 0.11.
_OF_NEW_MODELS: dict[str, Any] = dict(
    decoder_input_norm=True,
    rotate_all_streams=False,
    text_kernel_size=4,
    dtype=None,
    matmul_precision="float32",
)

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
        remat="maps",
        image=dict(encoder="vit", size=224, patch_size=16, num_layers=12),
    ),
}
