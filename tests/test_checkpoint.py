"""Checkpoints come back bit for bit or not at all, and the right ones are kept."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, full_disk
from jax.sharding import NamedSharding, PartitionSpec

from slam_jax.errors import ConfigError
from slam_jax.runtime import distributed
from slam_jax.training.checkpoint import CheckpointError, Checkpoints, manifest


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    ema: Any
    key: Any


def make_state(seed: int = 0, ema: bool = False) -> State:
    key = jax.random.key(seed)
    params = {
        "encoder": {"kernel": jax.random.normal(key, (8, 4))},
        "decoder": {"bias": jax.random.normal(key, (4,), jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(
        step=jnp.int32(seed),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(lambda x: x + 1, params) if ema else None,
        key=jax.random.fold_in(key, 7),
    )


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def save(checkpoints, step, state=None, *, config=None, tokenizer="{}", **metrics):
    state = make_state(step) if state is None else state
    config = config or {"seed": step}
    return checkpoints.save(step, state, config=config, tokenizer=tokenizer, metrics=metrics)


@pytest.fixture
def big():
    return {"x": jax.random.normal(jax.random.key(0), (1 << 16,))}


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip_is_bit_for_bit(tmp_path, ema):
    state = make_state(3, ema=ema)
    tokenizer = '{"a":  "é\\n"}'
    config = {"model": {"width": 8, "rate": 1e-3, "name": "ü", "none": None}, "views": ["aux"]}
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 3, state, config=config, tokenizer=tokenizer, accuracy=np.float32(0.5))
    reader = Checkpoints(tmp_path)
    assert_same(reader.restore(3, abstract(state)), state)
    assert_same(reader.restore(3, state), state)
    assert reader.read_config(3) == config
    assert reader.read_tokenizer(3) == tokenizer
    assert reader.read_metrics(3) == {"accuracy": 0.5}


def test_moments_and_averages_may_have_another_width(tmp_path):
    """Up to version 0.27 they had that of the parameters. `load` reads an average as parameters."""

    def bias(dtype):
        state = make_state(3, ema=True)
        wide = jax.tree.map(
            lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x,
            (state.opt_state, state.ema),
        )
        return dataclasses.replace(state, opt_state=wide[0], ema=wide[1])

    narrow, wide = bias(jnp.bfloat16), bias(jnp.float32)
    checkpoints = Checkpoints(tmp_path)
    for step, state in ((1, narrow), (2, wide)):
        save(checkpoints, step, state)
    checkpoints.wait()
    assert_same(checkpoints.restore(1, abstract(wide)), wide)
    assert_same(checkpoints.restore_subtree(2, "ema", abstract(narrow.ema)), narrow.ema)
    other = jax.tree.map(lambda x: x.astype(jnp.float32), narrow.params)
    with pytest.raises(CheckpointError, match="bfloat16.* in the checkpoint and float32"):
        checkpoints.restore_subtree(1, "params", abstract(other))


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"x": jnp.arange(1 << 20, dtype=jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state)
        for _ in range(3):
            state = update(state)
        checkpoints.wait()
        restored = checkpoints.restore(1, abstract(state))
    np.testing.assert_array_equal(restored["x"], np.arange(1 << 20))


def test_latest_best_and_every_kth_are_kept(tmp_path):
    nan = float("nan")
    scores = {1: 0.5, 2: 0.9, 3: None, 4: 0.1, 5: 0.9, 6: 0.2, 7: nan, 8: 0.3, 9: 0.1}
    checkpoints = Checkpoints(tmp_path, keep_every=2)
    for step, score in scores.items():
        save(checkpoints, step, **({} if score is None else {"accuracy": score}))
        if step in (3, 7):  # a run that is started again knows the best so far
            checkpoints.wait()
            checkpoints = Checkpoints(tmp_path, keep_every=2)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5, 6, 8, 9]
    assert {path.name for path in checkpoints.directory.iterdir()} == set("245689")
    assert checkpoints.best() == 5
    assert checkpoints.resolve() == checkpoints.resolve("best") == 5
    assert checkpoints.resolve("latest") == checkpoints.resolve("9") == 9


def test_the_newest_configuration_says_which_score_is_best(tmp_path):
    scores = [(0.5, 2.0), (0.9, 3.0), (0.6, 1.5), (0.6, 1.5)]
    for metric, expected in (("accuracy", 2), ("loss/image", 4), ("none", None)):
        with Checkpoints(tmp_path / metric.replace("/", "-"), keep_every=1) as checkpoints:
            for step, (accuracy, loss) in enumerate(scores, 1):
                config = {"run": {"best_metric": metric if step == 4 else "other"}}
                given: Any = {"accuracy": accuracy, "loss/image": loss}
                save(checkpoints, step, config=config, **given)
        assert checkpoints.best() == expected
        assert checkpoints.resolve() == (expected or 4)


def test_a_saved_step_is_left_as_it_is(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert save(checkpoints, 2, config={"first": True})
        assert not save(checkpoints, 2, config={"first": False})
    assert checkpoints.read_config(2) == {"first": True}


KERNEL = "params/encoder/kernel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.replace(ema=s.params), "ema/decoder/bias is absent .* and bfloat16.4. here"),
        (lambda s: s.replace(key=None), "key is uint32.2. .* and absent here"),
        (lambda s: s.replace(step=jnp.zeros((3,), jnp.int32)), "step is int32.. .* and int32.3. h"),
        (lambda s: s.replace(key=jax.random.key(0, impl="rbg")), "key is uint32.2. .* uint32.4. h"),
        (
            lambda s: s.replace(params=jax.tree.map(lambda x: x.astype("float16"), s.params)),
            r"params/decoder/bias is bfloat16\[4\] in the checkpoint and float16\[4\] here",
        ),
        (
            lambda s: s.replace(params=jax.tree.map(lambda x: x.T, s.params)),
            rf"{KERNEL} is float32\[8, 4\] in the checkpoint and float32\[4, 8\] here",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, change, message):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state)
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=message) as error:
            checkpoints.restore(1, change(state))
    assert "\n" not in str(error.value)


def test_a_part_is_read_alone(tmp_path):
    state = make_state(ema=True)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state)
        save(checkpoints, 2, make_state())
        checkpoints.wait()
        like = abstract(state.params)
        assert_same(checkpoints.restore_subtree(2, "params", like), state.params)
        with pytest.raises(CheckpointError, match="ema/decoder/bias is absent in the checkpoint"):
            checkpoints.restore_subtree(2, "ema", like)
        with pytest.raises(CheckpointError, match=f"{KERNEL} is float32.* and absent here"):
            checkpoints.restore_subtree(2, "params", {"decoder": like["decoder"]})
    with Checkpoints(tmp_path / "other") as checkpoints:
        save(checkpoints, 1, state)
        checkpoints.wait()
        assert_same(checkpoints.restore_subtree(1, "ema", like), state.ema)


def test_a_failed_write_surfaces_and_loses_nothing(tmp_path, big):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, big)
    checkpoints.wait()
    for surface in (checkpoints.wait, lambda: save(checkpoints, 3, big)):
        with full_disk():
            save(checkpoints, 2, big)
            with pytest.raises(
                CheckpointError, match="2: the checkpoint could not be written"
            ) as e:
                surface()
        assert "\n" not in str(e.value)
        assert checkpoints.steps() == [1]
        assert_same(checkpoints.restore("latest", big), big)
    save(checkpoints, 2, big)  # the disk has room again
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


def test_an_old_step_that_cannot_go_yet_fails_no_save(tmp_path, big, monkeypatch):
    rmtree = shutil.rmtree

    def busy(path, ignore_errors=False):
        if Path(path).name == "1.writing" and not ignore_errors:
            raise OSError("Device or resource busy")
        if Path(path).name != "1.writing":
            rmtree(path, ignore_errors)

    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", busy)
            for step in (1, 2, 3, 4):
                save(checkpoints, step, big)
            checkpoints.wait()
        left = {path.name for path in checkpoints.directory.iterdir()}
        assert left == {"1.writing", "3", "4"}
        save(checkpoints, 5, big)
    assert {path.name for path in checkpoints.directory.iterdir()} == {"4", "5"}


def test_what_fails_in_one_process_of_several_waits_for_its_own_write_alone(
    tmp_path, big, monkeypatch
):
    with pytest.raises(KeyError), Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, big)
        pending: Any = checkpoints._pending
        pending[1].result()
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(
            distributed, "run_on_first", lambda action: pytest.fail("asked the others")
        )
        raise KeyError
    assert Checkpoints(tmp_path).steps() == [1]


def test_a_write_that_cannot_start_says_why(tmp_path, big):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/checkpoints/1: .*Not a directory"):
        save(Checkpoints(tmp_path / "file"), 1, big)


def test_what_a_killed_run_was_writing_does_not_count(tmp_path, big):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, big)
    folder = checkpoints.directory
    (folder / "notes").mkdir()
    for step in (7, 8):
        shutil.copytree(folder / "1", folder / f"{step}.writing")
    before = sorted(folder.rglob("*"))
    assert checkpoints.steps() == [1]
    assert_same(checkpoints.restore("latest", big), big)
    assert sorted(folder.rglob("*")) == before  # a reader leaves a run in progress alone
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 8, big)
    assert {path.name for path in folder.iterdir()} == {"1", "8", "notes"}


def test_a_step_that_is_not_there_is_one_clear_line(tmp_path, big):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        Checkpoints(tmp_path / "nowhere").resolve("latest")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Checkpoints(tmp_path).read_config(3)
    assert Checkpoints(tmp_path).best() is None
    with Checkpoints(tmp_path, keep_every=1) as checkpoints:
        save(checkpoints, 1, big)
        save(checkpoints, 2, big)
    assert checkpoints.resolve() == 2
    for step, message in (
        (3, "no checkpoint of step 3; there are: 1, 2"),
        ("last", "'last', expected a number, 'latest' or 'best'; there are: 1, 2"),
        (
            "best",
            "the metric 'accuracy'; give a step or 'latest'; there are: 1, 2",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(step, big)


# --- Damage


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "deleted": lambda path: path.unlink(),
    "a link": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damaged_file_is_read(tmp_path, damage):
    """Whichever file it is: arrays, their index, JSON or the manifest itself."""
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 4, state, accuracy=1.0)
    folder = checkpoints.directory / "4"
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = [path.relative_to(folder) for path in files if path.stat().st_size]
    assert len(names) > 8
    for name in names:
        DAMAGES[damage](folder / name)
        reader = Checkpoints(tmp_path)
        found = reader.verify()[4]
        assert found
        if damage in ("cut", "longer") and name.name != "manifest.json":
            assert f"{name.as_posix()} has " in found  # told without reading it
        for read in (
            lambda reader=reader: reader.restore(4, state),
            lambda reader=reader: reader.read_config(4),
            lambda reader=reader: reader.restore("latest", state),
            lambda reader=reader: reader.recover(print),
        ):
            with pytest.raises(CheckpointError, match="checkpoint is damaged|can be read") as error:
                read()
            assert "\n" not in str(error.value)
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
    assert Checkpoints(tmp_path).verify() == {4: None}


def test_a_file_too_many_is_damage(tmp_path, big):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 4, big)
    (checkpoints.directory / "4" / "arrays" / "more").write_text("x")
    assert Checkpoints(tmp_path).verify() == {4: "arrays/more is not in its manifest"}


def test_what_is_no_file_is_not_opened(tmp_path, big, monkeypatch):
    """A pipe, say, which never ends."""
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 4, big)
    monkeypatch.chdir(checkpoints.directory / "4")
    empty = next(
        path for path in Path("arrays").iterdir() if path.is_file() and not path.stat().st_size
    )
    empty.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(empty))
        assert "is neither a file nor a folder" in str(Checkpoints(tmp_path).verify()[4])


def test_a_run_goes_on_from_the_newest_step_that_is_whole(tmp_path):
    states = {step: make_state(step) for step in (1, 2, 3)}
    with Checkpoints(tmp_path, keep_every=1) as checkpoints:
        for step, state in states.items():
            save(checkpoints, step, state, accuracy=step / 10)
    assert [checkpoints.recover(print, until=step) for step in (0, 1, 2, 9)] == [1, 1, 2, 3]
    folder = checkpoints.directory
    flip(folder / "3" / "metrics.json")
    flip(folder / "2" / "manifest.json")
    told = []
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.resolve("latest") == checkpoints.resolve() == 1
    assert checkpoints.recover(told.append) == 1
    assert [line.partition(": ")[0] for line in told] == [
        "checkpoint of step 3 skipped",
        "checkpoint of step 2 skipped",
    ]
    assert "metrics.json is not what was written; it is now" in told[0]
    # Nothing is lost, and the steps can be saved again; damaged once more they are kept as well.
    assert {path.name for path in folder.iterdir()} == {"1", "2.damaged", "3.damaged"}
    with checkpoints:
        save(checkpoints, 2, states[2])
    flip(folder / "2" / "config.json")
    assert Checkpoints(tmp_path).recover(told.append) == 1
    assert (folder / "2.damaged-2").is_dir()
    flip(folder / "1" / "config.json")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read \(1: config.json is not"):
        Checkpoints(tmp_path).recover(told.append)
    assert (folder / "1").is_dir()
    assert Checkpoints(tmp_path / "new").recover(told.append) is None


def test_a_file_of_absurd_size_is_not_read(tmp_path, big):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, big)
    folder = checkpoints.directory / "1"
    with (folder / "config.json").open("ab") as file:
        file.truncate(1 << 40)
    listed = json.loads((folder / "manifest.json").read_text())
    listed["files"]["config.json"]["size"] = 1 << 40
    (folder / "manifest.json").write_text(json.dumps(listed))
    reader = Checkpoints(tmp_path)
    reader._verified.add(1)  # as if its sha256 fitted
    with pytest.raises(CheckpointError, match="1,099,511,627,776 bytes"):
        reader.read_config(1)
    with (folder / "manifest.json").open("ab") as file:
        file.truncate(1 << 40)
    assert Checkpoints(tmp_path).verify() == {1: "manifest.json has 1,099,511,627,776 bytes"}


def test_a_failed_write_is_told_without_waiting(tmp_path, big):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.poll()
    with full_disk():
        save(checkpoints, 2, big)
        pending: Any = checkpoints._pending
        with contextlib.suppress(Exception):
            pending[1].result()
        with pytest.raises(CheckpointError, match="2: the checkpoint could not be written"):
            checkpoints.poll()
    checkpoints.wait()
    assert list(checkpoints.directory.iterdir()) == []


ON_FOUR_DEVICES = """
import sys, jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from slam_jax.training.checkpoint import Checkpoints
there, back = sys.argv[1:]
rows = NamedSharding(Mesh(jax.devices(), ("data",)), PartitionSpec("data"))
like = {"x": jax.ShapeDtypeStruct((8, 2), "float32", sharding=rows)}
state = Checkpoints(there).restore(1, like)
assert len(state["x"].addressable_shards) == 4
with Checkpoints(back) as checkpoints:
    checkpoints.save(1, state, config={}, tokenizer="", metrics={})
"""


def test_devices_may_change_between_runs(tmp_path):
    state = {"x": jnp.arange(16.0).reshape(8, 2)}
    with Checkpoints(tmp_path / "one") as checkpoints:
        save(checkpoints, 1, state)
    subprocess.run(
        [sys.executable, "-c", ON_FOUR_DEVICES, tmp_path / "one", tmp_path / "four"],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        check=True,
    )
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    like = {
        "x": jax.ShapeDtypeStruct(
            (8, 2), "float32", sharding=NamedSharding(mesh, PartitionSpec("data"))
        )
    }
    restored = Checkpoints(tmp_path / "four").restore(1, like)
    assert_same(restored, state)
    assert restored["x"].sharding == like["x"].sharding
    assert_same(Checkpoints(tmp_path / "four").restore(1, abstract(state)), state)


# --- A step that was saved before its evaluation


def test_metrics_come_to_a_step_that_was_saved_without(tmp_path):
    state = make_state(3)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 2, accuracy=0.1)
        assert save(checkpoints, 3, state)
        assert not save(checkpoints, 3, state)
        checkpoints.wait()
        assert checkpoints.best() == 2
        assert save(checkpoints, 3, state, accuracy=0.5)
        assert not save(checkpoints, 3, state, accuracy=0.9)
    assert checkpoints.read_metrics(3) == {"accuracy": 0.5}
    assert checkpoints.best() == 3
    assert_same(checkpoints.restore(3, state), state)
    assert {path.name for path in checkpoints.directory.iterdir()} == {"2", "3"}


def test_a_kill_while_a_step_is_replaced_loses_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 3)
    folder = checkpoints.directory
    os.rename(folder / "3", folder / "3.replaced")
    shutil.copytree(folder / "3.replaced", folder / "3.writing")
    told = []
    assert Checkpoints(tmp_path).recover(told.append) == 3
    assert not told
    shutil.copytree(folder / "3", folder / "3.replaced")
    assert Checkpoints(tmp_path).recover(told.append) == 3
    assert {path.name for path in folder.iterdir()} == {"3", "3.writing"}
    assert Checkpoints(tmp_path).verify() == {3: None}


# --- Files that somebody made up


def test_folders_that_are_no_steps_are_not_taken_for_some(tmp_path, big):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 5, big)
    for name in ("٣", "007", "-1", "1e3", "x"):
        (checkpoints.directory / name).mkdir()
    assert checkpoints.steps() == [5]


def test_an_array_in_chunks_larger_than_itself_is_not_read(tmp_path):
    """A piece is allocated whole: here a few bytes on disk would ask for 256 GiB."""
    import tensorstore

    state = {"x": jnp.arange(8.0)}
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state)
    folder = checkpoints.directory / "1"
    base = f"file://{folder / 'arrays' / 'state'}/"
    files = tensorstore.KvStore.open({"driver": "ocdbt", "base": base, "path": "x/"}).result()
    about = json.loads(files["zarr.json"])
    about["chunk_grid"]["configuration"]["chunk_shape"] = [1 << 36]
    about["codecs"][0]["configuration"]["chunk_shape"] = [1 << 36]
    files["zarr.json"] = json.dumps(about)
    manifest.seal(folder)
    with pytest.raises(CheckpointError, match=r"x is float32\[8\] in chunks of \[68719476736\]"):
        Checkpoints(tmp_path).restore(1, state)


@pytest.mark.parametrize("name", ["config", "tokenizer", "metrics"])
def test_json_of_another_kind_is_named(tmp_path, big, name):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, big)
    folder = checkpoints.directory / "1"
    (folder / f"{name}.json").write_text("3")
    manifest.seal(folder)
    with pytest.raises(CheckpointError, match=f"{name}.json: .*it holds a int, expected a"):
        getattr(Checkpoints(tmp_path), f"read_{name}")(1)


def test_memory_that_runs_out_is_no_damage(tmp_path, big, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, big)

    def full(*args, **more):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(jax, "device_put", full)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        checkpoints.restore(1, big)


def test_a_checkpoint_that_has_no_room_is_not_read(tmp_path, big, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, big)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    with pytest.raises(ConfigError, match="the checkpoint needs .* GiB and there are 0.0"):
        checkpoints.restore(1, big)


# --- The commands


def command(*arguments):
    """Exit code, what was printed, and what was said of errors."""
    done = subprocess.run(
        [sys.executable, "-m", "slam_jax.training.checkpoint", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_commands_show_verify_and_compare(tmp_path):
    one, two = tmp_path / "one", tmp_path / "t@wo"
    for workdir in (one, two):
        with Checkpoints(workdir) as checkpoints:
            save(checkpoints, 1, config={"seed": 1}, accuracy=0.5)
            save(checkpoints, 2, config={"seed": 1})
    code, out, _ = command("list", one)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["step", "written", "MiB", "accuracy"]
    assert [(line[0], *line[4:]) for line in lines[1:]] == [("1", "50.0%", "best"), ("2", "-")]
    assert command("verify", one) == (0, "step 1: intact\nstep 2: intact\n", "")
    assert command("diff", one, two)[:2] == (
        0,
        f"a = {one}/checkpoints/2\nb = {two}/checkpoints/2\nequal, bit for bit\n",
    )
    code, out, _ = command("diff", one)
    assert code == 1
    assert f"a = {one}/checkpoints/2\nb = {one}/checkpoints/1\n" in out
    assert "arrays differ, by at most:\n" in out and "  1  step\n" in out
    with Checkpoints(two) as checkpoints:
        state = dataclasses.replace(make_state(3), ema={"y": jnp.zeros(2)}, key=jnp.zeros(3))
        save(checkpoints, 3, state, config={"seed": 2}, tokenizer='{"x": 1}')
    code, out, _ = command("diff", f"{one}@1", f"{two}@3")
    assert code == 1
    for line in (
        "config.seed: 1 | 2",
        "the tokenizers differ",
        "ema/y: absent | float32[2]",
        "key: uint32[2] | float32[3]",
    ):
        assert f"\n{line}\n" in out
    flip(one / "checkpoints" / "2" / "config.json")
    code, out, _ = command("verify", one)
    assert (code, out) == (
        1,
        "step 1: intact\nstep 2: damaged: config.json is not what was written\n",
    )
    assert "damaged" in command("list", one)[1]
    for arguments, message in (
        (("diff", f"{one}@2", two), "2: the checkpoint is damaged"),
        (("diff", f"{one}@1"), "has no checkpoint before step 1; name two"),
        (("verify", tmp_path / "nowhere"), "nowhere: no such folder"),
        (("verify", tmp_path), "holds no checkpoint"),
        (("frob", one), f"arguments are 'frob {one}'; expected list WORKDIR, verify WORKDIR or"),
        ((), "arguments are ''; expected"),
    ):
        code, _, err = command(*arguments)
        assert code == 2, arguments
        *warnings, error = err.splitlines()
        assert error.startswith("error: ") and message in error
        assert all(line.startswith("warning: skipped ") for line in warnings)
