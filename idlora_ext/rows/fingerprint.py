"""What a base layer was when an adapter was made from it, in a few numbers that survive a change of precision.

``p_i = <w_i, u>`` for 16 rows ``w_i`` spread over ``W`` and one fixed vector ``u`` of signs, in float64. Rounding ``W``
to another format moves ``p`` by a relative error of that format's size; other weights move it by much more. Two layers
agree if their shapes are equal and ``||p - q|| <= tolerance * ||q||`` for the coarser of the two formats:

    float64, float32   1e-4        float16, bfloat16   5e-3        anything coarser (8 and 4 bits)   0.25

So a 16-bit adapter loads on the 32-bit base and on quantised copies of it, while another checkpoint of the same
architecture is refused, unless the precision at hand could not tell the two apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 16

_FORMATS = {torch.float64: 0, torch.float32: 0, torch.float16: 1, torch.bfloat16: 1}

_TOLERANCES = (1e-4, 5e-3, 0.25)

SIZE = 3 + _ROWS


def fingerprint(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``[d, d_in, format, p_1 .. p_16]`` as int32, ``p`` being the bits of float32 numbers.

    Integers, so that casting a model to another precision leaves them alone. On the meta device ``p`` is zero.

    Args:
        weight: ``W [d, d_in]``, dequantised.
        dtype: what the layer stores, if not the dtype of ``weight``.

    Returns:
        int32 ``[19]`` on the CPU.
    """
    d, d_in = weight.shape
    p = torch.zeros(_ROWS)
    if not weight.is_meta:
        rows = torch.arange(_ROWS, device=weight.device) * d // _ROWS
        i = torch.arange(d_in, device=weight.device)
        # Bit 13 of a Weyl sequence: signs that need no generator, so that they are the same on every device.
        signs = 1.0 - 2.0 * ((i * 40503 >> 13) & 1).double()
        p = (weight[rows].double() @ signs).float().cpu()
    head = torch.tensor([d, d_in, _FORMATS.get(dtype or weight.dtype, 2)], dtype=torch.int32)
    return torch.cat([head, p.view(torch.int32)])


def difference(stored: Tensor, present: Tensor) -> str | None:
    """Why the two fingerprints are not of one layer, or None if they are."""
    stored, present = stored.cpu(), present.cpu()
    if stored.shape != present.shape:
        return f"its fingerprint has {stored.numel()} entries instead of {present.numel()}"
    if not torch.equal(stored[:2], present[:2]):
        return f"it had shape {stored[:2].tolist()} and this one has {present[:2].tolist()}"
    p, q = (f[3:].contiguous().view(torch.float32).double() for f in (stored, present))
    if not (p.any() and q.any()):  # made or present on the meta device: there was nothing to compare with
        return None
    tolerance = _TOLERANCES[max(int(stored[2].clamp(0, 2)), int(present[2].clamp(0, 2)))]
    relative = float((p - q).norm() / torch.maximum(p.norm(), q.norm()))
    if relative <= tolerance:
        return None
    return f"its weights differ by {relative:.2g} where {tolerance:g} is allowed for this precision"
