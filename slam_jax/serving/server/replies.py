"""Answers of the engine in the forms of OpenAI's protocol, whole or in pieces."""

import codecs
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from slam_jax.serving import Event, Ticket
from slam_jax.serving.server.calls import Call
from slam_jax.serving.server.refusals import to_bytes
from slam_jax.serving.server.served import Served

_PART = "bytes:"  # begins the name of a token that is a part of a letter
_FINISHES = {"end": "stop", "stop": "stop", "length": "length", "timeout": "length"}
"""Why an answer ended; one that took too long was cut like one of too many tokens."""


class Choice:
    """One answer as it comes: the text and the tokens so far."""

    def __init__(self, index: int, call: Call, served: Served):
        self.index, self.finish = index, None
        self.text, self.num_tokens = "", 0
        self._call, self._served = call, served
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # of the next token, in letters
        self._logprobs: list[dict[str, Any]] = []

    def add(self, event: Event) -> dict[str, Any]:
        """Takes the next event; returns the choice of a streamed piece of it."""
        began = self.text == "" and self.num_tokens == 0
        self.text += event.text
        self.num_tokens += len(event.tokens)
        finish = None if event.finish is None else _FINISHES[event.finish]
        self.finish = finish
        new = [] if self._call.num_top is None else list(self._describe(event))
        self._logprobs += new
        delta = {"role": "assistant"} if began else {}
        if event.text or began:
            delta["content"] = event.text
        body = {"delta": delta} if self._call.chat else {"text": event.text}
        return self._choice(body, new, finish)

    def whole(self) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        message = {"role": "assistant", "content": self.text, "refusal": None}
        body = {"message": message} if self._call.chat else {"text": self.text}
        return self._choice(body, self._logprobs, self.finish)

    def _choice(
        self, body: dict[str, Any], described: list[dict[str, Any]], finish: str | None
    ) -> dict[str, Any]:
        logprobs: Any = None
        if self._call.num_top is not None and self._call.chat:
            kept = [{k: v for k, v in each.items() if k != "text_offset"} for each in described]
            logprobs = {"content": kept, "refusal": None}
        elif self._call.num_top is not None:
            logprobs = _of_completion(described)
        return {"index": self.index, **body, "logprobs": logprobs, "finish_reason": finish}

    def _describe(self, event: Event) -> Iterator[dict[str, Any]]:
        """Each token with its log-probability and alternatives, as chats have it."""
        tops = event.top or ((),) * len(event.tokens)
        for token, logprob, top in zip(event.tokens, event.logprobs, tops, strict=True):
            offset, (text, data) = self._offset, spell(self._served, token)
            self._offset += len(self._decoder.decode(data))
            if data and not text.startswith(_PART):  # what came before it ended in no letter
                offset = self._offset - len(text)
            alternatives = [
                {"token": name, "logprob": _finite(value), "bytes": list(raw)}
                for (name, raw), value in ((spell(self._served, i), v) for i, v in top)
            ]
            yield {
                "token": text,
                "logprob": _finite(logprob),
                "bytes": list(data),
                "top_logprobs": alternatives,
                "text_offset": offset,
            }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's API reference has -9999 for tokens that cannot come."""
    return max(logprob, -9999.0)


def spell(served: Served, token: int) -> tuple[str, bytes]:
    """A token as clients see it, and the bytes that it adds to the text.

    A token that is a part of a letter is written as its bytes, such as "bytes:\\xe2", and one that
    adds nothing, such as an end, by its name.
    """
    pieces = served.loaded.tokenizer.token_bytes
    data = pieces[token] if 0 <= token < len(pieces) else b""
    if not data:
        return served.tokens.get(token, ""), data
    try:
        return data.decode(), data
    except UnicodeDecodeError:
        return _PART + "".join(f"\\x{byte:02x}" for byte in data), data


def _of_completion(described: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tokens and log-probabilities as completions have them."""
    return {
        "tokens": [each["token"] for each in described],
        "token_logprobs": [each["logprob"] for each in described],
        "top_logprobs": [
            {other["token"]: other["logprob"] for other in each["top_logprobs"]}
            for each in described
        ],
        "text_offset": [each["text_offset"] for each in described],
    }


class Reply:
    """The reply to a call: one body, or pieces of a stream."""

    def __init__(self, call: Call, served: Served, tickets: Sequence[Ticket]):
        self._call, self._tickets = call, tickets
        count = call.sampling.num_samples * len(call.requests)
        self.choices = [Choice(i, call, served) for i in range(count)]
        kind = "chat.completion" if call.chat else "text_completion"
        prefix = "chatcmpl" if call.chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind + ".chunk" * (call.chat and call.stream),
            "created": int(time.time()),
            "model": served.name,
        }

    def add(self, prompt: int, event: Event) -> dict[str, Any] | None:
        """Takes an event of a prompt; returns the piece to stream, None where it shows nothing."""
        choice = self.choices[prompt * self._call.sampling.num_samples + event.sample]
        piece = choice.add(event)
        shown = event.text or event.finish or (event.tokens and self._call.num_top is not None)
        if not shown and not piece.get("delta"):
            return None
        usage = {"usage": None} if self._call.include_usage else {}
        return {**self._head, "choices": [piece], **usage}

    @property
    def done(self) -> bool:
        return all(choice.finish is not None for choice in self.choices)

    def whole(self) -> dict[str, Any]:
        choices = [choice.whole() for choice in self.choices]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def last(self) -> dict[str, Any] | None:
        """The piece with the numbers of tokens, where the client asked for it."""
        if not self._call.include_usage:
            return None
        return {**self._head, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        new = sum(choice.num_tokens for choice in self.choices)
        old = sum(ticket.prompt_tokens for ticket in self._tickets)
        reused = sum(ticket.reused_prompt_tokens for ticket in self._tickets)
        numbers = {"prompt_tokens": old, "completion_tokens": new, "total_tokens": old + new}
        return {**numbers, "prompt_tokens_details": {"cached_tokens": reused}}


def server_sent(piece: dict[str, Any]) -> bytes:
    """A piece as an event of a stream (HTML standard, "Server-sent events")."""
    return b"data: " + to_bytes(piece) + b"\n\n"
