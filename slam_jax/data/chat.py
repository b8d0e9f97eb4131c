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
    if len(template) > _LONGEST_TEMPLATE:
        raise InputError(f"chat template of {len(template):,} characters; at most 1,048,576")
    given = dict(variables or {}, messages=list(messages))
    given["add_generation_prompt"] = add_generation_prompt
    try:
        task = json.dumps({"template": template, "variables": given})
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages: {error}; expected texts, numbers, lists and dicts") from None
    # -P: the folder of the script is not searched for modules.
    command = [sys.executable, "-P", str(_WORKER)]
    try:
        done = subprocess.run(
            command, input=task.encode(), capture_output=True, timeout=_SECONDS, check=False
        )
        answer = json.loads(done.stdout) if done.stdout else {}
    except subprocess.TimeoutExpired:
        raise InputError(f"chat template: it runs for more than {_SECONDS} seconds") from None
    if "text" in answer:
        check_unicode(answer["text"], "what the chat template writes")
        return answer["text"]
    reason = answer.get("error", "it takes too much memory or time")
    raise InputError(f"chat template: {shorten(reason, 200)}")


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
