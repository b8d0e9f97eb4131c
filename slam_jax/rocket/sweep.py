"""Protocols that try learning rates: the runs of a system use the one of the lowest loss."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from slam_jax.rocket.board import Comparison
from slam_jax.rocket.tasks import Json, Results, Task


class TunedComparison(Comparison):
    """The options have `learning_rates`, `more_learning_rates` and `seeds`.

    The function of each task also gets `learning_rate` and `seed`.
    """

    def trials(
        self, results: Results, function: Callable[..., Any], weight: float, arguments: Json
    ) -> list[Task]:
        """Each system tries its rates with the first seed; systems take turns."""
        first = {**arguments, "seed": self.options.seeds[0]}
        trial = partial(Task, function=function, weight=weight, optional=True, timed=False)
        losses = [validation_losses(results.get(name, {}), self.options) for name in self.models]
        return [
            trial(name, rate_label(rate), arguments={**first, "learning_rate": rate})
            for i in range(max(map(len, losses)))
            for name, tried in zip(self.models, losses, strict=True)
            for rate in list(tried)[i : i + 1]
        ]

    def tuned(self, results: Results, function: Callable[..., Any], arguments: Json) -> list[Task]:
        """Each system is trained with each seed and its best rate so far. If no rate could be
        tried, the task is impossible."""
        tasks = []
        for seed in self.options.seeds:
            for task in self.each(f"seed {seed}", function, timed=False):
                done = results.get(task.system, {})
                rate = best_rate(validation_losses(done, self.options))
                first = done.get(rate_label(self.options.learning_rates[0]), {}).get("reason")
                why = f"no learning rate could be tried: {first}" if rate is None else None
                given = {**arguments, "seed": seed, "learning_rate": rate}
                tasks.append(task._replace(arguments=given, impossible=why))
        return tasks

    def tuning(self, done: Mapping[str, Json]) -> Json:
        """The learning rate, whether a rate beyond might be better, and what was tried."""
        losses = validation_losses(done, self.options)
        rate = best_rate(losses)
        tried = [
            {
                "learning_rate": each,
                "validation_loss": loss,
                "reason": done[rate_label(each)].get("reason"),
            }
            for each, loss in losses.items()
        ]
        at_edge = rate in (min(losses), max(losses))
        return {"learning_rate": rate, "learning_rate_is_at_edge": at_edge, "tried": tried}


def rate_label(rate: float) -> str:
    """The label of the task that tries a learning rate."""
    return f"learning rate {rate:g}"


def validation_losses(done: Mapping[str, Json], settings: Any) -> dict[float, float | None]:
    """The learning rates to try, with the losses of those that were; None if the run failed.

    They are those of the settings, and those that follow from the figures so far: while the best
    is the lowest or the highest tried, one beyond it, by the factor between it and its neighbour.
    """

    def loss(rate: float) -> float | None:
        return done.get(rate_label(rate), {}).get("validation_loss")

    losses = {rate: loss(rate) for rate in settings.learning_rates}
    for _ in range(settings.more_learning_rates if len(losses) > 1 else 0):
        best, (low, *_, high) = best_rate(losses), (ordered := sorted(losses))
        if any(rate_label(rate) not in done for rate in losses) or best not in (low, high):
            break
        beyond = low * low / ordered[1] if best == low else high * high / ordered[-2]
        beyond = float(f"{beyond:.2g}")
        losses[beyond] = loss(beyond)
    return losses


def best_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate with the lowest validation loss; None if there is no loss."""
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(known, key=lambda rate: known[rate]) if known else None
