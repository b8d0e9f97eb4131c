"""The recipes that come with the package: the files of configs/, by name.

`quickstart` is slam_v3_quickstart.py and `language_model` is language_model.py. An installed
package has these files in its own folder `recipes`.
"""

from pathlib import Path

from slam_jax.errors import ConfigError

_PREFIX = "slam_v3_"


def folder() -> Path:
    """Where the recipes are: in an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """The names of all recipes, sorted; those in folders as `ablations/sort_of_clevr`."""
    return sorted(_by_name())


def find(name: str | Path) -> Path:
    """The path of a configuration: that of a file, or of the recipe with this name.

    A file in the current folder goes before a recipe of its name. Raises ConfigError, with the
    names of all recipes, where there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    found = _by_name()
    file = found.get(str(name).removeprefix(_PREFIX))
    if file is None:
        raise ConfigError(
            f"{name}: no such file or recipe; give the path of a Python file, or one of "
            f"{', '.join(sorted(found))}"
        )
    return file


def _by_name() -> dict[str, Path]:
    root = folder()
    files = {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.py")}
    return {name.removeprefix(_PREFIX): path for name, path in files.items()}
