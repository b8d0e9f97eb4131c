"""Pictures a second from JPEG files to batches, beside what accelerators would consume.

    python -m benchmarks.jpegs [--workers=0,1,2] [--pictures=1600]

The files are 500 x 375 pixels, as most of ImageNet; batches have 224 x 224. What eight H100 would
consume is computed, not measured: `base` with an image and one question, at 40% of their stated
speed.
"""

import atexit
import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from slam_jax.data import DataConfig, prepare, training_batches
from slam_jax.errors import InputError, require_count
from slam_jax.runtime import cli
from slam_jax.runtime.devices import PEAK_FLOPS
from slam_jax.slam_v3 import SlamV3Config
from slam_jax.training import LossConfig
from slam_jax.training.flops import forward_flops

WORKERS = flags.DEFINE_list("workers", ["0", "1", "2"], "Numbers of worker processes to try.")
PICTURES = flags.DEFINE_integer("pictures", 1_600, "Pictures in the folder; each is read once.")
BATCH, ACCELERATORS, SHARE_OF_PEAK = 32, 8, 0.4
_MADE_AHEAD = 16  # batches that are made before the clock starts


def main(arguments: list[str]) -> None:
    if arguments:
        raise InputError(f"argument {arguments[0]!r}; expected --workers or --pictures")
    require_count("--pictures", PICTURES.value, least=BATCH * (_MADE_AHEAD + 4))
    workers = [_number(text) for text in WORKERS.value]
    model = SlamV3Config.preset("base", vocab_size=512)
    folder = tempfile.mkdtemp()
    # Threads that make batches ahead end with the process, and read until then.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    size = write(Path(folder), PICTURES.value)
    print(f"{PICTURES.value} files of {size / 1024:.0f} KiB, batches of {BATCH}")
    for count in workers:
        rate, batch = measure(Path(folder), model, count)
        print(f"{count} worker processes: {rate:,.0f} pictures/s")
    flops = 3 * forward_flops(model, LossConfig(), batch)
    consumed = ACCELERATORS * SHARE_OF_PEAK * PEAK_FLOPS["NVIDIA H100 80GB HBM3"] / flops
    print(
        f"{ACCELERATORS} H100 would consume {consumed:,.0f} pictures/s, computed from "
        f"{flops / 1e9:,.0f} GFLOP a picture at {SHARE_OF_PEAK:.0%} of their stated speed"
    )


def write(folder: Path, count: int) -> float:
    """Writes the pictures and their table; returns the mean size of a file in bytes."""
    rng, rows, sizes = np.random.default_rng(0), [], []
    for i in range(count):
        # Coarse shapes and fine noise compress about as well as photographs.
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
        path = folder / f"{i}.jpg"
        Image.fromarray(noisy).save(path, quality=90)
        sizes.append(path.stat().st_size)
        split = ("validation", "test")[i] if i < 2 else "train"
        rows.append({"image": path.name, "prompt": "which?", "answer": str(i % 10), "split": split})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return float(np.mean(sizes))


def measure(folder: Path, model: SlamV3Config, workers: int) -> tuple[float, Any]:
    """Pictures a second, and a batch. No picture is read twice."""
    stages = ((0, {"image": 1.0}),)
    config = DataConfig("folder", path=str(folder), batch_size=BATCH, stages=stages)
    config = dataclasses.replace(config, table_version=2, workers=workers)
    dataset = prepare(config, model=model)
    batches: Any = training_batches(dataset.train, dataset.tokenizer, config)
    try:
        for _ in range(_MADE_AHEAD):
            next(batches)
        count = len(dataset.train) // BATCH - _MADE_AHEAD
        start = time.perf_counter()
        for _ in range(count):
            _, batch = next(batches)
        return count * BATCH / (time.perf_counter() - start), batch
    finally:
        batches.close()


def _number(text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"--workers has {text!r}; expected numbers such as 0,1,2")
    return int(text)


if __name__ == "__main__":
    cli.run(main)
