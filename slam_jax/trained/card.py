"""The model card of a trained model: what it is, how it was made, how well it does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from slam_jax.training import Loaded
from slam_jax.version import __version__


def make_card(
    loaded: Loaded, workdir: str | Path, command: str | None, commit: str | None, dtype: str
) -> str:
    """The text of a README.md.

    The scores are those that `eval.py` wrote into the workdir, if it tested this checkpoint.
    """
    count = sum(leaf.size for leaf in jax.tree.leaves(loaded.model))
    made = f"- command: `{command}`\n" if command else ""
    made += f"- commit: {commit}\n" if commit else ""
    return (
        f"# SLAM v3, {loaded.config['data']['name']}\n\n"
        f"{count:,} parameters, stored in {dtype}, after {loaded.step:,} training steps.\n\n"
        f"{made}- written by: slam_jax {__version__}\n- seed: {loaded.config['seed']}\n\n"
        "The weights are in `model.safetensors`; the configuration of the run, the limit of tokens "
        "and the format of vectors in `config.json`; the tokenizer in `tokenizer.json`.\n\n"
        '```python\nimport slam_jax\n\nloaded = slam_jax.load("FOLDER")\n```\n'
        + _scores(Path(workdir) / "eval" / "metrics.json", loaded.step)
    )


def _scores(path: Path, step: int) -> str:
    """The table of test scores, "" where the checkpoint was not tested."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(metrics, Mapping) or metrics.get("step") != step:
        return ""
    rows: list[str] = []
    views: Mapping[str, Any] = metrics["views"]
    for view, kinds in views.items():
        for kind, found in kinds.items():
            if isinstance(found, Mapping) and "accuracy" in found:
                rows.append(f"| {view} | {kind} | {100 * found['accuracy']:.1f} |\n")
    head = "| view | questions | % right |\n|---|---|---|\n"
    title = "Test scores in percent (`eval.py`, before the weights were rounded):"
    return f"\n{title}\n\n{head}" + "".join(rows)
