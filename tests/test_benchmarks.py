"""The harness of the benchmarks, on arms that cost nothing; and what each benchmark is made of."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import arms
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import (
    BENCHMARKS,
    device,
    jpegs,
    results,
    results_page,
    step_profile,
    table,
    worker,
)
from benchmarks.comparison import Arm, Comparison
from benchmarks.harness import Disagreement, Skipped, measure
from benchmarks.worker import ArmFailed
from slam_jax import Inputs, SlamV3, SlamV3Config
from slam_jax.errors import InputError

pytestmark = pytest.mark.release

DOCS = Path(__file__).parents[1] / "docs"


def compare(*given: Arm, **changes: Any) -> Comparison:
    return Comparison("a row", given, **{"tolerance": 0.1, **changes})


def fresh(ours: float, theirs: float, **changes: Any) -> Comparison:
    aim = changes.pop("aim", 1.0)
    return compare(
        Arm("ours", arms.figure, {"value": ours}),
        Arm("theirs", arms.figure, {"value": theirs}, aim=aim),
        fresh=True,
        **changes,
    )


def test_a_ratio_is_theirs_over_ours_with_its_aim_and_every_round():
    row = measure(fresh(2.0, 5.0, aim=3.0, unit="MiB"), rounds=2)
    assert row["arms"]["ours"] == {"median": 2, "least": 2, "most": 2, "n": 2, "shares": {}}
    ratio = row["arms"]["theirs"]["ratio"]
    assert ratio == {"aim": 3, "median": 2.5, "least": 2.5, "most": 2.5, "n": 2}
    assert row["difference"] == 0 and "ratio" not in row["arms"]["ours"]


def test_arms_that_stay_are_timed_in_every_round_and_told_as_shares_of_the_ceilings():
    same = {"values": [1.0, 2.0]}
    given = compare(
        Arm("ours", arms.numbers, same),
        Arm("theirs", arms.numbers, {"values": [1.0, 2.05]}),
        flops=6.0,
        bytes_moved=8.0,
    )
    row = measure(given, 3, {"matmul_flops": 2.0, "copy_bytes": 4.0})
    assert row["difference"] == pytest.approx(0.05)
    for arm in row["arms"].values():
        assert arm["n"] == 3 and 0 < arm["least"] <= arm["median"] <= arm["most"]
        assert arm["shares"]["matmul"] == pytest.approx(3 / arm["median"])
        assert arm["shares"]["copy"] == pytest.approx(2 / arm["median"])


@pytest.mark.parametrize("theirs", [[1.0, 2.2], [1.0, float("nan")], [1.0]])
def test_outputs_that_differ_are_told_and_nothing_is_timed(theirs):
    pair = [Arm("ours", arms.numbers, {"values": [1.0, 2.0]})]
    pair.append(Arm("theirs", arms.numbers, {"values": theirs}))
    with pytest.raises(Disagreement, match="theirs"):
        measure(compare(*pair), 1)


def test_calls_that_go_apart_after_the_first_are_told():
    pair = [Arm("ours", arms.counting, {"start": 1}), Arm("theirs", arms.numbers, {"values": 1.0})]
    assert measure(compare(*pair), 1)["difference"] == 0
    with pytest.raises(Disagreement, match="theirs: output 2 differs by up to 1, tolerance 0.1"):
        measure(compare(*pair, checked=2), 1)


@pytest.mark.parametrize(
    ("build", "reason"), [("failing", "RuntimeError: no compiler"), ("dying", "exit code 3")]
)
def test_a_peer_that_fails_is_left_out_with_its_reason_and_ours_is_not(build, reason):
    broken, whole = getattr(arms, build), Arm("ours", arms.numbers, {"values": [1.0]})
    row = measure(compare(whole, Arm("theirs", broken)), 1)
    assert list(row["arms"]) == ["ours"] and reason in row["left_out"]["theirs"]
    assert row["difference"] is None
    with pytest.raises(ArmFailed, match=reason):
        measure(compare(Arm("ours", broken), Arm("theirs", arms.numbers, {"values": [1.0]})), 1)


def test_a_peer_that_fails_while_it_is_timed_is_left_out_too_and_ours_is_not():
    """Call 7 is in the second round: of outputs there is one, and of each round four."""
    whole, broken = (arms.numbers, {"values": [1.0]}), (arms.failing_at, {"call": 7})
    row = measure(compare(Arm("ours", *whole), Arm("theirs", *broken)), 2)
    assert list(row["arms"]) == ["ours"] and row["arms"]["ours"]["n"] == 2
    assert row["left_out"] == {"theirs": "RuntimeError: no memory"}
    with pytest.raises(ArmFailed, match="no memory"):
        measure(compare(Arm("ours", *broken), Arm("theirs", *whole)), 2)


def test_what_torch_computes_on_a_gpu_is_waited_for(monkeypatch):
    waited = []
    cuda = types.SimpleNamespace(synchronize=lambda: waited.append(True))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    for is_cuda, expected in ((False, []), (True, [True])):
        output = types.SimpleNamespace(is_cuda=is_cuda)
        assert worker._wait(output) is output and waited == expected


def test_a_comparison_without_its_peer_is_skipped_with_what_is_missing():
    pair = [Arm("ours", arms.dying), Arm("theirs", arms.dying, needs=["no_such_library"])]
    with pytest.raises(Skipped, match="theirs needs no_such_library"):
        measure(compare(*pair), 1)


def test_every_arm_has_a_process_and_an_environment_of_its_own():
    pair = [
        Arm(name, arms.surroundings, environment={"MEANT_FOR_ONE_ARM": value})
        for name, value in (("ours", "1"), ("theirs", "1.05"))
    ]
    row = measure(compare(*pair, fresh=True), 1)
    processes = {arm["median"] for arm in row["arms"].values()} | {os.getpid()}
    assert len(processes) == 3 and row["difference"] == pytest.approx(0.05)
    assert "MEANT_FOR_ONE_ARM" not in os.environ


# --- Figures and table


@pytest.fixture(scope="module")
def entry() -> Any:
    rows = [measure(fresh(2.0, theirs), 1) for theirs in (1.0, 8.0)]
    ceilings = {"matmul_flops": 1e11, "matmul_by": "xla", "copy_bytes": 1e10, "copy_by": "torch"}
    return results.make_entry("a title", rows, ceilings, middle_aim=2.5)


def test_new_figures_replace_those_of_their_benchmark_alone(entry, tmp_path):
    file = tmp_path / "machine.json"
    for name, title in (("standard", "first"), ("jamba", "other"), ("standard", "second")):
        results.keep(file, name, {**entry, "title": title})
    kept = json.loads(file.read_text())["benchmarks"]
    assert {name: each["title"] for name, each in kept.items()} == {
        "standard": "second",
        "jamba": "other",
    }
    file.write_text("[]")
    with pytest.raises(InputError, match=r"machine\.json: expected the figures"):
        results.read(file)


def table_of(name: str, entry: Any) -> str:
    return "\n".join(table.make_table({"benchmarks": {name: entry}}))


def test_the_table_has_every_row_and_marks_what_falls_short_or_was_not_measured(entry):
    made = table_of("standard", entry)
    assert "| jamba |  |  | not measured |  |" in made and "| standard |  |  |" not in made
    assert "| a row | theirs | 1x | **0.50x** (0.50 to 0.50) | 2 s | 1 s |" in made
    assert "| a row | theirs | 1x | 4.00x (4.00 to 4.00) | 2 s | 8 s |" in made
    assert "| standard, the median of its 2 ratios |  | 2.5x | **2.25x** |" in made
    assert f"| {entry['machine']['slam_jax']} | {entry['date']} |" in made


def test_the_table_of_a_machine_has_the_benchmarks_for_such_a_machine(entry):
    made = table_of("training", entry)
    assert "| decoding |  |  | not measured |  |" in made and "| jamba |" not in made
    assert "| decoding |" not in table_of("standard", entry)


def test_figures_are_kept_by_processor_or_by_gpu(monkeypatch):
    machine = {"processor": "AMD EPYC", "cores": 2, "device": "cpu"}
    monkeypatch.setattr(results, "describe_machine", lambda: machine)
    assert results.machine_file().name == "amd-epyc-2-cores.json"
    machine["processor"] = "Intel(R) Xeon(R) Processor"
    assert results.machine_file().name == "intel-xeon-processor-2-cores.json"
    machine["device"] = "NVIDIA H100 80GB HBM3"
    assert results.machine_file().name == "nvidia-h100-80gb-hbm3.json"
    assert results.place(machine) == "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("platform", "torch_sees", "told"),
    [
        ("cpu", True, None),
        ("gpu", True, None),
        ("gpu", False, "torch sees no GPU"),
        ("tpu", True, "kind; expected a CPU or a GPU"),
    ],
)
def test_all_libraries_have_the_same_device(monkeypatch, platform, torch_sees, told):
    found = types.SimpleNamespace(platform=platform, device_kind="kind")
    cuda = types.SimpleNamespace(is_available=lambda: torch_sees)
    monkeypatch.setattr(jax, "devices", lambda: [found])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    if told is not None:
        with pytest.raises(InputError, match=told):
            device.settle()
        return
    assert device.settle() == ("kind" if platform == "gpu" else "")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("0" if platform == "gpu" else "")


def test_what_is_for_a_gpu_is_refused_on_a_cpu():
    command = [sys.executable, "-m", "benchmarks", "--only=training"]
    done = subprocess.run(
        command, cwd=DOCS.parent, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True
    )
    told = done.stderr.decode()
    assert done.returncode == 2 and not done.stdout
    assert "--only has 'training', which is for a GPU; here are standard, bf" in told


def test_the_page_has_the_figures_of_every_machine_and_every_table(entry, tmp_path, monkeypatch):
    monkeypatch.setattr(results_page, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(results_page, "DOCS", tmp_path)
    with pytest.raises(InputError, match="no figures"):
        results_page.write()
    results.keep(tmp_path / "results" / "machine.json", "standard", entry)
    runs = {"title": "Runs", "columns": ["score"], "rows": [["3"]]}
    found = {"title": "A run", "command": "make it", "text": "Text.", "tables": [runs]}
    for name, more in (("one", {}), ("two", {"machine": "M", "version": "1", "date": "today"})):
        text = json.dumps({**found, "tables": [{**runs, **more}]})
        (tmp_path / "results" / f"{name}.json").write_text(text)
    results_page.write()
    page = (tmp_path / "results.md").read_text()
    assert "### machine" in page and "4.00x" in page
    assert "| score |\n| --- |\n| 3 |\n" in page and "| 3 | M | 1 | today |" in page
    assert (tmp_path / "results.png").stat().st_size > 0
    (tmp_path / "results" / "one.json").write_text("{")
    with pytest.raises(InputError, match=r"one\.json: expected JSON with tables"):
        results_page.write()


def test_the_committed_page_is_that_of_the_committed_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(results_page, "DOCS", tmp_path)
    monkeypatch.setattr(results_page, "draw", lambda *_: None)
    results_page.write()
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text()


# --- The benchmarks themselves


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_arm_of_every_benchmark_can_be_called_as_it_will_be(
    name, quick, tmp_path, monkeypatch
):
    monkeypatch.setattr("benchmarks.sizes.in_process", lambda *_, **__: None)  # no weights
    monkeypatch.setattr("benchmarks.worker.in_process", lambda *_, **__: None)
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(module, "in_process", lambda *_, **__: None, raising=False)
    made = list(module.comparisons(quick, str(tmp_path)))
    assert made and len({comparison.title for comparison in made}) == len(made)
    for comparison in made:
        assert comparison.tolerance is not None or comparison.unchecked
        assert comparison.arms[0].aim is None
        for arm in comparison.arms:
            inspect.signature(arm.build).bind(**arm.given)
            assert getattr(importlib.import_module(arm.build.__module__), arm.build.__name__)


def test_the_page_says_what_each_benchmark_is():
    page = (DOCS / "speed.md").read_text()
    assert [name for name in BENCHMARKS if f"| `{name}` |" not in page] == []


def test_a_profile_has_each_operation_once_by_the_file_that_asked_for_it(tmp_path):
    model = SlamV3(SlamV3Config.preset("tiny", vocab_size=11), rngs=nnx.Rngs(0))
    text = jnp.ones((2, 5), jnp.int32)

    def in_turn(model, text):
        logits = [model(text, Inputs(text=text)).logits for _ in range(2)]
        return jax.lax.map(lambda row: jnp.sort(row, axis=-1), jnp.stack(logits))

    program = jax.jit(in_turn).lower(model, text).compile()
    jax.block_until_ready(program(model, text))
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(program(model, text))
    written = str(program.as_text())
    spent = step_profile.by_part(str(tmp_path), written)
    files = {"decoder", "fusion", "model", "processes", "streams"}
    assert {f"slam_v3/{name}.py" for name in files} <= set(spent)
    assert spent["elsewhere"] > 0 and min(spent.values()) > 0
    # The loop has an event of its own, and so has what it repeats.
    loops = re.findall(r"%(\S+) = .* while\(", written)
    assert loops and not set(loops) & set(step_profile.parts_of(written))


def test_a_language_model_is_profiled_by_its_layers(capsys):
    step_profile.language_model("standard", preset="tiny", length=8)
    title, *parts = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"standard, training step 8 x 8: \d+ ms", title)
    shares = {part: float(share.rstrip("%")) for share, part in map(str.split, parts)}
    assert sum(shares.values()) == pytest.approx(100, abs=0.1 * len(shares))
    assert {"layers/linear.py", "layers/attention.py", "training/state.py"} <= shares.keys()


# --- One version against another


def test_our_arms_alone_run_in_both_versions_and_their_rows_are_stored(tmp_path, monkeypatch):
    other = tmp_path / "other"
    (other / "slam_jax").mkdir(parents=True)
    (other / "slam_jax" / "version.py").write_text('__version__ = "0.0.9"\n')
    # The other version's `figure` is five times as large, whatever it is called with.
    text = "from benchmarks.comparison import Measured\n\n\ndef figure(value, output=0.0):\n"
    (other / "arms.py").write_text(text + "    return Measured(output, 5 * value)\n")
    peer = Arm("peer", arms.dying, needs=["no_such_library"])
    whole = compare(Arm("ours", arms.figure, {"value": 2.0}), peer, fresh=True)
    (pair,) = whole.between_versions(str(other))
    row = measure(pair, 1)
    assert row["title"] == "a row: ours" and row["arms"]["other version"]["ratio"]["median"] == 5

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert results.version_of(str(other)) == "0.0.9"
    for title in ("a row", "a row", "another"):
        entry = results.make_entry("", [{**row, "title": title}], {}, None)
        results.keep_versions(entry, "0.0.9")
    rows = json.loads((tmp_path / "versions.json").read_text())["tables"][0]["rows"]
    assert [each[:4] for each in rows] == [
        [title, "5.00x (5.00 to 5.00)", "2 s", "10 s"] for title in ("a row", "another")
    ]
    assert rows[0][6] == "0.0.9"
    # A row against another version is one more; a row whose earlier arm failed is left out.
    alone = {**row, "title": "alone", "arms": {"ours": row["arms"]["ours"]}}
    entry = results.make_entry("", [{**row, "title": "a row"}, alone], {}, None)
    results.keep_versions(entry, "0.0.8")
    rows = json.loads((tmp_path / "versions.json").read_text())["tables"][0]["rows"]
    assert [(each[0], each[6]) for each in rows] == [
        ("a row", "0.0.9"),
        ("another", "0.0.9"),
        ("a row", "0.0.8"),
    ]
    (tmp_path / "versions.json").write_text('{"tables": []}')
    with pytest.raises(InputError, match="expected rows that compare two versions"):
        results.keep_versions(entry, "0.0.8")
    with pytest.raises(InputError, match="expected a checkout of another version"):
        results.version_of(str(tmp_path))


def test_pictures_are_counted_until_they_are_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(jpegs, "BATCH", 4)
    monkeypatch.setattr(jpegs, "_MADE_AHEAD", 1)
    assert jpegs.write(tmp_path, 22) > 10_000  # bytes, as photographs of this size have
    rate, batch = jpegs.measure(tmp_path, SlamV3Config.preset("base", 512), workers=0)
    assert rate > 0 and batch.inputs.image.shape == (4, 224, 224, 3)
