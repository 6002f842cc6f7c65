"""The operators against the paper's equations, in float64 and in low precision, eager and compiled."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from idlora_ext import ops, reference
from tests.helpers.problems import (
    BIASES,
    FORMS,
    adapter_tensors,
    each,
    every_form,
    every_pair,
    every_router,
    fused_and_composed,
    named,
    options,
    problem,
)

# d, k, r, s; odd ones too: nothing here is a multiple of a tile
SHAPES = [(24, 3, 4, 2), (7, 1, 7, 1), (30, 5, 6, 3), (64, 4, 16, 4), (1032, 4, 24, 2), (11, 11, 1, 1)]
LOW_PRECISION_SHAPES = [(64, 4, 16, 2), (1032, 4, 24, 2), (512, 4, 128, 2)]
LOW_PRECISION = [torch.bfloat16, torch.float16, torch.float32]
LEADING = {"N=0": (0,), "N=1": (1,), "N=5": (5,), "2x3": (2, 3), "none": ()}


@every_pair(shape=named(SHAPES), leading=LEADING, form=FORMS, bias=BIASES)
def test_adapt_is_the_papers_equation(shape, leading, form, bias, device):
    args = problem(shape, leading, form, bias, device=device)
    rest = {"scaling": 0.7, "bias_in_y0": bool(bias)} | options(form, args[1])
    expected = reference.adapt(*args, **rest)
    y = ops.adapt(*args, **rest)
    assert y.shape == args[0].shape
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    variables = [t for t in args if t is not None and t.requires_grad]
    g = torch.randn_like(y)
    gradients = torch.autograd.grad(y, variables, g)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, variables, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_adapted_linear_layer_is_the_papers_layer():
    """The identity behind everything: the adapter on y0 = h W^T is the paper's adapter on h with A_i = W[index_i]."""
    torch.manual_seed(0)
    h, W, b = torch.randn(5, 13).double(), torch.randn(24, 13).double(), torch.randn(24).double()
    index, router, B = adapter_tensors(24, 3, 4, 2)
    y = ops.adapt(h @ W.T, index, router, B, b, 0.7)
    torch.testing.assert_close(y, reference.linear(h, W, b, index, router, B, 0.7), rtol=1e-12, atol=1e-12)


@each(form=FORMS, bias=BIASES)
def test_gradcheck(form, bias, device):
    y0, index, router, B, b = problem((24, 3, 4, 2), (2, 2), form, bias, device=device)
    for function in fused_and_composed(index, bias, form):
        assert torch.autograd.gradcheck(function, (y0, router, B, b))


@pytest.mark.compiled
@every_router
def test_opcheck(form, device):
    y0, index, router, B, b = problem((24, 3, 4, 2), (2, 2), form, bias=True, device=device)
    x = y0.detach()[..., index.long()].requires_grad_()
    z = torch.randn(2, 2, 4, dtype=torch.float64, device=device, requires_grad=True)
    dy, dz = torch.randn_like(y0), torch.randn_like(z)
    plain = [t.detach() for t in (x, router, B, z)]
    given = options(form, index)
    c, bounded, center = given.values()
    kept = torch.ops.idlora.adapt(y0, index, router, B, None, 0.7, **given, save_x=True)[1].detach()
    for name, args in {
        "cluster_gather": (y0, index, b, c),
        "cluster_gather_backward": (plain[0], index, 24, c),
        "rb_scale": (x, router, bounded, center),
        "rb_scale_backward": (dz, plain[0], plain[1], bounded, center),
        "shared_gemm": (y0, z, B, b, 0.7),
        "shared_gemm_backward": (dy, plain[3], plain[2], 0.7),
        "adapt": (y0, index, router, B, b, 0.7, False, c, bounded, center, True),
        "adapt_": (y0.detach(), index, plain[1], plain[2], b.detach(), 0.7, False, c, bounded, center),
        "adapt_backward": (dy, kept, index, plain[1], plain[2], 0.7, c, bounded, center),
    }.items():
        torch.library.opcheck(getattr(torch.ops.idlora, name), args)


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_family_ops_compose_to_adapt(dtype, form, device):
    y0, index, router, B, b = problem((64, 4, 16, 4), form=form, dtype=dtype, bias=False, device=device)
    given = options(form, index)
    x = ops.cluster_gather(y0, index, row_scale=given["row_scale"])
    z = ops.rb_scale(x, router, given["bounded"], given["center"])
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(ops.shared_gemm(y0, z, B, b, 0.7), ops.adapt(y0, index, router, B, b, 0.7, **given))


STRIDES = {
    "row-strided": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand_as(t),
    "every-second-row": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
}


@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES)
def test_strided_and_expanded_inputs(view, device):
    y0, index, router, B, _ = problem((24, 3, 4, 2), device=device, requires_grad=False)
    y0 = view(y0)
    before = y0.clone()
    variables = [y0.requires_grad_(), router.requires_grad_(), view(B[: len(B)]).requires_grad_()]
    y = ops.adapt(y0, index, variables[1], variables[2])
    expected = reference.adapt(y0, index, variables[1], variables[2])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = view(torch.randn_like(y))
    for ours, theirs in zip(
        torch.autograd.grad(y, variables, g), torch.autograd.grad(expected, variables, g), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(y0, before), "adapt wrote to its input"


@every_form
def test_in_place_is_for_inference(form, device):
    y0, index, router, B, b = problem((24, 3, 4, 2), form=form, bias=False, device=device)
    with pytest.raises(RuntimeError, match="adapt_: it is for inference"):
        ops.adapt_(y0, index, router, B)
    rest = (index, router, B, b, 0.7, False, *options(form, index).values())
    expected = ops.adapt(y0, *rest)
    with torch.no_grad():
        inside = torch.func.vmap(ops.adapt_, (0,) + 9 * (None,))(y0.clone(), *rest)
        torch.testing.assert_close(inside, expected)
        assert ops.adapt_(y0, *rest) is y0
        with pytest.raises(ValueError, match=r"adapt: B must be \[d/s, r/s\]"):
            ops.adapt_(y0, index, router, B[1:])
    assert torch.equal(y0, expected)


@every_pair(
    form=FORMS,
    shape=named(LOW_PRECISION_SHAPES),
    bias=BIASES,
    dtype=named(LOW_PRECISION),
    parameters=named(["same", "float32"]),
)
def test_low_precision_error(shape, form, bias, dtype, parameters, device):
    """Error against float64 at most 2x (gradients 3x) that of the same maths in the same dtype in plain PyTorch."""
    _, index, router, B, b = problem(shape, (37,), form, bias=bias, device=device, requires_grad=False)
    held = torch.float32 if parameters == "float32" else dtype
    rest = [router.to(held), B.to(held)] + ([] if b is None else [b.to(held)])

    def run(function, y0, dy, convert):
        variables = [convert(t).detach().requires_grad_() for t in (y0, *rest)]
        given = options(form, index)
        y = function(variables[0], index, *variables[1:], scaling=0.7, bias_in_y0=bool(bias), **given)
        return [y, *torch.autograd.grad(y, variables, dy.to(y.dtype))]

    def errors(function, y0, dy, convert):
        truth = run(reference.adapt, y0, dy, lambda t: t.double())
        outputs = run(function, y0, dy, convert)
        return [(t.double() - true).abs().max() for t, true in zip(outputs, truth, strict=True)]

    def draw():
        return [torch.randn(37, shape[0], dtype=torch.float64, device=device).to(dtype) for _ in range(2)]

    first = draw()
    ours = errors(ops.adapt, *first, lambda t: t)
    theirs = [errors(reference.adapt, *first, lambda t: t.to(dtype))]
    # The largest error of a few numbers is luck: for the router's gradient, that of as many draws as give 64 numbers.
    for _ in range(1, math.ceil(64 / router.numel())):
        theirs.append(errors(reference.adapt, *draw(), lambda t: t.to(dtype)))
    for i, error in enumerate(ours):
        most = max(e[i] for e in theirs) if i == 2 else theirs[0][i]
        assert error <= (2 if i == 0 else 3) * most, f"output {i}"


def test_float16_survives_a_z_beyond_its_range(device):
    """z is quadratic in the activation: an outlier token of 300 gives a z of 1e5 and more."""
    y0 = torch.full((2, 64), 300.0, dtype=torch.float16, device=device)
    index = torch.arange(64, dtype=torch.int32, device=device).view(4, 16)
    router = torch.full((1, 16), 0.1, device=device)
    B = torch.full((32, 8), 1e-5, device=device)
    y = ops.adapt(y0, index, router, B)
    expected = reference.adapt(y0.double(), index, router.double(), B.double())
    assert ops.rb_scale(ops.cluster_gather(y0, index), router).max() > 65504
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=0)


@every_form
def test_saves_x_and_small_things_only(form, device):
    y0, index, router, B, b = problem((64, 4, 8, 2), (50,), form, bias=False, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.adapt(y0, index, router, B, b, **options(form, index))
    sizes = sorted(t.numel() for t in saved if t.data_ptr() not in {router.data_ptr(), B.data_ptr(), index.data_ptr()})
    one_weight = form.get("bounded") or (form.get("static") and form.get("shared"))
    small = ([2 * 8] if form.get("centred") else []) + ([4 * 8] if form.get("scaled") else [])
    assert sizes == [*small, 50 * 8 if one_weight else 50 * 4 * 8]


def test_no_zeros_are_made_for_gradients_that_are_undefined(device):
    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    class Zeros(TorchDispatchMode):
        found = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += (func,) if "zero" in str(func) else ()
            return func(*args, **(kwargs or {}))

    y0, index, router, B, _ = problem((24, 3, 4, 2), device=device)
    for after in (torch.clone, Undefined.apply):  # x has no gradient; then y has none either
        y = after(ops.adapt(y0, index, router, B))
        with Zeros() as zeros:
            y.backward(torch.ones_like(y))
        assert zeros.found == ()


def test_nothing_is_saved_without_gradients(device):
    y0, index, router, B, _ = problem((24, 3, 4, 2), device=device)
    with torch.no_grad():
        assert not ops.adapt(y0, index, router, B).requires_grad
    _, x = torch.ops.idlora.adapt(y0.detach(), index, router.detach(), B.detach())
    assert x.numel() == 0
    y, _ = torch.ops.idlora.adapt(y0, index, router, B)  # the raw op, told to save nothing
    with pytest.raises(RuntimeError, match="save_x=False"):
        y.sum().backward()


def test_autocast_does_not_reach_into_the_kernels(device):
    y0, index, router, B, _ = problem((64, 4, 16, 2), dtype=torch.float32, device=device)
    plain = ops.adapt(y0, index, router, B)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = ops.adapt(y0, index, router, B)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)


@pytest.mark.compiled
@every_router
def test_compiles_without_graph_breaks(form, device):
    torch.compiler.reset()
    y0, index, router, B, _ = problem((24, 3, 4, 2), form=form, device=device)
    compiled, given = torch.compile(ops.adapt, fullgraph=True, dynamic=True), options(form, index)
    for n in (1, 5, 9):
        y0 = torch.randn(n, 24, dtype=torch.float64, device=device, requires_grad=True)
        y = compiled(y0, index, router, B, None, 0.7, **given)
        expected = reference.adapt(y0, index, router, B, None, 0.7, **given)
        torch.testing.assert_close(y, expected)
        for ours, theirs in zip(
            torch.autograd.grad(y.square().sum(), (y0, router, B)),
            torch.autograd.grad(expected.square().sum(), (y0, router, B)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


@each(form=FORMS, dtype=named([torch.float64, torch.float32, torch.float16]))
def test_the_output_may_be_changed_in_place(form, dtype, device):
    """As models do (DeBERTa): a view that a custom function returned would refuse it."""
    y0, index, router, B, b = problem((64, 4, 16, 2), form=form, dtype=dtype, bias=False, device=device)
    g = torch.randn_like(y0)
    given = options(form, index)
    expected = torch.autograd.grad(ops.adapt(y0, index, router, B, b, **given), (y0, B), g)
    y = ops.adapt(y0, index, router, B, b, **given)
    y += 1
    assert all(map(torch.equal, torch.autograd.grad(y, (y0, B), g), expected))


def test_zero_B_returns_y0(device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y0, index, router, B, _ = problem((24, 3, 4, 2), dtype=dtype, device=device)
        assert torch.equal(ops.adapt(y0, index, router, torch.zeros_like(B)), y0)


def test_wrong_options_are_named():
    y0, index, router, B, _ = problem((24, 3, 4, 2), requires_grad=False)
    c = torch.ones(3, 4)
    for op, args in (("adapt", (y0, index, router, B)), ("cluster_gather", (y0, index))):
        for wrong, error, words in (
            (c[:2], ValueError, r"row_scale must be \[k, r\] = \[3, 4\], got shape \[2, 4\]"),
            (c.double(), TypeError, "row_scale must be float32, got float64"),
        ):
            with pytest.raises(error, match=f"{op}: {words}"):
                getattr(ops, op)(*args, row_scale=wrong)
    for call in (
        lambda T: ops.adapt(y0, index, T, B, bounded=True),
        lambda T: ops.rb_scale(y0[:, index.long()], T, True),
    ):
        for wrong in (router, router[0]):
            with pytest.raises(ValueError, match=r"router must be \[1, r\] = \[1, 4\], as a bounded one is, got shape"):
                call(wrong)
    x, center = y0[:, index.long()], torch.ones(2, 4)
    for op, call in (
        ("adapt", lambda center, T=router[:, 0]: ops.adapt(y0, index, T, B, center=center)),
        ("adapt_backward", lambda center, T=router[:, 0]: ops.adapt_backward(y0, x, index, T, B, center=center)),
        ("rb_scale", lambda center, T=router[:, 0]: ops.rb_scale(x, T, center=center)),
    ):
        for wrong, error, words in (
            (center[:1], ValueError, r"center must be \[2, r\] = \[2, 4\], got shape \[1, 4\]"),
            (center.double(), TypeError, "center must be float32, got float64"),
            (center.to("meta"), ValueError, "center must be on the activation's device cpu, got meta"),
        ):
            with pytest.raises(error, match=f"{op}: {words}"):
                call(wrong)
        for linear in (router, router[:1]):
            with pytest.raises(
                ValueError, match=rf"{op}: center must be None with a linear router, got shape \[2, 4\]"
            ):
                call(center, linear)


def _replace(args, position, value):
    return [value if i == position else a for i, a in enumerate(args)]


@pytest.mark.parametrize("fake", [False, True], ids=["eager", "fake"])
@pytest.mark.parametrize(
    ("position", "change", "error", "words"),
    [
        (0, lambda t: t.int(), TypeError, r"adapt: y0 must be float64, .* got int32"),
        (0, lambda t: t[..., :11], ValueError, r"adapt: index must be \[k, r\] with k \* r <= d = 11, got shape \[3, 4\]"),
        (1, lambda t: t.long(), TypeError, "adapt: index must be int32, got int64"),
        (1, lambda t: t.flatten(), ValueError, r"adapt: index must be \[k, r\].*got shape \[12\]"),
        (2, lambda t: t[:2], ValueError, r"adapt: router must be \[k, r\] = \[3, 4\] or \[1, r\] = \[1, 4\], or static: \[k\] = \[3\] or \[1\], got shape \[2, 4\]"),
        (2, lambda t: t.half(), TypeError, "adapt: router must be float64, got float16"),
        (3, lambda t: t[:, :1], ValueError, r"adapt: B must be \[d/s, r/s\] for one s that divides d = 24 and r = 4, got shape \[12, 1\]"),
        (3, lambda t: t.float(), TypeError, "adapt: B must be float64, got float32"),
        (4, lambda t: t[:-1], ValueError, r"adapt: bias must be \[d\] = \[24\], got shape \[23\]"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(position, change, error, words, fake):
    args = problem((24, 3, 4, 2), bias=False, requires_grad=False)
    args = _replace(args, position, change(args[position]))
    if fake:
        with torch._subclasses.FakeTensorMode() as mode:
            args = [mode.from_tensor(a) for a in args]
            with pytest.raises(error, match=words):
                ops.adapt(*args)
    else:
        with pytest.raises(error, match=words):
            ops.adapt(*args)


def test_other_wrong_arguments_are_named():
    y0, index, router, B, b = problem((24, 3, 4, 2), bias=False, requires_grad=False)
    with pytest.raises(ValueError, match="bias_in_y0=True needs the bias"):
        ops.adapt(y0, index, router, B, bias_in_y0=True)
    with pytest.raises(ValueError, match="device meta"):
        ops.adapt(y0.to("meta"), index, router, B)
    with pytest.raises(ValueError, match=r"rb_scale: router must be"):
        ops.rb_scale(y0[..., index.long()], router[:, :2])
    with pytest.raises(TypeError, match=r"shared_gemm: z must be float64, got float32"):
        ops.shared_gemm(y0, torch.zeros(5, 4), B)
    with pytest.raises(ValueError, match=r"shared_gemm: z must be \[\.\.\., r\] with leading dimensions \[5\]"):
        ops.shared_gemm(y0, torch.zeros(3, 4).double(), B)
    with pytest.raises(ValueError, match=r"adapt_backward: x must be \[\.\.\., k, r\] = \[5, 3, 4\]"):
        ops.adapt_backward(y0, y0, index, router, B)
    with pytest.raises(ValueError, match=r"cluster_gather: bias must be \[d\] = \[24\]"):
        ops.cluster_gather(y0, index, b[:3])
