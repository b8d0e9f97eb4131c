"""Checkpoints of a run: one folder per step, written in the background and verified when read.

`WORKDIR/checkpoints/STEP/` holds `arrays` (written by Orbax), `config.json`, `tokenizer.json`,
`aux.json`, `generation.json`, `bases.json`, `data.json`, `history.json`, `metrics.json` and their
`manifest.json`. The folder gets its final name by one rename after all files are on disk, so a step
that is visible is complete. No file is unpickled or executed.
"""

import contextlib
import dataclasses
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
_OPTIONAL = ("aux", "generation", "bases", "data", "history")
_SCORE = "accuracy"  # the metric that chooses the best checkpoint where the configuration has none
_LOSSES = ("loss", "perplexity", "bits_per_byte")

Step = int | str | None


def is_loss(metric: str) -> bool:
    """Whether lower values of a metric are better, such as of "loss" and "loss/image"."""
    return metric.partition("/")[0] in _LOSSES


class CheckpointError(UserError):
    """A checkpoint is missing, does not fit, or could not be read or written."""


class Checkpoints:
    """The checkpoints of one workdir.

    Reading never writes: an evaluation may look into the workdir of a run in progress.
    workdir: folder of the run; created by the first `save`. keep_every: keep the steps that this
    number divides, besides the best one and the last two (in case the last one is damaged).
    """

    def __init__(self, workdir: str | Path, *, keep_every: int | None = None):
        self.workdir = Path(workdir).absolute()
        self.directory = self.workdir / "checkpoints"
        self._keep_every = keep_every
        self._pending: tuple[int, Future[None]] | None = None
        self._verified: set[int] = set()
        logging.getLogger("absl").addFilter(_is_not_orbax)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None or jax.process_count() == 1:
            self.wait()
        elif self._pending is not None and not issubclass(kind, PeerLost):
            self._pending[1].exception()  # other processes may be in a step, not in `wait`

    def save(
        self,
        step: int,
        state: Any,
        *,
        config: dict,
        tokenizer: str,
        aux: dict | None = None,
        generation: dict | None = None,
        bases: list | None = None,
        data: dict | None = None,
        history: list | None = None,
        metrics: Mapping[str, Any],
    ) -> bool:
        """Starts to write a checkpoint, and returns once the arrays are copied off the device.

        Returns whether a write was started: a step that is already saved is not written again,
        unless it was saved without metrics and has some now.

        state: any pytree of arrays, typed PRNG keys included; it may be donated afterwards.
        tokenizer: its JSON text, stored unchanged. config; aux, the format of auxiliary vectors;
        generation, defaults of generating; bases, the files with the parameters that `state` lacks
        (`slam_jax.training.base`); data, what identifies them; history, of changes
        (`slam_jax.training.changes`): anything that JSON can hold.
        metrics: of this step, possibly none; values that are not finite are left out.

        Raises CheckpointError where the previous write failed, or this one could not start.
        """
        self.wait()
        finite = {name: float(x) for name, x in metrics.items() if math.isfinite(x)}
        items = {"config": config, "tokenizer": tokenizer, "aux": aux, "metrics": finite}
        items |= {"generation": generation, "bases": bases, "data": data, "history": history}
        if not distributed.run_on_first(lambda: self._begin(step, items)):
            return False
        folder = self._being_written(step)
        with self._explain_failure(step):
            response = ocp.save_checkpointables_async(str(folder / "arrays"), {"state": state})
        background = ThreadPoolExecutor(1, "checkpoint")
        self._pending = step, background.submit(self._commit, step, folder, response.result)
        background.shutdown(wait=False)  # its thread ends with the write
        return True

    def poll(self) -> None:
        """Raises CheckpointError if the write in progress has failed; never blocks. Several
        processes could notice it at different steps, so for them only `wait` raises it."""
        if self._pending is not None and self._pending[1].done() and jax.process_count() == 1:
            self.wait()

    def wait(self) -> None:
        """Blocks until the write in progress is on disk; raises CheckpointError if it failed."""
        if self._pending is None:
            return
        (step, written), self._pending = self._pending, None

        def finish() -> None:
            with self._explain_failure(step, Exception):
                written.result()

        if not distributed.is_first_process():
            finish()
        distributed.run_on_first(finish)

    def recover(self, report: Callable[[str], None], until: int | None = None) -> int | None:
        """The newest intact step, for a run to resume from; None in a new workdir.

        Damaged steps after it are renamed, and `report` gets a line for each.
        until: the newest step that is wanted; if all steps are newer, the oldest of them is taken.

        Raises CheckpointError where there are checkpoints and all of them are damaged.
        """
        step = distributed.run_on_first(lambda: self._recover(report, until))
        if step is not None:
            self._verified.add(step)
        return step

    def _recover(self, report: Callable[[str], None], until: int | None) -> int | None:
        for replaced in self.directory.glob("*.replaced"):
            # A run was killed between the two renames of `_commit`, or after them.
            if replaced.with_suffix("").exists():
                shutil.rmtree(replaced)
            else:
                os.rename(replaced, replaced.with_suffix(""))
        steps = self.steps()
        if not steps:
            return None
        wanted = [step for step in steps if until is None or step <= until]
        step, damaged = self._first_intact((*reversed(wanted), *steps[len(wanted) :]))
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
        """The step with the best score, the later of equal ones; None where none has one.

        The score is the metric `run.best_metric` of the newest configuration, "accuracy" where it
        has none.
        """
        return next(iter(self._by_score()), None)

    def best_metric(self) -> str:
        """The name of the metric that chooses the best step."""
        for step in reversed(self.steps()):
            with contextlib.suppress(CheckpointError):
                run = _read_json(self.directory / str(step), "config", dict).get("run")
                chosen = run.get("best_metric") if isinstance(run, dict) else None
                return chosen if isinstance(chosen, str) else _SCORE
        return _SCORE

    def resolve(self, step: Step = None) -> int:
        """The step that a number, "latest", "best" or None (best, else latest) refers to.

        Names refer to intact steps: damaged ones are skipped with a logged warning.

        Raises CheckpointError where there is no such step; the message says which there are.
        """
        steps = self.steps()
        if not self.workdir.is_dir():
            raise CheckpointError(f"{self.workdir}: no such folder; give the workdir of a run")
        if not steps:
            raise CheckpointError(f"{self.workdir}: holds no checkpoint; train into it first")
        if step in (None, "best", "latest"):
            order = [] if step == "latest" else self._by_score()
            if step != "best":
                order += [known for known in reversed(steps) if known not in order]
            if order:
                found, damaged = self._first_intact(order)
                for number, damage in damaged.items():
                    path = self.directory / str(number)
                    logging.getLogger("slam_jax").warning("skipped %s: %s", path, damage)
                return found
            reason = f"no checkpoint has the metric {self.best_metric()!r}; give a step or 'latest'"
        elif str(step).isdecimal():
            if int(step) in steps:
                return int(step)
            reason = f"no checkpoint of step {step}"
        else:
            reason = f"step is {step!r}, expected a number, 'latest' or 'best'"
        shown = ", ".join(map(str, steps))
        raise CheckpointError(f"{self.workdir}: {reason}; there are: {shown}")

    def restore(self, step: Step, like: Any, *, partial: bool = False) -> Any:
        """Reads the whole state of a step; see `resolve`.

        like: a pytree of arrays or ShapeDtypeStructs of the saved structure, in which other layers
        may be stacked. Arrays get its shardings, whatever they were saved with; by default they
        are on one device.
        partial: read only the top-level parts that `like`, a dict, has.

        Raises CheckpointError where the files are damaged, or an array is missing, left over, or
        has another shape or dtype. The message names it; nothing is read then.
        """
        path = self._path(step)
        saved = _read_metadata(path)
        if dataclasses.is_dataclass(like):
            # A field that is None may be one that an older version did not have.
            fields = {name: getattr(like, name) for name in like.__dataclass_fields__}
            known = {name: x for name, x in fields.items() if x is not None or name in saved}
            restored: dict[str, Any] = self.restore(step, known)
            return type(like)(**{**fields, **restored})
        if partial:
            saved = {name: saved.get(name) for name in like}
        difference = trees.find_difference(saved, like)
        if difference:
            raise CheckpointError(f"{path}: {difference}; use the configuration it was saved with")
        alike = trees.stacks_alike(saved, like)
        copies = 1 if alike else 2
        require_memory(copies * trees.num_bytes(like), f"{path}: the checkpoint")
        target = jax.tree.map(_target, like)
        source = target if alike else trees.sharded_as(saved, target)
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        with _explain_damage(path), context:
            state = ocp.load_checkpointables(str(path / "arrays"), {"state": source})["state"]
        if alike:
            return state
        state = trees.from_names(trees.by_name(state), target)
        state = jax.tree.map(
            lambda x, like: x if x.dtype == like.dtype else x.astype(like.dtype), state, target
        )
        return jax.device_put(state, jax.tree.map(lambda x: x.sharding, target))

    def restore_subtree(self, step: Step, name: str, like: Any) -> Any:
        """Reads one top-level part of the state, such as `params`; see `restore`."""
        return self.restore(step, {name: like}, partial=True)[name]

    def read_config(self, step: Step) -> dict:
        """The configuration saved with a step."""
        return _read_json(self._path(step), "config", dict)

    def read_tokenizer(self, step: Step) -> str:
        """The tokenizer's JSON text saved with a step."""
        return _read_json(self._path(step), "tokenizer", str)

    def read_aux(self, step: Step) -> dict | None:
        """The format of auxiliary vectors saved with a step, None where there is none."""
        return _read_json(self._path(step), "aux", dict)

    def read_generation(self, step: Step) -> dict:
        """The defaults of generating saved with a step, none for a step of version 0.11 or older.
        max_new_tokens: the longest answer of the training data, its <eos> included."""
        return _read_json(self._path(step), "generation", dict) or {}

    def read_bases(self, step: Step) -> list:
        """The files with parameters that a step does not store; see `slam_jax.training.base`."""
        return _read_json(self._path(step), "bases", list) or []

    def read_data(self, step: Step) -> dict:
        """What identifies the data of a step; nothing for one of version 0.22 or older."""
        return _read_json(self._path(step), "data", dict) or {}

    def read_history(self, step: Step) -> list:
        """What was changed up to a step; see `slam_jax.training.changes`."""
        return _read_json(self._path(step), "history", list) or []

    def read_metrics(self, step: Step) -> dict[str, float]:
        """The metrics saved with a step."""
        return _read_json(self._path(step), "metrics", dict)

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
        with self._explain_failure(step):
            for unfinished in self.directory.glob("*.writing"):  # left behind by a killed run
                shutil.rmtree(unfinished, ignore_errors=unfinished != folder)
            folder.mkdir(parents=True)
            for name, value in items.items():
                if value is not None:
                    (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
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
        if step not in self._verified:
            if damage := manifest.find_damage(self.directory / str(step)):
                return damage
            self._verified.add(step)
        return None

    def _first_intact(self, steps: Iterable[int]) -> tuple[int, dict[int, str]]:
        """The first intact one of `steps`, and the damage of those before it."""
        damaged = {}
        for step in steps:
            damage = self._damage(step)
            if damage is None:
                return step, damaged
            damaged[step] = damage
        shown = "; ".join(f"{step}: {damage}" for step, damage in damaged.items())
        raise CheckpointError(
            f"{self.directory}: no checkpoint can be read ({shown}); restore an intact one, or use "
            "another workdir"
        )

    def _by_score(self) -> list[int]:
        """The steps that have a score, best first; of equal ones the later first."""
        scores, metric = {}, self.best_metric()
        for step in self.steps():
            # A damaged file does not count here; reading that step raises.
            with contextlib.suppress(CheckpointError):
                score = _read_json(self.directory / str(step), "metrics", dict).get(metric)
                if isinstance(score, (int, float)):
                    scores[step] = -score if is_loss(metric) else score
        return sorted(scores, key=lambda step: (scores[step], step), reverse=True)

    def _path(self, step: Step) -> Path:
        step = self.resolve(step)
        path = self.directory / str(step)
        if damage := self._damage(step):
            raise CheckpointError(
                f"{path}: the checkpoint is damaged: {damage}; choose another step"
            )
        return path

    @contextlib.contextmanager
    def _explain_failure(self, step: int, kind: type[Exception] = OSError) -> Iterator[None]:
        """Removes what was written of a step and raises CheckpointError where its write fails."""
        try:
            yield
        except kind as error:
            shutil.rmtree(self._being_written(step), ignore_errors=True)
            raise CheckpointError(
                f"{self.directory / str(step)}: the checkpoint could not be written "
                f"({first_line(error)}); check free space and permissions, then start again"
            ) from error


def _read_metadata(path: Path) -> Any:
    with _explain_damage(path):
        saved = ocp.checkpointables_metadata(str(path / "arrays")).metadata["state"]
        if saved is None:
            raise ValueError("the list of its arrays is damaged")
        if oversized := trees.find_oversized_chunk(saved):
            raise ValueError(oversized)
    return saved


def _read_json(folder: Path, item: str, kind: type) -> Any:
    """The value of a JSON file of a checkpoint; None for an optional one that is not there."""
    path = folder / f"{item}.json"
    if item in _OPTIONAL and not path.exists():
        return None
    with _explain_damage(path):
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}, expected a {kind.__name__}")
    return value


def _unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, .. that does not exist."""
    names = itertools.chain([path.name], (f"{path.name}-{n}" for n in itertools.count(2)))
    return next(each for each in map(path.with_name, names) if not each.exists())


def _is_not_orbax(record: logging.LogRecord) -> bool:
    # Orbax logs a thousand lines of tracebacks for one failed write; here it is a CheckpointError.
    return "orbax" not in Path(record.pathname).parts


@contextlib.contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    """Raises CheckpointError for whatever Orbax, TensorStore or JSON raise over broken files.
    Errors of JAX itself are about memory or another process, and are raised as they are."""
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
