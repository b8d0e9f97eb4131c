"""Tokens a second of one language model with weights of 32, 16 and 8 bits, beside two libraries.

    python -m benchmarks.weights --model=FILE.gguf [--transformers=PYTHON] [--llama=PYTHON]

One token after the other, after a prompt of 32 tokens. Each side has a process of its own, and
they take turns. PYTHON: an interpreter that has torch and transformers, or llama-cpp-python; the
weights of transformers are those of the file, in bfloat16. Bytes are those of all weights, read
once a step, as a share of the best copy of this machine right before.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from slam_jax.errors import InputError, require_count
from slam_jax.runtime import cli

flags.DEFINE_string("model", None, "A GGUF file.", required=True)
flags.DEFINE_string("transformers", None, "A Python with torch and transformers.")
flags.DEFINE_string("llama", None, "A Python with llama-cpp-python.")
flags.DEFINE_integer("tokens", 64, "New tokens of a round.")
flags.DEFINE_integer("rows", 1, "Texts at once; with more than one, of this library alone.")
flags.DEFINE_integer("rounds", 7, "Rounds; each starts with another side.")
flags.DEFINE_bool("store", False, "Write benchmarks/results/weights.json.")

PROMPT = 32
OURS = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
import slam_jax
from slam_jax.generation.decode import Ends, continue_decoding, start_decoding
from slam_jax.generation.sampling import Sampling
from slam_jax.runtime.compile_cache import enable_compile_cache
enable_compile_cache()
model, count, weights, rows = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
loaded = slam_jax.load(model, weights=weights)
prompt = np.arange(1_000, 1_000 + rows * PROMPT, dtype=np.int32).reshape(rows, PROMPT)
given = jnp.full(rows, PROMPT), jax.random.split(jax.random.key(0), rows), Sampling().rules
ends = Ends(np.zeros((0,), np.int32), 0)
size = sum(x.nbytes for x in jax.tree.leaves(loaded.model))
def run():
    state = start_decoding(loaded.model, None, prompt, *given, ends, count + 1, count + 1)
    jax.block_until_ready(state.tokens)
    start = time.perf_counter()
    state = continue_decoding(loaded.model, None, state, count + 1)
    jax.block_until_ready(state.tokens)
    return time.perf_counter() - start
"""
TRANSFORMERS = """
import sys, time
import torch, transformers
folder, count = sys.argv[1], int(sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
size = sum(x.nbytes for x in model.parameters())
prompt = torch.arange(1_000, 1_000 + PROMPT)[None]
class Clock:
    def __init__(self): self.times = []
    def put(self, value): self.times.append(time.perf_counter())
    def end(self): pass
def run():
    clock = Clock()
    with torch.inference_mode():
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count + 1,
                       min_new_tokens=count + 1, do_sample=False, streamer=clock, pad_token_id=0)
    return clock.times[-1] - clock.times[1]
"""
LLAMA = """
import os, sys, time
from llama_cpp import Llama
model, count = sys.argv[1], int(sys.argv[2])
cores = len(os.sched_getaffinity(0))
llama = Llama(model, n_ctx=512, n_threads=cores, n_threads_batch=cores, verbose=False)
size = os.path.getsize(model)
def run():
    llama.reset()
    tokens = llama.generate(list(range(1_000, 1_000 + PROMPT)), temp=0.0)
    next(tokens)
    start = time.perf_counter()
    for _ in range(count):
        next(tokens)
    return time.perf_counter() - start
"""
LOOP = """
run(), run()
print(size, flush=True)
for _ in sys.stdin:
    print(run(), flush=True)
"""


class Side:
    """A process that times one round for each line that it gets."""

    def __init__(self, name: str, python: str, code: str, *arguments: Any):
        self.name, self.times = name, []
        given = [python, "-c", f"PROMPT = {PROMPT}\n{code}{LOOP}", *map(str, arguments)]
        # Only a worker of this checkout may import it.
        environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if python != sys.executable:
            environment.pop("PYTHONPATH")
        pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process: Any = subprocess.Popen(given, env=environment, **pipes)
        self.bytes = int(self._read())

    def time(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.times.append(float(self._read()))
        return self.times[-1]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> str:
        if line := self.process.stdout.readline():
            return line
        raise InputError(f"{self.name} ended early; its message is above")


def main(arguments: list[str]) -> None:
    given: Any = flags.FLAGS
    if arguments:
        raise InputError(f"argument {arguments[0]!r}; --help shows what may be given")
    require_count("--tokens", given.tokens, least=1, most=256)
    require_count("--rounds", given.rounds, least=1)
    require_count("--rows", given.rows, least=1, most=64)
    copy = _copy_speed()
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            Side(weights, sys.executable, OURS, given.model, given.tokens, weights, given.rows)
            for weights in ("float32", "bfloat16", "int8")
        ]
        if given.transformers and given.rows == 1:
            out = Path(folder) / "model"
            _write_folder(given.model, out)
            sides.append(Side("transformers", given.transformers, TRANSFORMERS, out, given.tokens))
        if given.llama and given.rows == 1:
            sides.append(Side("llama.cpp", given.llama, LLAMA, given.model, given.tokens))
        try:
            for i in range(given.rounds):
                for side in sides[i % len(sides) :] + sides[: i % len(sides)]:
                    side.time()
        finally:
            for side in sides:
                side.close()
    rows = [_row(side, sides, given, copy) for side in sides]
    columns = ["weights", "tokens/s", "x float32", "x transformers", "x llama.cpp", "share of copy"]
    what = f"batch {given.rows}, {given.tokens} tokens, {given.rounds} rounds"
    print(f"{what}, copy {copy / 1e9:.1f} GB/s")
    for row in [columns, *rows]:
        print("".join(f"{cell:>17}" for cell in row))
    if given.store:
        _store(columns, rows, given)


def _row(side: Side, sides: list[Side], given: Any, copy: float) -> list[str]:
    """Medians over the rounds; ratios are taken within a round."""
    steps = given.tokens / statistics.median(side.times)
    ratios = []
    for name in ("float32", "transformers", "llama.cpp"):
        other = [each.times for each in sides if each.name == name]
        each = [y / x for x, y in zip(side.times, other[0], strict=True)] if other else []
        ratios.append(f"{statistics.median(each):.2f}" if each else "-")
    return [side.name, f"{steps * given.rows:.1f}", *ratios, f"{steps * side.bytes / copy:.0%}"]


def _copy_speed() -> float:
    """Bytes a second, read and written, of the best copy."""
    from benchmarks.ceilings import measure_ceilings

    return measure_ceilings(False, ["xla"])["copy_bytes"]


def _write_folder(model: str, out: Path) -> None:
    """The weights of the file as transformers reads them, in bfloat16."""
    import slam_jax

    slam_jax.save_pretrained(slam_jax.load(model, weights="bfloat16"), out)


def _store(columns: list[str], rows: list[list[str]], given: Any) -> None:
    from benchmarks.results import FOLDER
    from slam_jax.rocket.machine import describe_machine

    about, today = describe_machine(), datetime.date.today().isoformat()
    place = f"{about['processor']}, {about['cores']} cores, slam_jax {about['slam_jax']}, {today}"
    table = {
        "title": "Decoding with quantised weights",
        "columns": columns,
        "rows": rows,
        "note": f"{Path(given.model).name}, batch {given.rows}, {given.tokens} tokens; {place}.",
    }
    entry = {
        "title": "Quantised weights",
        "command": "python -m benchmarks.weights --model=FILE.gguf",
        "text": "[Fast inference](inference.md#quantised-weights) says what is compared.",
        "tables": [table],
    }
    (FOLDER / "weights.json").write_text(json.dumps(entry, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
