"""Clustering: exact assignment, an objective no worse than k-means-constrained, and rows that never change with threads."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from idlora_ext.rows.assignment import assign
from idlora_ext.rows.kmeans import constrained_kmeans
from idlora_ext.rows.selection import SELECTIONS, select_rows
from tests.helpers.problems import DEGENERATE, MATRICES, matrix


def total(distances: Tensor, labels: Tensor) -> float:
    return float(distances.double().gather(1, labels[:, None]).sum())


def best_by_linprog(distances: Tensor, min_size: int) -> float:
    """The transport polytope has integer vertices, so the linear program gives the cost of the best labels."""
    d, k = distances.shape
    every_row = np.kron(np.eye(d), np.ones(k))
    every_cluster = np.kron(np.ones(d), np.eye(k))
    found = linprog(
        distances.double().numpy().ravel(),
        A_ub=-every_cluster,
        b_ub=-np.full(k, min_size),
        A_eq=every_row,
        b_eq=np.ones(d),
    )
    assert found.success
    return found.fun


def best_by_trying_all(distances: Tensor, min_size: int) -> float:
    d, k = distances.shape
    labels = torch.tensor(list(itertools.product(range(k), repeat=d)))
    fits = torch.stack([(labels == c).sum(1) >= min_size for c in range(k)]).all(0)
    return float(distances[torch.arange(d), labels[fits]].sum(1).min())


def inertia_of(W: Tensor, labels: Tensor) -> float:
    """Of the partition alone, with the means as centroids; float64."""
    clusters = [W[labels == c].double() for c in labels.unique()]
    return sum(float((x - x.mean(0)).square().sum()) for x in clusters)


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("costs", ["real", "ties", "one cluster wins"])
def test_assignment_is_optimal(k, costs):
    g = torch.Generator().manual_seed(k)
    for _ in range(12):
        d = int(torch.randint(k, 25, (), generator=g))
        distances = torch.rand(d, k, generator=g, dtype=torch.float64)
        if costs == "ties":
            distances = (distances * 4).round()
        elif costs == "one cluster wins":  # several deficits at once
            distances[:, 1:] += 1
        for min_size in {0, 1, d // k // 2, d // k}:
            labels = assign(distances, min_size)
            assert labels.dtype == torch.int64
            assert torch.bincount(labels, minlength=k).min() >= min_size
            assert total(distances, labels) == pytest.approx(best_by_linprog(distances, min_size), rel=1e-9, abs=1e-9)


def test_assignment_is_optimal_among_all_labels():
    g = torch.Generator().manual_seed(0)
    for k, d, min_size in [(2, 9, 4), (3, 7, 2), (4, 6, 1), (6, 6, 1)]:
        for _ in range(5):
            distances = torch.randn(d, k, generator=g, dtype=torch.float64)  # negative costs too
            labels = assign(distances, min_size)
            assert total(distances, labels) == pytest.approx(best_by_trying_all(distances, min_size), rel=1e-12)


def test_a_chain_through_a_full_cluster_beats_the_direct_move():
    # Cluster 2 is empty. Straight from 0 costs 10; from 1 costs 1, and 0 gives 1 a row in return for another 1.
    distances = torch.tensor([[0.0, 1, 10], [0, 1, 10], [0, 1, 10], [9, 0, 1]])
    labels = assign(distances, 1)
    assert labels.tolist() == [1, 0, 0, 2]
    assert total(distances, labels) == best_by_trying_all(distances, 1) == 2


def test_plain_argmin_if_that_has_the_sizes_and_the_lower_cluster_in_ties():
    distances = torch.tensor([[1.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    assert assign(distances, 0).tolist() == assign(distances, 1).tolist() == [0, 1, 0]


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_assignment_at_any_scale(scale):
    distances = torch.rand(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances[:, 1:] += 1
    assert torch.equal(assign(distances * scale, 10), assign(distances, 10))


def test_many_clusters():
    distances = torch.rand(300, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances[:, 3:] += 0.5
    labels = assign(distances, 15)
    assert torch.bincount(labels).tolist() == [15] * 20
    assert total(distances, labels) == pytest.approx(best_by_linprog(distances, 15), rel=1e-9)


@pytest.mark.parametrize("start", ["random rows", "k-means++"])
@pytest.mark.parametrize("kind", MATRICES)
def test_objective_is_no_worse_than_that_of_k_means_constrained(kind, start):
    module = pytest.importorskip("k_means_constrained")
    k, min_size = 4, 96
    for seed in range(3):
        W = matrix(kind, seed=seed)
        if start == "random rows":
            init = W[torch.randperm(len(W), generator=torch.Generator().manual_seed(seed))[:k]]
        else:
            init = constrained_kmeans(W, k, 1, max_iter=1, seed=seed).centroids.float()
        ours = constrained_kmeans(W, k, min_size, init=init)
        peer = module.KMeansConstrained(k, size_min=min_size, init=init.numpy(), n_init=1, tol=1e-4).fit(W.numpy())
        assert torch.bincount(ours.labels).min() >= min_size
        assert inertia_of(W, ours.labels) <= inertia_of(W, torch.from_numpy(peer.labels_).long()) * (1 + 1e-6)
        if kind != "gaussian":  # the constraint is at work, in theirs and ours
            assert np.bincount(peer.labels_).min() == min_size


@pytest.mark.parametrize("kind", MATRICES)
def test_result_is_consistent(kind):
    W = matrix(kind)
    result = constrained_kmeans(W, 4, 100, seed=1)
    assert result.converged
    assert result.labels.dtype == torch.int64
    means = torch.stack([W[result.labels == c].double().mean(0) for c in range(4)])
    torch.testing.assert_close(result.centroids, means, rtol=1e-12, atol=1e-12)
    distances = (W.double()[:, None] - means).square().sum(2)
    torch.testing.assert_close(result.distances, distances.gather(1, result.labels[:, None])[:, 0], rtol=1e-9, atol=0)
    assert result.inertia == pytest.approx(inertia_of(W, result.labels), rel=1e-9)
    # A fixed point of Lloyd's iterations: no labels are cheaper for these centroids.
    assert total(distances, assign(distances, 100)) == pytest.approx(result.inertia, rel=1e-9)


@pytest.mark.parametrize("kind", MATRICES)
def test_every_iteration_lowers_the_inertia(kind):
    W = matrix(kind)
    whole = constrained_kmeans(W, 4, 100)
    inertia = [constrained_kmeans(W, 4, 100, max_iter=n).inertia for n in range(1, whole.n_iter + 1)]
    assert whole.n_iter > 2
    assert inertia[-1] == whole.inertia
    assert all(b < a for a, b in itertools.pairwise(inertia[:-1]))


def test_sums_that_follow_the_moves_agree_with_sums_from_scratch(monkeypatch):
    W = matrix("heavy tails")
    expected = constrained_kmeans(W, 4, 64)
    monkeypatch.setattr("idlora_ext.rows.kmeans._RESUM_EVERY", 1)
    result = constrained_kmeans(W, 4, 64)
    assert torch.equal(result.labels, expected.labels)
    torch.testing.assert_close(result.centroids, expected.centroids, rtol=0, atol=1e-12)


def test_finds_clusters_that_are_there():
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(4).repeat_interleave(torch.tensor([40, 50, 60, 70]))
    W = 10 * torch.randn(4, 16, generator=g)[truth] + torch.randn(220, 16, generator=g)
    labels = constrained_kmeans(W, 4, 40, n_init=5).labels
    assert len({(a, b) for a, b in zip(truth.tolist(), labels.tolist(), strict=True)}) == 4


def test_more_starts_are_no_worse_and_the_first_is_among_them():
    W = matrix("low rank")
    one, five = constrained_kmeans(W, 4, 40, seed=3), constrained_kmeans(W, 4, 40, seed=3, n_init=5)
    assert five.inertia < one.inertia  # a case in which the first start is not the best


def test_stops_at_max_iter_and_at_a_loose_tolerance():
    W = matrix("gaussian")
    full = constrained_kmeans(W, 4, 40)
    one = constrained_kmeans(W, 4, 40, max_iter=1)
    assert (one.n_iter, one.converged) == (1, False)
    loose = constrained_kmeans(W, 4, 40, tol=1e3)
    assert (loose.n_iter, loose.converged) == (1, True)
    assert full.n_iter > 1
    assert full.converged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides_give_the_rows_of_the_same_numbers(dtype):
    W = matrix("heavy tails", d=300, d_in=70).to(dtype)
    expected = select_rows(W.double(), 3, 32)
    wide = torch.zeros(600, 140, dtype=dtype)
    wide[::2, :70] = W
    for view in (W, W.t().contiguous().t(), wide[::2, :70], W.clone().requires_grad_()):
        index = select_rows(view, 3, 32)
        assert index.dtype == torch.int32
        assert torch.equal(index, expected)


def test_a_common_offset_changes_nothing():
    W = (matrix("gaussian") * 1024).round().double()  # sums with the offset are exact
    assert torch.equal(select_rows(W + 2.0**20, 4, 64), select_rows(W, 4, 64))


def test_cuda_gives_the_rows_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    W = matrix("heavy tails")
    index = select_rows(W.cuda(), 4, 64)
    assert index.is_cuda
    assert torch.equal(index.cpu(), select_rows(W, 4, 64))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [*MATRICES, "every row twice"])
def test_rows_do_not_depend_on_the_number_of_threads(kind, threads):
    W = matrix(kind, d=2048, d_in=1024)
    if kind == "every row twice":
        W[1::2] = W[::2]
    indices = []
    for n in (1, 2, 3):
        threads(n)
        indices.append(select_rows(W, 4, 128))
    assert torch.equal(indices[0], indices[1])
    assert torch.equal(indices[0], indices[2])


def test_rows_depend_on_nothing_but_the_seed():
    W = matrix("gaussian")
    torch.manual_seed(1)
    first = select_rows(W, 4, 32, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(select_rows(W, 4, 32, seed=5), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(select_rows(W, 4, 32, seed=6), first)


def test_nearest_takes_the_rows_nearest_to_the_centroids_in_order():
    W = matrix("heavy tails")
    result = constrained_kmeans(W, 4, 50, seed=2)
    index = select_rows(W, 4, 50, seed=2).long()
    for c, rows in enumerate(index):
        assert (result.labels[rows] == c).all()
        chosen = result.distances[rows]
        assert (chosen.diff() >= 0).all()
        rest = result.labels == c
        rest[rows] = False
        assert not rest.any() or result.distances[rest].min() >= chosen.max()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("d", "k", "r"), [(64, 4, 16), (65, 4, 16), (7, 1, 7), (5, 5, 1), (1, 1, 1), (100, 3, 8)])
def test_selection_is_distinct_rows(selection, d, k, r):
    index = select_rows(matrix("gaussian", d=d, d_in=12), k, r, selection=selection)
    assert index.shape == (k, r)
    assert index.dtype == torch.int32
    assert len(index.unique()) == k * r
    assert index.min() >= 0
    assert index.max() < d


def test_sequential_and_random():
    W = matrix("gaussian")
    assert select_rows(W, 2, 3, selection="sequential").tolist() == [[0, 1, 2], [3, 4, 5]]
    a, b, c = (select_rows(W, 2, 30, selection="random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.max() >= 60  # from all rows


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_matrices_end_well(name):
    W = DEGENERATE[name]
    result = constrained_kmeans(W, 4, 5)
    assert result.converged
    assert torch.bincount(result.labels, minlength=4).min() >= 5
    assert result.centroids.isfinite().all()
    assert 0 <= result.inertia < float("inf")
    assert len(select_rows(W, 4, 5).unique()) == 20


def test_identical_rows_have_no_inertia():
    assert constrained_kmeans(torch.full((40, 600), 0.1), 4, 5).inertia == 0


W = torch.zeros(40, 6)
BAD = torch.zeros(40, 6).index_fill(0, torch.tensor([7]), float("nan"))
ERRORS = {
    "nan": (lambda: select_rows(BAD, 4, 5), ValueError, "constrained_kmeans: W must be finite, got NaN"),
    "inf": (lambda: select_rows(BAD.nan_to_num(float("inf")), 4, 5), ValueError, "W must be finite"),
    "overflow": (lambda: select_rows(torch.eye(40).double() * 1e200, 4, 5), ValueError, "squares overflow"),
    "too few rows": (
        lambda: select_rows(W, 4, 11),
        ValueError,
        "select_rows: W must have at least k * r = 4 * 11 = 44 rows, got 40",
    ),
    "too few rows for the size": (
        lambda: constrained_kmeans(W, 4, 11),
        ValueError,
        "constrained_kmeans: W must have at least k * min_size = 4 * 11 = 44 rows, got 40",
    ),
    "k": (lambda: select_rows(W, 0, 5), ValueError, "select_rows: num_clusters must be at least 1, got 0"),
    "k type": (lambda: select_rows(W, 4.0, 5), TypeError, "num_clusters must be an integer, got float"),
    "r": (lambda: select_rows(W, 4, 0), ValueError, "select_rows: r must be at least 1, got 0"),
    "r type": (lambda: select_rows(W, 4, None), TypeError, "select_rows: r must be an integer, got NoneType"),
    "min_size": (lambda: constrained_kmeans(W, 4, 0), ValueError, "min_size must be at least 1, got 0"),
    "dimensions": (lambda: select_rows(W[0], 1, 1), ValueError, "W must have 2 dimensions"),
    "no features": (lambda: select_rows(W[:, :0], 1, 1), ValueError, "got [40, 0]"),
    "integers": (lambda: select_rows(W.int(), 1, 1), TypeError, "a floating-point tensor, got torch.int32"),
    "no tensor": (lambda: select_rows(W.numpy(), 1, 1), TypeError, "a floating-point tensor, got ndarray"),
    "meta": (lambda: select_rows(W.to("meta"), 1, 1), ValueError, "got a tensor on the meta device"),
    "selection": (
        lambda: select_rows(W, 1, 1, selection="best"),
        ValueError,
        "select_rows: selection must be one of pivoted_qr_whole, pivoted_qr, nearest, sequential, random, got 'best'",
    ),
    "init shape": (lambda: constrained_kmeans(W, 4, 5, init=W[:3]), ValueError, "init must be finite and [4, 6], got"),
    "init nan": (lambda: constrained_kmeans(W, 4, 5, init=BAD[5:9]), ValueError, "init must be finite"),
    "init type": (
        lambda: constrained_kmeans(W, 4, 5, init="random"),
        TypeError,
        "init must be a floating-point tensor",
    ),
    "init and n_init": (lambda: constrained_kmeans(W, 4, 5, init=W[:4], n_init=2), ValueError, "n_init must be 1"),
    "n_init": (lambda: constrained_kmeans(W, 4, 5, n_init=0), ValueError, "n_init must be at least 1, got 0"),
    "max_iter": (lambda: constrained_kmeans(W, 4, 5, max_iter=0), ValueError, "max_iter must be at least 1, got 0"),
    "tol": (lambda: constrained_kmeans(W, 4, 5, tol=float("nan")), ValueError, "tol must be >= 0, got nan"),
    "assign sizes": (lambda: assign(W, 7), ValueError, "assign: distances must have at least k * min_size = 6 * 7"),
    "assign nan": (lambda: assign(BAD, 1), ValueError, "assign: distances must be finite, got NaN"),
    "assign negative": (lambda: assign(W, -1), ValueError, "assign: min_size must be at least 0, got -1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_was_got(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_nothing_to_assign():
    assert assign(torch.zeros(0, 3), 0).shape == (0,)
