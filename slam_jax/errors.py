"""Errors for users: one line that says what is wrong, what is expected and what to do."""

import contextlib
import difflib
import numbers
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


class UserError(Exception):
    """An error that the user can correct. Entry points print it in one line and exit with 2."""


class ConfigError(UserError, ValueError):
    """A field of a configuration has a wrong value. The message says what is expected."""


class InputError(UserError, ValueError):
    """An input of a model or of a reader has the wrong type, shape or content."""


class WriteError(UserError):
    """A file could not be written. The message names it and says why."""


def require(ok: bool, field: str, value: object, expected: str) -> None:
    """Raises ConfigError("field is value; expected ...") unless `ok`."""
    if not ok:
        raise ConfigError(f"{field} is {shorten(repr(value))}; expected {expected}")


def is_whole(value: Any) -> bool:
    """Whether the value is an integer of Python or NumPy; booleans are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def require_count(field: str, value: Any, least: int = 1, most: int = 1 << 20) -> None:
    """Raises ConfigError unless `value` is a whole number from `least` to `most`.

    The upper bound is for mistyped numbers, which would run for hours or overflow.
    """
    require(is_whole(value), field, value, "a whole number")
    require(value >= least, field, value, f"at least {least:,}")
    require(value <= most, field, value, f"at most {most:,}")


def check_names(
    names: Iterable[str], known: Sequence[str], group: str, kind: str = "field"
) -> None:
    """Raises ConfigError for the first unknown name, and suggests the most similar known one."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name[:80], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise ConfigError(f"{group} has no {kind} {shorten(repr(name))}; {hint}")


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raises WriteError, naming `path`, for an OSError in its body."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{path}: could not be written ({first_line(error)}); check free space and "
            "permissions, then start again"
        ) from error


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file and creates its folders. A reader never sees a part of the file.

    Raises WriteError if it cannot be written; an older file is then kept.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8", errors="replace")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def innermost(error: BaseException) -> BaseException:
    """The original error, which libraries wrap in errors of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """The first line of the innermost error's message, or the name of its type."""
    error = innermost(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shorten((str(error).strip() or type(error).__name__).splitlines()[0])


def shorten(text: str, width: int = 300) -> str:
    return text if len(text) <= width else f"{text[:width]}..."
