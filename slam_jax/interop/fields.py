"""Tables of published fields: a row has a field and our attribute, for reading and for writing."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from slam_jax.errors import InputError, shorten

_LARGEST = 1e30
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}


def _is(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int)
    return isinstance(value, (int, float)) and abs(value) < _LARGEST  # False for NaN as well


def _first_of_equals(value: Any) -> Any:
    if isinstance(value, list) and value and all(each == value[0] for each in value):
        return value[0]
    return value


class Group:
    """The fields of a config.json, or of a group inside it whose name is `prefix`."""

    def __init__(self, data: Mapping[str, Any], prefix: str = ""):
        self.data, self.prefix = data, prefix

    def get(self, key: str, kind: Any, default: Any = ...) -> Any:
        """A value of a kind (int, float or bool); null and absent give the default, `...` = none.

        A list of equal whole numbers, one for each layer, counts as one of them.
        """
        value = self.data.get(key)
        value = _first_of_equals(value) if kind is int else value
        if value is None and default is not ...:
            return default
        if value is None or not _is(value, kind):
            raise self.wrong(key, _EXPECTED[kind])
        return kind(value)

    def get_or(self, key: str, word: str) -> int | None:
        """A whole number; None where the field has this word or is absent."""
        return None if self.data.get(key, word) == word else self.get(key, int)

    def one_of(self, key: str, *allowed: Any) -> Any:
        """A value that is built here; an absent field has the first of them."""
        value = self.data.get(key, allowed[0])
        if value not in allowed:
            raise self.wrong(key, f"{' or '.join(map(repr, allowed))}, which is all that is built")
        return value

    def no_others(self, known: Iterable[str]) -> None:
        """Refuses a field that would change the outcome and is not read."""
        for key in sorted(self.data.keys() - set(known), key=str):
            if self.data[key] is not None:
                raise self.wrong(key, "nothing: it is not built")

    def wrong(self, key: str, expected: str) -> InputError:
        value = shorten(repr(self.data.get(key)), 80)
        name = shorten(f"{self.prefix}{key}", 80)
        return InputError(f"config.json: {name!s} is {value}; expected {expected}")


class Field(NamedTuple):
    """A row of a table.

    key: the published name. attribute: ours; None = nothing of ours depends on the field.
    default: the publisher's; `...` = the field is required, None = the attribute is optional.
    read: the kind of the value, or a function of (group, key) that returns it; None = the kind of
      the default, int where it has none.
    write: what is written for a configuration; None = the attribute, or the default where that is
      None. written: whether the field is written at all.
    when: (key, value, off): without this value of another field the attribute is `off`.
    """

    key: str
    attribute: str | None = None
    default: Any = ...
    read: type | Callable[[Group, str], Any] | None = None
    write: Callable[[Any], Any] | None = None
    written: bool = True
    when: tuple[str, Any, Any] | None = None


def only(key: str, *allowed: Any, written: bool = True) -> Field:
    """A field of which only some values are built; the first is the default, and is written."""
    return Field(
        key,
        read=lambda group, key: group.one_of(key, *allowed),
        write=lambda _: allowed[0],
        written=written,
    )


def derived(key: str, write: Callable[[Any], Any]) -> Field:
    """A field that is written for other libraries and not read."""
    return Field(key, read=lambda group, key: None, write=write)


def read_fields(table: Iterable[Field], group: Group) -> dict[str, Any]:
    """The attributes that a group of fields gives.

    Raises InputError, naming the field.
    """
    values = {}
    for row in table:
        if row.when is not None and group.data.get(row.when[0]) != row.when[1]:
            value = row.when[2]
        elif row.read is None or isinstance(row.read, type):
            kind = int if row.default in (..., None) else type(row.default)
            value = group.get(row.key, row.read or kind, row.default)
        else:
            value = row.read(group, row.key)
        if row.attribute is not None:
            values[row.attribute] = value
    return values


def write_fields(table: Iterable[Field], config: Any) -> dict[str, Any]:
    """The published fields of a configuration."""
    values = {}
    for row in table:
        if row.written and row.write is not None:
            values[row.key] = row.write(config)
        elif row.written:
            value = getattr(config, row.attribute or "")
            values[row.key] = row.default if value is None else value
    return values
