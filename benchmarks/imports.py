"""How long imports take, in processes of their own: the shortest of several.

    python -m benchmarks.imports [--rounds=7]

The last row has what a layer needs of others. On a shared machine, read the time on the processor.
"""

import subprocess
import sys

from absl import flags
from rich.console import Console
from rich.table import Table

from slam_jax.errors import InputError, require_count
from slam_jax.runtime import cli

ROUNDS = flags.DEFINE_integer("rounds", 7, "Processes for each row.")
STATEMENTS = (
    "import slam_jax",
    "from slam_jax.layers.latent_attention import MultiHeadLatentAttention",
    "import jax; from flax import nnx",
)
AIMS = (0.15, 1.2, None)
TIMED = """
import time
wall, own = time.perf_counter(), time.process_time()
{}
print(time.perf_counter() - wall, time.process_time() - own)
"""


def main(arguments: list[str]) -> None:
    if arguments:
        raise InputError(f"argument {arguments[0]!r}; expected --rounds alone")
    require_count("--rounds", ROUNDS.value)
    table = Table("statement", "s", "s on the processor", "aim")
    for statement, aim in zip(STATEMENTS, AIMS, strict=True):
        times = [seconds(statement) for _ in range(ROUNDS.value)]
        wall, own = map(min, zip(*times, strict=True))
        table.add_row(statement, f"{wall:.2f}", f"{own:.2f}", "" if aim is None else f"{aim}")
    Console(width=120).print(table)


def seconds(statement: str) -> tuple[float, float]:
    """The time of a statement in a new process, and how much of it was on a processor."""
    command = [sys.executable, "-c", TIMED.format(statement)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall, own = done.stdout.split()
    return float(wall), float(own)


if __name__ == "__main__":
    cli.run(main)
