"""Errors for people: one line that says what was wrong, what was expected and what to do."""

import contextlib
import difflib
import numbers
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something that the person at the keyboard can put right; entry points print it and exit 2."""


class ConfigError(UserError, ValueError):
    """A field has a value that cannot be built; the message names it and says what would do."""


class InputError(UserError, ValueError):
    """Something that a model or a reader was given is not what it takes."""


class WriteError(UserError):
    """A file could not be written: the message names it and says why."""


def require(ok: bool, field: str, value: object, expected: str) -> None:
    """Raises ConfigError("field is value; expected ...") unless `ok`."""
    if not ok:
        raise ConfigError(f"{field} is {shorten(repr(value))}; expected {expected}")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, Python's or NumPy's."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def require_count(field: str, value: Any, least: int = 1, most: int = 1 << 20) -> None:
    """Raises ConfigError unless value is a whole number from `least` to `most`. Without a bound a
    mistyped number would build for hours, or end in a message about overflows."""
    require(is_whole(value), field, value, "a whole number")
    require(value >= least, field, value, f"at least {least:,}")
    require(value <= most, field, value, f"at most {most:,}")


def check_names(
    names: Iterable[str], known: Sequence[str], group: str, kind: str = "field"
) -> None:
    """Raises ConfigError for the first name that is not known, with the nearest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
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
    """Writes a file, its folders too, all or nothing: a reader never sees half of it.

    Raises WriteError where it cannot be written; what was there before is kept.
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
    """What happened first: libraries wrap it in what they tried."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """What happened first, in words: of the innermost cause the first line, or its type's name."""
    error = innermost(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shorten((str(error).strip() or type(error).__name__).splitlines()[0])


def shorten(text: str, width: int = 300) -> str:
    return text if len(text) <= width else f"{text[:width]}..."
