"""Renders chat templates: Jinja templates of a publisher, which turn messages into one text.

A template is code from a file that somebody else wrote. It is rendered in a process of its own, by
Jinja's sandbox, which gives it no access to files or to Python's objects. Time, memory and the
length of the text are limited.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slam_jax.data.tokenizer import check_unicode
from slam_jax.errors import InputError, shorten

_WORKER = Path(__file__).with_name("chat_worker.py")
_SECONDS = 10
_LONGEST_TEMPLATE = 1 << 20  # characters
_BATCH = 256  # conversations of a process
_MOST_FAILED = 10  # processes that end without an answer


def render_chat(
    template: str,
    messages: Any,
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation.

    messages: each has a "role", such as "system", "user" or "assistant", and a "content".
    add_generation_prompt: the text ends where the assistant's next answer begins. variables: more
    names that the template may use, such as `bos_token` or `tools`.

    Raises InputError where the messages have another form, the template is wrong or refuses them,
    or it takes too much time or memory.
    """
    check_messages(messages)
    [text] = render_chats(
        template, [messages], add_generation_prompt=add_generation_prompt, variables=variables
    )
    if isinstance(text, InputError):
        raise text
    return text


def render_chats(
    template: str,
    conversations: Sequence[Any],
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> list[str | InputError]:
    """The text of each conversation, or why there is none; many are rendered by one process.

    The other arguments are those of `render_chat`. date: what `strftime_now` formats, such as
    "2024-07-26"; None = now.

    Raises InputError where the template is too long, or takes too much time or memory for several
    conversations.
    """
    if len(template) > _LONGEST_TEMPLATE:
        raise InputError(f"chat template of {len(template):,} characters; at most 1,048,576")
    given = dict(variables or {}, add_generation_prompt=add_generation_prompt)
    found: list[str | InputError] = []
    failed = 0
    for start in range(0, len(conversations), _BATCH):
        tasks = [{**given, "messages": list(x)} for x in conversations[start : start + _BATCH]]
        try:
            found += _render(template, tasks, date)
        except InputError:  # one of them stops the process: each gets a process of its own
            for task in tasks:
                try:
                    found += _render(template, [task], date)
                except InputError as error:
                    found.append(error)
                    failed += 1
                    if failed > _MOST_FAILED:
                        raise
    return found


def _render(
    template: str, tasks: Sequence[Mapping[str, Any]], date: str | None
) -> list[str | InputError]:
    """Raises InputError where the process fails for all."""
    try:
        task = json.dumps({"template": template, "variables": tasks, "date": date})
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages: {error}; expected texts, numbers, lists and dicts") from None
    # -P: the folder of the script is not searched for modules.
    command = [sys.executable, "-P", str(_WORKER)]
    try:
        done = subprocess.run(
            command, input=task.encode(), capture_output=True, timeout=_SECONDS, check=False
        )
        answers = json.loads(done.stdout) if done.stdout else []
    except subprocess.TimeoutExpired:
        raise InputError(f"chat template: it runs for more than {_SECONDS} seconds") from None
    if len(answers) != len(tasks):
        raise InputError("chat template: it takes too much memory or time")
    return [_text_of(answer) for answer in answers]


def _text_of(answer: Mapping[str, str]) -> str | InputError:
    if "text" not in answer:
        return InputError(f"chat template: {shorten(answer['error'], 200)}")
    try:
        check_unicode(answer["text"], "what the chat template writes")
    except InputError as error:
        return error
    return answer["text"]


def check_messages(messages: Any) -> None:
    """Raises InputError unless these are messages with a role each."""
    is_list = isinstance(messages, Sequence) and not isinstance(messages, (str, bytes))
    if not is_list or not messages:
        raise InputError("messages: expected a list of at least one {'role': .., 'content': ..}")
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str):
            shown = shorten(repr(message), 60)
            raise InputError(f"message {i} is {shown}; expected {{'role': .., 'content': ..}}")
