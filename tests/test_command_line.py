"""However a program is started and ends: one line for people, and its exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from absl import flags
from slam_jax.runtime import cli
from slam_jax.errors import ConfigError
NAME = flags.DEFINE_string("name", None, "A name.", required=True)

def main(arguments):
    print("given", NAME.value, arguments, flush=True)
    if NAME.value == "wrong":
        raise ConfigError("name is wrong; expected another")
    if NAME.value == "missing":
        open("/nowhere/\\u00fc")
    if NAME.value == "interrupted":
        raise KeyboardInterrupt
    if NAME.value == "pipe":
        while True:
            print("more")
    if NAME.value == "streams":
        with open(arguments[0], "w") as file:
            os.write(1, b"out")
            os.write(2, b"err")
            file.write("own")
    if NAME.value == "letters":
        print(ascii(input()), "\\u00fc")

cli.run(main)
"""


def run(*arguments, shell="", **environment):
    command = [sys.executable, "-c", SCRIPT, *arguments]
    if shell:
        command = ["sh", "-c", f'"$@" {shell}', "-", *command]
    return subprocess.run(
        command, capture_output=True, env={**os.environ, **environment}, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--name=wrong"], 2, "error: name is wrong; expected another"),
        (["--name=missing"], 2, "error: /nowhere/ü: No such file or directory; check the path"),
        (["--name=interrupted"], 130, "interrupted"),
        (
            [],
            2,
            "error: flag --name=None: Flag --name must have a value other than None.; --help lists",
        ),
        (["--name"], 2, "error: Missing value for flag --name"),
    ],
)
def test_what_ends_a_program_is_told_in_a_line(arguments, code, message):
    done = run(*arguments)
    said = done.stderr.decode()
    assert done.returncode == code
    assert said.startswith(message) and said.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--num_processes=2", "num_processes=2, process_id=None, coordinator=None, "),
        ("--process_id=0", "give --coordinator too, or --distributed where $JAX_COORDINATOR_ADDR"),
    ],
)
def test_a_flag_that_says_nothing_without_another_is_refused(tmp_path, argument, message):
    given = ["train.py", "--config=none.py", f"--workdir={tmp_path}", argument]
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, *given], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_pipe_that_nobody_reads_is_no_error():
    done = run("--name=pipe", shell="| head -1; echo over")
    assert done.stdout == b"given pipe []\nover\n"
    assert done.stderr == b""


@pytest.mark.parametrize("shell", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_file_does_not_take_the_place_of_a_closed_stream(tmp_path, shell):
    path = tmp_path / "file"
    assert run("--name=streams", str(path), shell=shell).returncode == 0
    assert path.read_text() == "own"


LATIN = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [LATIN, {}])
def test_a_locale_that_is_not_utf8_changes_no_name(tmp_path, environment):
    path = tmp_path / "größe"
    assert run("--name=streams", str(path), **environment).returncode == 0
    assert path.read_text() == "own"
    said = run("--name=missing", **environment).stderr.decode()
    assert said.startswith("error: /nowhere/ü: No such file")


def test_what_is_no_letter_for_a_stream_ends_no_program():
    environment = {"PYTHONIOENCODING": "ascii:strict"}
    done = run("--name=letters", shell="<<'END'\na\udcffb\nEND", **environment)
    assert done.stdout.splitlines()[1:] == [b"'a\\udcffb' ?"]
