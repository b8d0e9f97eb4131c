"""The model that a server offers."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from slam_jax.serving.server.limits import Limits


@dataclasses.dataclass(frozen=True)
class Served:
    """A loaded model, its name for clients, and the tokens of a prompt and its answer."""

    loaded: Any
    name: str
    context: int
    limits: Limits = dataclasses.field(default_factory=Limits)

    @property
    def reads_inputs(self) -> bool:
        """Whether the model reads pictures, texts and vectors beside the prompt."""
        return hasattr(self.loaded.model, "encode")

    @property
    def has_template(self) -> bool:
        """Whether conversations go through a chat template."""
        return not self.reads_inputs and self.loaded.tokenizer.chat_template is not None

    @property
    def most_bytes(self) -> int:
        """The largest body of a request."""
        return self.limits.body if self.reads_inputs else self.limits.text_body

    @functools.cached_property
    def tokens(self) -> Mapping[int, str]:
        """The tokens by id, as the tokenizer's library writes them."""
        return {i: token for token, i in self.loaded.tokenizer.ids_by_token.items()}
