"""Fields of configurations that earlier versions had, and the values of those not used."""

from collections.abc import Mapping
from typing import Any

from slam_jax.errors import ConfigError

# Candidates that the experiment of docs/processes.md decided against: the value that switched each
# off, and the last version that has it.
_OF_GROUPS: dict[str, dict[str, tuple[Any, str]]] = {
    "model": {
        "exchange_every": (None, "0.26"),
        "process_views": ([], "0.26"),
        "process_dropout": (0.0, "0.26"),
        "memory_reads_processes": (False, "0.26"),
        "balance_fusion": (False, "0.27"),
    },
    "loss": {"similarity": (0.0, "0.26"), "alone": (0.0, "0.27")},
}
# They concern the initial values alone, so that any value loads.
_OF_INITIAL_VALUES = {"model": ("instruction_std",)}


def without_removed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the fields that are gone, as JSON holds it.

    Raises ConfigError where one of them was used.
    """
    kept = dict(config)
    for group, fields in _OF_GROUPS.items():
        values = config.get(group)
        if not isinstance(values, Mapping):
            continue
        for name, (unused, last) in fields.items():
            if name in values and values[name] != unused:
                raise ConfigError(
                    f"{group}.{name} is {values[name]!r}; this version has no such field, "
                    f"use slam_jax {last}"
                )
        gone = {*fields, *_OF_INITIAL_VALUES.get(group, ())}
        kept[group] = {name: value for name, value in values.items() if name not in gone}
    return kept
