"""What setup.cfg cannot say: the package has configs/ as `slam_jax.recipes`, and its description is
the README without links to files, which would lead nowhere on a package index."""

import re
from pathlib import Path

from setuptools import find_packages, setup

RECIPES = ("slam_jax.recipes", "slam_jax.recipes.ablations", "slam_jax.recipes.experiments")

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
readme = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", readme)
readme = re.sub(
    r"\[([^]]*)\]\((?!https?:)([^)#]*)[^)]*\)",
    lambda link: link[1] if link[2] in link[1] else f"{link[1]} ({link[2]})",
    readme,
)
setup(
    packages=[*find_packages(include=["slam_jax*"]), *RECIPES],
    package_dir={"slam_jax.recipes": "configs"},
    long_description=f"{readme}\nThe files named here are in the source distribution.\n",
    long_description_content_type="text/markdown",
)
