"""Renders one chat template in a process of its own, with limits; see `chat.py`.

Reads {"template": .., "variables": [..], "date": ..} from stdin, and writes a list that has
{"text": ..} or {"error": ..} for each of the variables.
"""

import datetime
import json
import sys
from typing import Any

from jinja2 import Template, TemplateError
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


def compile_template(template: str, date: str | None) -> Template:
    """The settings are those of transformers, for which templates are written.

    date: what `strftime_now` formats; None = now.
    """
    now = datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = now.strftime
    return environment.from_string(template)


def render(template: Template, variables: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in template.generate(**variables):
        length += len(piece)
        if length > _LONGEST_TEXT:
            raise TemplateError(f"its text has more than {_LONGEST_TEXT:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def main() -> None:
    _limit()
    task = json.loads(sys.stdin.read())
    template, answers = None, []
    for variables in task["variables"]:
        try:
            template = template or compile_template(task["template"], task["date"])
            answers.append({"text": render(template, variables)})
        except MemoryError:
            answers.append({"error": "it takes too much memory"})
        except Exception as error:  # whatever a template raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            answers.append({"error": reason})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
