"""How many floating-point operations SLAM v3 takes, counted by formula.

A multiplication and the addition after it are two. Counted are matrix products and convolutions;
not norms, activations, softmax and turns. A backward pass takes every product twice more.
"""

from slam_jax.slam_v3.config import ImageConfig, SlamV3Config


def encode_flops(
    config: SlamV3Config, *, text: int = 0, pixels: tuple[int, int] | None = None, aux: int = 0
) -> int:
    """Of one example: `text` tokens, an image of height x width `pixels`, `aux` vectors; down to
    the memory."""
    dim, image_tokens, total = config.embed_dim, 0, 0
    if pixels is not None:
        image_tokens, total = _image(config, *pixels)
    total += _linear(aux, config.aux_dim, dim)
    streams = [size for size in (text, image_tokens, aux) if size]
    num_tokens = sum(streams)
    total += _attention(config, num_tokens, num_tokens) + _mlp(config, num_tokens, config.mlp_dim)
    total += config.num_processes * config.num_process_layers * _process(config, streams)
    if config.has("shared"):
        total += 2 * _linear(num_tokens, dim, dim)  # the bank
    total += _fusion(config, streams)
    memory = config.num_memory_tokens or num_tokens
    if config.num_memory_tokens:
        total += 2 * _linear(memory, dim, dim) + 2 * _linear(num_tokens, dim, dim)
        total += _scores(memory, num_tokens, dim, dim)
    if config.has("latent"):
        total += _linear(memory, dim, config.kv_lora_rank)
    return total


def decode_flops(config: SlamV3Config, *, prompts: int, length: int, memory: int) -> int:
    """Of one example with so many prompts of so many tokens each, in the expanded form; logits of
    all of them among it. memory: tokens of it, see `num_memory`."""
    rows, widths = prompts * length, config.latent_widths
    key_dim, value_dim = (
        config.num_heads * widths[name] for name in ("qk_nope_head_dim", "v_head_dim")
    )
    read = _linear(rows, config.embed_dim, key_dim) + _linear(rows, value_dim, config.embed_dim)
    read += _linear(memory, config.memory_dim, key_dim + value_dim)
    read += _scores(rows, memory, key_dim, value_dim)
    if config.has("latent"):
        attention = prompts * _latent_attention(config, length)
    else:
        attention = prompts * _attention(config, length, length)
    layer = attention + read + _mlp(config, rows, config.mlp_dim)
    return config.num_decoder_layers * layer + _linear(rows, config.embed_dim, config.vocab_size)


def num_memory(
    config: SlamV3Config, *, text: int = 0, pixels: tuple[int, int] | None = None, aux: int = 0
) -> int:
    """M of such an example."""
    image = 0 if pixels is None else _image(config, *pixels)[0]
    return config.num_memory_tokens or text + image + aux


def _linear(num_tokens: int, inputs: int, outputs: int) -> int:
    return 2 * num_tokens * inputs * outputs


def _scores(queries: int, keys: int, key_dim: int, value_dim: int) -> int:
    """Widths are those of all heads together."""
    return 2 * queries * keys * (key_dim + value_dim)


def _mlp(config: SlamV3Config, num_tokens: int, mlp_dim: int) -> int:
    return 3 * _linear(num_tokens, config.embed_dim, mlp_dim)


def _attention(config: SlamV3Config, queries: int, keys: int) -> int:
    """Self-attention of plain heads; also where tokens attend in parts, given their sum."""
    dim = config.embed_dim
    return _linear(queries, dim, 4 * dim) + _scores(queries, keys, dim, dim)


def _process(config: SlamV3Config, streams: list[int]) -> int:
    """One layer of one process."""
    dim, num_tokens = config.embed_dim, sum(streams)
    total = _mlp(config, num_tokens, config.process_mlp_dim or config.mlp_dim)
    if config.has("isolated"):
        total += sum(_attention(config, size, size) for size in streams)
    if config.has("shared"):
        total += _linear(num_tokens, dim, 2 * dim) + _scores(num_tokens, num_tokens, dim, dim)
    return total


def _fusion(config: SlamV3Config, streams: list[int]) -> int:
    dim, num_tokens, total = config.embed_dim, sum(streams), 0
    if config.has("concat"):
        total += _linear(num_tokens, config.num_processes * dim, dim)
    if config.has("cross_modal") and len(streams) > 1:
        for size in streams:
            others = num_tokens - size
            total += 2 * _linear(size, dim, dim) + 2 * _linear(others, dim, dim)
            total += _scores(size, others, dim, dim)
    if config.has("fusion_mlp"):
        total += _mlp(config, num_tokens, config.mlp_dim)
    return total


def _latent_attention(config: SlamV3Config, length: int) -> int:
    dim, rank, query_rank = config.embed_dim, config.kv_lora_rank, config.q_lora_rank
    widths, num_heads = config.latent_widths, config.num_heads
    nope, rope, value = (
        num_heads * widths[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    total = _linear(length, query_rank or dim, nope + rope)
    if query_rank is not None:
        total += _linear(length, dim, query_rank)
    total += _linear(length, dim, rank + widths["qk_rope_head_dim"])
    total += _linear(length, rank, nope + value) + _linear(length, value, dim)
    return total + _scores(length, length, nope + rope, value)


def _image(config: SlamV3Config, height: int, width: int) -> tuple[int, int]:
    """Tokens of the image, and what they take."""
    image, dim = config.image, config.embed_dim
    if image.encoder == "vit":
        patch = image.patch_size
        num_tokens = (height // patch) * (width // patch)
        block = _attention(config, num_tokens, num_tokens)
        block += _mlp(config, num_tokens, config.mlp_dim)
        return num_tokens, _linear(num_tokens, 3 * patch**2, dim) + image.num_layers * block
    num_tokens, channels, total = _resnet(image, height, width)
    return num_tokens, total + _linear(num_tokens, channels, dim)


def _resnet(image: ImageConfig, height: int, width: int) -> tuple[int, int, int]:
    """Tokens, channels and operations of the stem and the stages."""
    patch, (first, *_) = image.patch_size, image.stage_widths
    height, width = -(-height // patch), -(-width // patch)
    total = _linear(height * width, 3 * (patch + 2 * (patch // 2)) ** 2, first)
    channels = first
    for stage, wide in enumerate(image.stage_widths):
        for block in range(image.blocks_per_stage):
            stride = 2 if stage and not block else 1
            height, width = -(-height // stride), -(-width // stride)
            total += _linear(height * width, 9 * (channels + wide), wide)
            if stride > 1 or channels != wide:
                total += _linear(height * width, channels, wide)
            channels = wide
    return height * width, channels, total
