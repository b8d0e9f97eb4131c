"""The report of an evaluation: one self-contained page of accuracies, examples and attention."""

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
from slam_jax.evaluation.answered import ANSWERS, Answer, write_answers
from slam_jax.evaluation.metrics import calibration
from slam_jax.evaluation.scores import METRICS
from slam_jax.evaluation.table import (
    entry_label,
    explain_baseline,
    explain_untested,
    show_cells,
    show_confusions,
    write_metrics,
)
from slam_jax.generation import Request
from slam_jax.reporting.attention import attention_html
from slam_jax.reporting.checkpoint import Evaluation, ShownExample
from slam_jax.reporting.plots import plot_calibration, plot_curves, plot_intervals
from slam_jax.reporting.processes.measure import knock_outs
from slam_jax.reporting.rendering import render_template
from slam_jax.training.checkpoint import is_loss
from slam_jax.version import __version__

_VIEWS_WITH_ATTENTION = 6
_LOSS_POINTS = 200


def write_evaluation(evaluation: Evaluation, out: str | Path | None = None) -> Path:
    """Writes `metrics.json`, `answers.jsonl` and `report.html` and returns their folder.

    out: the folder, by default `evaluation.folder`.

    Raises:
      WriteError: a file cannot be written; each file is written whole or not at all.
    """
    folder = evaluation.folder if out is None else Path(out)
    written = "nothing was written"
    try:
        write_metrics(folder / "metrics.json", evaluation.metrics)
        written = "metrics.json was written, the answers and the report were not"
        write_answers(folder / ANSWERS, evaluation.answers)
        written = "metrics.json and answers.jsonl were written, the report was not"
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
    rows = [(view, *row) for view, rows in metrics["views"].items() for row in rows.items()]
    intervals = [
        (view, entry_label(entry), row["accuracy"], row["low"], row["high"])
        for view, entry, row in rows
    ]
    examples: dict[str, list[tuple]] = defaultdict(list)
    for shown in evaluation.examples:
        examples[shown.view].append((shown, *_aux_table(shown.example, loaded)))
    return render_template(
        "report.html",
        title=evaluation.title,
        step=loaded.step,
        facts=_facts(evaluation, len(own)),
        num_questions=len(own),
        accuracy=correct.mean(),
        confidence=confidence.mean(),
        calibration_error=bins.error,
        rows=rows,
        baseline=explain_baseline(metrics) if "baseline_answer" in metrics else "",
        notes=metrics["data"].get("notes", ()),
        scores=[
            (view, entry, METRICS[name].label, *show_cells(name, score))
            for view, entry, row in rows
            for name, score in row.get("scores", {}).items()
        ],
        by_answer=metrics.get("answers"),
        untested=explain_untested(metrics),
        show_confusions=show_confusions,
        baseline_accuracy=_baseline_accuracy(rows),
        retrieval=metrics.get("retrieval"),
        plots={
            "accuracy": plot_intervals(intervals),
            "calibration": plot_calibration(bins.confidence, bins.accuracy, bins.counts),
            **_plot_training(evaluation.records),
        },
        examples=examples,
        attention=_attention_sections(evaluation),
        processes=evaluation.processes,
        process_columns=knock_outs(loaded.model.config.num_processes),
        config=json.dumps(evaluation.config, indent=2, ensure_ascii=False),
    )


def _baseline_accuracy(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> float:
    """The share of all questions that the baseline answer gets right; 0 without a baseline."""
    all_rows = [row for _, entry, row in rows if not entry.startswith("needs_both")]
    right = sum(row.get("baseline", 0) * row["n"] for row in all_rows)
    return right / sum(row["n"] for row in all_rows)


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
    """Training loss by view, averaged over stretches of steps; validation accuracy and loss."""
    train = [r for r in records if r["split"] == "train" and r.get("cross_entropy") is not None]
    validation = [r for r in records if r["split"] == "validation"]
    plots = {}
    if train:
        stretch = max(1, math.ceil(train[-1]["step"] / _LOSS_POINTS))
        losses: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in train:
            middle = (record["step"] // stretch + 0.5) * stretch
            losses[record.get("view", "all")][middle].append(record["cross_entropy"])
        curves = {
            view: (list(means), [np.mean(x) for x in means.values()])
            for view, means in losses.items()
        }
        plots["loss"] = plot_curves(curves, "cross-entropy, nats", log=True)
    if validation:
        names = [name for name in validation[-1] if name not in ("step", "split", "accuracy")]
        right = [name for name in names if not is_loss(name)] or ["accuracy"]
        plots["validation"] = plot_curves(_curves(validation, right, 100.0), "% right")
        if by_view := [name for name in names if name.startswith("loss/")]:
            curves = _curves(validation, by_view)
            plots["validation_loss"] = plot_curves(curves, "nats per token", log=True)
    return plots


def _curves(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], factor: float = 1.0
) -> dict[str, Any]:
    """Steps and values of each name, where it has one."""
    shown = {name: [r for r in records if r.get(name) is not None] for name in names}
    return {
        name.removeprefix("loss/"): ([r["step"] for r in rows], [factor * r[name] for r in rows])
        for name, rows in shown.items()
    }


def _aux_table(example: Example, loaded: Any) -> tuple[Sequence[str], list[list[str]]]:
    """The column names and the cells of an example's auxiliary vectors."""
    names = () if loaded.aux_format is None else loaded.aux_format.names
    if example.numbers is not None:
        rows, digits = [example.numbers], 15  # as in the table of the user
    elif example.aux is not None:
        rows, digits = example.aux.tolist(), 4
        names = names or [str(i + 1) for i in range(len(rows[0]))]
    else:
        return (), []
    return names, [["" if math.isnan(x) else f"{x:.{digits}g}" for x in row] for row in rows]


def _attention_sections(evaluation: Evaluation) -> list[tuple[Answer, str]]:
    """The least confident answer to the first example of some views, and its attention maps."""
    first: dict[str, ShownExample] = {}
    for shown in evaluation.examples:
        first.setdefault(shown.view, shown)
    sections = []
    for shown in list(first.values())[:_VIEWS_WITH_ATTENTION]:
        if shown.answers:
            answer = min(shown.answers, key=lambda a: a.logprob)
            request = _as_request(shown.example, answer.prompt)
            maps = attention_html(evaluation.loaded, request, answer.predicted, style=False)
            sections.append((answer, maps))
    return sections


def _as_request(example: Example, prompt: str) -> Request:
    """The request that shows the model the same."""
    aux: Any = example.aux
    if example.numbers is not None:
        aux = [None if math.isnan(x) else x for x in example.numbers]
    if example.aux is not None and np.isnan(example.aux).all():
        aux = None
    several = example.image is not None and example.image.ndim > 3
    image: Any = list(example.pictures) if several else example.image
    return Request(prompt, example.text, image, aux)
