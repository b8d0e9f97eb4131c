"""The soak in its shortest form: each kind of trial once. See soak.py for the long one."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "freeze"),
    [
        ({"kill": "kill", "flip": "bit flip", "cut": "cut or deleted"}, []),
        (
            {
                "stop": "stop",
                "nan": "NaN",
                "full_disk": "disk full",
                "full_disk_elsewhere": "disk full",
                "fuzz": "fuzzed",
            },
            [],
        ),
        (
            {"kill": "kill", "stop": "stop", "nan": "NaN", "flip": "bit flip"},
            ["--freeze", "decoder/layers/*/mlp", "level_one"],
        ),
    ],
    ids=["kills and damage", "the rest", "frozen parameters"],
)
def test_a_run_comes_out_of_every_trial_as_if_undisturbed(kinds, freeze):
    soak = Path(__file__).with_name("soak.py")
    done = subprocess.run(
        [sys.executable, soak, "--minutes=0", "--seed=3", "--only", *kinds, *freeze],
        capture_output=True,
        text=True,
        timeout=1_200,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5_000:]
    assert all(f"  {kind}: " in done.stdout for kind in kinds.values()), done.stdout
    assert "      0  failures\n" in done.stdout
