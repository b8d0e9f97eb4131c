"""What a layer stores for its gradient, and what is recomputed in the backward pass."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_policies

# The name of the results of linear maps (`jax.ad_checkpoint.checkpoint_name`).
LINEAR = "linear"

# "maps": the results of linear maps are stored; norms, activations and attention are recomputed.
# "layers": only the input of a layer is stored, at the price of a second forward pass.
POLICIES: Mapping[str, Any] = {
    "maps": checkpoint_policies.save_only_these_names(LINEAR),
    "layers": checkpoint_policies.nothing_saveable,
}


def remat(
    layer: Callable[..., Any], policy: str | None, *, prevent_cse: bool = True
) -> Callable[..., Any]:
    """`layer` rematerialised by one of `POLICIES`, with the same arguments and results.

    policy: None = everything is stored. prevent_cse: see `jax.checkpoint`. Source: Chen et al.
    2016, "Training Deep Nets with Sublinear Memory Cost", section 3.
    """
    if policy is None:
        return layer
    return lambda *args, **kwargs: jax.checkpoint(
        lambda args, kwargs: layer(*args, **kwargs),
        policy=POLICIES[policy],
        prevent_cse=prevent_cse,
    )(args, kwargs)
