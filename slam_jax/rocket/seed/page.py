"""The page of the protocol `seed`."""

from slam_jax.reporting.plots import plot_curves
from slam_jax.rocket import sections
from slam_jax.rocket.metrics import Metric
from slam_jax.rocket.page import Bullets, Page, Plots, Section
from slam_jax.rocket.tasks import Json

_WHAT = (
    "Each system learns one batch of random tokens by heart, as in the published comparison. The "
    "ranking says how fast that happens on this machine, and nothing about language."
)
_RANKING = {
    "rank": "{rank}",
    "system": "{system}",
    "score": "{score:.1f}",
    "loss": "{initial_loss:.3f} → {final_loss:.3f}",
    "accuracy": "{final_accuracy:.4f}",
    "perplexity": "{final_perplexity:,.1f}",
    "inference, ms": sections.ranged("inference", scale=1e3),
    "step, s": sections.ranged("training_step", ".2f"),
    "stability": "{stability:.4f}",
    "parameters": "{parameters[total]:,}",
    "active": "{parameters[active]:,}",
    "embedding": "{parameters[embedding]:,}",
    "peak memory, GiB": sections.PEAK_MEMORY,
    "cache, B/token": "{cache_bytes_per_token:,}",
    "stress test": "{stress[max_batch]} x {stress[max_length]}",
}
_SHORT = ("rank", "system", "score", "loss", "accuracy", "inference, ms", "peak memory, GiB")
_PUBLISHED_NOTE = (
    "The published figures are from an Apple M3, with a scoring rule that was not published. "
    "Reached after: the first update after which loss and accuracy are as good as the published "
    "final ones."
)
_PUBLISHED = {
    "system": "{system}",
    "initial loss": "{initial_loss:.4f}",
    "published": "{published[initial_loss]:.4f}",
    "final loss": "{final_loss:.4f}",
    "published ": "{published[final_loss]:.4f}",
    "accuracy": "{final_accuracy:.4f}",
    "published  ": "{published[accuracy]:.4f}",
    "reached after": lambda row: (
        "not reached"
        if row["reaches_published_after"] is None
        else f"{row['reaches_published_after']} updates"
    ),
    "inference, ms": "{inference_ms:,.1f}",
    "published   ": "{published[inference_ms]:,.1f}",
    "stability": "{stability:.4f}",
    "published    ": "{published[stability]:.4f}",
    "score": "{score:.1f}",
    "published     ": "{published[score]:.1f}",
}
_STRESS = {
    "system": "{system}",
    "largest": "{stress[max_batch]} x {stress[max_length]}",
    "levels, s": lambda row: ", ".join(
        f"{level['batch_size']} x {level['length']}: {level['seconds']:.2f}"
        for level in row["stress"]["levels"]
    ),
    "ended because": "{stress[ended]}",
}
_STRESS_NOTE = "Forward passes, each over twice the batch and twice the length of the one before."
_WINNER_PLOTS = {
    "Loss reduction, nats": Metric("loss_reduction"),
    "Final accuracy, %": Metric("final_accuracy", scale=100.0),
    "Inference, ms: less is better": Metric("inference_ms", least=True),
    "Stability": Metric("stability"),
    "Peak memory, GiB: less is better": Metric("peak_memory_bytes", least=True, scale=2**-30),
}
_COST_PLOTS = {
    "Inference, ms": Metric("inference_ms"),
    "Peak memory, GiB": Metric("peak_memory_bytes", scale=2**-30),
}


def make_page(board: Json) -> Page:
    """The board as tables and plots."""
    rows = sections.successful(board)
    published = [row for row in rows if row["published"] is not None]
    updates = range(max((len(row["losses"]) for row in rows), default=0))
    parts = [
        sections.make_table("Ranking", _RANKING, rows, short=_SHORT),
        *sections.failed(board),
    ]
    if rows:
        title, loss = "Final loss against cost", Metric("final_loss")
        parts.append(_learning_curves(rows))
        parts.append(sections.cost_plots(title, rows, loss, "nats", _COST_PLOTS))
        parts.append(sections.winner_plots(rows, _WINNER_PLOTS))
    parts += [
        sections.make_table("Beside the published figures", _PUBLISHED, published, _PUBLISHED_NOTE),
        sections.cross_table(
            "Updates",
            {str(i): i for i in updates},
            rows,
            lambda row, i: f"{row['losses'][i]:.3f}",
            "Loss before each update and after the last one.",
        ),
        sections.make_table("Stress test", _STRESS, rows, _STRESS_NOTE, sortable=False),
        _overall(board),
        *sections.closing(board),
    ]
    return Page("Rocket Engine leaderboard: one batch", [_WHAT, describe(board)], parts)


def describe(board: Json) -> str:
    """Settings and machine in a few sentences."""
    given = board["settings"]
    return (
        f"Preset {given['preset']}, batches of {given['batch_size']} x {given['length']} tokens, "
        f"AdamW {given['learning_rate']:g}, {given['num_updates']} updates, seed {given['seed']}. "
        f"{sections.describe_machine(board)} Inference: median and range of {given['rounds']} x "
        f"{given['repeats']} forward passes over the batch; systems take turns. Peak memory: of "
        "the process, after the updates."
    )


def _learning_curves(rows: list[Json]) -> Section:
    plots = {
        title: plot_curves(
            {r["system"]: (list(range(len(r[key]))), [scale * y for y in r[key]]) for r in rows},
            unit,
            xlabel="updates",
        )
        for title, key, scale, unit in (
            ("Loss", "losses", 1.0, "cross-entropy, nats"),
            ("Accuracy", "accuracies", 100.0, "% right"),
        )
    }
    return Plots("How the batch is learned", plots)


def _overall(board: Json) -> Section:
    statistics, targets = board["statistics"], board["targets"]
    items = [
        f"{name.replace('_', ' ')}: {'none' if value is None else f'{value:,.4g}'}"
        for name, value in statistics.items()
        if not isinstance(value, list)
    ]
    above, below = (
        ", ".join(statistics[key]) or "no system"
        for key in ("above_target_score", "below_target_inference")
    )
    items += [
        f"score above {targets['score_above']:g}, the stated target: {above}",
        f"inference below {targets['inference_ms_below']:g} ms, the stated target: {below}",
    ]
    return Bullets("Overall", items)
