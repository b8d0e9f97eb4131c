"""Which tasks the repetition of the published comparison is made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from slam_jax.language_models import make_config
from slam_jax.rocket.page import Page
from slam_jax.rocket.seed.board import make_board
from slam_jax.rocket.seed.measure import SeedSettings
from slam_jax.rocket.seed.page import make_page
from slam_jax.rocket.tasks import Json, Task, plain


class Seed:
    """Each system learns in one process; then all are timed in turns; then comes the stress test.

    Raises ConfigError for a system that the preset is not there for.
    """

    name = "seed"

    def __init__(self, settings: SeedSettings, models: Sequence[str], workdir: Any = None):
        self._settings, self.settings, self.data = settings, plain(settings), {}
        self.models = models
        for name in models:
            make_config(name, settings.preset)

    def tasks(self, results: Mapping[str, Mapping[str, Json]]) -> list[Task]:
        models = self.models
        learned = [Task(name, "updates", "seed") for name in models]
        timed = [
            Task(name, f"timing {visit}", "seed_timing", 0.2)
            for visit in range(1, self._settings.rounds + 1)
            for name in models
        ]
        # Last: a machine short of memory measures the others wrongly.
        return [
            *learned,
            *timed,
            *(Task(name, "stress test", "seed_stress", 0.3, optional=True) for name in models),
        ]

    def arguments(self, task: Task, done: Mapping[str, Json]) -> Json:
        return {}

    def board(self, about: Json, results: Mapping[str, Mapping[str, Json]]) -> Json:
        return make_board(about, self._settings, results)

    def page(self, board: Json) -> Page:
        return make_page(board)
