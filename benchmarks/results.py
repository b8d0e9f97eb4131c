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
    for name in ("torch", "transformers"):
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
