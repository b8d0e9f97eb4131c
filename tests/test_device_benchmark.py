"""`python -m benchmarks --device`: what it imports, and what it does with rows that fail or that it
does not reach."""

import inspect
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import arms
import jax
import pytest

from benchmarks import device_run, results, table
from benchmarks.comparison import Arm, Comparison
from benchmarks.device_rows import comparisons
from slam_jax.errors import InputError

pytestmark = pytest.mark.release

ROOT = Path(__file__).parents[1]
ON_CPU = {**os.environ, "JAX_PLATFORMS": "cpu"}
CEILINGS = {"matmul_flops": 2e12, "copy_bytes": 4e9}
REFUSING = """
import runpy, sys

class Refusing:
    names = set("NAMES".split())
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError("a GPU host has no " + name)

sys.meta_path.insert(0, Refusing())
sys.argv[1:] = ["--device", "--quick"]
runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
"""


def row_of(title: str, *given: Arm, **changes: Any) -> Comparison:
    return Comparison(title, given, **{"tolerance": 0.1, **changes})


def numbers(name: str, *values: float) -> Arm:
    return Arm(name, arms.numbers, {"values": [*values]})


def measured(*planned: Comparison, last_start: float = float("inf")) -> list[Any]:
    return list(device_run.measure_rows(planned, 2, CEILINGS, last_start))


@pytest.mark.slow
def test_every_row_runs_without_data_sets_and_other_libraries():
    names = "tensorflow tensorflow_datasets grain tokenizers PIL orbax torch transformers "
    names += "matplotlib array_record jinja2 ml_collections psutil tensorstore"
    command = [sys.executable, "-c", REFUSING.replace("NAMES", names)]
    done = subprocess.run(command, cwd=ROOT, env=ON_CPU, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    _, head, *lines, last = done.stdout.splitlines()
    assert head.startswith("what ") and last == "not stored, for --quick"
    for line, comparison in zip(lines, comparisons(True), strict=True):
        assert line.startswith(f"{comparison.title} ") and "ms (" in line


def test_each_row_can_be_built_at_both_sizes():
    for quick in (True, False):
        planned = comparisons(quick)
        assert len({comparison.title for comparison in planned}) == len(planned)
        for comparison in planned:
            assert comparison.flops or comparison.bytes_moved
            assert (comparison.tolerance is None) == (len(comparison.arms) == 1)
            for arm in comparison.arms:
                inspect.signature(arm.build).bind(**arm.given)


def test_rows_for_which_no_time_is_left_are_named(monkeypatch):
    clock = iter([1.0, 3.0, 3.0])
    fake = types.SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(device_run, "time", fake)
    planned = [row_of(title, numbers("ours", 1.0)) for title in ("one", "two", "three")]
    one, *others = measured(*planned, last_start=2.0)
    assert one["arms"]["ours"]["n"] == 2 and "reason" not in one
    assert [row["title"] for row in others] == ["two", "three"]
    assert device_run.make_cells(others[0])[:2] == ["two", "left out: no time was left"]


@pytest.mark.slow
def test_a_row_that_fails_says_why_and_the_others_are_measured():
    broken = Arm("broken", arms.failing)
    rows = measured(
        row_of("fails", broken, numbers("plain", 1.0)),
        row_of("differs", numbers("ours", 1.0, 9.0), numbers("plain", 1.0, 8.0), relative=True),
        row_of("infinite", numbers("ours", float("inf"))),
        row_of("alone", numbers("ours", 1.0), broken),
        row_of("agrees", numbers("ours", 9.0), numbers("plain", 8.5), relative=True, tokens=6),
    )
    assert [row.get("reason") for row in rows] == [
        "failed: RuntimeError: no compiler",
        "failed: plain: output 1 differs by up to 0.125, tolerance 0.1",
        "failed: not all numbers that it returns are finite",
        None,
        None,
    ]
    cells = [device_run.make_cells(row) for row in rows]
    assert all(len(each) == len(device_run.COLUMNS) for each in cells)
    assert cells[0][1] == "failed: RuntimeError: no compiler"
    assert cells[3][-1] == "broken left out: RuntimeError: no compiler"
    assert rows[4]["difference"] == pytest.approx(0.5 / 8.5) and rows[4]["arms"]["plain"]["n"] == 2
    assert cells[4][1].endswith("(ours)") and cells[4][-1].startswith("plain ")
    assert cells[4][3] == f"{6 / rows[4]['arms']['ours']['median']:,.0f}"


def large(side: int) -> Any:
    x = jax.numpy.ones((side, side))
    run = jax.jit(lambda x: x.sum())
    return lambda: run(x)


def test_compiling_is_told_apart_and_the_next_row_has_the_whole_memory():
    before = sum(x.nbytes for x in jax.live_arrays())
    planned = [row_of("large", Arm("ours", large, {"side": 512}), flops=2e6)]
    for row in device_run.measure_rows(planned, 2, CEILINGS, float("inf")):
        assert sum(x.nbytes for x in jax.live_arrays()) < before + 512 * 512
        arm = row["arms"]["ours"]
        assert arm["compile"] > arm["median"] > 0
        assert arm["shares"] == {"matmul": pytest.approx(1e-6 / arm["median"])}


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """A GPU by name, whose rows cost nothing; figures are stored in a folder of the test's own."""
    device = types.SimpleNamespace(platform="gpu", device_kind="Some GPU 80GB")
    device.client = types.SimpleNamespace(platform_version="cuda\n 13")
    kept = {name: jax.config.values[name] for name in device_run.SETTINGS}
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    yield tmp_path / "some-gpu-80gb.json"
    for name, value in kept.items():
        jax.config.update(name, value)


def test_figures_of_a_gpu_are_stored_after_every_row_and_have_a_table(on_gpu, monkeypatch):
    broken, found = Arm("broken", arms.failing), []

    def look(values: list[float]) -> Any:
        found.append(json.loads(on_gpu.read_text())["benchmarks"]["device"]["rows"])
        return arms.numbers(values)

    planned = [
        row_of("one", numbers("tokamax", 1.0), numbers("plain", 1.0), flops=2e6),
        row_of("two", broken),
        row_of("three", Arm("ours", look, {"values": [1.0]})),
    ]
    monkeypatch.setattr(device_run, "comparisons", lambda quick: planned)
    monkeypatch.setattr(device_run, "measure_ceilings", lambda quick, **_: CEILINGS)
    assert device_run.measure_all(False, time.monotonic() + 1e3) == ["two"]
    assert [(row["title"], row.get("reason")) for row in found[0]] == [
        ("one", None),
        ("two", "failed: RuntimeError: no compiler"),
        ("three", "left out: no time was left"),
    ]
    entry = json.loads(on_gpu.read_text())["benchmarks"]["device"]
    assert entry["machine"]["device"] == "Some GPU 80GB" and entry["date"]
    assert entry["machine"]["platform"] == "cuda 13" and entry["machine"]["jax"]
    made = "\n".join(table.make_table(results.read(on_gpu)))
    assert "| one | " in made and " (tokamax) | " in made and "2 TFLOP/s, 4 GB/s" in made
    assert "| two | failed: RuntimeError: no compiler |" in made


def test_without_a_gpu_it_says_what_it_is_for(monkeypatch, tmp_path):
    monkeypatch.setattr(device_run, "comparisons", lambda quick: [])
    monkeypatch.setattr(device_run, "measure_ceilings", lambda quick, **_: CEILINGS)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    with pytest.raises(InputError, match="--device measures a GPU, and JAX sees 'cpu'; .* --quick"):
        device_run.measure_all(False, time.monotonic() + 1e3)


def run(*options: str, python: tuple[str, ...] = ()) -> Any:
    command = [sys.executable, *python, "-m", "benchmarks", "--device", *options]
    env = {**ON_CPU, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_other_options_and_missing_packages_are_told_in_one_line():
    for done, told in (
        (run("--only=training"), "error: --only with --device; expected --device alone or with"),
        (run(python=("-S",)), "error: jax, numpy, absl-py, chex, einops, flax, jaxtyping, "),
    ):
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.startswith(told) and done.stderr.count("\n") == 1
