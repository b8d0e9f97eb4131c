"""Which examples the steps of a run have, also after changes of the batch size or the data."""

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
