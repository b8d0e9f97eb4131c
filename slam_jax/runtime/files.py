"""Reads small files that somebody else wrote."""

import hashlib
import os
import stat
from pathlib import Path

from slam_jax.errors import InputError, first_line


def require_file(path: str | Path, most_bytes: int | None = None) -> os.stat_result:
    """The state of a file, which may be a link to one.

    Raises InputError for a pipe, a device or a folder, and for more than `most_bytes`; OSError
    where there is nothing.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
        raise InputError(f"{path}: expected a file")
    if most_bytes is not None and found.st_size > most_bytes:
        raise InputError(f"{path}: {found.st_size:,} bytes; expected at most {most_bytes:,}")
    return found


def read_limited(path: str | Path, most_bytes: int) -> str:
    """The text of a file, which may be a link to one; a byte-order mark is removed.

    Raises InputError where there is no such file, it is a pipe, a device or a folder, it is larger
    than `most_bytes`, or it is not UTF-8.
    """
    path = Path(path)
    try:
        found = require_file(path, most_bytes)
        with path.open("rb") as file:  # no more: some files of Linux have no end, and no size
            return file.read(found.st_size).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {first_line(error)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({first_line(error)})") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
