"""What the configurations of all models have in common: checks of fields by name, and dtypes."""

import contextlib
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from slam_jax.errors import ConfigError, check_names, first_line, require, require_count
from slam_jax.kernels.backend import on_cpu
from slam_jax.layers.remat import POLICIES

DTYPES = ("float32", "bfloat16", "float64")
PRECISIONS = ("tensorfloat32", "float32")

# The largest value of each count, for every model that has a field of this name. A count that is
# not here is not checked.
_MOST = {
    name: most
    for most, names in {
        512: "num_layers level_layers num_blocks num_cycles share_factor attention_period "
        "expert_period num_dense_layers num_shared_experts num_processes num_process_layers "
        "num_decoder_layers num_bottleneck_blocks",
        4_096: "num_heads num_kv_heads shared_num_heads num_experts state_dim conv_width expand "
        "text_kernel_size",
        1 << 20: "vocab_size embed_dim context_length mlp_dim expert_dim process_mlp_dim dt_rank "
        "kv_lora_rank q_lora_rank head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim window "
        "text_window num_memory_tokens aux_dim max_aux alignment_dim",
    }.items()
    for name in names.split()
}
_MAY_BE_0 = (
    "num_dense_layers",
    "num_shared_experts",
    "num_memory_tokens",
    "num_bottleneck_blocks",
    "text_kernel_size",
)


def from_fields(cls: type, values: Mapping[str, Any]) -> Any:
    """A configuration from the nested dicts of `dataclasses.asdict`, as JSON holds them.

    Raises ConfigError for an unknown field, or a value that the configuration refuses.
    """
    check_names(values, [field.name for field in dataclasses.fields(cls)], cls.__name__)
    types_of, built = typing.get_type_hints(cls), dict(values)
    for name, value in values.items():
        if isinstance(value, Mapping):
            options = (types_of[name], *typing.get_args(types_of[name]))
            kind = next((each for each in options if dataclasses.is_dataclass(each)), None)
            require(kind is not None, f"{cls.__name__}.{name}", value, "no group of fields")
            built[name] = from_fields(kind, value)  # type: ignore[arg-type]
        elif isinstance(value, list):
            built[name] = tuple(value)
    try:
        return cls(**built)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__}: {first_line(error)}") from None


class ModelConfig:
    """Base of the configurations of models, which are frozen dataclasses.

    Fields of the same name mean the same in every model, and are checked here by their names:
    counts, rates, weights of losses, `remat` and dtypes. Raises ConfigError for a wrong value.
    """

    remat: str | None
    scan_layers: bool | None
    dtype: str | None
    param_dtype: str
    matmul_precision: str | None

    def __post_init__(self):
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        for field in fields:
            name = field.name
            value: Any = getattr(self, name)
            if name.endswith("balance_loss"):
                require(value >= 0, name, value, "0 (off) or more")
            if name == "dropout":
                require(0 <= value < 1, name, value, "a rate in [0, 1)")
            absent = value is None and field.default is None
            if name in _MOST and not absent:
                require_count(name, value, least=0 if name in _MAY_BE_0 else 1, most=_MOST[name])
        policies = (None, *POLICIES)
        require(self.remat in policies, "remat", self.remat, f"one of {policies}")
        for name in ("dtype", "param_dtype"):
            dtype = getattr(self, name)
            allowed = (None, *DTYPES) if name == "dtype" else DTYPES
            require(dtype in allowed, name, dtype, f"one of {allowed}")
            known = dtype != "float64" or jax.dtypes.canonicalize_dtype(dtype) == dtype
            require(known, name, dtype, "another, or JAX_ENABLE_X64=1 in the environment")
        precision, known = self.matmul_precision, (None, *PRECISIONS)
        require(precision in known, "matmul_precision", precision, f"one of {known}")

    @property
    def dtypes(self) -> dict[str, Any]:
        """The two dtypes as keyword arguments of a layer; `dtype=None` is that of the device."""
        dtype = self.dtype or ("float32" if on_cpu() else "bfloat16")
        return {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(self.param_dtype)}

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, products of float32 matrices on GPUs and TPUs have `matmul_precision`."""
        dtype = self.dtypes["dtype"]
        if self.matmul_precision is None or dtype != jnp.float32 or on_cpu():
            return contextlib.nullcontext()
        return jax.default_matmul_precision(self.matmul_precision)

    def sizes(self, *fields: str) -> dict[str, Any]:
        """Fields as keyword arguments, of a layer or of its count in `layers.flops`."""
        return {field: getattr(self, field) for field in fields}
