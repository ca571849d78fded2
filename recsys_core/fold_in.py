"""The fold-in: vectors of users from what they had, without a fit. It needs NumPy alone, so a serving process starts fast."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]

GRAM_ROWS = 1 << 16
"""Vectors that are summed at a time."""


def gram(items: FloatArray) -> npt.NDArray[np.float64]:
    """YᵀY, float64 (d, d), of item vectors (n, d), summed in blocks."""
    total = np.zeros((items.shape[1], items.shape[1]))
    for at in range(0, len(items), GRAM_ROWS):
        block = items[at : at + GRAM_ROWS].astype(np.float64)
        total += block.T @ block
    return total


def fold_in(
    gram: FloatArray,
    items: FloatArray,
    weights: FloatArray,
    alpha: float,
    base_preference: float,
    regularization: float | FloatArray,
) -> npt.NDArray[np.float32]:
    """Vectors of users from what they had, without a fit (Hu, Koren, Volinsky 2008, eq. 4, where `base_preference` is 1).

    x = (YᵀY + Σ alpha·w·y·yᵀ + ridge·I)⁻¹ Σ (base_preference + alpha·w)·y over the user's items. `gram` is YᵀY (d, d) of all
    items, `items` (..., k, d) the vectors of the user's items, `weights` (..., k) theirs, 0 where a list is padded,
    `regularization` the ridge, one or (...,): `AlsReport.ridge + AlsReport.ridge_per_observation · n`. Returns float32
    (..., d): one user and many users are the same call.
    """
    y = np.asarray(items, np.float64)
    w = np.asarray(weights, np.float64)
    ridge = np.asarray(regularization, np.float64)[..., None, None] * np.eye(y.shape[-1])
    left = gram + np.swapaxes(y, -1, -2) @ (alpha * w[..., None] * y) + ridge
    right = np.swapaxes(y, -1, -2) @ np.where(w > 0, base_preference + alpha * w, 0.0)[..., None]
    return np.linalg.solve(left, right)[..., 0].astype(np.float32)
