"""The functions of a trained model, lowered to StableHLO for some platforms.

Their arguments and results are arrays in plain tuples: weights, memory and cache are the leaves of
what the model has. The weights are arguments, so that they are stored once.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export

from slam_jax.generation.decode import only_allowed
from slam_jax.generation.requests import allowed_tokens
from slam_jax.kernels.backend import for_export
from slam_jax.slam_v3.streams import Inputs
from slam_jax.training.state import merge_model, split_model

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_ALLOWED = "allowed_tokens"

Specs = tuple[jax.ShapeDtypeStruct, ...]


class Sizes(NamedTuple):
    """batch: rows of every call. max_length: tokens of a row, prompt and answer. prompt_lengths:
    buckets, each with a program of its own. inputs: what `encode` reads, by name; empty for a model
    that reads prompts alone."""

    batch: int
    max_length: int
    prompt_lengths: tuple[int, ...]
    inputs: Mapping[str, jax.ShapeDtypeStruct]


class Exportable(NamedTuple):
    """A model as functions of plain tuples.

    weights: by name, in the order in which the functions take them. functions: by name, with the
    shapes of their arguments. memory, cache: the shapes of what these tuples hold.
    """

    weights: dict[str, Any]
    functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]
    memory: Specs
    cache: Specs


def groups_of(platforms: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The platforms by the forms that their programs have: those of CPUs, or of accelerators."""
    given = {
        "cpu": tuple(each for each in platforms if each == "cpu"),
        "accelerator": tuple(each for each in platforms if each != "cpu"),
    }
    return {name: group for name, group in given.items() if group}


def lower(
    function: Callable[..., Any], arguments: Any, platforms: Sequence[str], *, cpu: bool
) -> bytes:
    """A function as serialised StableHLO for these platforms, in the forms of CPUs or of
    accelerators.

    Only operations whose meaning JAX keeps stable are allowed in it; see `jax.export`.
    """
    # A new function: JAX keeps the traces of old ones, which may have the forms of the other group.
    fresh = jax.jit(lambda *given: function(*given))
    with for_export(cpu=cpu), _without_folders():
        return bytes(jax_export.export(fresh, platforms=platforms)(*arguments).serialize())


def exportable(loaded: Any, sizes: Sizes) -> Exportable:
    """The functions of a model with its tokenizer, in the dtypes that it has now.

    prefill(weights, memory, tokens [B, T], lengths [B]) and decode_step(weights, memory, cache,
    tokens [B]) return logits [B, V] of the next token and the cache; logits of rows that are no
    tokens are -inf. encode(weights, *inputs) returns the memory.
    """
    graphdef, params = split_model(_with_dtypes(loaded.model))
    leaves, treedef = jax.tree.flatten_with_path(params)
    weights = {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}
    allowed = allowed_tokens(loaded)
    if allowed is not None:
        weights[_ALLOWED] = allowed
    batch, names = sizes.batch, tuple(sizes.inputs)

    def model_of(given: Any) -> Any:
        return merge_model(graphdef, jax.tree.unflatten(treedef, given[: len(leaves)]))

    def logits_of(given: Any, logits: jax.Array) -> jax.Array:
        return only_allowed(logits, None if allowed is None else given[-1]).astype(jnp.float32)

    def encoded(given: Any, *inputs: jax.Array) -> Any:
        return model_of(given).encode(Inputs(**dict(zip(names, inputs, strict=True))))

    def prefilled(given: Any, memory: Any, tokens: jax.Array, lengths: jax.Array) -> Any:
        model = model_of(given)
        cache = model.init_cache((batch,), sizes.max_length)
        logits, cache = model.prefill(tokens, cache, of_memory(memory), lengths=lengths)
        last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return logits_of(given, last), cache

    def of_memory(memory: Any) -> Any:
        return jax.tree.unflatten(memory_tree, memory) if names else None

    def encode(*given: Any) -> Any:
        return tuple(jax.tree.leaves(encoded(*given)))

    def prefill(*given: Any) -> Any:
        logits, cache = prefilled(*given)
        return logits, tuple(jax.tree.leaves(cache))

    def decode_step(given: Any, memory: Any, cache: Any, tokens: jax.Array) -> Any:
        cache = jax.tree.unflatten(cache_tree, cache)
        logits, cache = model_of(given).decode_step(tokens, cache, of_memory(memory))
        return logits_of(given, logits), tuple(jax.tree.leaves(cache))

    of_weights = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in weights.values())
    shapes = tuple(sizes.inputs.values())
    with for_export(cpu=True):  # shapes are the same in both forms
        found = jax.eval_shape(encoded, of_weights, *shapes) if names else ()
        memory, memory_tree = jax.tree.flatten(found)
        prompts = {n: _int32((batch, n), (batch,)) for n in sorted(sizes.prompt_lengths)}
        one = next(iter(prompts.values()))
        cache, cache_tree = jax.tree.flatten(jax.eval_shape(prefilled, of_weights, memory, *one)[1])
    functions: dict[str, Any] = {"encode": (encode, (of_weights, *shapes))} if names else {}
    for length, tokens in prompts.items():
        functions[f"prefill_{length}"] = prefill, (of_weights, tuple(memory), *tokens)
    step = (of_weights, tuple(memory), tuple(cache), *_int32((batch,)))
    functions["decode_step"] = decode_step, step
    return Exportable(weights, functions, tuple(memory), tuple(cache))


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
    """Operations say which file they come from: without the folders of this machine."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*/")
    try:
        yield
    finally:
        jax.config.update(name, before)


def _int32(*shapes: tuple[int, ...]) -> Specs:
    return tuple(jax.ShapeDtypeStruct(shape, np.int32) for shape in shapes)


def _with_dtypes(model: Any) -> Any:
    """The model with the dtype of this device in all configurations that leave it to the device:
    caches have it, too, and must fit the layers on every platform."""
    model = nnx.merge(*nnx.split(model))  # the same arrays in new modules
    for _, module in nnx.iter_modules(model):
        config = getattr(module, "config", None)
        if dataclasses.is_dataclass(config) and getattr(config, "dtype", "") is None:
            dtype = config.dtypes["dtype"].name  # type: ignore[attr-defined]
            module.config = dataclasses.replace(config, dtype=dtype)  # type: ignore[type-var]
    return model
