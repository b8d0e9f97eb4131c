"""Stores the figures of a machine: benchmarks/results/<machine>.json, one entry a benchmark."""

import datetime
import json
import re
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from slam_jax.errors import InputError, write_whole
from slam_jax.rocket.machine import describe_machine

Json = dict[str, Any]
ROOT = Path(__file__).parent
FOLDER = ROOT / "results"
_VERSIONS = ["call", "earlier / later", "later", "earlier", "machine", "version", "against", "date"]


def machine_file() -> Path:
    name = re.sub(r"\((r|tm)\)", "", place(describe_machine()).lower())  # Intel's marks
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", name).strip("-") + ".json")


def place(machine: Json) -> str:
    """The name of the GPU; on a CPU, the processor and its number of cores."""
    if machine["device"] == "cpu":
        return f"{machine['processor']}, {machine['cores']} cores"
    return machine["device"]


def read(file: Path) -> Json:
    """The figures of a machine; none if the file does not exist. Raises InputError for another kind
    of file."""
    if not file.exists():
        return {"benchmarks": {}}
    try:
        return {"benchmarks": dict(json.loads(file.read_text(encoding="utf-8"))["benchmarks"])}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file}: expected the figures of a machine; remove it") from None


def keep(file: Path, name: str, entry: Json) -> None:
    """Stores the entry of one benchmark; the others stay."""
    kept = read(file)
    kept["benchmarks"][name] = entry
    write_whole(file, json.dumps(kept, indent=1) + "\n")


def version_of(checkout: str) -> str:
    """The version of slam_jax in another checkout. Raises InputError if there is none."""
    try:
        text = (Path(checkout) / "slam_jax" / "version.py").read_text(encoding="utf-8")
        return re.findall(r'__version__ = "([^"]+)"', text)[0]
    except (OSError, IndexError):
        raise InputError(
            f"{checkout}: expected a checkout of another version of slam_jax"
        ) from None


def keep_versions(entry: Json, other: str) -> None:
    """Stores rows that compare two versions in `versions.json`.

    Rows of other calls, machines and earlier versions stay. A row without a figure of the earlier
    version is left out. Raises InputError if the file holds something else.
    """
    file, machine = FOLDER / "versions.json", entry["machine"]
    where = [place(machine), machine["slam_jax"], other, entry["date"]]
    rows = _versions_rows(file) if file.exists() else []
    for row in entry["rows"]:
        if "other version" in row["arms"]:
            rows.append([row["title"], *_versions_row(row), *where])
    # The last row of a call, machine and earlier version counts.
    latest = {(row[0], row[4], row[6]): row for row in rows}
    table = {"title": "All rows", "columns": _VERSIONS, "rows": [*latest.values()]}
    found = {
        "title": "One version against another",
        "command": "python -m benchmarks --against=CHECKOUT",
        "text": "The same call in two versions of this library, in turns on one machine. "
        "Above 1x, the later version is faster or smaller.",
        "tables": [table],
    }
    write_whole(file, json.dumps(found, indent=1) + "\n")


def _versions_rows(file: Path) -> list[list[str]]:
    try:
        [table] = json.loads(file.read_text(encoding="utf-8"))["tables"]
        if table["columns"] != _VERSIONS:
            raise ValueError
        return table["rows"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file}: expected rows that compare two versions; remove it") from None


def _versions_row(row: Json) -> list[str]:
    later, earlier = (format_figure(row, arm) for arm in row["arms"].values())
    ratio = row["arms"]["other version"]["ratio"]
    return [f"{ratio['median']:.2f}x ({ratio['least']:.2f} to {ratio['most']:.2f})", later, earlier]


def format_figure(row: Json, arm: Json) -> str:
    """The median of an arm with its unit."""
    value, unit = arm["median"], row["unit"]
    if unit == "s" and value < 1:
        value, unit = 1e3 * value, "ms"
    return f"{value:,.3g} {unit}" if value < 1e3 else f"{value:,.0f} {unit}"


def format_shares(arm: Json) -> str:
    """The shares of the ceilings that an arm reaches."""
    return ", ".join(f"{100 * share:.0f}% of {name}" for name, share in arm["shares"].items())


def make_entry(title: str, rows: list[Json], ceilings: Json, middle_aim: float | None) -> Json:
    """The rows of one benchmark with the machine, versions and date. middle_aim: the aim for the
    median of all ratios."""
    ratios = [
        arm["ratio"]["median"] for row in rows for arm in row["arms"].values() if "ratio" in arm
    ]
    middle = None
    if middle_aim is not None and ratios:
        middle = {"aim": middle_aim, "median": statistics.median(ratios), "n": len(ratios)}
    return {
        "title": title,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": describe_machine() | _peers(),
        "ceilings": ceilings,
        "middle": middle,
        "rows": rows,
    }


def _peers() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "tokamax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The short hash, with a plus if files are modified; empty outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=7", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
