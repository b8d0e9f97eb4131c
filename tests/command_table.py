"""How each command of README.md and docs/ is tried, and how it ended: the table and the page.

commands.toml is the table, commands.json has the records that run_commands.py writes.
"""

import dataclasses
import json
import re
import tomllib
from typing import Any

import pages

ROOT = pages.ROOT
TABLE = ROOT / "tests" / "commands.toml"
RECORDS = ROOT / "tests" / "commands.json"
PAGE = ROOT / "docs" / "reference" / "commands.md"


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a command is tried. One of `test`, `ci` and `not_run`; else it is run.

    text: the command as it is printed, on one line. run: what is run instead, with placeholders
    filled in. test: a test that runs this program with these arguments. ci: .ci/run has it.
    not_run: why it is not run here. fresh: files that are removed before. exit: the code that is
    expected. url: the command is a server, which gets Ctrl-C when this address answers.
    server: the command of a server that runs meanwhile. seconds: after which it is ended. lines: of
    its output, how many the page shows. note: for the reader.
    """

    text: str
    run: str = ""
    test: str = ""
    ci: bool = False
    not_run: str = ""
    fresh: tuple[str, ...] = ()
    exit: int = 0
    url: str = ""
    server: str = ""
    heavy: bool = False
    seconds: int = 600
    lines: int = 8
    note: str = ""

    @property
    def command(self) -> str:
        return self.run or self.text

    @property
    def is_run(self) -> bool:
        return not (self.test or self.ci or self.not_run)


def entries() -> list[Entry]:
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    found = []
    for given in table["command"]:
        each = {**given, "fresh": tuple(given.get("fresh", ()))}
        for name, arguments in table["arguments"].items():
            each["run"] = each.get("run", "").replace(f"{{{name}}}", arguments)
        found.append(Entry(**each))
    return found


def records() -> dict[str, dict[str, Any]]:
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}


def is_recorded(entry: Entry, known: dict[str, dict[str, Any]]) -> bool:
    """Whether what the table says has been run, and ended as it says."""
    found = known.get(entry.text)
    return bool(found) and (found["run"], found["exit"]) == (entry.command, entry.exit)


def complaints() -> list[str]:
    """What is missing, in words; nothing if every command is tried."""
    shown, known, table = pages.all_commands(), records(), entries()
    prose = {each for page in pages.pages() for each in pages.inline_commands(page)}
    listed = [entry.text for entry in table]
    found = [f"not in tests/commands.toml: {text}" for text in shown if text not in listed]
    found += [f"twice in tests/commands.toml: {x}" for x in set(listed) if listed.count(x) > 1]
    for entry in table:
        if entry.text not in shown and entry.text not in prose:
            found.append(f"on no page any more: {entry.text}")
        elif entry.test:
            file, _, name = entry.test.partition("::")
            code = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).exists() else ""
            if not re.search(rf"^def {re.escape(name)}\(", code, re.M):
                found.append(f"no such test: {entry.test}")
        elif entry.ci and f"\n{entry.text}\n" not in (ROOT / ".ci" / "run").read_text() + "\n":
            found.append(f"not in .ci/run: {entry.text}")
        elif entry.is_run and not is_recorded(entry, known):
            found.append(f"no record (python tests/run_commands.py): {entry.text}")
    return found


def how(entry: Entry, known: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of the page about one command."""
    lines = [f"`{entry.text}`", ""]
    note = f" {entry.note}" if entry.note else ""
    if entry.test:
        return [*lines, f"Tried by the test `{entry.test}`.{note}", ""]
    if entry.ci:
        return [*lines, f"Run by `.ci/run` for every version.{note}", ""]
    if entry.not_run:
        return [*lines, f"Not run here: {entry.not_run}.{note}", ""]
    found = known.get(entry.text)
    if found is None:
        return [*lines, f"Not run yet.{note}", ""]
    if found["run"] != entry.text:
        lines += [f"Run as `{found['run']}`.", ""]
    ended = f"exit code {found['exit']} after {found['seconds']:,.0f} s"
    if entry.url:
        ended += ", stopped by Ctrl-C when it had answered"
    lines += [f"{found['date']}, version {found['version']}: {ended}.{note}", ""]
    if found["output"]:
        lines += ["```text", *found["output"], "```", ""]
    return lines


def render() -> str:
    """docs/reference/commands.md: every command below the first page that shows it."""
    shown, known = pages.all_commands(), records()
    parts: dict[str, list[str]] = {}
    for entry in entries():
        page = shown.get(entry.text, ["In the text of pages"])[0]
        parts.setdefault(page, []).extend(how(entry, known))
    order = [*dict.fromkeys(page for where in shown.values() for page in where)]
    lines = [
        "# Commands",
        "",
        "Every command of the documentation, and how it is known to work: a test runs it, or the",
        "end of its last run is shown here. Names in capitals stand for your own files. The runs",
        "have small ones in their place, and models that were trained for seconds, whose answers",
        "mean nothing. Times are those of 2 CPU cores beside other work, so yours may be shorter.",
        "Generated by `python tests/run_commands.py`.",
        "",
    ]
    for page in sorted(parts, key=lambda page: order.index(page) if page in order else len(order)):
        lines += [f"## {page}", "", *parts[page]]
    return "\n".join(lines).rstrip() + "\n"
