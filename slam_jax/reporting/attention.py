"""Attention maps of the processes and of the decoder's heads for one answer, as arrays and as HTML
drawn over the picture, the words and the numbers of the request."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from slam_jax.data.images import as_pictures
from slam_jax.generation.requests import (
    Request,
    append_answers,
    read_inputs,
    read_pictures,
    read_prompts,
)
from slam_jax.reporting.rendering import render_template

_HEAT_COLOR = (225, 87, 0)
_FULL_COLOR = 4.0  # this many times an even share is drawn in full colour


class AttentionMaps(NamedTuple):
    """Attention maps over the inputs: one per process, then one per decoder head.

    names: of the maps, "p0" for the first process and such as "layer 1, head 2". num_processes: the
    number of maps of processes, which come first. image: rows from the top; with an axis n of
    pictures where the request has a list of them. image, text, aux: None = not an input of the
    request. A map sums to 1 over the three.

    The map of a head is its attention to the memory, averaged over the tokens of the answer. The
    map of a process is its shared attention, averaged over its heads and layers and over query
    tokens, which are weighted by the mean map of the heads. It shows where a process looked for
    the tokens that the decoder read, not what the process computed from them.
    """

    names: tuple[str, ...]
    num_processes: int
    image: Float[np.ndarray, "maps *n h w"] | None
    text: Float[np.ndarray, "maps S_t"] | None
    aux: Float[np.ndarray, "maps A"] | None


def attention_maps(loaded: Any, request: Request, answer: str) -> AttentionMaps:
    """The maps of a request with this answer; raises InputError as `generate` does."""
    tokenizer = loaded.tokenizer
    written = [*tokenizer.encode(answer), tokenizer.eos_id]
    prompts = read_prompts(loaded, [request], 0)
    inputs: Any = read_inputs(loaded, [request])
    tokens, predicts = append_answers(prompts, [written], tokenizer.pad_id)
    processes, heads = _maps(loaded.model, tokens, inputs, predicts[0] / len(written))
    maps = np.concatenate([processes, heads.reshape(-1, heads.shape[-1])])
    layers, per_layer = heads.shape[:2]
    names = [f"p{p}" for p in range(len(processes))]
    names += [f"layer {i + 1}, head {n + 1}" for i in range(layers) for n in range(per_layer)]
    text = 0 if inputs.text is None else inputs.text.shape[1]
    aux = 0 if inputs.aux is None else inputs.aux.shape[1]
    parts = np.split(maps, [text, maps.shape[1] - aux], axis=1)
    return AttentionMaps(
        names=tuple(names),
        num_processes=len(processes),
        image=_of_pictures(parts[1], inputs.image, request.image),
        text=parts[0][:, : int(inputs.text_mask.sum())] if request.text else None,
        aux=None if request.aux is None else parts[2][:, : _count(inputs.aux_mask)],
    )


def _of_pictures(
    maps: Float[np.ndarray, "maps S"], pixels: Any, image: Any
) -> Float[np.ndarray, "maps *n h w"] | None:
    """The maps of the pictures of a request. pixels: as the model got them."""
    pictures = as_pictures(image)
    if not pictures:
        return None
    count = pixels.shape[1] if pixels.ndim > 4 else 1
    side = math.isqrt(maps.shape[1] // count)
    shaped = maps.reshape(len(maps), count, side, side)[:, : len(pictures)]
    return shaped if isinstance(image, (list, tuple)) else shaped[:, 0]


@jax.jit
def _maps(model, tokens, inputs, predicts):
    found = model(tokens[:, :-1], inputs, attention=True).attention
    # Heads attend to memory tokens, and memory tokens have read input tokens.
    heads = jnp.einsum("lntm,t,ms->lns", found.decoder[0], predicts, found.memory[0])
    read = heads.mean(axis=(0, 1))
    if found.processes is None:  # an ablated model without shared attention
        return jnp.zeros((model.config.num_processes, read.shape[0])), heads
    return jnp.einsum("psk,s->pk", found.processes[:, 0].mean((1, 2)), read), heads


def _count(mask: np.ndarray) -> int:
    """The number of vectors up to the last present one; missing ones between them count."""
    return int(np.flatnonzero(mask.any(axis=0)).max(initial=-1)) + 1


def attention_html(loaded: Any, request: Request, answer: str, *, style: bool = True) -> str:
    """A fragment of a page: where each process and each decoder head looked for this answer.

    It loads nothing from elsewhere and escapes what users wrote. style: whether it begins with its
    style sheet, `templates/attention.css`, which a page of several fragments needs once.
    """
    maps = attention_maps(loaded, request, answer)
    given = [part for part in (maps.image, maps.text, maps.aux) if part is not None]
    full = _FULL_COLOR / sum(part[0].size for part in given)
    images, heat, texts = read_pictures(loaded, request.image), None, {}
    if maps.image is not None:
        shares = maps.image.reshape(len(maps.names), -1, *maps.image.shape[-2:])
        # One colour, more opaque where the share is larger.
        heat = np.full((*shares.shape, 4), (*_HEAT_COLOR, 0), np.uint8)
        heat[..., 3] = np.clip(shares / full, 0, 1) * 0.85 * 255
    if maps.text is not None:
        pieces, ids = loaded.tokenizer.token_bytes, loaded.tokenizer.encode(request.text or "")
        words = [pieces[i].decode("utf-8", "replace") for i in ids]
        texts["words"] = (words, np.minimum(maps.text / full, 1))
    if maps.aux is not None:
        names = _vector_names(loaded, request.aux)[: maps.aux.shape[1]]
        texts["words rows"] = (names, np.minimum(maps.aux / full, 1))
    return render_template(
        "attention.html", images=images, heat=heat, texts=texts, maps=maps, style=style
    )


def _vector_names(loaded: Any, aux: Any) -> list[str]:
    """A name for each vector: its column, or the names of its ones, or its number."""
    names = () if loaded.aux_format is None else loaded.aux_format.names
    if loaded.aux_format is not None and loaded.aux_format.has_columns:
        return list(names)
    rows = np.asarray(aux).tolist()
    ones = [" ".join(n for n, x in zip(names, row, strict=False) if x == 1.0) for row in rows]
    return [text or f"row {i + 1}" for i, text in enumerate(ones)]
