"""The notebooks are stored without outputs, link to what exists, and run."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs_and_its_links_lead_somewhere(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    texts = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert texts.startswith("# ")
    for file, heading in LINK.findall(texts):
        target = FOLDER / file
        assert target.exists(), file
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert heading in [title.lower().replace(" ", "-") for title in titles], heading


@pytest.mark.release
def test_the_notebooks_run_with_the_package_alone_and_become_pages(tmp_path):
    pytest.importorskip("nbclient", reason="needs the extra docs")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, FOLDER / "convert.py", f"--output={tmp_path}"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=1_800,
    )
    assert done.returncode == 0, done.stderr[-5_000:]
    assert not done.stderr, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Three minutes of two cores, for both together.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 360
    for path in NOTEBOOKS:
        page = (tmp_path / f"{path.stem}.md").read_text(encoding="utf-8")
        pictures = re.findall(r"!\[[^]]*\]\((.*?)\)", page)
        assert len(pictures) >= 4 and all((tmp_path / name).stat().st_size for name in pictures)
        assert ".ipynb)" not in page and "/docs/" not in page
