"""A small SVG canvas whose boxes are modules of a model."""

import html
from typing import Any

import jax

Number = float | int
WIDTH = 460.0  # of all diagrams: on a phone the letters are still large enough
STREAMS = ("text", "image", "aux")

# A card with colours of its own, so that it can be read on any page. Browsers that know the scheme
# of the page choose the dark ones there.
_STYLE = """
svg { --paper: #fbfcfd; --edge: #d5dbe2; --ink: #1b1f24; --soft: #57606a; --line: #8c959f;
 --box: #fff; --group: #f1f4f7; --text: #1f6feb; --image: #d9730d; --aux: #2a8f5b;
 --process: #8250df; --cache: #0f7f8c; }
@media (prefers-color-scheme: dark) { svg { --paper: #151a21; --edge: #313a45; --ink: #e6eaef;
 --soft: #a3adb8; --line: #768390; --box: #222a34; --group: #1b222b; --text: #6cb0ff;
 --image: #ffa657; --aux: #56d18f; --process: #c297ff; --cache: #5cd3dd; } }
text { fill: var(--ink); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.name, .shape { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
 font-size: 11px; }
.name, .title { font-weight: 600; }
.shape, .soft, .small { fill: var(--soft); }
.soft, .title { font-size: 11px; } .small { font-size: 10px; }
.card { fill: var(--paper); stroke: var(--edge); }
.group { fill: var(--group); stroke: var(--edge); }
.box, .text, .image, .aux, .process, .cache { fill: var(--box); stroke: var(--line); }
.text { stroke: var(--text); } .image { stroke: var(--image); } .aux { stroke: var(--aux); }
.process { stroke: var(--process); } .cache { stroke: var(--cache); }
rect.strong { stroke-width: 1.6; }
rect.plain { stroke: none; }
.fill-text { fill: var(--text); } .fill-image { fill: var(--image); }
.fill-aux { fill: var(--aux); } .fill-cache { fill: var(--cache); }
.fill-line { fill: var(--line); }
.frame { fill: none; stroke: var(--line); }
.half { fill-opacity: .55; } .pale { fill-opacity: .18; }
.arrow { fill: none; stroke: var(--line); stroke-width: 1.3; } .head { fill: var(--line); }
.arrow.bank { stroke: var(--cache); } .head.bank { fill: var(--cache); }
.diagonal { stroke: var(--line); stroke-width: 3; }
text.plus { font-size: 14px; text-anchor: middle; }
"""
_ARROW = 5.0  # length of an arrow's head


class Canvas:
    """Collects the elements of one drawing. Places are in the units of the SVG, from the top left.

    model: of which `module` draws parts; it may be abstract, as of `nnx.eval_shape`.
    """

    def __init__(self, model: Any):
        self.model = model
        self._elements: list[str] = []

    def text(
        self, x: Number, y: Number, content: str, kind: str = "", anchor: str = "middle"
    ) -> None:
        """One line of text. kind: "name" of a module, "title", "shape", "soft" or "small"."""
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self._add(f'<text class="{kind}" {place}>{html.escape(content)}</text>')

    def box(self, x: Number, y: Number, w: Number, h: Number, kind: str = "box", radius: int = 6):
        """A rectangle. kind: a class of the style, which gives its colours."""
        place = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}"'
        self._add(f'<rect class="{kind}" {place}/>')

    def arrow(self, *points: tuple[Number, Number], head: bool = True, kind: str = "arrow") -> None:
        """A line through these points, with an arrow's head at its end. kind: "arrow", or "bank"
        for what is cached."""
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self._add(f'<path class="arrow {kind}" d="M{path}"/>')
        if head:
            (x0, y0), (x, y) = points[-2:]
            dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
            bx, by, s = x - _ARROW * dx, y - _ARROW * dy, 0.6 * _ARROW
            corners = (
                f"M{x:g} {y:g} L{bx + s * dy:g} {by + s * dx:g} L{bx - s * dy:g} {by - s * dx:g}z"
            )
            self._add(f'<path class="head {kind}" d="{corners}"/>')

    def plus(self, x: Number, y: Number) -> None:
        """Where something is added to the residual stream."""
        self._add(f'<circle class="box" cx="{x:g}" cy="{y:g}" r="8"/>')
        self.text(x, y + 4.5, "+", "plus")

    def diagonal(self, x: Number, y: Number, side: Number) -> None:
        """The diagonal of a square."""
        self._add(f'<path class="diagonal" d="M{x:g} {y:g} L{x + side:g} {y + side:g}"/>')

    def module(
        self,
        path: str,
        x: Number,
        y: Number,
        w: Number,
        h: Number,
        *notes: str,
        kind: str = "box",
        label: str | None = None,
        counted: bool = True,
    ) -> None:
        """The box of the module at this path of the model, with its name, notes and parameters.

        label: in place of the last part of the path. kind: "group" = a box around others, with the
        whole path in its upper left corner and its parameters in the upper right one. counted:
        whether the parameters are written.

        Raises AttributeError where the model has no such module.
        """
        count = count_parameters(find(self.model, path))
        self._add(f'<g data-module="{path}" data-parameters="{count}"><title>{path}</title>')
        self.box(x, y, w, h, kind)
        shown = f"{count:,}" if counted else ""
        if kind == "group":
            self.text(x + 9, y + 16, label or path, "name", "start")
            self.text(x + w - 9, y + 16, shown, "small", "end")
            for i, note in enumerate(notes):
                self.text(x + 9, y + 29 + 13 * i, note, "small", "start")
        else:
            lines = [(label or path.rpartition(".")[2], "name"), *((n, "small") for n in notes)]
            lines += [(shown, "small")] * counted
            top = y + h / 2 - 6.5 * (len(lines) - 1) + 4
            for i, (line, style) in enumerate(lines):
                self.text(x + w / 2, top + 13 * i, line, style)
        self._add("</g>")

    def svg(self, height: Number, title: str, description: str) -> str:
        """The drawing as the text of an SVG file. title, description: for screen readers."""
        size = f'viewBox="0 0 {WIDTH:g} {height:g}" width="{1.2 * WIDTH:g}"'
        named = 'role="img" aria-labelledby="title description"'
        card = f'x=".5" y=".5" width="{WIDTH - 1:g}" height="{height - 1:g}" rx="10"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {named}>',
            f'<title id="title">{html.escape(title)}</title>',
            f'<desc id="description">{html.escape(description)}</desc>',
            f"<style>{_STYLE}</style>",
            f'<rect class="card" {card}/>',
            *self._elements,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def _add(self, element: str) -> None:
        self._elements.append(element)


def find(model: Any, path: str) -> Any:
    """The module or parameter at a path such as "decoder.layers.0.attention".

    Raises AttributeError where there is none.
    """
    found = model
    for name in path.split("."):
        found = found[int(name)] if name.isdecimal() else getattr(found, name)
    if found is None:
        raise AttributeError(f"the model has no {path}")
    return found


def count_parameters(part: Any) -> int:
    """The numbers in all parameters of a module, or in one parameter."""
    return sum(x.size for x in jax.tree.leaves(part))


def shape(x: Any) -> str:
    """The shape of an array as text, "[1, 106, 96]"."""
    return "[" + ", ".join(map(str, x.shape)) + "]"
