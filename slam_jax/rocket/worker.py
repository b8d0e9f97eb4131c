"""Runs one task: python -m slam_jax.rocket.worker JOB OUT PARENT

JOB: a JSON file of {"what", "system", "settings", "arguments"}. OUT: the file for the figures.
PARENT: the process that started this one; when it ends, this one ends too. Progress is printed as
lines of JSON, [share, text].
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slam_jax.errors import write_whole
from slam_jax.rocket.ablation import measure as ablation
from slam_jax.rocket.heldout import measure as heldout
from slam_jax.rocket.heldout.settings import HeldoutSettings
from slam_jax.rocket.seed import measure as seed
from slam_jax.runtime.compile_cache import enable_compile_cache

# A task that may fail halfway is a generator, which yields its figures so far.
TASKS = {
    "seed": (seed.learn, seed.SeedSettings),
    "seed_timing": (seed.time_inference, seed.SeedSettings),
    "seed_stress": (seed.stress, seed.SeedSettings),
    "ablation": (ablation.run, ablation.AblationSettings),
    "heldout": (heldout.train, HeldoutSettings),
    "heldout_timing": (heldout.time_system, HeldoutSettings),
}


def main() -> None:
    enable_compile_cache()
    threading.Thread(target=_end_with, args=(int(sys.argv[3]),), daemon=True).start()
    job, out = map(Path, sys.argv[1:3])
    given: dict[str, Any] = json.loads(job.read_text())
    task, settings = TASKS[given["what"]]

    def report(share: float, text: str) -> None:
        print(json.dumps([round(share, 3), text]), flush=True)

    figures = task(given["system"], settings(**given["settings"]), report, **given["arguments"])
    for each in figures if isinstance(figures, Iterator) else [figures]:
        write_whole(out, json.dumps(each, allow_nan=False))


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, which could not do it if it was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main()
