"""The soak in its shortest form: every kind of trial once. See soak.py for the long one."""

import subprocess
import sys
from pathlib import Path


def test_a_run_comes_out_of_every_trial_as_if_undisturbed():
    # A process of its own: the other tests compile without optimizations, which gives other bits.
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("soak.py"), "--minutes=0", "--seed=3"],
        capture_output=True,
        text=True,
        timeout=1_200,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5_000:]
    kinds = ("kill", "stop", "bit flip", "cut or deleted", "NaN", "disk full", "fuzzed")
    assert all(f"  {kind}: " in done.stdout for kind in kinds), done.stdout
    assert "      0  failures\n" in done.stdout
