"""The collectives of a compiled executable, parsed from its HLO text."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

_OPS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) (\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?[\w.-]+ = (?P<type>.*?) (?P<op>[a-z-]+)\(")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
# Three spellings of groups of devices: as lists, as a transposed range, and as axes of a mesh.
_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_IOTA = r"\[[\d,]+\](?:T\([\d,]+\))?"
_RANGE = re.compile(rf"replica_groups=(\[[\d,]+\])<=({_IOTA})")
_MESH = re.compile(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(({_IOTA})\))? \{{([^}}:]*)\}}"
)


class Collective(NamedTuple):
    """One collective operation.

    axes: mesh axes along which devices exchange. num_bytes: size of the result on a device, of a
    reduce-scatter that of the operand. count: how often it runs; a loop with an unknown number of
    iterations counts as one. name: `op_name` of the instruction, which tells the source.
    """

    op: str
    axes: tuple[str, ...]
    num_bytes: int
    count: int
    name: str


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of one run of an executable whose `as_text()` is `text`.

    mesh: axis -> size, in the order of the mesh. Of a conditional, the branch that sends the most
    counts. Raises ValueError for groups of devices in an unknown form.
    """
    computations, entry, name = {}, "", ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found["name"]
            computations[name] = []
            entry = name if found["entry"] else entry
        elif name:
            computations[name].append(line)
    return list(_walk(entry, computations, mesh, 1))


def _walk(
    name: str, computations: Mapping[str, list[str]], mesh: Mapping[str, int], count: int
) -> Iterator[Collective]:
    for line in computations.get(name, ()):
        found = _INSTRUCTION.match(line)
        if found is None or found["op"].endswith("-done"):
            continue
        op = found["op"].removesuffix("-start")
        if op in _OPS:
            group = _first_group(line, math.prod(mesh.values()))
            coordinates = np.array(np.unravel_index(group, tuple(mesh.values())))
            axes = tuple(a for a, c in zip(mesh, coordinates, strict=True) if np.any(c != c[0]))
            num_bytes = _num_bytes(found["type"]) * (len(group) if op == "reduce-scatter" else 1)
            source = re.search(r'op_name="([^"]*)"', line)
            yield Collective(op, axes, num_bytes, count, source[1] if source else "")
            continue
        trips = _TRIP_COUNT.search(line)
        runs = count * int(trips[1]) if trips and op == "while" else count
        for called in _CALLED.findall(line):
            yield from _walk(called, computations, mesh, runs)
        if branches := _BRANCHES.search(line):
            names = [each.strip().lstrip("%") for each in branches[1].split(",")]
            found_in = [list(_walk(each, computations, mesh, count)) for each in names]
            yield from max(found_in, key=lambda those: sum(c.num_bytes * c.count for c in those))


def _num_bytes(type_text: str) -> int:
    """Bytes of an array type or of all arrays of a tuple type."""
    arrays = _ARRAY.findall(type_text)  # bits are "" for pred, of which each takes a byte
    return sum(math.prod(_integers(shape)) * int(bits or 8) // 8 for bits, shape in arrays)


def _first_group(line: str, num_devices: int) -> list[int]:
    """The devices of one group of a collective; all groups are alike."""
    if found := _LISTS.search(line):
        groups = [_integers(each) for each in re.findall(r"\{([\d, ]+)\}", found[1])]
        # In a permutation a device may send to itself.
        return next((group for group in groups if len(set(group)) > 1), groups[0])
    if found := _RANGE.search(line):
        return _iota(found[2]).reshape(_integers(found[1]))[0].tolist()
    if found := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        devices = np.arange(num_devices) if found[2] is None else _iota(found[2])
        chosen = [slice(None) if f"'{name}'" in found[3].split(",") else 0 for name in sizes]
        return devices.reshape(list(sizes.values()))[tuple(chosen)].reshape(-1).tolist()
    if "replica_groups={}" in line:
        return list(range(num_devices))
    raise ValueError(f"groups of devices in an unknown form: {line.strip()[:300]}")


def _iota(text: str) -> np.ndarray:
    """The numbers from 0 on in a shape and order such as [2,4]T(1,0)."""
    shape, _, axes = text.partition("T")
    numbers = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return numbers.transpose(_integers(axes)) if axes else numbers


def _integers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
