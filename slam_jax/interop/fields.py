"""Tables of published fields: a row has a field and our attribute, for reading and for writing."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from slam_jax.errors import InputError, shorten
from slam_jax.layers.rotary import Rope, Yarn

_LARGEST = 1e30
_KINDS: dict[type, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    bool: (bool, "true or false"),
}


class Group:
    """The fields of a JSON file, or of a group inside it whose name is `prefix`."""

    def __init__(self, data: Mapping[str, Any], prefix: str = "", file: str = "config.json"):
        self.data, self.prefix, self.file = data, prefix, file

    def get(self, key: str, kind: Any, default: Any = ...) -> Any:
        """A value of a kind (int, float or bool); null and absent give the default, `...` = none.

        A list of equal whole numbers, one for each layer, counts as one of them.
        """
        value, (types, expected) = self.data.get(key), _KINDS[kind]
        each: Any = value if types is int and isinstance(value, list) else [value]
        value: Any = each[0] if len(set(map(repr, each))) == 1 else value
        if value is None and default is not ...:
            return default
        fits = isinstance(value, types) and isinstance(value, bool) == (types is bool)
        if value is None or not fits or not abs(value) < _LARGEST:  # NaN is not below it
            raise self.wrong(key, expected)
        return kind(value)

    def read(self, table: "Fields") -> dict[str, Any]:
        """The attributes that these fields give.

        Raises InputError, naming the field.
        """
        values = {}
        for row in table:
            if row.attribute is None and row.read is None and row.default is ...:
                continue
            if row.when is not None and self.data.get(row.when[0]) != row.when[1]:
                value = row.when[2]
            elif row.read is None or isinstance(row.read, type):
                kind = int if row.default in (..., None) else type(row.default)
                value = self.get(row.key, row.read or kind, row.default)
            else:
                value = row.read(self, row.key)
            if row.attribute is not None:
                values[row.attribute] = value
        return values

    def wrong(self, key: str, expected: str) -> InputError:
        value = shorten(repr(self.data.get(key)), 80)
        name = shorten(f"{self.prefix}{key}", 80)
        return InputError(f"{self.file}: {name} is {value}; expected {expected}")


class Field(NamedTuple):
    """A row of a table.

    key: the published name. attribute: ours; None = nothing of ours depends on the field.
    default: the publisher's; `...` = the field is required, None = the attribute is optional.
    read: the kind of the value, or a function of (group, key) that returns it; None = the kind of
      the default, int where it has none.
    write: what is written for a configuration; None = the attribute, or the default where that is
      None. With a key and `write` alone the field is written for other libraries and not read.
    when: (key, value, off): without this value of another field the attribute is `off`.
    """

    key: str
    attribute: str | None = None
    default: Any = ...
    read: type | Callable[[Group, str], Any] | None = None
    write: Callable[[Any], Any] | None = None
    when: tuple[str, Any, Any] | None = None


Fields = tuple[Field, ...]


def only(key: str, *allowed: Any) -> Field:
    """A field of which only some values are built; the first is the default, and is written."""

    def read(group: Group, key: str) -> Any:
        value = group.data.get(key, allowed[0])
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise group.wrong(key, f"{expected}, which is all that is built")
        return value

    return Field(key, read=read, write=lambda _: allowed[0])


def write_fields(table: Fields, config: Any) -> dict[str, Any]:
    """The published fields of a configuration."""
    values = {}
    for row in table:
        if row.write is not None:
            values[row.key] = row.write(config)
        else:
            value = getattr(config, row.attribute or "")
            values[row.key] = row.default if value is None else value
    return values


_YARN = (
    Field("factor", "factor", read=float),
    Field("original_max_position_embeddings", "original_length"),
    Field("beta_fast", "beta_fast", 32.0),
    Field("beta_slow", "beta_slow", 1.0),
    Field("mscale", "mscale", None, float),
    Field("mscale_all_dim", "mscale_all_dim", None, float),
)
_ROPES = {
    "default": (only("factor", 1.0),),
    "yarn": _YARN,
    "dynamic": (Field("alpha", "ntk_alpha", read=float),),
}
# Hunyuan's files have some fields of YaRN beside its own stretching, which does not use them.
_UNUSED = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def rope(base: float = 10_000.0, *, interleaved: bool = False, alpha: bool = False) -> Fields:
    """The fields of the rotary positions, for configurations with an attribute `rope`.

    base: the publisher's default. alpha: whether the publisher's code knows the NTK stretching by
    `alpha`.
    """

    def read(group: Group, key: str) -> Rope:
        """Reads both spellings: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
        groups = {k: v for k in ("rope_parameters", key) if (v := group.data.get(k)) is not None}
        if len(groups) > 1:
            raise InputError(f"config.json: {' beside '.join(groups)}; expected one of them")
        key, data = next(iter(groups.items()), ("rope_parameters", {}))
        if not isinstance(data, Mapping):
            raise group.wrong(key, "a group of fields")
        inner = Group({"rope_theta": group.data.get("rope_theta"), **data}, f"{key}.")
        kind = str(data.get("rope_type", data.get("type", "default")))
        if kind not in _ROPES or (kind == "dynamic" and not alpha):
            kinds = "default, yarn or dynamic (with alpha)" if alpha else "default or yarn"
            raise inner.wrong("rope_type" if "rope_type" in data else "type", kinds)
        theta, values = inner.get("rope_theta", float, base), inner.read(_ROPES[kind])
        known = {"rope_theta", "rope_type", "type", *(field.key for field in _ROPES[kind])}
        known |= set(_UNUSED if kind == "dynamic" else ())
        for other in sorted(inner.data.keys() - known, key=str):
            if inner.data[other] is not None:
                raise inner.wrong(other, "nothing: it is not built")
        if kind == "yarn":
            return Rope(theta, interleaved, yarn=Yarn(**values))
        return Rope(theta, interleaved, **values)

    theta = Field("rope_theta", write=lambda c: c.rope.base)
    return theta, Field("rope_scaling", "rope", read=read, write=_write_rope)


def _write_rope(config: Any) -> dict[str, Any] | None:
    found: Rope = config.rope
    if found.yarn is not None:
        values = write_fields(_YARN, found.yarn)
        return {"type": "yarn"} | {key: v for key, v in values.items() if v is not None}
    stretched = found.ntk_alpha != 1.0
    return {"type": "dynamic", "alpha": found.ntk_alpha, "factor": 1.0} if stretched else None
