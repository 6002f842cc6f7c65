"""The clustering solver in C++: the labels of the Python one, the optimum of an independent solver, any thread count."""

from __future__ import annotations

import re
import signal

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from idlora_ext import native
from idlora_ext.rows.assignment import assign
from idlora_ext.rows.kmeans import constrained_kmeans
from idlora_ext.rows.selection import select_rows
from tests.helpers.problems import DEGENERATE, MATRICES, each, matrix, named

if native.module is None:
    pytest.skip(f"no native module: {native.reason}", allow_module_level=True)
solver = native.module.clustering


@pytest.fixture
def in_python(monkeypatch):
    """``in_python(f, ...)`` is ``f(...)`` as it is without a native module."""

    def run(f, *args, **options):
        with monkeypatch.context() as m:
            m.setattr(native, "module", None)
            return f(*args, **options)

    return run


def best_by_linear_sum_assignment(D: np.ndarray, min_size: int) -> float:
    """Every cluster is ``min_size`` places; what rows are left over take places that cost what their best cluster does."""
    d, k = D.shape
    free = np.repeat(D.min(1, keepdims=True), d - k * min_size, axis=1)
    places = np.concatenate([np.repeat(D, min_size, axis=1), free], axis=1)
    return places[linear_sum_assignment(places)].sum()


def costs(kind: str, d: int, k: int, rng: np.random.Generator) -> np.ndarray:
    D = rng.random((d, k))
    if kind == "ties":
        return rng.integers(0, 3, (d, k)).astype(float)
    if kind == "one cluster wins":
        D[:, 1:] += 1
    elif kind == "wins by integers":
        D = rng.integers(0, 4, (d, k)) + np.minimum(np.arange(k), 1) * 3.0
    elif kind == "every row alike":
        D[:] = D[0]
    elif kind == "all equal":
        D[:] = 7
    elif kind == "few distinct rows":
        D = D[rng.integers(0, min(d, 3), d)]
    elif kind == "negative":
        D -= 5 * np.arange(k)
    elif kind == "chain":  # a row goes to the next cluster for little, and further only through it
        here = rng.integers(0, max(1, k // 2), d)
        D = np.abs(np.arange(k) - here[:, None]) ** 2 + 0.01 * D
    elif kind == "backwards chain":
        D = (np.arange(k)[::-1] - rng.integers(0, 2, d)[:, None]) ** 2.0
    elif kind == "all scales":
        D = 10.0 ** rng.uniform(-300, 300, (d, k))
    elif kind == "adjacent numbers":
        D = 1 + rng.integers(0, 3, (d, k)) * 2.0**-52 + np.minimum(np.arange(k), 1) * 2.0**-50
    elif kind == "squared distances":
        x = rng.standard_normal((d, 5)) * np.exp(rng.standard_normal((d, 1)))
        D = ((x[:, None] - x[:k]) ** 2).sum(2)
    return D


COSTS = (
    "random",
    "ties",
    "one cluster wins",
    "wins by integers",
    "every row alike",
    "all equal",
    "few distinct rows",
    "negative",
    "chain",
    "backwards chain",
    "all scales",
    "adjacent numbers",
    "squared distances",
)


@pytest.mark.parametrize("kind", COSTS)
def test_labels_are_those_of_the_python_solver_and_optimal(kind, in_python):
    rng = np.random.default_rng(COSTS.index(kind))
    constrained = 0
    for k in (1, 2, 3, 4, 5, 8, 13):
        for _ in range(6):
            d = int(rng.integers(k, 12 * k))
            D = costs(kind, d, k, rng)
            for min_size in {0, 1, d // k // 2, d // k}:
                labels = solver.assign(D, min_size)
                assert labels.dtype == np.int64
                assert np.array_equal(labels, in_python(assign, torch.from_numpy(D), min_size).numpy())
                sizes = np.bincount(labels, minlength=k)
                assert sizes.min() >= min_size
                total, best = D[np.arange(d), labels].sum(), best_by_linear_sum_assignment(D, min_size)
                rounding = d * 2.0**-51 * np.ptp(D, axis=1).max()  # of costs to integers
                assert total == pytest.approx(best, rel=1e-12, abs=rounding)
                constrained += not np.array_equal(labels, D.argmin(1))
    assert constrained > 20


def test_larger_assignments(in_python):
    rng = np.random.default_rng(0)
    for d, k, min_size in [(400, 40, 10), (1000, 4, 240), (1500, 8, 128), (999, 3, 333)]:
        for kind in ("squared distances", "wins by integers"):
            D = costs(kind, d, k, rng)
            labels = solver.assign(D, min_size)
            assert np.array_equal(labels, in_python(assign, torch.from_numpy(D), min_size).numpy())
            best = best_by_linear_sum_assignment(D, min_size)
            assert D[np.arange(d), labels].sum() == pytest.approx(best, rel=1e-12)


@each(kind=named(MATRICES), dtype=named([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_clustering_is_that_of_the_python_passes(kind, dtype, in_python):
    for d, d_in, k, min_size in [(640, 256, 4, 96), (500, 37, 3, 100), (201, 1025, 5, 40), (301, 700, 1, 1)]:
        W = matrix(kind, d, d_in, seed=d).to(dtype)
        result, expected = (run(constrained_kmeans, W, k, min_size) for run in (lambda f, *a: f(*a), in_python))
        assert torch.equal(result.labels, expected.labels)
        assert (result.n_iter, result.converged) == (expected.n_iter, expected.converged)
        torch.testing.assert_close(result.centroids, expected.centroids, rtol=0, atol=1e-12 * W.double().abs().max())
        torch.testing.assert_close(result.distances, expected.distances, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", MATRICES)
def test_rows_are_those_of_the_python_passes(kind, in_python):
    W = matrix(kind, 1024, 300)
    assert torch.equal(select_rows(W, 4, 100), in_python(select_rows, W, 4, 100))


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_matrices_are_clustered_as_in_python(name, in_python):
    W = DEGENERATE[name]
    assert torch.equal(select_rows(W, 4, 5), in_python(select_rows, W, 4, 5))


def arrays(d_in: int, dtype: torch.dtype) -> tuple[Tensor, np.ndarray]:
    """W [45, d_in] with a distance between its rows, and what the solver takes for it."""
    g = torch.Generator().manual_seed(d_in)
    W = torch.randn(45, d_in + 3, generator=g).to(dtype)[:, :d_in]
    return W, (W.view(torch.uint16) if dtype == torch.bfloat16 else W).numpy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_in", [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 18, 511, 512, 513, 1000])
def test_passes(d_in, dtype):
    W, array = arrays(d_in, dtype)
    x, rng = W.double().numpy(), np.random.default_rng(d_in)
    origin = rng.standard_normal(d_in)
    squares = solver.row_squares(array, origin)
    np.testing.assert_allclose(squares, ((x - origin) ** 2).sum(1), rtol=1e-13)
    for k in (1, 2, 3, 4, 5, 9):
        e = rng.standard_normal((k, d_in))
        distances = solver.row_distances(array, origin, squares, e, 36)
        scale = squares[:, None] + (e**2).sum(1).max()
        expected = ((x[:, None] - origin - e) ** 2).sum(2)
        assert (np.abs(distances - expected) <= 2.0**-36 * scale).all()
        grid = 2.0 ** (np.frexp(scale)[1] - 36)
        assert np.array_equal(distances, np.round(distances / grid) * grid)
        before, after = rng.integers(-1, k, (2, len(x)))
        sums = np.ones((k, d_in))
        solver.move_rows(array, before, after, sums)
        joined, left = (np.arange(k)[:, None] == labels for labels in (after, before))
        np.testing.assert_allclose(sums, 1 + (joined.astype(float) - left) @ x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_read_as_it_is(dtype):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)[None]
    W = (bits if dtype == torch.bfloat16 else bits.view(dtype)).numpy()
    sums = np.zeros((1, 2**16))
    solver.move_rows(W, np.array([-1]), np.array([0]), sums)
    np.testing.assert_array_equal(sums, bits.view(dtype).double().numpy())


def test_passes_are_the_same_bits_on_any_number_of_threads():
    W = matrix("heavy tails", 3000, 900)
    rng = np.random.default_rng(0)
    origin, e = rng.standard_normal(900), rng.standard_normal((4, 900))
    before, after = rng.integers(-1, 4, (2, 3000))
    results = []
    for threads in (1, 2, 3, 7):
        sums = np.zeros((4, 900))
        squares = solver.row_squares(W.numpy(), origin, threads)
        distances = solver.row_distances(W.numpy(), origin, squares, e, 36, threads)
        solver.move_rows(W.numpy(), before, after, sums, threads)
        results.append((squares, distances, sums))
    for result in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_signals_are_served_during_a_long_assignment():
    D = np.random.default_rng(0).random((40_000, 60))
    D[:, 1:] += 1
    served = []
    before = signal.signal(signal.SIGALRM, lambda *_: served.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        solver.assign(D, 660)  # seconds; signals that wait until it returns are one
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(served) > 2


def test_an_interrupt_ends_a_long_assignment():
    D = np.zeros((40_000, 60))
    D[:, 1:] += 1

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            solver.assign(D, 660)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


W, ORIGIN, SQUARES, E, LABELS, SUMS = (np.zeros(s) for s in ((8, 6), 6, 8, (2, 6), 8, (2, 6)))
LABELS = LABELS.astype(np.int64)
READ_ONLY = SUMS.copy()
READ_ONLY.flags.writeable = False
ERRORS = {
    "assign dimensions": (lambda: solver.assign(np.zeros(3), 0), ValueError, "must have 2 dimensions"),
    "assign sizes": (lambda: solver.assign(W, 2), ValueError, "assign: min_size must be from 0 to d / k = 1, got 2"),
    "assign negative": (lambda: solver.assign(W, -1), ValueError, "got -1"),
    "assign nan": (lambda: solver.assign(np.full((2, 2), np.nan), 1), ValueError, "distances must be finite, got NaN"),
    "assign inf": (lambda: solver.assign(np.array([[np.inf, 1]]), 0), ValueError, "must be finite"),
    "assign overflow": (lambda: solver.assign(np.array([[1e308, -1e308]]), 0), ValueError, "differences that overflow"),
    "integers": (
        lambda: solver.row_squares(W.astype(np.int32), ORIGIN),
        TypeError,
        "row_squares: W must be float64, float32, float16, or bfloat16 as uint16, got int32",
    ),
    "byte order": (lambda: solver.row_squares(W.astype(">f4"), ORIGIN), ValueError, "byte order"),
    "strided rows": (lambda: solver.row_squares(W.T, ORIGIN), ValueError, "contiguous rows, got strides (8, 48)"),
    "dimensions": (lambda: solver.row_squares(W[0], ORIGIN), ValueError, "W must have 2 dimensions"),
    "origin": (
        lambda: solver.row_squares(W, ORIGIN[1:]),
        ValueError,
        "row_squares: origin must have shape (6,), got (5,)",
    ),
    "squares": (lambda: solver.row_distances(W, ORIGIN, ORIGIN, E, 36), ValueError, "squares must have shape (8,)"),
    "e": (lambda: solver.row_distances(W, ORIGIN, SQUARES, E[:, 1:], 36), ValueError, "e must have shape (2, 6)"),
    "label": (
        lambda: solver.move_rows(W, LABELS, LABELS + 2, SUMS),
        ValueError,
        "move_rows: labels must be less than k = 2, got 2",
    ),
    "labels": (lambda: solver.move_rows(W, LABELS[1:], LABELS, SUMS), ValueError, "before must have shape (8,)"),
    "sums": (lambda: solver.move_rows(W, LABELS, LABELS, SUMS[:, 1:]), ValueError, "sums must be contiguous"),
    "sums shape": (lambda: solver.move_rows(W, LABELS, LABELS, W[:2, :5].copy()), ValueError, "must have shape (2, 6)"),
    "sums dtype": (lambda: solver.move_rows(W, LABELS, LABELS, SUMS.astype(np.float32)), TypeError, "incompatible"),
    "sums read-only": (lambda: solver.move_rows(W, LABELS, LABELS, READ_ONLY), ValueError, "not writeable"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_was_got(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_nothing_to_assign():
    assert solver.assign(np.zeros((0, 3)), 0).shape == (0,)
