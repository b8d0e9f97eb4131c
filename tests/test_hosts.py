"""Several processes that are one run: the same run as one alone, and what ends it ends them all."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bases import write_language_model

from slam_jax.errors import UserError
from slam_jax.runtime import distributed
from slam_jax.runtime.supervisor import is_supervised
from slam_jax.training import Checkpoints
from slam_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "tests" / "configs" / "small_run.py"


def command(workdir: Path, changes: dict[str, object]) -> list[str]:
    arguments = [f"--config.{field}={value}" for field, value in changes.items()]
    start = [sys.executable, "train.py", f"--config={CONFIG}", f"--workdir={workdir}"]
    return [*start, *arguments]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def processes(
    count: int, workdir: Path, changes: dict[str, object]
) -> Iterator[list[subprocess.Popen]]:
    """So many processes of one run on this machine; killed at the end if they still run."""
    together = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    started = [
        subprocess.Popen(
            [*command(workdir, changes), *together, f"--process_id={i}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def run(count: int, workdir: Path, changes: dict[str, object]) -> None:
    with processes(count, workdir, changes) as started:
        said = [process.communicate(timeout=540)[0] for process in started]
        assert [process.returncode for process in started] == [0] * count, "\n".join(said)


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["total"]) for r in read_metrics(workdir) if r["split"] == "train"]


def wait_for(step: int, workdir: Path) -> None:
    end = time.monotonic() + 240
    while not (steps := Checkpoints(workdir).steps()) or steps[-1] < step:
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def changes(tmp_path_factory) -> dict[str, object]:
    return {
        "data.data_dir": tmp_path_factory.mktemp("data"),
        "run.num_steps": 9,
        "run.evaluate_every": 9,
        "run.save_every": 3,
        "run.keep_every": 3,
    }


@pytest.fixture(scope="module")
def alone(changes, tmp_path_factory) -> Path:
    """The run of one process, unbroken."""
    workdir = tmp_path_factory.mktemp("alone")
    subprocess.run(command(workdir, changes), cwd=ROOT, check=True, capture_output=True)
    return workdir


def long(changes: dict[str, object]) -> dict[str, object]:
    return {**changes, "run.num_steps": 100_000, "run.evaluate_every": 100_000}


@pytest.mark.slow
def test_two_processes_are_the_run_of_one(changes, alone, tmp_path):
    run(2, tmp_path, changes)
    ours, theirs = losses(tmp_path), losses(alone)
    assert [step for step, _ in ours] == list(range(1, 10))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert Checkpoints(tmp_path).steps() == [3, 6, 9]
    scores, whole = (Checkpoints(path).read_metrics(9) for path in (tmp_path, alone))
    assert scores == pytest.approx(whole, abs=0.05) and scores.keys() == whole.keys()


@pytest.mark.slow
def test_two_processes_on_published_parts_are_the_run_of_one(changes, tmp_path):
    """Each process reads its part of a frozen language model, and of the weights to begin with."""
    write_language_model(tmp_path / "lm")
    changes = {
        **changes,
        "run.num_steps": 3,
        "run.evaluate_every": 3,
        "run.evaluate_batches": 1,
        "mesh.data": 1,
        "mesh.fsdp": -1,
        "model.decoder.pretrained": tmp_path / "lm",
        "model.lora.rank": 2,
        "model.lora.patterns": '("decoder/language_model/blocks/*/mlp",)',
    }
    run(1, tmp_path / "alone", {**changes, "mesh.data": -1, "mesh.fsdp": 1})
    run(2, tmp_path / "both", changes)
    begin = {"run.init_from": tmp_path / "alone"}
    run(1, tmp_path / "next_alone", {**changes, **begin, "mesh.data": -1, "mesh.fsdp": 1})
    run(2, tmp_path / "next", {**changes, **begin})
    for ours, theirs in (("both", "alone"), ("next", "next_alone")):
        found = losses(tmp_path / ours)
        assert [step for step, _ in found] == [1, 2, 3]
        np.testing.assert_allclose(found, losses(tmp_path / theirs), rtol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(changes, alone, tmp_path):
    # 2, then 4 of which each two run two of the four parallel processes, then 1.
    run(2, tmp_path, changes)
    for count, kept, more in ((4, 3, {"mesh.process": 2}), (1, 6, {})):
        checkpoints = Checkpoints(tmp_path)
        for step in checkpoints.steps():
            if step > kept:
                shutil.rmtree(checkpoints.directory / str(step))
        if count > 1:
            run(count, tmp_path, {**changes, **more})
        else:
            subprocess.run(command(tmp_path, changes), cwd=ROOT, check=True, capture_output=True)
    # The same examples in the same order, or the losses would be others.
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_others_end_and_the_run_goes_on(changes, tmp_path, victim):
    with processes(2, tmp_path, long(changes)) as started:
        wait_for(3, tmp_path)
        started[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        other = started[1 - victim]
        said = other.communicate(timeout=60)[0]
        assert time.monotonic() - killed < 15 and other.returncode == 76
    assert "is gone" in said and "the same command on all processes resumes" in said
    saved = Checkpoints(tmp_path).recover(print)
    assert saved is not None
    with processes(2, tmp_path, long(changes)):
        wait_for(saved + 3, tmp_path)
    steps = [step for step, _ in losses(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
@pytest.mark.usefixtures("signals_heard")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_to_one_makes_all_save_the_same_step(changes, tmp_path, name):
    with processes(2, tmp_path, {**long(changes), "run.save_every": 10_000}) as started:
        end = time.monotonic() + 240
        while not losses(tmp_path):
            assert time.monotonic() < end, "no step was taken"
            time.sleep(0.2)
        started[1].send_signal(signal.Signals[name])
        said = [process.communicate(timeout=60)[0] for process in started]
        assert [process.returncode for process in started] == [75, 75], "\n".join(said)
    [step] = Checkpoints(tmp_path).steps()
    assert all(f"stopped: step {step:,} is saved" in text for text in said)


# Two processes of three devices: the rows of one lie between those of the other, as they may on a
# TPU; then the third and fourth row belong to both.
ROWS = """
import sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from slam_jax.training.sharding import local_rows, place
devices, kinds = np.array(jax.devices()), ("data", "fsdp", "process", "tensor")
whole = np.arange(12).reshape(6, 2)
for mesh, expected in (
    (devices[[0, 3, 1, 4, 2, 5]].reshape(6, 1, 1, 1), [[0, 2, 4], [1, 3, 5]]),
    (devices.reshape(3, 1, 1, 2), [[0, 1, 2, 3], [2, 3, 4, 5]]),
):
    mesh = jax.sharding.Mesh(mesh, kinds)
    rows = list(local_rows(6, mesh))
    assert rows == expected[jax.process_index()], rows
    placed = place(whole[rows], mesh, 6)
    assert placed.shape == whole.shape
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
"""


@pytest.mark.release
def test_each_process_gives_its_rows_wherever_they_are():
    address = f"127.0.0.1:{free_port()}"
    flags = "--xla_force_host_platform_device_count=3"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ROWS, address, str(i)],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)


def test_one_process_alone_decides_by_itself():
    assert distributed.is_first_process() and distributed.run_on_first(lambda: [1, "a"]) == [1, "a"]
    with pytest.raises(UserError, match="no"):
        distributed.run_on_first(lambda: (_ for _ in ()).throw(UserError("no")))
    with pytest.raises(ValueError, match="Connection"), distributed.explain_lost_peers():
        raise ValueError("Connection closed")  # there is nobody to lose
    assert distributed.to_host({"x": np.arange(3)})["x"].tolist() == [0, 1, 2]
    assert not is_supervised()


WATCHED = """
import os, sys
from slam_jax.runtime.supervisor import is_supervised, supervise
if not is_supervised():
    sys.exit(supervise())
{body}
"""


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("os.abort()", 76, "another process of the run, or its host, is gone"),
        ("os.kill(os.getpid(), 9)", 76, "this process was ended by SIGKILL"),
    ],
)
def test_the_one_above_says_how_it_ended(body, code, said, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WATCHED.format(body=body))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == code
    assert said in done.stderr and (not said or done.stderr.startswith("stopped: "))


@pytest.mark.release
def test_what_cannot_be_joined_is_told_in_a_line(tmp_path):
    asked = [*command(tmp_path, {}), "--distributed"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JAX_", "K"))}
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "error: could not join the other processes" in done.stderr
    assert done.stderr.count("\n") == 1
