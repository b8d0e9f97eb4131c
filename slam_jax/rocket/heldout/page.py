"""The page of the held-out comparison."""

from slam_jax.reporting.plots import plot_bars, plot_curves, plot_points
from slam_jax.rocket.board import describe_machine_of, score_bullets, winners_table
from slam_jax.rocket.page import Bullets, Page, Plots, Table
from slam_jax.rocket.tasks import Json

_WHAT = (
    "Language models of equal budgets, trained on the same tokens of real text and judged by "
    "documents that none of them has seen."
)
_RANKS = (
    "By held-out bits per byte, the less the better; intervals are of 95%, over test documents "
    "(2,000 resamplings) and seeds (Student's t), paired between systems. A rank with = is shared: "
    "the difference of a row from the one above it is not clear of 0. The learning rate is the one "
    "with the lowest validation loss; * marks one at the edge of those tried, beyond which another "
    "may be better."
)
_COSTS = (
    "Median and range over processes that took turns. Generation: cached, greedy, tokens after "
    "the first. Peak memory: of the training process that took least, which of several seeds "
    "finds its programs compiled."
)


def make_page(board: Json) -> Page:
    """The board in tables and plots."""
    rows = [row for row in board["rows"] if row["status"] == "ok"]
    failed = [row for row in board["rows"] if row["status"] != "ok"]
    sections: list[Table | Bullets | Plots] = [
        Table("Ranking", _RANKING, _ranked(rows), _RANKS, True, _SHORT),
        Table("Cost", _COST, [_cost(row) for row in rows], _COSTS, True, _COST_SHORT),
        Table("Size", _SIZE, [_size(row) for row in rows], sortable=True),
    ]
    if failed:
        texts = [f"{row['system']}: {row['reason']}" for row in failed]
        sections.insert(1, Bullets("Failed", texts))
    if rows:
        sections += [_curves(rows), _quality_and_cost(rows), _winner_plots(rows)]
        sections.append(_pairs(rows))
        sections.append(_tried(rows))
        sections.append(_seeds(rows))
    sections.append(winners_table(board))
    sections.append(score_bullets(board))
    return Page("Rocket Engine leaderboard: held-out text", [_WHAT, describe(board)], sections)


def describe(board: Json) -> str:
    """Settings, text and machine in a few sentences."""
    given, data = board["settings"], board["data"]
    source = f"{data['text']} ({data['version']})" if "version" in data else data["text"]
    budget = (
        "active parameters without tables and head"
        if given["budget_of"] == "parameters"
        else "training FLOPs a token"
    )
    train, test = data["train"], data["test"]
    return (
        f"Text: {source}, {train['documents']:,} documents ({train['tokens']:,} tokens) to train "
        f"on, {test['documents']:,} to test, the first {given['document_tokens']:,} tokens of "
        f"each; a vocabulary of {data['vocab_size']:,}. Budget: {given['budget']:g} {budget}, "
        f"within 2%. Runs of {given['num_tokens']:,} tokens in batches of {given['batch_size']} x "
        f"{given['length']}, AdamW with a cosine, {len(given['seeds'])} seeds. "
        f"{describe_machine_of(board)}"
    )


_RANKING = (
    "rank",
    "system",
    "bits per byte",
    "95%",
    "from the row above",
    "loss",
    "top-1, %",
    "top-5, %",
    "seeds, bits per byte",
    "learning rate",
    "stability",
    "score",
)
_SHORT = ("rank", "system", "bits per byte", "95%", "from the row above", "top-1, %", "score")
_COST = (
    "system",
    "training, tokens/s",
    "generation, tokens/s, batch 1",
    "batch 8",
    "first token, ms, batch 1",
    "batch 8 ",
    "compile, s",
    "peak memory, GiB",
    "cache, B/token",
    "cache, B besides",
)
_COST_SHORT = ("system", "training, tokens/s", "first token, ms, batch 1", "peak memory, GiB")
_SIZE = (
    "system",
    "active, without tables",
    "active",
    "total",
    "tables and head",
    "training MFLOP/token",
    "widths",
)


def _ranked(rows: list[Json]) -> list[tuple[str, ...]]:
    ranks = [row["rank"] for row in rows]
    return [_rank(row, shared=ranks.count(row["rank"]) > 1) for row in rows]


def _rank(row: Json, *, shared: bool) -> tuple[str, ...]:
    bits, above = row["bits_per_byte"], row["difference_from_above"]
    difference = "" if above is None else f"{above['mean']:+.4f}{_range(above, '+.4f')}"
    seeds = [run["bits_per_byte"] for run in row["runs"]]
    return (
        f"{row['rank']}{'=' if shared else ''}",
        row["system"],
        f"{bits['mean']:.4f}",
        f"{bits['low']:.3f} to {bits['high']:.3f}",
        difference,
        f"{row['loss']['mean']:.4f}",
        f"{100 * row['top1']['mean']:.2f}",
        f"{100 * row['top5']['mean']:.2f}",
        f"{min(seeds):.4f} to {max(seeds):.4f}",
        f"{row['learning_rate']:g}{'*' if row['learning_rate_is_at_edge'] else ''}",
        f"{row['stability']:.3f}",
        f"{row['score']:.1f}",
    )


def _range(interval: Json, form: str) -> str:
    return f" ({interval['low']:{form}} to {interval['high']:{form}})"


def _timing(timing: Json, form: str = ",.0f", scale: float = 1.0) -> str:
    median, least, most = (scale * timing[key] for key in ("median", "least", "most"))
    return f"{median:{form}} ({least:{form}} to {most:{form}})"


def _cost(row: Json) -> tuple[str, ...]:
    generation, first = row["generation_tokens_per_second"], row["first_token_seconds"]
    return (
        row["system"],
        _timing(row["training_tokens_per_second"]),
        _timing(generation["1"]),
        _timing(generation["8"]),
        _timing(first["1"], ".1f", 1e3),
        _timing(first["8"], ".1f", 1e3),
        _timing(row["compile_seconds"], ".1f"),
        f"{row['peak_memory_bytes'] / 2**30:.2f}",
        f"{row['cache_bytes_per_token']:,}",
        f"{row['state_bytes']:,}",
    )


def _size(row: Json) -> tuple[str, ...]:
    parameters = row["parameters"]
    return (
        row["system"],
        f"{parameters['active_non_embedding']:,}",
        f"{parameters['active']:,}",
        f"{parameters['total']:,}",
        f"{parameters['embedding']:,}",
        f"{row['training_flops_per_token'] / 1e6:.1f}",
        ", ".join(f"{name} {width}" for name, width in row["widths"].items()),
    )


def _mean_curve(row: Json, x: str, y: str) -> tuple[list[float], list[float]]:
    curves = [run["curve"] for run in row["runs"]]
    points = [sum(point[y] for point in each) / len(each) for each in zip(*curves, strict=True)]
    return [float(point[x]) for point in curves[0]], points


def _curves(rows: list[Json]) -> Plots:
    return Plots(
        "How they learn",
        {
            f"Validation loss against {what}, mean over seeds": plot_curves(
                {row["system"]: _mean_curve(row, x, "validation_loss") for row in rows},
                "nats a token",
                xlabel=label,
            )
            for what, x, label in (
                ("tokens", "tokens", "tokens"),
                ("training FLOPs", "flops", "floating-point operations"),
            )
        },
    )


def _quality_and_cost(rows: list[Json]) -> Plots:
    def points(value):
        return {row["system"]: (value(row), row["bits_per_byte"]["mean"]) for row in rows}

    plots = {
        "training speed": (lambda row: row["training_tokens_per_second"]["median"], "tokens/s"),
        "generation speed, batch 8": (
            lambda row: row["generation_tokens_per_second"]["8"]["median"],
            "tokens/s",
        ),
        "peak memory": (lambda row: row["peak_memory_bytes"] / 2**30, "GiB"),
        "parameters": (lambda row: row["parameters"]["total"] / 1e6, "millions"),
    }
    return Plots(
        "Quality against cost",
        {
            f"Bits per byte against {what}": plot_points(points(value), label, "bits per byte")
            for what, (value, label) in plots.items()
        },
    )


def _winner_plots(rows: list[Json]) -> Plots:
    def bars(value):
        return {row["system"]: value(row) for row in rows}

    return Plots(
        "Category winners",
        {
            "Bits per byte: less is better": plot_bars(
                bars(lambda row: row["bits_per_byte"]["mean"]), lowest=True
            ),
            "Training, tokens/s": plot_bars(
                bars(lambda row: row["training_tokens_per_second"]["median"])
            ),
            "Generation, batch 8, tokens/s": plot_bars(
                bars(lambda row: row["generation_tokens_per_second"]["8"]["median"])
            ),
            "Peak memory, GiB: less is better": plot_bars(
                bars(lambda row: row["peak_memory_bytes"] / 2**30), lowest=True
            ),
        },
    )


def _pairs(rows: list[Json]) -> Table:
    """Every row against those above it: a rank may be shared along a chain whose ends differ."""

    def cell(difference: Json | None) -> str:
        if difference is None:
            return ""
        return f"{difference['mean']:+.4f}{' *' if difference['low'] > 0 else ''}"

    names = [row["system"] for row in rows[:-1]]
    cells = [
        (row["system"], *(cell(row["differences"].get(name)) for name in names)) for row in rows[1:]
    ]
    what = "Bits per byte more than the system at the top of the column; * is clear of 0."
    return Table("Every pair", ("system", *names), cells, what)


def _tried(rows: list[Json]) -> Table:
    losses = [
        {each["learning_rate"]: each["validation_loss"] for each in row["tried"]} for row in rows
    ]
    rates = sorted(set().union(*losses))

    def cell(tried: dict[float, float | None], rate: float) -> str:
        if rate not in tried:
            return ""
        return "failed" if (loss := tried[rate]) is None else f"{loss:.4f}"

    cells = [
        (row["system"], *(cell(tried, rate) for rate in rates))
        for row, tried in zip(rows, losses, strict=True)
    ]
    columns = ("system", *(f"{rate:g}" for rate in rates))
    what = (
        "Validation loss of the runs that chose; where the best was at an end, one more was tried."
    )
    return Table("Learning rates", columns, cells, what)


def _seeds(rows: list[Json]) -> Table:
    seeds = [run["seed"] for run in rows[0]["runs"]]
    cells = [(row["system"], *(f"{run['loss']:.4f}" for run in row["runs"])) for row in rows]
    columns = ("system", *(f"seed {seed}" for seed in seeds))
    return Table("Seeds", columns, cells, "Test loss of each run, in nats a token.")
