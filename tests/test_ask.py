"""`python -m slam_jax.generation`, and the files of numbers that it reads."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from slam_jax.data.numbers import read_numbers
from slam_jax.generation import Request, Sampling, generate, score
from slam_jax.training import load
from slam_jax.training.checkpoint.store import Checkpoints

pytestmark = pytest.mark.release

CUT = "the answer was cut at the limit of tokens; raise --max_new_tokens\n"
# Runs the command for several lists of arguments in one process, which imports JAX once.
REPEAT = """
import contextlib, io, json, sys
from absl import flags
from slam_jax.generation import __main__ as command
from slam_jax.runtime.cli import exit_on_error

done = []
for arguments in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with exit_on_error():
                command.main(flags.FLAGS(["command", *arguments], known_only=True)[1:])
        except SystemExit as end:
            code = end.code
    done.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""


def ask(workdir, *commands):
    """(exit code, stdout, stderr) of each list of arguments; and the errors of all, in lines."""
    several = [[f"--workdir={workdir}", *arguments] for arguments in commands]
    command = [sys.executable, "-c", REPEAT, json.dumps(several)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr.splitlines()


@pytest.mark.slow
def test_the_command_says_what_generate_says(small_run, tmp_path):
    rows = np.random.default_rng(0).normal(size=(4, 10)).round(3).tolist()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    loaded = load(small_run)
    assert loaded.max_new_tokens == 32
    request = Request("shape of red", aux=rows, seed=3)
    given = [f"--aux={tmp_path / 'rows.json'}", "--prompt=shape of red", "--seed=3"]
    (streamed, drawn, chosen, spaced, *wrong), errors = ask(
        small_run,
        [*given, "--max_new_tokens=6"],
        [*given, "--temperature=1.5", "--num_samples=3", "--json"],
        [*given, "--choices=circle,square"],
        [*given, '--choices=circle, circle,circle ,"a, b"', "--json"],
        *(arguments for arguments, _ in WRONG),
    )
    [answer] = generate(loaded, [request], Sampling(max_new_tokens=6))
    cut = answer.samples[0].finish == "length"
    assert streamed == [0, answer.text + "\n", CUT if cut else ""]
    [answer] = generate(loaded, [request], Sampling(temperature=1.5, num_samples=3))
    expected = [(list(sample.tokens), sample.finish) for sample in answer.samples]
    assert [(each["tokens"], each["finish"]) for each in json.loads(drawn[1])] == expected
    best = max(score(loaded, request, ["circle", "square"]), key=lambda each: each.logprob)
    lines = chosen[1].splitlines()
    shares = [float(line.split("%")[0]) for line in lines]
    assert lines[0].endswith(best.text) and math.isclose(sum(shares), 100.0)
    texts = ["circle", " circle", "circle ", "a, b"]
    expected = {each.text: each.logprob for each in score(loaded, request, texts)}
    found = {each["text"]: each["logprob"] for each in json.loads(spaced[1])}
    assert found == pytest.approx(expected)
    assert wrong == [[2, "", ""]] * len(WRONG)
    for error, (_, message) in zip(errors, WRONG, strict=True):
        assert error.startswith(f"error: {message}")


def test_the_default_length_follows_the_longest_answer_of_training(small_run, monkeypatch):
    loaded = load(small_run)
    stored = Checkpoints(small_run).read_generation(loaded.step)["max_new_tokens"]
    assert 1 < stored < loaded.max_new_tokens == 32
    monkeypatch.setattr(Checkpoints, "read_generation", lambda *_: {"max_new_tokens": 47})
    assert load(small_run).max_new_tokens == 47


WRONG = [
    (["--prompt=red"], "nothing to answer from: give at least one of text, image and aux"),
    (["--image=no.png"], "no.png: no such file"),
    (["--text=a", "--temperature=-1"], "temperature is -1.0; expected 0 to 1000"),
    (["--text=a", "--temprature=1"], "unknown argument '--temprature=1'; --help shows"),
]


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
