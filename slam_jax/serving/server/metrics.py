"""Counts and times of the server, in the text form of Prometheus (version 0.0.4)."""

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How many of some times are below each of a few bounds."""

    def __init__(self, bounds: Sequence[float] = _SECONDS):
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        bounds = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        for bound, count in zip(bounds, self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counts of requests, the state of the engine, and times. Used in the event loop alone."""

    def __init__(self):
        self.responses: Counter[tuple[str, int]] = Counter()
        self.first_token, self.answer = Histogram(), Histogram()

    def to_text(self, engine: Any) -> str:
        """All metrics; `engine` is the `Stats` of the engine."""
        lines: list[str] = []

        def add(name: str, kind: str, about: str, values: Mapping[str, Any]) -> None:
            lines.extend((f"# HELP slam_jax_{name} {about}", f"# TYPE slam_jax_{name} {kind}"))
            lines.extend(f"slam_jax_{name}{labels} {value}" for labels, value in values.items())

        for name, about in _GAUGES.items():
            add(name, "gauge", about, {"": getattr(engine, name)})
        for name, about in _COUNTERS.items():
            add(f"{name}_total", "counter", about, {"": getattr(engine, name)})
        ended = {f'{{finish="{how}"}}': count for how, count in engine.requests.items()}
        add("requests_total", "counter", "Requests of the engine that have ended.", ended)
        responses = {
            f'{{path="{path}",status="{status}"}}': count
            for (path, status), count in sorted(self.responses.items())
        }
        add("responses_total", "counter", "HTTP responses by path and status.", responses)
        times = (
            ("first_token_seconds", "From a request's head to its first token.", self.first_token),
            ("answer_seconds", "From a request's head to the end of its answer.", self.answer),
        )
        for name, about, histogram in times:
            add(name, "histogram", about, {})
            lines.extend(histogram.lines(f"slam_jax_{name}"))
        return "\n".join(lines) + "\n"


_GAUGES = {
    "slots": "Answers that can be computed at once.",
    "active": "Slots in use.",
    "waiting": "Requests that wait for a slot.",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "reused_prompt_tokens": "Tokens of prompts that came from the prompt cache.",
    "new_tokens": "Tokens of answers.",
    "encodes": "Inputs that were encoded.",
    "reused_encodes": "Inputs that had been encoded before.",
}
