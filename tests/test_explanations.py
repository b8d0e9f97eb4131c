"""The explanations in docs/ show the modules and name the tests that there are."""

import re
from pathlib import Path

import pytest
from flax import nnx

from slam_jax.errors import ConfigError
from slam_jax.reporting.diagrams import draw_diagrams, draw_workdir, figures
from slam_jax.slam_v3 import SlamV3Config

FOLDER = Path(__file__).parent.parent / "docs" / "explanations"
BOX = re.compile(r'<g data-module="(.*?)" data-parameters="(\d+)">')
NAME = re.compile(r'<text class="name".*?>(.*?)</text>')


def test_committed_diagrams_are_drawn_from_the_modules_of_the_shipped_model(monkeypatch):
    models = []

    def draw_model(model, shapes):
        models.append(model)
        return drawn_by(model, shapes)

    drawn_by = figures.draw_model
    monkeypatch.setattr(figures, "draw_model", draw_model)
    drawn = draw_workdir("quickstart")
    sizes: dict[str, int] = {}
    for path, parameter in nnx.to_flat_state(nnx.state(models[0], nnx.Param)):
        parts = [str(part) for part in path]
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            sizes[name] = sizes.get(name, 0) + parameter.size
    for file, svg in drawn.items():
        boxes, names = BOX.findall(svg), NAME.findall(svg)
        assert len(boxes) > 10 and len(names) == len(boxes)
        for (path, parameters), name in zip(boxes, names, strict=True):
            assert int(parameters) == sizes[path], path
            assert path.endswith(name.split("  ")[0]), name
        again = "python -m slam_jax.reporting.diagrams --workdir=quickstart --output=FOLDER"
        assert (FOLDER / file).read_text(encoding="utf-8") == svg, again


def test_a_model_that_the_diagrams_do_not_show_is_refused():
    config = SlamV3Config.preset("tiny", vocab_size=9, without=("concat",))
    with pytest.raises(ConfigError, match="without"):
        draw_diagrams(config)


def test_the_tests_that_are_named_exist():
    sources = "".join(
        path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")
    )
    names = re.findall(r"`(test_\w+)`", (FOLDER / "exactness.md").read_text(encoding="utf-8"))
    assert len(names) > 20
    assert [name for name in names if f"def {name}(" not in sources] == []
