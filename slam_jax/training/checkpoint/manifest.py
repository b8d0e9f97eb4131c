"""The manifest of a checkpoint: size and sha256 of each file, in a file that is written last.

A folder without a manifest was never finished; one that differs from its manifest is damaged.
"""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from slam_jax.runtime.files import sha256

NAME = "manifest.json"
_MAX_BYTES = 64 << 20  # a manifest is read whole


def seal(folder: Path) -> None:
    """Writes the manifest of the files in `folder`, atomically."""
    files = {}
    for name, path, size in _files(folder):
        sync(path)
        files[name] = {"size": size, "sha256": sha256(path)}
    new = folder / f"{NAME}.tmp"
    with new.open("w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, folder / NAME)


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk, so that a power cut loses nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(folder: Path) -> str | None:
    """The first difference from the manifest, in words; None if there is none.

    Sizes are compared before any file is read. Nothing outside the folder is read.
    """
    path = folder / NAME
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"{NAME} is not a file"
        if status.st_size > _MAX_BYTES:
            return f"{NAME} has {status.st_size:,} bytes"
        listed = json.loads(path.read_bytes())["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
        found = {name: size for name, _, size in _files(folder)}
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                return f"{name} is missing"
            if name not in expected:
                return f"{name} is not in its manifest"
            if found[name] != expected[name][0]:
                return f"{name} has {found[name]:,} bytes and had {expected[name][0]}"
            if sha256(folder / name) != expected[name][1]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"it has no {NAME}: its write was interrupted"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"its files cannot be read ({type(error).__name__}: {error})".splitlines()[0]
    return None


def _files(folder: Path) -> Iterator[tuple[str, Path, int]]:
    """Name, path and size of each file below `folder`, without the manifest."""
    for path in folder.rglob("*"):
        status, name = path.lstat(), path.relative_to(folder).as_posix()
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name} is neither a file nor a folder")
        if name not in (NAME, f"{NAME}.tmp"):
            yield name, path, status.st_size
