"""Inspects the checkpoints of a run. It changes nothing, so the run may be in progress.

    python -m slam_jax.training.checkpoint list WORKDIR
    python -m slam_jax.training.checkpoint verify WORKDIR
    python -m slam_jax.training.checkpoint diff WORKDIR[@STEP] [WORKDIR[@STEP]]

`verify` ends with exit code 1 if a step is damaged. `diff` compares configuration, tokenizer and
arrays of two checkpoints, with exit code 1 if anything differs. Without @STEP it takes the latest
step of a workdir; without a second workdir, the step before.
"""

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from slam_jax.errors import UserError
from slam_jax.runtime import cli
from slam_jax.training.checkpoint import CheckpointError, Checkpoints, is_loss
from slam_jax.training.checkpoint.trees import by_name, describe

_MAX_LINES = 20  # differing arrays to list


def list_steps(workdir: str) -> int:
    checkpoints = Checkpoints(workdir)
    checkpoints.resolve("latest")
    best, metric = checkpoints.best(), checkpoints.best_metric()
    width = max(8, len(metric))
    print(f"{'step':>10}  {'written':16}  {'MiB':>8}  {metric:>{width}}")
    for step in checkpoints.steps():
        folder = checkpoints.directory / str(step)
        written = datetime.datetime.fromtimestamp(folder.stat().st_mtime)
        size = sum(path.lstat().st_size for path in folder.rglob("*")) / 2**20
        try:
            score = checkpoints.read_metrics(step).get(metric)
            shown = "-" if score is None else f"{100 * score:.1f}%"
            if score is not None and is_loss(metric):
                shown = f"{score:.4f}"
        except CheckpointError:
            shown = "damaged"
        mark = "  best" if step == best else ""
        print(f"{step:10,}  {written:%Y-%m-%d %H:%M}  {size:8,.1f}  {shown:>{width}}{mark}")
    return 0


def verify(workdir: str) -> int:
    checkpoints = Checkpoints(workdir)
    damages = checkpoints.verify()
    if not damages:
        checkpoints.resolve("latest")  # raises
    for step, damage in damages.items():
        print(f"step {step:,}: {'intact' if damage is None else f'damaged: {damage}'}")
    return int(any(damages.values()))


def diff(first: str, second: str | None = None) -> int:
    one, step = _parse(first)
    if second is not None:
        other, other_step = _parse(second)
    else:
        other, latest = one, one.resolve(step)
        earlier = [known for known in one.steps() if known < latest]
        if not earlier:
            raise UserError(f"{one.workdir}: has no checkpoint before step {latest:,}; name two")
        other_step = earlier[-1]
    step, other_step = one.resolve(step), other.resolve(other_step)
    print(f"a = {one.directory / str(step)}\nb = {other.directory / str(other_step)}")
    different = False
    for line in _differences(one, step, other, other_step):
        print(line)  # at once: reading the arrays, which comes last, may fail
        different = True
    if not different:
        print("equal, bit for bit")
    return int(different)


def _parse(place: str) -> tuple[Checkpoints, str]:
    """The checkpoints and step of WORKDIR or WORKDIR@STEP; folder names may contain an @, too."""
    workdir, at, step = place.rpartition("@")
    if at and not Path(place).is_dir():
        return Checkpoints(workdir), step
    return Checkpoints(place), "latest"


def _differences(a: Checkpoints, step_a: int, b: Checkpoints, step_b: int) -> Iterator[str]:
    configs = a.read_config(step_a), b.read_config(step_b)
    config_a, config_b = (flatten_dict(config, sep=".") for config in configs)
    for name in sorted(config_a.keys() | config_b.keys()):
        if config_a.get(name) != config_b.get(name):
            yield f"config.{name}: {config_a.get(name)!r} | {config_b.get(name)!r}"
    if a.read_tokenizer(step_a) != b.read_tokenizer(step_b):
        yield "the tokenizers differ"
    if a.read_bases(step_a) != b.read_bases(step_b):
        yield "the base weights that are not stored with them differ"
    like_a, like_b = a.read_shapes(step_a), b.read_shapes(step_b)
    shapes_a, shapes_b = describe(like_a), describe(like_b)
    for name in sorted(shapes_a.keys() | shapes_b.keys()):
        if shapes_a.get(name) != shapes_b.get(name):
            yield f"{name}: {shapes_a.get(name, 'absent')} | {shapes_b.get(name, 'absent')}"
    arrays_a, arrays_b = by_name(a.restore(step_a, like_a)), by_name(b.restore(step_b, like_b))
    same = [name for name in shapes_a if shapes_a[name] == shapes_b.get(name)]
    distances = [(_distance(arrays_a[name], arrays_b[name]), name) for name in same]
    order = sorted(((-x, name) for x, name in distances if x is not None), key=lambda each: each[0])
    if order:
        yield f"{len(order)} of {len(same)} arrays differ, by at most:"
    for distance, name in order[:_MAX_LINES]:
        yield f"  {-distance:.3g}  {name}"
    if len(order) > _MAX_LINES:
        yield f"  .. and {len(order) - _MAX_LINES} more"


def _distance(a: jax.Array, b: jax.Array) -> float | None:
    """The largest difference of two arrays; None if all bits are equal."""
    if jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    x, y = np.asarray(a), np.asarray(b)
    if x.tobytes() == y.tobytes():
        return None
    difference: Any = np.subtract(x, y, dtype=np.float64, casting="unsafe")
    return float(np.max(np.nan_to_num(np.abs(difference), nan=np.inf)))


def main(arguments: list[str]) -> int:
    # Another run may use the accelerator, which is not needed here.
    jax.config.update("jax_platforms", "cpu")
    match arguments:
        case ["list", workdir]:
            return list_steps(workdir)
        case ["verify", workdir]:
            return verify(workdir)
        case ["diff", one, *other] if len(other) <= 1:
            return diff(one, *other)
    expected = "list WORKDIR, verify WORKDIR or diff WORKDIR[@STEP] [WORKDIR[@STEP]]"
    raise UserError(f"arguments are {' '.join(arguments)!r}; expected {expected}")


if __name__ == "__main__":
    cli.run(main)
