"""Which examples the steps of a run have, also after changes of the batch size or the data."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Order(NamedTuple):
    """The examples from step `first` on are those at `offset` of shuffle number `number`.

    Shuffle 0 is that of the run's own seed. A run that was never changed has `UNCHANGED`.
    """

    first: int = 0
    offset: int = 0
    number: int = 0

    def start(self, step: int, batch_size: int) -> int:
        """The place of the first example of a step."""
        return self.offset + (step - self.first) * batch_size

    def seed(self, seed: int) -> int:
        """The seed of the shuffle."""
        if not self.number:
            return seed
        return int(np.random.SeedSequence((seed, self.number)).generate_state(1)[0])


UNCHANGED = Order()


def evaluation_order(count: int, shuffled: bool) -> Sequence[int]:
    """The numbers below `count`: in order, or shuffled in a way that depends on `count` alone."""
    return np.random.default_rng(0).permutation(count).tolist() if shuffled else range(count)
