"""Runs the notebooks of this folder and writes them as pages with their pictures:

python notebooks/convert.py [--output=FOLDER] [NAME ..]

NAME is a notebook without its ending; by default all are run. The pages are for the site of the
documentation (docs/notebooks). A cell that fails ends the command, and so does one that
prints a warning. It needs `pip install 'slam_jax[docs]'`.
"""

import argparse
import base64
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

FOLDER = Path(__file__).resolve().parent
PAGES = FOLDER.parent / "docs" / "notebooks"
_SECONDS = 900  # of one cell, also on a busy machine


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs notebooks and writes them as pages.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks, without .ipynb")
    parser.add_argument("--output", type=Path, default=PAGES, help="the folder of the pages")
    given = parser.parse_args()
    for name in given.names or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        page = write_page(execute(FOLDER / f"{name}.ipynb"), name, given.output)
        print(page)


def execute(path: Path) -> Any:
    """The notebook with its outputs; it runs in an empty folder, with the packages installed here.

    Raises CellExecutionError where a cell fails, and ValueError where one prints a warning.
    """
    notebook = nbformat.read(path, 4)
    config = Config()
    config.KernelManager.transport_encryption = "auto"  # or the kernel prints a warning
    with tempfile.TemporaryDirectory() as folder:
        # Temporary files of the notebook are in this folder, too.
        variables = {**os.environ, "TMPDIR": folder, "JAX_PLATFORMS": "cpu"}
        client = NotebookClient(
            notebook,
            config=config,
            timeout=_SECONDS,
            startup_timeout=_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=variables)
    for number, cell in enumerate(notebook.cells, 1):
        for output in cell.get("outputs", ()):
            if "text/plain" in (data := output.get("data", {})):
                data["text/plain"] = data["text/plain"].replace(folder, "/tmp")
            if output.get("name") == "stderr":
                raise ValueError(f"{path.name}, cell {number} prints to stderr:\n{output.text}")
    return notebook


def write_page(notebook: Any, name: str, folder: Path) -> Path:
    """Writes NAME.md and its pictures, NAME_1.png and so on, and returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}_*.png"):
        old.unlink()
    parts, pictures = [], 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            # In the repository pages are in docs/, on the site they are beside these.
            text = cell.source.replace("](../docs/", "](../").replace(".ipynb)", ".md)")
            parts.append(text)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        printed = "".join(map(as_printed, cell.outputs)).rstrip()
        if printed:
            parts.append(f"```text\n{printed}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                pictures += 1
                file = f"{name}_{pictures}.png"
                (folder / file).write_bytes(base64.b64decode(data["image/png"]))
                parts.append(f"![What the code above draws]({file})")
            elif "text/html" in data and not as_printed(output):
                # A blank line would end the block of HTML.
                parts.append(re.sub(r"\n\s*\n", "\n", data["text/html"].strip()))
    source = f"*A notebook, `notebooks/{name}.ipynb`, with the output of its last run.*"
    parts[0] = f"{parts[0]}\n\n{source}"
    page = folder / f"{name}.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def as_printed(output: Any) -> str:
    """A printed text, also in the form in which rich prints; "" for anything else."""
    if output.output_type == "stream":
        return output.text
    data = output.get("data", {})
    return data["text/plain"] if data.get("text/html", "").startswith("<pre") else ""


if __name__ == "__main__":
    main()
