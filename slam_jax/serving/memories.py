"""The encoder's memories of the inputs of requests, each computed once while it is kept."""

import functools
import hashlib
import threading
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slam_jax.errors import InputError
from slam_jax.generation.decode import LEAST_LENGTH, bucket
from slam_jax.serving.recent import Recent
from slam_jax.slam_v3.streams import Inputs

_MOST_BYTES = 64 << 20
# Vectors that there is room for where the configuration sets no limit.
_USUAL_VECTORS = 64


class Memories:
    """Encodes inputs, with room for the largest that a request may have, so that all share a shape.

    shape: of the memory of one row, None for a model that reads prompts alone.
    """

    def __init__(self, model: Any):
        self.encodes = self.reused = 0
        self._lock = threading.Lock()
        self._pending: dict[bytes, Future[Any]] = {}
        self._kept = Recent(_MOST_BYTES)
        self.shape: Any = None
        if hasattr(model, "encode"):
            self._leaves, self._tree = jax.tree.flatten(model)
            largest = self._shape_of(_largest_inputs(model.config))
            self._room = largest.c_mem.shape[1]
            padded = jax.eval_shape(functools.partial(_padded, room=self._room), largest)
            row = functools.partial(
                jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
            )
            self.shape = row(padded)

    def check(self, inputs: Inputs | None) -> bytes:
        """What identifies the inputs of one request; b"" where there are none.

        Raises InputError for inputs that have more memory tokens than there is room for.
        """
        if inputs is None:
            return b""
        size = self._shape_of(_shapes(inputs)).c_mem.shape[1]
        if size > self._room:
            raise InputError(
                f"the inputs give {size:,} memory tokens and there is room for {self._room:,}: "
                "give fewer vectors or a shorter text"
            )
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(inputs):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
        digest.update(str(jax.tree.structure(inputs)).encode())
        return digest.digest()

    def encode(self, inputs: Inputs | None, key: bytes) -> Any:
        """The memory of one request's inputs [1, ..]; None where there are none."""
        if inputs is None:
            return None
        own: Future[Any] = Future()
        with self._lock:
            memory = self._kept.get(key)
            pending = self._pending.setdefault(key, own) if memory is None else None
            self.reused += pending is not own
        if memory is not None:
            return memory
        if pending is not None and pending is not own:  # another caller shows the same bytes
            return pending.result()
        try:
            memory = _encode(self._leaves, inputs, tree=self._tree, room=self._room)
        except BaseException as error:
            with self._lock:
                del self._pending[key]
            own.set_exception(error)
            raise
        with self._lock:
            del self._pending[key]
            self.encodes += 1
            self._kept.put(key, memory)
        own.set_result(memory)
        return memory

    def _shape_of(self, inputs: Inputs) -> Any:
        leaves = tuple((leaf.shape, leaf.dtype) for leaf in self._leaves)
        flat, structure = jax.tree.flatten(inputs)
        return _memory_shape(self._tree, leaves, structure, tuple((x.shape, x.dtype) for x in flat))


def _shapes(inputs: Inputs) -> Inputs:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)


def _largest_inputs(config: Any) -> Inputs:
    """The shapes of the largest inputs of one request that `read_inputs` makes."""
    shape: Any = jax.ShapeDtypeStruct
    text, most = bucket(config.context_length, LEAST_LENGTH), config.image.max_images
    vectors = config.max_aux if config.aux_slots else bucket(max(config.max_aux, _USUAL_VECTORS))
    pictures = (1,) if most == 1 else (1, most)
    return Inputs(
        text=shape((1, text), np.int32),
        text_mask=shape((1, text), bool),
        image=shape((*pictures, config.image.size, config.image.size, 3), np.uint8),
        image_mask=shape(pictures, bool),
        aux=shape((1, vectors, config.aux_dim), np.float32),
        aux_mask=shape((1, vectors), bool),
    )


@functools.lru_cache(maxsize=256)
def _memory_shape(tree: Any, leaves: Any, structure: Any, inputs: Any) -> Any:
    given = [[jax.ShapeDtypeStruct(*x) for x in each] for each in (leaves, inputs)]

    def encode(leaves: Any, inputs: Any) -> Any:
        return tree.unflatten(leaves).encode(structure.unflatten(inputs))

    return jax.eval_shape(encode, *given)


@functools.partial(jax.jit, static_argnames=("tree", "room"))
def _encode(leaves, inputs, tree, room):
    return _padded(tree.unflatten(leaves).encode(inputs), room)


def _padded(memory: Any, room: int) -> Any:
    """The memory with tokens that are masked, up to the room, and always with a mask."""
    rows, size = memory.c_mem.shape[:2]
    mask = jnp.ones((rows, size), bool) if memory.mask is None else memory.mask
    pads = [(0, 0), (0, room - size)]
    return memory.replace(
        c_mem=jnp.pad(memory.c_mem, [*pads, (0, 0)]), mask=jnp.pad(jnp.asarray(mask), pads)
    )
