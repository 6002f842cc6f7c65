"""The operators, which know a tensor: ``y0 -> y``. Schemas are in ``library.py``, the plain-PyTorch kernels in
``default_kernels.py``, gradients in ``autograd.py``.

For one adapted layer, with ``y0 = h W^T`` the output of the frozen base layer (arXiv 2602.20727, eq. 3 and 4)::

    x_i = y0[index_i]                       cluster_gather   A_i h is a subset of the columns of h W^T
    a_i = <T_i, x_i>,  z = sum_i a_i x_i    rb_scale         one scalar per token and cluster
    y   = y0 + scaling * concat_j(B z^(j))  shared_gemm      one product for all clusters; z^(j): j-th of s parts

``adapt`` is the three fused and ``adapt_backward`` its gradient; between the two only ``x`` is kept. ``adapt_`` writes
into ``y0``.

A router of one dimension is static: ``a_i`` is a constant, one for each cluster (``[k]``) or one for all (``[1]``).
Then the update does not depend on the token: it is a matrix of rank ``r``. A ``bounded`` router, ``[1, r]``, gives all
clusters one weight a token, ``z = a u`` with ``u = sum_i x_i`` and ``a`` of
:mod:`idlora_ext.ops.bounded_router`. With it and with one constant for all it is enough to keep ``u``, a ``k``-th of
``x``; the gradients of ``k`` constants need each ``x_i``.

``torch.func`` (``grad``, ``vmap``, ``jvp``, ..) and forward-mode differentiation take the ops apart: they see plain
PyTorch. So does a gradient of a gradient (``create_graph=True``), in the backward pass.

A ``center`` (``ubar`` and ``w``, constants) takes the direction that tokens share out of a static or a bounded router's
sum: ``P u = u - ubar <w, u>`` is in the place of ``u``, and is what is kept.

Dtypes: activations in float64, float32, bfloat16 or float16. ``router``, ``B`` and ``bias`` have the activation's dtype
or float32.
"""

from .functional import adapt, adapt_, adapt_backward, cluster_gather, rb_scale, shared_gemm

__all__ = ["adapt", "adapt_", "adapt_backward", "cluster_gather", "rb_scale", "shared_gemm"]
