"""Rows chosen by a pivoted QR, beside LAPACK's."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import scipy.linalg
import torch

import idlora_ext
from idlora_ext import reference
from idlora_ext.rows import pivoting
from idlora_ext.rows.kmeans import constrained_kmeans
from idlora_ext.rows.pivoting import pivoted_rows
from idlora_ext.rows.selection import select_rows
from tests.helpers.models import FIELDS, layers_of, tiny_llama


def graded(d, d_in, decay=0.9, seed=0):
    """Singular values that fall off, as those of weights do, and rows of different norms."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d, d_in, generator=generator, dtype=torch.float64)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return U @ torch.diag(S * decay ** torch.arange(len(S), dtype=torch.float64)) @ V


def lapack(W):
    return scipy.linalg.qr(W.double().numpy().T, mode="r", pivoting=True)[1]


@pytest.mark.parametrize(("d", "d_in", "count"), [(60, 40, 30), (300, 24, 24), (20, 50, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pivots_are_lapacks(d, d_in, count, dtype):
    W = graded(d, d_in).to(dtype)
    pivots = pivoted_rows(W, count)
    assert pivots.tolist() == lapack(W)[:count].tolist() == reference.pivoted_rows(W.double(), count)
    assert torch.equal(pivoted_rows(W.T.contiguous().T, count), pivots)


def test_pivots_in_clusters_and_of_the_whole():
    W = graded(120, 30)
    index = select_rows(W, 3, 20, selection="pivoted_qr", seed=4)
    labels = constrained_kmeans(W, 3, 20, seed=4).labels
    for c, rows in enumerate(index.long()):
        members = (labels == c).nonzero()[:, 0]
        assert rows.tolist() == members[lapack(W[members])[:20]].tolist()
    whole = select_rows(W, 3, 8, selection="pivoted_qr_whole")
    assert whole.T.flatten().tolist() == lapack(W)[:24].tolist()  # dealt out like cards
    assert whole.is_contiguous()
    assert index.is_contiguous()


def test_a_sketch_spans_as_well_and_follows_the_seed():
    W = graded(400, 300, decay=0.97)
    count = 20
    assert count + pivoting._OVERSAMPLING < W.shape[1]

    def error(rows):
        Q = torch.linalg.qr(W[rows].T)[0]
        return (W - W @ Q @ Q.T).norm()

    exact = error(lapack(W)[:count])
    drawn = [pivoted_rows(W, count, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    for rows in drawn:
        assert len(rows.unique()) == count
        assert error(rows) < 1.03 * exact
    assert error(torch.arange(count)) > 1.03 * exact  # the test could fail


def test_more_pivots_than_the_rank():
    W = graded(40, 6)
    W[7] = 0
    pivots = pivoted_rows(W, 40).tolist()
    assert sorted(pivots) == list(range(40))
    assert pivots[:6] == lapack(W)[:6].tolist()
    rest = np.setdiff1d(np.arange(40), pivots[:6])
    assert pivots[6:12] == rest[lapack(W[rest])[:6]].tolist()  # again, among the rest
    assert pivots[-1] == 7
    assert pivoted_rows(torch.zeros(5, 3), 4).tolist() == [0, 1, 2, 3]
    copies = torch.tensor([[1.0, 2.0], [3.0, 1.0]]).repeat(3, 1)
    assert pivoted_rows(copies, 4).tolist() == [1, 0, 3, 2]  # ties: the lower row


@pytest.mark.parametrize("selection", ["pivoted_qr", "pivoted_qr_whole"])
def test_a_weight_that_is_not_finite_is_an_error_and_nothing_changes(selection):
    model = tiny_llama()
    model.model.layers[1].self_attn.v_proj.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.self_attn.v_proj': .*W must be finite"):
        idlora_ext.apply(model, **FIELDS | {"selection": selection})
    assert not layers_of(model)


@pytest.mark.parametrize("selection", ["pivoted_qr", "pivoted_qr_whole"])
def test_layers_get_the_selected_rows(selection):
    model = idlora_ext.apply(tiny_llama(), **FIELDS | {"selection": selection})
    for layer in layers_of(model).values():
        index = layer.idlora_adapter["default"].index
        W = layer.get_base_weight()
        assert torch.equal(index, select_rows(W, 2, 8, selection=selection, seed=zlib.crc32(layer.name.encode(), 0)))
        assert index.unique().numel() == 16
