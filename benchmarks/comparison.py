"""What a benchmark says: which arms there are, what they are worth, how near their outputs must be.

Sides of a comparison are called arms. The first is ours; a ratio is another arm's figure over ours,
so that 2 means twice as fast, or half of the bytes.
"""

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Measured(NamedTuple):
    """What a fresh arm returns. output: compared with that of the other arms. value: its figure,
    None = the seconds from the start of its process until now."""

    output: Any
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    build: called with `given` in a process of the arm's own. It returns the call to be timed, whose
      result (an array of any library, or a number) is waited for; of a fresh arm, a `Measured`.
      Must be importable: a function at the top of its module.
    environment: variables that its process starts with.
    needs: packages and programs without which the arm is left out.
    aim: what this arm's figure is to be over ours; None for ours, and where there is none.
    """

    name: str
    build: Callable[..., Any]
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs: Sequence[str] = ()
    aim: float | None = None

    def missing(self) -> list[str]:
        """Of what it needs, what is not there."""
        return [
            name
            for name in self.needs
            if importlib.util.find_spec(name) is None and shutil.which(name) is None
        ]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arms that do the same.

    tolerance: the most that a number in an arm's output may differ from ours; None where outputs
      are not comparable, and then `unchecked` says why.
    checked: the outputs of so many first calls are compared; of a training step two or more see
      what the update did.
    repeats: timed calls of an arm in each round, of which the median counts.
    fresh: every round starts a new process an arm, and what `build` returns is the figure.
    unit: of the figures, "s" or "MiB".
    flops, bytes_moved: of one call, in all arms: what the shares of the ceilings are of.
    """

    title: str
    arms: Sequence[Arm]
    tolerance: float | None
    unchecked: str = ""
    checked: int = 1
    repeats: int = 3
    fresh: bool = False
    unit: str = "s"
    flops: float | None = None
    bytes_moved: float | None = None
