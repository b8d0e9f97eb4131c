"""The page of the protocol `heldout`."""

from slam_jax.reporting.plots import plot_curves
from slam_jax.rocket import sections
from slam_jax.rocket.metrics import Metric
from slam_jax.rocket.page import Page, Plots, Section
from slam_jax.rocket.tasks import Json

_WHAT = (
    "Language models of equal budgets, trained on the same tokens of real text and tested on "
    "documents that none of them has seen."
)
_RANKING_NOTE = (
    "Ranked by held-out bits per byte; less is better. Intervals are 95%, over test documents "
    "(2,000 resamples) and seeds (Student's t), and paired between systems. A rank with = is "
    "shared: the difference to the row above is not significant at 95%. The learning rate is the "
    "one with the lowest validation loss; * marks one at the edge of those tried, beyond which "
    "another may be better."
)
_COST_NOTE = (
    "Median and range over processes that took turns. Generation: cached, greedy, tokens after "
    "the first. Peak memory: the smallest of the training processes, which finds its functions "
    "compiled if there are several seeds."
)
_DIFFERENCE = "difference to the row above"
_SHORT = ("rank", "system", "bits per byte", "95%", _DIFFERENCE, "top-1, %", "score")
_COST_SHORT = ("system", "training, tokens/s", "first token, ms, batch 1", "peak memory, GiB")


def _seed_range(row: Json) -> str:
    seeds = [run["bits_per_byte"] for run in row["runs"]]
    return f"{min(seeds):.4f} to {max(seeds):.4f}"


def _from_above(row: Json) -> str:
    above = row["difference_from_above"]
    return "" if above is None else sections.with_range(above, "+.4f")


_RANKING = {
    "rank": "{rank}{shared}",
    "system": "{system}",
    "bits per byte": "{bits_per_byte[mean]:.4f}",
    "95%": "{bits_per_byte[low]:.3f} to {bits_per_byte[high]:.3f}",
    _DIFFERENCE: _from_above,
    "loss": "{loss[mean]:.4f}",
    "top-1, %": sections.number("top1.mean", ".2f", 100.0),
    "top-5, %": sections.number("top5.mean", ".2f", 100.0),
    "seeds, bits per byte": _seed_range,
    "learning rate": "{learning_rate:g}{at_edge}",
    "stability": "{stability:.3f}",
    "score": "{score:.1f}",
}
_COST = {
    "system": "{system}",
    "training, tokens/s": sections.ranged("training_tokens_per_second"),
    "generation, tokens/s, batch 1": sections.ranged("generation_tokens_per_second.1"),
    "batch 8": sections.ranged("generation_tokens_per_second.8"),
    "first token, ms, batch 1": sections.ranged("first_token_seconds.1", ".1f", 1e3),
    "batch 8 ": sections.ranged("first_token_seconds.8", ".1f", 1e3),
    "compile, s": sections.ranged("compile_seconds", ".1f"),
    "peak memory, GiB": sections.PEAK_MEMORY,
    "cache, B/token": "{cache_bytes_per_token:,}",
    "other state, B": "{state_bytes:,}",
}
_SIZE = {
    "system": "{system}",
    "active, without embeddings and head": "{parameters[active_non_embedding]:,}",
    "active": "{parameters[active]:,}",
    "total": "{parameters[total]:,}",
    "embeddings and head": "{parameters[embedding]:,}",
    "training MFLOP/token": sections.number("training_flops_per_token", ".1f", 1e-6),
    "widths": lambda row: ", ".join(f"{name} {width}" for name, width in row["widths"].items()),
}
_BITS = Metric("bits_per_byte.mean", least=True)
_TRAINING = Metric("training_tokens_per_second.median")
_GENERATION = Metric("generation_tokens_per_second.8.median")
_MEMORY = Metric("peak_memory_bytes", least=True, scale=2**-30)
_COST_PLOTS = {
    "Bits per byte against training speed, tokens/s": _TRAINING,
    "Bits per byte against generation speed, batch 8, tokens/s": _GENERATION,
    "Bits per byte against peak memory, GiB": _MEMORY,
    "Bits per byte against parameters, millions": Metric("parameters.total", scale=1e-6),
}
_WINNER_PLOTS = {
    "Bits per byte: less is better": _BITS,
    "Training, tokens/s": _TRAINING,
    "Generation, batch 8, tokens/s": _GENERATION,
    "Peak memory, GiB: less is better": _MEMORY,
}


def make_page(board: Json) -> Page:
    """The board as tables and plots."""
    rows = sections.successful(board)
    ranks = [row["rank"] for row in rows]
    marks = [
        {
            "shared": "=" if ranks.count(row["rank"]) > 1 else "",
            "at_edge": "*" if row["learning_rate_is_at_edge"] else "",
        }
        for row in rows
    ]
    ranked = [{**row, **mark} for row, mark in zip(rows, marks, strict=True)]
    parts = [
        sections.make_table("Ranking", _RANKING, ranked, _RANKING_NOTE, short=_SHORT),
        *sections.failed(board),
        sections.make_table("Cost", _COST, rows, _COST_NOTE, short=_COST_SHORT),
        sections.make_table("Size", _SIZE, rows),
    ]
    if rows:
        title, unit = "Quality against cost", "bits per byte"
        parts.append(_learning_curves(rows))
        parts.append(sections.cost_plots(title, rows, _BITS, unit, _COST_PLOTS))
        parts.append(sections.winner_plots(rows, _WINNER_PLOTS))
        parts += _detailed_tables(rows)
    parts += sections.closing(board)
    return Page("Rocket Engine leaderboard: held-out text", [_WHAT, describe(board)], parts)


def describe(board: Json) -> str:
    """Settings, text and machine in a few sentences."""
    given, data = board["settings"], board["data"]
    source = f"{data['text']} ({data['version']})" if "version" in data else data["text"]
    budget = (
        "active parameters without embeddings and head"
        if given["budget_of"] == "parameters"
        else "training FLOPs per token"
    )
    train, test = data["train"], data["test"]
    return (
        f"Text: {source}, {train['documents']:,} training documents ({train['tokens']:,} tokens) "
        f"and {test['documents']:,} test documents, of which the first "
        f"{given['document_tokens']:,} tokens count; a vocabulary of {data['vocab_size']:,}. "
        f"Budget: {given['budget']:g} {budget}, within 2%. Runs of {given['num_tokens']:,} tokens "
        f"in batches of {given['batch_size']} x {given['length']}, AdamW with a cosine schedule, "
        f"{len(given['seeds'])} seeds. {sections.describe_machine(board)}"
    )


def _learning_curves(rows: list[Json]) -> Section:
    def mean_curve(row: Json, x: str) -> tuple[list[float], list[float]]:
        curves = [[point["validation_loss"] for point in run["curve"]] for run in row["runs"]]
        means = [sum(losses) / len(losses) for losses in zip(*curves, strict=True)]
        return [float(point[x]) for point in row["runs"][0]["curve"]], means

    plots = {
        f"Validation loss against {what}, mean over seeds": plot_curves(
            {row["system"]: mean_curve(row, x) for row in rows}, "nats per token", xlabel=label
        )
        for what, x, label in (
            ("tokens", "tokens", "tokens"),
            ("training FLOPs", "flops", "floating-point operations"),
        )
    }
    return Plots("How they learn", plots)


def _detailed_tables(rows: list[Json]) -> list[Section]:
    def difference(row: Json, name: str) -> str:
        if name not in row["differences"]:
            return ""
        found = row["differences"][name]
        return f"{found['mean']:+.4f}{' *' if found['low'] > 0 else ''}"

    def validation_loss(row: Json, rate: float) -> str:
        tried = {each["learning_rate"]: each["validation_loss"] for each in row["tried"]}
        loss = tried.get(rate, "")
        return "failed" if loss is None else loss and f"{loss:.4f}"

    names = [row["system"] for row in rows[:-1]]
    rates = sorted({each["learning_rate"] for row in rows for each in row["tried"]})
    seeds = {f"seed {run['seed']}": i for i, run in enumerate(rows[0]["runs"])}
    return [
        # Between all rows: a rank may be shared along a chain whose ends differ.
        sections.cross_table(
            "Every pair",
            {name: name for name in names},
            rows[1:],
            difference,
            "Bits per byte more than the system at the top of the column; * is significant at 95%.",
        ),
        sections.cross_table(
            "Learning rates",
            {f"{rate:g}": rate for rate in rates},
            rows,
            validation_loss,
            "Validation loss of the runs that choose the learning rate; while the best is the "
            "lowest or the highest, one more is tried.",
        ),
        sections.cross_table(
            "Seeds",
            seeds,
            rows,
            lambda row, i: f"{row['runs'][i]['loss']:.4f}",
            "Test loss of each run, in nats per token.",
        ),
    ]
