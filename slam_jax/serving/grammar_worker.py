"""Compiles one grammar in a process of its own, with limits; see `constraints.py`.

Reads a grammar of llguidance from stdin, and writes why it cannot be used, or nothing.
"""

import sys
import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_BYTES, SECONDS = 1 << 28, 2
# Half of what threads have on Linux, so that what compiles here does not overflow elsewhere.
_STACK_BYTES = 1 << 22


def limits() -> LLParserLimits:
    """What one grammar may take: about 10 ms a mask, and 40 MB of lexer states."""
    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=50_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def _limit() -> None:
    try:
        import resource
    except ImportError:  # not on Windows; the caller stops the process after its time
        return
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _compile(grammar: str) -> None:
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    sys.stdout.write(matcher.get_error())


def main() -> None:
    _limit()
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_compile, args=(sys.stdin.read(),))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
