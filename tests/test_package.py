"""The package that is built: what is in it, and that it works without the repository.

The wheel is installed into fresh environments in other folders, which takes minutes.
"""

import ast
import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from slam_jax.training import recipes
from slam_jax.version import __version__

pytestmark = pytest.mark.release
ROOT = Path(__file__).parent.parent
OLDEST, NEWER = "3.11", ("3.13", "3.12")
TINY = (
    "--config.data.name=sort_of_clevr/tiny",
    "--config.data.batch_size=4",
    '--config.data.stages=[(0, {"aux": 1.0})]',
    "--config.model.embed_dim=32",
    "--config.model.num_heads=2",
    "--config.model.num_processes=2",
    "--config.model.num_decoder_layers=1",
    "--config.optimizer.name=adamw",
    "--config.run.num_steps=2",
    "--config.run.evaluate_every=2",
    "--config.run.evaluate_batches=1",
)


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    given = dict(capture_output=True, text=True, timeout=1_200, check=True)
    try:
        return subprocess.run(list(map(str, command)), **{**given, **kwargs})
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{command}: exit code {error.returncode}\n{error.stdout}\n{error.stderr}")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution. The wheel is built from the latter.

    Built from a copy: setuptools would also take what earlier builds in this folder have left.
    """
    folder, sources = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("sources")
    for path in tracked():
        (sources / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, sources / path)
    run(sys.executable, "-m", "build", "--outdir", folder, sources)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    [file] = built.glob("*.whl")
    return file


def test_wheel_and_source_distribution_pass_their_checks(built, wheel):
    run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())
    run(sys.executable, "-m", "check_wheel_contents", wheel)
    names = {file.name for file in built.iterdir()}
    name = f"slam_jax-{__version__}"
    assert names == {f"{name}.tar.gz", f"{name}-py3-none-any.whl"}


def test_the_wheel_has_the_package_and_its_recipes_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        [metadata] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        description = archive.read(metadata).decode()
    assert all(name.startswith("slam_jax/") for name in files)
    assert {name for name in files if name.startswith("slam_jax/recipes/")} == {
        f"slam_jax/recipes/{path.relative_to(ROOT / 'configs')}"
        for path in (ROOT / "configs").rglob("*.py")
    }
    expected = {str(path) for path in tracked() if path.parts[0] == "slam_jax"}
    assert "slam_jax/py.typed" in files and expected <= files
    assert not re.search(r"\]\((?!https?:)", description), "a link that leads nowhere"


def tracked() -> list[Path]:
    """The files of the repository, also those that are not committed yet."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git repository")
    command = ("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = sorted(set(run(*command).stdout.split("\0")))
    return [Path(name) for name in names if (ROOT / name).is_file()]


def test_the_source_distribution_has_every_file_of_the_repository(built):
    [file] = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        files = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    assert not {str(path) for path in tracked()} - files


def interpreter(*versions: str) -> str:
    """A Python of the first of these versions that is there; skips the test without one."""
    for version in versions:
        if version == f"{sys.version_info.major}.{sys.version_info.minor}":
            return sys.executable
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        found = [shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")]
        for each in filter(None, found):  # a shim may be there without the Python behind it
            if subprocess.run(
                [each, "-c", "import venv, ensurepip"], capture_output=True
            ).returncode:
                continue
            return str(each)
    pytest.skip(f"there is no Python {' or '.join(versions)}")


@pytest.fixture(scope="module", params=[(OLDEST,), NEWER], ids=["oldest", "newest"])
def installed(request, wheel, tmp_path_factory) -> Path:
    """The `bin` folder of a fresh environment with the wheel."""
    python = interpreter(*request.param)
    folder = tmp_path_factory.mktemp("environment")
    run(python, "-m", "venv", folder, env=clean())
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", wheel, env=clean())
    return folder / "bin"


def clean() -> dict[str, str]:
    """The environment without what leads to this repository or makes its tests faster."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "XLA_FLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


REQUIREMENTS = """
import importlib.metadata as metadata
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name as canonical

needed, waiting = set(), [("slam-jax", "")]
while waiting:
    name, extra = waiting.pop()
    if (name, extra) in needed:
        continue
    needed.add((name, extra))
    for text in metadata.requires(name) or ():
        each = Requirement(text)
        if each.marker is None or each.marker.evaluate({"extra": extra}):
            waiting += [(canonical(each.name), more) for more in ("", *each.extras)]
found = {canonical(each.metadata["Name"]) for each in metadata.distributions()}
print(*sorted(found - {name for name, _ in needed} - {"pip", "setuptools", "wheel"}))
print(*sorted(found))
"""


def test_the_listed_requirements_and_theirs_are_installed_and_no_others(installed, tmp_path):
    done = run(installed / "python", "-c", REQUIREMENTS, cwd=tmp_path, env=clean())
    others, found = (line.split(" ") for line in done.stdout.splitlines())
    assert others == [""]
    assert "jax" in found and not {"torch", "tensorflow", "gradio", "transformers"} & {*found}


def test_nothing_of_the_repository_is_importable(installed, tmp_path):
    code = """
import importlib.util, slam_jax
print(slam_jax.__file__, slam_jax.__version__)
names = "benchmarks", "configs", "conftest", "docs", "eval", "experiments", "tests", "train"
print([name for name in names if importlib.util.find_spec(name)])
"""
    done = run(installed / "python", "-c", code, cwd=tmp_path, env=clean())
    where, others = done.stdout.splitlines()
    assert where.startswith(str(installed.parent)) and where.endswith(__version__)
    assert others == "[]"


def test_the_python_of_the_readme_runs(installed, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert len(blocks) >= 2
    for block in blocks:
        run(installed / "python", "-c", block, cwd=tmp_path, env=clean())


@pytest.mark.parametrize("command", ["train", "eval", "generate", "serve", "chat"])
def test_a_command_explains_itself_and_says_in_one_line_what_is_missing(
    command, installed, tmp_path
):
    program = installed / f"slam-{command}"
    helped = run(program, "--help", cwd=tmp_path, env=clean(), check=False)
    assert f"slam-{command}" in helped.stdout.split("flags:")[0] and "--helpfull" in helped.stdout
    wrong = run(program, cwd=tmp_path, env=clean(), check=False)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("error: flag --")


def test_a_run_of_a_recipe_is_trained_evaluated_and_asked(installed, tmp_path):
    def command(name, *arguments, **kwargs):
        program = installed / f"slam-{name}"
        return run(program, *arguments, cwd=tmp_path, env=clean(), **kwargs)

    unknown = command("train", "--config=quick", "--workdir=run", check=False)
    assert unknown.returncode == 2 and unknown.stderr.endswith(f"{', '.join(recipes.names())}\n")
    done = command("train", "--config=quickstart", "--workdir=run", *TINY)
    assert "next: slam-eval --workdir=run" in done.stdout + done.stderr
    assert "aux" in command("eval", "--workdir=run", "--process_examples=0").stdout
    answer = command(
        *("generate", "--model=quickstart", "--prompt=shape of red"),
        "--text=red circle at 12 40 . blue square at 50 9 .",
    )
    assert answer.stdout == "circle\n"
    served = command("serve", "--model=quickstart", "--port=0", check=False)
    assert served.returncode == 2 and "pip install 'slam_jax[serve]'" in served.stderr


def test_every_import_is_of_a_listed_requirement():
    """Else an upgrade of a requirement could take away what only came with it."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    listed = set(map(normalised, re.findall(r"^([A-Za-z][\w.-]*)", "\n".join(lists), re.M)))
    provided = importlib.metadata.packages_distributions()
    for path in sorted((ROOT / "slam_jax").rglob("*.py")):
        for top in imports(path) - sys.stdlib_module_names - {"slam_jax"}:
            assert listed & set(map(normalised, provided.get(top, ()))), f"{path}: {top}"


def imports(path: Path) -> set[str]:
    """The packages that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
