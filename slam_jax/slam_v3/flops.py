"""Floating-point operations of a forward pass of SLAM v3; `layers.flops` says what is counted.

A backward pass computes every product twice more.
"""

from typing import Any

from slam_jax.layers import flops
from slam_jax.slam_v3.config import SlamV3Config


def encode_flops(
    config: SlamV3Config,
    *,
    text: int = 0,
    pixels: tuple[int, int] | None = None,
    images: int = 1,
    aux: int = 0,
) -> int:
    """Operations that make the memory of one example.

    text: tokens. pixels: height and width of an image. images: how many of them, masked ones
    included. aux: vectors.
    """
    dim, heads, count = config.embed_dim, config.num_heads, config.num_processes
    image, total = (images * x for x in _image(config, pixels))
    streams = [size for size in (text, image, aux) if size]
    tokens = sum(streams)
    total += flops.linear(aux, config.aux_dim, dim) + _block(config, tokens)
    if config.language_model is not None:
        total += flops.linear(text, config.language_model.embed_dim, dim)
    total += 2 * text * config.text_kernel_size * dim
    if text and text < tokens and not config.rotate_all_streams:
        total += flops.scores(text, tokens, dim, 0)  # rotated and plain scores side by side
    layer = flops.gated_mlp(tokens, dim, config.process_mlp_dim or config.mlp_dim)
    if config.has("isolated"):
        layer += sum(flops.attention(size, dim, heads) for size in streams)
    if config.has("shared"):
        total += 2 * flops.linear(tokens, dim, dim)
        layer += flops.attention(tokens, dim, heads, own_keys=False)
    total += count * config.num_process_layers * layer
    if config.has("concat"):
        total += flops.linear(tokens, count * dim, dim)
    if config.has("cross_modal") and len(streams) > 1:
        for size in streams:
            total += flops.attention(size, dim, heads, num_keys=tokens - size)
    if config.has("fusion_mlp"):
        total += flops.gated_mlp(tokens, dim, config.mlp_dim)
    if config.num_memory_tokens:
        total += flops.attention(config.num_memory_tokens, dim, heads, num_keys=tokens)
        total += config.num_bottleneck_blocks * _block(config, config.num_memory_tokens)
    if config.has("latent"):
        total += flops.linear(config.num_memory_tokens or tokens, dim, config.kv_lora_rank)
    return total


def num_memory(
    config: SlamV3Config,
    *,
    text: int = 0,
    pixels: tuple[int, int] | None = None,
    images: int = 1,
    aux: int = 0,
) -> int:
    """M, the memory tokens of such an example."""
    return config.num_memory_tokens or text + images * _image(config, pixels)[0] + aux


def decode_flops(config: SlamV3Config, *, prompts: int, length: int, memory: int) -> int:
    """Operations of the decoder for one example, in the expanded form, with all logits.

    prompts: of the example. length: tokens of each prompt. memory: tokens, see `num_memory`.
    """
    if config.language_model is not None:
        return _language_model(config, prompts, length, memory)
    dim, heads, widths = config.embed_dim, config.num_heads, config.latent_widths
    rows = prompts * length
    key_dim, value_dim = heads * widths["qk_nope_head_dim"], heads * widths["v_head_dim"]
    layer = flops.linear(rows, dim, key_dim + value_dim)
    layer += flops.linear(memory, config.memory_dim, key_dim + value_dim)
    layer += flops.scores(rows, memory, key_dim, value_dim)
    layer += flops.gated_mlp(rows, dim, config.mlp_dim)
    if config.has("latent"):
        sizes: dict[str, Any] = {**widths, **config.sizes("kv_lora_rank", "q_lora_rank")}
        layer += prompts * flops.latent_attention(length, dim, heads, **sizes)
    else:
        layer += prompts * flops.attention(length, dim, heads)
    return config.num_decoder_layers * layer + flops.linear(rows, dim, config.vocab_size)


def _language_model(config: SlamV3Config, prompts: int, length: int, memory: int) -> int:
    """A language model as the decoder, with attention to the memory before some of its blocks."""
    given, rows = config.language_model, prompts * length
    dim = given.embed_dim
    reader = 2 * flops.linear(rows, dim, dim) + flops.scores(rows, memory, dim, dim)
    reader += 2 * flops.linear(memory, config.memory_dim, dim)
    count = -(-given.num_layers // config.decoder.memory_every)
    body = prompts * given.body_flops(length)
    return body + count * reader + flops.linear(rows, dim, given.vocab_size)


def _tower(config: SlamV3Config, height: int, width: int) -> tuple[int, int]:
    """Image tokens of a published vision tower, and the operations that make them."""
    tower = config.tower
    rows, columns = config.image.grid(height, width)
    num_tokens, dim = rows * columns, tower.embed_dim
    seen = num_tokens + tower.num_prefix_tokens
    mlp = (3 if tower.swiglu else 2) * flops.linear(seen, dim, tower.hidden_dim)
    layer = flops.attention(seen, dim, tower.num_heads) + mlp
    total = flops.linear(num_tokens, 3 * tower.patch_size**2, dim) + tower.num_layers * layer
    return num_tokens, total + flops.linear(num_tokens, dim, config.embed_dim)


def _block(config: SlamV3Config, num_tokens: int) -> int:
    """The joint block, or one layer of the "vit": attention and a gated MLP."""
    attention = flops.attention(num_tokens, config.embed_dim, config.num_heads)
    return attention + flops.gated_mlp(num_tokens, config.embed_dim, config.mlp_dim)


def _image(config: SlamV3Config, pixels: tuple[int, int] | None) -> tuple[int, int]:
    """Tokens of an image, and the operations that make them."""
    if pixels is None:
        return 0, 0
    image, dim, (height, width) = config.image, config.embed_dim, pixels
    if image.encoder == "pretrained":
        return _tower(config, height, width)
    patch = image.patch_size
    if image.encoder == "vit":
        num_tokens = (height // patch) * (width // patch)
        blocks = image.num_layers * _block(config, num_tokens)
        return num_tokens, flops.linear(num_tokens, 3 * patch**2, dim) + blocks
    channels, *_ = image.stage_widths
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
    return height * width, total + flops.linear(height * width, channels, dim)
