"""What people read about the project names what exists: public names, files, versions."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import slam_jax

ROOT = Path(__file__).parent.parent
PUBLIC = re.findall(
    r"^\| `(slam_jax[a-z0-9_.]*)`", (ROOT / "docs/compatibility.md").read_text("utf-8"), re.M
)


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_of_a_package_exist(package):
    module = importlib.import_module(package)
    listed = getattr(module, "__all__", None) or _index(module)
    assert listed and all(hasattr(module, name) for name in listed)


def _index(module) -> list[str]:
    """The names that an `__init__.py` imports as themselves, which type checkers take as public."""
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [alias.name for node in imports for alias in node.names if alias.asname == alias.name]


def test_the_names_on_the_pages_exist():
    package = ROOT / "slam_jax"
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for name in re.findall(
            r"\bslam_jax\.(?!md\b)([A-Za-z]\w*)\b(?!\.)", page.read_text("utf-8")
        ):
            is_module = (package / name).is_dir() or (package / f"{name}.py").is_file()
            assert is_module or name in slam_jax.__all__, (page, name)


def test_the_readme_has_the_version():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.findall(r"^Version (\S+) has", readme, re.M) == [slam_jax.__version__]


def test_the_citation_has_the_version():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.M) == [slam_jax.__version__]
    [released] = re.findall(r"^date-released: (.*)$", citation, re.M)
    assert f"## {slam_jax.__version__} - {released}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "docs/compatibility.md"])
def test_the_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text("utf-8")
    named = set(re.findall(r"`((?:\.?[\w-]+/)+[\w.-]*\.\w+|\w+\.(?:cff|cfg|md|toml))`", text))
    named -= {name for name in named if "NAME" in name}
    links = {link for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", text) if "//" not in link}
    wrong = [name for name in named if not (ROOT / name).exists()]
    wrong += [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert named and not wrong
