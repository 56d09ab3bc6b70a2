"""The criterion on backend `cuda`: whole layers in the emulator, and what is left on a GPU."""

from __future__ import annotations

import pytest
import tolerance
import torch
from problems import Problem, make, make_exact, on_device, run_on_device
from test_forward import bits

import lora_kernels as lk
from lora_kernels import dropout

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCALES = {"whole": (1.0, 1.0), "W=0": (0.0, 1.0), "W=0,B~1e-3": (0.0, 1e-3), "B=0": (1.0, 0.0)}
FORMS = ("one_grid", "two_launches and passes")
SHAPE = (136, 264, 296, 16)  # C2 looks at results of 4096 elements or more


def emulate(emulated, p: Problem, form: str) -> dict[str, torch.Tensor]:
    """y and the gradients by the kernels for compute capability 9.0."""
    m, (n, r), dtype = len(p.x), p.lora_b.shape, p.x.dtype
    mask = {}
    if p.seed is not None:
        mask = {"seed": p.seed.tolist(), "threshold": dropout.drop_threshold(p.dropout_p)}
    # 1/q is left to the up projection: dB then has it once.
    scale = p.scaling, 1 / lk.keep_probability(p.dropout_p)
    given = {"bf16": dtype == torch.bfloat16, "scale": scale} | mask
    forward, backward = ("one_launch", form) if form == "one_grid" else form.split(" and ")
    y, h = torch.empty(m, n, dtype=dtype), torch.empty(m, r, dtype=dtype)
    operands = map(bits, (p.x, p.weight, p.lora_a, p.lora_b, p.bias))
    emulated.forward(*operands, [bits(y)], [bits(h)], given | {"form": forward})
    grads = {"dx": p.x, "da": p.lora_a, "db": p.lora_b}
    grads = {name: torch.empty_like(t) for name, t in grads.items()}
    operands = [bits(t) for t in (p.dy, p.x, p.weight, p.lora_a, p.lora_b, h)]
    results = [{name: bits(t) for name, t in grads.items()}]
    emulated.backward(operands, results, given | {"form": backward})
    return {"y": y, "x": grads["dx"], "lora_a": grads["da"], "lora_b": grads["db"]}


@pytest.mark.parametrize("p", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize("form", [FORMS[0], pytest.param(FORMS[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_c1_c2_c5_in_the_emulator(emulated, scales, form, p):
    dtype = torch.float16 if form == "one_grid" and p > 0 else torch.bfloat16
    problem = make(SHAPE, dtype, dropout_p=p, w_scale=scales[0], b_scale=scales[1])
    got = emulate(emulated, problem, form)
    tolerance.assert_c1(problem, got)
    if scales == (1.0, 1.0):
        tolerance.assert_c2(problem, got)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_c4_in_the_emulator(emulated, dtype, form):
    problem = make_exact((72, 136, 72, 16), dtype, 3)
    tolerance.assert_c4(problem, emulate(emulated, problem, form))


# ---- on a device --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_c3_on_the_gpu(dtype, p):
    problem = make((1000, 520, 776, 16), dtype, dropout_p=p, bias=False)
    tolerance.assert_c3(problem, run_on_device(problem, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_c5_on_the_gpu(scales, dtype, p):
    problem = make(SHAPE, dtype, dropout_p=p, bias=False, w_scale=scales[0], b_scale=scales[1])
    tolerance.assert_c1(problem, run_on_device(problem, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_c6_on_the_gpu(p):
    """opcheck of the differentiable operator by `cuda`; gradcheck of the formula in float64."""
    low = on_device(make((24, 40, 32, 8), torch.bfloat16, dropout_p=p))
    leaves = [t.requires_grad_() for t in (low.x, low.lora_a, low.lora_b, low.bias)]
    operands = (leaves[0], low.weight, *leaves[1:], low.seed, 0.5, p, "cuda")
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear, operands)
    wide = on_device(make((6, 5, 7, 3), torch.float64, dropout_p=p))

    def f(x, a, b, bias):
        return lk.fused_lora_linear(
            x, wide.weight, a, b, bias, dropout_p=p, seed=wide.seed, backend="composed"
        ).t()

    leaves = [t.requires_grad_() for t in (wide.x, wide.lora_a, wide.lora_b, wide.bias)]
    assert torch.autograd.gradcheck(f, leaves, nondet_tol=0.0)
