"""Draws a trained SLAM v3 as SVG files, from its modules:

python -m slam_jax.reporting.diagrams --workdir=DIR --output=FOLDER [--step=N|best|latest]

The files are model.svg, process_layer.svg and decoder_layer.svg. Names, shapes and numbers of
parameters are those of the model, for one example with a text, an image and auxiliary vectors.
"""

from pathlib import Path

from absl import flags

from slam_jax.runtime import cli

WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
STEP = flags.DEFINE_string("step", "best", "The checkpoint: a step number, best or latest.")
OUTPUT = flags.DEFINE_string("output", None, "The folder for the files.", required=True)
TEXT = flags.DEFINE_integer("text", 36, "Tokens of the text of the example.", 1)
AUX = flags.DEFINE_integer("aux", 6, "Auxiliary vectors of the example.", 1)


def main(arguments: list[str]) -> None:
    from slam_jax.errors import write_whole
    from slam_jax.reporting.diagrams.figures import draw_workdir

    cli.refuse(arguments)
    folder = Path(OUTPUT.value)
    drawn = draw_workdir(WORKDIR.value, STEP.value, text=TEXT.value, aux=AUX.value)
    for name, svg in drawn.items():
        write_whole(folder / name, svg)
        print(folder / name)


if __name__ == "__main__":
    cli.run(main)
