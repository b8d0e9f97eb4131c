"""A new system is one file and one line of the registry, both taken from docs/rocket.md."""

import importlib.util
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from slam_jax.language_models import SYSTEMS, make_config, make_model, registry
from slam_jax.rocket.engine import run
from slam_jax.rocket.protocols import make_comparison
from tests.helpers import schema_errors, write_texts

DOCS = Path(__file__).parents[1] / "docs" / "rocket.md"
FILE, LINE = "bag.py", "registry.py"


def shown(name: str) -> str:
    """The code under a file's name in the docs."""
    text = DOCS.read_text()
    found = re.search(rf"`slam_jax/language_models/{name}`.*?```(?:python)?\n(.*?)```", text, re.S)
    assert found, name
    return found.group(1)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Adds the file as a module, and the line to the registry."""
    name = "slam_jax.language_models.bag"
    (tmp_path / FILE).write_text(shown(FILE))
    spec = importlib.util.spec_from_file_location(name, tmp_path / FILE)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    names: dict[str, Any] = dict(vars(registry))
    imported, line = shown(LINE).split("\n\n")
    exec(imported, names)  # our own docs
    lines = eval(f"{{{line}}}", names)
    assert len(lines) == 1
    for key, system in lines.items():
        monkeypatch.setitem(SYSTEMS, key, system)
    return types.SimpleNamespace(name=next(iter(lines)))


@pytest.fixture
def here(monkeypatch):
    """Runs tasks in this process, which has the system."""

    def run_job(task, settings, limits, *, progress, **others):
        made = typing.get_type_hints(task.function)["settings"](**settings)
        figures = task.function(task.system, made, progress, **task.arguments)
        *_, figures = [figures] if isinstance(figures, dict) else figures
        return json.loads(json.dumps(figures))

    monkeypatch.setattr("slam_jax.rocket.engine.run_job", run_job)


def test_a_new_system_reads_chunks_as_it_reads_the_whole(added):
    model = make_model(make_config(added.name, "tiny"), rngs=nnx.Rngs(0))
    text, lengths = np.random.default_rng(0).integers(0, 61, (2, 9)), np.array([2, 4])

    @jax.jit
    def read(model):
        cache = model.init_cache((2,), 9)
        _, cache = model.prefill(text[:, :4], cache, lengths=lengths)
        rest = np.take_along_axis(text, lengths[:, None] + np.arange(5), axis=1)
        found, cache = model.prefill(rest, cache, lengths=np.array([5, 4]), append=True)
        last = model.decode_step(text[:, 8], cache)[0][1]
        return found, last, model(text).logits

    found, last, full = read(model)
    np.testing.assert_allclose(found[0], full[0, 2:7], atol=1e-5)
    np.testing.assert_allclose(found[1, :4], full[1, 4:8], atol=1e-5)
    np.testing.assert_allclose(last, full[1, 8], atol=1e-5)


SMALL = {
    "seed": {"preset": "tiny", "batch_size": 2, "length": 8, "num_updates": 2, "rounds": 1}
    | {"repeats": 1, "stress_batch": 1, "stress_length": 16},
    "heldout": {"vocab_size": 300, "budget": 2e5, "length": 16, "batch_size": 4}
    | {"num_tokens": 640, "sweep_tokens": 640, "learning_rates": (1e-3,), "seeds": (0,)}
    | {"document_tokens": 40, "curve_points": 2, "prompt_length": 8, "new_tokens": 4}
    | {"rounds": 1, "repeats": 1},
}


@pytest.mark.release
@pytest.mark.parametrize(
    "protocol", ["seed", pytest.param("heldout", marks=pytest.mark.slow)], ids=str
)
def test_a_new_system_is_in_every_comparison(added, here, protocol, tmp_path):
    settings = dict(SMALL[protocol])
    if protocol == "heldout":
        settings["text"] = str(write_texts(tmp_path / "texts"))
    arguments = [f"--config.{field}={value}" for field, value in settings.items()]
    made = make_comparison(protocol, None, arguments, (added.name,), tmp_path / "board")
    board = run(made, tmp_path / "board")
    (row,) = board["rows"]
    assert row["status"] == "ok" and row["system"] == added.name and row["rank"] == 1
    assert row["title"] == SYSTEMS[added.name].title and schema_errors(board) == []
    if protocol == "heldout":
        repeats = settings["rounds"] * settings["repeats"]
        timings = [row["training_tokens_per_second"], row["compile_seconds"]]
        for field in ("first_token_seconds", "generation_tokens_per_second"):
            timings += [row[field]["1"], row[field]["8"]]
        assert all(each["n"] == repeats and each["least"] > 0 for each in timings)
