"""The same model trained 20 steps on native and on default kernels: the same losses, within the tolerance rule."""

from __future__ import annotations

import json

import pytest
import torch

from idlora_ext import native
from tests.helpers.commands import python

pytestmark = pytest.mark.subprocess

TRAIN = """
import json, sys
import torch
import idlora_ext
from tests.helpers.models import FIELDS, MODELS, inputs, randomize_adapter

model = MODELS[sys.argv[1]].make().to(getattr(torch, sys.argv[2]))
static = sys.argv[4] == "static"
router = {"router": sys.argv[4], "shared_router": static, "center": static, "scaling": float(sys.argv[5])}
idlora_ext.apply(model, **FIELDS | router)
if static:
    idlora_ext.calibrate(model, [inputs(batch=4, length=16)], progress=False)
randomize_adapter(model, std=0.05)
assert (idlora_ext.native.module is None) == (sys.argv[3] == "default")
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.SGD(trained, lr=0.3)
losses = []
for step in range(20):
    batch = inputs(batch=4, length=16, seed=step % 4)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(json.dumps(losses))
"""


def losses(dtype: str, kernels: str, model: str, router: str, scaling: str) -> list[float]:
    switch = "0" if kernels == "default" else "1"
    done = python("-c", TRAIN, model, dtype, kernels, router, scaling, IDLORA_NATIVE=switch)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(native.module is None, reason=f"no native kernels: {native.reason}")
@pytest.mark.parametrize(
    "what", [("llama", "linear", "20"), ("gpt2", "linear", "20"), ("llama", "static", "2")], ids=str
)
def test_trains_alike(what):
    """gpt2 has biases. SGD, as Adam would turn a gradient's last bit into a whole step."""
    exact, default, ours = (
        losses(*how, *what) for how in (("float64", "default"), ("float32", "default"), ("float32", "native"))
    )
    assert exact[-1] < exact[0] - 0.02, "nothing was learnt"
    theirs = max(abs(a - b) for a, b in zip(default, exact, strict=True))
    last_bit = exact[0] * torch.finfo(torch.float32).eps  # of a loss: it is float32 itself
    assert max(abs(a - b) for a, b in zip(ours, exact, strict=True)) <= 2 * theirs + last_bit
