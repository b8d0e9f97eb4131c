"""Attention maps of the processes and of the decoder's heads for one answer."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from slam_jax.generation.decode import bucket
from slam_jax.generation.requests import Request, read_inputs, read_prompts


class AttentionMaps(NamedTuple):
    """Attention maps over the inputs: one per process, then one per decoder head.

    names: of the maps, such as "process 1" and "layer 1, head 2". num_processes: the number of
    maps of processes, which come first. image: rows from the top. image, text, aux: None = not an
    input of the request. A map sums to 1 over the three.

    The map of a head is its attention to the memory, averaged over the tokens of the answer. The
    map of a process is its shared attention, averaged over its heads and layers and over query
    tokens, which are weighted by the mean map of the heads. It shows where a process looked for
    the tokens that the decoder read, not what the process computed from them.
    """

    names: tuple[str, ...]
    num_processes: int
    image: Float[np.ndarray, "maps h w"] | None
    text: Float[np.ndarray, "maps S_t"] | None
    aux: Float[np.ndarray, "maps A"] | None


def attention_maps(loaded: Any, request: Request, answer: str) -> AttentionMaps:
    """The maps of a request with this answer; raises InputError as `generate` does."""
    tokenizer = loaded.tokenizer
    written = [*tokenizer.encode(answer), tokenizer.eos_id]
    prompts = read_prompts(loaded, [request], 0)
    inputs: Any = read_inputs(loaded, [request])
    start = int(prompts.lengths[0])
    row = [*prompts.tokens[0, :start].tolist(), *written]
    tokens = np.full((1, bucket(len(row), 16)), tokenizer.pad_id, np.int32)
    tokens[0, : len(row)] = row
    predicts = np.zeros(tokens.shape[1], np.float32)
    predicts[start - 1 : len(row) - 1] = 1 / len(written)
    processes, heads = _maps(loaded.model, tokens, inputs, predicts)
    maps = np.concatenate([processes, heads.reshape(-1, heads.shape[-1])])
    layers, per_layer = heads.shape[:2]
    names = [f"process {p + 1}" for p in range(len(processes))]
    names += [f"layer {i + 1}, head {n + 1}" for i in range(layers) for n in range(per_layer)]
    text = 0 if inputs.text is None else inputs.text.shape[1]
    aux = 0 if inputs.aux is None else inputs.aux.shape[1]
    parts = np.split(maps, [text, maps.shape[1] - aux], axis=1)
    side = math.isqrt(parts[1].shape[1])
    return AttentionMaps(
        names=tuple(names),
        num_processes=len(processes),
        image=None if request.image is None else parts[1].reshape(len(maps), side, side),
        text=parts[0][:, : int(inputs.text_mask.sum())] if request.text else None,
        aux=None if request.aux is None else parts[2][:, : _count(inputs.aux_mask)],
    )


@jax.jit
def _maps(model, tokens, inputs, predicts):
    found = model(tokens, inputs, attention=True).attention
    # Heads attend to memory tokens, and memory tokens have read input tokens.
    heads = jnp.einsum("lntm,t,ms->lns", found.decoder[0], predicts, found.memory[0])
    read = heads.mean(axis=(0, 1))
    if found.processes is None:  # an ablated model without shared attention
        return jnp.zeros((model.config.num_processes, read.shape[0])), heads
    return jnp.einsum("psk,s->pk", found.processes[:, 0].mean((1, 2)), read), heads


def _count(mask: np.ndarray) -> int:
    """The number of vectors up to the last present one; missing ones between them count."""
    return int(np.flatnonzero(mask.any(axis=0)).max(initial=-1)) + 1
