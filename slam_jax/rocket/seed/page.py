"""The page of the published comparison, repeated."""

from slam_jax.reporting.plots import plot_bars, plot_curves, plot_points
from slam_jax.rocket.board import describe_machine_of, score_bullets, winners_table
from slam_jax.rocket.page import Bullets, Page, Plots, Table
from slam_jax.rocket.tasks import Json

_WHAT = (
    "Each system learns one batch of random tokens by heart, as in the published comparison. It "
    "says how fast that goes on this machine, and nothing about language."
)
_COMPARED_NOTE = (
    "Published on an Apple M3, by a rule of scoring that was not. Reached after: the first update "
    "after which loss and accuracy are as good as the published final ones."
)


def make_page(board: Json) -> Page:
    """The board in tables and plots."""
    rows = [row for row in board["rows"] if row["status"] == "ok"]
    failed = [row for row in board["rows"] if row["status"] != "ok"]
    compared = [_compared(row) for row in rows if row["published"] is not None]
    updates = max((len(row["losses"]) for row in rows), default=0)
    sections: list[Table | Bullets | Plots] = [
        Table("Ranking", _COLUMNS, [_cells(row) for row in rows], "", True, _SHORT)
    ]
    if failed:
        sections.append(Bullets("Failed", [f"{row['system']}: {row['reason']}" for row in failed]))
    if rows:
        sections += _plots(rows)
    sections += [
        Table("Beside the published figures", _COMPARED, compared, _COMPARED_NOTE, True),
        Table(
            "Updates",
            ("system", *map(str, range(updates))),
            [(row["system"], *(f"{loss:.3f}" for loss in row["losses"])) for row in rows],
            "Loss before each update, and after the last.",
        ),
        Table(
            "Stress test",
            ("system", "largest", "what was tried, s", "then"),
            [_stressed(row) for row in rows],
            "Forward passes over twice the batch and twice the length each time.",
        ),
        winners_table(board),
        Bullets("Overall", [f"{name}: {value}" for name, value in _overall(board)]),
        score_bullets(board),
    ]
    return Page("Rocket Engine leaderboard: one batch", [_WHAT, describe(board)], sections)


def describe(board: Json) -> str:
    """Settings and machine in a sentence or two."""
    given = board["settings"]
    return (
        f"Preset {given['preset']}, batches of {given['batch_size']} x {given['length']} tokens, "
        f"AdamW {given['learning_rate']:g}, {given['num_updates']} updates, seed {given['seed']}. "
        f"{describe_machine_of(board)} Inference: median and range of {given['rounds']} x "
        f"{given['repeats']} forward passes over the batch, taken in turns. Peak memory: of the "
        "process, after the updates."
    )


_COLUMNS = (
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
_SHORT = ("rank", "system", "score", "loss", "accuracy", "inference, ms", "peak memory, GiB")
_COMPARED = (
    "system",
    "initial loss",
    "published",
    "final loss",
    "published ",
    "accuracy",
    "published  ",
    "reached after",
    "inference, ms",
    "published   ",
    "stability",
    "published    ",
    "score",
    "published     ",
)


def _cells(row: Json) -> tuple[str, ...]:
    inference, step, parameters = row["inference"], row["training_step"], row["parameters"]
    low, high = 1e3 * inference["least"], 1e3 * inference["most"]
    stress = row["stress"]
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
        f"{stress['max_batch']} x {stress['max_length']}",
    )


def _compared(row: Json) -> tuple[str, ...]:
    published, updates = row["published"], row["reaches_published_after"]
    return (
        row["system"],
        f"{row['initial_loss']:.4f}",
        f"{published['initial_loss']:.4f}",
        f"{row['final_loss']:.4f}",
        f"{published['final_loss']:.4f}",
        f"{row['final_accuracy']:.4f}",
        f"{published['accuracy']:.4f}",
        f"{updates} updates" if updates is not None else "not reached",
        f"{row['inference_ms']:,.1f}",
        f"{published['inference_ms']:,.1f}",
        f"{row['stability']:.4f}",
        f"{published['stability']:.4f}",
        f"{row['score']:.1f}",
        f"{published['score']:.1f}",
    )


def _stressed(row: Json) -> tuple[str, ...]:
    stress = row["stress"]
    tried = [f"{x['batch_size']} x {x['length']}: {x['seconds']:.2f}" for x in stress["levels"]]
    largest = f"{stress['max_batch']} x {stress['max_length']}"
    return row["system"], largest, ", ".join(tried), stress["ended"]


def _plots(rows: list[Json]) -> list[Plots]:
    def curves(key: str, scale: float = 1.0):
        return {
            row["system"]: (list(range(len(row[key]))), [scale * value for value in row[key]])
            for row in rows
        }

    def points(key: str, scale: float = 1.0):
        return {row["system"]: (scale * row[key], row["final_loss"]) for row in rows}

    def bars(key: str, scale: float = 1.0):
        return {row["system"]: scale * row[key] for row in rows}

    gib = 2**-30
    return [
        Plots(
            "How the batch is learned",
            {
                "Loss": plot_curves(curves("losses"), "cross-entropy, nats", xlabel="updates"),
                "Accuracy": plot_curves(curves("accuracies", 100.0), "% right", xlabel="updates"),
            },
        ),
        Plots(
            "Final loss against cost",
            {
                "Inference": plot_points(points("inference_ms"), "ms", "nats"),
                "Peak memory": plot_points(points("peak_memory_bytes", gib), "GiB", "nats"),
            },
        ),
        Plots(
            "Category winners",
            {
                "Loss reduction, nats": plot_bars(bars("loss_reduction")),
                "Final accuracy, %": plot_bars(bars("final_accuracy", 100.0)),
                "Inference, ms: less is better": plot_bars(bars("inference_ms"), lowest=True),
                "Stability": plot_bars(bars("stability")),
                "Peak memory, GiB: less is better": plot_bars(
                    bars("peak_memory_bytes", gib), lowest=True
                ),
            },
        ),
    ]


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
