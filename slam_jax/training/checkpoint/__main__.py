"""Inspects the checkpoints of a run. It changes nothing, so the run may be in progress.

    python -m slam_jax.training.checkpoint list WORKDIR
    python -m slam_jax.training.checkpoint verify WORKDIR
    python -m slam_jax.training.checkpoint diff WORKDIR[@STEP] [WORKDIR[@STEP]]

`verify` ends with exit code 1 if a step is damaged. `diff` compares configuration, tokenizer and
arrays of two checkpoints, with exit code 1 if anything differs. Without @STEP it takes the latest
step of a workdir; without a second workdir, the step before.
"""

import argparse
import datetime
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags

from slam_jax.errors import UserError
from slam_jax.runtime.cli import exit_on_error, prepare_process
from slam_jax.training.checkpoint import CheckpointError, Checkpoints
from slam_jax.training.checkpoint.trees import by_name, describe
from slam_jax.training.experiment import flatten

_MAX_LINES = 20  # differing arrays to list


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all arguments")


def list_steps(workdir: str) -> int:
    checkpoints = Checkpoints(workdir)
    checkpoints.resolve("latest")
    best = checkpoints.best()
    print(f"{'step':>10}  {'written':16}  {'MiB':>8}  {'accuracy':>8}")
    for step in checkpoints.steps():
        folder = checkpoints.directory / str(step)
        written = datetime.datetime.fromtimestamp(folder.stat().st_mtime)
        size = sum(path.lstat().st_size for path in folder.rglob("*")) / 2**20
        try:
            accuracy = checkpoints.read_metrics(step).get("accuracy")
            shown = "-" if accuracy is None else f"{100 * accuracy:.1f}%"
        except CheckpointError:
            shown = "damaged"
        mark = "  best" if step == best else ""
        print(f"{step:10,}  {written:%Y-%m-%d %H:%M}  {size:8,.1f}  {shown:>8}{mark}")
    return 0


def verify(workdir: str) -> int:
    checkpoints = Checkpoints(workdir)
    damages = checkpoints.verify()
    if not damages:
        checkpoints.resolve("latest")  # raises
    for step, damage in damages.items():
        print(f"step {step:,}: {'intact' if damage is None else f'damaged: {damage}'}")
    return int(any(damages.values()))


def diff(first: str, second: str | None) -> int:
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
        different = True
        print(line)
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
    config_a, config_b = flatten(a.read_config(step_a)), flatten(b.read_config(step_b))
    for name in sorted(config_a.keys() | config_b.keys()):
        if config_a.get(name) != config_b.get(name):
            yield f"config.{name}: {config_a.get(name)!r} | {config_b.get(name)!r}"
    if a.read_tokenizer(step_a) != b.read_tokenizer(step_b):
        yield "the tokenizers differ"
    like_a, like_b = a.read_shapes(step_a), b.read_shapes(step_b)
    shapes_a, shapes_b = describe(like_a), describe(like_b)
    for name in sorted(shapes_a.keys() | shapes_b.keys()):
        if shapes_a.get(name) != shapes_b.get(name):
            yield f"{name}: {shapes_a.get(name, 'absent')} | {shapes_b.get(name, 'absent')}"
    arrays_a, arrays_b = by_name(a.restore(step_a, like_a)), by_name(b.restore(step_b, like_b))
    same = [name for name in shapes_a if shapes_a[name] == shapes_b.get(name)]
    distances = {name: _distance(arrays_a[name], arrays_b[name]) for name in same}
    yield from _by_distance({name: x for name, x in distances.items() if x is not None}, len(same))


def _by_distance(distances: Mapping[str, float], count: int) -> Iterator[str]:
    order = sorted(distances, key=lambda name: -distances[name])
    if order:
        yield f"{len(order)} of {count} arrays differ, by at most:"
    for name in order[:_MAX_LINES]:
        yield f"  {distances[name]:.3g}  {name}"
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


def main() -> int:
    parser = _Parser(
        prog="python -m slam_jax.training.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("list", "verify"):
        commands.add_parser(name).add_argument("workdir")
    compare = commands.add_parser("diff")
    compare.add_argument("one", metavar="WORKDIR[@STEP]")
    compare.add_argument("other", metavar="WORKDIR[@STEP]", nargs="?")
    arguments = parser.parse_args()
    if arguments.command == "diff":
        return diff(arguments.one, arguments.other)
    return {"list": list_steps, "verify": verify}[arguments.command](arguments.workdir)


if __name__ == "__main__":
    prepare_process()
    flags.FLAGS.mark_as_parsed()  # or absl complains before each warning
    # Another run may use the accelerator, which is not needed here.
    jax.config.update("jax_platforms", "cpu")
    with exit_on_error():
        code = main()
    sys.exit(code)
