"""Floating-point operations of a training batch of SLAM v3."""

from typing import Any

from slam_jax.batch import Batch
from slam_jax.slam_v3 import Inputs, SlamV3Config
from slam_jax.slam_v3.flops import decode_flops, encode_flops, num_memory
from slam_jax.training.losses import LossConfig


def input_sizes(inputs: Inputs) -> dict[str, Any]:
    """The sizes of an example's inputs, as `encode_flops` takes them."""
    arrays: dict[str, Any] = {"text": inputs.text, "pixels": inputs.image, "aux": inputs.aux}
    sizes: dict[str, Any] = {name: x.shape[1] for name, x in arrays.items() if x is not None}
    if inputs.image is not None:
        sizes["pixels"] = inputs.image.shape[-3:-1]
        if inputs.image.ndim > 4:
            sizes["images"] = inputs.image.shape[1]
    return sizes


def is_aligned(loss: LossConfig, batch: Batch) -> bool:
    """Whether text and image are also encoded alone, for the alignment loss."""
    return loss.alignment > 0 and batch.paired


def forward_flops(model: SlamV3Config, loss: LossConfig, batch: Batch) -> int:
    """Operations of the forward pass of one example of the batch, pads included.

    A training step takes three times as many by the usual convention: two more for the gradient,
    none for what is recomputed (Kaplan et al. 2020, arXiv 2001.08361, section 2.1; Chowdhery et al.
    2022, arXiv 2204.02311, appendix B).
    """
    sizes = input_sizes(batch.inputs)
    encodes = [sizes]
    if is_aligned(loss, batch):
        alone = ("text",), ("pixels", "images")
        encodes += [{name: sizes[name] for name in names if name in sizes} for names in alone]
    _, prompts, length = batch.tokens.shape
    memory = num_memory(model, **sizes)
    decode = decode_flops(model, prompts=prompts, length=length - 1, memory=memory)
    return decode + sum(encode_flops(model, **inputs) for inputs in encodes)
