"""What a layer keeps for its gradient, and what is made anew on the way back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_policies

MAP = "map"

# "maps": the results of linear maps are kept; norms, activations and attention are made anew.
# "layers": only what goes into a layer is kept, at the price of a second forward pass.
POLICIES: Mapping[str, Any] = {
    "maps": checkpoint_policies.save_only_these_names(MAP),
    "layers": checkpoint_policies.nothing_saveable,
}


def remat(layer: Callable[..., Any], policy: str | None) -> Callable[..., Any]:
    """`layer`, that is called alike and gives the same; None = all of it is kept.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 3.
    """
    if policy is None:
        return layer
    kept = POLICIES[policy]
    return lambda *args, **kwargs: jax.checkpoint(
        lambda args, kwargs: layer(*args, **kwargs), policy=kept
    )(args, kwargs)
