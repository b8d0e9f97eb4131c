"""Disturbs runs at random (kills, stops, full disks, damaged files) and compares their results.

    python tests/soak.py --minutes=60 --seed=0 [--freeze decoder/layers/0 level_one]
                         [--lora decoder processes]

It ends when each kind of trial was done as often as TARGETS says, or when the time is up and each
was done once. It prints a table and exits with 1 if a trial failed. The trials use a run of 24
steps (configs/small_run.py) in processes of their own, started by train.py. With --freeze these
parameters are frozen in it, and with --lora these linear maps have adapters of rank 2.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import test_fuzz

from slam_jax.data import prepare, training_batches
from slam_jax.runtime.signals import INTACT, SAVED, SIGNALS
from slam_jax.slam_v3 import Inputs
from slam_jax.training import (
    CheckpointError,
    Checkpoints,
    Experiment,
    override,
    read_config,
    slam_v3_task,
    train,
)
from slam_jax.training.checkpoint.trees import by_name
from slam_jax.training.metrics import read_metrics
from slam_jax.training.slam_v3_task import SlamV3Task
from slam_jax.training.start import initial_state, jit_step

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "configs" / "small_run.py"
GRACE_S = 10.0
SLACK_S = 3.0  # for the machine to notice; it is a busy one
STARVE = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv[1]),))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Failure(Exception):
    """A trial did not give the expected result."""


def check(ok: bool, what: str) -> None:
    if not ok:
        raise Failure(what)


def as_bytes(array: Any) -> bytes:
    if jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array).tobytes()


def metrics_of(workdir: Path) -> list[bytes]:
    """The lines of the metrics file, without those of how fast the run was."""
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    return [line for line in lines if json.loads(line)["split"] != "speed"]


def same(a: Any, b: Any) -> bool:
    a, b = by_name(a), by_name(b)
    return a.keys() == b.keys() and all(as_bytes(a[name]) == as_bytes(b[name]) for name in a)


class Soak:
    """What the trials share: a folder, a finished reference run, and the run to disturb."""

    def __init__(
        self, folder: Path, seed: int, freeze: Sequence[str] = (), lora: Sequence[str] = ()
    ):
        self.folder = folder
        self.random = random.Random(seed)
        self.seed = seed
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.environment = {
            **os.environ,
            "PYTHONFAULTHANDLER": "1",
            "SLAM_JAX_DATA_DIR": str(folder / "data"),
            "SLAM_JAX_CACHE_DIR": str(folder / "xla"),
        }
        os.environ.update(self.environment)
        self.train = ["train.py", f"--config={CONFIG}"]
        if freeze:
            self.train.append(f"--config.optimizer.freeze={tuple(freeze)}")
        if lora:
            self.train += [f"--config.model.lora.{x}" for x in ("rank=2", f"patterns={(*lora,)}")]
        self.config = override(read_config(CONFIG), self.train[2:])
        self.reference = folder / "reference"
        self.states: dict[int, Any] = {}
        self.best = None
        self.metrics = b""
        self.run = 0
        self.interrupted: list[str] = []  # kinds of the trials on the current run

    # --- The reference, and comparisons with it

    def prepare(self) -> None:
        """Two unbroken runs, which must agree; the first keeps every checkpoint in memory."""
        save = Checkpoints.save

        def remember(checkpoints: Checkpoints, step: int, state: Any, **more: Any) -> bool:
            self.states[step] = jax.tree.map(jax.numpy.copy, state)
            return save(checkpoints, step, state, **more)

        Checkpoints.save = remember  # pyright: ignore[reportAttributeAccessIssue]
        try:
            # A save after every step, so that whatever step is saved later can be compared.
            every = {**self.config, "run": {**self.config["run"], "save_every": 1}}
            train(every, self.folder / "every")
        finally:
            Checkpoints.save = save
        check(self.start(self.reference).wait(300) == 0, "the reference run fails")
        self.metrics = metrics_of(self.reference)
        self.best = Checkpoints(self.reference).best()
        check(metrics_of(self.folder / "every") == self.metrics, "metrics")
        self.compare_checkpoints(self.reference)

    def compare_checkpoints(self, workdir: Path) -> list[int]:
        """All visible checkpoints are whole and those of the reference."""
        checkpoints = Checkpoints(workdir)
        damages = {step: damage for step, damage in checkpoints.verify().items() if damage}
        check(not damages, f"{workdir}: damaged {damages}")
        for step in checkpoints.steps():
            state = checkpoints.restore(step, self.states[step])
            check(same(state, self.states[step]), f"{workdir}: step {step} is another")
        return checkpoints.steps()

    def compare_finished(self, workdir: Path) -> None:
        steps = self.compare_checkpoints(workdir)
        check(max(steps) == self.config["run"]["num_steps"], f"{workdir}: not at its end")
        check(Checkpoints(workdir).best() == self.best, f"{workdir}: another best step")
        check(metrics_of(workdir) == self.metrics, f"{workdir}: other metrics")

    # --- Processes

    @property
    def workdir(self) -> Path:
        return self.folder / f"run{self.run}"

    def start(self, workdir: Path, *, cold: bool = False, **more: Any) -> subprocess.Popen:
        environment = dict(self.environment)
        if cold:
            cache = self.folder / "cold"
            shutil.rmtree(cache, ignore_errors=True)
            environment["SLAM_JAX_CACHE_DIR"] = str(cache)
        arguments = [*self.train, f"--workdir={workdir}"]
        with (self.folder / "out").open("wb") as out, (self.folder / "err").open("wb") as err:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=err,
                **more,
            )

    def starved(self, limit: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a program whose files may not grow over `limit` bytes; its streams are pipes."""
        return subprocess.run(
            [sys.executable, "-c", STARVE, str(limit), *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def phase(self, before: int) -> str:
        """What the process is doing, from what it has written so far."""
        if b"parameters on" not in (self.folder / "out").read_bytes():
            return "start-up"
        if list((self.workdir / "checkpoints").glob("*.writing")):
            return "save"
        records = read_metrics(self.workdir)
        if len(records) <= before:
            return "compile"
        last = records[-1]
        evaluates = last["split"] == "train" and last["step"] % 8 == 0
        return "evaluation" if evaluates else "step"

    def wait_for(self, process: subprocess.Popen, phase: str) -> str | None:
        """Waits until the process is in `phase` and a random moment longer; returns where it is
        then, or None if it has ended."""
        before = len(read_metrics(self.workdir))
        while process.poll() is None and self.phase(before) != phase:
            time.sleep(0.002)
        time.sleep(self.random.expovariate(4.0 if phase in ("start-up", "compile") else 20.0))
        return None if process.poll() is not None else self.phase(before)

    # --- Trials

    def finish(self) -> None:
        """Resumes the disturbed run to its end and compares it with the reference."""
        process = self.start(self.workdir)
        check(process.wait(300) == 0, f"{self.workdir}: {(self.folder / 'err').read_text()}")
        self.compare_finished(self.workdir)
        for kind in self.interrupted:
            self.outcomes[kind]["then exact to the end"] += 1
        shutil.rmtree(self.workdir)
        self.interrupted = []
        self.run += 1

    def interrupt(self, kind: str, numbers: list[int]) -> None:
        phases = ("start-up", "compile", "step", "step", "evaluation", "save")
        steps = Checkpoints(self.workdir).steps()
        if len(self.interrupted) >= 4 or (steps and steps[-1] > 20):
            self.finish()
            steps = []
        phase = self.random.choice(phases)
        # With an empty compile cache, compiling takes ten times as long.
        cold = phase in ("compile", "evaluation") and self.random.random() < 0.3
        process = self.start(self.workdir, cold=cold)
        at = self.wait_for(process, phase)
        asked = time.monotonic()
        for i, number in enumerate(numbers):
            if i:
                time.sleep(self.random.choice((0.0, 0.2, 1.5)))
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
        try:
            code = process.wait(GRACE_S + SLACK_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # shows what each thread is doing
            process.wait()
            said = (self.folder / "err").read_text()
            raise Failure(
                f"{kind} in {at}: {numbers}, still there after {GRACE_S + SLACK_S} s: {said}"
            ) from None
        seconds = time.monotonic() - asked
        after = self.compare_checkpoints(self.workdir)
        lost = bool(steps) and (not after or after[-1] < steps[-1])
        check(not lost, f"{kind} in {at}: step {steps[-1:]} is gone, there are {after}")
        if code == 0 or at is None:
            self.finish()
            return
        self.interrupted.append(kind)
        counts = self.outcomes[kind]
        counts[f"in {at}"] += 1
        if kind == "kill":
            check(code == -signal.SIGKILL, f"exit code {code}")
            return
        if code == SAVED:
            taken = [r["step"] for r in read_metrics(self.workdir) if r["split"] == "train"]
            check(after[-1:] == taken[-1:], f"saved {after} of {taken[-1:]}")
            counts["saved"] += 1
        else:
            early = code in [-number for number in numbers]  # Python had not begun yet
            check(code == INTACT or (early and at == "start-up"), f"{kind} in {at}: code {code}")
            counts["intact"] += 1
        check(seconds < GRACE_S + SLACK_S, f"took {seconds:.1f} s")
        check("Traceback" not in (self.folder / "err").read_text(), "a traceback")

    def kill(self) -> None:
        self.interrupt("kill", [signal.SIGKILL])

    def stop(self) -> None:
        count = self.random.choice((1, 1, 2))
        self.interrupt("stop", self.random.choices(SIGNALS, k=count))

    def damage(self, kind: str, change: Callable[[Path], str]) -> None:
        """A damaged step is refused, and a run resumes from the step before."""
        workdir = self.folder / "damaged"
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(self.reference, workdir)
        *_, before, last = Checkpoints(workdir).steps()
        files = sorted(
            path for path in (workdir / "checkpoints" / str(last)).rglob("*") if path.is_file()
        )
        what = change(self.random.choice(files))
        silent = f"{kind} loaded silently: {what}"
        try:
            Checkpoints(workdir).restore(last, self.states[last])
        except CheckpointError as error:
            check("\n" not in str(error), f"more than a line: {error}")
        else:
            raise Failure(silent)
        reported: list[str] = []
        check(Checkpoints(workdir).resolve("latest") == before, silent)
        check(Checkpoints(workdir).recover(reported.append) == before, silent)
        check(len(reported) == 1 and f"step {last}" in reported[0], f"reported: {reported}")
        self.outcomes[kind]["refused"] += 1

    def flip(self) -> None:
        def change(path: Path) -> str:
            data = bytearray(path.read_bytes())
            if not data:
                path.write_bytes(b"\0")
                return f"{path} was empty and has a byte"
            place, bit = self.random.randrange(len(data)), self.random.randrange(8)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            return f"bit {bit} of byte {place} of {path}"

        self.damage("bit flip", change)

    def cut(self) -> None:
        def change(path: Path) -> str:
            size = path.stat().st_size
            if not size or self.random.random() < 0.3:
                path.unlink()
                return f"{path} deleted"
            length = self.random.randrange(size)
            os.truncate(path, length)
            return f"{path} cut from {size} to {length} bytes"

        self.damage("cut or deleted", change)

    def nan(self) -> None:
        """With a NaN in the batch of one step, the run ends as if it had skipped that batch."""
        bad = self.random.randrange(1, 25)
        made = slam_v3_task.training_batches

        def poisoned(*args: Any, start_step: int = 0, **more: Any) -> Iterator[Any]:
            batches = made(*args, start_step=start_step, **more)
            for step, (view, batch) in enumerate(batches, start_step + 1):
                if step == bad:
                    aux = np.array(batch.inputs.aux)
                    aux[0, 0, 0] = np.nan
                    batch = dataclasses.replace(batch, inputs=Inputs(aux=aux))
                yield view, batch

        slam_v3_task.training_batches = poisoned  # pyright: ignore[reportAttributeAccessIssue]
        workdir = self.folder / "nan"
        try:
            state = train(self.config, workdir)
        finally:
            slam_v3_task.training_batches = made
            shutil.rmtree(workdir, ignore_errors=True)
        check(same(state, self.skipping(bad)), f"NaN at step {bad}: another state")
        self.outcomes["NaN"]["as if skipped"] += 1

    def skipping(self, bad: int) -> Any:
        """The final state of a run that skips the batch of step `bad`, from a separate loop."""
        experiment = Experiment.from_config(self.config)
        data = prepare(experiment.data)
        graphdef, state = initial_state(SlamV3Task(experiment), data.tokenizer.vocab_size)
        step_fn = jit_step(SlamV3Task(experiment), graphdef, state)
        batches = training_batches(data.train, data.tokenizer, experiment.data)
        for step in range(1, experiment.run.num_steps + 1):
            _, batch = next(batches)
            if step == bad:
                state = dataclasses.replace(
                    state,
                    step=state.step + 1,
                    skipped=state.skipped + 1,
                    bad_steps=state.bad_steps + 1,  # the next good step sets it back to 0
                )
            else:
                state, _ = step_fn(state, batch)
        return state

    def full_disk(self) -> None:
        """No file may grow over a limit: the run ends, names the file, and resumes later."""
        workdir = self.folder / "full"
        # From the smallest file that a run writes to the largest.
        limit = int(2 ** self.random.uniform(0, 20))

        done = self.starved(limit, *self.train, f"--workdir={workdir}")
        self.compare_checkpoints(workdir)
        if done.returncode == 0:
            what = "everything fitted"
        else:
            check(done.returncode == 2, f"limit {limit}: code {done.returncode}, {done.stderr}")
            errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
            one = len(errors) == 1 and "Traceback" not in done.stderr
            check(one, f"limit {limit}: not one line: {done.stderr}")
            check(str(workdir) in errors[0], f"limit {limit}: no path: {errors[0]}")
            what = "metrics" if "metrics.jsonl" in errors[0] else "checkpoint"
        self.outcomes["disk full"][f"at {what}"] += 1
        check(self.start(workdir).wait(300) == 0, f"limit {limit}: does not resume")
        self.compare_finished(workdir)
        shutil.rmtree(workdir)

    def full_disk_elsewhere(self) -> None:
        """The same for the files of an evaluation and of the data set."""
        results = self.reference / "eval" / "metrics.json"
        limit = int(2 ** self.random.uniform(0, 11))
        results.parent.mkdir(exist_ok=True)
        results.write_text("before")
        data = self.folder / "no data"
        evaluation = ["eval.py", f"--workdir={self.reference}", "--step=latest"]
        training = [*self.train, f"--workdir={self.folder / 'none'}"]
        for name, arguments, path in (
            ("evaluation", evaluation, results.parent),
            ("data set", [*training, f"--config.data.data_dir={data}"], data),
        ):
            done = self.starved(limit, *arguments)
            errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
            one = done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr
            check(one, f"{name}, limit {limit}: {done.returncode}, {done.stderr}")
            check(str(path) in errors[0], f"{name}, limit {limit}: no path: {errors[0]}")
            self.outcomes["disk full"][f"at {name}"] += 1
        text = results.read_text()  # figures may fit where the report does not
        whole = text == "before" or json.loads(text)["step"] > 0
        check(whole, "half an evaluation was written")
        check(list(results.parent.iterdir()) == [results], "half an evaluation is left")
        shutil.rmtree(data, ignore_errors=True)
        shutil.rmtree(self.folder / "none", ignore_errors=True)

    def fuzz(self) -> None:
        for trial, examples in test_fuzz.TRIALS.items():
            trial(self.random.randrange(2**32), examples, self.reference)
            self.outcomes["fuzzed"][trial.__name__] += examples


# Trial -> number of times in a long soak.
TARGETS: dict[str, int] = {
    "kill": 100,
    "stop": 30,
    "flip": 1_000,
    "cut": 200,
    "nan": 10,
    "full_disk": 20,
    "full_disk_elsewhere": 5,
    "fuzz": 20,  # of a hundred examples each
}


def soak(
    minutes: float,
    seed: int,
    only: list[str],
    folder: Path,
    freeze: Sequence[str] = (),
    lora: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """The table and the failures."""
    targets = {name: n for name, n in TARGETS.items() if not only or name in only}
    trials = Soak(folder, seed, freeze, lora)
    trials.prepare()
    end = time.monotonic() + 60 * minutes
    done: Counter[str] = Counter()
    failures = []
    while any(done[name] < n for name, n in targets.items()):
        if time.monotonic() > end and all(done[name] for name in targets):
            break
        name = min(targets, key=lambda name: done[name] / targets[name])
        try:
            getattr(trials, name)()
            # A run that ended by itself before the signal came does not count.
            if name in ("kill", "stop"):
                counts = trials.outcomes[name].items()
                done[name] = sum(n for what, n in counts if what.startswith("in "))
            else:
                done[name] += 1
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
            print(failures[-1], flush=True)
            done[name] += 1
            if name in ("kill", "stop"):
                trials.run, trials.interrupted = trials.run + 1, []
    if trials.interrupted:
        trials.finish()
    rows = [f"{'trials':>7}  kind"]
    for kind, counts in trials.outcomes.items():
        shown = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
        whats = [n for what, n in counts.items() if what.startswith(("in ", "at "))]
        rows.append(f"{sum(whats) or sum(counts.values()):7,}  {kind}: {shown}")
    rows.append(f"{len(failures):7,}  failures")
    return "\n".join(rows), failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="*", default=[], choices=TARGETS, help="some kinds of trial"
    )
    parser.add_argument("--freeze", nargs="*", default=[], help="patterns of `optimizer.freeze`")
    parser.add_argument("--lora", nargs="*", default=[], help="patterns of `model.lora`")
    given = parser.parse_args()
    for number in SIGNALS:  # in the background or under nohup some are ignored, also by children
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        which = given.only, Path(folder), given.freeze, given.lora
        table, failures = soak(given.minutes, given.seed, *which)
    print(table)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes, seed {given.seed}", *given.only)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
