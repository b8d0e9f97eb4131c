"""The page for a published language model: a conversation, or texts that it continues."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
import jax

from slam_jax.errors import UserError
from slam_jax.generation import ModelAndTokenizer, Request, Sampling, stream


def make_chat(loaded: ModelAndTokenizer) -> gr.Blocks:
    """The page; `slam_jax.demo.serving.serve` serves it."""
    count = sum(leaf.size for leaf in jax.tree.leaves(loaded.model))
    template = loaded.tokenizer.chat_template is not None
    about = "Ask it." if template else "It has no chat template: it continues what you write."
    numbers: list[Any] = [
        gr.Number(loaded.max_new_tokens, label="max tokens", elem_id="max_new_tokens"),
        gr.Number(0, label="temperature", step=0.1, elem_id="temperature"),
    ]
    return gr.ChatInterface(
        functools.partial(answer, loaded),
        additional_inputs=numbers,
        additional_inputs_accordion="Sampling",
        title="slam_jax",
        description=f"{count:,} parameters. {about}",
        analytics_enabled=False,
        api_visibility="private",
    )


def answer(
    loaded: ModelAndTokenizer,
    message: str,
    history: Sequence[Mapping[str, Any]],
    max_new_tokens: Any,
    temperature: Any,
) -> Iterator[str]:
    """Yields the answer so far; what is wrong with the question is in brackets.

    history: the earlier messages, each with a role and a content.
    """
    text = ""
    try:
        sampling = Sampling(max_new_tokens, temperature)
        if loaded.tokenizer.chat_template is None:
            request = Request(message)
        else:
            turns = [{"role": x["role"], "content": _text(x["content"])} for x in history]
            request = Request(messages=[*turns, {"role": "user", "content": message}])
        pieces = stream(loaded, request, sampling)
        for piece in pieces:
            text += piece
            yield text
        if pieces.finish == "length":
            yield f"{text} [cut: raise max tokens, under Sampling]"
    except UserError as error:
        yield f"{text} [{error}]"


def _text(content: Any) -> str:
    """The text of a message, which Gradio may give in parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))
