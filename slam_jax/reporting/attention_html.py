"""Attention maps as HTML: drawn over the picture, the words and the numbers of a request."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from slam_jax.data import AuxFormat
from slam_jax.data.images import load_image
from slam_jax.generation import Request
from slam_jax.reporting.attention import AttentionMaps, attention_maps
from slam_jax.reporting.rendering import png_url, read_template, render_template

_HEAT_COLOR = (225, 87, 0)
_FULL_COLOR = 4.0  # this many times an even share is drawn in full colour


def attention_html(loaded: Any, request: Request, answer: str, *, style: bool = True) -> str:
    """A fragment of a page: where each process and each decoder head looked for this answer.

    It loads nothing from elsewhere and escapes what users wrote. style: whether it begins with its
    own style sheet, `attention_css()`.
    """
    maps = attention_maps(loaded, request, answer)
    image = None
    if maps.image is not None:
        image = png_url(load_image(request.image, loaded.model.config.image.size))
    fragment = render_template(
        "attention.html",
        image=image,
        maps=[_draw_map(maps, k, loaded, request) for k in range(len(maps.names))],
        num_processes=maps.num_processes,
        wide=maps.image is None,
    )
    return f"<style>{attention_css()}</style>{fragment}" if style else fragment


def attention_css() -> str:
    return read_template("attention.css")


def _draw_map(maps: AttentionMaps, k: int, loaded: Any, request: Request) -> dict[str, Any]:
    """What the template shows of map k."""
    parts = [part[k] for part in (maps.image, maps.text, maps.aux) if part is not None]
    full = _FULL_COLOR / sum(part.size for part in parts)
    drawn: dict[str, Any] = dict(name=maps.names[k], heat=None, words=(), rows=())
    if maps.image is not None:
        drawn["heat"] = _heat(maps.image[k] / full)
    if maps.text is not None:
        drawn["words"] = _shares(_words(loaded, request.text or ""), maps.text[k] / full)
    if maps.aux is not None:
        drawn["rows"] = _shares(_vector_names(loaded, request.aux), maps.aux[k] / full)
    return drawn


def _shares(texts: Sequence[str], shares: Float[np.ndarray, "n"]) -> list[dict[str, str]]:
    pairs = zip(texts, shares.tolist(), strict=False)
    return [{"text": text, "share": f"{min(share, 1):.3f}"} for text, share in pairs]


def _heat(shares: Float[np.ndarray, "h w"]) -> str:
    """A transparent layer of one colour, more opaque where the share is larger."""
    alpha = (np.clip(shares, 0, 1) * 0.85 * 255).astype(np.uint8)
    color = np.broadcast_to(np.array(_HEAT_COLOR, np.uint8), (*alpha.shape, 3))
    return png_url(np.concatenate([color, alpha[..., None]], axis=-1))


def _words(loaded: Any, text: str) -> list[str]:
    tokenizer = loaded.tokenizer
    return [tokenizer.token_bytes[i].decode("utf-8", "replace") for i in tokenizer.encode(text)]


def _vector_names(loaded: Any, aux: Any) -> list[str]:
    """A name for each vector: its column, or the names of its ones, or its number."""
    format_: AuxFormat | None = loaded.aux_format
    names = () if format_ is None else format_.names
    if format_ is not None and format_.has_columns:
        return list(names)
    rows = np.asarray(aux).tolist()
    ones = [" ".join(n for n, x in zip(names, row, strict=False) if x == 1.0) for row in rows]
    return [text or f"row {i + 1}" for i, text in enumerate(ones)]
