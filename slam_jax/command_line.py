"""What the entry points share: flags are read and errors told in one line, with exit code 2."""

from collections.abc import Callable

from absl import app, flags, logging

from slam_jax.errors import UserError, clear_errors


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the flags that are defined and calls `main` with the other arguments."""

    def parse(argv: list[str]) -> list[str]:
        with clear_errors():
            try:
                return flags.FLAGS(argv, known_only=True)
            except flags.Error as error:
                message = str(error).replace("\n", "; ")
                raise UserError(f"{message}; --help shows what may be given") from None

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        with clear_errors():
            main(argv[1:])

    app.run(guarded, flags_parser=parse)
