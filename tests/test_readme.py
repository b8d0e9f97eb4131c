"""The code in README and docs runs as it is printed."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slam_jax.reporting import scene
from slam_jax.training import Loaded

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?P<skip><!-- needs (?:workdir|a server) -->\n)?```python\n(?P<code>.*?)^```", re.S | re.M
)


def blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            line = text[: found.start("code")].count("\n")
            yield pytest.param(
                page, line, found["code"], bool(found["skip"]), id=f"{page.name}, line {line + 1}"
            )


@pytest.mark.parametrize(("page", "line", "code", "needs_more"), list(blocks()))
def test_code_block_runs(page, line, code, needs_more, tmp_path, monkeypatch):
    # Blank lines before it, so that a traceback names the line of the page.
    program = compile("\n" * line + code, str(page), "exec")
    if needs_more:
        return  # a trained model would take minutes; tests/test_server.py has a server
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    exec(program, {"__name__": "readme"})


def test_the_readme_is_short():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150


def test_the_picture_shows_each_input_with_its_own_answer(monkeypatch):
    def generate(loaded, requests):
        names = ("image", "text", "aux")
        shown = [[name for name in names if getattr(r, name) is not None] for r in requests]
        return [SimpleNamespace(text=" ".join(names)) for names in shown]

    monkeypatch.setattr(scene, "generate", generate)
    nothing: Any = None
    loaded = Loaded(nothing, nothing, None, {}, step=7)
    figure = scene.draw_scene(loaded, "a prompt", 3)
    labels = [panel.get_xlabel() for panel in figure.axes]
    assert labels == [f"Answer: {name}" for name in ("image", "text", "aux")]
