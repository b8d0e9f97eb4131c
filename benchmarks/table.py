"""Tables of measured ratios: in lines for a terminal, in Markdown, and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import BENCHMARKS, DEVICE, ON_CPU, ON_GPU
from benchmarks.device_run import COLUMNS, make_cells
from benchmarks.results import format_figure, format_shares
from slam_jax.rocket.page import markdown_table

Json = dict[str, Any]
_COLUMNS = ("what", "against", "aim", "measured", "ours", "theirs", "ours, of the ceiling")
_PROVENANCE = ("benchmark", "ceiling of matmul", "ceiling of copy", "jax", "flax", "torch")


def describe(row: Json) -> list[str]:
    """A row as lines for a terminal."""
    (first, ours), *others = row["arms"].items()
    text = row["unchecked"] or "nothing to compare with"
    if row["difference"] is not None:
        difference, tolerance = row["difference"], row["tolerance"]
        text = f"outputs differ by up to {difference:.2g}, tolerance {tolerance:g}"
    lines = [
        f"{row['title']}: {first} {format_figure(row, ours)}{_shares(ours, ' (', ')')}; {text}"
    ]
    for name, arm in others:
        aim = "" if arm["ratio"]["aim"] is None else f", aim {arm['ratio']['aim']:g}"
        lines.append(f"  {name} {format_figure(row, arm)}: {_ratio(arm['ratio'])} of ours{aim}")
    lines += [f"  {name} left out: {reason}" for name, reason in row["left_out"].items()]
    return lines


def make_table(kept: Json) -> list[str]:
    """The figures of a machine in lines of Markdown, in the order of the benchmarks. A benchmark
    for this kind of machine without figures has a row that says so. The rows of `--device` are in
    a table of their own."""
    lines = _device_table(kept["benchmarks"][DEVICE]) if DEVICE in kept["benchmarks"] else []
    entries = {name: kept["benchmarks"][name] for name in BENCHMARKS if name in kept["benchmarks"]}
    if not entries:
        return lines
    kinds = [kind for kind in (ON_GPU, ON_CPU) if entries.keys() & set(kind)]
    rows: list[Sequence[str]] = []
    for name in (name for kind in kinds for name in kind):
        if name not in entries:
            rows.append((name, "", "", "not measured", "", "", "", "", ""))
            continue
        entry = entries[name]
        made = [cells for row in entry["rows"] for cells in _table_rows(row)]
        if middle := entry["middle"]:
            title = f"{name}, the median of its {middle['n']} ratios"
            ratio = _against_aim(middle["aim"], middle["median"])
            made.append((title, "", f"{middle['aim']:g}x", ratio, "", "", ""))
        rows += [(*cells, entry["machine"]["slam_jax"], entry["date"]) for cells in made]
    provenance = [_provenance(name, entry) for name, entry in entries.items()]
    return [
        *markdown_table((*_COLUMNS, "version", "date"), rows),
        "",
        *markdown_table(_PROVENANCE, provenance),
        *(["", *lines] if lines else []),
    ]


def _device_table(entry: Json) -> list[str]:
    machine, ceilings = entry["machine"], entry["ceilings"]
    what = ("slam_jax", "jax", "flax", "tokamax")
    versions = ", ".join(f"{name} {machine[name]}" for name in what if name in machine)
    return [
        f"`python -m benchmarks --device`, {entry['date']}: {versions}; "
        f"{ceilings['matmul_flops'] / 1e12:,.0f} TFLOP/s, "
        f"{ceilings['copy_bytes'] / 1e9:,.0f} GB/s.",
        "",
        *markdown_table(COLUMNS, [make_cells(row) for row in entry["rows"]]),
    ]


def draw(machines: dict[str, Json], file: Path) -> None:
    """A bar for each ratio on a logarithmic scale, with a stroke at its aim."""
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
    """The name and the ratio of every comparison."""
    return [
        (f"{row['title']} / {name}", arm["ratio"])
        for entry in (kept["benchmarks"].get(name, {"rows": []}) for name in (*BENCHMARKS, DEVICE))
        for row in entry["rows"]
        for name, arm in row["arms"].items()
        if "ratio" in arm
    ]


def _table_rows(row: Json) -> list[Sequence[str]]:
    title, (_, ours), *others = row["title"], *row["arms"].items()
    rows: list[Sequence[str]] = []
    for name, arm in others:
        ratio = arm["ratio"]
        aim = "" if ratio["aim"] is None else f"{ratio['aim']:g}x"
        measured = _against_aim(ratio["aim"], ratio["median"])
        measured += f" ({ratio['least']:.2f} to {ratio['most']:.2f})"
        rows.append(
            (
                title,
                name,
                aim,
                measured,
                format_figure(row, ours),
                format_figure(row, arm),
                _shares(ours),
            )
        )
    if not others:
        rows.append((title, "", "", "", format_figure(row, ours), "", _shares(ours)))
    for name, reason in row["left_out"].items():
        rows.append((title, name, "", f"left out: {reason}", "", "", ""))
    return rows


def _against_aim(aim: float | None, ratio: float) -> str:
    """Bold if the ratio falls short of its aim."""
    text = f"{ratio:.2f}x"
    return f"**{text}**" if aim is not None and ratio < aim else text


def _ratio(ratio: Json) -> str:
    return f"{ratio['median']:.2f}x ({ratio['least']:.2f} to {ratio['most']:.2f})"


def _shares(arm: Json, before: str = "", after: str = "") -> str:
    text = format_shares(arm)
    return f"{before}{text}{after}" if text else ""


def _provenance(name: str, entry: Json) -> Sequence[str]:
    machine, ceilings = entry["machine"], entry["ceilings"]
    dtype = ceilings.get("matmul_dtype", "float32")
    return (
        name,
        f"{ceilings['matmul_flops'] / 1e9:,.0f} GFLOP/s ({ceilings['matmul_by']}, {dtype})",
        f"{ceilings['copy_bytes'] / 1e9:.1f} GB/s ({ceilings['copy_by']})",
        *(machine.get(package, "none") for package in ("jax", "flax", "torch")),
    )
