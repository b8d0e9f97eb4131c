"""A conversation on the page: with a language model, or about pictures with SLAM v3."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import jax

from slam_jax.errors import UserError
from slam_jax.generation import ModelAndTokenizer, Sampling
from slam_jax.serving import Engine
from slam_jax.serving.chat.conversation import Conversation


def make_chat(loaded: ModelAndTokenizer, engine: Engine) -> gr.Blocks:
    """The page of a language model; `slam_jax.demo.serving.serve` serves it."""
    count = sum(leaf.size for leaf in jax.tree.leaves(loaded.model))
    template = loaded.tokenizer.chat_template is not None
    about = "Ask it." if template else "It has no chat template: it continues what you write."
    numbers: list[Any] = [
        gr.Number(loaded.max_new_tokens, label="max tokens", elem_id="max_new_tokens"),
        gr.Number(0, label="temperature", step=0.1, elem_id="temperature"),
    ]
    return gr.ChatInterface(
        functools.partial(answer, loaded, engine),
        chatbot=_chatbot(),
        additional_inputs=numbers,
        additional_inputs_accordion="Sampling",
        title="slam_jax",
        description=f"{count:,} parameters. {about}",
        analytics_enabled=False,
        api_visibility="private",
    )


def add_picture_chat(loaded: Any, engine: Engine) -> None:
    """Adds a conversation about pictures to the page that is being made."""
    most = loaded.model.config.image.max_images
    text = gr.Textbox(label="Text to answer from beside the pictures", lines=2, render=False)
    gr.ChatInterface(
        functools.partial(answer_about_pictures, loaded, engine),
        chatbot=_chatbot(),
        multimodal=True,
        textbox=gr.MultimodalTextbox(
            file_types=["image"],
            file_count="single" if most == 1 else "multiple",
            sources=["upload"],
            elem_id="chat_question",
            render=False,
        ),
        description="Show a picture and ask about it. The next questions are about it, too.",
        additional_inputs=[text],
        additional_inputs_accordion="Text",
        api_visibility="private",
    )


def _chatbot() -> gr.Chatbot:
    """Without the button that would send a conversation to another machine."""
    return gr.Chatbot(label="Conversation", buttons=["copy"], height=400, render=False)


def answer(
    loaded: ModelAndTokenizer,
    engine: Engine,
    message: str,
    history: Sequence[Mapping[str, Any]],
    max_new_tokens: Any,
    temperature: Any,
) -> Iterator[Any]:
    """Yields the answer so far; a note beside it says what is wrong, and never goes to the model.

    history: the earlier messages, each with a role and a content. The oldest are left out where
    the context has no room for them.
    """
    try:
        sampling = Sampling(max_new_tokens, temperature)
        turns = _turns(history)
        limit = sampling.max_new_tokens or loaded.max_new_tokens
        talk = Conversation(loaded, engine.context, limit, turns=turns)
        yield from _stream(engine, talk, message, sampling)
    except UserError as error:
        yield _note(str(error))


def answer_about_pictures(
    loaded: Any,
    engine: Engine,
    message: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    text: str | None,
) -> Iterator[Any]:
    """Yields the answer so far, about the pictures that were shown last.

    message: its text, and the paths of its files. history: earlier messages, with files among their
    contents. text: what to answer from beside the pictures.
    """
    paths = _last_shown(message, history)
    try:
        talk = Conversation(loaded, engine.context, loaded.max_new_tokens, system=text or "")
        talk.show(paths)
        yield from _stream(engine, talk, message.get("text") or "", Sampling())
    except UserError as error:
        said = str(error)
        for path in paths:  # the visitor does not know where it is stored
            said = said.replace(path, Path(path).name)
        yield _note(said)


def _stream(engine: Engine, talk: Conversation, question: str, sampling: Sampling) -> Iterator[Any]:
    """Yields the answer so far; it stops where nobody waits for it any more."""
    text, ticket = "", engine.submit(talk.ask(question), sampling)
    try:
        for event in ticket:
            text += event.text
            yield text
            if event.finish == "length":
                yield [text, _note("cut: raise max tokens, under Sampling")]
            elif event.finish == "error":
                yield [text, _note(f"the answer failed: {event.error}")]
    finally:
        ticket.cancel()


def _note(text: str) -> gr.ChatMessage:
    """A message of the page, which has a title; those of the model have none."""
    return gr.ChatMessage(content="", metadata={"title": text})


def _turns(history: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What was asked and answered; notes, and questions that have only a note, are left out."""
    said = [x for x in history if not (x.get("metadata") or {}).get("title")]
    following = (x["role"] for x in said[1:])
    return [
        {"role": x["role"], "content": _text(x["content"])}
        for x, after in itertools.zip_longest(said, following)
        if x["role"] == "assistant" or after == "assistant"
    ]


def _last_shown(message: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The files of the last message that has some."""
    before = [_files(x["content"]) for x in reversed(history) if x["role"] == "user"]
    return next((found for found in [message.get("files") or [], *before] if found), [])


def _files(content: Any) -> list[str]:
    """The paths of the files of a message."""
    parts = content if isinstance(content, list) else [content]
    found = [part.get("file", part) for part in parts if isinstance(part, Mapping)]
    return [part["path"] for part in found if "path" in part]


def _text(content: Any) -> str:
    """The text of a message, which Gradio may give in parts."""
    parts = content if isinstance(content, list) else [content]
    return "".join(x.get("text", "") if isinstance(x, Mapping) else x for x in parts)
