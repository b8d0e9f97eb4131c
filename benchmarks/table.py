"""The table and the plot of docs/speed.md, from the figures that are kept.

    python -m benchmarks.table

A row is written as it was measured; one that falls short of its aim is in bold.
"""

from pathlib import Path
from typing import Any

from benchmarks import BENCHMARKS, ON_CPU, ON_GPU
from benchmarks.results import FOLDER, place, read
from slam_jax.errors import InputError, write_whole

Json = dict[str, Any]
DOCS = Path(__file__).parents[1] / "docs"
START, END = "<!-- figures: python -m benchmarks.table -->", "<!-- end of figures -->"
_HEAD = (
    "| what | against | aim | measured | ours | theirs | ours, of the ceiling |",
    "|---|---|---|---|---|---|---|",
)


def describe(row: Json) -> list[str]:
    """A row in lines for a terminal."""
    (first, ours), *others = row["arms"].items()
    told = row["unchecked"] or "nothing to compare with"
    if row["difference"] is not None:
        difference, tolerance = row["difference"], row["tolerance"]
        told = f"outputs differ by up to {difference:.2g}, tolerance {tolerance:g}"
    lines = [f"{row['title']}: {first} {_figure(row, ours)}{_shares(ours, ' (', ')')}; {told}"]
    for name, arm in others:
        aim = "" if arm["ratio"]["aim"] is None else f", aim {arm['ratio']['aim']:g}"
        lines.append(f"  {name} {_figure(row, arm)}: {_ratio(arm['ratio'])} of ours{aim}")
    lines += [f"  {name} left out: {reason}" for name, reason in row["left_out"].items()]
    return lines


def make_table(kept: Json) -> str:
    """The figures of a machine in Markdown, benchmark after benchmark; of one for such a machine
    that has none a row says so."""
    entries = {name: kept["benchmarks"][name] for name in BENCHMARKS if name in kept["benchmarks"]}
    kinds = [kind for kind in (ON_GPU, ON_CPU) if entries.keys() & set(kind)]
    lines: list[str] = [*_HEAD]
    for name in (name for kind in kinds for name in kind):
        if name not in entries:
            lines.append(f"| {name} | | | not measured | | | |")
            continue
        entry = entries[name]
        for row in entry["rows"]:
            lines += _table_rows(row)
        if middle := entry["middle"]:
            lines.append(
                f"| {name}, the median of its {middle['n']} ratios | | {middle['aim']:g}x | "
                f"{_against_aim(middle['aim'], middle['median'])} | | | |"
            )
    lines += ["", *(_provenance(name, entry) for name, entry in entries.items())]
    return "\n".join(lines)


def write() -> None:
    """Puts the tables of all machines between the markers of docs/speed.md, and draws the plot.

    Raises InputError where nothing was measured, or the page has lost its markers.
    """
    files = sorted(FOLDER.glob("*.json"))
    if not files:
        raise InputError(f"{FOLDER} has no figures; python -m benchmarks takes them")
    machines = {file.stem: read(file) for file in files}
    page = DOCS / "speed.md"
    text = page.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise InputError(f"{page}: expected {START} and then {END}, once each")
    tables = [f"### {name}\n\n{make_table(kept)}" for name, kept in machines.items()]
    before, rest = text.split(START)
    made = "\n\n".join([START, "![ratios](speed.png)", *tables, END])
    write_whole(page, before + made + rest.split(END)[1])
    draw(machines, DOCS / "speed.png")


def draw(machines: dict[str, Json], file: Path) -> None:
    """A bar for each ratio, on a logarithmic scale, with a stroke where its aim is."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter

    panels = {name: _bars(kept) for name, kept in machines.items()}
    heights = [0.8 + 0.22 * len(bars) for bars in panels.values()]
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False}):
        figure = Figure(figsize=(8, sum(heights)), layout="constrained")
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
        for axes, (machine, bars) in zip(grid[:, 0], panels.items(), strict=True):
            for y, (_, ratio) in enumerate(bars):
                short = ratio["aim"] is not None and ratio["median"] < ratio["aim"]
                axes.barh(y, ratio["median"] - 1, left=1, color="#c44e52" if short else "#4c72b0")
                axes.plot([ratio["least"], ratio["most"]], [y, y], color="black", linewidth=0.8)
                if ratio["aim"] is not None:
                    axes.plot(ratio["aim"], y, "|", color="black", markersize=9, markeredgewidth=2)
            axes.set_title(machine)
            axes.set_yticks(range(len(bars)), [label for label, _ in bars])
            axes.set_ylim(max(len(bars), 1) - 0.5, -0.5)
            axes.set_xscale("log")
            axes.axvline(1, color="black", linewidth=0.8)
            axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.set_xlabel("theirs / ours; the stroke is the aim, red falls short of it")
        figure.savefig(file, dpi=110)


def _bars(kept: Json) -> list[tuple[str, Json]]:
    """What was compared, and how it came out, row after row."""
    return [
        (f"{row['title']} / {name}", arm["ratio"])
        for entry in (kept["benchmarks"].get(name, {"rows": []}) for name in BENCHMARKS)
        for row in entry["rows"]
        for name, arm in row["arms"].items()
        if "ratio" in arm
    ]


def _table_rows(row: Json) -> list[str]:
    (_, ours), *others = row["arms"].items()
    lines = []
    for name, arm in others:
        ratio = arm["ratio"]
        aim = "" if ratio["aim"] is None else f"{ratio['aim']:g}x"
        spread = f" ({ratio['least']:.2f} to {ratio['most']:.2f})"
        lines.append(
            f"| {row['title']} | {name} | {aim} | {_against_aim(ratio['aim'], ratio['median'])}"
            f"{spread} | {_figure(row, ours)} | {_figure(row, arm)} | {_shares(ours)} |"
        )
    if not others:
        lines.append(f"| {row['title']} | | | | {_figure(row, ours)} | | {_shares(ours)} |")
    for name, reason in row["left_out"].items():
        lines.append(f"| {row['title']} | {name} | | left out: {reason} | | | |")
    return lines


def _against_aim(aim: float | None, ratio: float) -> str:
    """Bold where it falls short, so that nobody has to look for it."""
    text = f"{ratio:.2f}x"
    return f"**{text}**" if aim is not None and ratio < aim else text


def _ratio(ratio: Json) -> str:
    return f"{ratio['median']:.2f}x ({ratio['least']:.2f} to {ratio['most']:.2f})"


def _figure(row: Json, arm: Json) -> str:
    value, unit = arm["median"], row["unit"]
    if unit == "s" and value < 1:
        value, unit = 1e3 * value, "ms"
    return f"{value:,.3g} {unit}" if value < 1e3 else f"{value:,.0f} {unit}"


def _shares(arm: Json, before: str = "", after: str = "") -> str:
    told = ", ".join(f"{100 * share:.0f}% of {name}" for name, share in arm["shares"].items())
    return f"{before}{told}{after}" if told else ""


def _provenance(name: str, entry: Json) -> str:
    machine, ceilings = entry["machine"], entry["ceilings"]
    versions = ", ".join(
        f"{package} {machine[package]}"
        for package in ("jax", "flax", "torch", "transformers")
        if package in machine
    )
    return (
        f"- `{name}`: {entry['date']}, commit {entry['commit']}, {place(machine)}, {versions}; "
        f"ceilings {ceilings['matmul_flops'] / 1e9:,.0f} GFLOP/s ({ceilings['matmul_by']}, "
        f"{ceilings.get('matmul_dtype', 'float32')}), "
        f"{ceilings['copy_bytes'] / 1e9:.1f} GB/s ({ceilings['copy_by']})"
    )


def main() -> None:
    from slam_jax.runtime.cli import exit_on_error

    with exit_on_error():
        write()


if __name__ == "__main__":
    main()
