"""Which tasks the held-out comparison is made of."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from slam_jax.errors import InputError
from slam_jax.rocket.heldout.board import make_board
from slam_jax.rocket.heldout.corpus import load_corpus, make_corpus, save_corpus
from slam_jax.rocket.heldout.measure import (
    HeldoutSettings,
    choose_learning_rate,
    rate_label,
    rates_to_try,
    seed_label,
    size,
    validation_losses,
)
from slam_jax.rocket.heldout.page import make_page
from slam_jax.rocket.page import Page
from slam_jax.rocket.tasks import Impossible, Json, Task, plain


class Heldout:
    """Learning rates are tried for all systems, then all are trained from each seed, then timed.

    The text is read and split when this is built, once for a workdir, and kept there.

    Raises: DataError where it cannot be read; InputError where what is kept is another text;
    ConfigError where a budget cannot be met.
    """

    name = "heldout"

    def __init__(self, settings: HeldoutSettings, models: Sequence[str], workdir: str | Path):
        self._settings, self.settings, self.models = settings, plain(settings), models
        self._folder = Path(workdir) / "corpus"
        asked = {"text": settings.text, "vocab_size": settings.vocab_size}
        if not self._folder.exists():
            save_corpus(make_corpus(**asked), self._folder)
        self.data = load_corpus(self._folder).about
        if self.data.get("asked") != asked:
            raise InputError(
                f"{self._folder}: is of {self.data.get('asked')}, and now {asked} is asked for; "
                "give another --workdir, or delete this one"
            )
        # A budget that cannot be met is found before anything is trained.
        self._sizes = {name: size(name, settings, self.data["vocab_size"]) for name in models}

    def tasks(self, results: Mapping[str, Mapping[str, Json]]) -> list[Task]:
        given, models = self._settings, self.models
        short = given.sweep_tokens / given.num_tokens
        rates = {name: rates_to_try(results.get(name, {}), given) for name in models}
        tried = [
            Task(name, rate_label(rates[name][place]), "heldout", short, optional=True, timed=False)
            for place in range(max(map(len, rates.values())))
            for name in models
            if place < len(rates[name])
        ]
        trained = [
            Task(name, seed_label(seed), "heldout", timed=False)
            for seed in given.seeds
            for name in models
        ]
        timed = [
            Task(name, f"timing {visit}", "heldout_timing", 0.1)
            for visit in range(1, given.rounds + 1)
            for name in models
        ]
        return tried + trained + timed

    def arguments(self, task: Task, done: Mapping[str, Json]) -> Json:
        given, corpus = self._settings, {"corpus": str(self._folder)}
        if task.what == "heldout_timing":
            return corpus
        for rate in rates_to_try(done, given):
            if task.label == rate_label(rate):
                budget = {"num_tokens": given.sweep_tokens, "test": False}
                return {**corpus, **budget, "learning_rate": rate, "seed": given.seeds[0]}
        rate = choose_learning_rate(validation_losses(done, given))
        if rate is None:
            reasons = [done[rate_label(rate)].get("reason") for rate in given.learning_rates]
            raise Impossible(f"no learning rate could be tried: {reasons[0]}")
        seed = next(seed for seed in given.seeds if task.label == seed_label(seed))
        budget = {"num_tokens": given.num_tokens, "test": True}
        return {**corpus, **budget, "learning_rate": rate, "seed": seed}

    def board(self, about: Json, results: Mapping[str, Mapping[str, Json]]) -> Json:
        return make_board(about, self._settings, self._sizes, results)

    def page(self, board: Json) -> Page:
        return make_page(board)
