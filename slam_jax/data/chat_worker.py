"""Renders one chat template in a process of its own, with limits; see `chat.py`.

Reads {"template": .., "variables": ..} from stdin, and writes {"text": ..} or {"error": ..}.
"""

import datetime
import json
import sys
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LONGEST_TEXT = 1 << 22  # characters
_BYTES, _SECONDS = 1 << 29, 10


def _limit() -> None:
    try:
        import resource
    except ImportError:  # not on Windows; the caller stops the process after its time
        return
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _refuse(message: Any) -> None:
    raise TemplateError(str(message))


def _to_json(value: Any, indent: int | None = None, **others: Any) -> str:
    """JSON with its letters as they are; Jinja's own filter escapes those of HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def render(template: str, variables: dict[str, Any]) -> str:
    """The settings are those of transformers, for which templates are written."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    pieces, length = [], 0
    for piece in environment.from_string(template).generate(**variables):
        length += len(piece)
        if length > _LONGEST_TEXT:
            raise TemplateError(f"its text has more than {_LONGEST_TEXT:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def main() -> None:
    _limit()
    task = json.loads(sys.stdin.read())
    try:
        answer = {"text": render(task["template"], task["variables"])}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except Exception as error:  # whatever a template raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        answer = {"error": reason}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
