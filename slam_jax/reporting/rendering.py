"""HTML from the templates beside this file, which escape what users wrote."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from slam_jax.evaluation.table import entry_label, percent


def render_template(name: str, **values: Any) -> str:
    """A template of `slam_jax/reporting/templates`, filled in."""
    return _templates.get_template(name).render(values)


def png_url(pixels: np.ndarray) -> str:
    """The pixels, with or without an alpha channel, as the data URL of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def side_by_side(
    pictures: Sequence[UInt8[np.ndarray, "H W 3"]],
) -> UInt8[np.ndarray, "H width 3"]:
    """Pictures of one size as one picture, with white lines between them."""
    line = np.full((pictures[0].shape[0], 1, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (line, picture)]
    return np.concatenate(parts[1:], axis=1)


_templates = jinja2.Environment(
    loader=jinja2.PackageLoader("slam_jax.reporting"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
_templates.filters |= dict(percent=percent, label=entry_label, exp=math.exp, png_url=png_url)
