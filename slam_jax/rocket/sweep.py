"""Protocols that try learning rates: the runs of a system use the one of the lowest loss."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from slam_jax.rocket.board import Comparison
from slam_jax.rocket.tasks import Json, Results, Task


class TunedComparison(Comparison):
    """The options have `learning_rates`, `more_learning_rates`, `seeds`, and `tuning_seeds` if the
    rates are tried with other seeds than the first of `seeds`.

    The function of each task also gets `learning_rate` and `seed`.
    """

    def trials(
        self, results: Results, function: Callable[..., Any], weight: float, arguments: Json
    ) -> list[Task]:
        """Each system tries its rates with each tuning seed; systems take turns."""
        trial = partial(Task, function=function, weight=weight, optional=True, timed=False)
        losses = [validation_losses(results.get(name, {}), self.options) for name in self.models]
        return [
            trial(name, label, arguments={**arguments, "seed": seed, "learning_rate": rate})
            for i in range(max(map(len, losses)))
            for name, tried in zip(self.models, losses, strict=True)
            for rate in list(tried)[i : i + 1]
            for seed, label in rate_labels(rate, self.options).items()
        ]

    def tuned(self, results: Results, function: Callable[..., Any], arguments: Json) -> list[Task]:
        """Each system is trained with each seed and its best rate so far. If no rate could be
        tried, the task is impossible."""
        tasks = []
        for seed in self.options.seeds:
            for task in self.each(f"seed {seed}", function, timed=False):
                done = results.get(task.system, {})
                rate = best_rate(validation_losses(done, self.options))
                first = _reason(done, self.options.learning_rates[0], self.options)
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
                "reason": _reason(done, each, self.options),
            }
            for each, loss in losses.items()
        ]
        at_edge = rate in (min(losses), max(losses))
        return {"learning_rate": rate, "learning_rate_is_at_edge": at_edge, "tried": tried}


def rate_labels(rate: float, settings: Any) -> dict[int, str]:
    """By seed, the labels of the tasks that try a learning rate."""
    seeds, label = getattr(settings, "tuning_seeds", ()), f"learning rate {rate:g}"
    return {seed: f"{label}, seed {seed}" for seed in seeds} or {settings.seeds[0]: label}


def _reason(done: Mapping[str, Json], rate: float, settings: Any) -> str | None:
    """Why a learning rate could not be tried; None if it was."""
    labels = rate_labels(rate, settings).values()
    return next((r for label in labels if (r := done.get(label, {}).get("reason"))), None)


def validation_losses(done: Mapping[str, Json], settings: Any) -> dict[float, float | None]:
    """The learning rates to try, with the losses of those that were; None if the run failed.

    They are those of the settings, and those that follow from the figures so far: while the best
    is the lowest or the highest tried, one beyond it, by the factor between it and its neighbour.
    """

    def labels(rate: float) -> Iterable[str]:
        return rate_labels(rate, settings).values()

    def loss(rate: float) -> float | None:
        """The mean over the seeds; None unless there are all."""
        found: list[Any] = [done.get(label, {}).get("validation_loss") for label in labels(rate)]
        return None if None in found else sum(found) / len(found)

    losses = {rate: loss(rate) for rate in settings.learning_rates}
    for _ in range(settings.more_learning_rates if len(losses) > 1 else 0):
        best, (low, *_, high) = best_rate(losses), (ordered := sorted(losses))
        untried = any(label not in done for rate in losses for label in labels(rate))
        if untried or best not in (low, high):
            break
        beyond = low * low / ordered[1] if best == low else high * high / ordered[-2]
        beyond = float(f"{beyond:.2g}")
        losses[beyond] = loss(beyond)
    return losses


def best_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate with the lowest validation loss; None if there is no loss."""
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(known, key=lambda rate: known[rate]) if known else None
