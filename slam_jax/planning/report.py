"""A plan in words, line by line which figures are exact and which are estimates."""

import math
from collections.abc import Mapping

from slam_jax.planning.meshes import Found
from slam_jax.planning.plans import Plan

_LEGEND = """\
exact: from shapes and shardings; gradients stand as parameters do. formula: matrix products and
  convolutions of each device.
counted: the arrays that differentiation keeps, each where XLA has it stand; what is
  made anew is not among them, nor are weights that were gathered.
compiled: read from the step as XLA compiles it for {count} virtual CPU devices{depth};
  other compilers may merge or move some of it.
estimated: all that XLA:CPU's program has at once; times at the assumed speeds, collectives as
  rings, one after the other and after the operations."""


def describe(plan: Plan) -> str:
    """A line for each figure, and what was taken for granted."""
    count, room = math.prod(plan.sizes.values()), plan.machine.device_memory_gib
    view = "" if plan.view is None else f", view {plan.view}"
    lines = [
        f"{mesh_name(plan.sizes)}{view}: on each of {count:,} devices",
        _row("parameters", _mib(plan.state.params), "exact"),
        _row("optimizer", _mib(plan.state.opt_state), "exact"),
        _row("average", _mib(plan.state.ema), "exact"),
        _row("gradients", _mib(plan.state.params), "exact"),
        _row("activations kept for the backward pass", _mib(plan.step.activations), "counted"),
        _row("needed for all these", _mib(plan.needed), "counted"),
        _row("taken by the program as it is compiled here", _mib(plan.taken), "estimated"),
        f"{_fitting(plan)}: {plan.share(plan.needed):.1%} of {room:g} GiB are needed, "
        f"{plan.share(plan.taken):.1%} are taken here",
        _row("operations of a step", f"{plan.flops / 1e12:,.3f} TFLOP", "formula"),
    ]
    for (axes, op), num_bytes in sorted(plan.step.sent.items()):
        name = f"{op} along {', '.join(axes)}" if axes else f"{op} of each device with itself"
        lines.append(_row(name, _mib(num_bytes), "compiled"))
    whole = plan.step_seconds
    lines.append(_row("a step", f"{1e3 * whole:,.3f} ms", "estimated"))
    for name, seconds in plan.seconds.items():
        share = f"{seconds / whole:.1%}" if whole else "0%"
        lines.append(_row(f"  of it {name}", share, "estimated"))
    depth = _depth(plan) if any(plan.layers) else ""
    return "\n".join(
        [*lines, f"assumed: {plan.machine}", _LEGEND.format(count=f"all {count:,}", depth=depth)]
    )


def describe_search(found: Found) -> str:
    """The best mesh in full, after a line for each of those that were compiled."""
    lines = [
        f"{found.tried} meshes share batch, heads and processes evenly, {found.holding} of them "
        f"hold the state (exact);\ncompiled were the {len(found.plans)} fastest by a rough formula:"
    ]
    for plan in found.plans:
        lines.append(
            f"  {mesh_name(plan.sizes):<52}{1e3 * plan.step_seconds:>14,.3f} ms"
            f"{plan.needed / 2**30:>10,.1f} GiB needed{plan.taken / 2**30:>10,.1f} GiB taken  "
            f"{_fitting(plan)}"
        )
    best = found.plans[0]
    none = "none of these fits; the fastest:" if best.exceeding == 2 else "the best of these:"
    return "\n".join([*lines, none, describe(best)])


def mesh_name(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def _row(name: str, value: str, how: str) -> str:
    return f"{name:<56}{value:>20}  {how}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.3f} MiB"


def _fitting(plan: Plan) -> str:
    return ("fits", "may fit", "does not fit")[plan.exceeding]


def _depth(plan: Plan) -> str:
    """The depths that were compiled, in words."""
    names = list(plan.layers[0])
    shown = ["/".join(str(each[name]) for name in names) for each in plan.layers]
    return f"\n  with {', '.join(shown)} {'/'.join(names)}, extrapolated"
