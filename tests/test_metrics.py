"""The metrics file has no gap, no double line and no invalid one; progress shows what it says."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import full_disk
from rich.console import Console

from slam_jax.errors import WriteError
from slam_jax.runtime import devices
from slam_jax.runtime.devices import peak_flops
from slam_jax.training import metrics, tracking
from slam_jax.training import progress as progress_module
from slam_jax.training.metrics import MetricsWriter, read_metrics
from slam_jax.training.progress import Progress


def strict(text):
    def refuse(constant):
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_the_evaluation_that_is_still_owed_is_dropped(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, "speed", {"mfu": 0.4})
            writer.write(step, "train", {"loss": 1.0})
            writer.write(step, "validation", {"accuracy": 0.5})
    with MetricsWriter(tmp_path, 2, evaluated=False):
        pass
    kept = [(record["step"], record["split"]) for record in read_metrics(tmp_path)]
    speed_too = [(1, "speed"), (1, "train"), (1, "validation"), (2, "speed"), (2, "train")]
    assert kept == speed_too


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(WriteError, match=r"metrics.jsonl: could not be written \(File too large"):  # noqa: SIM117
        with full_disk(0), MetricsWriter(tmp_path) as writer:
            writer.write(1, "train", {"loss": 1.0})


def test_records_are_valid_json_and_can_be_read_while_writing(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, "train", {"loss": np.float32(0.5), "nan": float("nan")})
        writer.write(2, "validation", {"up": np.inf, "down": -np.inf})
        expected = [
            {"step": 1, "split": "train", "loss": 0.5, "nan": None},
            {"step": 2, "split": "validation", "up": None, "down": None},
        ]
        assert read_metrics(tmp_path / "run") == expected
        assert strict((tmp_path / "run" / "metrics.jsonl").read_text()) == expected


@pytest.mark.parametrize("torn", ["", '{"step": 7, "spl', '{"step": 3, "split": "train"}'])
def test_a_resumed_run_writes_the_same_file_as_an_unbroken_one(tmp_path, torn):
    def records(first, last):
        return [(s, "train", {"loss": 1 / s}) for s in range(first, last + 1)]

    with MetricsWriter(tmp_path / "whole") as writer:
        for record in records(1, 9):
            writer.write(*record)
    with MetricsWriter(tmp_path / "broken") as writer:
        for record in records(1, 6):
            writer.write(*record)
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:
        file.write(torn)
    with MetricsWriter(tmp_path / "broken", resume_step=4) as writer:
        for record in records(5, 9):
            writer.write(*record)
    whole, broken = (tmp_path / run / "metrics.jsonl" for run in ("whole", "broken"))
    assert broken.read_bytes() == whole.read_bytes()
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["metrics.jsonl"]


def test_tensorboard_gets_every_record(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path, trackers=["tensorboard"]) as writer:
        writer.write(1, "train", {"loss": 0.5})
        writer.write(1, "validation", {"accuracy": 0.25})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert all(name in events.read_bytes() for name in (b"train/loss", b"validation/accuracy"))


def test_tensorboard_without_its_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"tensorboardX.*slam_jax\[tracking\]") as error:
        MetricsWriter(tmp_path / "run", trackers=["tensorboard"])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def track(name, workdir):
    """A run of two processes, of which the second repeats a step."""
    config = {"data": {"batch_size": 8}, "seed": 0}
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with MetricsWriter(workdir, first, trackers=[name], config=config) as writer:
            for step in steps:
                writer.write(step, "train", {"loss": 1 / step, "view": "image"})
            writer.write(steps[-1], "validation", {"accuracy": 0.5, "odd": float("nan")})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader")
def test_mlflow_has_one_run_with_every_number(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = pytest.importorskip("mlflow.tracking").MlflowClient
    track("mlflow", tmp_path)
    client = client(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    [experiment] = [e for e in client.search_experiments() if e.name == "slam_jax"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"data.batch_size": "8", "seed": "0"}
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [
        (step, 1 / step) for step in (1, 2, 3, 3, 4)
    ]
    assert run.data.metrics == {"train/loss": 0.25, "validation/accuracy": 0.5}


@pytest.mark.release
def test_wandb_writes_one_run_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    track("wandb", tmp_path)
    known = json.loads((tmp_path / "wandb.json").read_text())["id"]
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs and {path.name.rpartition("-")[2] for path in runs} == {known}
    assert b"train/loss" in b"".join(
        path.read_bytes() for path in (tmp_path / "wandb").rglob("*.wandb")
    )


def test_a_tracker_that_fails_ends_and_the_file_goes_on(tmp_path, monkeypatch, caplog):
    class Broken:
        def __init__(self, *given):
            pass

        def log(self, step, numbers):
            raise OSError("the server is gone")

        def close(self):
            pass

    monkeypatch.setitem(tracking.TRACKERS, "wandb", Broken)
    monkeypatch.setattr(metrics, "require_packages", lambda names: None)
    with MetricsWriter(tmp_path, trackers=["wandb"]) as writer:
        for step in (1, 2):
            writer.write(step, "train", {"loss": 0.5})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert caplog.text.count("Broken failed and ends: the server is gone") == 1


def test_a_change_is_written_once(tmp_path):
    for _ in range(2):  # killed before the next checkpoint
        with MetricsWriter(tmp_path, 4) as writer:
            writer.write_change(4, "run.num_steps 4 -> 8")
            writer.write_change(4, "")
    assert read_metrics(tmp_path) == [
        {"step": 4, "split": "change", "text": "run.num_steps 4 -> 8"}
    ]


def run_progress(monkeypatch, console, **options):
    clock = iter(range(1000))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock) / 2)
    with Progress(240, first_step=120, every=50, console=console, **options) as progress:
        for step in range(121, 241):
            progress.update(step, loss=1 / step, examples=64, tokens=6400, view="image")
            if step == 160:
                progress.log("saved [best] 3/4")


def test_without_a_terminal_there_are_plain_lines(monkeypatch):
    out = io.StringIO()
    run_progress(monkeypatch, Console(file=out, width=40, soft_wrap=True, highlight=False))
    rates = "128 examples/s · 1.3e4 tokens/s"
    assert out.getvalue().splitlines() == [
        f"step 150/240 · view image · loss 0.007 · {rates} · ETA 0:45",
        "saved [best] 3/4",
        f"step 200/240 · view image · loss 0.005 · {rates} · ETA 0:20",
        f"step 240/240 · view image · loss 0.004 · {rates} · ETA 0:00",
    ]


def test_speed_is_that_of_training_alone(monkeypatch):
    """Two devices of a known kind; a step of 0.5 s after 20 s of compiling and 10 of a pause."""
    now = [0.0]
    device = SimpleNamespace(
        device_kind="NVIDIA H200", memory_stats=lambda: {"peak_bytes_in_use": 3 << 30}
    )
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(devices.jax, "devices", lambda: [device] * 2)
    monkeypatch.setattr(devices.jax, "local_devices", lambda: [device])
    out = io.StringIO()
    console = Console(file=out, width=40, soft_wrap=True, highlight=False)
    with Progress(9, every=1, console=console, peak_flops=peak_flops()) as progress:
        with progress.compiling("image"):
            now[0] += 20
        with progress.compiling("text"):
            pass
        with progress.paused():
            now[0] += 10
        now[0] += 0.5
        progress.update(1, loss=1.0, examples=4, tokens=60, flops=395_600_000_000_000)
    assert progress.speed() == {
        "step_seconds": 0.5,
        "examples_per_second": 8.0,
        "tokens_per_second": 120.0,
        "compile_seconds": 20.0,
        "mfu": pytest.approx(0.4),
        "peak_memory_bytes": 3 << 30,
    }
    assert out.getvalue().splitlines() == [
        "compiling the training step; this can take minutes for a large model",
        "view image: compiled in 20.0 s",
        "view text: compiled in 0.0 s",
        "step 1/9 · loss 1.000 · 8 examples/s · 120 tokens/s · MFU 40% · 3.0 GiB · ETA 0:04",
    ]
    device.device_kind = "cpu"
    assert peak_flops() is None


def test_on_a_terminal_the_bar_ends_whole_and_lines_stand_above_it(monkeypatch):
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, width=120, color_system=None, legacy_windows=False
    )
    run_progress(monkeypatch, console)
    lines = out.getvalue().splitlines()
    assert any("saved [best] 3/4" in line for line in lines)
    assert "step 150/240 · " not in out.getvalue()
    last = [line for line in lines if "step 240/240" in line][-1]
    assert last.rstrip().endswith("1.3e4 tokens/s · ETA 0:00")


def test_a_terminal_without_unicode_is_no_crash(monkeypatch):
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    with Progress(2, every=1, console=Console(file=out, width=80)) as progress:
        progress.update(1, loss=0.5, view="image")
        progress.log("é · ok")
    assert raw.getvalue().decode("ascii").splitlines()[-1] == "? | ok"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (59.6, "1:00"), (372.0, "6:12"), (36_061.0, "10:01:01")]
)
def test_remaining_time(seconds, text):
    assert progress_module._clock(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(0.52, "0.52"), (9.4, "9.4"), (99.6, "100"), (13_200.0, "1.3e4")]
)
def test_rates_are_short(rate, text):
    assert progress_module._rate(rate) == text


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text):
        raise OSError("gone")

    def flush(self):
        raise OSError("gone")


@pytest.mark.parametrize("stream", [Gone(), None])
def test_a_run_outlives_its_terminal(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    with Progress(2, every=1) as progress:
        progress.log("text")
        progress.update(2, loss=1.0)
    progress_module.log_early("text")


@pytest.mark.parametrize(("is_first", "shown"), [(True, "text\n"), (False, "")])
def test_the_first_process_alone_prints_early_lines(monkeypatch, capsys, is_first, shown):
    monkeypatch.setattr(progress_module, "is_first_process", lambda: is_first)
    progress_module.log_early("text")
    assert capsys.readouterr().out == shown
