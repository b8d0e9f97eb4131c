"""Formats of users: each gives the same rows, trains by the commands of docs/data.md, and resumes
exactly."""

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from helpers import assert_same
from jax.experimental.compilation_cache import compilation_cache
from own_data import COUNT, FORMATS, PROMPT, answer, build_colours, png

from slam_jax.data import ColumnsConfig, DataConfig, describe, prepare, training_batches
from slam_jax.data.folder import SPLITS, read_table
from slam_jax.data.formats import open_picture
from slam_jax.reporting.checkpoint import evaluate_checkpoint
from slam_jax.reporting.inspection import inspect_data, print_inspection
from slam_jax.reporting.report import write_evaluation
from slam_jax.training import Experiment, default_config, override, train
from slam_jax.training.experiment import as_json

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(
    r"^\| [^|]+ \| [^|]* \| `(--config[^`]*)` \|$", (ROOT / "docs" / "data.md").read_text(), re.M
)

# Formats that are read as one of the others is, or in a run of another test; the rows of all of
# them are compared below.
SEEN_BY_OTHERS = "path=(csv|tsv|json|jsonl|names|splits|hub|classes|llava|saved)( |$)"


@pytest.fixture(scope="module", autouse=True)
def kept_executables(tmp_path_factory):
    """Executables are kept on disk however fast they compile: all formats have the same."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("executables")), 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A folder with the data of each format, named as in the documentation."""
    folder = tmp_path_factory.mktemp("formats")
    for name, write in FORMATS.items():
        write(folder / name)
    build_colours(folder / "tfds")
    return folder


def tiny_config(**run: Any) -> dict[str, Any]:
    """The fields of configs/slam_v3_folder.py that say how data is read, with a tiny model.

    All formats have the same vocabulary and shapes, so that a step is compiled once.
    """
    config: Any = default_config("tiny")
    config.model.aux_slots = True
    config.model.num_processes = 1
    config.model.num_decoder_layers = 1
    config.model.image.size = 12
    config.model.image.stage_widths = (8,)
    config.data.name = "folder"
    config.data.data_dir = "tfds"
    config.data.batch_size = 4
    config.data.vocab_size = 259
    config.data.max_damaged_records = 0
    config.data.stages = ((0, {"all": 1.0}),)
    config.run.num_steps = 2
    config.run.log_every = 1
    config.run.evaluate_batches = 1
    config.run.update(run)
    return as_json(config)


def configure(arguments: str, **run: Any) -> dict[str, Any]:
    return override(tiny_config(**run), arguments.split())


def data_of(arguments: str) -> tuple[DataConfig, Any]:
    experiment = Experiment.from_config(configure(arguments))
    return experiment.data, prepare(experiment.data, model=experiment.model)


def picture_of(row: Any) -> bytes:
    found = open_picture(row.image)
    return found.read_bytes() if isinstance(found, Path) else found


def test_the_documentation_has_a_command_for_each_format():
    for name in FORMATS:
        assert any(f"data.path={name}" in command for command in COMMANDS), name
    assert any("tfds/" in each for each in COMMANDS) and any("mixture" in each for each in COMMANDS)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_gives_the_same_rows(kind, folders):
    names = {"prompt": "question", "answer": "reply", "image": "photo"} if kind == "names" else {}
    table = read_table(folders / kind, names=ColumnsConfig(**names))
    assert not table.bad and all(table.rows[split] for split in SPLITS)
    found = {(picture_of(r), r.prompt, r.answers) for rows in table.rows.values() for r in rows}
    prompt = "" if kind == "classes" else PROMPT
    expected = {(png(i), prompt, (answer(i),)) for i in range(COUNT)}
    if kind == "llava":
        expected |= {(png(i), f"{PROMPT}\n{answer(i)}\nsure?", ("yes",)) for i in range(COUNT)}
    assert found == expected and not table.shared
    if kind in ("splits", "hub", "parquet", "saved", "shards"):
        shown = {picture_of(row) for row in table.rows["test"]}
        assert shown == {png(i) for i in range(20, COUNT)}, "names of files say the split"


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            each, marks=pytest.mark.slow if re.search(SEEN_BY_OTHERS, each) else pytest.mark.release
        )
        for each in COMMANDS
    ],
)
def test_a_command_trains_evaluates_and_reports(command, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    workdir = tmp_path / "run"
    state = train(configure(command), workdir)
    assert int(state.step) == 2
    evaluation = evaluate_checkpoint(workdir)
    assert evaluation.metrics["data"]["rows"]["test"] > 0
    folder = write_evaluation(evaluation)
    assert "report.html" in {file.name for file in folder.iterdir()}


def test_training_is_told_the_format_the_columns_and_the_rows(folders, monkeypatch):
    monkeypatch.chdir(folders)
    for command, expected in (
        (
            "--config.data.path=saved",
            [
                "data: data set saved by `datasets` saved; 18 rows for train, 2 rows for "
                "validation, 10 rows for test",
                "read: image, prompt = 'question', answer = 'label', split",
                "validation: made of rows of train, as there were none",
                "pictures or texts in more than one split: 0",
            ],
        ),
        (
            '--config.data.mixture=[["shards",3],["digits",1]]',
            [
                "data: WebDataset shards shards",
                "read: image, prompt = 'question', answer = 'cls', split",
                "validation: made of rows of train, as there were none",
                "pictures or texts were not compared, which would read all of them; keys decide on "
                "splits",
                "mixture, by weight: shards 3, digits 1; 1,275 rows for train, 182 rows for "
                "validation, 370 rows for test",
            ],
        ),
        (
            "--config.data.name=digits",
            ["data: digits; 1,257 rows for train, 180 rows for validation, 360 rows for test"],
        ),
    ):
        config, dataset = data_of(command)
        assert describe(dataset, config) == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_batches_of_a_resumed_run_are_those_of_an_unbroken_one(command, folders, monkeypatch):
    monkeypatch.chdir(folders)
    config, dataset = data_of(command)
    unbroken = training_batches(dataset.train, dataset.tokenizer, config)
    expected = list(itertools.islice(unbroken, 9))
    again = data_of(command)[1]
    assert again.tokenizer == dataset.tokenizer
    resumed = training_batches(again.train, again.tokenizer, config, start_step=6)
    for (view, batch), (other_view, other) in zip(resumed, expected[6:], strict=False):
        assert view == other_view
        assert_same(batch, other)


@pytest.mark.parametrize("command", COMMANDS)
def test_inspect_and_training_say_what_is_there(command, folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    experiment = Experiment.from_config(configure(command))
    found = inspect_data(experiment.data, experiment.model)
    print_inspection(found)
    printed = capsys.readouterr().out
    assert "red" in printed and found.tiles
    lines = describe(found.dataset, experiment.data)
    assert not found.dataset.tables or all(line in printed for line in lines)
    assert all(line and "\n" not in line for line in lines)
    assert re.search(r"\d+ rows for train, \d+ rows for validation, \d+ rows for test", str(lines))


KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, "tests")
import conftest
from slam_jax.runtime.signals import Stop
from slam_jax.training import train
from test_formats import configure

class Killed(Stop):
    saves = 0
    def expect_save(self):
        self.saves += 1
        done = [*pathlib.Path(sys.argv[2]).rglob("manifest*.json")]
        if self.saves > 3 and done:
            os.kill(os.getpid(), signal.SIGKILL)

command, workdir, folders = sys.argv[1:]
os.chdir(folders)
train(configure(command, num_steps=12, save_every=1, evaluate_every=12), workdir, Killed())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "parquet", "saved", "shards", "tfds"])
def test_a_killed_run_ends_as_an_unbroken_one(kind, folders, tmp_path, monkeypatch):
    """Files by name, row groups, mapped memory, offsets and records of TFDS."""
    [command] = [each for each in COMMANDS if f"={kind}" in each and "mixture" not in each]
    arguments = [command, str(tmp_path / "killed"), str(folders)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], cwd=ROOT, env=environment, timeout=600
    )
    assert ended.returncode == -signal.SIGKILL
    monkeypatch.chdir(folders)
    config = configure(command, num_steps=12, save_every=1, evaluate_every=12)
    resumed = train(config, tmp_path / "killed")
    unbroken = train(config, tmp_path / "unbroken")
    assert int(resumed.step) == 12
    assert_same(resumed.params, unbroken.params)
