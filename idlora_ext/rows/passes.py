"""Passes over the rows of ``W`` as points: distances to centroids, sums of clusters, in Python or in C++."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .assignment import solver

# Elements of W turned into float64 at a time: 8 MiB for the caches of a CPU, 128 MiB to amortise kernel launches.
_BLOCK_CPU, _BLOCK_OTHER = 1 << 20, 1 << 24

# The mean of so many rows is the origin of all points: near enough to the mean of all to take a common offset out.
_ORIGIN_ROWS = 64

# Squared distances keep this many bits below |x - origin|^2 + |c - origin|^2; a float64 product errs 16 bits later.
_DISTANCE_BITS = 36


class Partition(NamedTuple):
    labels: np.ndarray  # [d]
    size: np.ndarray  # [k]
    sums: np.ndarray  # [k, d_in], of the rows
    e: np.ndarray  # [k, d_in], centroids - origin
    inertia: float


class Rows:
    """The rows x of W as points relative to an origin o near their mean, read by three kinds of passes.

    |x - c|^2 = |x - o|^2 - 2 <x, e> + 2 <o, e> + |e|^2 with e = c - o: one product a pass serves all centroids, W is
    neither shifted nor squared again, and a large mean does not cancel digits.
    """

    def __init__(self, W: Tensor) -> None:
        # Strided rows would be gathered anew by every pass: a transposed W is copied once, in its own dtype.
        self.W = W.detach() if W.stride(1) == 1 else W.detach().contiguous()
        self.d, self.d_in = W.shape
        first = np.arange(self.d) < _ORIGIN_ROWS
        self.origin = np.zeros((1, self.d_in))
        self.move(np.full(self.d, -1), first - 1, self.origin)
        self.origin = self.origin[0] / first.sum()
        self.squares = self.squares_from_origin()  # |x - o|^2
        with np.errstate(over="ignore"):
            self.total = float(self.squares.sum())  # not finite if an entry of W is not

    @cached_property
    def buffer(self) -> Tensor:
        block = max(1, (_BLOCK_CPU if self.W.device.type == "cpu" else _BLOCK_OTHER) // self.d_in)
        return torch.empty(min(block, self.d), self.d_in, dtype=torch.float64, device=self.W.device)

    def blocks(self, rows: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(positions, float64 rows), of all rows or of those listed; every block overwrites the one before."""
        for start in range(0, self.d if rows is None else len(rows), len(self.buffer)):
            here = slice(start, start + len(self.buffer))
            x = self.W[here] if rows is None else self.W[rows[here]]
            yield here, self.buffer[: len(x)].copy_(x)

    def on_device(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.W.device)

    def point(self, row: int) -> np.ndarray:
        return self.W[row].double().cpu().numpy() - self.origin

    def squares_from_origin(self) -> np.ndarray:
        """``[d]``: ``|x - o|^2``."""
        origin = self.on_device(self.origin)
        norms = [torch.linalg.vector_norm(x.sub_(origin), dim=1) for _, x in self.blocks()]
        return torch.cat(norms).square_().cpu().numpy()

    def distances(self, e: np.ndarray) -> np.ndarray:
        """``[d, k]``: squared distances of all rows to the centroids ``origin + e``."""
        e_T = self.on_device(e).T
        products = torch.cat([x @ e_T for _, x in self.blocks()]).cpu().numpy()
        squares = (e * e).sum(1)
        D = self.squares[:, None] - 2 * products + (2 * (e * self.origin).sum(1) + squares)
        exponent = np.frexp(np.maximum(self.squares + squares.max(), 1e-200))[1]
        grid = np.ldexp(1.0, exponent - _DISTANCE_BITS)[:, None]  # powers of two: no further rounding
        return np.maximum(np.round(D / grid) * grid, 0)

    def move(self, before: np.ndarray, after: np.ndarray, sums: np.ndarray) -> None:
        """``sums [k, d_in]`` follow the rows from one label to the next; reads only those that move. -1: no cluster."""
        moved = (before != after).nonzero()[0]
        clusters = np.arange(len(sums))[:, None]
        sign = self.on_device((clusters == after[moved]).astype(float) - (clusters == before[moved]))
        change = torch.zeros(sums.shape, dtype=torch.float64, device=self.W.device)
        for here, x in self.blocks(self.on_device(moved) if len(moved) < self.d else None):
            change.addmm_(sign[:, here], x)
        sums += change.cpu().numpy()

    def partition(self, labels: np.ndarray, k: int, last: Partition | None) -> Partition:
        """The clusters of ``labels``, none of them empty."""
        sums = np.zeros((k, self.d_in)) if last is None else last.sums.copy()
        self.move(np.full(self.d, -1) if last is None else last.labels, labels, sums)
        size = np.bincount(labels, minlength=k)
        e = sums / size[:, None] - self.origin
        inertia = self.total - float((size * (e * e).sum(1)).sum())  # within = total - between
        return Partition(labels, size, sums, e, inertia)


class NativeRows(Rows):
    """The same passes in C++, which read W in its own dtype."""

    DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

    @cached_property
    def array(self) -> np.ndarray:
        return (self.W.view(torch.uint16) if self.W.dtype == torch.bfloat16 else self.W).numpy()

    def squares_from_origin(self) -> np.ndarray:
        return solver().row_squares(self.array, self.origin, torch.get_num_threads())

    def distances(self, e: np.ndarray) -> np.ndarray:
        threads = torch.get_num_threads()
        return solver().row_distances(self.array, self.origin, self.squares, e, _DISTANCE_BITS, threads)

    def move(self, before: np.ndarray, after: np.ndarray, sums: np.ndarray) -> None:
        solver().move_rows(self.array, before, after, sums, torch.get_num_threads())


def rows_of(W: Tensor) -> Rows:
    native = solver() and W.device.type == "cpu" and W.dtype in NativeRows.DTYPES and type(W.detach()) is Tensor
    return (NativeRows if native else Rows)(W)
