"""A run that begins with other weights: what is copied, what is not, and what is said about it."""

import functools
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax.data import Tokenizer
from slam_jax.errors import ConfigError
from slam_jax.trained.folder import Trained, write_folder
from slam_jax.training import Checkpoints, Experiment, default_config, init_from, override
from slam_jax.training.checkpoint.trees import by_name
from slam_jax.training.experiment import as_json
from slam_jax.training.init_from import REPORT, begin_from
from slam_jax.training.resume import open_run
from slam_jax.training.slam_v3_task import SlamV3Task
from slam_jax.training.start import state_shapes

pytestmark = pytest.mark.release

TEXTS = ["red circle at twelve", "blue square at forty", "how many circles are red"]


def make_config(*changes: str) -> dict[str, Any]:
    config = as_json(default_config("tiny"))
    config["model"]["aux_dim"] = 10
    return override(config, [f"--config.{change}" for change in changes])


def make_state(config: dict[str, Any], vocab_size: int, seed: int) -> Any:
    """A state of random values, other ones for the average; no function is compiled for it."""
    rng = np.random.default_rng(seed)

    def fill(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        value = rng.normal(size=x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else 0
        return jax.device_put(jnp.full(x.shape, value, x.dtype), x.sharding)

    return jax.tree.map(fill, shapes_of(json.dumps(config), vocab_size))


@functools.cache
def shapes_of(config: str, vocab_size: int) -> Any:
    return state_shapes(SlamV3Task(Experiment.from_config(json.loads(config))), vocab_size)[1]


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Sources are read once each."""
    load = functools.cache(init_from.load)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init_from, "load", lambda source, base=(): load(source))
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 280)


@pytest.fixture(scope="module")
def source(tokenizer, tmp_path_factory):
    """The workdir of a run with averaged parameters, and these by name."""
    workdir, config = tmp_path_factory.mktemp("source"), make_config("optimizer.ema_decay=0.9")
    with Checkpoints(workdir) as checkpoints:
        for step, accuracy in ((3, 0.9), (4, 0.1)):
            state = make_state(config, tokenizer.vocab_size, step)
            about: Any = dict(config=config, tokenizer=tokenizer.to_json())
            checkpoints.save(step, state, **about, metrics={"accuracy": accuracy})
    average = make_state(config, tokenizer.vocab_size, 3).ema
    return str(workdir), {name: np.asarray(x) for name, x in by_name(average).items()}


def begin(source, tmp_path, tokenizer, *changes, provided=()):
    """The old and the new parameters by name, the new state and the written report."""
    state = make_state(make_config(*changes), tokenizer.vocab_size, 9)
    old = by_name(state.params) | by_name(state.frozen or {})
    old = {name: np.asarray(x) for name, x in old.items()}
    new, line = begin_from(source, tmp_path, [], state, tokenizer, provided)
    report = json.loads((tmp_path / REPORT).read_text())
    assert report["summary"] == line and "\n" not in line
    found = by_name(new.params) | by_name(new.frozen or {})
    assert found.keys() == old.keys()
    kept = jax.tree.map(lambda x, y: x.sharding == y.sharding and x.dtype == y.dtype, new, state)
    assert all(jax.tree.leaves(kept))
    return old, {name: np.asarray(x) for name, x in found.items()}, new, report


@pytest.mark.slow
def test_the_averaged_weights_of_the_best_checkpoint_are_copied(source, tokenizer, tmp_path):
    _, new, state, report = begin(source[0], tmp_path, tokenizer, "optimizer.ema_decay=0.5")
    jax.tree.map(np.testing.assert_array_equal, new, source[1])
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    assert state.step == 0
    count = len(new)
    assert report["summary"] == (
        f"began with {source[0]}, step 3: {count} of {count} arrays match (init_from.json)"
    )
    assert report["step"] == 3 and len(report["sha256"]) == 64
    assert [report[kind] for kind in ("absent", "other_shape", "cast", "unused")] == [[]] * 4


def test_what_does_not_fit_keeps_its_values_and_is_listed_with_the_reason(
    source, tokenizer, tmp_path
):
    changes = ("model.num_decoder_layers=3", "model.process_mlp_dim=20", "model.image.size=36")
    more = ("model.text_kernel_size=0", "optimizer.freeze=('fusion','decoder/layers/1')")
    old, new, _, report = begin(source[0], tmp_path, tokenizer, *changes, *more)
    absent = {name for name in new if name.startswith("decoder/layers/2/")}
    other = {name for name in new if name.startswith("processes/stack/layers/0/mlp/")}
    assert absent and len(other) == 3
    for name, x in new.items():
        np.testing.assert_array_equal(x, (old if name in absent | other else source[1])[name])
    assert set(report["absent"]) == absent and report["cast"] == []
    assert report["other_shape"][0] == (
        "processes/stack/layers/0/mlp/down/kernel: [4, 20, 32] here and [4, 48, 32] there"
    )
    assert report["unused"] == ["streams/text_convolution/filter"]
    matched = len(new) - len(absent) - 3
    assert (
        f"{matched} of {len(new)} arrays match, {len(absent)} absent there, 3 of another"
        in (report["summary"])
    )


@pytest.mark.slow
def test_other_dtypes_are_cast_and_stacked_layers_are_filled_one_by_one(
    source, tokenizer, tmp_path
):
    changes = ("model.param_dtype=bfloat16", "model.scan_layers=True")
    old, new, state, report = begin(
        source[0], tmp_path, tokenizer, *changes, "model.num_decoder_layers=3"
    )
    assert state.params["decoder"]["layers"]["0:3"]["mlp"]["up"]["kernel"].shape == (3, 32, 48)
    for name, x in new.items():
        known = source[1][name].astype(jnp.bfloat16) if name in source[1] else old[name]
        np.testing.assert_array_equal(x, known)
    assert "head/kernel: bfloat16 here and float32 there" in report["cast"]
    assert len(report["cast"]) == len(source[1])


@pytest.mark.parametrize("same_size", [True, False])
def test_rows_of_the_same_token_are_copied(source, tokenizer, tmp_path, same_size):
    other = Tokenizer.train(["a red cube beside many green squares"] * 2, 280 if same_size else 270)
    assert (other.vocab_size == tokenizer.vocab_size) == same_size
    old, new, _, report = begin(source[0], tmp_path, other)
    there = tokenizer.ids_by_token
    both = other.ids_by_token.keys() & there.keys()
    assert 259 <= len(both) < other.vocab_size
    moved = 0
    for token, i in other.ids_by_token.items():
        j = there.get(token)
        moved += j is not None and j != i
        rows = (new["embedding/embedding"][i], new["head/kernel"][:, i])
        theirs = (source[1]["embedding/embedding"], source[1]["head/kernel"])
        first = (old["embedding/embedding"][i], old["head/kernel"][:, i])
        expected = first if j is None else (theirs[0][j], theirs[1][:, j])
        jax.tree.map(np.testing.assert_array_equal, rows, expected)
    assert moved  # so that copying by id would be another result
    assert f"rows of {len(both)} tokens copied" in report["summary"]


def test_parameters_of_a_base_are_left_alone(source, tokenizer, tmp_path):
    provided = {"head/kernel", "decoder/norm/scale"}
    freeze = "optimizer.freeze=('head','decoder/norm')"
    old, new, _, report = begin(source[0], tmp_path, tokenizer, freeze, provided=provided)
    for name in provided:
        np.testing.assert_array_equal(new[name], old[name])
    np.testing.assert_array_equal(new["embedding/embedding"], source[1]["embedding/embedding"])
    assert f"{len(new) - 2} of {len(new) - 2} arrays match" in report["summary"]


def test_a_source_without_anything_to_copy_is_refused(source, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"run.init_from is 'no/where': .*no such folder"):
        begin("no/where", tmp_path, tokenizer)
    other = tmp_path / "other"
    arrays = by_name(make_state(make_config("model.embed_dim=48"), tokenizer.vocab_size, 0).params)
    config = make_config("model.embed_dim=48")
    about = Trained(config, 1, 1, None, tokenizer.to_json())
    write_folder(other, about, arrays, "", dtype="float32")
    _, _, _, report = begin(str(other), tmp_path, tokenizer)  # norms of heads, scalars
    assert report["other_shape"]
    state = make_state(make_config("optimizer.train=('head',)"), tokenizer.vocab_size, 0)
    everything_else = by_name(state.frozen)
    with pytest.raises(ConfigError, match=r"none of its \d+ arrays has the name and shape"):
        begin_from(str(other), tmp_path, [], state, tokenizer, everything_else)


def test_a_long_list_is_bounded(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(init_from, "_MOST_LISTED", 3)
    _, _, _, report = begin(source[0], tmp_path, tokenizer, "model.num_decoder_layers=3")
    assert len(report["absent"]) == 4 and report["absent"][-1].startswith("and ")


def test_only_a_new_run_reads_its_source(source, tokenizer, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(source[0], copy)
    data = f"data.data_dir='{tmp_path / 'data'}'"
    config = make_config(data, "data.name=sort_of_clevr/tiny", f"run.init_from='{copy}'")
    config["data"] |= {"vocab_size": 300, "stages": [[0, {"aux": 1.0}]]}
    experiment = Experiment.from_config(config)
    # Nothing is compiled for the state that the weights replace.
    monkeypatch.setattr(
        "slam_jax.training.resume.initial_state",
        lambda experiment, size, mesh, bases: (None, make_state(config, size, 1)),
    )
    workdir = tmp_path / "run"
    with Checkpoints(workdir) as checkpoints:
        lines = []
        opened = open_run(SlamV3Task(experiment), checkpoints, None, log=lines.append)
        assert lines == ["initialising the model; this can take minutes for a large model"]
        [note] = opened.notes
        assert note.startswith(f"began with {copy}, step 3: ") and (workdir / REPORT).is_file()
        np.testing.assert_array_equal(
            opened.state.params["decoder"]["norm"]["scale"], source[1]["decoder/norm/scale"]
        )
        about: Any = dict(config=config, tokenizer=opened.dataset.tokenizer.to_json(), metrics={})
        checkpoints.save(1, opened.state, **about)
    shutil.rmtree(copy)
    for source_now in (str(copy), None, "elsewhere"):
        config["run"]["init_from"] = source_now
        parts = SlamV3Task(Experiment.from_config(config)), Checkpoints(workdir), None
        again = open_run(*parts, log=lines.append)
        assert again.notes == [] and len(lines) == 1
        jax.tree.map(np.testing.assert_array_equal, again.state.params, opened.state.params)
