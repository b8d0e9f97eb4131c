"""The learning rates of the protocol `heldout`: which are tried, and which one is used."""

from collections.abc import Mapping

from slam_jax.rocket.heldout.settings import HeldoutSettings
from slam_jax.rocket.tasks import Json


def rate_label(rate: float) -> str:
    """The label of the task that tries a learning rate."""
    return f"learning rate {rate:g}"


def validation_losses(
    done: Mapping[str, Json], settings: HeldoutSettings
) -> dict[float, float | None]:
    """By learning rate that was tried; None if the run failed."""
    return {
        rate: done[rate_label(rate)].get("validation_loss") for rate in rates_to_try(done, settings)
    }


def rates_to_try(done: Mapping[str, Json], settings: HeldoutSettings) -> list[float]:
    """The learning rates of the settings, and those that follow from the figures so far: while the
    best is the lowest or the highest tried, one beyond it, by the factor between it and its
    neighbour."""
    rates = list(settings.learning_rates)
    for _ in range(settings.more_learning_rates if len(rates) > 1 else 0):
        if any(rate_label(rate) not in done for rate in rates):
            break
        best = choose_learning_rate(
            {rate: done[rate_label(rate)].get("validation_loss") for rate in rates}
        )
        low, *_, high = ordered = sorted(rates)
        if best not in (low, high):
            break
        beyond = low * low / ordered[1] if best == low else high * high / ordered[-2]
        rates.append(float(f"{beyond:.2g}"))
    return rates


def choose_learning_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate with the lowest validation loss; None if every run failed."""
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(known, key=lambda rate: known[rate]) if known else None
