"""Folders of pictures whose names are the answers."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from slam_jax.data.formats.base import Found, Located
from slam_jax.data.splits import SPLIT_NAMES

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def class_folders(folder: Path) -> Found | None:
    """`cat/1.png`, `dog/2.png`, or with splits `train/cat/1.png`; None without such pictures."""
    tops = visible_folders(folder)
    if tops and all(top.name.lower() in SPLIT_NAMES for top in tops):
        classes = [(SPLIT_NAMES[top.name.lower()], each) for top in tops for each in _classes(top)]
    else:
        classes = [("", each) for each in _classes(folder)]
    if not classes:
        return None
    read = functools.partial(_read, folder, classes)
    return Found("class folders", folder, tuple(each for _, each in classes), read)


def visible_folders(folder: Path) -> list[Path]:
    found = (each for each in folder.iterdir() if not each.name.startswith("."))
    return sorted(each for each in found if each.is_dir())


def _classes(folder: Path) -> list[Path]:
    return [each for each in visible_folders(folder) if next(_pictures(each), None)]


def _pictures(folder: Path) -> Iterator[str]:
    for where, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(PICTURES) and not name.startswith("."):
                yield os.path.join(where, name)


def _read(folder: Path, classes: Sequence[tuple[str, Path]]) -> Iterator[Located]:
    line = 0
    for split, each in classes:
        for picture in _pictures(each):
            line += 1
            # Located in a file of the folder, so that the path is relative to the folder.
            image = os.path.relpath(picture, folder)
            record = {"image": image, "answer": each.name, "split": split}
            yield Located(folder / "pictures", line, record)
