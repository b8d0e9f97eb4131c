"""The figures of encoder processes: knock-outs, similarity and attention by stream."""

import io
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from slam_jax.data import Example
from slam_jax.reporting.checkpoint import evaluate_checkpoint, evaluate_processes, open_checkpoint
from slam_jax.reporting.processes.measure import (
    MixedProcesses,
    Sums,
    _cka,
    _jackknife,
    _observe,
    _scenes,
    knock_outs,
    mix_outputs,
)
from slam_jax.reporting.processes.table import print_processes
from slam_jax.reporting.report import render_report
from slam_jax.slam_v3.streams import join_streams


@pytest.fixture(scope="module")
def opened(small_run) -> Any:
    return open_checkpoint(small_run)


def test_a_knock_out_changes_the_outputs_that_it_names(build, make_inputs):
    model, inputs = build(), make_inputs()
    run: Any = jax.jit(lambda *models: [model.run_processes(inputs)[0] for model in models])
    for name, mixing in knock_outs(4).items():
        y, outputs = run(model, mix_outputs(model, mixing))
        if name == "all":
            np.testing.assert_array_equal(outputs, y)
        elif name == "all zeroed":
            assert not np.any(outputs)
        elif name == "each the mean":
            np.testing.assert_allclose(outputs[2], np.mean(y, axis=0), atol=1e-6)
        else:
            without = int(name[-1])
            kept = np.array([p for p in range(4) if p != without])
            assert not np.any(outputs[without])
            np.testing.assert_array_equal(outputs[kept], y[kept])
    assert not isinstance(model.processes, MixedProcesses) and run._cache_size() == 1
    assert list(knock_outs(1)) == ["all", "without p0"]


def test_cka_is_1_for_a_rotation_and_small_for_noise():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4_000, 6))
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    y = np.stack([x, 3 * x @ rotation + 5, rng.normal(size=x.shape)])
    groups = np.arange(len(x)) % 8
    sums = Sums(
        np.bincount(groups),
        np.stack([y[:, groups == g].sum(axis=1) for g in range(8)]),
        np.stack(
            [np.einsum("pnd,qne->pqde", y[:, groups == g], y[:, groups == g]) for g in range(8)]
        ),
    )
    same, other = _jackknife(sums, 0, 1), _jackknife(sums, 0, 2)
    assert same["mean"] == pytest.approx(1) and same["low"] == pytest.approx(1)
    assert 0 <= other["low"] <= other["mean"] <= other["high"] < 0.02
    # Kornblith et al. 2019, equation 3, written out.
    a, b = (each - each.mean(axis=0) for each in (y[0], y[2]))
    expected = np.linalg.norm(a.T @ b) ** 2 / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    assert other["mean"] == pytest.approx(expected)
    assert _cka(Sums(*(s.sum(axis=0) for s in sums)), 2, 2) == pytest.approx(1)


@pytest.mark.release
def test_pads_and_rows_that_do_not_count_change_nothing(build, make_inputs):
    model, inputs = build(), make_inputs()
    inputs.text_mask[:, 4:] = False
    groups = np.zeros((2, 8), np.float32)
    groups[0, 3] = 1
    sums, (cosine, shares) = _observe(model, inputs, groups)
    run = jax.jit(lambda model, inputs: model.run_processes(inputs, attention=True))
    y, streams, weights = run(model, inputs)
    mask = join_streams(streams).mask
    assert mask is not None
    real = np.asarray(mask[0])
    first = np.asarray(y[:, 0][:, real], np.float64)
    np.testing.assert_array_equal(sums[0], np.eye(8)[3] * real.sum())
    np.testing.assert_allclose(sums[1][3], first.sum(axis=1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        sums[2][3, 0, 1], np.einsum("nd,ne->de", first[0], first[1]), rtol=1e-3, atol=1e-4
    )
    lengths = np.linalg.norm(first, axis=-1)
    expected = np.mean((first[0] * first[1]).sum(-1) / (lengths[0] * lengths[1]))
    assert cosine[0, 0, 1] == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(shares.sum(axis=-1), 1, atol=1e-5)
    read = np.asarray(weights)[2, 0].mean(axis=(0, 1))[real]
    assert shares[0, 2, 0] == pytest.approx(read[:, :6].sum(-1).mean(), abs=1e-5)


def test_intervals_of_outputs_are_over_scenes_too():
    blank = Example(None, None, None, (), (), (), ())
    shown = [(3, b"a"), (4, b"b"), (6, b"a"), (7, b"c")]
    examples = [blank._replace(record=i, contents=(content,)) for i, content in shown]
    assert _scenes(examples).tolist() == [0, 1, 0, 2]
    assert _scenes([blank] * 3).tolist() == [0, 1, 2]


@pytest.mark.release
def test_a_view_without_examples_is_left_out(opened, monkeypatch):
    monkeypatch.setattr(type(opened.data), "views", ("aux", "text"))
    batches = type(opened).batches
    monkeypatch.setattr(
        type(opened),
        "batches",
        lambda self, view: batches(self, view) if view == "aux" else iter(()),
    )
    assert list(evaluate_processes(opened, 3)["accuracy"]) == ["aux"]


@pytest.mark.release
def test_the_table_of_a_run_and_its_section_in_the_report(opened, small_run):
    found = evaluate_processes(opened, 3)
    evaluation = evaluate_checkpoint(small_run)
    assert set(found["accuracy"]) == set(opened.data.views) and found["examples"] == 3
    for view, kinds in found["accuracy"].items():
        answers = [a for a in evaluation.answers if a.view == view and a.scene < 3]
        for kind, row in kinds.items():
            right = [answer.correct for answer in answers if answer.kind == kind]
            assert row["all"]["accuracy"]["mean"] == pytest.approx(np.mean(right))
            assert row["all"]["difference"] == {"mean": 0, "low": 0, "high": 0}
            for each in row.values():
                if isinstance(each, dict):
                    change = each["accuracy"]["mean"] - np.mean(right)
                    assert each["difference"]["mean"] == pytest.approx(change)
    pairs = opened.loaded.model.config.num_processes * 3 // 2
    assert all(len(rows) == pairs for rows in found["similarity"].values())
    several = [view for view in opened.data.views if "_" in view]
    assert sorted(found["attention"]) == sorted(several)
    printed = io.StringIO()
    print_processes(found, printed)
    assert "without p3" in printed.getvalue() and "each the mean" in printed.getvalue()
    page = render_report(evaluation._replace(processes=found))
    assert "What each process is worth" in page and "without p3" in page
    assert "What each process is worth" not in render_report(evaluation)
    assert nnx.state(opened.loaded.model)  # it still has its own processes
    assert not isinstance(opened.loaded.model.processes, MixedProcesses)
