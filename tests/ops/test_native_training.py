"""The same models trained 20 steps on native and on default kernels: the same losses, within the tolerance rule."""

from __future__ import annotations

import json
from typing import Any

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

kernels, whats, dtypes = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
assert (idlora_ext.native.module is None) == (kernels == "default")


def losses(dtype, name, router, scaling):
    model = MODELS[name].make().to(getattr(torch, dtype))
    static = router == "static"
    idlora_ext.apply(model, **FIELDS | {"router": router, "shared_router": static, "center": static, "scaling": scaling})
    if static:
        idlora_ext.calibrate(model, [inputs(batch=4, length=16)], progress=False)
    randomize_adapter(model, std=0.05)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.3)
    for step in range(20):
        batch = inputs(batch=4, length=16, seed=step % 4)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


print(json.dumps({dtype: [list(losses(dtype, *what)) for what in whats] for dtype in dtypes}))
"""

WHAT: list[tuple[str, str, float]] = [("llama", "linear", 20.0), ("gpt2", "linear", 20.0), ("llama", "static", 2.0)]
KERNELS = {"default": ("float64", "float32"), "native": ("float32",)}


def train(kernels: str, *dtypes: str) -> Any:
    """The losses by dtype, of each of WHAT, in one process."""
    done = python("-c", TRAIN, kernels, json.dumps(WHAT), *dtypes, IDLORA_NATIVE="0" if kernels == "default" else "1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def losses() -> dict[str, Any]:
    return {kernels: train(kernels, *dtypes) for kernels, dtypes in KERNELS.items()}


@pytest.mark.skipif(native.module is None, reason=f"no native kernels: {native.reason}")
@pytest.mark.parametrize("i", range(len(WHAT)), ids=[" ".join(map(str, what)) for what in WHAT])
def test_trains_alike(losses: dict[str, Any], i: int) -> None:
    """gpt2 has biases. SGD, as Adam would turn a gradient's last bit into a whole step."""
    exact, default = (losses["default"][dtype][i] for dtype in KERNELS["default"])
    ours = losses["native"]["float32"][i]
    assert exact[-1] < exact[0] - 0.02, "nothing was learnt"
    theirs = max(abs(a - b) for a, b in zip(default, exact, strict=True))
    last_bit = exact[0] * torch.finfo(torch.float32).eps  # of a loss: it is float32 itself
    assert max(abs(a - b) for a, b in zip(ours, exact, strict=True)) <= 2 * theirs + last_bit
