"""Questions from a shell, and the files they may come with."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from slam_jax.data.numbers import read_numbers
from slam_jax.generation import Request, Sampling, generate, score
from slam_jax.training import load


def ask(workdir, *arguments):
    command = [sys.executable, "-m", "slam_jax.generation", f"--workdir={workdir}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_command_says_what_generate_says(small_run, tmp_path):
    rows = np.random.default_rng(0).normal(size=(4, 10)).round(3).tolist()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    loaded = load(small_run)
    request = Request("shape of red", aux=rows, seed=3)
    arguments = [f"--aux={tmp_path / 'rows.json'}", "--prompt=shape of red", "--seed=3"]
    [answer] = generate(loaded, [request], Sampling(max_new_tokens=6))
    done = ask(small_run, *arguments, "--max_new_tokens=6")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == answer.text + "\n"
    done = ask(small_run, *arguments, "--temperature=1.5", "--num_samples=3", "--json")
    sampling = Sampling(temperature=1.5, num_samples=3)
    [answer] = generate(loaded, [request], sampling)
    assert [each["tokens"] for each in json.loads(done.stdout)] == [
        list(sample.tokens) for sample in answer.samples
    ]
    done = ask(small_run, *arguments, "--choices=circle,square")
    best = max(score(loaded, request, ["circle", "square"]), key=lambda each: each.logprob)
    shares = [float(line.split("%")[0]) for line in done.stdout.splitlines()]
    assert done.stdout.splitlines()[0].endswith(best.text) and math.isclose(sum(shares), 100.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=red"], "nothing to answer from: give at least one of text, image and aux"),
        (["--image=no.png"], "no.png: no such file"),
        (["--text=a", "--temperature=-1"], "temperature is -1.0; expected 0 (greedy) or 0.001 to"),
        (["--text=a", "--temprature=1"], "unknown argument '--temprature=1'; --help shows"),
    ],
)
def test_what_cannot_be_answered_ends_with_one_line(small_run, arguments, message):
    done = ask(small_run, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", "[[1, 2.5], [3, 4]]", [[1, 2.5], [3, 4]]),
        ("a.json", '{"width": 3}', {"width": 3}),
        ("a.csv", "1,2.5\n3,4\n", [[1, 2.5], [3, 4]]),
        ("a.csv", "x,y\n1,2\n3,4\n", [[1, 2], [3, 4]]),
        ("a.csv", "width,price\n1.5,\n", {"width": 1.5, "price": None}),
    ],
)
def test_numbers_from_a_file(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert read_numbers(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{"),
        ("a.csv", "x,y\n1,b\n3,4\n"),
        ("a.csv", "x,y\n1,b\n"),
        ("a.json", "[" * 9999),
    ],
)
def test_a_file_without_numbers_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"aux: .*{name} cannot be read"):
        read_numbers(str(tmp_path / name))
    with pytest.raises(ValueError, match="aux: .*no.csv cannot be read .No such file"):
        read_numbers(str(tmp_path / "no.csv"))
