"""A conversation with a model on this machine, kept within its context."""

import dataclasses
from pathlib import Path
from typing import Any

from slam_jax.data.images import check_image
from slam_jax.errors import InputError
from slam_jax.generation import Request


@dataclasses.dataclass
class Conversation:
    """What was said and shown, and the request of the next question.

    A language model with a chat template is asked in turns; without one it continues each text
    alone. SLAM v3 answers each question alone, about the pictures, the numbers and the system text
    that are shown at the time.

    context: tokens of a prompt and its answer. answer: tokens that are left for the answer.
    dropped: how many messages, the oldest, the last question had no room for. They are forgotten
    once it is answered.
    """

    loaded: Any
    context: int
    answer: int
    system: str = ""
    seed: int = 0
    turns: list[dict[str, str]] = dataclasses.field(default_factory=list)
    images: list[Path] = dataclasses.field(default_factory=list)
    aux: Any = None
    dropped: int = 0

    @property
    def reads_inputs(self) -> bool:
        """Whether the model reads pictures and numbers, as SLAM v3 does."""
        return hasattr(self.loaded.model, "encode")

    @property
    def has_turns(self) -> bool:
        """Whether the model is told what was said before."""
        return not self.reads_inputs and self.loaded.tokenizer.chat_template is not None

    def ask(self, text: str) -> Request:
        """The request of a question; the oldest turns are dropped where they have no room.

        Raises InputError where the question cannot be put into words of the template.
        """
        if self.reads_inputs:
            return Request(text, self.system or None, self.images or None, self.aux, self.seed)
        if not self.has_turns:
            return Request(text, seed=self.seed)
        asked = {"role": "user", "content": text}
        room = self.context - min(self.answer, self.context // 2)
        kept = self.turns
        while kept and self._length([*kept, asked]) > room:
            kept = kept[2:]  # a question goes with its answer: templates want them in turn
        self.dropped = len(self.turns) - len(kept)
        return Request(seed=self.seed, messages=self._with_system([*kept, asked]))

    def add(self, question: str, answer: str) -> None:
        """Remembers a question and its answer; the next answer has the next seed."""
        self.seed = (self.seed + 1) % 2**32
        del self.turns[: self.dropped]
        self.dropped = 0
        messages = (("user", question), ("assistant", answer))
        self.turns += [{"role": role, "content": text} for role, text in messages]

    def show(self, paths: list[str]) -> None:
        """Shows these pictures from now on, none if there is none; raises InputError for a file
        that is no picture."""
        if paths and not self.reads_inputs:
            raise InputError("this model reads texts alone")
        for path in paths:
            check_image(path)
        self.images = [Path(path) for path in paths]

    def clear(self) -> None:
        """Forgets what was said and shown, but not the system text."""
        self.turns, self.images, self.aux, self.dropped = [], [], None, 0

    def to_json(self, model: str) -> dict[str, Any]:
        """The conversation in the form of requests of OpenAI's protocol."""
        return {"model": model, "seed": self.seed, "messages": self._with_system(self.turns)}

    def _with_system(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *turns]

    def _length(self, turns: list[dict[str, str]]) -> int:
        return len(self.loaded.tokenizer.encode_chat(self._with_system(turns)))
