"""Which tasks an ablation is made of."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from slam_jax.errors import ConfigError, check_names
from slam_jax.rocket.ablation.board import make_board
from slam_jax.rocket.ablation.measure import AblationSettings
from slam_jax.rocket.ablation.page import make_page
from slam_jax.rocket.page import Page
from slam_jax.rocket.tasks import Json, Task, plain
from slam_jax.training import Experiment


class Ablation:
    """Each variant is trained and tested from each seed.

    Raises ConfigError where there are no variants, or one of them cannot be built.
    """

    name = "ablation"

    def __init__(self, settings: AblationSettings, models: Sequence[str], workdir: str | Path):
        if not settings.variants:
            raise ConfigError(
                "variants are not given; give --config a file of them, such as "
                "configs/ablations/sort_of_clevr.py"
            )
        check_names(models, list(settings.variants), "variants")
        for name in settings.variants:
            Experiment.from_config(settings.config_of(name, 0))
        self._settings, self.settings, self.data = settings, plain(settings), {}
        self._folder, first = Path(workdir) / "runs", next(iter(settings.variants))
        # Whatever is asked for is compared with the first.
        self.models = tuple(dict.fromkeys((first, *models)))

    def tasks(self, results: Mapping[str, Mapping[str, Json]]) -> list[Task]:
        return [
            Task(name, f"seed {seed}", "ablation", timed=False)
            for seed in self._settings.seeds
            for name in self.models
        ]

    def arguments(self, task: Task, done: Mapping[str, Json]) -> Json:
        seed = next(seed for seed in self._settings.seeds if task.label == f"seed {seed}")
        return {"workdir": str(self._folder), "seed": seed}

    def board(self, about: Json, results: Mapping[str, Mapping[str, Json]]) -> Json:
        return make_board(about, self._settings, results)

    def page(self, board: Json) -> Page:
        return make_page(board)
