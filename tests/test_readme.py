"""The code in README and docs runs as it stands there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<skip><!-- needs workdir -->\n)?```python\n(?P<code>.*?)^```", re.S | re.M)


def blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            line = text[: found.start("code")].count("\n")
            if not found["skip"]:
                yield pytest.param(page, line, found["code"], id=f"{page.name}, line {line + 1}")


@pytest.mark.parametrize(("page", "line", "code"), list(blocks()))
def test_code_block_runs(page, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    # Blank lines before it, so that a traceback names the line of the page.
    exec(compile("\n" * line + code, str(page), "exec"), {"__name__": "readme"})
