"""One system in a process of its own: python -m slam_jax.rocket.worker JOB OUT

JOB is a JSON file of {"what", "system", "settings"}; the figures go to OUT. Progress goes to
standard output, a JSON list of share and text a line.
"""

import json
import sys
from pathlib import Path
from typing import Any

from slam_jax.errors import write_whole
from slam_jax.rocket import seed
from slam_jax.training.host import tune_host

TASKS = {
    "seed": (seed.learn, seed.SeedSettings),
    "seed_timing": (seed.time_inference, seed.SeedSettings),
}


def main() -> None:
    job, out = map(Path, sys.argv[1:])
    given: dict[str, Any] = json.loads(job.read_text())
    tune_host()
    task, settings = TASKS[given["what"]]

    def tell(share: float, text: str) -> None:
        print(json.dumps([round(share, 3), text]), flush=True)

    figures = task(given["system"], settings(**given["settings"]), tell)
    write_whole(out, json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
