"""The protocols by name, each with its settings from files and arguments."""

from collections.abc import Sequence
from pathlib import Path

from slam_jax.rocket.heldout.measure import HeldoutSettings
from slam_jax.rocket.heldout.protocol import Heldout
from slam_jax.rocket.seed.measure import SeedSettings
from slam_jax.rocket.seed.protocol import Seed
from slam_jax.rocket.tasks import Comparison, plain
from slam_jax.training.experiment import build, override, read_config

PROTOCOLS = {"seed": (Seed, SeedSettings), "heldout": (Heldout, HeldoutSettings)}


def make_comparison(
    protocol: str,
    config: str | Path | None,
    arguments: Sequence[str],
    models: Sequence[str],
    workdir: str | Path,
) -> Comparison:
    """The protocol with its defaults, then what the file says, then `--config.field=value`.

    Raises ConfigError for a field that is not there or cannot be used.
    """
    comparison, settings = PROTOCOLS[protocol]
    given = {} if config is None else read_config(config)
    known = plain(settings())
    changed = override({**known, **given}, arguments)
    return comparison(build(settings, changed), models, workdir)
