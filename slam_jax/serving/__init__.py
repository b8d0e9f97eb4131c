"""Serving: many requests at once from one model on this machine."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slam_jax.serving.engine import Engine
    from slam_jax.serving.tickets import (
        EngineClosed,
        Event,
        QueueFull,
        RequestFailed,
        Stats,
        Ticket,
    )

# Imported on first use: a command that prints its help needs no model.
_MODULES = {
    "engine": ("Engine",),
    "tickets": ("EngineClosed", "Event", "QueueFull", "RequestFailed", "Stats", "Ticket"),
}

__all__ = ["Engine", "EngineClosed", "Event", "QueueFull", "RequestFailed", "Stats", "Ticket"]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"slam_jax.serving.{module}"), name)
    raise AttributeError(f"module 'slam_jax.serving' has no attribute {name!r}")
