"""The report is one self-contained page with correct attention maps, calibration and curves."""

import hashlib
import html.parser
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from test_generation import make_loaded, picture, vectors

from slam_jax.data import AuxFormat, Example
from slam_jax.errors import ConfigError, WriteError
from slam_jax.evaluation import read_answers
from slam_jax.evaluation.answers import Answer, Results
from slam_jax.evaluation.metrics import calibration
from slam_jax.generation import Request
from slam_jax.generation.requests import read_inputs
from slam_jax.layers.attention import attend, attention_weights
from slam_jax.reporting import checkpoint
from slam_jax.reporting.attention import attention_html, attention_maps
from slam_jax.reporting.checkpoint import Evaluation, choose_examples, evaluate_checkpoint
from slam_jax.reporting.plots import (
    plot_bars,
    plot_calibration,
    plot_curves,
    plot_intervals,
    plot_points,
)
from slam_jax.reporting.report import render_report, write_evaluation
from slam_jax.runtime import shared_flags
from slam_jax.training import default_config

pytestmark = pytest.mark.release

EVERYTHING = Request("circle", text="red blue", image=picture(5), aux=vectors(5, 3))


@pytest.fixture(scope="module")
def loaded() -> Any:
    return make_loaded(num_memory_tokens=5, aux_slots=True)


@pytest.fixture(scope="module", params=["tokens", "bottleneck"])
def with_or_without_bottleneck(request, loaded) -> Any:
    return (
        loaded
        if request.param == "bottleneck"
        else make_loaded(num_memory_tokens=0, aux_slots=True)
    )


def test_weights_times_values_are_what_attention_gives():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 3, 4)) for i in range(3))
    mask = jnp.ones((2, 1, 5), bool).at[:, :, 3].set(False)
    weights = attention_weights(q, k, mask)
    mixed = jnp.einsum("bnts,bsnv->btnv", weights, v)
    np.testing.assert_allclose(mixed, attend(q, k, v, mask), atol=1e-5)
    assert (weights[..., 3] == 0).all()


def test_attention_is_that_of_the_forward_pass(with_or_without_bottleneck):
    """The values, averaged by the weights, are what the attention layers computed."""
    loaded = with_or_without_bottleneck
    model, inputs = loaded.model, read_inputs(loaded, [EVERYTHING])
    tokens = np.array([[1, 5, 6]], np.int32)
    output, read, expected = jax.jit(_attention_and_what_it_reads)(model, tokens, inputs)
    np.testing.assert_allclose(output.logits, expected["logits"], atol=1e-5)
    for shares in (output.attention.processes, output.attention.memory, output.attention.decoder):
        np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(read["bank"], expected["bank"], atol=1e-4)
    np.testing.assert_allclose(read["memory"], expected["memory"], atol=1e-3)


def _attention_and_what_it_reads(model: Any, tokens: Any, inputs: Any) -> Any:
    output, read = model(tokens, inputs, attention=True), {}
    found, expected = output.attention, {"logits": model(tokens, inputs).logits}
    streams, bank = model.level_one(model._streams(inputs, None))
    process = jax.tree.map(lambda x: x[1], model.processes.stack)
    h = jnp.concatenate([stream.tokens for stream in streams], axis=1)
    h = h + process.instruction[None, None]
    layer = process.layers[0]
    h = h + layer._isolated_attention(h, streams)
    read["bank"] = jnp.einsum("bnts,bsnv->btnv", found.processes[1][:, 0], bank.v)
    queries = layer.query(layer.norms[1](h)) + layer.query_bias[None, None]
    expected["bank"] = attend(queries, bank.k, bank.v, bank.mask)
    memory = model.encode(inputs)
    layer, h = model.decoder.layers[0], model.decoder._norm_input(model._embed(tokens))
    h = h + layer.attention(layer.norms[0](h))
    values = jnp.einsum("bmr,rnv->bmnv", memory.c_mem, layer.memory_attention.v_up.kernel[...])
    values = jnp.einsum("bntm,bmnv->btnv", found.decoder[:, 0], values)
    read["memory"] = layer.memory_attention.out(values)
    queries = layer.norms[1](h).reshape(1, tokens.shape[-1], -1)
    mask = None if memory.mask is None else memory.mask[:, None, :]
    expected["memory"] = layer.memory_attention(queries, memory.c_mem, mask)
    return output, read, expected


def test_maps_cover_what_was_given_and_nothing_else(with_or_without_bottleneck):
    loaded = with_or_without_bottleneck
    maps = attention_maps(loaded, EVERYTHING, "yes")
    config = loaded.model.config
    count = config.num_processes + config.num_decoder_layers * config.num_heads
    assert len(maps.names) == count and maps.num_processes == 4
    assert maps.names[0] == "p0" and maps.names[-1] == "layer 2, head 2"
    image, text, aux = maps.image, maps.text, maps.aux
    assert image is not None and text is not None and aux is not None
    assert image.shape[1] == image.shape[2] > 1
    assert text.shape == (count, len(loaded.tokenizer.encode("red blue")))
    assert aux.shape == (count, 3)
    total = image.sum((1, 2)) + text.sum(1) + aux.sum(1)
    np.testing.assert_allclose(total, 1, atol=1e-4)
    alone = attention_maps(loaded, Request("circle", text="red blue"), "yes")
    assert alone.image is None and alone.aux is None


def test_calibration_of_an_honest_and_of_a_boastful_answerer():
    rng = np.random.default_rng(0)
    sure = rng.random(50_000)
    honest = calibration(sure, (rng.random(50_000) < sure).astype(float))
    assert honest.error < 0.02 and len(honest.counts) == 10 and sum(honest.counts) == 50_000
    boastful = calibration(np.full(100, 0.95), np.array([1.0] * 60 + [0.0] * 40))
    np.testing.assert_allclose(boastful.error, 0.35)
    assert boastful.counts == (100,)


def test_labels_of_users_are_never_read_as_mathtext():
    names = ["$", "$$", "$5 to $10", "_x", "猫", "a\nb", "x" * 300]
    curve = ([1, 2], [1.0, 0.1])
    plots = [
        plot_intervals([("image", name, 0.5, 0.4, 0.6) for name in names]),
        plot_curves(dict.fromkeys(names, curve), "loss", log=True),
        plot_points(dict.fromkeys(names, (1.0, 2.0)), "$", "$$"),
        plot_bars(dict.fromkeys(names, 1.0)),
    ]
    for svg in plots:
        assert all(f">{name}</text>" in svg for name in [*names[:5], "a b", f"{'x' * 40}..."])
    assert "mathdefault" not in plots[1] and ">0.1</text>" in plots[1]


def test_plots_take_the_colours_of_their_page():
    plots = [
        plot_intervals([("image", "all", 0.5, 0.4, 0.6), ("image", "some", 1.0, 1.0, 1.0)]),
        plot_calibration(np.array([0.2, 0.9]), np.array([0.1, 1.0]), (3, 5)),
        plot_curves({f"v{i}": ([1, 2], [1.0, 0.1]) for i in range(8)}, "loss", log=True),
    ]
    for svg in plots:
        assert (svg.startswith("<svg") and "var(--ink)" in svg) or "var(--soft)" in svg
        assert not re.search(r"#0[12]0[23]0\d", svg)
        assert "<text" in svg and "<metadata" not in svg


class Page(html.parser.HTMLParser):
    """Reads a page and keeps its text, and whatever it would load."""

    def __init__(self):
        super().__init__()
        self.text, self.loads, self.tags = "", [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data):
        self.text += data


EVIL = '</script><script>alert("x")</script>&amp;'


def results() -> Results:
    answers = [
        Answer("all", i, "all", False, EVIL, "yes", "yes" if i else EVIL, -0.1 * i)
        for i in range(6)
    ]
    entry = {"accuracy": 0.8, "low": 0.5, "high": 1.0, "n": 6}
    return Results({"step": 3, "views": {"all": {"all": entry}}}, answers)


def example() -> Example:
    return Example(
        EVIL.replace("<", "< "), picture(5), vectors(5, 3), (EVIL,), ("yes",), ("all",), (False,)
    )


DATA = {"path": None, "sha256": None, "rows": {"test": 6}}
RECORDS = [
    {"step": s, "split": "train", "view": "all", "cross_entropy": 1.0 / s} for s in range(1, 500)
] + [{"step": s, "split": "validation", "accuracy": 0.5, "all/all": 0.5} for s in (250, 500)]


def evaluation(loaded, **changes) -> Evaluation:
    metrics = {**results().metrics, "data": {**DATA, "name": EVIL}, "baseline_answer": EVIL}
    metrics["views"]["all"]["all"]["baseline"] = 0.7
    fields: dict[str, Any] = dict(
        metrics=metrics,
        answers=results().answers,
        loaded=loaded._replace(config={"data": {"name": EVIL}}),
        config={"data": {"name": EVIL}},
        examples=choose_examples(results(), {"all": [example()] * 6}),
        records=RECORDS,
        title=EVIL,
        seconds=1.5,
        folder=Path("eval"),
    )
    return Evaluation(**{**fields, **changes})


def test_a_page_escapes_text_of_users_and_loads_nothing(loaded):
    text = render_report(evaluation(loaded))
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert page.text.count(EVIL) > 5
    assert page.loads and all(
        each.startswith(("data:image/png;base64,", "#")) for each in page.loads
    )
    assert not re.search(r"@import|url\((?!data:|#)|https?://(?!www.w3.org)", text)
    assert "<figcaption>p3</figcaption>" in text and "layer 2, head 2" in page.text
    assert page.tags.count("svg") == 4 and "prefers-color-scheme: dark" in text


def test_examples_with_a_wrong_answer_come_first_wherever_they_are():
    def shown(wrong: set[int], count: int = 40) -> list[int]:
        answers = [
            Answer("all", i, "all", False, EVIL, "yes", "no" if i in wrong else "yes", -0.1)
            for i in range(count)
        ]
        rows = iter([example()] * count)
        found = choose_examples(Results({}, answers), {"all": rows})
        scenes = [each.answers[0].scene for each in found]
        assert len(list(rows)) == count - max(scenes) - 1  # no more of them are read
        return scenes

    some = [Answer("all", 0, "all", False, EVIL, "yes", "no", -0.1, record=i) for i in (2, 5)]
    rows = iter([example()._replace(record=i) for i in (2, 5, 7)])
    found = choose_examples(Results({}, some), {"all": rows})
    assert [(each.example.record, each.answers) for each in found] == [
        (2, (some[0],)),
        (5, (some[1],)),
    ]
    assert shown({30, 35}) == [30, 35, 0, 1]
    assert shown({1, 30, 35}) == [1, 30, 35, 0, 2]
    assert shown(set(range(1, 40))) == [*range(1, 9), 0]
    assert shown(set(), 3) == [0, 1, 2]


def test_a_run_without_records_has_a_page_too(loaded):
    text = render_report(evaluation(loaded, records=[]))
    assert "Training</h2>" not in text and "Where the model looked" in text


def test_columns_are_shown_by_name(loaded):
    rows = np.array([[1.0, 10.0], [3.0, 30.0]])
    table = loaded._replace(aux_format=AuxFormat.of_columns(("width", "<price>"), rows))
    fragment = attention_html(table, Request("red", aux={"width": 2, "<price>": None}), "yes")
    assert ">width</span>" in fragment and "<price>" not in fragment
    both = attention_html(table, Request("red", aux={"<price>": 20}), "yes")
    assert "&lt;price&gt;" in both


# A table of a user, from the file to the page.


KINDS = ("$", "$5 to $10", "_x")


def write_table(folder, answers) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {
            "text": f"red {i}",
            "prompt": "is it $$?",
            "answer": answer,
            "kind": KINDS[i % 3],
            "split": ("train", "validation", "test")[i % 9 // 3],
            "weight": 12345 if i % 2 else 1000,
            "price": None if i == 6 else 0.125 * i,
        }
        for i, answer in enumerate(answers)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A table whose answers are nearly all "yes", and two others that are both called "other"."""
    root = tmp_path_factory.mktemp("tables")
    return [
        write_table(root / "own", ["yes"] * 17 + ["no"]),
        write_table(root / "other", ["no", "yes"] * 9),
        write_table(root / "more" / "other", ["no"] * 18),
    ]


@pytest.fixture
def workdir(folders, loaded, tmp_path, monkeypatch):
    """A workdir with `loaded` as its checkpoint, trained on the first of the folders."""
    model = loaded.model.config
    config = default_config("tiny").to_dict()
    config["data"] |= {"name": "folder", "path": str(folders[0]), "batch_size": 3}
    config["data"]["stages"] = [[0, {"text_aux": 1.0}]]
    config["model"] |= {"aux_slots": True, "context_length": model.context_length}
    rows = np.array([[1000.0, 0.0], [1001.0, 1.0]])
    aux_format = AuxFormat.of_columns(("weight", "price"), rows)
    trained = loaded._replace(config=config, aux_format=aux_format)
    monkeypatch.setattr(checkpoint, "load", lambda *_: trained)
    monkeypatch.setattr(checkpoint, "enable_compile_cache", lambda: None)
    return tmp_path / "run"


def test_a_report_shows_numbers_and_kinds_as_users_wrote_them(workdir):
    page = render_report(evaluate_checkpoint(workdir))
    for number in ("12345", "1000", "0.875"):
        assert f">{number}</td>" in page
    assert all(f">{kind}</text>" in page for kind in KINDS)


def test_the_score_of_the_most_frequent_answer_is_shown_beside_that_of_the_model(workdir):
    evaluation = evaluate_checkpoint(workdir)
    assert evaluation.metrics["baseline_answer"] == "yes"
    baselines = [row["baseline"] for row in evaluation.metrics["views"]["text_aux"].values()]
    assert sorted(baselines) == [0.5, 1.0, 1.0]
    page = render_report(evaluation)
    assert "always answering &#34;yes&#34;" in page and "<b>83.3%</b>baseline" in page


@pytest.mark.slow
def test_views_that_show_the_same_are_evaluated_once(workdir):
    """The table has texts and numbers, so that `all` shows what `text_aux` does."""
    trained = checkpoint.load(workdir)
    found = evaluate_checkpoint(workdir, None, ["--config.data.drop_inputs=0.5"])
    assert list(found.metrics["views"]) == ["text_aux", "text", "aux"]
    assert found.metrics["answers"]["views"].keys() == {"text_aux", "text", "aux"}
    trained.config["data"]["stages"] = [[0, {"text_aux": 1.0, "all": 1.0, "text": 1.0}]]
    found = evaluate_checkpoint(workdir, process_examples=2)
    assert list(found.metrics["views"]) == ["text", "text_aux"]
    assert found.processes is not None and list(found.processes["accuracy"]) == ["text", "text_aux"]
    assert {each.view for each in found.examples} == {"text", "text_aux"}


def test_a_page_shows_chosen_scores_and_figures_by_answer(workdir, tmp_path):
    evil, tested = "<b>no</b>", "<u>yes"
    table = write_table(tmp_path / "evil", [evil] * 6 + [tested] * 12)
    chosen = ["--config.run.metrics=['anls', 'chrf']", f"--config.data.path={table}"]
    evaluation = evaluate_checkpoint(workdir, None, chosen)
    rows = evaluation.metrics["views"]["text_aux"].values()
    assert all(row["scores"].keys() == {"anls", "chrf"} for row in rows)
    page = render_report(evaluation)
    assert "<td>ANLS</td>" in page and "By expected answer" in page
    assert "training split: &#34;&lt;b&gt;no&lt;/b&gt;&#34; (50.0%)" in page
    assert evil not in page and tested not in page and "<td>&lt;u&gt;yes</td>" in page
    with pytest.raises(ConfigError, match="config.run is part of the checkpoint"):
        evaluate_checkpoint(workdir, None, ["--config.run.num_steps=3"])


def test_a_run_from_before_metrics_were_chosen_has_exact_match_alone(workdir):
    trained = checkpoint.load(workdir)
    del trained.config["run"]["metrics"]
    evaluation = evaluate_checkpoint(workdir)
    [[kind, row], *_] = evaluation.metrics["views"]["text_aux"].items()
    assert row.keys() == {"accuracy", "low", "high", "n", "baseline"}
    written = write_evaluation(evaluation)
    assert len(read_answers(written / "answers.jsonl")) == 6
    stored = json.loads((written / "metrics.json").read_text())
    assert stored["data_config"]["path"] == evaluation.config["data"]["path"]
    changed = evaluate_checkpoint(workdir, None, ["--config.run.metrics=('f1',)"])
    assert changed.metrics["views"]["text_aux"][kind]["scores"].keys() == {"f1"}


def test_an_evaluation_names_its_data_and_each_data_set_has_its_own_folder(workdir, folders):
    own, other, more = folders
    folders_written = []
    for path in (own, other, more, other):
        change = [] if path == own else [f"--config.data.path={path}"]
        evaluation = evaluate_checkpoint(workdir, None, change)
        table = path / "data.jsonl"
        assert evaluation.metrics["data"] == {
            "name": "folder",
            "path": str(table),
            "sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
            "rows": {"train": 6, "validation": 6, "test": 6},
            "notes": [],
        }
        folders_written.append(write_evaluation(evaluation))
        page = (folders_written[-1] / "report.html").read_text(encoding="utf-8")
        assert f"<td>evaluated on</td><td>{table}</td>" in page
        assert f'"path": "{path}"'.replace('"', "&#34;") in page
        assert f"<td>trained on</td><td>{own}</td>" in page
    first, second, third, again = folders_written
    assert (first, second) == (workdir / "eval", workdir / "eval" / "other") and again == second
    assert third.parent == workdir / "eval" and third.name.startswith("other-")
    assert json.loads((first / "metrics.json").read_text())["data"]["path"] == str(
        own / "data.jsonl"
    )


def test_a_page_says_what_is_odd_about_the_data(workdir, tmp_path):
    table = write_table(tmp_path / "odd", ["no", "yes"] * 9) / "data.jsonl"
    leak = {"text": "red 0", "answer": "no", "split": "test", "weight": 1, "by <hand>": "x"}
    table.write_text(f"{table.read_text()}\n{json.dumps(leak)}")
    evaluation = evaluate_checkpoint(workdir, None, [f"--config.data.path={table}"])
    unused, shared = evaluation.metrics["data"]["notes"]
    assert unused == "columns that are not used: 'by <hand>' (row 19: 'x' is no number)"
    assert "more than one split: 1 (first in row 19); scores on them are too good" in shared
    page = render_report(evaluation)
    assert "not used: &#39;by &lt;hand&gt;&#39; (row 19" in page and shared in page


def test_the_table_is_printed_even_if_no_file_can_be_written(
    workdir, tmp_path, capsys, monkeypatch
):
    workdir.mkdir()
    (workdir / "eval").write_text("a file in the way")
    arguments: dict[str, Any] = {"workdir": str(workdir), "step": "best", "out": None}
    monkeypatch.setattr(
        flags, "DEFINE_string", lambda name, *_, **__: SimpleNamespace(value=arguments[name])
    )
    monkeypatch.setattr(
        flags, "DEFINE_integer", lambda name, default, *_, **__: SimpleNamespace(value=default)
    )
    monkeypatch.setattr("slam_jax.reporting.language.is_language_model", lambda *_: False)
    monkeypatch.setattr(shared_flags, "define_base", lambda: SimpleNamespace(value=[]))
    monkeypatch.setattr(flags, "DEFINE_list", lambda *_, **__: SimpleNamespace(value=["f1"]))
    script = Path(__file__).parents[1] / "slam_jax" / "reporting" / "__main__.py"
    main = runpy.run_path(str(script))["main"]
    with pytest.raises(WriteError, match=r"nothing was written: .*; give another .*--out=DIR"):
        main([])
    printed = capsys.readouterr().out
    assert "$5 to $10" in printed and "F1 of words" in printed and "expected answer" in printed
    main.__globals__["OUT"].value = str(tmp_path / "out")
    main([])
    assert f"report: {tmp_path}/out/report.html" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("metrics.json", "answers.jsonl", "report.html")
    }
