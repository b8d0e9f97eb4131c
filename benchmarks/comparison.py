"""What a benchmark compares: its arms, their aims, and the tolerance of their outputs.

The sides of a comparison are called arms. The first is ours. A ratio is another arm's figure
divided by ours, so that 2 means twice as fast, or half of the bytes.
"""

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Measured(NamedTuple):
    """The result of a fresh arm. output: compared with that of the other arms. value: its figure;
    None = the seconds since the start of its process."""

    output: Any
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    build: called with the arguments `given` in a process of its own. It returns the call to time,
      whose result (an array of any library, or a number) is awaited; in a fresh comparison it
      returns a `Measured`. A function at the top of its module, so that it can be imported.
    environment: more environment variables of its process.
    needs: packages and programs without which the arm is left out.
    aim: the ratio to reach; None for our arm, and if there is no aim.
    checkout: a folder with another version of this repository, whose code the process runs.
    """

    name: str
    build: Callable[..., Any]
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs: Sequence[str] = ()
    aim: float | None = None
    checkout: str = ""

    def missing(self) -> list[str]:
        """The packages and programs that it needs and that are not installed."""
        return [
            name
            for name in self.needs
            if importlib.util.find_spec(name) is None and shutil.which(name) is None
        ]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arms that compute the same.

    tolerance: the largest difference of any number in the outputs; None if outputs cannot be
      compared, and `unchecked` says why.
    relative: the tolerance is a share of the largest number of another arm's output.
    checked: the number of first calls whose outputs are compared; in a training step, the second
      depends on the first update.
    repeats: timed calls of an arm in each round; their median counts.
    fresh: every round starts a new process for each arm, and `build` returns the figure.
    unit: of the figures, "s" or "MiB".
    flops, bytes_moved: of one call, in all arms, for the shares of the ceilings.
    tokens: of one call, for tokens a second; None = they are not told.
    """

    title: str
    arms: Sequence[Arm]
    tolerance: float | None
    unchecked: str = ""
    relative: bool = False
    checked: int = 1
    repeats: int = 3
    fresh: bool = False
    unit: str = "s"
    flops: float | None = None
    bytes_moved: float | None = None
    tokens: int | None = None

    def between_versions(self, checkout: str) -> "list[Comparison]":
        """Each of our arms in this version and in that of another checkout."""
        return [
            dataclasses.replace(
                self,
                title=f"{self.title}: {arm.name}",
                arms=[arm, dataclasses.replace(arm, name="other version", checkout=checkout)],
            )
            for arm in (dataclasses.replace(arm, aim=None) for arm in self.arms if not arm.needs)
        ]
