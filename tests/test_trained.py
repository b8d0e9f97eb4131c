"""Trained models as folders: what is written is what was trained, and damage is told in words."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import slam_jax
from slam_jax.data.fresh_scenes import FreshScenes
from slam_jax.data.pipeline import evaluation_batches
from slam_jax.errors import InputError
from slam_jax.evaluation import evaluate
from slam_jax.trained.folder import (
    ABOUT,
    CARD,
    TOKENIZER,
    WEIGHTS,
    find_folder,
    write_folder,
)
from slam_jax.training.checkpoint.trees import by_name
from slam_jax.training.loading import read_saved
from slam_jax.training.state import split_model


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory) -> Path:
    """The model of the small run, written by the command."""
    output = tmp_path_factory.mktemp("models") / "small"
    command = [sys.executable, "-m", "slam_jax.trained", f"--workdir={small_run}"]
    command += [f"--output={output}", "--dtype=float32", "--command=make small", "--commit=abc"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return output


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """A copy of the folder, to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def weights_of(loaded: slam_jax.training.Loaded) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in by_name(split_model(loaded.model)[1]).items()}


@pytest.mark.release
def test_a_folder_has_the_model_of_the_checkpoint(folder, small_run):
    ours, theirs = slam_jax.load(folder), slam_jax.load(small_run)
    assert ours[1:] == theirs[1:]
    jax.tree.map(np.testing.assert_array_equal, weights_of(ours), weights_of(theirs))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [WEIGHTS, ABOUT, TOKENIZER, CARD]
    )
    card = (folder / CARD).read_text()
    assert "`make small`" in card and "commit: abc" in card and "float32" in card
    assert all(f"`{name}`" in card for name in (WEIGHTS, ABOUT, TOKENIZER))
    assert slam_jax.load(folder, "best").step == slam_jax.load(folder, str(ours.step)).step
    with pytest.raises(slam_jax.CheckpointError, match="leave out step 99"):
        slam_jax.load(folder, 99)


@pytest.mark.release
@pytest.mark.parametrize(("dtype", "bits"), [("float16", 10), ("bfloat16", 7)])
def test_lower_precision_rounds_and_half_as_many_bytes_are_stored(
    folder, small_run, tmp_path, dtype, bits
):
    loaded = slam_jax.load(small_run)
    weights = weights_of(loaded)
    write_folder(tmp_path / "new", read_saved(small_run), weights, "", dtype=dtype)
    rounded = weights_of(slam_jax.load(tmp_path / "new"))
    for name, value in weights.items():
        assert rounded[name].dtype == value.dtype == np.float32
        np.testing.assert_allclose(rounded[name], value, rtol=2.0**-bits, atol=1e-7)
    sizes = [(each / WEIGHTS).stat().st_size for each in (tmp_path / "new", folder)]
    assert sizes[0] < 0.6 * sizes[1]


def test_a_weight_that_the_dtype_cannot_hold_is_refused(small_run, tmp_path):
    weights = {"a": np.array([1.0, 70_000.0], np.float32)}
    with pytest.raises(InputError, match="a has weights that float16 cannot hold"):
        write_folder(tmp_path / "new", read_saved(small_run), weights, "")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_empty_is_not_written_over(folder, small_run):
    with pytest.raises(InputError, match="it is not empty"):
        write_folder(folder, read_saved(small_run), {}, "")


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rename(path: Path) -> None:
    weights = load_file(path)
    save_file({**weights, "more": weights.pop("head/kernel")}, path)


def reshape(path: Path) -> None:
    weights = load_file(path)
    save_file({**weights, "head/kernel": weights["head/kernel"].T.copy()}, path)


DAMAGE = {
    "no tokenizer": (TOKENIZER, Path.unlink, "tokenizer.json: No such file"),
    "no JSON": (ABOUT, lambda path: path.write_text("{"), "config.json: not JSON"),
    "a list": (ABOUT, lambda path: path.write_text("[]"), "expected an object with config"),
    "a word": (ABOUT, lambda path: change(path, step="one"), "config.json: step is 'one'"),
    "no weights": (WEIGHTS, Path.unlink, r"no \*.safetensors; expected the weights"),
    "cut": (
        WEIGHTS,
        lambda path: path.write_bytes(path.read_bytes()[:999]),
        "expected a safetensors file",
    ),
    "renamed": (WEIGHTS, rename, "have an unknown 'more'; they fit another"),
    "reshaped": (WEIGHTS, reshape, r"head/kernel is F32 \[.*\]; expected \["),
    "another tokenizer": (TOKENIZER, lambda path: path.write_text("{}"), "tokenizer"),
    "deep": (ABOUT, lambda path: path.write_text("[" * 99_999), "config.json: not JSON"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told_in_words(damaged, name, damage, message):
    damage(damaged / name)
    with pytest.raises(slam_jax.UserError, match=message):
        slam_jax.load(damaged)


def test_a_name_is_a_model_of_the_package_unless_there_is_a_folder_of_that_name(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    found = find_folder("quickstart")
    assert found is not None and found.parent == Path(slam_jax.__file__).parent / "trained"
    (tmp_path / "quickstart").mkdir()
    assert find_folder("quickstart") is None


def test_the_model_of_the_package_answers_questions_about_new_scenes():
    loaded, views = slam_jax.load("quickstart"), ("image", "text")
    graphdef, params = split_model(loaded.model)
    scenes = FreshScenes(50)
    batches = {
        view: evaluation_batches(scenes, loaded.tokenizer, view, 50, seed=0) for view in views
    }
    found = evaluate(graphdef, nnx.State(params), batches, loaded.tokenizer, step=loaded.step)
    for view in views:
        scores = found.metrics["views"][view]
        assert scores["non_relational"]["accuracy"] > 0.97, view
        assert scores["relational"]["accuracy"] > 0.85, view
    folder = find_folder("quickstart")
    assert folder is not None and (folder / WEIGHTS).stat().st_size < 3e6
    card = (folder / CARD).read_text()
    assert "- command: `" in card and "- commit: " in card


@pytest.mark.release
def test_a_report_about_a_model_of_the_package_needs_a_folder(tmp_path):
    script = Path(slam_jax.__file__).parents[1] / "eval.py"
    done = subprocess.run(
        [sys.executable, script, "--workdir=quickstart"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    expected = "error: --workdir=quickstart is part of the package; give --out, too\n"
    assert done.stderr.endswith(expected)
