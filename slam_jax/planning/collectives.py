"""What the devices send each other in a compiled program, read from its text."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

_OPS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) (\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?[\w.-]+ = (?P<kind>.*?) (?P<op>[a-z-]+)\(")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
# Groups of devices: written out, as a transposed range, or as axes of a mesh of XLA's own.
_WRITTEN = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_ORDER = r"\[[\d,]+\](?:T\([\d,]+\))?"
_RANGE = re.compile(rf"replica_groups=(\[[\d,]+\])<=({_ORDER})")
_MESH = re.compile(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(({_ORDER})\))? \{{([^}}:]*)\}}"
)


class Collective(NamedTuple):
    """axes: of the mesh, along which devices exchange. num_bytes: of
    what the operation gives each device, for a reduce-scatter of what it takes. count: how often
    it runs; a loop of an unknown number of rounds counts once.

    name: what the program calls it, which says what part of the source it is from.
    """

    op: str
    axes: tuple[str, ...]
    num_bytes: int
    count: int
    name: str


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of one run of a compiled program, such as `compiled.as_text()`.

    mesh: axis -> size, in the order of the mesh. Of the branches of a conditional the one that
    sends the most counts. Raises ValueError for groups of devices that it cannot read.
    """
    computations, entry = _computations(text)
    return list(_walk(entry, computations, mesh, 1))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations, entry, name = {}, "", ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found["name"]
            computations[name] = []
            entry = name if found["entry"] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def _walk(name: str, computations, mesh: Mapping[str, int], count: int) -> Iterator[Collective]:
    for line in computations.get(name, ()):
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        op = found["op"].removesuffix("-start")
        if op in _OPS:
            axes, size = _axes(line, mesh)
            num_bytes = _num_bytes(found["kind"]) * (size if op == "reduce-scatter" else 1)
            source = re.search(r'op_name="([^"]*)"', line)
            yield Collective(op, axes, num_bytes, count, source[1] if source else "")
            continue
        if op.endswith("-done"):
            continue
        trips = _TRIPS.search(line)
        rounds = count * int(trips[1]) if trips and op == "while" else count
        for called in _CALLED.findall(line):
            yield from _walk(called, computations, mesh, rounds)
        if branches := _BRANCHES.search(line):
            names = [each.strip().lstrip("%") for each in branches[1].split(",")]
            found_in = [list(_walk(each, computations, mesh, count)) for each in names]
            yield from max(found_in, key=lambda those: sum(c.num_bytes * c.count for c in those))


def _num_bytes(kind: str) -> int:
    """Of an array, or of all arrays of a tuple."""
    total = 0
    for name, bits, shape in _ARRAY.findall(kind):
        size = math.prod(int(n) for n in shape.split(",") if n)
        total += size if name == "pred" else size * int(bits) // 8
    return total


def _axes(line: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The axes along which the devices of a group differ, and how many devices are in it."""
    group = _first_group(line, math.prod(mesh.values()))
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    pairs = zip(mesh, places, strict=True)
    return tuple(axis for axis, place in pairs if np.any(place != place[0])), len(group)


def _first_group(line: str, num_devices: int) -> list[int]:
    if found := _WRITTEN.search(line):
        written = re.findall(r"\{([\d, ]+)\}", found[1])
        groups = [[int(n) for n in each.split(",")] for each in written]
        # A device may also send to itself.
        return next((group for group in groups if len(set(group)) > 1), groups[0])
    if found := _RANGE.search(line):
        return _in_order(found[2]).reshape(_numbers(found[1]))[0].tolist()
    if found := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        order = np.arange(num_devices) if found[2] is None else _in_order(found[2])
        chosen = [slice(None) if f"'{name}'" in found[3].split(",") else 0 for name in sizes]
        return order.reshape(list(sizes.values()))[tuple(chosen)].reshape(-1).tolist()
    if "replica_groups={}" in line:
        return list(range(num_devices))
    raise ValueError(f"groups of devices in another form than those known: {line.strip()[:300]}")


def _in_order(text: str) -> np.ndarray:
    """[2,4]T(1,0): the numbers from 0 on in this shape, transposed."""
    shape, _, axes = text.partition("T")
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return numbers.transpose(_numbers(axes)) if axes else numbers


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
