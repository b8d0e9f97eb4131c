"""Inspects data: python -m slam_jax.data inspect --config=NAME [--config.field=value]

NAME is that of a recipe, such as folder, or the path of a Python file. Prints what a data set holds
and how a model sees it: records, views, shapes, tokens, answers and, of a folder, every row that
cannot be used. Writes a contact sheet of training pictures.
"""

from pathlib import Path

from absl import flags

from slam_jax.errors import InputError, writing
from slam_jax.runtime import cli

CONFIG = flags.DEFINE_string(
    "config",
    None,
    "The name of a recipe, such as quickstart, or the path of a Python file; it is executed.",
    required=True,
)
OUTPUT = flags.DEFINE_string("output", "contact_sheet.png", "Path of the contact sheet, a PNG.")


def main(arguments: list[str]) -> None:
    if arguments[:1] != ["inspect"]:
        given = repr(arguments[0]) if arguments else "nothing"
        raise InputError(f"the command is {given}; expected: inspect --config=NAME")
    # Imported here, where Ctrl-C is handled, because it takes seconds.
    from slam_jax.reporting.contact_sheet import contact_sheet
    from slam_jax.reporting.inspection import inspect_data, print_inspection
    from slam_jax.training.experiment import Experiment, override, read_config

    experiment = Experiment.from_config(override(read_config(CONFIG.value), arguments[1:]))
    found = inspect_data(experiment.data, experiment.model)
    print_inspection(found)
    if not found.tiles:
        print("no pictures, and no contact sheet")
        return
    count = len(found.tiles)
    title = f"{found.name}: {count} of {len(found.dataset.train):,} training examples"
    path = Path(OUTPUT.value)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(found.tiles, title).savefig(path, format="png")
    print(f"{count} training pictures: {path}")


if __name__ == "__main__":
    cli.run(main)
