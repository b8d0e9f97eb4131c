"""Measures, stores the figures and writes docs/results.md: python -m benchmarks [--only=a,b]

Without --only, all benchmarks for this device, a CPU or a GPU.

--only=a,b    these benchmarks; the others keep their stored figures
--rounds=5    rounds of each comparison; figures of fewer than 5 are shown and not stored
--quick       one round at tiny sizes, to see that it works; nothing is stored
--device      one GPU in 9 minutes: every row of benchmarks/device_rows.py in one process, without
              data sets and other libraries
--against=DIR our arms alone, against those of another version of this repository in DIR; stored
              in benchmarks/results/versions.json
"""

import importlib
import sys
import tempfile
import time
from typing import Any

from benchmarks import packages

if complaint := packages.complaint():
    print(complaint, file=sys.stderr)
    sys.exit(2)

from absl import flags

from slam_jax.errors import InputError, UserError, require_count
from slam_jax.runtime import cli

ONLY = flags.DEFINE_list("only", [], "Benchmarks to run, by name.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of each comparison.")
QUICK = flags.DEFINE_bool("quick", False, "One round at tiny sizes; nothing is stored.")
AGAINST = flags.DEFINE_string("against", "", "A checkout of another version to compare with.")
DEVICE = flags.DEFINE_bool("device", False, "One GPU in one process, in at most 9 minutes.")
LEAST_ROUNDS = 5
STARTED = time.monotonic()


class BenchmarkFailed(UserError):
    """A benchmark whose arms disagree, or whose own arm fails."""


def main(arguments: list[str]) -> None:
    if arguments:
        raise InputError(
            f"argument {arguments[0]!r}; expected --only, --rounds, --quick, --device or --against"
        )
    if DEVICE.value:
        measure_device()
        return
    from benchmarks import BENCHMARKS, ON_CPU, ON_GPU, results, results_page
    from benchmarks.device import settle

    for name in ONLY.value:
        if name not in BENCHMARKS:
            raise InputError(f"--only has {name!r}; there are {', '.join(BENCHMARKS)}")
    require_count("--rounds", ROUNDS.value)
    other_version = results.version_of(AGAINST.value) if AGAINST.value else ""
    gpu = settle()
    here, other = (ON_GPU, ON_CPU) if gpu else (ON_CPU, ON_GPU)
    names = ONLY.value or list(here)
    wrong = [name for name in names if name in other]
    if wrong and not QUICK.value:
        kind = "a CPU" if gpu else "a GPU"
        raise InputError(
            f"--only has {wrong[0]!r}, which is for {kind}; here are {', '.join(here)}"
        )
    rounds = 1 if QUICK.value else ROUNDS.value
    kept = not QUICK.value and rounds >= LEAST_ROUNDS
    failed = []
    for name in names:
        entry, reason = run(name, rounds, QUICK.value, AGAINST.value)
        if reason:
            failed.append(name)
        elif entry["rows"] and kept and other_version:
            results.keep_versions(entry, other_version)
        elif entry["rows"] and kept:
            results.keep(results.machine_file(), name, entry)
    if kept:
        results_page.write()
    else:
        print(f"not stored: that takes {LEAST_ROUNDS} rounds, and no --quick")
    if failed:
        raise BenchmarkFailed(f"{', '.join(failed)}: see above; the earlier figures stay")


def measure_device() -> None:
    for name in ("only", "rounds", "against"):
        if flags.FLAGS[name].present:
            raise InputError(f"--{name} with --device; expected --device alone or with --quick")
    from benchmarks.device_run import LIMIT, measure_all

    if failed := measure_all(QUICK.value, STARTED + LIMIT):
        raise BenchmarkFailed(f"{len(failed)} rows failed; the table above says why")


def run(name: str, rounds: int, quick: bool, against: str = "") -> tuple[Any, str | None]:
    """The entry of a benchmark, and a line that says why it failed, or None.

    against: a checkout of another version, whose arms take the place of other libraries.
    """
    from benchmarks.ceilings import measure_ceilings
    from benchmarks.harness import Disagreement, Skipped, measure
    from benchmarks.results import make_entry
    from benchmarks.table import describe
    from benchmarks.worker import ArmFailed

    module, rows, reason = importlib.import_module(f"benchmarks.{name}"), [], None
    title = (module.__doc__ or name).splitlines()[0].rstrip(".")
    # Measured again for each benchmark: on a shared machine they change within an hour.
    ceilings = measure_ceilings(quick)
    print(
        f"{name}: {title}\n  ceilings: {ceilings['matmul_flops'] / 1e9:,.0f} GFLOP/s by "
        f"{ceilings['matmul_by']}, {ceilings['copy_bytes'] / 1e9:,.1f} GB/s by "
        f"{ceilings['copy_by']}"
    )
    with tempfile.TemporaryDirectory() as folder:
        made = module.comparisons(quick, folder)
        if against:
            made = (pair for whole in made for pair in whole.between_versions(against))
        for comparison in made:
            try:
                rows.append(measure(comparison, rounds, ceilings))
            except Skipped as skipped:
                print(f"  {comparison.title}: skipped: {skipped}")
                continue
            except (Disagreement, ArmFailed) as error:
                reason = f"{comparison.title}: {error}"
                print(f"  FAILED {reason}", flush=True)
                continue
            for line in describe(rows[-1]):
                print(f"  {line}", flush=True)
    middle_aim = getattr(module, "MIDDLE_AIM", None)
    return make_entry(title, rows, ceilings, middle_aim), reason


if __name__ == "__main__":
    cli.run(main)
