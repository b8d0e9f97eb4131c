"""Recipes are found by their names, in a checkout and in an installed package."""

from pathlib import Path

import pytest

from slam_jax.errors import ConfigError
from slam_jax.training import recipes

ROOT = Path(__file__).parent.parent


def test_a_recipe_is_found_by_its_name_and_a_file_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = ROOT / "configs"
    assert recipes.find("quickstart") == configs / "slam_v3_quickstart.py"
    assert recipes.find("slam_v3_quickstart") == configs / "slam_v3_quickstart.py"
    assert recipes.find("language_model") == configs / "language_model.py"
    assert recipes.find("ablations/sort_of_clevr") == configs / "ablations" / "sort_of_clevr.py"
    assert len(recipes.names()) == len(list(configs.rglob("*.py")))
    Path("quickstart").touch()
    assert recipes.find("quickstart") == Path("quickstart")


def test_an_unknown_recipe_is_answered_with_all_names_in_one_line():
    with pytest.raises(ConfigError, match="^quick: no such file or recipe; ") as caught:
        recipes.find("quick")
    assert str(caught.value).endswith(f"one of {', '.join(recipes.names())}")


def test_an_installed_package_has_its_recipes_in_its_own_folder(tmp_path, monkeypatch):
    installed = tmp_path / "slam_jax"
    (installed / "recipes").mkdir(parents=True)
    monkeypatch.setattr(recipes, "__file__", str(installed / "training" / "recipes.py"))
    assert recipes.folder() == installed / "recipes"
