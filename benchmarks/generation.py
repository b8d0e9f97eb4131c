"""How long an answer takes: python benchmarks/generation.py --workdir=runs/quickstart

Three figures, each the median and range of five rounds: the time from `load` in a new process to
the first token (with a filled compilation cache, and without); tokens a second at batches of 1 and
32; and 20 questions about one scene with the scene encoded once, against encoded for each of them.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import slam_jax
from slam_jax.data.sort_of_clevr import COLOURS, PROMPTS, draw, make_scene
from slam_jax.generation import Request, Sampling, encode, generate
from slam_jax.runtime.compile_cache import enable_compile_cache

ROUNDS, TOKENS = 5, 128
FIRST_TOKEN = """
import sys, time
started = time.perf_counter()
import slam_jax
from slam_jax.data.sort_of_clevr import draw, make_scene
from slam_jax.generation import Request, Sampling, stream
from slam_jax.runtime.compile_cache import enable_compile_cache
enable_compile_cache()
imported = time.perf_counter()
loaded = slam_jax.load(sys.argv[1])
request = Request("shape of red", image=draw(make_scene(9_800)[0], range(6)))
next(stream(loaded, request, Sampling(max_new_tokens=16)))
print(imported - started, time.perf_counter() - imported)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", default="runs/quickstart")
    workdir = parser.parse_args().workdir
    enable_compile_cache()
    loaded = slam_jax.load(workdir)
    cores = len(os.sched_getaffinity(0))
    print(f"{workdir}, step {loaded.step:,}, on {jax.devices()[0].device_kind}, {cores} cores")
    first_token(workdir)
    for batch in (1, 32):
        throughput(loaded, batch)
    kept_scene(loaded)


def first_token(workdir: str) -> None:
    for name, fresh in (("filled compile cache", False), ("empty compile cache", True)):
        imports, answers = [], []
        for i in range(ROUNDS + (not fresh)):
            with tempfile.TemporaryDirectory() as folder:
                environment = dict(os.environ, **({"SLAM_JAX_CACHE_DIR": folder} if fresh else {}))
                done = subprocess.run(
                    [sys.executable, "-c", FIRST_TOKEN, workdir],
                    env=environment,
                    check=True,
                    capture_output=True,
                    text=True,
                )
            if fresh or i:  # the first of the others fills the cache
                imported, answered = map(float, done.stdout.split())
                imports.append(imported)
                answers.append(answered)
        print(f"load to first token, {name}: {spread(answers)} s (imports: {spread(imports)} s)")


def throughput(loaded: Any, batch: int) -> None:
    """Tokens a second of answers that do not end, the encode and the prefill among the time."""
    scenes = [draw(make_scene(9_800 + i)[0], range(6)) for i in range(batch)]
    # At this temperature an <eos> comes rarely; the tokens that came are counted.
    requests = [Request("shape of red", image=scene, seed=i) for i, scene in enumerate(scenes)]
    sampling = Sampling(max_new_tokens=TOKENS, temperature=1000.0)
    rates = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        answers = generate(loaded, requests, sampling)
        seconds = time.perf_counter() - started
        rates.append(sum(len(answer.samples[0].tokens) for answer in answers) / seconds)
    print(f"batch {batch}: {spread(rates[1:])} tokens/s, the encode and the prefill among the time")


def kept_scene(loaded: Any) -> None:
    scene = make_scene(9_800)[0]
    image = draw(scene, range(6))
    rng = np.random.default_rng(0)
    texts = [p.format(c) for kind in PROMPTS for p in kind for c in COLOURS]
    prompts = [str(text) for text in rng.choice(texts, 20, replace=False)]
    sampling = Sampling(max_new_tokens=16)

    def kept_one_by_one() -> list[str]:
        memory = encode(loaded, Request(image=image))
        return [generate(loaded, [Request(p)], sampling, memory=memory)[0].text for p in prompts]

    def kept_at_once() -> list[str]:
        memory = encode(loaded, Request(image=image))
        requests = [Request(prompt) for prompt in prompts]
        return [answer.text for answer in generate(loaded, requests, sampling, memory=memory)]

    def again() -> list[str]:
        return [generate(loaded, [Request(p, image=image)], sampling)[0].text for p in prompts]

    arms = {"again": again, "kept, one by one": kept_one_by_one, "kept, at once": kept_at_once}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(ROUNDS + 1):
        said = {name: timed(arm, seconds[name], i) for name, arm in arms.items()}
        if len(set(map(tuple, said.values()))) != 1:
            sys.exit(f"the arms answer differently: {said}")
    for name in arms:
        print(f"20 questions on one scene, {name}: {spread(seconds[name])} s")
    for name in list(arms)[1:]:
        ratios = [a / b for a, b in zip(seconds["again"], seconds[name], strict=True)]
        print(f"  encoded again / {name}: {spread(ratios)}")


def timed(arm: Callable[[], list[str]], seconds: list[float], i: int) -> list[str]:
    started = time.perf_counter()
    said = arm()
    if i:  # the first compiles
        seconds.append(time.perf_counter() - started)
    return said


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    os.chdir(pathlib.Path(__file__).parent.parent)
    main()
