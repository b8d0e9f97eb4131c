"""One published tensor and the parameters it corresponds to, converted in both directions."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import einops
import numpy as np

Path = tuple[str | int, ...]


class Piece(NamedTuple):
    """A parameter, or the entry `index` of a stacked one, and its axes: "ours -> published"."""

    path: Path
    pattern: str
    index: int | None = None


class Tensor(NamedTuple):
    """Pieces concatenated along the axis named `axis`, then rearranged by the pattern `merge`.

    For example, each head of `kv_b_proj` has the rows of its keys and then those of its values:
    `Tensor([Piece(.., "r n h -> n h r"), Piece(.., "r n h -> n h r")], "h", "n h r -> (n h) r")`.
    """

    pieces: Sequence[Piece]
    axis: str = ""
    merge: str | None = None

    def publish(self, params: Mapping[Path, Any]) -> np.ndarray:
        """The published tensor of these parameters, contiguous in the memory of the host."""
        views = []
        for piece in self.pieces:
            value = params[piece.path]
            # Indexed on the device first: it may have room for one more expert, not for all.
            value = np.asarray(value if piece.index is None else value[piece.index])
            views.append(einops.rearrange(value, piece.pattern))
        axis = self._view_axes.index(self.axis) if self.axis else 0
        joined = views[0] if len(views) == 1 else np.concatenate(views, axis=axis)
        if self.merge is not None:
            joined = einops.rearrange(joined, self.merge)
        return np.ascontiguousarray(joined)

    def shape(self, params: Mapping[Path, Any]) -> tuple[int, ...]:
        """The shape of the published tensor; `params` may be shapes alone."""
        sizes = self._joined(params)
        last = (self.merge or self.pieces[0].pattern).split("->")[1]
        groups = re.findall(r"\(([^)]*)\)|(\S+)", last)
        return tuple(
            math.prod(1 if name == "1" else sizes[name] for name in (merged or single).split())
            for merged, single in groups
        )

    def parts(self, published: Any, params: Mapping[Path, Any]) -> list[Any]:
        """The part of each piece in the published tensor, in the shape of the piece."""
        sizes = [self._sizes(piece, params[piece.path].shape) for piece in self.pieces]
        if self.merge is not None:
            published = einops.rearrange(published, _reverse(self.merge), **self._joined(params))
        parts, start = [], 0
        for piece, size in zip(self.pieces, sizes, strict=True):
            part = published
            if self.axis:
                axis, end = self._view_axes.index(self.axis), start + size[self.axis]
                part = part[(slice(None),) * axis + (slice(start, end),)]
                start = end
            parts.append(einops.rearrange(part, _reverse(piece.pattern)))
        return parts

    def _joined(self, params: Mapping[Path, Any]) -> dict[str, int]:
        """The sizes of the concatenated axes, by name."""
        sizes = [self._sizes(piece, params[piece.path].shape) for piece in self.pieces]
        along = {self.axis: sum(size[self.axis] for size in sizes)} if self.axis else {}
        return {**sizes[0], **along}

    @property
    def _view_axes(self) -> list[str]:
        return self.pieces[0].pattern.split("->")[1].split()

    def _sizes(self, piece: Piece, shape: tuple[int, ...]) -> dict[str, int]:
        shape = shape if piece.index is None else shape[1:]
        return dict(zip(piece.pattern.split("->")[0].split(), shape, strict=True))


def _reverse(pattern: str) -> str:
    left, right = pattern.split("->")
    return f"{right.strip()} -> {left.strip()}"


def linear(*path: str | int) -> Tensor:
    """A matrix, which PyTorch has as [out, in]."""
    return Tensor([Piece((*path, "kernel"), "i o -> o i")])


def heads_in(*path: str | int) -> Tensor:
    """From D to heads [N, H], published as [N H, D]."""
    return Tensor([Piece((*path, "kernel"), "d n h -> n h d")], merge="n h d -> (n h) d")


def heads_out(*path: str | int) -> Tensor:
    """From heads [N, H] to D, published as [D, N H]."""
    return Tensor([Piece((*path, "kernel"), "n h d -> d n h")], merge="d n h -> d (n h)")


def vector(*path: str | int) -> Tensor:
    return Tensor([Piece(path, "d -> d")])


def matrix(*path: str | int) -> Tensor:
    """A matrix with the same axes, such as a table of embeddings."""
    return Tensor([Piece(path, "a b -> a b")])


def rows(*paths: Path) -> Tensor:
    """Several maps of one input, published as one matrix with all their rows."""
    return Tensor([Piece((*path, "kernel"), "i o -> o i") for path in paths], "o")


def expert(index: int, *path: str | int) -> Tensor:
    """The matrix of one expert."""
    return Tensor([Piece((*path, "kernel"), "i o -> o i", index)])
