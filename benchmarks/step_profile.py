"""Profiles a training step by source file.

    python -m benchmarks.step_profile                   # of the quickstart, in each of its stages
    python -m benchmarks.step_profile --system=jamba    # of a language model, 8 x 128 tokens

Every operation, forward and backward, counts for the file that asked for it: in the quickstart the
nearest file of slam_jax/slam_v3/ or slam_jax/training/ on its call stack, in a language model the
layer. Shares are of the sum of all operations, which run on several threads at once. A fusion
counts for the file that XLA names.
"""

import collections
import itertools
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from benchmarks import ours
from slam_jax.data import prepare, training_batches
from slam_jax.errors import InputError
from slam_jax.language_models import make_config, make_model
from slam_jax.runtime import cli
from slam_jax.runtime.compile_cache import enable_compile_cache
from slam_jax.training import Experiment, read_config, split_model
from slam_jax.training.slam_v3_task import SlamV3Task
from slam_jax.training.start import compile_step, initial_state, jit_step

CONFIG = Path(__file__).parents[1] / "configs" / "slam_v3_quickstart.py"
SYSTEM = flags.DEFINE_string("system", None, "A language model, at its seed size.")
ROWS, LENGTH = 8, 128
BATCHES = 60  # of each stage, to find the kinds of batches and their shares
STEPS = 4  # of each kind of batch: timed, and profiled again
PACKAGES = "slam_v3|training"  # the packages of the quickstart's parts
# These contain other operations, which have events of their own.
_HOLDERS = {"while", "call", "conditional"}


def main(arguments: list[str]) -> None:
    if arguments:
        raise InputError(f"argument {arguments[0]!r}; expected --system or nothing")
    enable_compile_cache()
    if SYSTEM.value is None:
        quickstart()
    else:
        language_model(SYSTEM.value)


def language_model(system: str, preset: str = "seed", length: int = LENGTH) -> None:
    config = make_config(system, preset)
    graphdef, params = split_model(jax.jit(lambda: make_model(config, rngs=nnx.Rngs(0)))())
    step, state = ours.make_step(graphdef, params)
    given = jnp.asarray(ours.tokens(config.vocab_size, ROWS, length + 1))
    compiled = step.lower(state, given).compile()
    _, spent = measured(
        compiled, compiled.as_text(), state, given, "layers|language_models|training"
    )
    print(f"{system}, training step {ROWS} x {length}: {spent.total():,.0f} ms")
    say(spent)


def quickstart() -> None:
    experiment = Experiment.from_config(read_config(CONFIG))
    dataset = prepare(experiment.data, model=experiment.model)
    graphdef, state = initial_state(SlamV3Task(experiment), dataset.tokenizer.vocab_size)
    step = jit_step(SlamV3Task(experiment), graphdef, state)
    whole = jax.jit(step, donate_argnums=0)  # one executable: its operations have different names
    ends = [*(start for start, _ in experiment.data.stages[1:]), experiment.run.num_steps]
    total, compile_seconds, executables = 0.0, 0.0, {}
    jax.config.update("jax_enable_compilation_cache", False)

    for (first, mix), end in zip(experiment.data.stages, ends, strict=True):
        made = training_batches(dataset.train, dataset.tokenizer, experiment.data, start_step=first)
        # A batch has inputs of one kind, and each kind a compiled step of its own.
        kinds = collections.defaultdict(list)
        for _, batch in itertools.islice(made, BATCHES):
            kinds[str(jax.tree.map(jnp.shape, batch))].append(batch)
        spent = collections.Counter()
        for kind, (batch, *others) in kinds.items():
            if kind not in executables:
                start = time.perf_counter()
                compile_step(step, state, batch)
                compile_seconds += time.perf_counter() - start
                executables[kind] = whole.lower(state, batch).compile()
            compiled = executables[kind]
            state, each = measured(compiled, compiled.as_text(), state, batch)
            weight = (1 + len(others)) / BATCHES
            spent.update({part: weight * ms for part, ms in each.items()})
        total += (end - first) * spent.total()
        print(f"steps {first} to {end}, {' '.join(mix)}: {spent.total():.0f} ms a step")
        say(spent)
    print(f"all {experiment.run.num_steps} steps: {total / 60_000:.1f} minutes")
    print(f"tracing and compiling them: {compile_seconds:.0f} s")


def say(spent: collections.Counter[str]) -> None:
    for part, milliseconds in spent.most_common():
        print(f"  {milliseconds / spent.total():5.1%}  {part}")


def measured(
    call: Any, hlo_text: str, state: Any, given: Any, packages: str = PACKAGES
) -> tuple[Any, collections.Counter[str]]:
    """Calls (state, given) -> (state, anything) several times; returns the last state, and the
    milliseconds of one call by part."""
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(call(state, given))
        seconds.append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                state, _ = jax.block_until_ready(call(state, given))
        parts = by_part(folder, hlo_text, packages)
    whole, milliseconds = parts.total(), 1e3 * statistics.median(seconds[1:])
    shares = {part: milliseconds * spent / whole for part, spent in parts.items()}
    return state, collections.Counter(shares)


def by_part(folder: str, hlo_text: str, packages: str = PACKAGES) -> collections.Counter[str]:
    """Nanoseconds of the operations in a trace, by the file that asked for them."""
    parts, spent = parts_of(hlo_text, packages), collections.Counter()
    [trace] = Path(folder).rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for event in itertools.chain.from_iterable(line.events for line in plane.lines):
            if event.name in parts:
                spent[parts[event.name]] += event.duration_ns
    return spent


def parts_of(hlo_text: str, packages: str = PACKAGES) -> dict[str, str]:
    """The part of every operation of a compiled executable that has time of its own."""
    files = dict(re.findall(r'^(\d+) "([^"]*)"$', _table(hlo_text, "FileNames"), re.M))
    places = dict(
        re.findall(r"^(\d+) {file_name_id=(\d+)", _table(hlo_text, "FileLocations"), re.M)
    )
    row = r"^(\d+) {file_location_id=(\d+) parent_frame_id=(\d+)"
    frames = {int(n): rest for n, *rest in re.findall(row, _table(hlo_text, "StackFrames"), re.M)}

    def part(frame: int) -> str:
        while frame:
            place, parent = frames[frame]
            name = re.search(rf"slam_jax/((?:{packages})/\w+\.py)", files[places[place]])
            if name is not None:
                return name[1]
            frame = int(parent) - 1  # XLA prints it one too high: 1 is nobody
        return "elsewhere"

    operation = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\((.*)$", re.M)
    found = {}
    for name, kind, rest in operation.findall(hlo_text):
        frame = re.search(r"stack_frame_id=(\d+)", rest)
        if kind not in _HOLDERS:
            found[name] = part(int(frame[1]) if frame else 0)
    return found


def _table(hlo_text: str, name: str) -> str:
    return hlo_text.split(f"\n{name}\n", 1)[1].split("\n\n", 1)[0]


if __name__ == "__main__":
    cli.run(main)
