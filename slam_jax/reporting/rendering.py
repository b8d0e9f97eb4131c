"""HTML from templates that escape what users wrote, and pictures to put into it."""

import base64
import functools
import io
from importlib import resources
from typing import Any

import jinja2
import markupsafe
import numpy as np
from PIL import Image


def render_template(name: str, **values: Any) -> str:
    """A template of `slam_jax/reporting/templates`, filled in. Text is escaped, `markup` is not."""
    return _template(name).render(values)


def markup(html: str) -> markupsafe.Markup:
    """HTML that a template includes as it is."""
    return markupsafe.Markup(html)


@functools.cache
def read_template(name: str) -> str:
    return (resources.files("slam_jax.reporting") / "templates" / name).read_text(encoding="utf-8")


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.from_string(read_template(name))


def png_url(pixels: np.ndarray) -> str:
    """The pixels, with or without an alpha channel, as the data URL of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
