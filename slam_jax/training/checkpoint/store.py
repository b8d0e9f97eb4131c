"""Checkpoints of a run: one folder per step, written in the background and verified when read.

`WORKDIR/checkpoints/STEP/` holds `arrays` (written by Orbax), `config.json`, `tokenizer.json`,
`aux.json`, `generation.json`, `metrics.json` and their `manifest.json`. The folder gets its final
name by one rename after all files are on disk, so a step that is visible is complete. No file is
unpickled or executed.
"""

import contextlib
import itertools
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

_MAX_JSON_BYTES = 64 << 20  # files are read whole

Step = int | str | None


class CheckpointError(UserError):
    """A checkpoint is missing, does not fit, or could not be read or written."""


class Checkpoints:
    """The checkpoints of one workdir.

    Reading never writes: an evaluation may look into the workdir of a run in progress.

    Args:
        workdir: folder of the run; created by the first `save`.
        keep_every: keep the steps that this number divides, besides the best one and the last two
            (in case the last one is damaged).
        best_by: name of the metric that chooses the best checkpoint; higher is better.
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
            return  # the write in progress would wait for the lost process
        if kind is not None and jax.process_count() > 1:
            # The other processes may be in a step, and would not join in `wait`.
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
        generation: dict | None = None,
        metrics: Mapping[str, Any],
    ) -> bool:
        """Starts to write a checkpoint, and returns once the arrays are copied off the device.

        Args:
            step: number of the step. A step that is already saved is not written again, unless it
                was saved without metrics and has some now.
            state: any pytree of arrays, typed PRNG keys included; it may be donated afterwards.
            config: anything that JSON can hold.
            tokenizer: its JSON text, stored unchanged.
            aux: the format of auxiliary vectors, if there is one; anything that JSON can hold.
            generation: defaults of generating with the model; anything that JSON can hold.
            metrics: of this step, possibly none; values that are not finite are left out.

        Returns:
            Whether a write was started.

        Raises:
            CheckpointError: the previous write failed, or this one could not start.
        """
        self.wait()
        finite = {name: float(x) for name, x in metrics.items() if math.isfinite(x)}
        items = {"config": config, "tokenizer": tokenizer, "aux": aux, "metrics": finite}
        items["generation"] = generation
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
        """Raises CheckpointError if the write in progress has failed; never blocks.

        With several processes it does nothing, as each could notice it at another step; `wait`
        then raises it.
        """
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
        """The newest intact step, for a run to resume from; None in a new workdir.

        Damaged steps after it are renamed, and `report` gets a line for each.
        until: the newest step that is wanted; if all steps are newer, the oldest of them is taken.

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
                    "restore an intact one, or use another workdir"
                )
            return None
        for number, damage in damaged.items():
            name = _unused(self.directory / f"{number}.damaged")
            os.rename(self.directory / str(number), name)
            report(f"checkpoint of step {number:,} skipped: {damage}; it is now {name}")
        return step

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending; empty for a new workdir."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    def best(self) -> int | None:
        """The step with the highest `best_by`, the later of equal ones; None where none has it."""
        return next(iter(self._by_score()), None)

    def resolve(self, step: Step = None) -> int:
        """The step that a number, "latest", "best" or None (best, else latest) refers to.

        Names refer to intact steps: damaged ones are skipped with a logged warning.

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
            like: a pytree of arrays or ShapeDtypeStructs of the saved structure. Arrays get its
                shardings, whatever they were saved with; by default they are on one device.

        Raises:
            CheckpointError: the files are damaged, or an array is missing, left over, or has
                another shape or dtype. The message names it; nothing is read then.
        """
        return self._read_state(step, like)

    def restore_subtree(self, step: Step, name: str, like: Any) -> Any:
        """Reads one top-level part of the state, such as `params`; see `restore`."""
        return self._read_state(step, {name: like}, part=name)[name]

    def read_config(self, step: Step) -> dict:
        """The configuration saved with a step."""
        return self._read_json(step, "config", dict)

    def read_tokenizer(self, step: Step) -> str:
        """The tokenizer's JSON text saved with a step."""
        return self._read_json(step, "tokenizer", str)

    def read_aux(self, step: Step) -> dict | None:
        """The format of auxiliary vectors saved with a step, None where there is none."""
        return self._read_optional(step, "aux")

    def read_generation(self, step: Step) -> dict:
        """The defaults of generating saved with a step, none for a step of version 0.11 or older.
        max_new_tokens: the longest answer of the training data, its <eos> included."""
        return self._read_optional(step, "generation") or {}

    def read_metrics(self, step: Step) -> dict[str, float]:
        """The metrics saved with a step."""
        return self._read_json(step, "metrics", dict)

    def read_shapes(self, step: Step) -> Any:
        """The saved state as nested dicts and lists of ShapeDtypeStructs; `restore` takes it."""
        saved = _read_metadata(self._path(step))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)

    def verify(self) -> dict[int, str | None]:
        """The damage of each step in words, None where it is intact."""
        return {step: self._damage(step) for step in self.steps()}

    def _being_written(self, step: int) -> Path:
        return self.directory / f"{step}.writing"

    def _begin(self, step: int, items: Mapping[str, Any]) -> bool:
        """Writes all but the arrays; returns False where the step has a checkpoint already."""
        if step in self.steps() and (not items["metrics"] or self.read_metrics(step)):
            return False
        folder = self._being_written(step)
        try:
            for unfinished in self.directory.glob("*.writing"):  # left behind by a killed run
                shutil.rmtree(unfinished, ignore_errors=unfinished != folder)
            folder.mkdir(parents=True)
            for name, value in items.items():
                if value is None:
                    continue
                (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(self._unwritten(step, error)) from error
        return True

    def _commit(self, step: int, folder: Path, written: Callable[[], Any]) -> None:
        """Finishes a write; runs in the background."""
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
        """Restores a step from a run that was killed between the two renames of `_commit`."""
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
            # Renamed first: a folder with the name of a step must be complete. A folder that cannot
            # be deleted now is deleted by the next save.
            doomed = self._being_written(step)
            with contextlib.suppress(OSError):
                os.rename(self.directory / str(step), doomed)
                shutil.rmtree(doomed)

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
                    logging.getLogger("slam_jax").warning("skipped %s", problem)
                return step
            problems.append(f"{self.directory / str(step)}: {damage}")
        raise CheckpointError(f"no checkpoint can be read: {'; '.join(problems)}")

    def _by_score(self) -> list[int]:
        """The steps that have a score, best first; of equal ones the later first."""
        scores = {}
        for step in self.steps():
            # A damaged file does not count here; reading that step raises.
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

    def _read_optional(self, step: Step, item: str) -> dict | None:
        path = self._path(step) / f"{item}.json"
        return _read_json(path, dict) if path.exists() else None

    def _read_state(self, step: Step, like: Any, part: str | None = None) -> Any:
        path = self._path(step)
        saved = _read_metadata(path)
        difference = trees.find_difference(saved if part is None else {part: saved.get(part)}, like)
        if difference:
            raise CheckpointError(f"{path}: {difference}; use the configuration it was saved with")
        require_memory(trees.num_bytes(like), f"{path}: the checkpoint")
        context = ocp.Context()
        context.pytree.loading.partial_load = part is not None
        with _explain_damage(path), context:
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
    with _explain_damage(path):
        saved = ocp.checkpointables_metadata(str(path / "arrays")).metadata["state"]
        if saved is None:
            raise ValueError("the list of its arrays is damaged")
        if oversized := trees.find_oversized_chunk(saved):
            raise ValueError(oversized)
    return saved


def _read_json(path: Path, kind: type) -> Any:
    with _explain_damage(path):
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}, expected a {kind.__name__}")
    return value


def _unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, .. that does not exist."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())


def _is_not_orbax(record: logging.LogRecord) -> bool:
    # Orbax logs a thousand lines of tracebacks for one failed write; here it is a CheckpointError.
    return "orbax" not in Path(record.pathname).parts


@contextlib.contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    """Raises CheckpointError for whatever Orbax, TensorStore or JSON raise over broken files.

    Errors of JAX itself are about memory or another process, and are raised as they are.
    """
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
