"""Base weights: found by their record, checked by sha256, part of a run and of no checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bases import FILE, NAME, PREFIX, base_in, write_base
from flax import nnx
from helpers import assert_same
from safetensors.numpy import load_file

from slam_jax.errors import InputError
from slam_jax.slam_v3 import Inputs, SlamV3, SlamV3Config
from slam_jax.training import (
    CheckpointError,
    Checkpoints,
    Experiment,
    default_config,
    load,
    loop,
    override,
    read_config,
    resume,
    slam_v3_task,
    split_model,
    train,
)
from slam_jax.training.base import Base, BaseRecord, locate, records_of, without_bases
from slam_jax.training.checkpoint.trees import by_name, num_bytes
from slam_jax.training.experiment import as_json
from slam_jax.training.metrics import read_metrics
from slam_jax.training.slam_v3_task import SlamV3Task
from slam_jax.training.start import state_shapes
from slam_jax.training.trainable import names_in, split_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "language_model"
    write_base(folder, SlamV3Config.preset("tiny", 300, aux_dim=10))
    return folder


@pytest.fixture(scope="module")
def with_base(base_folder):
    """Every model has the base."""

    def bases_of(model, known=None):
        return (base_in(base_folder, known),) if known is None or known else ()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slam_v3_task, "bases_of", bases_of)
        yield


def record(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**base_in(folder).record._asdict(), "prefix": ["decoder"], **changes}


def test_files_of_a_base_are_found_where_they_moved(base_folder, tmp_path):
    stored = record(base_folder)
    assert locate([stored])[NAME].path == str(base_folder)
    gone = {**stored, "path": str(tmp_path / "gone" / "language_model")}
    here = base_folder.parent
    for moved in (base_folder, here, base_folder / "weights.safetensors"):
        found = locate([gone], ["/nowhere", moved])[NAME]
        assert found.path == str(base_folder) and found.prefix == PREFIX
    link = tmp_path / "language_model"
    link.mkdir()
    (link / "weights.safetensors").symlink_to(base_folder / "weights.safetensors")
    assert locate([gone], [link])


def test_files_of_a_base_that_are_missing_or_changed_are_refused(base_folder, tmp_path):
    stored, copy = record(base_folder, path=str(tmp_path / "copy")), tmp_path / "copy"
    with pytest.raises(InputError, match=r"copy/weights.safetensors: No such file.*--base=FOLDER"):
        locate([stored])
    shutil.copytree(base_folder, copy)
    path = copy / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    message = r"copy/weights.safetensors: its sha256 is \w{12} and was \w{12}; give the file"
    for moved in ([], ["/nowhere"]):
        with pytest.raises(InputError, match=message) as error:
            locate([stored], moved)
        assert "\n" not in str(error.value)
    assert locate([stored], [base_folder])
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="weights.safetensors: not a file"):
        locate([stored])


@pytest.mark.parametrize(
    "value",
    [
        3,
        {},
        {"name": "a", "path": "b", "files": {"../c": "d"}, "prefix": []},
        {"name": "a", "path": "b", "files": {"/etc/passwd": "d"}, "prefix": []},
        {"name": "a", "path": "b", "files": {"c": 3}, "prefix": []},
        {"name": "a", "path": "b", "files": {"c": "d"}, "prefix": [1]},
        {"name": "a", "path": 1, "files": {}, "prefix": []},
    ],
)
def test_a_damaged_record_of_a_base_is_refused(value):
    with pytest.raises(InputError, match="bases.json has .* expected name, path, files, prefix"):
        locate([value])


def filled(shapes: Any) -> Any:
    """Arrays that do not compress."""
    rng = np.random.default_rng(0)

    def fill(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding)

    return jax.tree.map(fill, shapes)


def test_a_checkpoint_has_no_more_than_what_trains_and_its_optimizer_state(base_folder, tmp_path):
    config = as_json(default_config("tiny"))
    config["optimizer"]["train"] = ["streams", "level_one", "head", "processes"]
    config["model"]["aux_dim"] = 10
    experiment = Experiment.from_config(config)
    shapes = split_model(
        nnx.eval_shape(lambda: SlamV3(experiment.with_vocabulary(300), rngs=nnx.Rngs(0)))
    )[1]
    rest = by_name(split_of(shapes, experiment.optimizer).of(shapes)[1])
    given = BaseRecord(NAME, str(base_folder), {}, ())
    bases = [Base(given, rest, lambda like: like)]
    state = filled(state_shapes(SlamV3Task(experiment), 300, bases=bases)[1])
    assert records_of(bases, state.frozen)[0]["path"] == str(base_folder)
    with Checkpoints(tmp_path) as checkpoints:
        stored = without_bases(state, bases)
        assert stored.frozen is None
        checkpoints.save(
            1,
            stored,
            config=config,
            tokenizer="{}",
            bases=records_of(bases, state.frozen),
            metrics={},
        )
    files = (tmp_path / "checkpoints" / "1").rglob("*")
    size = sum(path.stat().st_size for path in files if path.is_file())
    trained = num_bytes((state.params, state.opt_state))
    assert size < 1.2 * trained < num_bytes(state), (size, trained)


# --- Runs

FREEZE = ("level_one", "streams/text_norm")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    changes = {
        "data.data_dir": str(tmp_path_factory.mktemp("data")),
        "run.num_steps": 4,
        "run.evaluate_every": 2,
        "run.save_every": None,
        "run.keep_every": 2,
        "optimizer.ema_decay": 0.9,
        "optimizer.freeze": FREEZE,
    }
    arguments = [f"--config.{name}={value}" for name, value in changes.items()]
    return override(read_config(ROOT / "tests" / "configs" / "small_run.py"), arguments)


@pytest.fixture(scope="module")
def finished(config, with_base, tmp_path_factory):
    """The workdir, the first and the last state of a run; later ones share its jitted step."""
    workdir, states, steps = tmp_path_factory.mktemp("run"), [], {}
    initial, jit_step = resume.initial_state, loop.jit_step

    def remember(*arguments):
        graphdef, state = initial(*arguments)
        states.append(jax.tree.map(jnp.copy, state))
        return graphdef, state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "initial_state", remember)
        patch.setattr(loop, "jit_step", lambda *x: steps.setdefault(0, jit_step(*x)))
        state = train(config, workdir)
        yield workdir, states[0], state


@pytest.mark.release
def test_a_run_leaves_frozen_parameters_as_they_were(base_folder, finished):
    _, first, last = finished
    assert_same(last.frozen, first.frozen)
    frozen, given = by_name(last.frozen), load_file(base_folder / FILE)
    provided = {f"decoder/{name}": x for name, x in given.items()}
    below = ("level_one/", "streams/text_norm/")
    assert frozen.keys() - provided.keys() == {x for x in frozen if x.startswith(below)}
    for name, x in provided.items():
        assert frozen[name].dtype == np.float16
        np.testing.assert_array_equal(frozen[name], x)
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), last.params, first.params)
    assert changed["decoder"]["layers"][0]["memory_attention"]["q"]["kernel"]
    assert changed["head"]["kernel"]


@pytest.mark.release
def test_a_checkpoint_names_the_base_and_does_not_store_it(base_folder, finished):
    workdir, _, state = finished
    checkpoints = Checkpoints(workdir)
    assert checkpoints.read_bases(4) == [record(base_folder)]
    saved = checkpoints.read_shapes(4)
    provided = base_in(base_folder).provided.keys()
    assert names_in(saved["frozen"]) == names_in(state.frozen) - provided
    assert names_in(saved["params"]) == names_in(saved["ema"]) == names_in(state.params)
    assert not names_in(state.params) & names_in(state.frozen)


@pytest.mark.release
def test_a_resumed_run_with_frozen_parameters_is_the_unbroken_one(
    config, finished, tmp_path, monkeypatch
):
    workdir, _, state = finished
    validate = slam_v3_task.validate

    def fails_at_the_second(experiment, graphdef, state, *more):
        if int(state.step) == 4:
            raise KeyboardInterrupt
        return validate(experiment, graphdef, state, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(slam_v3_task, "validate", fails_at_the_second)
        train(config, tmp_path)
    assert Checkpoints(tmp_path).steps() == [2]
    assert_same(train(config, tmp_path), state)
    losses = [
        [r["total"] for r in read_metrics(each) if r["split"] == "train"]
        for each in (workdir, tmp_path)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.release
def test_a_run_opens_where_its_base_moved_and_not_where_it_was_changed(
    config, finished, base_folder, tmp_path, monkeypatch
):
    workdir, _, state = finished
    moved = tmp_path / "moved"
    base_folder.rename(moved)
    try:
        for open_it in (lambda x: load(workdir, 4, x), lambda x: train(config, workdir, base=x)):
            with pytest.raises(InputError, match=f"{base_folder}/{FILE}: No such file"):
                open_it(())
            open_it([moved])
        loaded = load(workdir, 4, [moved])
        assert_same(split_model(loaded.model)[1], state.best_params)
        assert_same(train(config, workdir, base=[moved]), state)
        data = (moved / FILE).read_bytes()
        (moved / FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        for open_it in (lambda x: load(workdir, 4, x), lambda x: train(config, workdir, base=x)):
            with pytest.raises(InputError, match=f"{moved}/{FILE}: its sha256 is"):
                open_it([moved])
        (moved / FILE).write_bytes(data)
    finally:
        moved.rename(base_folder)
    assert_same(split_model(load(workdir, 4).model)[1], state.best_params)


@pytest.mark.release
def test_a_changed_record_of_a_base_is_a_damaged_checkpoint(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "4" / "bases.json"
    assert json.loads(path.read_text())[0]["name"] == NAME
    path.write_text(path.read_text().replace(NAME, "model.decoder.pretraimed"))
    with pytest.raises(CheckpointError, match="damaged: bases.json is not what was written"):
        load(tmp_path / "run", 4)


@pytest.mark.release
@pytest.mark.parametrize("name", ["train", "freeze"])
def test_a_run_resumes_only_with_the_same_parameters(config, finished, name):
    other = override(config, [f"--config.optimizer.{name}=('head',)"])
    with pytest.raises(CheckpointError, match=rf"optimizer\.{name}=\(.*'head',\); use another"):
        train(other, finished[0])


@pytest.mark.slow
def test_a_run_goes_back_past_bad_batches_with_its_frozen_parameters(
    config, finished, tmp_path, monkeypatch
):
    config = override(config, ["--config.run.max_bad_steps=1", "--config.run.evaluate_every=1"])
    batches = slam_v3_task.training_batches

    def broken(*args, start_step=0, **more):
        made = batches(*args, start_step=start_step, **more)
        for step, (view, batch) in enumerate(made, start_step + 1):
            if step == 3:
                aux = np.full_like(batch.inputs.aux, np.nan)
                batch = dataclasses.replace(batch, inputs=Inputs(aux=aux))
            yield view, batch

    monkeypatch.setattr(slam_v3_task, "training_batches", broken)
    state = train(config, tmp_path)
    assert (state.step, state.skipped) == (4, 1)
    assert_same(state.frozen, finished[1].frozen)
