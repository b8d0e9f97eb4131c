"""Floating-point operations of a forward pass of SLAM v3; `layers.flops` says what is counted.

A backward pass computes every product twice more.
"""

from slam_jax.layers import flops
from slam_jax.slam_v3.config import ImageConfig, SlamV3Config


def encode_flops(
    config: SlamV3Config, *, text: int = 0, pixels: tuple[int, int] | None = None, aux: int = 0
) -> int:
    """Operations that make the memory of one example.

    text: tokens. pixels: height and width of an image. aux: vectors.
    """
    dim, heads, image_tokens, total = config.embed_dim, config.num_heads, 0, 0
    if pixels is not None:
        image_tokens, total = _image(config, *pixels)
    total += flops.linear(aux, config.aux_dim, dim)
    streams = [size for size in (text, image_tokens, aux) if size]
    num_tokens = sum(streams)
    total += _block(config, num_tokens)
    total += config.num_processes * config.num_process_layers * _process_layer(config, streams)
    if config.has("shared"):
        total += 2 * flops.linear(num_tokens, dim, dim)  # the bank
    total += _fusion(config, streams)
    memory = config.num_memory_tokens or num_tokens
    if config.num_memory_tokens:
        total += flops.attention(memory, dim, heads, num_keys=num_tokens)
    if config.has("latent"):
        total += flops.linear(memory, dim, config.kv_lora_rank)
    return total


def decode_flops(config: SlamV3Config, *, prompts: int, length: int, memory: int) -> int:
    """Operations of the decoder for one example, in the expanded form, with all logits.

    prompts: of the example. length: tokens of each prompt. memory: tokens, see `num_memory`.
    """
    dim, heads, widths = config.embed_dim, config.num_heads, config.latent_widths
    rows = prompts * length
    key_dim, value_dim = heads * widths["qk_nope_head_dim"], heads * widths["v_head_dim"]
    read = flops.linear(rows, dim, key_dim + value_dim)
    read += flops.linear(memory, config.memory_dim, key_dim + value_dim)
    read += flops.scores(rows, memory, key_dim, value_dim)
    if config.has("latent"):
        attention = flops.latent_attention(
            length,
            dim,
            heads,
            kv_lora_rank=config.kv_lora_rank,
            q_lora_rank=config.q_lora_rank,
            **widths,
        )
    else:
        attention = flops.attention(length, dim, heads)
    layer = prompts * attention + read + flops.gated_mlp(rows, dim, config.mlp_dim)
    return config.num_decoder_layers * layer + flops.linear(rows, dim, config.vocab_size)


def num_memory(
    config: SlamV3Config, *, text: int = 0, pixels: tuple[int, int] | None = None, aux: int = 0
) -> int:
    """M, the memory tokens of such an example."""
    image = 0 if pixels is None else _image(config, *pixels)[0]
    return config.num_memory_tokens or text + image + aux


def _block(config: SlamV3Config, num_tokens: int) -> int:
    """Level 1, or one layer of the "vit": attention and a gated MLP."""
    attention = flops.attention(num_tokens, config.embed_dim, config.num_heads)
    return attention + flops.gated_mlp(num_tokens, config.embed_dim, config.mlp_dim)


def _process_layer(config: SlamV3Config, streams: list[int]) -> int:
    """One layer of one process."""
    dim, heads, num_tokens = config.embed_dim, config.num_heads, sum(streams)
    total = flops.gated_mlp(num_tokens, dim, config.process_mlp_dim or config.mlp_dim)
    if config.has("isolated"):
        total += sum(flops.attention(size, dim, heads) for size in streams)
    if config.has("shared"):
        total += flops.attention(num_tokens, dim, heads, own_keys=False)
    return total


def _fusion(config: SlamV3Config, streams: list[int]) -> int:
    dim, num_tokens, total = config.embed_dim, sum(streams), 0
    if config.has("concat"):
        total += flops.linear(num_tokens, config.num_processes * dim, dim)
    if config.has("cross_modal") and len(streams) > 1:
        for size in streams:
            total += flops.attention(size, dim, config.num_heads, num_keys=num_tokens - size)
    if config.has("fusion_mlp"):
        total += flops.gated_mlp(num_tokens, dim, config.mlp_dim)
    return total


def _image(config: SlamV3Config, height: int, width: int) -> tuple[int, int]:
    """Tokens of the image, and the operations that make them."""
    image, dim = config.image, config.embed_dim
    if image.encoder == "vit":
        patch = image.patch_size
        num_tokens = (height // patch) * (width // patch)
        blocks = image.num_layers * _block(config, num_tokens)
        return num_tokens, flops.linear(num_tokens, 3 * patch**2, dim) + blocks
    num_tokens, channels, total = _resnet(image, height, width)
    return num_tokens, total + flops.linear(num_tokens, channels, dim)


def _resnet(image: ImageConfig, height: int, width: int) -> tuple[int, int, int]:
    """Tokens, channels and operations of the stem and the stages."""
    patch, (channels, *_) = image.patch_size, image.stage_widths
    height, width = -(-height // patch), -(-width // patch)
    total = flops.linear(height * width, 3 * (patch + 2 * (patch // 2)) ** 2, channels)
    for stage, features in enumerate(image.stage_widths):
        for block in range(image.blocks_per_stage):
            stride = 2 if stage and not block else 1
            height, width = -(-height // stride), -(-width // stride)
            total += flops.linear(height * width, 9 * (channels + features), features)
            if stride > 1 or channels != features:
                total += flops.linear(height * width, channels, features)
            channels = features
    return height * width, channels, total
