"""Errors for people: one line that says what was wrong, what was expected and what to do."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence


class UserError(Exception):
    """Something that the person at the keyboard can put right; entry points print it and exit 2."""


class ConfigError(UserError, ValueError):
    """A field has a value that cannot be built; the message names it and says what would do."""


def require(ok: bool, field: str, value: object, expected: str) -> None:
    """Raises ConfigError("field is value; expected ...") unless `ok`."""
    if not ok:
        raise ConfigError(f"{field} is {value!r}; expected {expected}")


def check_names(names: Iterable[str], known: Sequence[str], group: str) -> None:
    """Raises ConfigError for the first name that is not known, with the nearest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise ConfigError(f"{group} has no field {name!r}; {hint}")


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Ends the program with exit code 2 and the one line of a UserError, without a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
