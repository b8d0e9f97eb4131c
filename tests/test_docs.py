"""The code and the commands of README.md and docs/ run as printed."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import command_table
import page_files
import pages
import pytest
import run_commands
from servers import serving

import slam_jax
from slam_jax.language_models import SYSTEMS
from slam_jax.reporting import scene
from slam_jax.training import Loaded

ROOT = pages.ROOT
PAGES = pages.pages()
SERVER = "http://127.0.0.1:8000"


def groups():
    for page in PAGES:
        for blocks in pages.python_blocks(page):
            quick = all("quick" in block.marks for block in blocks)
            marks = () if quick else pytest.mark.release
            yield pytest.param(blocks, id=blocks[0].name, marks=marks)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Where the files that pages name are made, each when it is first needed."""
    return tmp_path_factory.mktemp("page_files")


@pytest.fixture(scope="module")
def server():
    with serving(slam_jax.load("quickstart"), "quickstart", slots=2) as (address, _):
        yield address


def prepared(block: pages.Block, folder: Path, files: Path, request: Any) -> str:
    """Its code, when the files that it names are in the folder and the server runs."""
    if "needs workdir" in block.marks:
        for name in page_files.needed(block.code):
            made, here = page_files.make(name, files), folder / name
            here.parent.mkdir(exist_ok=True)
            (shutil.copytree if made.is_dir() else shutil.copy)(made, here)
    if "needs a server" not in block.marks:
        return block.code
    assert SERVER in block.code
    return block.code.replace(SERVER, request.getfixturevalue("server"))


@pytest.fixture
def unchanged(tmp_path):
    """Models that a block registers, and modules that it imports from its folder, are forgotten."""
    registry: Any = SYSTEMS
    modules, systems = set(sys.modules), set(registry)
    yield
    for name in set(registry) - systems:
        del registry[name]
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("blocks", list(groups()))
@pytest.mark.usefixtures("unchanged")
def test_code_block_runs(blocks, files, request, tmp_path, monkeypatch):
    monkeypatch.delenv(page_files.GGUF, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "OUT")  # which has run.py
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    codes = [prepared(block, tmp_path, files, request) for block in blocks]
    if "eight devices" in blocks[0].marks:
        flags = "--xla_force_host_platform_device_count=8"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, "-c", "\n".join(codes)], env=environment, check=True)
        return
    namespace = {"__name__": "page"}
    for block, code in zip(blocks, codes, strict=True):
        # Blank lines before it, so that a traceback names the line of the page.
        exec(compile("\n" * block.line + code, str(block.page), "exec"), namespace)


def test_marks_of_blocks_are_known():
    for page in PAGES:
        for blocks in pages.python_blocks(page):
            for block in blocks:
                assert block.marks <= set(pages.MARKS), block.name
            assert "continues" not in blocks[0].marks, f"{blocks[0].name} is the first of its page"


def test_every_command_is_tried_by_a_test_or_has_a_record():
    assert command_table.complaints() == []


def test_the_page_of_commands_is_that_of_the_records():
    assert command_table.PAGE.read_text(encoding="utf-8") == command_table.render()


@pytest.mark.parametrize("page", PAGES, ids=pages.name_of)
def test_programs_named_in_prose_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    scripts = re.findall(r"^\s+(slam-\w+) *=", (ROOT / "setup.cfg").read_text(), re.M)
    for command in pages.inline_commands(page):
        program, *arguments = command.split()
        if program == "make":
            named = [each for each in arguments if re.fullmatch("[a-z-]+", each)]
            assert set(named) <= set(targets), command
        elif program.startswith("slam-"):
            assert program in scripts, command
        elif arguments[0] == "-m":
            assert importlib.util.find_spec(arguments[1]), command
        elif arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).exists(), command


def test_blocks_that_continue_others_run_together(tmp_path):
    page = tmp_path / "page.md"
    blocks = ["", "<!-- continues -->\n<!-- needs workdir -->\n", "<!-- eight devices, quick -->\n"]
    page.write_text("\n".join(f"{marks}```python\nx\n```\n" for marks in blocks))
    first, second = pages.python_blocks(page)
    assert [(block.line, block.code) for block in first] == [(1, "x\n"), (7, "x\n")]
    assert first[1].marks == {"continues", "needs workdir"}
    assert [block.marks for block in second] == [{"eight devices", "quick"}]


def test_commands_are_read_as_a_shell_does():
    text = "python a.py --b=1 \\\n    --c='# no' # yes\nX=1 make  all\na diagram\n-- arguments\n"
    assert list(pages.lines_of(text, "")) == [
        "python a.py --b=1 --c='# no'",
        "X=1 make all",
        "-- arguments",
    ]
    assert list(pages.lines_of("$ ls a  # b\n\n# c\n", "sh")) == ["ls a"]


def test_a_block_that_is_saved_is_a_file_that_commands_need(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    code = "from PIL import Image\nImage.new('L', (2, 2)).save(\"c.png\")\n"
    page.write_text(f"Save this as `a.py`:\n\n```python\n{code}```\n\nText.\n\n```\nb\n```\n")
    monkeypatch.setattr(pages, "pages", lambda: [page])
    monkeypatch.setattr(pages, "name_of", str)
    assert page_files.needed("python a.py DIR/b.jpg c.png") == ["DIR", "a.py", "c.png"]
    assert page_files.make("a.py", tmp_path).read_text() == code
    assert page_files.make("c.png", tmp_path).stat().st_size


def test_the_end_of_an_output_names_no_folder_of_this_machine(tmp_path):
    text = f"first\n10%\r20%\r\x1b[1m{tmp_path}/runs\x1b[0m\n\n" + "x" * 500 + "\n"
    lines = run_commands.last_lines(text, tmp_path)
    assert lines == ["first", "./runs", "x" * run_commands.WIDTH]


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
