"""Arguments, requests and workdirs of any content end in an answer or in one clear line, and soon.

These are few examples; `python tests/soak.py` runs the same trials with thousands.
"""

import contextlib
import io
import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import slam_jax
from slam_jax.errors import UserError
from slam_jax.generation import Request, Sampling, generate
from slam_jax.slam_v3 import Inputs, SlamV3
from slam_jax.training import Checkpoints, Experiment, default_config, load, override
from slam_jax.training.checkpoint import __main__ as commands
from slam_jax.training.checkpoint import manifest
from slam_jax.training.experiment import as_json
from slam_jax.training.metrics import MetricsWriter, read_metrics

LONGEST_S = 60


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """The body ends in time, and if it fails, with one line for people."""

    def late(*_: object) -> None:
        raise TimeoutError("no end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST_S)
    try:
        yield
    except UserError as error:
        text = str(error)
        assert text.strip() and "\n" not in text and len(text) < 2_000, text
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(body: Callable[[st.DataObject], None], start: int, examples: int) -> None:
    """`body` with `examples` random draws; the first that fails is shown."""

    @seed(start)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        phases=[Phase.generate],  # a simpler failure is not worth minutes of search
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.data())
    def trial(data: st.DataObject) -> None:
        body(data)

    trial()


# --- Overrides

CONFIG = as_json(default_config("tiny"))
FIELDS = sorted(flatten_dict(CONFIG, sep="."))
NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([10**3, 10**6, 10**9, 2**31, 2**63, 10**30, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from([1e-300, 1e300, 0.0, -0.0]),
)
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["aux", "image", "None", "True", "nan", "inf", "1e999", "float64", "vit"]),
    st.sampled_from(["muon", "{1}", "[[", "(", "0x1", "1_0", "{[]: 1}", "b''", "1j"]),
    st.sampled_from(["'", '"', "(" * 300, "1" * 5_000, "\0", "\udc80"]),
)
VALUES = st.one_of(
    NUMBERS,
    WORDS,
    st.none(),
    st.booleans(),
    st.recursive(
        NUMBERS | WORDS | st.none(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["aux", "x"]), inner)
        ),
        max_leaves=5,
    ),
)


def arguments() -> st.SearchStrategy[str]:
    def written(name: str, value: Any, how: int) -> str:
        return f"--config.{name}={value if how else repr(value)}"

    names = st.sampled_from(FIELDS) | st.text(max_size=6)
    return st.one_of(st.builds(written, names, VALUES, st.integers(0, 1)), st.text(max_size=12))


def overrides(start: int, examples: int, reference: Path) -> None:
    """Arguments end in an experiment whose model can be built, or in a line."""

    def body(data: st.DataObject) -> None:
        given_arguments = data.draw(st.lists(arguments(), min_size=1, max_size=3))
        with answered():
            experiment = Experiment.from_config(override(CONFIG, given_arguments))
            model = experiment.with_vocabulary(300)
            layers = model.num_decoder_layers, model.num_process_layers, model.image.num_layers
            if max(*layers, model.image.blocks_per_stage) <= 4:
                nnx.eval_shape(lambda: SlamV3(model, rngs=nnx.Rngs(0)))
            experiment.data.view(5)
            slam_jax.training.make_optimizer(experiment.optimizer, experiment.run.num_steps)

    run(body, start, examples)


# --- Requests


def requests(start: int, examples: int, reference: Path) -> None:
    """Inputs and prompts end in as many answers, or in a line."""
    loaded = load(reference, "latest")

    def array(*shapes: tuple[int, ...]) -> st.SearchStrategy[Any]:
        dtypes = ["int32", "uint8", "float32", "bool", "float16", "complex64"]

        def make(shape: tuple[int, ...], dtype: str, fill: float) -> Any:
            with np.errstate(all="ignore"):
                return np.full(shape, fill).astype(dtype)

        fills = st.sampled_from([0, 1, 255, -1, 1e6, float("nan"), float("inf")])
        return st.none() | st.builds(make, st.sampled_from(shapes), st.sampled_from(dtypes), fills)

    inputs = st.fixed_dictionaries(
        {
            "text": array((1, 4), (2, 4), (4,), (1, 0)),
            "text_mask": array((1, 4), (1, 5), (4,)),
            "image": array((1, 24, 24, 3), (1, 24, 24), (1, 24, 24, 4), (24, 24, 3)),
            "image_mask": array((1,), (2,), (1, 1)),
            "aux": array((1, 3, 10), (1, 3, 9), (3, 10), (1, 0, 10), (2, 3, 10)),
            "aux_mask": array((1, 3), (1, 2)),
        }
    )
    words = st.sampled_from(["shape of red", "", "<eos>", "ü" * 8, "\0", "\udc80", "a" * 200])
    odd = [float("nan"), float("inf"), -1, 0, 1e-9, 1e9, True, "x", None]
    asked = st.fixed_dictionaries(
        {},
        optional={
            "prompt": words | st.sampled_from([None, 3, b"red"]),
            "text": words | st.sampled_from([3, b"red"]),
            "image": st.sampled_from(["no such file", "", b"", b"GIF89a", 3, "\0"])
            | array((9, 9, 3), (9, 9), (9, 9, 2), (0, 9, 3)),
            "aux": array((3, 10), (10,), (3, 9), (0, 10))
            | st.sampled_from([[], [[]], [[None] * 10], [["x"]], {"red": 1}, "12", 3]),
            "seed": st.sampled_from([0, 2**32 - 1, 2**32, -1, 0.5, "1"]),
        },
    )
    sampling = st.fixed_dictionaries(
        {"max_new_tokens": st.sampled_from([1, 1, 2, 0, -5, 10**9, 1.5, "2"])},
        optional={
            "temperature": st.sampled_from([*odd, 0.7]),
            "top_k": st.sampled_from([*odd, 3]),
            "top_p": st.sampled_from([*odd, 0.9]),
            "min_p": st.sampled_from([*odd, 0.1]),
            "repetition_penalty": st.sampled_from([*odd, 1.2]),
            "num_samples": st.sampled_from([1, 2, 0, -1, 10**9, "2"]),
            "stop": st.sampled_from(["re", ["e", "ed"], [""], "", [3], ["\udc80"]]),
        },
    )

    def body(data: st.DataObject) -> None:
        with answered(), np.errstate(all="ignore"):
            if data.draw(st.booleans()):
                loaded.model.encode(Inputs(**data.draw(inputs)))
                return
            chosen: dict[str, Any] = data.draw(sampling)
            drawn: list[dict[str, Any]] = data.draw(st.lists(asked, max_size=3))
            wanted = [Request(**each) for each in drawn]
            given_answers = generate(loaded, wanted, Sampling(**chosen))
            assert len(given_answers) == len(wanted)

    run(body, start, examples)


# --- Workdirs


def workdirs(start: int, examples: int, reference: Path) -> None:
    """Files of any content, with a manifest that fits them, are read or refused in a line."""
    json_values = st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=6,
    )

    def body(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            workdir = Path(folder, "run")
            shutil.copytree(reference, workdir, ignore=shutil.ignore_patterns("lock"))
            steps = Checkpoints(workdir).steps()
            last = workdir / "checkpoints" / str(steps[-1])
            for _ in range(data.draw(st.integers(1, 3))):
                _spoil(data, workdir, last, json_values)
            if data.draw(st.booleans()) and last.is_dir():
                manifest.seal(last)  # whoever forged the files forged their sums, too
            _look_at(data, workdir)

    run(body, start, examples)


def _spoil(data: st.DataObject, workdir: Path, last: Path, values: st.SearchStrategy[Any]) -> None:
    how = data.draw(st.integers(0, 6))
    files = sorted(path for path in last.rglob("*") if path.is_file())
    if how == 0 and files:
        path = data.draw(st.sampled_from(files))
        path.write_bytes(data.draw(st.binary(max_size=40)))
    elif how == 1 and files:
        path = data.draw(st.sampled_from(files))
        content = bytearray(path.read_bytes() or b"\0")
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
    elif how == 2 and last.is_dir():
        name = data.draw(st.sampled_from(["config", "metrics", "tokenizer", "manifest"]))
        (last / f"{name}.json").write_text(json.dumps(data.draw(values)))
    elif how == 3 and last.is_dir():
        config = as_json(default_config("tiny"))
        group = data.draw(st.sampled_from(["model", "data", "run", "optimizer", "loss"]))
        field = data.draw(st.sampled_from(sorted(config[group])))
        config[group][field] = data.draw(values)
        (last / "config.json").write_text(json.dumps(config))
    elif how == 4:
        lines = data.draw(st.lists(values.map(json.dumps) | st.text(max_size=20), max_size=4))
        (workdir / "metrics.jsonl").write_text("\n".join(lines), errors="replace")
    elif how == 5:
        name = data.draw(st.sampled_from(["٣", "007", "99", "-1", "1.writing", "5.replaced", "x"]))
        (workdir / "checkpoints" / name).mkdir(exist_ok=True)
    elif last.is_dir():
        shutil.rmtree(last)
        last.write_text("a file")


def _look_at(data: st.DataObject, workdir: Path) -> None:
    with answered():
        loaded = load(workdir, data.draw(st.sampled_from(["latest", "best", None])))
        jax.block_until_ready(nnx.state(loaded.model))
    look = [commands.list_steps, commands.verify, lambda path: commands.diff(path, None)]
    with answered(), contextlib.redirect_stdout(io.StringIO()):
        data.draw(st.sampled_from(look))(str(workdir))
    with answered():
        Checkpoints(workdir).recover(lambda line: None)
    with answered():
        MetricsWriter(workdir, 3).close()
        assert all(isinstance(record["step"], int) for record in read_metrics(workdir))


# Each kind of trial with its share of a hundred examples.
TRIALS = {overrides: 60, requests: 20, workdirs: 20}


# A finished run that needs no training here; see test_version_0_11.py.
RUN = Path(__file__).parent / "fixtures" / "v0_11_0" / "run"


@pytest.mark.release
@pytest.mark.parametrize("trial", TRIALS)
def test_anything_at_all_is_answered(trial):
    trial(0, TRIALS[trial], RUN)
