"""Reads README.md and the pages in docs/: their blocks of Python, and their commands.

A block may have marks in HTML comments on the lines above it:

    <!-- quick -->               it runs in `make test`; others run in `make test-release` alone
    <!-- needs workdir -->       files that it names, such as FOLDER, are made first (page_files.py)
    <!-- needs a server -->      it calls a server of the model quickstart on port 8000
    <!-- continues -->           it runs in the namespace of the block before it
    <!-- eight devices -->       it runs in a process of its own with eight virtual devices
"""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
GENERATED = ("docs/reference/commands.md", "docs/notebooks/")
MARKS = ("quick", "needs workdir", "needs a server", "continues", "eight devices")

SHELLS = ("sh", "bash", "shell", "console")
PROGRAMS = {
    *("python", "python3", ".venv/bin/python", "pip", "pytest", "make", "jupyter", "uv", "ruff"),
    *("curl", "echo", "cd", "source", "export", "mkdir", "cat", "ls", "unzip", "git", "srun"),
    *("hf", "npm", "node", "xprof", "wandb", "docker", "zensical", "pre-commit"),
}
_FENCE = re.compile(
    r"^(?P<marks>(?: *<!--[^\n]*-->\n)*)(?P<indent> *)```(?P<language>\w*)[^\n]*\n"
    r"(?P<text>.*?)^(?P=indent)```",
    re.S | re.M,
)
_ALONE = re.compile(r"(?<=\n\n)`([^`\n]+)`(?=\n\n)")  # a paragraph that is one line of code
_ASSIGNMENTS = re.compile(r"^(?:[A-Za-z_]\w*=\S* )+")
_INLINE = re.compile(r"(?<!`)`((?:\.venv/bin/)?python [^`]+|make\b[^`]*|slam-\w+[^`]*)`(?!`)")


class Block(NamedTuple):
    page: Path
    line: int  # of its first line in the page, counted from 0
    code: str
    marks: frozenset[str]

    @property
    def name(self) -> str:
        return f"{name_of(self.page)}, line {self.line + 1}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def pages() -> list[Path]:
    """README.md and what is written by hand in docs/."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if not name_of(page).startswith(GENERATED)]


def _fences(page: Path) -> Iterator[tuple[re.Match[str], int, str]]:
    """Each fenced block of a page, the number of its first line, and its text."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        yield found, text[: found.start("text")].count("\n"), textwrap.dedent(found["text"])


def saved_blocks() -> dict[str, str]:
    """By name, the blocks of which the sentence before says that they are saved as a file."""
    found = {}
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for fence, _, code in _fences(page):
            before = text[: fence.start()].rstrip().rpartition("\n\n")[2]
            name = re.search(r"\b[Ss]ave (?:this|it|the block) as `([\w./-]+)`", before)
            if name:
                found[name[1]] = code
    return found


def drawing_blocks() -> dict[str, str]:
    """By name, the blocks of Python that save a picture with this name."""
    return {
        name: block.code
        for page in pages()
        for blocks in python_blocks(page)
        for block in blocks
        for name in re.findall(r"\.save\(\"([\w-]+\.(?:png|jpg))\"\)", block.code)
    }


def python_blocks(page: Path) -> list[list[Block]]:
    """The blocks of Python, those together that share a namespace."""
    groups: list[list[Block]] = []
    for found, line, text in _fences(page):
        if found["language"] in ("python", "py"):
            comments = re.findall(r"<!--\s*(.*?)\s*-->", found["marks"])
            marks = frozenset(mark for comment in comments for mark in comment.split(", "))
            block = Block(page, line, text, marks)
            if "continues" in marks and groups:
                groups[-1].append(block)
            else:
                groups.append([block])
    return groups


def _without_comment(line: str) -> str:
    quote = ""
    for i, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i]
    return line


def _is_command(line: str) -> bool:
    """Whether a line of a block without a language is one; arguments alone count as well."""
    first = _ASSIGNMENTS.sub("", line).split(" ")[0]
    return first in PROGRAMS or first == ".." or first.startswith(("slam-", "--"))


def lines_of(text: str, language: str) -> Iterator[str]:
    """The commands of a block: each on one line, without comments and repeated spaces."""
    for line in text.replace("\\\n", "").splitlines():
        command = " ".join(_without_comment(line).removeprefix("$ ").split())
        if command and (language in SHELLS or _is_command(command)):
            yield command


def commands(page: Path) -> list[str]:
    """The commands of a page, in blocks or as paragraphs of their own."""
    found = []
    for fence, _, text in _fences(page):
        if fence["language"] in ("", *SHELLS):
            found += lines_of(text, fence["language"])
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return found + [line for text in _ALONE.findall(prose) for line in lines_of(text, "")]


def all_commands() -> dict[str, list[str]]:
    """Each command of the documentation, and the pages that show it."""
    found: dict[str, list[str]] = {}
    for page in pages():
        for command in commands(page):
            shown = found.setdefault(command, [])
            if name_of(page) not in shown:
                shown.append(name_of(page))
    return found


def inline_commands(page: Path) -> list[str]:
    """What a page says of programs in its prose: `python -m X`, `make X`, `slam-X`."""
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(found.split()) for found in _INLINE.findall(prose)]
