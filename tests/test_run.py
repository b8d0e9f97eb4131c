"""A run resumes as if it had never been interrupted, whatever interrupted it."""

import copy
import dataclasses
import functools
import itertools
import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same

from slam_jax.data import AuxFormat, Batch, Tokenizer, prepare, training_batches
from slam_jax.data.order import evaluation_order
from slam_jax.errors import ConfigError, InputError
from slam_jax.reporting.checkpoint import evaluate_checkpoint
from slam_jax.reporting.report import write_evaluation
from slam_jax.runtime.memory import OutOfMemory
from slam_jax.runtime.signals import Stop, Stopped
from slam_jax.slam_v3 import Inputs, SlamV3
from slam_jax.slam_v3.flops import decode_flops, encode_flops, num_memory
from slam_jax.training import (
    CheckpointError,
    Checkpoints,
    Experiment,
    Profile,
    load,
    loop,
    override,
    read_config,
    resume,
    slam_v3_task,
    split_model,
    train,
)
from slam_jax.training.losses import LossParts
from slam_jax.training.metrics import read_metrics
from slam_jax.training.optimizer import make_schedule
from slam_jax.training.slam_v3_task import SlamV3Task
from slam_jax.training.start import state_shapes
from slam_jax.training.state import StepMetrics

ROOT = Path(__file__).parent.parent


# --- A run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    changes = {
        "data.data_dir": str(tmp_path_factory.mktemp("data")),
        "run.num_steps": 6,
        "run.evaluate_every": 2,
        "run.save_every": None,
        "run.keep_every": 2,
        "optimizer.ema_decay": 0.9,
    }
    arguments = [f"--config.{name}={value}" for name, value in changes.items()]
    return override(read_config(ROOT / "tests" / "configs" / "small_run.py"), arguments)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of one model share its jitted step and its initial state: each is compiled once."""
    step, initial, shapes = loop.jit_step, resume.initial_state, resume.state_shapes

    def remember(function):
        results = {}

        def remembered(task, *rest):
            experiment = task.experiment
            parts = experiment.seed, experiment.model, experiment.optimizer, experiment.loss
            sizes = [jax.tree.map(jnp.shape, x) if hasattr(x, "params") else x for x in rest]
            key = repr((parts, experiment.run.num_steps, experiment.run.prng_impl, sizes[-2:]))
            if key not in results:
                results[key] = function(task, *rest)
            return results[key]

        return remembered

    def copied(*arguments):
        graphdef, state = remembered_initial(*arguments)
        return graphdef, jax.tree.map(jnp.copy, state)  # a step deletes the one that it is given

    remembered_initial = remember(initial)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "jit_step", remember(step))
        patch.setattr(resume, "initial_state", copied)
        patch.setattr(resume, "state_shapes", remember(shapes))
        yield


@pytest.fixture(scope="module")
def finished(config, compiled_once, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(config, workdir, profile=Profile(2, 2))


def numbers(workdir):
    return [
        (r["step"], r["split"], r.get("total"), r.get("accuracy")) for r in read_metrics(workdir)
    ]


@pytest.mark.release
def test_a_run_leaves_checkpoints_and_metrics(config, finished):
    workdir, state = finished
    assert state.step == 6
    assert Checkpoints(workdir).steps() == [2, 4, 6]
    records = read_metrics(workdir)
    assert [r["step"] for r in records if r["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["split"] == "validation"] == [2, 4, 6]
    assert {"accuracy", "aux/relational", "aux/non_relational"} <= records[-1].keys()
    assert Checkpoints(workdir).read_config("latest") == config
    speeds = [r for r in records if r["split"] == "speed"]
    assert [r["step"] for r in speeds] == [1, 2, 3, 4, 5, 6]
    [compile_seconds] = {r["compile_seconds"] for r in speeds}  # the one view is compiled once
    assert compile_seconds > 0 and all(r["step_seconds"] > 0 for r in speeds)
    assert not {"mfu", "peak_memory_bytes"} & speeds[-1].keys()  # a CPU has neither
    [trace] = (workdir / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    assert [dict(e.stats)["step_num"] for e in events if e.name == "train"] == [2, 3]


@pytest.mark.release
def test_the_loaded_model_is_the_one_that_was_trained(config, finished):
    workdir, state = finished
    loaded = load(workdir, "latest")
    assert (loaded.step, loaded.config) == (6, config)
    assert_same(split_model(loaded.model)[1], state.ema)
    data = Experiment.from_config(config).data
    dataset = prepare(data)
    assert loaded.tokenizer == dataset.tokenizer
    _, batch = next(training_batches(dataset.train, loaded.tokenizer, data))
    logits = jax.jit(SlamV3.__call__)(loaded.model, batch.tokens, batch.inputs).logits
    assert logits.shape == (*batch.tokens.shape, loaded.tokenizer.vocab_size)
    assert jnp.isfinite(logits).all()


@pytest.mark.release
def test_a_finished_run_returns_its_state_at_once(config, finished, monkeypatch):
    workdir, state = finished
    monkeypatch.setattr(slam_v3_task, "validate", None)
    monkeypatch.setattr(resume, "initial_state", None)  # only the restored state needs memory
    before = numbers(workdir)
    # Such as the advice of a run that ended over damaged pictures.
    other = override(config, [f"--config.{name}={value}" for name, value in MAY_CHANGE.items()])
    other["data"]["data_dir"] = config["data"]["data_dir"] + "/."
    assert_same(train(other, workdir), state)
    assert numbers(workdir) == before


MAY_CHANGE = {
    "data.path": "elsewhere",
    "data.max_damaged_records": 99,
    "loss.chunk_tokens": 7,
    "model.remat": "layers",
    "run.log_every": 3,
    "run.save_every": 4,
    "run.keep_every": None,
    "run.metrics": "('exact_match', 'f1')",
    "mesh.data": 1,
}


@pytest.mark.release
def test_a_score_that_no_evaluation_has_is_named_once_the_step_is_saved(config, finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "6")
    other = override(config, ["--config.run.best_metric=aux/relationl"])
    with pytest.raises(ConfigError, match="'aux/relationl'; did you mean 'aux/relational'?"):
        train(other, workdir)
    assert Checkpoints(workdir).steps() == [2, 4, 6]
    other = override(config, ["--config.run.best_metric=loss/aux"])
    assert_same(train(other, workdir), finished[1])


@pytest.mark.release
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(config, finished, tmp_path, monkeypatch):
    workdir, state = finished
    # The machine itself repeats: else the comparison below would say nothing.
    assert_same(train(config, tmp_path / "again"), state)
    validate = slam_v3_task.validate

    def fails_at_the_second(experiment, graphdef, state, *more):
        if int(state.step) == 4:
            raise KeyboardInterrupt
        return validate(experiment, graphdef, state, *more)

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(slam_v3_task, "validate", fails_at_the_second)
        train(config, broken)
    assert Checkpoints(broken).steps() == [2]
    assert_same(train(config, broken), state)
    assert numbers(broken) == numbers(workdir)


def ask_at(monkeypatch, module, name, count):
    """A stop that is asked for when `module.NAME` gives its batch number `count`."""
    stop, made, given = Stop(), getattr(module, name), itertools.count(1)

    def asking(*args, **more):
        for batch in made(*args, **more):
            if next(given) == count:
                stop.request()
            yield batch

    monkeypatch.setattr(module, name, asking)
    return stop


def test_dropout_draws_by_the_chosen_generator(config):
    for impl, dtype in (("threefry2x32", "key<fry>"), ("rbg", "key<rbg>")):
        chosen = override(config, [f"--config.run.prng_impl={impl}"])
        _, state = state_shapes(SlamV3Task(Experiment.from_config(chosen)), 300)
        assert str(state.key.dtype) == dtype
    with pytest.raises(ConfigError, match="run.prng_impl"):
        Experiment.from_config(override(config, ["--config.run.prng_impl=mine"]))


@pytest.mark.slow
def test_a_run_that_reads_in_a_worker_process_is_the_same(config, finished, tmp_path):
    config = override(config, ["--config.data.workers=1"])
    assert_same(train(config, tmp_path), finished[1])
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_run_with_other_random_numbers_resumes_bit_for_bit(config, finished, tmp_path):
    config = override(config, ["--config.run.prng_impl=rbg", "--config.run.evaluate_batches=1"])
    state = train(config, tmp_path)
    assert str(jax.random.key_impl(state.key)) == "rbg"
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    assert_same(train(config, tmp_path), state)
    kernels = [x.params["head"]["kernel"] for x in (state, finished[1])]
    assert not np.array_equal(*kernels)


@pytest.mark.release
@pytest.mark.parametrize(
    ("module", "name", "count", "step"),
    [
        (slam_v3_task, "training_batches", 3, 3),
        # An evaluation would follow.
        pytest.param(slam_v3_task, "training_batches", 4, 4, marks=pytest.mark.slow),
        # In the middle of the second evaluation.
        pytest.param(slam_v3_task, "evaluation_batches", 3, 4, marks=pytest.mark.slow),
        (slam_v3_task, "evaluation_batches", 5, 6),  # and of the last
    ],
)
def test_a_run_that_is_asked_to_stop_saves_and_resumes(
    config, finished, tmp_path, monkeypatch, module, name, count, step
):
    workdir, state = finished
    with monkeypatch.context() as patch:
        stop = ask_at(patch, module, name, count)
        with pytest.raises(Stopped, match=f"step {step} is saved; the same command resumes"):
            train(config, tmp_path, stop)
    stopped = Checkpoints(tmp_path)
    assert stopped.steps()[-1] == step
    assert stopped.read_metrics(step) == {}
    if step == 6:
        # It is asked to stop again, in the middle of the evaluation that is still to be done.
        with monkeypatch.context() as patch:
            stop = ask_at(patch, slam_v3_task, "evaluation_batches", 1)
            with pytest.raises(Stopped, match="step 6 is saved"):
                train(config, tmp_path, stop)
        # Then the evaluation is written, and the run is killed before its checkpoint is.

        def killed(*args, **more):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Checkpoints, "save", killed)
            train(config, tmp_path)
    assert_same(train(config, tmp_path), state)
    assert numbers(tmp_path) == numbers(workdir)
    resumed, unbroken = Checkpoints(tmp_path), Checkpoints(workdir)
    assert resumed.best() == unbroken.best()
    for known in (4, 6):
        assert resumed.read_metrics(known) == unbroken.read_metrics(known)


@pytest.mark.slow
def test_an_evaluation_that_fails_or_is_cut_short_loses_no_step(
    config, finished, tmp_path, monkeypatch
):
    def full(*args, **more):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(slam_v3_task, "evaluate", full)
        with pytest.raises(OutOfMemory, match="an evaluation does not fit into memory; resume"):
            train(config, tmp_path)
    assert Checkpoints(tmp_path).steps() == [2] and Checkpoints(tmp_path).read_metrics(2) == {}
    # Then a notice of preemption before the second batch of the next evaluation, after two of the
    # one that was owed, two steps and the first batch. JAX counts such points from 1 on.
    points = []

    def reached(number: int) -> bool:
        points.append(number)
        return number == 6

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="step 4 is saved"):
        patch.setattr(loop.multihost_utils, "reached_preemption_sync_point", reached)
        train(config, tmp_path)
    assert points == [1, 2, 3, 4, 5, 6]
    assert_same(train(config, tmp_path), finished[1])
    assert numbers(tmp_path) == numbers(finished[0])


@pytest.mark.release
def test_an_evaluation_takes_its_batches_in_parts(config, finished, monkeypatch):
    taken = []

    def evaluate(graphdef, params, batches_by_view, *args, **more):
        [batches] = batches_by_view.values()
        taken.append([(len(batch.batch.tokens), len(batch.examples)) for batch in batches])
        metrics = {"views": {"aux": {"relational": {"accuracy": 0.5}}}}
        return SimpleNamespace(metrics=metrics, losses={"aux": 1.5})

    monkeypatch.setattr(slam_v3_task, "evaluate", evaluate)
    dataset = prepare(Experiment.from_config(config).data)
    for parts in (1, 2):
        experiment = Experiment.from_config(
            override(config, [f"--config.optimizer.accumulate_steps={parts}"])
        )
        graphdef, _ = state_shapes(SlamV3Task(experiment), dataset.tokenizer.vocab_size)
        slam_v3_task.validate(experiment, graphdef, finished[1], dataset, lambda: False)
    assert taken == [[(4, 4)] * 2, [(2, 2)] * 4]


@pytest.mark.release
@pytest.mark.parametrize("count", [1, None])
def test_an_evaluation_of_some_batches_is_a_sample_of_the_split(
    config, finished, monkeypatch, count
):
    taken = []

    def evaluate(graphdef, params, batches_by_view, *args, **more):
        taken.extend(e.record for b in batches_by_view["aux"] for e in b.examples)
        metrics = {"views": {"aux": {"relational": {"accuracy": 0.5}}}}
        return SimpleNamespace(metrics=metrics, losses={"aux": 1.5})

    monkeypatch.setattr(slam_v3_task, "evaluate", evaluate)
    experiment = Experiment.from_config(
        override(config, [f"--config.run.evaluate_batches={count}"])
    )
    dataset = prepare(experiment.data)
    graphdef, _ = state_shapes(SlamV3Task(experiment), dataset.tokenizer.vocab_size)
    slam_v3_task.validate(experiment, graphdef, finished[1], dataset, lambda: False)
    size = len(dataset.validation)
    order = evaluation_order(size, shuffled=count is not None)
    assert taken == [*order][: count and 4 * count]
    assert count is None or max(taken) > size // 2


@pytest.mark.release
def test_a_tokenizer_of_other_data_is_refused(config, finished, monkeypatch):
    workdir, _ = finished
    prepare = slam_v3_task.prepare

    def changed(data, tokenizer=None, *, whole=True, **more):
        made = prepare(data, tokenizer, **more)
        tokenizer = tokenizer or Tokenizer.train(["other words"], 280)
        return dataclasses.replace(made, tokenizer=tokenizer, corpus_is_whole=whole)

    monkeypatch.setattr(slam_v3_task, "prepare", changed)
    message = r"a tokenizer of sha256 \w{12}, and the data now gives \w{12}: the data set has"
    with pytest.raises(CheckpointError, match=message):
        train(config, workdir)
    # Where records are damaged, the words are other ones and the data is the same.
    monkeypatch.setattr(slam_v3_task, "prepare", functools.partial(changed, whole=False))
    assert train(config, workdir).step == 6


def test_what_has_no_room_is_refused_before_it_is_made(config, tmp_path):
    large = override(config, ["--config.model.embed_dim=1048576"])
    with pytest.raises(ConfigError, match=r"the training state needs [\d,.]+ GiB and there are"):
        train(large, tmp_path)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (MemoryError(), OutOfMemory),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), OutOfMemory),
        (jax.errors.JaxRuntimeError("INTERNAL: else"), jax.errors.JaxRuntimeError),
    ],
)
def test_a_step_that_does_not_fit_says_what_to_lower(config, tmp_path, monkeypatch, error, raised):
    def full(*args, **more):
        raise error

    monkeypatch.setattr(slam_v3_task, "training_batches", full)
    with pytest.raises(raised, match=r"lower data\.batch_size|INTERNAL"):
        train(config, tmp_path)


def break_steps(monkeypatch, steps):
    """The batches of these steps hold a NaN."""
    batches = slam_v3_task.training_batches

    def broken(*args, start_step=0, **kwargs):
        made = batches(*args, start_step=start_step, **kwargs)
        for step, (view, batch) in enumerate(made, start_step + 1):
            if step in steps:
                aux = np.full_like(batch.inputs.aux, np.nan)
                batch = dataclasses.replace(batch, inputs=Inputs(aux=aux))
            yield view, batch

    monkeypatch.setattr(slam_v3_task, "training_batches", broken)


@pytest.mark.parametrize("text", ["", "5", "5:", "0:2", "2:0", "-1:2", "1:2:3", "a:b", "1.5:2"])
def test_a_profile_that_is_no_step_and_count_is_refused(text):
    with pytest.raises(ConfigError, match=r"^--profile is '.*'; expected STEP:COUNT, two whole"):
        Profile.parse(text)


def test_a_profile_beyond_the_run_is_refused(config, tmp_path):
    assert Profile.parse("5:2") == (5, 2)
    with pytest.raises(ConfigError, match="--profile is '5:3'; expected steps up to 6, the last"):
        train(config, tmp_path, profile=Profile(5, 3))
    assert not list(tmp_path.iterdir())


def test_rates_are_of_the_whole_batch(config):
    """Of two processes each has half of it."""
    shown: list[dict[str, Any]] = []
    progress: Any = SimpleNamespace(update=lambda step, **more: shown.append(more))
    nothing: Any = None
    dataset: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=50))
    experiment = Experiment.from_config(config)
    task = SlamV3Task(experiment)
    trainer = loop.Trainer(
        *(task, config, nothing, dataset, nothing, None, progress, Stop(), None, nothing)
    )
    half = np.full((2, 5), 6, np.int32)
    inputs = Inputs(aux=np.zeros((2, 3, 10), np.float32))
    batch = Batch(inputs, np.zeros((2, 5, 8), np.int32), half - 2, half)
    zero: Any = np.zeros((), np.int32)
    metrics = StepMetrics(LossParts(*[zero] * 5), zero, zero, zero)
    trainer._report(3, "aux", batch, task.flops(50, batch), metrics)
    [rates] = shown
    assert (rates["examples"], rates["tokens"]) == (4, 4 * 5 * 6)
    model = experiment.with_vocabulary(50)
    forward = encode_flops(model, aux=3)
    forward += decode_flops(model, prompts=5, length=7, memory=num_memory(model, aux=3))
    assert rates["flops"] == 3 * 4 * forward


@pytest.mark.slow
def test_a_run_goes_back_past_bad_batches_and_on(config, tmp_path, monkeypatch, capsys):
    changes = {"run.max_bad_steps": 2, "run.num_steps": 9, "run.save_every": 3}
    arguments = [f"--config.{name}={value}" for name, value in changes.items()]
    config = override(config, [*arguments, "--config.run.evaluate_every=9"])
    break_steps(monkeypatch, {2, 5, 6})
    restored = []
    restore = Checkpoints.restore
    monkeypatch.setattr(
        Checkpoints, "restore", lambda *a, **more: (restored.append(a[1]), restore(*a, **more))[1]
    )
    state = train(config, tmp_path / "run")
    assert restored == [3]
    assert (state.step, state.skipped, state.bad_steps) == (9, 3, 0)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.params))
    shown = capsys.readouterr().out
    assert "step 2 (aux): loss or gradient is not finite, step skipped" in shown
    assert "step 6: loss or gradient has not been finite for 2 steps; resuming with" in shown
    # The schedule counts the updates that the parameters have seen.
    schedule = make_schedule(Experiment.from_config(config).optimizer, 9)
    rates = [r["learning_rate"] for r in read_metrics(tmp_path / "run") if r["split"] == "train"]
    made = np.array([0, 1, 1, 2, 3, 3, 2, 3, 4])
    np.testing.assert_allclose(rates, schedule(made), rtol=1e-6)
    # What a killed run that is started again does, too.
    validate = slam_v3_task.validate
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(slam_v3_task, "validate", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        train(config, tmp_path / "broken")
    assert slam_v3_task.validate is validate
    assert Checkpoints(tmp_path / "broken").steps() == [3, 6]
    assert_same(train(config, tmp_path / "broken"), state)
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "run")


@pytest.mark.release
@pytest.mark.parametrize("bad", [{4, 5}, {4, 5, 6}])
def test_a_run_may_stop_where_it_goes_back(config, tmp_path, monkeypatch, bad):
    """The step after the last bad one is taken with the parameters that it goes back to."""
    changes = {"run.max_bad_steps": 2, "run.num_steps": 8, "run.save_every": 3}
    arguments = [f"--config.{name}={value}" for name, value in changes.items()]
    config = override(config, [*arguments, "--config.run.evaluate_every=8"])
    break_steps(monkeypatch, bad)
    state = train(config, tmp_path / "run")
    assert (state.step, state.skipped, state.bad_steps) == (8, len(bad), 0)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="step 5 is saved"):
        train(config, tmp_path / "stopped", ask_at(patch, slam_v3_task, "training_batches", 5))
    assert_same(train(config, tmp_path / "stopped"), state)
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_stays_bad_stops_with_its_checkpoint_whole(config, tmp_path, monkeypatch):
    config = override(config, ["--config.run.max_bad_steps=2", "--config.run.num_steps=40"])
    break_steps(monkeypatch, range(3, 99))
    message = r"for 4 steps, also not from the checkpoint of step 2; lower .* steps 3 to 6$"
    with pytest.raises(loop.TrainingDiverged, match=message):
        train(
            override(config, ["--config.run.evaluate_every=30", "--config.run.save_every=2"]),
            tmp_path,
        )
    assert Checkpoints(tmp_path).verify() == {2: None, 4: None}


@pytest.mark.release
def test_a_workdir_belongs_to_one_configuration(config, finished):
    other = override(config, ["--config.optimizer.learning_rate=0.5"])
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate=0\.02 .*=0\.5; use ano"):
        train(other, finished[0])


@pytest.mark.release
def test_a_field_that_an_older_config_lacks_has_its_default(config, finished, monkeypatch):
    read = Checkpoints.read_config

    def older(checkpoints, step):
        saved = read(checkpoints, step)
        del saved["optimizer"]["momentum"], saved["mesh"]
        return saved

    monkeypatch.setattr(Checkpoints, "read_config", older)
    assert train(config, finished[0]).step == 6
    with pytest.raises(
        CheckpointError, match=r"optimizer\.momentum=0\.95 and this one has .*=0\.9;"
    ):
        train(override(config, ["--config.optimizer.momentum=0.9"]), finished[0])


@pytest.mark.release
def test_evaluation_of_a_checkpoint_writes_the_views_it_was_trained_on(finished):
    workdir, _ = finished
    evaluation = evaluate_checkpoint(workdir, "latest", ["--config.data.batch_size=16"])
    assert write_evaluation(evaluation) == workdir / "eval"
    written = json.loads((workdir / "eval" / "metrics.json").read_text())
    assert written == evaluation.metrics and written["step"] == 6
    rows = {"train": 256, "validation": 32, "test": 32}
    assert written["data"]["rows"] == rows and written["data"]["name"] == "sort_of_clevr/tiny"
    [(view, kinds)] = written["views"].items()
    assert view == "aux" and set(kinds) == {"non_relational", "relational"}
    for figures in kinds.values():
        assert {"accuracy", "low", "high", "n"} < set(figures) and figures["n"] == 320
    page = (workdir / "eval" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 5 and "<figcaption>p3</figcaption>" in page and "shape of" in page


# --- Entry points


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


QUICKSTART = "--config=configs/slam_v3_quickstart.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval.py",), "flag --workdir"),
        (("eval.py", "--workdir=nowhere"), "no such folder"),
        (("train.py", "--workdir=new"), "flag --config"),
        (("train.py", "--workdir=new", "--config=configs/no.py"), "configs/no.py: no such file"),
        (("train.py", "--workdir=new", QUICKSTART, "--config.model.num_heads=7"), "embed_dim"),
        (
            ("train.py", "--workdir=new", QUICKSTART, "--config.run.num_step=7"),
            "run has no field 'num_step'; did you mean 'num_steps'?",
        ),
        (("train.py", "--workdir=new", QUICKSTART, "--steps=7"), "'--steps=7'; expected --config"),
        (
            ("train.py", "--workdir=new", QUICKSTART, "--profile=7"),
            "--profile is '7'; expected STEP",
        ),
    ],
)
def test_entry_points_say_in_one_line_what_is_wrong(arguments, message):
    done = run_script(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (ROOT / "new").exists()


@pytest.mark.release
def test_an_evaluation_changes_the_data_alone(finished):
    with pytest.raises(ConfigError, match="config.model is part of the checkpoint"):
        evaluate_checkpoint(finished[0], "latest", ["--config.model.embed_dim=64"])


def write_table(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config_of_table(config: Any, folder: Path) -> Any:
    config = copy.deepcopy(config)
    config["data"] |= {
        "name": "folder",
        "path": str(folder),
        "max_damaged_records": 0,
        "stages": [[0, {"all": 1.0}]],
    }
    config["model"]["aux_slots"] = True
    config["run"] |= {"num_steps": 2, "evaluate_every": 1}
    return config


@pytest.mark.slow
def test_a_run_tells_once_what_is_odd_about_its_data(config, tmp_path, caplog):
    rows = [{"answer": "ab"[i % 2], "size": i, "question": "why?"} for i in range(12)]
    rows[0]["split"] = "train"
    rows.append({"answer": "a", "size": 0, "split": "test"})
    folder = write_table(tmp_path / "own", rows)
    stop = Stop()
    stop.request()
    with pytest.raises(Stopped):
        train(config_of_table(config, folder), tmp_path / "run", stop)
    told = [record.getMessage() for record in caplog.records if record.name == "slam_jax"]
    unused, shared = told
    assert unused == (
        f"{folder / 'data.jsonl'}: columns that are not used: 'question' (row 1: 'why?' is no "
        "number; did you mean 'prompt'?)"
    )
    assert shared.startswith(
        f"{folder / 'data.jsonl'}: pictures or texts that are in more than one split: 1 (first "
        "in row 13)"
    )


@pytest.mark.release
def test_a_run_resumes_only_with_the_numbers_it_was_trained_on(config, tmp_path, capsys):
    folder = tmp_path / "own"

    def write(offset: float) -> None:
        write_table(folder, [{"answer": "ab"[i % 2], "size": i + offset} for i in range(12)])

    config = config_of_table(config, folder)
    write(0.0)
    train(config, tmp_path / "run")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("initialising the model; this can take minutes")
    assert sum(line.startswith("compiling the training step; this can") for line in shown) == 1
    assert load(tmp_path / "run").aux_format == AuxFormat(("size",), *aux_of(tmp_path / "run"))
    write(0.5)
    with pytest.raises(CheckpointError, match="other columns of numbers, or other numbers in them"):
        train(config, tmp_path / "run")


def aux_of(workdir: Path) -> Any:
    saved = Checkpoints(workdir).read_aux("latest") or {}
    return saved["mean"], saved["scale"]


@pytest.mark.parametrize(
    "stored",
    [
        {"names": None},
        {"names": ["a"], "mean": [1.0]},
        {"x": 1},
        {"names": [1], "mean": [0.0], "scale": [1.0]},
        {"names": ["a"], "mean": ["b"], "scale": [1.0]},
        {"names": ["a"], "mean": [None], "scale": [1.0]},
        {"names": ["a"], "mean": [10**400], "scale": [1.0]},
        {"names": ["a"], "mean": [0.0], "scale": [0.0]},
    ],
)
def test_a_damaged_format_of_vectors_is_refused_in_words(stored):
    with pytest.raises(InputError, match="aux format: "):
        AuxFormat.from_json(stored)
