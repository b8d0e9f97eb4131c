"""The protocols by name, with their settings from files and arguments."""

from collections.abc import Sequence
from pathlib import Path

from slam_jax.language_models import ROCKET
from slam_jax.rocket.ablation.measure import AblationSettings
from slam_jax.rocket.ablation.protocol import Ablation
from slam_jax.rocket.board import Comparison
from slam_jax.rocket.heldout.protocol import Heldout
from slam_jax.rocket.heldout.settings import HeldoutSettings
from slam_jax.rocket.processes.measure import ProcessSettings
from slam_jax.rocket.processes.protocol import Processes
from slam_jax.rocket.seed.measure import SeedSettings
from slam_jax.rocket.seed.protocol import Seed
from slam_jax.rocket.tasks import plain
from slam_jax.training.experiment import build, override, read_config

PROTOCOLS = {
    "seed": (Seed, SeedSettings),
    "heldout": (Heldout, HeldoutSettings),
    "ablation": (Ablation, AblationSettings),
    "processes": (Processes, ProcessSettings),
}
DEFAULT_MODELS = (*ROCKET, "slam_v3_text")


def make_comparison(
    protocol: str,
    config: str | Path | None,
    arguments: Sequence[str],
    models: Sequence[str] | None,
    workdir: str | Path,
) -> Comparison:
    """A protocol with its defaults, changed by the config file, then by `--config.field=value`.

    models: None = the published nine and SLAM v3 with its text stream alone; where the settings
    have variants, all of them. Raises ConfigError for an unknown field or an invalid value.
    """
    comparison, settings = PROTOCOLS[protocol]
    given = {} if config is None else read_config(config)
    values = build(settings, override({**plain(settings()), **given}, arguments))
    if models is None:
        models = tuple(getattr(values, "variants", DEFAULT_MODELS))
    return comparison(values, tuple(dict.fromkeys(models)), workdir)
