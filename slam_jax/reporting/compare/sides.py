"""The two sides of a comparison: stored answers, or models that answer the same questions."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slam_jax.errors import InputError
from slam_jax.evaluation.answered import ANSWERS, Answer, read_answers
from slam_jax.interop.pretrained import is_published
from slam_jax.reporting.checkpoint import evaluate_checkpoint
from slam_jax.runtime.files import read_limited
from slam_jax.trained.folder import find_folder
from slam_jax.training.checkpoint import CheckpointError, Checkpoints, Step

_METRICS = "metrics.json"
_MOST_BYTES = 1 << 26


class Side(NamedTuple):
    """Answers, and what is known about where they are from.

    path: as the user gave it. step: of the checkpoint. data: as in metrics.json, which tables of a
    folder have a sha256 in. data_config: the group `data` of the evaluation.
    """

    path: str
    step: int | None
    answers: list[Answer]
    data: dict[str, Any] | None
    data_config: dict[str, Any] | None


def read_sides(
    paths: Sequence[str | Path],
    steps: Sequence[Step] = (None, None),
    overrides: Sequence[str] = (),
    base: Sequence[str | Path] = (),
) -> tuple[Side, Side]:
    """The answers of two models to the same questions.

    A path is a workdir, a folder that `save_pretrained` wrote, or a folder with answers.jsonl.
    Stored answers are used where both sides have them for the same data; those of a workdir only if
    they are of the checkpoint that is asked for. Otherwise models answer, on the data of the first
    side, or of the one that has nothing but answers. overrides: `--config.data.field=value`; with
    one, models always answer.

    Raises InputError where a path is none of these, or two folders of answers are of other data;
    and the errors of `evaluate_checkpoint`.
    """
    stored = [_read_stored(*each) for each in zip(paths, steps, strict=True)]
    models = [not _has_answers(path) for path in paths]
    a, b = stored
    if a is not None and b is not None and not overrides and _same_data(a, b):
        return a, b
    if not any(models):
        reason = "they are folders of answers to other data"
        reason = "--config needs a model on one side" if overrides else reason
        raise InputError(f"{paths[0]} and {paths[1]}: {reason}; give the workdirs of their runs")
    first = 1 if not models[1] else 0  # the side whose data counts
    sides: dict[int, Side] = {}
    config = None
    for i in (first, 1 - first):
        kept = stored[i] if i == first and not (overrides and models[i]) else None
        sides[i] = kept or _evaluate(paths[i], steps[i], overrides, base, config)
        config = sides[i].data_config
        if config is None:
            raise InputError(
                f"{paths[i]}: its {_METRICS} does not say of which data its answers are; "
                "evaluate it again, or give its workdir"
            )
    return sides[0], sides[1]


def _has_answers(path: str | Path) -> bool:
    return (Path(path) / ANSWERS).is_file()


def _read_stored(path: str | Path, step: Step) -> Side | None:
    """The answers of an evaluation: of a folder of them, or of a workdir; None = to be made."""
    if _has_answers(path):
        return _read_folder(path, Path(path))
    folder = Path(path) / "eval"
    if find_folder(path) is not None or not _has_answers(folder):
        return None
    with contextlib.suppress(CheckpointError, OSError):
        checkpoints = Checkpoints(path)
        wanted = checkpoints.resolve(step)
        side = _read_folder(path, folder)
        trained = (checkpoints.directory / str(wanted)).stat().st_mtime
        if side.step == wanted and trained <= (folder / ANSWERS).stat().st_mtime:
            return side
    return None


def _read_folder(path: str | Path, folder: Path) -> Side:
    metrics: Any = {}
    if (folder / _METRICS).exists():
        try:
            metrics = json.loads(read_limited(folder / _METRICS, _MOST_BYTES))
        except (ValueError, RecursionError):
            metrics = None
        if not isinstance(metrics, Mapping):
            raise InputError(f"{folder / _METRICS}: expected what slam-eval wrote; evaluate again")
    step, found = metrics.get("step"), {}
    for name in ("data", "data_config"):
        value = metrics.get(name)
        found[name] = dict(value) if isinstance(value, Mapping) else None
    step = step if isinstance(step, int) else None
    return Side(str(path), step, read_answers(folder / ANSWERS), **found)


def _same_data(a: Side, b: Side) -> bool:
    """Whether both are of tables of the same bytes, or of the same data set with as many rows."""
    if a.data is None or b.data is None:
        return True  # the questions themselves are compared
    names = ("sha256",) if a.data.get("sha256") else ("sha256", "name", "rows")
    return all(a.data.get(name) == b.data.get(name) for name in names)


def _evaluate(
    path: str | Path,
    step: Step,
    overrides: Sequence[str],
    base: Sequence[str | Path],
    config: Mapping[str, Any] | None,
) -> Side:
    if is_published(path):
        raise InputError(
            f"{path} is a language model; give the workdir of a run, a folder that save_pretrained "
            "wrote, or a folder with answers.jsonl"
        )
    found = evaluate_checkpoint(path, step, overrides, base=base, data_config=config)
    metrics = found.metrics
    return Side(str(path), metrics["step"], found.answers, metrics["data"], metrics["data_config"])
