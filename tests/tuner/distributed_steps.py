"""What the scenarios of ``distributed_worker.py`` are made of: a share of a batch, a model, some steps of training."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import idlora_ext
from tests.helpers.models import FIELDS, randomize_adapter, tiny_llama

SIZE = 4  # rows of the global batch


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def batch(step, mine=True):
    ids = torch.randint(0, 101, (SIZE, 12), generator=torch.Generator().manual_seed(step))
    rank, world = rank_and_world() if mine else (0, 1)
    share = SIZE // world
    return {"input_ids": ids[rank * share :][:share], "labels": ids[rank * share :][:share]}


def adapted(**fields):
    model = idlora_ext.apply(tiny_llama().double(), progress=False, **FIELDS | fields)
    if fields.get("center"):
        idlora_ext.calibrate(model, [batch(7)], progress=False)  # each rank its share of the tokens
    return randomize_adapter(model).train()


def adapter_of(model):
    return {
        name.partition("module.")[2] or name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in model.state_dict().items()
        if ".idlora_" in name
    }


def train(model, steps=3, mine=True):
    """Losses of the global batch and gradients of the first step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses, gradients = [], {}
    for step in range(steps):
        loss = model(**batch(step, mine)).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and step == 0:
                g = parameter.grad
                gradients[name.removeprefix("module.")] = (g.full_tensor() if isinstance(g, DTensor) else g).clone()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        if mine and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return {"losses": losses, "gradients": gradients, "adapter": adapter_of(model)}
