"""Every row's ridge regression is solved as the closed form says, whatever its length, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from recsys_core import least_squares
from recsys_core.least_squares import Entries, solve_rows

ROWS, COLUMNS, DIMENSION = 60, 300, 12


@pytest.fixture
def entries() -> Entries:
    """Rows of 0 to 200 entries, shorter and longer than the dimension, each observed by another share."""
    random = np.random.default_rng(0)
    lengths = np.concatenate([[0, 1, 2, DIMENSION - 1, DIMENSION, DIMENSION + 1, 200], random.integers(1, 60, ROWS - 7)])
    matrix = sp.lil_matrix((ROWS, COLUMNS), dtype=np.float32)
    for row, length in enumerate(lengths):
        matrix[row, random.choice(COLUMNS, length, replace=False)] = random.uniform(0.1, 5, length)
    excess = matrix.tocsr()
    return Entries(excess, random.uniform(0.01, 1, excess.nnz).astype(np.float32))


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(COLUMNS, DIMENSION)).astype(np.float32)


@pytest.fixture
def ridge() -> np.ndarray:
    return np.random.default_rng(2).uniform(0.5, 20, ROWS)


def closed_form(entries: Entries, vectors: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    y = vectors.astype(np.float64)
    excess = entries.excess
    found = np.zeros((excess.shape[0], y.shape[1]))
    wanted = sp.csr_matrix((entries.preference + excess.data, excess.indices, excess.indptr), excess.shape).toarray()
    for row, s in enumerate(excess.toarray()):
        found[row] = np.linalg.solve(y.T @ ((1 + s)[:, None] * y) + ridge[row] * np.eye(y.shape[1]), y.T @ wanted[row])
    return found


def test_rows_of_every_length_equal_the_closed_form(entries: Entries, vectors: np.ndarray, ridge: np.ndarray) -> None:
    found = solve_rows(entries, vectors, ridge)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, closed_form(entries, vectors, ridge), rtol=2e-4, atol=2e-5)
    assert not found[0].any(), "nothing is known of the row without entries"


def test_a_row_longer_than_a_block_is_summed_in_pieces(
    entries: Entries, vectors: np.ndarray, ridge: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least_squares, "BLOCK_FLOATS", 50 * DIMENSION)
    np.testing.assert_allclose(solve_rows(entries, vectors, ridge), closed_form(entries, vectors, ridge), rtol=2e-4, atol=2e-5)


def test_the_number_of_threads_changes_no_bit(entries: Entries, vectors: np.ndarray, ridge: np.ndarray) -> None:
    first, *others = (solve_rows(entries, vectors, ridge, threads) for threads in (1, 2, 5))
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_blocks_hold_every_row_with_entries_once_and_stay_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "BLOCK_FLOATS", 4096)
    lengths = np.random.default_rng(3).geometric(0.05, 500).astype(np.int32) - 1
    blocks = list(least_squares._blocks(lengths, 16))
    np.testing.assert_array_equal(np.sort(np.concatenate(blocks)), np.flatnonzero(lengths))
    for block in blocks:
        longest = lengths[block].max()
        assert len(block) == 1 or len(block) * longest * 16 <= 4096
        assert longest - lengths[block].min() <= max(4, 0.15 * longest)
