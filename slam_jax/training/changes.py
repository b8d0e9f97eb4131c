"""Changes of a run's configuration or data when it resumes.

A checkpoint stores its history: what was changed, at which step, and which examples are next. So
the examples of a step depend on the seed, the step and the history alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from slam_jax.data.order import Order
from slam_jax.errors import require, shorten
from slam_jax.training.checkpoint import CheckpointError, Checkpoints

ALWAYS = (
    *("data.data_dir", "data.path", "data.max_damaged_records"),
    *("data.bucket_lengths", "data.workers"),
    *("loss.chunk_tokens", "model.remat", "model.scan_layers"),
    *("language_model.remat", "language_model.scan_layers"),
    *("language_model.config.remat", "language_model.config.scan_layers"),
    *("run.keep_every", "run.log_every", "run.save_every", "run.tensorboard", "run.best_metric"),
    *("run.trackers", "run.metrics", "run.init_from"),
    *("model.decoder.pretrained", "model.image.pretrained"),
)
"""Fields that may change at any start of a run, as those of `mesh` may: where its data is, how
batches are padded and made, how it saves memory and compiles, what it writes, and what its first
step began with. What is computed from an undamaged record is the same."""

ON_REQUEST = (
    *("run.num_steps", "run.evaluate_every", "run.evaluate_views", "run.evaluate_batches"),
    *("optimizer.learning_rate", "optimizer.warmup_steps"),
    *("optimizer.constant_fraction", "optimizer.final_fraction", "optimizer.accumulate_steps"),
    *("data.batch_size", "data.mixture"),
)
"""Fields that change the run from the next step on, which it has to be asked for."""

DATA = "the data"
Changes = dict[str, list[Any]]
"""Old and new value by the name of the field; `DATA` has sha256."""


def differences(old: Any, new: Any) -> Changes:
    """The fields of two experiments that differ, without those that may always change.

    The defaults of fields that an old configuration lacks are filled in already.
    """
    saved, ours = (flatten_dict(dataclasses.asdict(each), sep=".") for each in (old, new))
    found = {}
    for name in dict.fromkeys([*ours, *saved]):  # keys of a dict may be in one of them alone
        value = ours.get(name)
        free = name in ALWAYS or name.startswith("mesh.")
        # It says how a folder's table is read, and nothing about other data sets.
        free |= name == "data.table_version" and new.data.name != "folder"
        if saved.get(name) != value and not free:
            found[name] = [saved.get(name), value]
    return found


def read_saved(checkpoints: Checkpoints, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What identifies the data of a checkpoint, and its history.

    Raises CheckpointError where a file has something else.
    """
    data, history = checkpoints.read_data(step), checkpoints.read_history(step)
    place, rows = f"{checkpoints.directory / str(step)}", data.get("rows", {})
    if not isinstance(rows, dict) or not all(map(_is_count, rows.values())):
        raise CheckpointError(f"{place}: data.json has {rows!r:.80}; expected rows by split")
    for each in history:
        if not _is_entry(each):
            raise CheckpointError(f"{place}: history.json has {each!r:.80}; expected a change")
    return data, history


def _is_entry(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {*Order._fields, "changes"}:
        return False
    changes = value["changes"]
    pairs = changes.values() if isinstance(changes, dict) else [None]
    known = all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    return known and all(_is_count(value[name]) for name in Order._fields)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def order_of(history: Sequence[Mapping[str, Any]]) -> Order:
    """Which examples the next steps have."""
    last = history[-1] if history else {}
    return Order(*(last.get(name, 0) for name in Order._fields))


def extended(
    history: Sequence[Mapping[str, Any]], changes: Changes, step: int, batch_size: int
) -> list[dict[str, Any]]:
    """The history with these changes after `step`. batch_size: before them.

    Other data begin in an order of their own; else the next examples are those that would have
    been next.
    """
    before = order_of(history)
    others = DATA in changes or "data.mixture" in changes
    offset = 0 if others else before.offset + (step - before.first) * batch_size
    order = Order(step, offset, before.number + others)
    return [*map(dict, history), {**order._asdict(), "changes": changes}]


def describe(changes: Changes) -> str:
    """Such as "run.num_steps 100 -> 200, the data 12ab34cd -> 56ef7890"."""
    shown = []
    for name, values in changes.items():
        old, new = (str(x)[:8] if name == DATA else shorten(str(x), 60) for x in values)
        shown.append(f"{name} {old} -> {new}")
    return ", ".join(shown)


def changed_at(history: Sequence[Mapping[str, Any]], step: int) -> str:
    """What was changed right after this step, in words; "" = nothing."""
    last = history[-1] if history else {}
    return describe(last["changes"]) if last.get("first") == step else ""


def check_steps(num_steps: int, step: int) -> None:
    """Raises ConfigError where a run would end before the step that it is at."""
    require(num_steps >= step, "run.num_steps", num_steps, f"at least {step:,}, where the run is")
