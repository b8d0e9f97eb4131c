"""Floating-point operations of a language model on one row of tokens; see `layers.flops`.

Each architecture counts its own layers in `LanguageModelConfig.body_flops`.
"""

from typing import Any

from slam_jax.layers.flops import linear


def forward_flops(config: Any, num_tokens: int) -> int:
    """One forward pass over a row of `num_tokens` tokens, with the logits of all of them."""
    return config.body_flops(num_tokens) + linear(num_tokens, config.embed_dim, config.vocab_size)


def training_flops(config: Any, num_tokens: int) -> int:
    """A forward and a backward pass over one row: every product is computed three times."""
    return 3 * forward_flops(config, num_tokens)
