"""The limit: DRAM bytes that one launch of an adapter cannot do without, whatever kernel does it.

``N`` tokens, ``d`` outputs, ``k`` clusters of ``r`` rows, ``s`` parts (arXiv 2602.20727), ``e`` bytes of an activation.
Each tensor is moved once::

    forward    N d e  (y0 read) + N d e  (y written)  [+ N k r e  (x written, when training)]  + B + T + index
    backward   N d e  (dy read) + N k r e  (x read) + N d e  (dy0 written)                     + B + T + index + dB + dT

A static router is ``a [1]`` or ``[k]`` instead of ``T``; of one constant, and of a bounded router, only the sum of
``x`` is kept, ``N r e``. Row scales are as many numbers as the index, float32.

``B [d/s, r/s]`` and ``T [1, r]`` or ``[k, r]`` have their own widths, ``index [k, r]`` is int32. A layer's bias (``d``
values, once a launch) is not counted. At ``N <= 64`` the limit is mostly ``B``.
"""

from __future__ import annotations


def forward_limit(
    N: int,
    d: int,
    k: int,
    r: int,
    s: int,
    itemsize: int,
    param_itemsize: int,
    router_itemsize: int,
    training: bool,
    *,
    shared_router: bool = True,
    static_router: bool = False,
    bounded: bool = False,
    row_scale: bool = False,
) -> int:
    """Bytes of one ``idlora::adapt``; ``training``: it keeps ``x`` for the backward pass."""
    once = _parameters(d, k, r, s, param_itemsize, router_itemsize, shared_router, static_router)
    once += _index(k, r, row_scale)
    kept = _kept(k, r, (shared_router and static_router) or bounded) if training else 0
    return N * (2 * d + kept) * itemsize + once


def backward_limit(
    N: int,
    d: int,
    k: int,
    r: int,
    s: int,
    itemsize: int,
    param_itemsize: int,
    router_itemsize: int,
    *,
    shared_router: bool = True,
    static_router: bool = False,
    bounded: bool = False,
    row_scale: bool = False,
) -> int:
    """Bytes of one ``idlora::adapt_backward``, which reads ``B`` and ``T`` and writes ``dB`` and ``dT``."""
    once = 2 * _parameters(d, k, r, s, param_itemsize, router_itemsize, shared_router, static_router)
    once += _index(k, r, row_scale)
    return N * (2 * d + _kept(k, r, (shared_router and static_router) or bounded)) * itemsize + once


def _kept(k: int, r: int, one_weight: bool) -> int:
    return r if one_weight else k * r


def _parameters(
    d: int, k: int, r: int, s: int, param_itemsize: int, router_itemsize: int, shared: bool, static: bool
) -> int:
    router = (1 if shared else k) * (1 if static else r)
    return (d // s) * (r // s) * param_itemsize + router * router_itemsize


def _index(k: int, r: int, row_scale: bool) -> int:
    return k * r * (8 if row_scale else 4)
