"""The pages of the documentation belong together: links, navigation, reference, and the built site.

What the site needs from outside is nothing: no script, no style and no font.
"""

import ast
import html.parser
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Made from notebooks/ when the site is built; git does not have them.
MADE = "notebooks"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(path for path in DOCS.rglob("*.md") if MADE not in path.parts),
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\]\((?!https?:|mailto:)(?P<file>[^)#\s]*)(?:#(?P<heading>[^)]*))?\)")
CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]*`", re.S | re.M)
# Public names of these packages are those that `__init__.py` imports.
PACKAGES = (
    *("slam_jax", "slam_v3", "layers", "language_models", "vision_models", "interop"),
    *("generation", "serving", "data", "training", "evaluation"),
)


def anchors_of(page: Path) -> set[str]:
    """The anchors of headings, as GitHub makes them, and of objects of the reference."""
    text = CODE.sub(lambda m: "" if "\n" in m[0] else m[0], page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)
    return {*plain, *re.findall(r"^::: (\S+)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_to_files_and_headings(page):
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for found in LINK.finditer(text):
        target = (page.parent / found["file"]).resolve() if found["file"] else page
        if target.parent == DOCS / MADE:
            assert (ROOT / "notebooks" / target.name).with_suffix(".ipynb").exists(), found[0]
            continue
        assert target.exists(), found[0]
        if page.is_relative_to(DOCS):
            assert target.is_relative_to(DOCS), f"{found[0]} leads out of the site"
        if found["heading"]:
            assert found["heading"] in anchors_of(target), found[0]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_pages_with_commands_of_a_clone_name_the_installed_ones(page):
    text = page.read_text(encoding="utf-8")
    for script, command in (("train.py", "slam-train"), ("eval.py", "slam-eval")):
        if f"python {script}" in text:
            assert command in text[:500], f"say near the top what {script} is when it is installed"


def config() -> dict:
    return tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]


def pages_of(nav: list) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            yield from pages_of(value) if isinstance(value, list) else [value]


def test_the_navigation_has_every_page_once():
    listed = [page for page in pages_of(config()["nav"]) if not page.startswith(f"{MADE}/")]
    there = [path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md"))]
    assert sorted(listed) == [page for page in there if not page.startswith(f"{MADE}/")]


def public_names(package: str) -> set[str]:
    """What `__all__` lists; without it, what is imported under its own name."""
    folder = ROOT / "slam_jax" / ("" if package == "slam_jax" else package)
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value)) - {"__version__"}
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    return {alias.asname for node in imports for alias in node.names if alias.asname}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package):
    page = (DOCS / "reference" / f"{package}.md").read_text(encoding="utf-8")
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", page, re.M)}
    names = public_names(package)
    assert names and names <= shown, names - shown


@pytest.mark.parametrize("page", sorted((DOCS / "reference").glob("*.md")), ids=lambda p: p.stem)
def test_names_of_the_reference_can_be_imported(page):
    for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M):
        module, _, name = path.rpartition(".")
        assert not module or hasattr(importlib.import_module(module), name), path


def test_the_reference_has_every_recipe():
    page = (DOCS / "reference" / "configs.md").read_text(encoding="utf-8")
    shown = re.findall(r'^--8<-- "(configs/.*)"$', page, re.M)
    recipes = [path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.py")]
    assert sorted(shown) == sorted(recipes)


class Page(html.parser.HTMLParser):
    """The ids of a built page, its links, and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {given[name] or "" for name in ("id", "name") if name in given}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        for name in ("src", "srcset", "data", "poster") + (("href",) if tag == "link" else ()):
            self.loads += [given[name] or ""] if given.get(name) else []


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built from a copy of its sources as `make docs` does it."""
    pytest.importorskip("zensical", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    left_out = shutil.ignore_patterns("__pycache__", MADE)
    for name in ("configs", "slam_jax"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    shutil.copytree(DOCS, folder / "docs", ignore=left_out)
    for name in ("CHANGELOG.md", "zensical.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    # Warnings would be among what it prints.
    assert len(run(folder, "notebooks/convert.py").splitlines()) == len(NOTEBOOKS)
    said = run(folder, "-m", "zensical", "build", "--clean", "--strict")
    assert "No issues found" in said and "warning" not in said.lower(), said
    return folder / "site"


def run(folder: Path, *arguments: str) -> str:
    """Runs Python in a folder; what it prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1_800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(site) -> dict[Path, Page]:
    # The page for unknown addresses has absolute links, which a server must resolve.
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


@pytest.mark.release
def test_notebooks_are_pages_with_pictures(site):
    for path in NOTEBOOKS:
        page = (site.parent / "docs" / "notebooks" / f"{path.stem}.md").read_text(encoding="utf-8")
        pictures = re.findall(r"!\[[^]]*\]\((.*?)\)", page)
        assert len(pictures) >= 4
        assert all((site / "notebooks" / name).stat().st_size for name in pictures)
        assert ".ipynb)" not in page and "/docs/" not in page


@pytest.mark.release
def test_links_of_the_site_lead_to_files_and_ids(site, built):
    dead = []
    for path, page in built.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = built.get(target)
            lost = known is not None and parts.fragment and unquote(parts.fragment) not in known.ids
            if not target.is_relative_to(site) or not target.is_file() or lost:
                dead.append(f"{path.relative_to(site)}: {link}")
    assert len(built) > 50 and not dead, "\n".join(dead)


@pytest.mark.release
def test_the_site_loads_nothing_from_elsewhere(site, built):
    foreign = [load for page in built.values() for load in page.loads if urlsplit(load).netloc]
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    foreign += [
        url for text in styles for url in re.findall(r"url\([\"']?((?:https?:)?//[^)]*)", text)
    ]
    foreign += [url for text in styles for url in re.findall(r"@import[^;]*//[^;]*", text)]
    assert not foreign


@pytest.mark.release
def test_headings_of_the_reference_are_import_paths(site):
    page = (site / "reference" / "layers.html").read_text(encoding="utf-8")
    heading = r'<h(\d) id="(slam_jax\.[^"]+)".*?doc-object-name[^>]*>([^<]*)<'
    found = re.findall(heading, page, re.S)
    assert ("3", *["slam_jax.layers.rotary.Llama3"] * 2) in found
    assert len({path for _, path, _ in found}) == len(found) > 50
    for level, path, shown in found:
        # Members are short, since they are below the class that has them.
        assert shown == (path if level == "3" else path.rpartition(".")[2])
    for name in ("slam_jax.layers.masks.Mask", "slam_jax.layers.linear.Initializer"):
        assert page.count(f'href="#{name}"') > 3, f"signatures lead to {name}"


@pytest.mark.release
def test_every_section_can_be_searched_for(site):
    items = json.loads((site / "search.json").read_text(encoding="utf-8"))["items"]
    found: dict[str, str] = {}
    for item in items:
        page = item["location"].partition("#")[0].removesuffix(".html") + ".md"
        found[page] = f"{found.get(page, '')} {item['title']} {item['text']}"
    pages = set(pages_of(config()["nav"]))
    assert pages <= found.keys(), pages - found.keys()
    for page, word in {
        "training.md": "trackers",
        "reference/layers.md": "MultiHeadLatentAttention",
        "reference/configs.md": "get_config",
        "changelog.md": "0.24.0",
        "results.md": "heldout",
        "reliability.md": "SIGTERM",
    }.items():
        assert word in found[page], (page, word)


@pytest.mark.release
def test_lines_about_arguments_become_a_list(built, site):
    page = (site / "reference" / "layers.html").read_text(encoding="utf-8")
    assert re.search(r"<li><strong><code>kv_lora_rank</code></strong>: R, the latent width", page)
    text = re.sub("<[^>]*>", "", page).replace("&#34;", '"').replace("&quot;", '"')
    # A shape is shown as it is written; as Python it would be a product.
    assert 'lengths: Int[Array, "*B"]' in text
    generation = (site / "reference" / "generation.html").read_text(encoding="utf-8")
    assert '"B *Q"' in re.sub("<[^>]*>", "", generation).replace("&quot;", '"')
