"""What all commands share: they parse flags and report errors in one line."""

import contextlib
import io
import logging as python_logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags, logging

from slam_jax.errors import UserError, first_line
from slam_jax.runtime.signals import INTACT, RESUME_ALL, SAVED, PeerLost, Stopped, print_line


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses the defined flags and calls `main` with the remaining arguments. Its result, if any,
    is the exit code."""
    prepare_process()

    def parse(argv: list[str]) -> list[str]:
        with exit_on_error():
            try:
                return flags.FLAGS(argv, known_only=True)
            except flags.Error as error:
                message = str(error).replace("\n", "; ")
                raise UserError(f"{message}; --help lists the flags") from None

    def guarded(argv: list[str]) -> int | None:
        with exit_on_error():
            return main(argv[1:])

    app.run(guarded, flags_parser=parse)


def refuse(arguments: list[str]) -> None:
    """Raises UserError where a command that has only flags got something else."""
    if arguments:
        raise UserError(f"unknown argument {arguments[0]!r}; --help shows what may be given")


def prepare_process() -> None:
    """Repairs the standard streams and the locale, and sets up warnings. Call it first.

    Where the locale is not UTF-8, Python and the libraries below it encode file names differently;
    the process then restarts itself in UTF-8 mode.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # it is closed: the next opened file would receive what is printed
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    # Bytes that are no letters, and letters that the stream does not have, end no command.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors=errors)
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().setFormatter(python_logging.Formatter("warning: %(message)s"))
    # After a failed read or write Orbax leaves asyncio tasks behind, which log tracebacks.
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    sys.unraisablehook = _ignore_closed_event_loop
    if sys.getfilesystemencoding() != "utf-8":
        streams = f"{getattr(sys.stdout, 'encoding', 'ascii')}:replace"
        environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": streams}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _ignore_closed_event_loop(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends the process with one line and an exit code instead of a traceback.

    The code is 2 for a UserError or an OSError, SAVED for `Stopped`, INTACT for `PeerLost`, and
    that of the shell for Ctrl-C and for a closed pipe. Other errors keep their traceback.
    """
    try:
        yield
        print(end="", flush=True)
    except UserError as error:
        print_line(f"error: {error}")
        sys.exit(2)
    except Stopped as stopped:
        print_line(f"stopped: {stopped}")
        os._exit(SAVED)  # all is on disk; do not wait for threads that still read ahead
    except PeerLost as lost:
        print_line(f"stopped: {lost}; {RESUME_ALL}")
        os._exit(INTACT)  # JAX would wait for the lost process
    except KeyboardInterrupt:
        print_line("interrupted")
        os._exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os._exit(128 + getattr(signal, "SIGPIPE", 13))
    except OSError as error:
        what = f"{error.filename or 'a file'}: {first_line(error)}"
        print_line(f"error: {what}; check the path, permissions and free space")
        sys.exit(2)
