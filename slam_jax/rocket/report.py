"""The leaderboard for people: a table in the terminal, a page of Markdown, a page of HTML."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from rich.console import Console

from slam_jax.errors import write_whole
from slam_jax.evaluation.plots import plot_curves

Json = Mapping[str, Any]

_WHAT = (
    "Each system learns one batch of random tokens by heart, as in the published comparison. It "
    "says how fast that goes on this machine, and nothing about language."
)


def print_board(board: Json, console: Console | None = None) -> None:
    """Prints the Markdown page; a terminal shows it as well as an editor does."""
    console = console or Console(highlight=False, soft_wrap=True)
    console.print(markdown(board), markup=False)


def write_markdown(board: Json, path: Path) -> None:
    write_whole(path, markdown(board))


def markdown(board: Json) -> str:
    """The whole board as text."""
    lines = ["# Rocket Engine leaderboard, protocol `seed`", "", _WHAT, "", describe(board), ""]
    lines += _table(COLUMNS, [_cells(row) for row in board["rows"] if row["status"] == "ok"])
    failed = [row for row in board["rows"] if row["status"] != "ok"]
    lines += [f"- `{row['system']}` failed: {row['reason']}" for row in failed]
    lines += ["", "## Beside the published figures", ""]
    compared = [_compared(row) for row in board["rows"] if _has_both(row)]
    lines += _table(COMPARED, compared)
    lines += ["", "## Updates", "", "Loss before each update, and after the last.", ""]
    rows = [row for row in board["rows"] if row["status"] == "ok"]
    updates = max((len(row["losses"]) for row in rows), default=0)
    header = ("system", *(str(i) for i in range(updates)))
    lines += _table(header, [(row["system"], *_losses(row)) for row in rows])
    lines += ["", "## Category winners", ""]
    lines += _table(("category", "system", "value"), _winners(board))
    lines += ["", "## Overall", ""]
    lines += [f"- {name}: {value}" for name, value in _overall(board)]
    lines += ["", "Score, of 100 points:", ""]
    lines += [f"- {part}: {rule}" for part, rule in board["score_rule"].items()]
    return "\n".join([*lines, ""])


def describe(board: Json) -> str:
    """Settings and machine in a sentence or two."""
    settings, machine = board["settings"], board["machine"]
    return (
        f"Preset {settings['preset']}, batches of {settings['batch_size']} x {settings['length']} "
        f"tokens, AdamW {settings['learning_rate']:g}, {settings['num_updates']} updates, seed "
        f"{settings['seed']}. {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, device {machine['device']}; Python {machine['python']}, jax "
        f"{machine['jax']}, slam_jax {machine['slam_jax']}. Inference: median and range of "
        f"{settings['rounds']} x {settings['repeats']} forward passes over the batch, taken in "
        f"turns. Peak memory: of the process, after the updates."
    )


COLUMNS = (
    "rank",
    "system",
    "score",
    "loss",
    "accuracy",
    "perplexity",
    "inference, ms",
    "step, s",
    "stability",
    "parameters",
    "active",
    "embedding",
    "peak memory, GiB",
    "cache, B/token",
    "stress test",
)
COMPARED = (
    "system",
    "initial loss",
    "published",
    "final loss",
    "published",
    "accuracy",
    "published",
    "published reached after",
    "inference, ms",
    "published",
    "stability",
    "published",
    "score",
    "published",
)


def _cells(row: Json) -> tuple[str, ...]:
    inference, step, parameters = row["inference"], row["training_step"], row["parameters"]
    low, high = 1e3 * inference["least"], 1e3 * inference["most"]
    return (
        str(row["rank"]),
        row["system"],
        f"{row['score']:.1f}",
        f"{row['initial_loss']:.3f} → {row['final_loss']:.3f}",
        f"{row['final_accuracy']:.4f}",
        f"{row['final_perplexity']:,.1f}",
        f"{row['inference_ms']:,.0f} ({low:,.0f} to {high:,.0f})",
        f"{step['median']:.2f} ({step['least']:.2f} to {step['most']:.2f})",
        f"{row['stability']:.4f}",
        f"{parameters['total']:,}",
        f"{parameters['active']:,}",
        f"{parameters['embedding']:,}",
        f"{row['peak_memory_bytes'] / 2**30:.2f}",
        f"{row['cache_bytes_per_token']:,}",
        f"{row['max_batch']} x {row['max_length']}",
    )


def _has_both(row: Json) -> bool:
    return row["status"] == "ok" and row["published"] is not None


def _compared(row: Json) -> tuple[str, ...]:
    published, updates = row["published"], row["reaches_published_after"]
    reached = f"{updates} updates" if updates is not None else "not reached"
    return (
        row["system"],
        f"{row['initial_loss']:.4f}",
        f"{published['initial_loss']:.4f}",
        f"{row['final_loss']:.4f}",
        f"{published['final_loss']:.4f}",
        f"{row['final_accuracy']:.4f}",
        f"{published['accuracy']:.4f}",
        reached,
        f"{row['inference_ms']:,.1f}",
        f"{published['inference_ms']:,.1f}",
        f"{row['stability']:.4f}",
        f"{published['stability']:.4f}",
        f"{row['score']:.1f}",
        f"{published['score']:.1f}",
    )


def _losses(row: Json) -> list[str]:
    return [f"{loss:.3f}" for loss in row["losses"]]


def _winners(board: Json) -> list[tuple[str, ...]]:
    winners = board["category_winners"].items()
    return [(name, winner["system"], f"{winner['value']:,.4g}") for name, winner in winners]


def _overall(board: Json) -> list[tuple[str, str]]:
    statistics, targets = board["statistics"], board["targets"]
    shown = [
        (name.replace("_", " "), "none" if value is None else f"{value:,.4g}")
        for name, value in statistics.items()
        if not isinstance(value, list)
    ]
    for name, key in (
        (f"score above {targets['score_above']:g}, the stated target", "above_target_score"),
        (
            f"inference below {targets['inference_ms_below']:g} ms, the stated target",
            "below_target_inference",
        ),
    ):
        shown.append((name, ", ".join(statistics[key]) or "no system"))
    return shown


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [header, ("---",) * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def write_html(board: Json, path: Path) -> None:
    """One page that needs nothing but itself."""
    rows = [row for row in board["rows"] if row["status"] == "ok"]
    curves = {row["system"]: (list(range(len(row["losses"]))), row["losses"]) for row in rows}
    accuracies = {
        row["system"]: (
            list(range(len(row["accuracies"]))),
            [100 * accuracy for accuracy in row["accuracies"]],
        )
        for row in rows
    }
    plots = {}
    if rows:
        plots = {
            "loss": plot_curves(curves, "cross-entropy, nats", xlabel="updates"),
            "accuracy": plot_curves(accuracies, "% right", xlabel="updates"),
        }
    text = _template().render(
        what=_WHAT,
        about=describe(board),
        columns=COLUMNS,
        rows=[_cells(row) for row in rows],
        failed=[row for row in board["rows"] if row["status"] != "ok"],
        compared_columns=COMPARED,
        compared=[_compared(row) for row in rows if _has_both(row)],
        winners=_winners(board),
        overall=_overall(board),
        score_rule=board["score_rule"],
        plots={name: markupsafe.Markup(plot) for name, plot in plots.items()},
    )
    write_whole(path, text)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = resources.files("slam_jax.rocket") / "templates" / "leaderboard.html"
    return environment.from_string(page.read_text(encoding="utf-8"))
