"""A plan as text. Every line names how its figure was obtained."""

import math

from slam_jax.planning.meshes import Found
from slam_jax.planning.plans import Plan
from slam_jax.training.mesh import more_fsdp, name_of

_LEGEND = """\
exact: from shapes and shardings; gradients are sharded like parameters. formula: matrix products
  and convolutions of each device.
counted: arrays that differentiation keeps, with XLA's shardings; without recomputed arrays and
  gathered weights.
compiled: from the step as XLA compiles it for all {count:,} virtual CPU devices{depth};
  other compilers may merge or move some of it.
estimated: memory of XLA:CPU's executable; times at the assumed speeds, with collectives as rings,
  one after the other and after the operations."""


def describe(plan: Plan) -> str:
    """One line per figure, then the assumptions."""
    count = math.prod(plan.sizes.values())
    view = "" if plan.view is None else f", view {plan.view}"
    frozen = plan.state.frozen
    rows = [
        ("parameters", _mib(plan.state.params), "exact"),
        *([("frozen parameters", _mib(frozen), "exact")] if frozen else []),
        ("optimizer", _mib(plan.state.opt_state), "exact"),
        ("average", _mib(plan.state.ema), "exact"),
        ("gradients", _mib(plan.state.params), "exact"),
        ("activations kept for the backward pass", _mib(plan.step.activations), "counted"),
        ("needed for all these", _mib(plan.needed), "counted"),
        ("taken by the executable compiled here", _mib(plan.taken), "estimated"),
        ("operations of a step", f"{plan.flops / 1e12:,.3f} TFLOP", "formula"),
    ]
    for (axes, op), num_bytes in sorted(plan.step.sent.items()):
        name = f"{op} along {', '.join(axes)}" if axes else f"{op} of each device with itself"
        rows.append((name, _mib(num_bytes), "compiled"))
    total = plan.step_seconds
    rows.append(("a step", f"{1e3 * total:,.3f} ms", "estimated"))
    for name, seconds in plan.seconds.items():
        rows.append((f"  of it {name}", f"{seconds / (total or 1):.1%}", "estimated"))
    lines = [f"{name:<56}{value:>20}  {source}" for name, value, source in rows]
    needed, taken = (f"{plan.share(num_bytes):.1%}" for num_bytes in (plan.needed, plan.taken))
    memory = f"of {plan.machine.device_memory_gib:g} GiB are needed, {taken} are taken here"
    if plan.exceeding == 2:
        memory += f"; {more_fsdp(plan.sizes)}take smaller sizes or larger devices"
    first = f"{name_of(plan.sizes)}{view}: on each of {count:,} devices"
    lines.insert(7, f"{_fitting(plan)}: {needed} {memory}")
    legend = _LEGEND.format(count=count, depth=_compiled_depths(plan))
    return "\n".join([first, *lines, f"assumed: {plan.machine}", legend])


def describe_search(found: Found) -> str:
    """One line per compiled mesh, then the best one in full."""
    lines = [
        f"{found.tried} meshes divide batch, heads and processes evenly; {found.holding} of them "
        f"hold the state (exact).\nCompiled were the {len(found.plans)} fastest by a rough formula:"
    ]
    for plan in found.plans:
        lines.append(
            f"  {name_of(plan.sizes):<52}{1e3 * plan.step_seconds:>14,.3f} ms"
            f"{plan.needed / 2**30:>10,.1f} GiB needed{plan.taken / 2**30:>10,.1f} GiB taken  "
            f"{_fitting(plan)}"
        )
    best = found.plans[0]
    title = "none of these fits; the fastest:" if best.exceeding == 2 else "the best of these:"
    return "\n".join([*lines, title, describe(best)])


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.3f} MiB"


def _fitting(plan: Plan) -> str:
    return ("fits", "may fit", "does not fit")[plan.exceeding]


def _compiled_depths(plan: Plan) -> str:
    names = list(plan.layers[0])
    depths = ["/".join(str(layers[name]) for name in names) for layers in plan.layers]
    return f"\n  with {', '.join(depths)} {'/'.join(names)}, extrapolated" if names else ""
