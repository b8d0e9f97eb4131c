"""Runs the commands of README.md and docs/, and records how they ended: docs/reference/commands.md.

    python tests/run_commands.py            those that have no record yet, without the heavy ones
    python tests/run_commands.py --again    all of them; --only=TEXT those that contain it
    python tests/run_commands.py --heavy    those that take long as well
    python tests/run_commands.py --page     write the page from the records, and run nothing
    python tests/run_commands.py --add      list new commands of the pages in commands.toml, to be
                                            run as they are printed; run nothing

commands.toml says how each is tried. They run in a clone of the last commit with an environment of
its own, which `make setup` fills: --checkout=DIR, kept for the next time. $SLAM_JAX_GGUF is a
language model for FILE.gguf (without it, a tiny one of random weights).
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import page_files
import pages
from command_table import (
    PAGE,
    RECORDS,
    TABLE,
    Entry,
    complaints,
    entries,
    is_recorded,
    records,
    render,
)
from pages import ROOT

CHECKOUT = Path(tempfile.gettempdir()) / "slam_jax_commands"
LINES, WIDTH = 8, 140  # of an output that are kept
SERVER = "http://127.0.0.1:8000"


def last_lines(text: str, folder: Path) -> list[str]:
    """The last lines of an output without colours, overwritten lines and paths of this machine."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    places = [(str(folder), "."), (str(ROOT), "."), (str(Path.home()), "~")]
    places += [(os.environ.get(page_files.GGUF) or "FILE.gguf", "FILE.gguf")]
    for path, name in places:
        lines = [line.replace(path, name) for line in lines]
    noise = ("WARNING: Location 'file:",)  # how pip is set up on this machine
    return [x[:WIDTH] for x in lines if x.strip() and not x.startswith(noise)][-LINES:]


class Checkout:
    """A clone of the last commit in which the commands run."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / ".git").exists():
            subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
        git = ["git", "-C", folder]
        subprocess.run([*git, "fetch", "--quiet", ROOT, "HEAD"], check=True)
        subprocess.run(
            [*git, "checkout", "--quiet", "--force", "--detach", "FETCH_HEAD"], check=True
        )
        dropped = ("PYTHONPATH", "VIRTUAL_ENV", "SLAM_JAX_API_KEY")
        self.environment = {k: v for k, v in os.environ.items() if k not in dropped}
        self.environment |= {"VIRTUAL_ENV": str(folder / ".venv"), "TERM": "dumb", "COLUMNS": "120"}
        self.environment["PATH"] = f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"
        quiet: Any = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        subprocess.run(["make", "setup"], cwd=folder, env=self.environment, check=True, **quiet)

    def start(self, command: str, output: Any) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @contextlib.contextmanager
    def serving(self, command: str) -> Iterator[None]:
        """While this server of port 8000 answers."""
        if not command:
            yield
            return
        process = self.start(command, subprocess.DEVNULL)
        try:
            wait_for(f"{SERVER}/health", process, 300)
            yield
        finally:
            end(process, signal.SIGTERM)

    def run(self, entry: Entry) -> dict[str, Any]:
        """Runs the command of an entry and says how it ended."""
        for name in entry.fresh:
            path = self.folder / name
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, True)
        names = [name for name in page_files.needed(entry.command) if name not in entry.fresh]
        missing = [name for name in names if not (self.folder / name).exists()]
        if missing:
            command = [self.folder / ".venv/bin/python", "tests/page_files.py", *missing]
            made = subprocess.run(
                command, cwd=self.folder, env=self.environment, capture_output=True, text=True
            )
            if made.returncode:
                raise SystemExit(f"{', '.join(missing)} could not be made:\n{made.stderr}")
        with tempfile.TemporaryFile("w+", errors="replace") as output, self.serving(entry.server):
            start = time.monotonic()
            process = self.start(entry.command, output)
            try:
                if entry.url:
                    wait_for(entry.url, process, entry.seconds)
                    end(process, signal.SIGINT)
                code = process.wait(entry.seconds)
            except subprocess.TimeoutExpired:
                end(process, signal.SIGKILL)
                code = 124
            seconds = time.monotonic() - start
            output.seek(0)
            lines = last_lines(output.read(), self.folder)[-entry.lines :]
        version = re.search(
            r'^__version__ = "(.*)"', (self.folder / "slam_jax" / "version.py").read_text(), re.M
        )
        return {
            "run": entry.command,
            "date": datetime.date.today().isoformat(),
            "version": version[1] if version else "",
            "exit": code if code >= 0 else 128 - code,  # as a shell says that a signal ended it
            "seconds": round(seconds, 1),
            "output": lines,
        }


def wait_for(url: str, process: subprocess.Popen, seconds: float) -> None:
    """Until the address answers, or the process has ended."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)


def end(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--heavy", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--add", action="store_true")
    parser.add_argument("--checkout", type=Path, default=CHECKOUT)
    given = parser.parse_args()
    # In the background of a script it would be ignored, also by the commands that it is sent to.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    known = records()
    wanted = [
        entry
        for entry in entries()
        if entry.is_run
        and given.only in entry.text
        and (given.heavy or not entry.heavy)
        and (given.again or not is_recorded(entry, known))
    ]
    if given.add:
        add_new()
    elif wanted and not given.page:
        checkout = Checkout(given.checkout.resolve())
        for entry in wanted:
            print(entry.command, flush=True)
            found = known[entry.text] = checkout.run(entry)
            print(f"    exit {found['exit']}, {found['seconds']} s", flush=True)
            if found["exit"] != entry.exit:
                print("    " + "\n    ".join(found["output"]), flush=True)
            write(known)
    write(known)
    for line in complaints():
        print(line)


def add_new() -> None:
    """Appends the commands of the pages that the table does not have."""
    listed = {entry.text for entry in entries()}
    with TABLE.open("a", encoding="utf-8") as table:
        for text in pages.all_commands():
            if text not in listed:
                table.write(f"\n[[command]]\ntext = '''{text}'''\n")


def write(known: dict[str, dict[str, Any]]) -> None:
    """The records of commands that are still in the table, and the page."""
    listed = {entry.text: known[entry.text] for entry in entries() if entry.text in known}
    RECORDS.write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
