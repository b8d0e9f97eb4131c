"""Checkpoints of a run: one folder a step, written in the background, restored only if it is what
was written and only if it fits.

`WORKDIR/checkpoints/STEP/` holds `arrays` (of Orbax), `config.json`, `tokenizer.json`, `aux.json`,
`metrics.json` and their `manifest.json`. It gets its name, by one rename, when all of that is on
disk: a step that can be seen is whole. Nothing in it is pickled or run.
"""

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from slam_jax.errors import UserError, first_line, innermost
from slam_jax.runtime import distributed
from slam_jax.runtime.memory import require_memory
from slam_jax.runtime.signals import PeerLost
from slam_jax.training.checkpoint import manifest, trees

_MOST_BYTES = 64 << 20  # of a JSON file; it is read whole

Step = int | str | None


class CheckpointError(UserError):
    """A checkpoint is missing, does not fit, or could not be read or written: in one line."""


class Checkpoints:
    """The checkpoints of one workdir.

    Reading never writes: an evaluation may look into the workdir of a run in progress.

    Args:
        workdir: folder of the run; created by the first `save`.
        keep_every: besides the last two (should the last be damaged) and the best, keep the steps
            that this number divides.
        best_by: name of the metric, higher is better, that makes a checkpoint the best.
    """

    def __init__(
        self, workdir: str | Path, *, keep_every: int | None = None, best_by: str = "accuracy"
    ):
        self.workdir = Path(workdir).absolute()
        self.directory = self.workdir / "checkpoints"
        self._keep_every = keep_every
        self._best_by = best_by
        self._background: ThreadPoolExecutor | None = None
        self._pending: tuple[int, Future[None]] | None = None
        self._verified: set[int] = set()
        logging.getLogger("absl").addFilter(_is_not_orbax)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is not None and issubclass(kind, PeerLost):
            return  # what is being written has lost a writer, and waits for it
        if kind is not None and jax.process_count() > 1:
            # The others may be in a step, and would not come to agree on how the write ended.
            self._pending = None
        self.close()

    def save(
        self,
        step: int,
        state: Any,
        *,
        config: dict,
        tokenizer: str,
        aux: dict | None = None,
        metrics: Mapping[str, Any],
    ) -> bool:
        """Starts to write a checkpoint and returns once the arrays are copied off the device.

        Args:
            step: number of the step; one that is already saved is left as it is, unless it was
                saved without metrics and here they are.
            state: any pytree of arrays, typed PRNG keys included; it may be donated afterwards.
            config: what JSON can hold.
            tokenizer: its JSON text, kept letter for letter.
            aux: the format of auxiliary vectors, if there is one; what JSON can hold.
            metrics: what is known about this step, maybe nothing (see `best_by`); values
                that are not finite are left out.

        Returns:
            Whether a write was started.

        Raises:
            CheckpointError: the previous write failed, or this one could not start.
        """
        self.wait()
        finite = {name: float(x) for name, x in metrics.items() if math.isfinite(x)}
        items = {"config": config, "tokenizer": tokenizer, "aux": aux, "metrics": finite}
        if not distributed.run_on_first(lambda: self._begin(step, items)):
            return False
        folder = self._being_written(step)
        try:
            response = ocp.save_checkpointables_async(str(folder / "arrays"), {"state": state})
        except OSError as error:
            raise CheckpointError(self._unwritten(step, error)) from error
        self._background = self._background or ThreadPoolExecutor(1, "checkpoint")
        self._pending = step, self._background.submit(self._commit, step, folder, response.result)
        return True

    def poll(self) -> None:
        """Raises CheckpointError if the write in progress has failed; never waits. Of several
        processes each would see it at another step: they hear of it in `wait`."""
        if jax.process_count() > 1:
            return
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Blocks until the write in progress is on disk; raises CheckpointError if it failed."""
        if self._pending is None:
            return
        step, written = self._pending
        self._pending = None

        def finish() -> None:
            try:
                written.result()
            except Exception as error:
                shutil.rmtree(self._being_written(step), ignore_errors=True)
                raise CheckpointError(self._unwritten(step, error)) from error

        if not distributed.is_first_process():
            finish()
        distributed.run_on_first(finish)

    def close(self) -> None:
        """Waits as `wait` does, then stops the thread; a later `save` starts it again."""
        try:
            self.wait()
        finally:
            background, self._background = self._background, None
            if background is not None:
                background.shutdown()

    def recover(self, report: Callable[[str], None], until: int | None = None) -> int | None:
        """The newest step that is what was written, for a run to go on from; None in a new workdir.

        Damaged steps after it are kept under another name, and `report` is told which and why.
        until: the newest that is wanted; where there is none as old, it is the first one after.

        Raises:
            CheckpointError: there are checkpoints and all of them are damaged.
        """
        step = distributed.run_on_first(lambda: self._recover(report, until))
        if step is not None:
            self._verified.add(step)
        return step

    def _recover(self, report: Callable[[str], None], until: int | None) -> int | None:
        self._undo_replacement()
        steps, damaged = self.steps(), {}
        wanted = [step for step in steps if until is None or step <= until]
        for step in (*reversed(wanted), *steps[len(wanted) :]):
            damage = self._damage(step)
            if damage is None:
                break
            damaged[step] = damage
        else:
            if damaged:
                shown = "; ".join(f"{step}: {damage}" for step, damage in damaged.items())
                raise CheckpointError(
                    f"{self.directory}: no checkpoint can be read ({shown}); "
                    "put a good one there, or use another workdir"
                )
            return None
        for number, damage in damaged.items():
            name = _free(self.directory / f"{number}.damaged")
            os.rename(self.directory / str(number), name)
            report(f"checkpoint of step {number:,} passed over: {damage}; it is now {name}")
        return step

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; empty for a new workdir."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    def best(self) -> int | None:
        """The step with the highest `best_by`; of equals the later; None where none has it."""
        return next(iter(self._by_score()), None)

    def resolve(self, step: Step = None) -> int:
        """The step meant by a number, `latest`, `best`, or None (best, else latest). What the names
        mean is undamaged: damaged steps are passed over, and a warning logged.

        Raises:
            CheckpointError: there is no such step; the message says which there are.
        """
        steps = self.steps()
        if not self.workdir.is_dir():
            raise CheckpointError(f"{self.workdir}: no such folder; give the workdir of a run")
        if not steps:
            raise CheckpointError(f"{self.workdir}: holds no checkpoint; train into it first")
        if step == "latest":
            return self._first_intact(reversed(steps))
        if step is None or step == "best":
            scored = self._by_score()
            if step is None:
                rest = [step for step in reversed(steps) if step not in scored]
                return self._first_intact(scored + rest)
            if scored:
                return self._first_intact(scored)
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
        return self._read_json(step, "config", dict)

    def read_tokenizer(self, step: Step) -> str:
        """The tokenizer's JSON text saved with a step."""
        return self._read_json(step, "tokenizer", str)

    def read_aux(self, step: Step) -> dict | None:
        """The format of auxiliary vectors saved with a step, None where there is none."""
        path = self._path(step) / "aux.json"
        return _read_json(path, dict) if path.exists() else None

    def read_metrics(self, step: Step) -> dict[str, float]:
        """The metrics saved with a step."""
        return self._read_json(step, "metrics", dict)

    def read_shapes(self, step: Step) -> Any:
        """The saved state as nested dicts and lists of ShapeDtypeStructs; `restore` takes it."""
        saved = _read_metadata(self._path(step))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)

    def verify(self) -> dict[int, str | None]:
        """Each step with what is wrong with it, or None."""
        return {step: self._damage(step) for step in self.steps()}

    def _being_written(self, step: int) -> Path:
        return self.directory / f"{step}.writing"

    def _begin(self, step: int, items: Mapping[str, Any]) -> bool:
        """Everything of a checkpoint but its arrays; False where the step has one already."""
        if step in self.steps() and (not items["metrics"] or self.read_metrics(step)):
            return False
        folder = self._being_written(step)
        try:
            for left in self.directory.glob("*.writing"):  # by a killed run, or not gone yet
                shutil.rmtree(left, ignore_errors=left != folder)
            folder.mkdir(parents=True)
            for name, value in items.items():
                if value is None:
                    continue
                (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(self._unwritten(step, error)) from error
        return True

    def _commit(self, step: int, folder: Path, written: Callable[[], Any]) -> None:
        """The end of a write, in the background."""
        written()
        if not distributed.is_first_process():
            return
        manifest.seal(folder)
        final, replaced = self.directory / str(step), self.directory / f"{step}.replaced"
        if final.exists():
            os.rename(final, replaced)
        os.rename(folder, final)
        manifest.sync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune()

    def _undo_replacement(self) -> None:
        """A run that was killed between the two renames of `_commit` left the step aside."""
        for replaced in self.directory.glob("*.replaced"):
            if replaced.with_suffix("").exists():
                shutil.rmtree(replaced)
            else:
                os.rename(replaced, replaced.with_suffix(""))

    def _prune(self) -> None:
        steps = self.steps()
        keep = {*steps[-2:], self.best()}
        for step in steps:
            if step in keep or (self._keep_every and step % self._keep_every == 0):
                continue
            # Under its own name a step is whole, also while it goes. The new step is safe by now:
            # what cannot go yet goes with the next save.
            going = self._being_written(step)
            with contextlib.suppress(OSError):
                os.rename(self.directory / str(step), going)
                shutil.rmtree(going)

    def _damage(self, step: int) -> str | None:
        if step in self._verified:
            return None
        damage = manifest.find_damage(self.directory / str(step))
        if damage is None:
            self._verified.add(step)
        return damage

    def _first_intact(self, steps: Iterable[int]) -> int:
        problems = []
        for step in steps:
            damage = self._damage(step)
            if damage is None:
                for problem in problems:
                    logging.getLogger("slam_jax").warning("passed over %s", problem)
                return step
            problems.append(f"{self.directory / str(step)}: {damage}")
        raise CheckpointError(f"no checkpoint can be read: {'; '.join(problems)}")

    def _by_score(self) -> list[int]:
        """Steps that have a score, the best first; of equals the later."""
        scores = {}
        for step in self.steps():
            # A damaged file has no say here; whoever reads the step hears of it.
            with contextlib.suppress(CheckpointError):
                metrics = _read_json(self.directory / str(step) / "metrics.json", dict)
                score = metrics.get(self._best_by)
                if isinstance(score, (int, float)):
                    scores[step] = score
        return sorted(scores, key=lambda step: (scores[step], step), reverse=True)

    def _path(self, step: Step) -> Path:
        step = self.resolve(step)
        path, damage = self.directory / str(step), self._damage(step)
        if damage is not None:
            raise CheckpointError(
                f"{path}: the checkpoint is damaged: {damage}; choose another step"
            )
        return path

    def _read_json(self, step: Step, item: str, kind: type) -> Any:
        return _read_json(self._path(step) / f"{item}.json", kind)

    def _read_state(self, step: Step, like: Any, part: str | None = None) -> Any:
        path = self._path(step)
        saved = _read_metadata(path)
        difference = trees.find_difference(saved if part is None else {part: saved.get(part)}, like)
        if difference:
            raise CheckpointError(f"{path}: {difference}; use the configuration it was saved with")
        require_memory(trees.num_bytes(like), f"{path}: the checkpoint")
        context = ocp.Context()
        context.pytree.loading.partial_load = part is not None
        with _damage_named(path), context:
            items = ocp.load_checkpointables(
                str(path / "arrays"), {"state": jax.tree.map(_target, like)}
            )
        return items["state"]

    def _unwritten(self, step: int, error: Exception) -> str:
        return (
            f"{self.directory / str(step)}: the checkpoint could not be written "
            f"({first_line(error)}); check free space and permissions, then start again"
        )


def _read_metadata(path: Path) -> Any:
    with _damage_named(path):
        saved = ocp.checkpointables_metadata(str(path / "arrays")).metadata["state"]
        if saved is None:
            raise ValueError("the list of its arrays is damaged")
        if oversized := trees.find_oversized_chunk(saved):
            raise ValueError(oversized)
    return saved


def _read_json(path: Path, kind: type) -> Any:
    with _damage_named(path):
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}, expected a {kind.__name__}")
    return value


def _free(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, .. that does not exist."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _is_not_orbax(record: logging.LogRecord) -> bool:
    # Over one failed write it logs a thousand lines of traces; here that is one CheckpointError.
    return "orbax" not in Path(record.pathname).parts


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    # Orbax, TensorStore and JSON raise a dozen unrelated types over broken files. What JAX itself
    # raises is about memory, or another process, and no reason to choose another step.
    try:
        yield
    except Exception as error:
        if isinstance(cause := innermost(error), (MemoryError, jax.errors.JaxRuntimeError)):
            raise cause from None
        raise CheckpointError(
            f"{path}: the checkpoint could not be read ({first_line(error)}); choose another step"
        ) from error


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.local_devices()[0]
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
