"""What the entry points share: flags are read, and what ends a program is told in one line."""

import contextlib
import logging as python_logging
import os
import signal
import sys
from collections.abc import Callable, Iterator

from absl import app, flags, logging

from slam_jax.errors import UserError, first_line
from slam_jax.stop import SAVED, Stopped, say


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the flags that are defined and calls `main` with the other arguments."""

    def parse(argv: list[str]) -> list[str]:
        with clear_ends():
            try:
                return flags.FLAGS(argv, known_only=True)
            except flags.Error as error:
                message = str(error).replace("\n", "; ")
                raise UserError(f"{message}; --help shows what may be given") from None

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        plain = python_logging.Formatter("warning: %(message)s")
        logging.get_absl_handler().setFormatter(plain)
        with clear_ends():
            main(argv[1:])

    app.run(guarded, flags_parser=parse)


@contextlib.contextmanager
def clear_ends() -> Iterator[None]:
    """Ends the program without a traceback where somebody can do something about it: exit code 2
    and one line for a UserError or a file that the system refuses, SAVED for a run that stopped as
    it was asked to, and the shell's own code for Ctrl-C and for a pipe that nobody reads."""
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    except Stopped as stopped:
        say(f"stopped: {stopped}")
        # All is on disk; threads that still read ahead are not waited for.
        os._exit(SAVED)
    except KeyboardInterrupt:
        say("interrupted")
        os._exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os._exit(128 + getattr(signal, "SIGPIPE", 13))
    except OSError as error:
        what = error.filename or "a file"
        say(f"error: {what}: {first_line(error)}; check the path, permissions and free space")
        sys.exit(2)
