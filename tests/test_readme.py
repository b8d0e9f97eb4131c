"""The README's code runs as it stands there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(?P<skip><!-- needs workdir -->\n)?```python\n(?P<code>.*?)^```", re.S | re.M)


def blocks():
    text = README.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text[: found.start("code")].count("\n")
        if not found["skip"]:
            yield pytest.param(line, found["code"], id=f"line {line + 1}")


@pytest.mark.parametrize(("line", "code"), list(blocks()))
def test_code_block_runs(line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Blank lines before it, so that a traceback names the line of the README.
    exec(compile("\n" * line + code, str(README), "exec"), {"__name__": "readme"})
