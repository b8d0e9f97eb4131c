"""Signals are answered at any moment, and the exit code says whether the steps taken are saved."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slam_jax.runtime.signals import INTACT, SAVED, Stop
from slam_jax.training import Checkpoints

pytestmark = pytest.mark.usefixtures("signals_heard")

# What a run does, without what takes seconds: no JAX.
SCRIPT = """
import hashlib, sys, time
from slam_jax.runtime import cli
from slam_jax.runtime.signals import Stop, Stopped

def compute():  # one call of a library, as a compilation is
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)

def main(arguments):
    stop = Stop(grace_seconds=3.0)
    stop.listen()
    where = arguments[0]
    if where != "start-up":
        stop.expect_save()
    print("ready", flush=True)
    if where in ("start-up", "evaluation"):
        compute()
    while not stop.requested:
        time.sleep(0.01)
    if where == "save":
        time.sleep(2.0)
    raise Stopped("step 5 is saved")

cli.run(main)
"""


def start(where, *, shell="exec"):
    process = subprocess.Popen(
        ["sh", "-c", f'{shell} "$@"', "-", sys.executable, "-c", SCRIPT, where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process):
    _, err = process.communicate(timeout=20)
    assert "Traceback" not in err
    return process.returncode, err.splitlines()


AGAIN = "stopped: {}; the same command continues, from the last checkpoint if there is one"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_has_the_step_saved(number):
    process = start("step")
    process.send_signal(number)
    asked = f"{number.name}: saving; send it again to end without saving"
    assert end(process) == (SAVED, [asked, "stopped: step 5 is saved"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_before_the_first_step_a_signal_ends_the_run_at_once(number):
    process = start("start-up")
    process.send_signal(number)
    assert end(process) == (INTACT, [AGAIN.format("no step was taken")])


def test_where_nobody_looks_the_run_ends_after_the_grace():
    process = start("evaluation")
    process.send_signal(signal.SIGTERM)
    code, said = end(process)
    assert code == INTACT
    assert said[1:] == [AGAIN.format("not saved within 3 s")]


def test_two_signals_of_one_event_are_one():
    """A terminal that is closed sends SIGHUP twice."""
    process = start("save")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    process.send_signal(signal.SIGHUP)
    assert end(process)[0] == SAVED


def test_a_second_signal_ends_the_run_without_a_save():
    process = start("save")
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    process.send_signal(signal.SIGINT)
    code, said = end(process)
    assert code == INTACT
    assert said[1:] == [AGAIN.format("not saved")]


def test_ignored_signals_stay_ignored():
    """As nohup does with SIGHUP."""
    process = start("step", shell='trap "" HUP; exec')
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == SAVED


def test_a_program_may_ask_without_any_signal():
    stop = Stop()
    assert not stop.requested
    stop.request()
    assert stop.requested


PREEMPTED = """
import os, signal, sys
import jax
jax.distributed.initialize("localhost:" + sys.argv[3], num_processes=1, process_id=0)
from slam_jax.runtime.signals import Stop, Stopped
from slam_jax.training import override, read_config, slam_v3_task, train
made = slam_v3_task.training_batches

def notified(*args, **more):
    for at, batch in enumerate(made(*args, **more), 1):
        if at == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # what JAX takes as the cluster's notice
        yield batch

slam_v3_task.training_batches = notified
config = override(read_config(sys.argv[1]), ["--config.run.num_steps=2000"])
stop = Stop()
try:
    train(config, sys.argv[2], stop)
except Stopped as stopped:
    print(stopped)
os._exit(0)
"""


@pytest.mark.slow
def test_a_notice_of_preemption_is_a_request_to_stop(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    config = Path(__file__).parent / "configs" / "small_run.py"
    done = subprocess.run(
        [sys.executable, "-c", PREEMPTED, config, tmp_path, port],
        capture_output=True,
        text=True,
        timeout=300,
    )
    step = Checkpoints(tmp_path).steps()[-1]
    assert f"step {step:,} is saved" in done.stdout, done.stderr
    assert 2 <= step < 2000
