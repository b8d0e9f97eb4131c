"""The report: one page that stands alone, with what a model saw, said and looked at."""

import base64
import functools
import io
import json
import math
import os
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jax
import jinja2
import markupsafe
import numpy as np
from jaxtyping import Float
from PIL import Image

from slam_jax.data import AuxFormat, Example
from slam_jax.data.images import load_image
from slam_jax.errors import write_whole
from slam_jax.evaluation.answers import Answer, Results
from slam_jax.evaluation.metrics import calibration
from slam_jax.generation import Request
from slam_jax.reporting.attention import AttentionMaps, attention_maps
from slam_jax.reporting.plots import plot_calibration, plot_curves, plot_intervals
from slam_jax.version import __version__

_SCENES, _LOOKED, _POINTS = 4, 6, 200
_HEAT = (225, 87, 0)
_FULL = 4  # times an even share is shown in full colour


class Shown(NamedTuple):
    """An example of a view as the model was shown it, with its answers."""

    view: str
    example: Example
    answers: tuple[Answer, ...]


def choose_examples(
    results: Results, examples: Mapping[str, Sequence[Example]], count: int = _SCENES
) -> list[Shown]:
    """`count` examples a view of the first ones given, those first in which something is wrong."""
    answers: dict[tuple[str, int], list[Answer]] = defaultdict(list)
    for answer in results.answers:
        answers[answer.view, answer.scene].append(answer)
    chosen = []
    for view, given in examples.items():
        shown = [Shown(view, e, tuple(answers[view, i])) for i, e in enumerate(given)]
        wrong = [each for each in shown if not all(a.correct for a in each.answers)]
        rest = [each for each in shown if all(a.correct for a in each.answers)]
        some = wrong[: max(count // 2, count - len(rest))]
        chosen += some + rest[: count - len(some)]
    return chosen


def write_report(
    path: str | os.PathLike[str],
    loaded: Any,
    results: Results,
    shown: Sequence[Shown],
    records: Sequence[Mapping[str, Any]],
    *,
    title: str,
    seconds: float,
) -> None:
    """Writes the page, all or nothing.

    Args:
      records: of the run's metrics file. title: of the page. seconds: that the evaluation took.

    Raises WriteError where it cannot be written; what was there before is kept.
    """
    page = render_report(loaded, results, shown, records, title=title, seconds=seconds)
    write_whole(path, page)


def render_report(
    loaded: Any,
    results: Results,
    shown: Sequence[Shown],
    records: Sequence[Mapping[str, Any]],
    *,
    title: str,
    seconds: float,
) -> str:
    """The page as text; arguments as in `write_report`."""
    rows = [
        (
            view,
            entry.replace("_", " "),
            *(entries[entry][key] for key in ("accuracy", "low", "high", "n")),
        )
        for view, entries in results.metrics["views"].items()
        for entry in entries
    ]
    own = [answer for answer in results.answers if "_only_" not in answer.view]
    confidence = np.array([math.exp(answer.logprob) for answer in own])
    correct = np.array([answer.correct for answer in own], np.float64)
    bins = calibration(confidence, correct)
    plots = {
        "accuracy": plot_intervals([row[:5] for row in rows]),
        "calibration": plot_calibration(bins.confidence, bins.accuracy, bins.counts),
        **_curves(records),
    }
    tokenizer = loaded.tokenizer
    size = sum(x.size for x in jax.tree.leaves(loaded.model))
    facts = {
        "parameters": f"{size:,}",
        "data set": loaded.config["data"]["name"],
        "checkpoint": f"step {loaded.step:,}",
        "test questions": f"{len(own):,}",
        "evaluation": f"{seconds:.0f} s on {jax.devices()[0].device_kind}",
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "slam_jax": f"{__version__}, jax {jax.__version__}, Python {platform.python_version()}",
        "tokenizer": f"{tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:12]}",
    }
    examples: dict[str, list[Any]] = defaultdict(list)
    for each in shown:
        examples[each.view].append(_scene(each, loaded))
    return _template("report.html").render(
        title=title,
        step=loaded.step,
        cards=_cards(results, correct, bins.error),
        facts=facts,
        plots={name: markupsafe.Markup(svg) for name, svg in plots.items()},
        accuracy=[
            {
                "view": view,
                "kind": kind,
                "right": _percent(share),
                "interval": f"{_percent(low)} to {_percent(high)}",
                "n": f"{n:,}",
            }
            for view, kind, share, low, high, n in rows
        ],
        calibration={
            "error": _percent(bins.error),
            "confidence": _percent(float(confidence.mean())),
            "accuracy": _percent(float(correct.mean())),
        },
        examples=examples,
        looked=_looked(loaded, shown),
        config=json.dumps(loaded.config, indent=2, ensure_ascii=False),
        attention_css=markupsafe.Markup(_read("attention.css")),
    )


def attention_html(loaded: Any, request: Request, answer: str) -> str:
    """A fragment of a page: where each process and each head looked while it answered so.

    It brings its own style, asks for nothing from outside, and escapes what users wrote.
    """
    return f"<style>{_read('attention.css')}</style>{_attention(loaded, request, answer)}"


def _attention(loaded: Any, request: Request, answer: str) -> str:
    maps = attention_maps(loaded, request, answer)
    image = None
    if maps.image is not None:
        image = _png(load_image(request.image, loaded.model.config.image.size))
    return _template("attention.html").render(
        image=image,
        maps=[_map(maps, k, loaded, request) for k in range(len(maps.names))],
        num_processes=maps.num_processes,
        wide=maps.image is None,
    )


def _map(maps: AttentionMaps, k: int, loaded: Any, request: Request) -> dict[str, Any]:
    given = [part[k] for part in (maps.image, maps.text, maps.aux) if part is not None]
    full = _FULL / sum(part.size for part in given)
    drawn: dict[str, Any] = dict(name=maps.names[k], heat=None, words=(), rows=())
    if maps.image is not None:
        drawn["heat"] = _heat(maps.image[k] / full)
    if maps.text is not None:
        words = _words(loaded.tokenizer, request.text or "")
        drawn["words"] = _shares(words, maps.text[k] / full)
    if maps.aux is not None:
        drawn["rows"] = _shares(_row_names(loaded, request.aux), maps.aux[k] / full)
    return drawn


def _shares(texts: Sequence[str], shares: Any) -> list[dict[str, Any]]:
    pairs = zip(texts, shares.tolist(), strict=False)
    return [{"text": text, "share": f"{min(share, 1):.3f}"} for text, share in pairs]


def _words(tokenizer: Any, text: str) -> list[str]:
    return [tokenizer.token_bytes[i].decode("utf-8", "replace") for i in tokenizer.encode(text)]


def _row_names(loaded: Any, aux: Any) -> list[str]:
    """What can be said of each vector: its column, or what its ones stand for, or its number."""
    format_: AuxFormat | None = loaded.aux_format
    if format_ is not None and format_.has_columns:
        return list(format_.names)
    names = () if format_ is None else format_.names
    rows = np.asarray(aux).tolist()
    said = [" ".join(n for n, x in zip(names, row, strict=False) if x == 1.0) for row in rows]
    return [text or f"row {i + 1}" for i, text in enumerate(said)]


def _looked(loaded: Any, shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """For some views their first example, and of it the answer that was the least sure."""
    looked = []
    for view in list(dict.fromkeys(each.view for each in shown))[:_LOOKED]:
        each = next(each for each in shown if each.view == view)
        if not each.answers:
            continue
        answer = min(each.answers, key=lambda a: a.logprob)
        example = each.example
        request = Request(answer.prompt, example.text, example.image, _raw_aux(loaded, example))
        html = markupsafe.Markup(_attention(loaded, request, answer.given))
        looked.append({**answer._asdict(), "correct": answer.correct, "html": html})
    return looked


def _raw_aux(loaded: Any, example: Example) -> Any:
    """The auxiliary vectors of an example as a request has them."""
    format_ = loaded.aux_format
    if example.aux is not None and np.isnan(example.aux).all():
        return None
    if example.aux is None or format_ is None or not format_.has_columns:
        return example.aux
    return format_.decode(example.aux)


def _scene(each: Shown, loaded: Any) -> dict[str, Any]:
    example, format_ = each.example, loaded.aux_format
    scene: dict[str, Any] = dict(text=example.text, image=None, aux=())
    if example.image is not None:
        scene["image"] = _png(example.image)
    aux = _raw_aux(loaded, example)
    if aux is not None:
        table = [aux] if format_ is not None and format_.has_columns else np.asarray(aux).tolist()
        scene["aux"] = [["" if x is None else f"{x:.4g}" for x in row] for row in table]
        width = len(scene["aux"][0])
        scene["aux_names"] = format_.names if format_ else [str(i + 1) for i in range(width)]
    scene["answers"] = [
        {**a._asdict(), "correct": a.correct, "confidence": _percent(math.exp(a.logprob), 0)}
        for a in sorted(each.answers, key=lambda a: a.correct)
    ]
    return scene


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Training loss by view, in means over stretches, and validation accuracy."""
    train = [r for r in records if r["split"] == "train" and r.get("cross_entropy") is not None]
    tested = [r for r in records if r["split"] == "validation"]
    plots = {}
    if train:
        stretch = max(1, math.ceil(train[-1]["step"] / _POINTS))
        sums: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in train:
            view = record.get("view", "all")
            sums[view][record["step"] // stretch].append(record["cross_entropy"])
        curves = {
            view: (
                [(i + 0.5) * stretch for i in parts],
                [float(np.mean(x)) for x in parts.values()],
            )
            for view, parts in sums.items()
        }
        plots["loss"] = plot_curves(curves, "cross-entropy, nats", log=True)
    if tested:
        names = [n for n in tested[-1] if n not in ("step", "split", "accuracy")] or ["accuracy"]
        curves = {}
        for name in names:
            known = [r for r in tested if r.get(name) is not None]
            curves[name] = ([r["step"] for r in known], [100 * r[name] for r in known])
        plots["validation"] = plot_curves(curves, "% right")
    return plots


def _cards(results: Results, correct: Float[np.ndarray, "n"], error: float) -> list[tuple]:
    cards = [("right", _percent(float(correct.mean())), f"of {len(correct):,} test questions")]
    cards.append(("calibration error", _percent(error), ""))
    if retrieval := results.metrics.get("retrieval"):
        recall = retrieval["text_to_image"]["recall@5"]
        cards.append(("text finds image", _percent(recall), f"recall@5 among {retrieval['n']:,}"))
    return cards


def _heat(shares: Float[np.ndarray, "h w"]) -> str:
    """Colour laid over an image, the more of it the larger the share."""
    alpha = (np.clip(shares, 0, 1) * 0.85 * 255).astype(np.uint8)
    colour = np.broadcast_to(np.array(_HEAT, np.uint8), (*alpha.shape, 3))
    return _png(np.concatenate([colour, alpha[..., None]], axis=-1))


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def _read(name: str) -> str:
    return (resources.files("slam_jax.reporting") / "templates" / name).read_text(encoding="utf-8")


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.from_string(_read(name))
