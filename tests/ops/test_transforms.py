"""Gradients of gradients, forward-mode derivatives and torch.func: they must not lose what runs through an operator."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import idlora_ext
from idlora_ext import IdLoraConfig, ops, reference
from tests.helpers.problems import (
    BIASES,
    FORMS,
    adapter_tensors,
    each,
    every_form,
    fused_and_composed,
    options,
    problem,
)

every_form_and_bias = each(form=FORMS, bias=BIASES)


@every_form_and_bias
def test_second_derivatives(form, bias, device):
    y0, index, *rest = problem((12, 2, 3, 1), (2,), form, bias, device=device)
    for function in fused_and_composed(index, bias, form):
        assert torch.autograd.gradgradcheck(function, (y0, *rest))


@every_form_and_bias
def test_forward_mode(form, bias, device):
    y0, index, *rest = problem((12, 2, 4, 2), (2,), form, bias, device=device)
    for function in fused_and_composed(index, bias, form):
        assert torch.autograd.gradcheck(function, (y0, *rest), check_forward_ad=True, check_backward_ad=False)


@every_form
def test_second_derivatives_of_the_native_kernels(form, device):
    """Those of float32: the product of a Hessian with a vector, against the equation's in float64."""
    products = []
    for dtype, adapt in ((torch.float32, ops.adapt), (torch.float64, reference.adapt)):
        y0, index, router, B, _ = problem((64, 4, 8, 2), (6,), form, dtype=dtype, device=device)
        variables = (y0, router, B)
        gradients = torch.autograd.grad(
            adapt(y0, index, router, B, **options(form, index)).tanh().sum(), variables, create_graph=True
        )
        generator = torch.Generator().manual_seed(1)
        v = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in variables]
        products.append(torch.autograd.grad(gradients, variables, v))
    for ours, theirs in zip(*products, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def fresh(**settings):
    """A small network of float64 with one adapted layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 3)).double()
    return idlora_ext.apply(model, IdLoraConfig(r=4, target_modules=["0"], **settings))


def adapted(**settings):
    """One whose adapter does something."""
    model = fresh(**settings)
    model(torch.randn(8, 10).double())  # the batch that a mean is taken from
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter)
    return model


SETTINGS = {
    "default": {},
    "static": {"center": False},
    "linear": {"router": "linear", "center": False},
    "bounded": {"router": "bounded", "center": False},
    "scaled rows": {"row_scale": True, "center": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_of_each_sample(settings):
    """``vmap(grad(..))``, as differentially private training takes them, are those of one sample after the other."""
    model, rows = adapted(**settings), torch.randn(5, 10).double()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, row):
        return functional_call(model, parameters, (row,)).square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, rows)
    for i, row in enumerate(rows):
        model.zero_grad()
        model(row).square().sum().backward()
        for name in parameters:
            torch.testing.assert_close(together[name][i], model.get_parameter(name).grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("gradients", [True, False])
def test_a_layers_derivative_along_a_direction(settings, gradients):
    model, h, v = adapted(**settings), torch.randn(5, 10).double(), torch.randn(5, 10).double()
    with torch.set_grad_enabled(gradients):
        _, along = jvp(model, (h,), (v,))
        step = 1e-6
        torch.testing.assert_close(
            along, (model(h + step * v) - model(h - step * v)) / (2 * step), rtol=1e-6, atol=1e-7
        )


def test_a_transform_does_not_take_a_mean():
    model, rows = fresh(), torch.randn(5, 10).double()
    of_each = vmap(grad(lambda row: model(row).sum()))
    with pytest.raises(ValueError, match=r"layer '0'.*calibrate"):
        jvp(model, (rows,), (rows,))
    with pytest.raises(ValueError, match=r"layer '0'.*calibrate"):
        of_each(rows)
    assert not model[0].idlora_adapter["default"].mean.any()
    model(rows)
    model[0].idlora_adapter[
        "default"
    ].mean_taken = False  # as after loading: a mean is there, and not known to have been taken
    torch.testing.assert_close(jvp(model, (rows,), (rows,))[0], model(rows))
    assert of_each(rows).shape == rows.shape


def test_autocast_does_not_reach_into_a_transform():
    """The operators choose the dtypes of their products, taken apart or not."""
    y0, index, *rest = (t if t is None else t.float() if t.is_floating_point() else t for t in problem((24, 3, 4, 2)))

    def function(y0):
        return ops.adapt(y0, index, *rest, 0.7)

    expected, _ = jvp(function, (y0,), (torch.ones_like(y0),))
    with torch.autocast("cpu", torch.bfloat16):
        y, along = jvp(function, (y0,), (torch.ones_like(y0),))
    assert torch.equal(y, expected)
    assert along.dtype == torch.float32


def test_transforms_check_their_arguments():
    index, router, B = adapter_tensors(24, 3, 4, 2)
    with pytest.raises(ValueError, match="B must be"):
        jvp(
            lambda y0: ops.adapt(y0, index, router, B[:5]),
            (torch.randn(2, 24).double(),),
            (torch.ones(2, 24).double(),),
        )
