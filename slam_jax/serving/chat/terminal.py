"""The loop of a chat: reads lines, carries out commands, prints answers as they come."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slam_jax.data.numbers import read_numbers
from slam_jax.errors import InputError, UserError, shorten, write_whole

_MOST_LINES = 1000  # of the history
_HELP = """\
/system TEXT   the system message from now on; for SLAM v3 the text to answer from
/seed N        the seed of the next answer
/clear         forget what was said and shown
/save FILE     write the conversation as JSON
/help          this list
//TEXT         ask something that begins with a slash
Ctrl-C stops an answer; Ctrl-D ends the chat"""
_HELP_INPUTS = """\
/image FILE..  pictures to answer from; without a file, none
/aux FILE      a .json or .csv file with numbers to answer from; without a file, none"""


class Chat:
    """The loop of a chat: reads lines, prints answers."""

    def __init__(self, engine: Any, talk: Any, sampling: Any, name: str):
        self._engine, self._talk, self._sampling, self._name = engine, talk, sampling, name
        self._saved: set[Path] = set()
        self._warned = False
        self._commands: dict[str, Callable[[str], str]] = {
            "help": self._help,
            "system": self._set_system,
            "seed": self._set_seed,
            "clear": self._clear,
            "save": self._save,
        }
        if talk.reads_inputs:
            self._commands |= {"image": self._show, "aux": self._give}

    def run(self) -> None:
        """Until the end of the input."""
        asks = sys.stdin.isatty()
        if asks:
            print(f"{self._name}: /help lists the commands, Ctrl-D ends", file=sys.stderr)
        with _history() if asks else contextlib.nullcontext():
            while (line := _read_line("> " if asks else "")) is not None:
                if line.strip():
                    self._take(line.strip())

    def command(self, name: str, rest: str) -> str:
        """Carries out a command; returns what to say. Raises UserError where it cannot."""
        if name not in self._commands:
            raise InputError(f"there is no command /{name}; /help lists them")
        return self._commands[name](rest)

    def _take(self, line: str) -> None:
        """Answers a line: a command or a question."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                name, _, rest = line[1:].partition(" ")
                if said := self.command(name, rest.strip()):
                    print(said, flush=True)
            else:
                self._ask(line.removeprefix("/") if line.startswith("//") else line)
        except UserError as error:
            _note(str(error))
        except BrokenPipeError:  # whoever read the answers is gone
            raise
        except OSError as error:
            _note(f"{error.filename}: {error.strerror}")
        except KeyboardInterrupt:  # before the answer began
            _note("stopped")

    def _ask(self, question: str) -> None:
        request = self._talk.ask(question)
        text, finish = self._print_answer(request)
        print(flush=True)
        if self._talk.dropped and not self._warned:
            self._warned = True
            _note("the conversation is longer than the context; the oldest messages are dropped")
        if finish == "length":
            _note("cut at the limit of tokens; --max_new_tokens raises it")
        if finish == "error":
            raise InputError(f"the answer failed: {text}")
        if text:
            self._talk.add(question, text)

    def _print_answer(self, request: Any) -> tuple[str, str | None]:
        """Prints the answer as it comes; returns its text, and why it ended.

        Ctrl-C ends it; the text is then what was printed.
        """
        ticket, text = None, ""
        try:
            ticket = self._engine.submit(request, self._sampling)
            for event in ticket:
                if event.finish == "error":
                    return event.error or "", "error"
                text += event.text
                print(_printable(event.text), end="", flush=True)
                if event.finish is not None:
                    return text, event.finish
        except KeyboardInterrupt:
            if ticket is not None:
                ticket.cancel()
            _note("stopped", before="\n" if text else "")
        return text, None

    def _help(self, rest: str) -> str:
        return f"{_HELP_INPUTS}\n{_HELP}" if self._talk.reads_inputs else _HELP

    def _set_system(self, rest: str) -> str:
        if not self._talk.reads_inputs and not self._talk.has_turns:
            raise InputError("this model has no chat template; it continues what you write")
        self._talk.system = rest
        return ""

    def _set_seed(self, rest: str) -> str:
        # Python reads no number of thousands of digits.
        if not rest.isdecimal() or len(rest) > 10 or int(rest) >= 2**32:
            expected = f"a whole number from 0 to {2**32 - 1}"
            raise InputError(f"/seed {shorten(rest, 40)}: expected {expected}")
        self._talk.seed = int(rest)
        return ""

    def _show(self, rest: str) -> str:
        try:
            paths = shlex.split(rest)
        except ValueError:
            raise InputError("/image: a quotation mark is open") from None
        self._talk.show([os.path.expanduser(path) for path in paths])
        return ""

    def _give(self, rest: str) -> str:
        self._talk.aux = read_numbers(os.path.expanduser(rest)) if rest else None
        return ""

    def _clear(self, rest: str) -> str:
        self._talk.clear()
        self._warned = False
        return ""

    def _save(self, rest: str) -> str:
        # Path.expanduser fails where there is no such user.
        path = Path(os.path.expanduser(rest))
        if not rest or "\0" in rest:
            raise InputError("/save: expected a file")
        if path.exists() and path.resolve() not in self._saved:
            raise InputError(f"{path} is there already; give another name")
        write_whole(path, json.dumps(self._talk.to_json(self._name), indent=1, ensure_ascii=False))
        self._saved.add(path.resolve())
        return f"written to {path}"


def _read_line(prompt: str) -> str | None:
    """The next line, None at the end of the input. Ctrl-C leaves a line that is being written."""
    while True:
        try:
            return input(prompt)
        except EOFError:
            if prompt:
                print()
            return None
        except KeyboardInterrupt:
            if not prompt:
                raise
            _note("Ctrl-D ends the chat", before="\n")


def _printable(text: str) -> str:
    """The text without letters that steer a terminal, where it goes to one."""
    if not sys.stdout.isatty():
        return text
    return "".join(x if x.isprintable() or x in "\n\t" else "\ufffd" for x in text)


def _note(text: str, before: str = "") -> None:
    print(f"{before}[{text}]", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Lines of earlier chats, for the arrow keys; kept for this user alone."""
    try:
        import readline
    except ImportError:  # not on Windows
        yield
        return
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(home) / "slam_jax" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_MOST_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
