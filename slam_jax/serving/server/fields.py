"""Reading and checking the JSON that clients send."""

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from slam_jax.errors import is_whole, shorten
from slam_jax.serving.server.refusals import Refused


def parse_json(body: bytes) -> dict[str, Any]:
    """The object of a body; raises Refused for anything else, infinite numbers included."""
    try:
        # An object that is too deep for the parser is one that no request needs.
        parsed = json.loads(body, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise Refused("the body has too many lists or objects inside of each other") from None
    except ValueError as error:  # also of bytes that are not UTF-8, and of endless digits
        raise Refused(f"the body is no JSON: {shorten(str(error), 120)}") from None
    if not isinstance(parsed, dict):
        raise Refused(f"the body is {_kind(parsed)}; expected an object, as in {{...}}")
    return parsed


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shorten(text, 30)} is too large a number")
    return number


class Fields:
    """The fields of an object, each of which is taken once; null is the same as none.

    where: the path of the object inside the request, such as "messages[0].", for error messages.
    """

    def __init__(self, given: Mapping[str, Any], where: str = ""):
        self._left = {name: value for name, value in given.items() if value is not None}
        self._where, self._known = where, []

    def take(self, name: str) -> Any:
        """The value, of any type, or None."""
        self._known.append(name)
        return self._left.pop(name, None)

    def whole(self, name: str, least: int, most: int) -> int | None:
        """A whole number from `least` to `most`."""
        value = self.take(name)
        if value is not None and not (is_whole(value) and least <= value <= most):
            self.refuse(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        """A number from `least` to `most`."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.refuse(name, value, f"a number from {least:g} to {most:g}")
        if not least <= value <= most:
            self.refuse(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; without a value, false."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            self.refuse(name, value, "a text")
        return value

    def texts(self, name: str, most: int) -> list[str] | None:
        """A text or a list of at most `most`, as a list."""
        value = self.take(name)
        values = [value] if isinstance(value, str) else value
        if value is None:
            return None
        if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
            self.refuse(name, value, "a text or a list of texts")
        if len(values) > most:
            raise Refused(
                f"{self._where}{name} has {len(values):,} texts; at most {most:,} are read",
                f"{self._where}{name}",
            )
        return values

    def group(self, name: str) -> "Fields | None":
        """An object inside of this one."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            self.refuse(name, value, "an object, as in {...}")
        return None if value is None else Fields(value, f"{self._where}{name}.")

    def only(self, name: str, *values: Any, why: str) -> None:
        """Refuses any value but these, which change nothing."""
        value = self.take(name)
        # True equals 1 in Python.
        if value is not None and not any(value == v and type(value) is type(v) for v in values):
            raise Refused(f"{self._where}{name}: {why}", f"{self._where}{name}", code="unsupported")

    def refuse(self, name: str, value: Any, expected: str) -> NoReturn:
        path = f"{self._where}{name}"
        raise Refused(f"{path} is {_show(value)}; expected {expected}", path)

    def done(self, ignored: frozenset[str] = frozenset()) -> None:
        """Refuses a field that nobody took; the ignored ones are accepted."""
        for name in self._left:
            if name in ignored:
                continue
            near = difflib.get_close_matches(name[:80], [*self._known, *ignored], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            where = f"{self._where}{shorten(name, 80)}"
            raise Refused(
                f"{where}: this server does not know this field; {hint}", where, code="unsupported"
            )


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return kinds.get(type(value), "null" if value is None else "a number")


def _show(value: Any) -> str:
    """A value as JSON has it, or what it is where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    if isinstance(value, str):
        return json.dumps(shorten(value, 40))
    return _kind(value) if isinstance(value, list | dict) else json.dumps(value)
