"""The half-sweep of ALS: every row's ridge regression on the other side's vectors, solved exactly, many rows at a time.

Row r with the entries Ω_r and the ridge ρ_r solves (YᵀY + Σ_Ω s·y·yᵀ + ρ_r·I) x = Σ_Ω (p + s)·y, s an entry's confidence beyond
that of all pairs and p its preference among all pairs (1: Hu, Koren, Volinsky 2008, eq. 4; 0: Rendle et al. 2022). With
YᵀY = QΛQᵀ and everything rotated by Q, the part that all rows share is the diagonal D_r = Λ + ρ_r, whatever the row's ridge. A
row of fewer entries than factors is then solved in its entries instead of the factors: (D + YᵀSY)⁻¹Yᵀ = D⁻¹Yᵀ(I + S·YD⁻¹Yᵀ)⁻¹,
a system as small as the row.

Rows of similar length are padded to blocks, so that memory is bounded and NumPy's stacked products and solves do the work.
Blocks depend on the lengths alone and each is solved by one thread: the result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from recsys_core.cores import usable_cores

BLOCK_FLOATS = 1 << 22
"""Largest array of a block (16 MB); a row that is longer is summed in pieces of it."""
PADDING = 0.15
"""A block's rows are at most so much shorter than its longest."""


@dataclass(frozen=True)
class _Shared:
    """What all rows of a half-sweep share: rotated vectors float32 (n, d), Λ float64 (d,), Q float32 (d, d)."""

    vectors: npt.NDArray[np.float32]
    spectrum: npt.NDArray[np.float64]
    rotation: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Entries:
    """The observed pairs of a side: `excess`, CSR float32 (rows, n), is s of each, `preference`, float32 in its order, is p."""

    excess: sp.csr_matrix
    preference: npt.NDArray[np.float32]


def solve_rows(
    entries: Entries, vectors: npt.NDArray[np.float32], ridge: npt.NDArray[np.float64], threads: int | None = None
) -> npt.NDArray[np.float32]:
    """Vectors float32 (rows, d) of the rows of `entries`.

    `vectors` is float32 (n, d), `ridge` (rows,) and above 0. A row without entries gets zeros. `threads` is the number of
    blocks in work, by default the number of cores.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        spectrum, basis = np.linalg.eigh(_gram(vectors))
        rotation = basis.astype(np.float32)
        shared = _Shared(vectors @ rotation, np.maximum(spectrum, 0), rotation)
        lengths = np.diff(entries.excess.indptr)
        found = np.zeros((len(lengths), vectors.shape[1]), np.float32)

        def solve(rows: npt.NDArray[np.int64]) -> None:
            found[rows] = _solve_block(entries, rows, shared, ridge[rows]) @ rotation.T

        with ThreadPoolExecutor(threads or usable_cores()) as pool:
            for _ in pool.map(solve, _blocks(lengths, vectors.shape[1])):
                pass
    return found


def _gram(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    total = np.zeros((vectors.shape[1], vectors.shape[1]))
    step = max(1, BLOCK_FLOATS // vectors.shape[1])
    for at in range(0, len(vectors), step):
        block = vectors[at : at + step].astype(np.float64)
        total += block.T @ block
    return total


def _blocks(lengths: npt.NDArray[np.int32], dimension: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows with entries, longest first, cut so that a block fits BLOCK_FLOATS and pads little."""
    order = np.argsort(-lengths, kind="stable")
    order = order[: np.count_nonzero(lengths)]
    at = 0
    while at < len(order):
        longest = int(lengths[order[at]])
        width = max(longest * dimension, min(longest, dimension) ** 2)
        most = max(1, BLOCK_FLOATS // width)
        least = longest - max(4, int(PADDING * longest))
        similar = int(np.searchsorted(-lengths[order[at : at + most]], -least, side="right"))
        yield order[at : at + max(1, similar)]
        at += max(1, similar)


def _solve_block(
    entries: Entries, rows: npt.NDArray[np.int64], shared: _Shared, ridge: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    """Rotated vectors float32 (len(rows), d) of rows of similar length, the longest first.

    An array times its own transpose takes BLAS half the work, so weights are shared out to both sides by their roots.
    """
    excess = entries.excess
    starts, lengths = excess.indptr[rows], np.diff(excess.indptr)[rows]
    longest, dimension = int(lengths[0]), shared.vectors.shape[1]
    diagonal = (shared.spectrum + ridge[:, None]).astype(np.float32)
    if longest * dimension > BLOCK_FLOATS:
        return _solve_long(entries, int(rows[0]), shared, diagonal[0])[None]
    at = np.arange(longest)
    within = at < lengths[:, None]
    place = np.where(within, starts[:, None] + at, 0)
    s = np.where(within, excess.data[place], 0)
    y = shared.vectors[excess.indices[place]]
    y *= within[..., None]
    c = np.where(within, entries.preference[place] + s, 0)
    if longest < dimension:
        root = np.sqrt(diagonal)
        y /= root[:, None, :]
        small = y @ y.transpose(0, 2, 1)
        inverse = np.where(s > 0, 1 / np.where(s > 0, s, 1), 1)
        small[:, at, at] += inverse
        u = np.linalg.solve(small, (inverse * c)[..., None])
        return (y.transpose(0, 2, 1) @ u)[..., 0] / root
    right = y.transpose(0, 2, 1) @ c[..., None]
    y *= np.sqrt(s)[..., None]
    left = y.transpose(0, 2, 1) @ y
    axis = np.arange(dimension)
    left[:, axis, axis] += diagonal
    return np.linalg.solve(left, right)[..., 0]


def _solve_long(entries: Entries, row: int, shared: _Shared, diagonal: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """One row that is too long for a block, summed in pieces."""
    excess = entries.excess
    dimension = shared.vectors.shape[1]
    left, right = np.diag(diagonal.astype(np.float64)), np.zeros(dimension)
    step = max(1, BLOCK_FLOATS // dimension)
    end = int(excess.indptr[row + 1])
    for at in range(int(excess.indptr[row]), end, step):
        piece = slice(at, min(at + step, end))
        y, s = shared.vectors[excess.indices[piece]], excess.data[piece]
        left += y.T @ (y * s[:, None])
        right += y.T @ (entries.preference[piece] + s)
    return np.linalg.solve(left, right).astype(np.float32)
