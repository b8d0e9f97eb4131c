"""Shared by all tests: models that are built once, and something to put into them."""

import dataclasses
import functools
import gc
import importlib
import inspect
import os
import pkgutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import pytest
from flax import nnx

import slam_jax
from slam_jax.runtime.signals import SIGNALS
from slam_jax.slam_v3 import ImageConfig, Inputs, SlamV3, SlamV3Config
from slam_jax.training import read_config, train

# Accelerators multiply float32 in fewer bits by default; the tolerances here are those of float32.
jax.config.update("jax_default_matmul_precision", "highest")
# Nearly all of the time goes into compiling what then runs for a millisecond. Processes that tests
# start inherit the environment, so that their bits are those of this one.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
FAST_COMPILER = "--xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # a process ends over a flag that its XLA does not know
    FAST_COMPILER += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FAST_COMPILER} {os.environ.get('XLA_FLAGS', '')}"
# Tracing makes many objects that stay; looking for cycles among them as often as Python does by
# default takes a tenth of the time.
gc.set_threshold(50_000, 20, 100)
# Arrays are broadcast along new axes only where the code says so.
jax.config.update("jax_numpy_rank_promotion", "raise")

VOCAB = 13
# As many tokens as the preset's 24 pixels and two stages give, but faster to compile.
IMAGE = ImageConfig(size=12, stage_widths=(8,))


def _check_calls_only() -> None:
    """Shapes and types are checked where functions are called, not where dataclasses are built.

    JAX builds dataclasses of arrays with whatever a tree may hold (shapes without values,
    shardings, None); those of settings check themselves.
    """
    for _, name, _ in pkgutil.walk_packages(slam_jax.__path__, "slam_jax."):
        if name.endswith("__main__") or name.startswith("slam_jax.demo"):
            continue
        module = importlib.import_module(name)
        for cls in vars(module).values():
            if dataclasses.is_dataclass(cls) and isinstance(cls, type) and cls.__module__ == name:
                cls.__init__ = inspect.unwrap(cls.__init__)


_check_calls_only()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what takes longest, so that with several workers nobody waits for it alone."""
    items.sort(key=lambda item: item.path.name not in ("test_sharding.py", "test_site.py"))


@pytest.fixture(scope="module", autouse=True)
def forget_executables():
    """Every compiled executable keeps a few of the 65,530 memory maps that Linux gives a process;
    with all of a whole session's, the next one would end it."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture
def signals_heard():
    """Whoever runs the tests in the background or under nohup has children ignore signals."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    """The workdir of a finished run of configs/small_run.py, one for all workers of a session.

    A test that writes into it has to copy it first.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of the session, in which each worker has a folder
    with filelock.FileLock(folder / "small_run.lock"):
        workdir = folder / "small_run"
        if not (workdir / "finished").exists():
            config = read_config(Path(__file__).parent / "configs" / "small_run.py")
            config["data"]["data_dir"] = str(folder / "small_data")
            config["run"]["save_every"] = None  # only at the evaluations
            train(config, workdir / "run")
            (workdir / "finished").touch()
    return workdir / "run"


@pytest.fixture(scope="session")
def build() -> Callable[..., SlamV3]:
    """`build(**changes)`: the tiny preset, small images and some fields changed, one model a
    configuration.

    The models are shared: a test that changes one has to copy it first.
    """

    @functools.cache
    def make(**changes) -> SlamV3:
        config = SlamV3Config.preset("tiny", VOCAB, **{"image": IMAGE, **changes})
        # Not under jit: all models share the initialisers, which are compiled once for each shape.
        return SlamV3(config, rngs=nnx.Rngs(0))

    return make


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., Any]:
    """`make_inputs(batch)`: random inputs of the models above, all streams present and masked."""

    def make(batch: int = 2, *, text: int = 6, aux: int = 3, size: int = 12, seed: int = 0):
        rng = np.random.default_rng(seed)
        arrays: dict[str, Any] = {
            "text": rng.integers(0, VOCAB, (batch, text), np.int32),
            "text_mask": np.ones((batch, text), bool),
            "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
            "image_mask": np.ones(batch, bool),
            "aux": rng.normal(size=(batch, aux, 5)).astype(np.float32),
            "aux_mask": np.ones((batch, aux), bool),
        }
        return Inputs(**arrays)

    return make
