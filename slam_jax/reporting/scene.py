"""Draws a test scene of Sort-of-CLEVR with a question and a model's answers to it:

python -m slam_jax.reporting.scene --workdir=runs/quickstart --output=docs/scene.png
"""

from pathlib import Path

import matplotlib
from absl import flags
from matplotlib.figure import Figure

from slam_jax.data.scenes import describe, tabulate
from slam_jax.data.sort_of_clevr import COLOURS, SHAPES, draw, make_scene
from slam_jax.errors import shorten, writing
from slam_jax.generation import Request, generate
from slam_jax.runtime import cli, shared_flags
from slam_jax.training import Loaded, load

_FIRST_TEST_SCENE = 9_800


def draw_scene(loaded: Loaded, prompt: str, index: int = 0) -> Figure:
    """Test scene `index` as image, text and table, each with the answer the model gives from it."""
    objects, _ = make_scene(_FIRST_TEST_SCENE + index)
    order = range(len(COLOURS))
    image, text = draw(objects, order), describe(objects, order)
    inputs = {"image": image, "text": text, "aux": tabulate(objects, order)}
    answers = generate(loaded, [Request(prompt, **{name: x}) for name, x in inputs.items()])
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure((9, 3.7), dpi=120, facecolor="white")
        figure.suptitle(f"Question: {prompt}", fontsize=13)
        note = f"after {loaded.step:,} steps of training"
        figure.text(0.99, 0.02, note, fontsize=8, color="#66665f", ha="right")
        panels = figure.subplots(
            1, 3, gridspec_kw=dict(top=0.8, bottom=0.16, left=0.01, right=0.99, wspace=0.05)
        )
        names = ("an image", "a text", "a table of numbers")
        for panel, name, answer in zip(panels, names, answers, strict=True):
            panel.set(xticks=[], yticks=[], aspect="equal", xlim=(0, 1), ylim=(0, 1))
            panel.set_title(f"The scene as {name}", fontsize=10, color="#66665f")
            panel.set_xlabel(f"Answer: {shorten(answer.text, 20)}", fontsize=13, labelpad=9)
        panels[0].imshow(image, extent=(0, 1, 0, 1))
        sentences = text.replace(" . ", " .\n")
        panels[1].text(0.06, 0.5, sentences, fontsize=10, va="center", linespacing=1.6)
        rows = [
            [colour, SHAPES[shape], x, y]
            for colour, (shape, x, y) in zip(COLOURS, objects.tolist(), strict=True)
        ]
        columns = ("colour", "shape", "x", "y")
        table = panels[2].table(rows, colLabels=columns, loc="center", edges="horizontal")
        table.auto_set_font_size(False)
        table.set_fontsize(9)
        table.scale(0.95, 1.5)
    return figure


def main(arguments: list[str]) -> None:
    cli.refuse(arguments)
    given = flags.FLAGS
    loaded = load(given.workdir, given.step, given.base)
    path = Path(given.output)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_scene(loaded, given.prompt, given.scene).savefig(path, format="png")
    print(f"scene {given.scene} and the answers of step {loaded.step:,}: {path}")


if __name__ == "__main__":
    # Defined here, as other commands have flags of the same names.
    flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
    flags.DEFINE_string("step", None, "The checkpoint: a step, best or latest.")
    shared_flags.define_base()
    flags.DEFINE_string("output", "scene.png", "Path of the picture, a PNG.")
    flags.DEFINE_string("prompt", "shape closest to red", "The question.")
    flags.DEFINE_integer("scene", 0, "The number of the test scene.", 0, 199)
    cli.run(main)
