"""Stop strings as a table that the decode loop looks up, token by token.

A text can be cut into tokens in many ways, and a token may begin before and end after the end of a
stop string. So the strings are searched for in bytes, by the automaton of Aho and Corasick 1975,
"Efficient string matching". Its moves by single bytes are then combined into moves by tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from slam_jax.generation.decode import bucket

_LEAST_STATES = 16


@functools.lru_cache(maxsize=64)
def stop_table(stops: tuple[str, ...], tokenizer: Any) -> Int[np.ndarray, "states V"]:
    """The next state for each state and token. State 0 is the start; the last state means that a
    stop string has been found.

    The number of states is a power of two, so that stop strings of similar lengths share a shape.
    """
    moves = _byte_automaton([stop.encode() for stop in stops])
    table = np.empty((len(moves), tokenizer.vocab_size), np.int32)
    for token, text in enumerate(tokenizer.token_bytes):
        state = np.arange(len(moves))
        for byte in text:
            state = moves[state, byte]
        table[:, token] = state
    return table


def _byte_automaton(stops: Sequence[bytes]) -> Int[np.ndarray, "states 256"]:
    """A state is the longest beginning of a stop string that the text so far ends with."""
    beginnings = {stop[:length] for stop in stops for length in range(len(stop) + 1)}
    states = {text: state for state, text in enumerate(sorted(beginnings, key=len))}
    found = bucket(len(states) + 1, _LEAST_STATES) - 1
    moves = np.zeros((found + 1, 256), np.int64)
    complete = set()
    for text, state in states.items():
        # What does not continue this beginning may continue a shorter one that the text ends with.
        suffixes = (text[start:] for start in range(1, len(text) + 1))
        shorter = next((states[suffix] for suffix in suffixes if suffix in states), 0)
        moves[state] = moves[shorter]
        for byte in range(256):
            if (longer := text + bytes([byte])) in states:
                moves[state, byte] = states[longer]
        if text in stops or shorter in complete:
            complete.add(state)
    moves[np.isin(moves, list(complete))] = found
    moves[found] = found
    return moves


def cut(text: bytes, stops: Sequence[str]) -> tuple[bytes, bool]:
    """The text before the first stop string, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop.encode())) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def settled(text: bytes, stops: Sequence[str]) -> int:
    """How many bytes of an unfinished text cannot become part of a stop string."""
    encoded = [stop.encode() for stop in stops]  # once: of 1,000 letters it takes a while
    beginnings = (stop[:length] for stop in encoded for length in range(1, len(stop)))
    return len(text) - max((len(each) for each in beginnings if text.endswith(each)), default=0)
