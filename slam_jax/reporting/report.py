"""The report of an evaluation: a self-contained page of what a model saw, wrote and looked at."""

import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slam_jax.data import Example
from slam_jax.errors import WriteError, first_line, write_whole
from slam_jax.evaluation.metrics import calibration
from slam_jax.evaluation.table import entry_label, explain_baseline, percent, write_metrics
from slam_jax.generation import Request
from slam_jax.reporting.attention_html import attention_css, attention_html
from slam_jax.reporting.checkpoint import Evaluation, ShownExample
from slam_jax.reporting.plots import plot_calibration, plot_curves, plot_intervals
from slam_jax.reporting.rendering import markup, png_url, render_template
from slam_jax.version import __version__

_VIEWS_WITH_ATTENTION = 6
_LOSS_POINTS = 200


def write_evaluation(evaluation: Evaluation, out: str | Path | None = None) -> Path:
    """Writes `metrics.json` and `report.html` and returns their folder.

    out: the folder, by default `evaluation.folder`.

    Raises:
      WriteError: a file cannot be written; each file is written whole or not at all.
    """
    folder = evaluation.folder if out is None else Path(out)
    written = "nothing was written"
    try:
        write_metrics(folder / "metrics.json", evaluation.metrics)
        written = "metrics.json was written, the report was not"
        write_whole(folder / "report.html", render_report(evaluation))
    except WriteError as error:
        raise WriteError(
            f"{written}: {folder} ({first_line(error)}); give another folder with --out=DIR"
        ) from error
    return folder


def render_report(evaluation: Evaluation) -> str:
    """The page as text."""
    loaded, metrics = evaluation.loaded, evaluation.metrics
    own = [answer for answer in evaluation.answers if "_only_" not in answer.view]
    confidence = np.array([math.exp(answer.logprob) for answer in own])
    correct = np.array([answer.correct for answer in own], np.float64)
    bins = calibration(confidence, correct)
    rows = _accuracy_rows(metrics)
    plots = {
        "accuracy": plot_intervals([(row["view"], row["kind"], *row["values"]) for row in rows]),
        "calibration": plot_calibration(bins.confidence, bins.accuracy, bins.counts),
        **_plot_training(evaluation.records),
    }
    examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for shown in evaluation.examples:
        examples[shown.view].append(_describe_example(shown, loaded))
    return render_template(
        "report.html",
        title=evaluation.title,
        step=loaded.step,
        cards=_cards(metrics, correct, bins.error),
        facts=_facts(evaluation, len(own)),
        plots={name: markup(svg) for name, svg in plots.items()},
        accuracy=rows,
        baseline=explain_baseline(metrics) if "baseline_answer" in metrics else "",
        notes=metrics["data"].get("notes", ()),
        calibration={
            "error": percent(bins.error),
            "confidence": percent(float(confidence.mean())),
            "accuracy": percent(float(correct.mean())),
        },
        examples=examples,
        attention=_attention_sections(evaluation),
        config=json.dumps(evaluation.config, indent=2, ensure_ascii=False),
        attention_css=markup(attention_css()),
    )


def _accuracy_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "view": view,
            "kind": entry_label(entry),
            "values": (row["accuracy"], row["low"], row["high"]),
            "right": percent(row["accuracy"]),
            "interval": f"{percent(row['low'])} to {percent(row['high'])}",
            "n": f"{row['n']:,}",
            "baseline": percent(row["baseline"]) if "baseline" in row else "",
        }
        for view, entries in metrics["views"].items()
        for entry, row in entries.items()
    ]


def _cards(metrics: Mapping[str, Any], correct: np.ndarray, error: float) -> list[tuple]:
    """(name, value, note) of the figures at the top of the page."""
    cards = [("right", percent(float(correct.mean())), f"of {len(correct):,} test questions")]
    if "baseline_answer" in metrics:
        rows = [row for entries in metrics["views"].values() for entry, row in entries.items()
                if not entry.startswith("needs_both")]  # fmt: skip
        share = sum(row["baseline"] * row["n"] for row in rows) / sum(row["n"] for row in rows)
        cards.append(("baseline", percent(share), explain_baseline(metrics)))
    cards.append(("calibration error", percent(error), ""))
    if retrieval := metrics.get("retrieval"):
        recall = retrieval["text_to_image"]["recall@5"]
        cards.append(("text finds image", percent(recall), f"recall@5 among {retrieval['n']:,}"))
    return cards


def _facts(evaluation: Evaluation, num_questions: int) -> dict[str, str]:
    loaded, data = evaluation.loaded, evaluation.metrics["data"]
    trained, tokenizer = loaded.config["data"], loaded.tokenizer
    rows = ", ".join(f"{count:,} {split}" for split, count in data["rows"].items())
    size = sum(x.size for x in jax.tree.leaves(loaded.model))
    facts = {
        "parameters": f"{size:,}",
        "trained on": trained.get("path") or trained["name"],
        "evaluated on": data["path"] or data["name"],
        "rows of the data": rows,
        "sha256 of the table": data["sha256"],
        "test questions": f"{num_questions:,}",
        "checkpoint": f"step {loaded.step:,}",
        "evaluation": f"{evaluation.seconds:.0f} s on {jax.devices()[0].device_kind}",
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "slam_jax": f"{__version__}, jax {jax.__version__}, Python {platform.python_version()}",
        "tokenizer": f"{tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:12]}",
    }
    return {name: value for name, value in facts.items() if value}


def _plot_training(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Training loss by view, averaged over stretches of steps, and validation accuracy."""
    train = [r for r in records if r["split"] == "train" and r.get("cross_entropy") is not None]
    validation = [r for r in records if r["split"] == "validation"]
    plots = {}
    if train:
        stretch = max(1, math.ceil(train[-1]["step"] / _LOSS_POINTS))
        losses: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in train:
            view = record.get("view", "all")
            losses[view][record["step"] // stretch].append(record["cross_entropy"])
        curves = {
            view: ([(i + 0.5) * stretch for i in means], [np.mean(x) for x in means.values()])
            for view, means in losses.items()
        }
        plots["loss"] = plot_curves(curves, "cross-entropy, nats", log=True)
    if validation:
        known = ("step", "split", "accuracy")
        names = [name for name in validation[-1] if name not in known] or ["accuracy"]
        curves = {}
        for name in names:
            points = [(r["step"], 100 * r[name]) for r in validation if r.get(name) is not None]
            curves[name] = ([x for x, _ in points], [y for _, y in points])
        plots["validation"] = plot_curves(curves, "% right")
    return plots


def _describe_example(shown: ShownExample, loaded: Any) -> dict[str, Any]:
    """What the template shows of an example; wrong answers first."""
    example = shown.example
    names = () if loaded.aux_format is None else loaded.aux_format.names
    rows, digits = (), 4
    if example.numbers is not None:
        rows, digits = [example.numbers], 15  # as in the table of the user
    elif example.aux is not None:
        rows = example.aux.tolist()
        names = names or [str(i + 1) for i in range(len(rows[0]))]
    return {
        "text": example.text,
        "image": None if example.image is None else png_url(example.image),
        "aux": [["" if math.isnan(x) else f"{x:.{digits}g}" for x in row] for row in rows],
        "aux_names": names,
        "answers": [
            {**a._asdict(), "correct": a.correct, "confidence": percent(math.exp(a.logprob), 0)}
            for a in sorted(shown.answers, key=lambda a: a.correct)
        ],
    }


def _attention_sections(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Attention of the least confident answer to the first example of some views."""
    first: dict[str, ShownExample] = {}
    for shown in evaluation.examples:
        first.setdefault(shown.view, shown)
    sections = []
    for shown in list(first.values())[:_VIEWS_WITH_ATTENTION]:
        if shown.answers:
            answer = min(shown.answers, key=lambda a: a.logprob)
            request = _as_request(shown.example, answer.prompt)
            html = attention_html(evaluation.loaded, request, answer.predicted, style=False)
            sections.append({**answer._asdict(), "correct": answer.correct, "html": markup(html)})
    return sections


def _as_request(example: Example, prompt: str) -> Request:
    """The request that shows the model the same."""
    aux: Any = example.aux
    if example.numbers is not None:
        aux = [None if math.isnan(x) else x for x in example.numbers]
    if example.aux is not None and np.isnan(example.aux).all():
        aux = None
    return Request(prompt, example.text, example.image, aux)
