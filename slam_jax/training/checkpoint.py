"""Checkpoints of a run: one folder a step, written in the background, restored only if it fits.

`WORKDIR/checkpoints/STEP/` holds `state` (the arrays), `config` and `tokenizer` (JSON) and
`metrics`, committed together by one rename: a step that can be seen is whole. Nothing in it is
pickled or run.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
from orbax.checkpoint import v1 as ocp

from slam_jax.errors import UserError

Step = int | str | None


class CheckpointError(UserError):
    """A checkpoint is missing, does not fit, or could not be read or written: in one line."""


class Checkpoints:
    """The checkpoints of one workdir.

    Reading never writes: an evaluation may look into the workdir of a run in progress.

    Args:
        workdir: folder of the run; created by the first `save`.
        keep_every: besides the latest and the best, keep the steps that this number divides.
        best_by: name of the metric, higher is better, that makes a checkpoint the best.
    """

    def __init__(
        self, workdir: str | Path, *, keep_every: int | None = None, best_by: str = "accuracy"
    ):
        self.workdir = Path(workdir).absolute()
        self.directory = self.workdir / "checkpoints"
        self._keep_every = keep_every
        self._best_by = best_by
        self._writer: ocp.training.Checkpointer | None = None
        self._pending: tuple[int, ocp.AsyncResponse[bool]] | None = None
        logging.getLogger("absl").addFilter(_is_not_orbax)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(
        self, step: int, state: Any, *, config: dict, tokenizer: str, metrics: Mapping[str, Any]
    ) -> bool:
        """Starts to write a checkpoint and returns once the arrays are copied off the device.

        Args:
            step: number of the step; one that is already saved is left as it is.
            state: any pytree of arrays, typed PRNG keys included; it may be donated afterwards.
            config: what JSON can hold.
            tokenizer: its JSON text, kept letter for letter.
            metrics: what is known about this step, maybe nothing (see `best_by`); values
                that are not finite are left out.

        Returns:
            Whether a write was started.

        Raises:
            CheckpointError: the previous write failed, or this one could not start.
        """
        self.wait()
        if step in self.steps():
            return False
        try:
            writer = self._writer = self._writer or self._open()
            response = writer.save_checkpointables_async(
                step,
                {"state": state, "config": config, "tokenizer": tokenizer},
                force=True,
                metrics={name: float(x) for name, x in metrics.items() if math.isfinite(x)},
            )
        except OSError as error:
            raise CheckpointError(self._unwritten(step, error)) from error
        assert response is not None  # `force` leaves the policy no say
        self._pending = step, response
        return True

    def wait(self) -> None:
        """Blocks until the write in progress is on disk; raises CheckpointError if it failed."""
        if self._pending is None:
            return
        step, response = self._pending
        self._pending = None
        try:
            response.result()
        except Exception as error:
            # Orbax goes on counting the lost step as the latest and repeats its error: open anew.
            with contextlib.suppress(Exception):
                self._shut()
            raise CheckpointError(self._unwritten(step, error)) from error

    def close(self) -> None:
        """Waits as `wait` does, then stops the threads; a later `save` starts them again."""
        try:
            self.wait()
        finally:
            self._shut()

    def steps(self) -> list[int]:
        """Committed steps, ascending; empty for a new workdir."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if _is_committed(path))
        return sorted(int(name) for name in names)

    def latest(self) -> int | None:
        """The last committed step."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the highest `best_by`; of equals the later; None where none has it."""
        scores = {step: self._score(_metrics(self.directory / str(step))) for step in self.steps()}
        known = [step for step, score in scores.items() if score > -math.inf]
        return max(known, key=lambda step: (scores[step], step), default=None)

    def resolve(self, step: Step = None) -> int:
        """The committed step meant by a number, `latest`, `best`, or None (best, else latest).

        Raises:
            CheckpointError: there is no such step; the message says which there are.
        """
        steps = self.steps()
        if not self.workdir.is_dir():
            raise CheckpointError(f"{self.workdir}: no such folder; give the workdir of a run")
        if not steps:
            raise CheckpointError(f"{self.workdir}: holds no checkpoint; train into it first")
        if step == "latest":
            return steps[-1]
        if step is None or step == "best":
            best = self.best()
            if best is not None or step is None:
                return steps[-1] if best is None else best
            reason = f"no checkpoint has the metric {self._best_by!r}"
        elif str(step).isdecimal():
            if int(step) in steps:
                return int(step)
            reason = f"no checkpoint of step {step}"
        else:
            reason = f"step is {step!r}, expected a number, 'latest' or 'best'"
        shown = ", ".join(map(str, steps))
        raise CheckpointError(f"{self.workdir}: {reason}; there are: {shown}")

    def restore(self, step: Step, like: Any) -> Any:
        """Reads the whole state.

        Args:
            step: as in `resolve`.
            like: a pytree of arrays or ShapeDtypeStructs as it was saved. Arrays come back with the
                shardings it names, whatever they were saved with; by default on one device.

        Raises:
            CheckpointError: an array is missing, left over, or has another shape or dtype (nothing
                is read then, and the message names it and both sides), or the files are damaged.
        """
        return self._read_state(step, like)

    def restore_subtree(self, step: Step, name: str, like: Any) -> Any:
        """Reads one top-level part of the state alone, such as `params`; else as `restore`."""
        return self._read_state(step, {name: like}, part=name)[name]

    def read_config(self, step: Step) -> dict:
        """The configuration saved with a step."""
        return self._read_json(step, "config")

    def read_tokenizer(self, step: Step) -> str:
        """The tokenizer's JSON text saved with a step."""
        return self._read_json(step, "tokenizer")

    def read_metrics(self, step: Step) -> dict[str, float]:
        """The metrics saved with a step."""
        return _metrics(self._path(step))

    def _open(self) -> ocp.training.Checkpointer:
        keep = ocp.training.preservation_policies
        policies = [
            keep.LatestN(1),
            keep.BestN(get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False),
        ]
        if self._keep_every is not None:
            policies.append(keep.EveryNSteps(self._keep_every))
        json_items = ocp.handlers.local_registry()
        for name in ("config", "tokenizer"):  # Orbax would store a dict of numbers as arrays
            json_items.add(ocp.handlers.JsonHandler, checkpointable_name=name)
        context = ocp.Context()
        context.checkpointables.registry = json_items
        return ocp.training.Checkpointer(
            str(self.directory),
            context=context,
            preservation_policy=cast(Any, keep.AnyPreservationPolicy(policies)),
            cleanup_tmp_directories=True,
        )

    def _shut(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _score(self, metrics: dict[str, float]) -> float:
        return metrics.get(self._best_by, -math.inf)

    def _path(self, step: Step) -> Path:
        return self.directory / str(self.resolve(step))

    def _read_json(self, step: Step, item: str) -> Any:
        path = self._path(step)
        with _damage_named(path):
            return ocp.load_checkpointables(str(path), {item: None})[item]

    def _read_state(self, step: Step, like: Any, part: str | None = None) -> Any:
        path = self._path(step)
        with _damage_named(path):
            saved = ocp.checkpointables_metadata(str(path)).metadata["state"]
            if saved is None:
                raise ValueError("the list of its arrays is damaged")
        _compare(path, saved if part is None else {part: saved.get(part)}, like)
        context = ocp.Context()
        context.pytree.loading.partial_load = part is not None
        with _damage_named(path), context:
            items = ocp.load_checkpointables(str(path), {"state": jax.tree.map(_target, like)})
        return items["state"]

    def _unwritten(self, step: int, error: Exception) -> str:
        return (
            f"{self.directory / str(step)}: the checkpoint could not be written "
            f"({_first_line(error)}); check free space and permissions, then start again"
        )


def _is_committed(path: Path) -> bool:
    """Whether this is a step's folder that Orbax finished; its own test lets empty ones pass."""
    return path.name.isdecimal() and (path / "_CHECKPOINT_METADATA").is_file()


def _metrics(path: Path) -> dict[str, float]:
    file = path / "metrics" / "metrics"  # the item's name is Orbax's own and its loader refuses it
    with _damage_named(path):
        return json.loads(file.read_text()) if file.exists() else {}


def _is_not_orbax(record: logging.LogRecord) -> bool:
    # Over one failed write it logs a thousand lines of traces; here that is one CheckpointError.
    return "orbax" not in Path(record.pathname).parts


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    # Orbax, TensorStore and JSON raise a dozen unrelated types over broken files.
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{path}: the checkpoint could not be read ({_first_line(error)}); choose another step"
        ) from error


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # Orbax wraps what happened in what it tried
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.local_devices()[0]
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _stored(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of an array on disk, where a typed PRNG key is the integers beneath it."""
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return tuple(leaf.shape), str(leaf.dtype)


def _by_name(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _stored(leaf)
        for path, leaf in leaves
    }


def _compare(path: Path, saved: Any, like: Any) -> None:
    """Raises CheckpointError at the first difference: Orbax would cast dtypes without a word."""
    ours, theirs = _by_name(like), _by_name(saved)
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{path}: {name} is {_describe(theirs.get(name))} in the checkpoint and "
                f"{_describe(ours.get(name))} here; use the configuration it was saved with"
            )


def _describe(array: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if array is None else f"{array[1]}{list(array[0])}"
