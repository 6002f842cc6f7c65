"""The CPU kernels beyond test_ops.py: every instruction set, number of threads and path; what float16 and bfloat16 hold.

Tests called ``test_kernel_*`` run here on the best instruction set; test_instruction_sets.py runs them on the lower ones.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from idlora_ext import native
from tests.helpers.problems import FORMS, every_pair, named, options, tensors_of

if native.module is None:
    pytest.skip(f"native module: {native.reason}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# d, k, r, s: one of everything, tails of every length, parts of 1, whole tiles, tiles and a tail, a wide B
SHAPES = [
    (1, 1, 1, 1),
    (7, 1, 7, 1),
    (10, 2, 5, 5),
    (30, 5, 6, 3),
    (64, 16, 4, 4),
    (256, 2, 64, 1),
    (301, 4, 43, 1),
    (576, 4, 128, 2),
    (1032, 4, 24, 2),
]
TOKENS = [0, 1, 2, 37, 130]  # few: threads share B; many: they share the tokens, of which backward takes chunks


def problem(shape, N, dtype, held=torch.float32, form=FORMS["per-cluster"], draw=0):
    """``y0, dy, index, router, B, bias``."""
    torch.manual_seed(draw)
    d = shape[0]
    index, router, B = tensors_of(form, *shape, dtype=held)
    return torch.randn(N, d).to(dtype), torch.randn(N, d).to(dtype), index, router, B, torch.randn(d).to(held)


def run(prefix, y0, dy, index, router, B, bias, bias_in_y0=False, form=FORMS["per-cluster"]):
    adapt, backward = (getattr(torch.ops.idlora, f"{prefix}{op}") for op in ("adapt", "adapt_backward"))
    c, bounded, center = options(form, index).values()
    y, x = adapt(y0, index, router, B, bias, 0.7, bias_in_y0, c, bounded, center, True)
    gradients = backward(dy, x, index, router, B, 0.7, c, bounded, center)
    return {"y": y, "x": x} | dict(zip(("dy0", "dT", "dB"), gradients, strict=True))


def rms(t):
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def check_error(shape, N, dtype):
    forms = list(FORMS.values())
    turn = SHAPES.index(shape) + TOKENS.index(N) + DTYPES.index(dtype) if shape in SHAPES else 0
    for i in range(3):  # each meets every dtype, and many shapes
        form, (held, bias_in_y0) = forms[(3 * turn + i) % len(forms)], ((torch.float32, False), (dtype, True))[i % 2]
        kind = {"held": held, "form": form}
        errors = draw_errors(shape, N, dtype, bias_in_y0, kind, range(1))
        *_, router, B, _ = problem(shape, N, dtype, **kind)
        counts = {"dT": router.numel(), "dB": B.numel()}
        if form.get("bounded"):  # errors are those of one weight a token
            counts |= {"y": N, "dy0": N, "dT": min(N, router.numel())}
        # The error of a few numbers is luck: it is that of draws with 64, or of 16.
        draws = {name: min(16, math.ceil(64 / max(count, 1))) for name, count in counts.items()}
        if max(draws.values()) > 1:
            more = draw_errors(shape, N, dtype, bias_in_y0, kind, range(max(draws.values())))
            errors |= {name: more[name] for name, count in draws.items() if count > 1}
        for name, (ours, plain, rounding) in errors.items():
            assert ours <= (2 if name in "yx" else 3) * max(plain, rounding), (name, kind)


def draw_errors(shape, N, dtype, bias_in_y0, kind, draws):
    """Name of the output -> root mean square error of ours, of plain PyTorch, and of one rounding to dtype."""
    outputs = {}
    for draw in draws:
        args = problem(shape, N, dtype, draw=draw, **kind)
        rest = bias_in_y0, kind["form"]
        ours, plain = run("", *args, *rest), run("default_", *args, *rest)
        truth = run("default_", *(t.double() if t.is_floating_point() else t for t in args), *rest)
        if ours["x"].ndim == 3 and not kind["form"].get("scaled"):  # else it is a sum, or rounded
            assert torch.equal(ours["x"], plain["x"])
        for name, true in truth.items():
            assert ours[name].shape == plain[name].shape
            assert ours[name].dtype == plain[name].dtype
            outputs.setdefault(name, []).append((ours[name].double(), plain[name].double(), true))
    return {
        name: (
            rms(torch.stack([ours - true for ours, _, true in drawn])),
            rms(torch.stack([plain - true for _, plain, true in drawn])),
            torch.finfo(dtype).eps * rms(torch.stack([true for _, _, true in drawn])),
        )
        for name, drawn in outputs.items()
    }


@every_pair(shape=named(SHAPES), dtype=named(DTYPES), N=named(TOKENS))
def test_kernel_error(shape, dtype, N):
    """Root mean square error at most twice (gradients three times) that of plain PyTorch, or of one rounding to dtype."""
    check_error(shape, N, dtype)


def test_error_with_torchs_product():
    """From some size on, bfloat16 products are torch's, where the processor has instructions for them."""
    check_error((1040, 4, 64, 2), 200, torch.bfloat16)
    y0, _, *adapter = problem((1040, 4, 64, 2), 200, torch.bfloat16)
    expected, _ = torch.ops.idlora.adapt(y0, *adapter, 0.7)
    torch.ops.idlora.adapt_(y0, *adapter, 0.7)
    assert torch.equal(y0, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_results_do_not_depend_on_threads(dtype):
    """Bit for bit. In bfloat16 up to the size at which torch's own product takes over."""
    before = torch.get_num_threads()
    try:
        for shape, N in [((576, 4, 128, 2), 70), ((301, 4, 43, 1), 300), ((1032, 4, 24, 2), 33), ((4096, 4, 32, 2), 5)]:
            for form in (FORMS["per-cluster"], FORMS["static, scaled"], FORMS["bounded, scaled"]):
                args = problem(shape, N, dtype, form=form)
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(run("", *args, form=form))
                for result in results[1:]:
                    assert all(torch.equal(result[name], t) for name, t in results[0].items()), (shape, N, form)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_in_place_is_the_same(shape, dtype):
    """Bit for bit: a token's columns are read before any of them is written, whatever threads share."""
    before = torch.get_num_threads()
    try:
        forms = (FORMS["per-cluster"], FORMS["static"], FORMS["bounded, scaled"])
        for (turn, N), threads in itertools.product(enumerate(TOKENS), (1, 3)):
            torch.set_num_threads(threads)
            form = forms[turn % len(forms)]
            y0, _, *adapter = problem(shape, N, dtype, form=form)
            for bias_in_y0 in (False, True):
                rest = (*adapter, 0.7, bias_in_y0, *options(form, adapter[0]).values())
                expected, _ = torch.ops.idlora.adapt(y0, *rest)
                y = y0.clone()
                torch.ops.idlora.adapt_(y, *rest)
                assert torch.equal(y, expected), (N, form, threads, bias_in_y0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_results_do_not_depend_on_the_batch(dtype):
    """A token among many gets what it gets alone, up to the order in which a tile sums: here, the same bits."""
    y0, dy, index, router, B, bias = problem((576, 4, 32, 2), 130, dtype)
    y, x = torch.ops.idlora.adapt(y0, index, router, B, bias, 0.7, save_x=True)
    dy0 = torch.ops.idlora.adapt_backward(dy, x, index, router, B, 0.7)[0]
    for n in (0, 64, 129):
        alone, x_alone = torch.ops.idlora.adapt(y0[n : n + 1], index, router, B, bias, 0.7, save_x=True)
        assert torch.equal(alone, y[n : n + 1])
        assert torch.equal(
            torch.ops.idlora.adapt_backward(dy[n : n + 1], x_alone, index, router, B, 0.7)[0], dy0[n : n + 1]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernel_every_number_of_16_bits_is_read_and_written_as_it_is(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    none = torch.zeros(2, 4), torch.zeros(2**14, 2, dtype=dtype)  # an update of zero
    y = torch.ops.idlora.shared_gemm(every.view(2, 2**15), *none)
    torch.testing.assert_close(y.flatten(), every, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernel_rounding_is_torchs(dtype):
    """Ties, subnormals, overflow and NaN: ``y = 0 + z * 1`` is ``z`` rounded."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    between = torch.cat([every, (every + every.roll(-1)) / 2])  # and what lies in the middle of two neighbours
    bits = torch.cat([between.view(torch.int32) + step for step in (-1, 0, 1)])
    z = bits.view(torch.float32).view(-1, 1)
    y = torch.ops.idlora.shared_gemm(torch.zeros(len(z), 1, dtype=dtype), z, torch.ones(1, 1))
    torch.testing.assert_close(y, z.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_rows_more_than_2_31_elements_apart(dtype):
    d = 24
    stride = 2**31 + 64
    try:  # two pages of it are ever touched
        memory = torch.empty(stride + d, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"the system does not lend that much address space: {error}")
    y0, dy, index, router, B, bias = problem((d, 3, 4, 2), 2, dtype)
    apart = memory.as_strided((2, d), (stride, 1))
    for values, op in [(y0, "adapt"), (dy, "adapt_backward")]:
        apart.copy_(values)
        x = torch.ops.idlora.cluster_gather(y0, index)
        rest = (
            (index, router, B, bias, 0.7, False, None, False, None, True)
            if op == "adapt"
            else (x, index, router, B, 0.7)
        )
        expected = getattr(torch.ops.idlora, op)(values, *rest)
        assert all(map(torch.equal, getattr(torch.ops.idlora, op)(apart, *rest), expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_reads_what_is_not_aligned(dtype):
    args = problem((301, 4, 43, 1), 37, dtype, dtype)
    shifted = []
    for t in args:
        memory = torch.empty(t.numel() + 1, dtype=t.dtype)
        shifted.append(memory[1:].view(t.shape).copy_(t))
    ours, expected = run("", *shifted), run("", *args)
    assert all(torch.equal(ours[name], t) for name, t in expected.items())
