"""Stop strings as a table that the decode loop looks up, token by token.

A text can be cut into tokens in many ways, and a token may end a stop string and go on. So the
strings are sought in bytes, by the automaton of Aho and Corasick 1975, "Efficient string matching",
whose moves are then put together to moves of whole tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

_LEAST_STATES = 16


def stop_table(stops: Sequence[str], tokens: Sequence[bytes]) -> Int[np.ndarray, "states V"]:
    """Where a token leads from each state: 0 is the start, the last state that a stop was found.

    tokens: the bytes of every token. The number of states is a power of two, so that stops of like
    length make tables of one shape; without stops nothing is ever found.
    """
    moves = _byte_automaton([stop.encode() for stop in stops])
    state = np.arange(len(moves))
    table = np.stack([_run(moves, state, token) for token in tokens], axis=1)
    return table.astype(np.int32)


def _run(moves: Any, state: Any, token: bytes) -> Any:
    for byte in token:
        state = moves[state, byte]
    return state


def _byte_automaton(stops: Sequence[bytes]) -> Int[np.ndarray, "states 256"]:
    children: list[dict[int, int]] = [{}]
    found_at = set()
    for stop in stops:
        node = 0
        for byte in stop:
            if byte not in children[node]:
                children.append({})
                children[node][byte] = len(children) - 1
            node = children[node][byte]
        found_at.add(node)
    size = _LEAST_STATES
    while size < len(children) + 1:
        size *= 2
    found = size - 1
    moves = np.zeros((size, 256), np.int64)
    shorter = [0] * len(children)  # the longest other beginning that a node's text ends with
    queue = [0]
    for node in queue:
        if node:
            moves[node] = moves[shorter[node]]
        for byte, child in children[node].items():
            shorter[child] = int(moves[node, byte]) if node else 0
            if shorter[child] in found_at:
                found_at.add(child)
            moves[node, byte] = child
            queue.append(child)
    moves[np.isin(moves, list(found_at))] = found
    moves[found] = found
    return moves


def cut(text: bytes, stops: Sequence[str]) -> tuple[bytes, bool]:
    """The text before the first stop string, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop.encode())) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def settled(text: bytes, stops: Sequence[str]) -> int:
    """How many bytes of an unfinished text are no part of a stop string, whatever follows."""
    longest = 0
    for stop in (stop.encode() for stop in stops):
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return len(text) - longest
