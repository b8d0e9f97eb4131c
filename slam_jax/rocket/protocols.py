"""The protocols by name, each with its settings from files and arguments."""

from collections.abc import Sequence
from pathlib import Path

from slam_jax.language_models import ROCKET
from slam_jax.rocket.ablation.measure import AblationSettings
from slam_jax.rocket.ablation.protocol import Ablation
from slam_jax.rocket.heldout.measure import HeldoutSettings
from slam_jax.rocket.heldout.protocol import Heldout
from slam_jax.rocket.seed.measure import SeedSettings
from slam_jax.rocket.seed.protocol import Seed
from slam_jax.rocket.tasks import Comparison, plain
from slam_jax.training.experiment import build, override, read_config

PROTOCOLS = {
    "seed": (Seed, SeedSettings),
    "heldout": (Heldout, HeldoutSettings),
    "ablation": (Ablation, AblationSettings),
}
DEFAULT_MODELS = (*ROCKET, "slam_v3_text")


def make_comparison(
    protocol: str,
    config: str | Path | None,
    arguments: Sequence[str],
    models: Sequence[str] | None,
    workdir: str | Path,
) -> Comparison:
    """The protocol with its defaults, then what the file says, then `--config.field=value`.

    models: None = the published nine and SLAM v3 with its text stream alone, or all variants of an
    ablation. Raises ConfigError for a field that is not there or cannot be used.
    """
    comparison, settings = PROTOCOLS[protocol]
    given = {} if config is None else read_config(config)
    values = build(settings, override({**plain(settings()), **given}, arguments))
    if models is None:
        models = tuple(values.variants) if protocol == "ablation" else DEFAULT_MODELS
    return comparison(values, tuple(dict.fromkeys(models)), workdir)
