"""pooling.py against its definition, written out token by token."""
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from pooling import concept_pool, concept_similarity  # noqa: E402

SHAPES = [(3, 7, 5, 6), (2, 3, 9, 4), (4, 1, 1, 3), (1, 5, 20, 2)]  # B, N, T, D; T below and above D, N


def random_inputs(B, N, T, D, seed=0, dtype=torch.float64, unit=True):
    g = torch.Generator().manual_seed(seed)
    V, P = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in [(B, T, D), (N, D)])
    if unit:
        V, P = F.normalize(V, dim=-1), F.normalize(P, dim=-1)
    return V.to(dtype).requires_grad_(), P.to(dtype).requires_grad_()


def naive_pool(V, P, mask=None):
    rows = []
    for m in range(len(V)):
        for n in range(len(P)):
            tokens = [t for t in range(V.shape[1]) if mask is None or mask[m, t]]
            weights = [torch.exp(V[m, t] @ P[n]) for t in tokens]
            pooled = sum(w * V[m, t] for w, t in zip(weights, tokens))
            rows.append(pooled / sum(weights) if tokens else V[m, 0] * 0)
    return torch.stack(rows).view(len(V), len(P), V.shape[2])


def naive_similarity(V, P, mask=None):
    return (F.normalize(naive_pool(V, P, mask), dim=-1) * P).sum(-1)


def plain_similarity(V, P, mask=None):  # for larger shapes; concept_pool is tested against the loops
    return (F.normalize(concept_pool(V, P, mask), dim=-1) * P).sum(-1)


def value_and_grads(f, V, P, weight, *args, **kwargs):
    out = f(V, P, *args, **kwargs)
    return out, *torch.autograd.grad((out * weight).sum(), (V, P))


def some_mask(B, T, seed=1):
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, 0] = True
    return mask


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_equals_the_definition(shape, masked, unit):
    V, P = random_inputs(*shape, unit=unit)
    mask = some_mask(shape[0], shape[2]) if masked else None
    weight = torch.randn(shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert (concept_pool(V, P, mask) - naive_pool(V, P, mask)).abs().max() < 1e-12
    expected = value_and_grads(naive_similarity, V, P, weight, mask)
    for ours in (concept_similarity, plain_similarity):
        for x, y in zip(value_and_grads(ours, V, P, weight, mask), expected):
            assert x.shape == y.shape and x.dtype == torch.float64 and (x - y).abs().max() < 1e-11


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("memory_budget", [None, 0])
def test_gradcheck(masked, memory_budget):
    V, P = random_inputs(3, 4, 5, 6)
    mask = some_mask(3, 5) if masked else None
    assert torch.autograd.gradcheck(lambda V, P: concept_similarity(V, P, mask, memory_budget), (V, P))


def test_golden_similarity_of_the_released_code():
    for name in ("c2lip_loss", "c2lip_loss_case2"):
        golden = np.load(HERE / "fixtures" / f"{name}.npz")
        V, P = torch.from_numpy(golden["image_tokens"]), torch.from_numpy(golden["concept_features"])
        assert (concept_similarity(V, P) - torch.from_numpy(golden["xac_similarity"])).abs().max() < 1e-12


def test_any_memory_budget_gives_the_same():
    B, N, T, D = 30, 10, 7, 8
    V, P = random_inputs(B, N, T, D)
    mask, weight = some_mask(B, T), torch.randn(B, N, dtype=torch.float64)
    expected = value_and_grads(concept_similarity, V, P, weight, mask, memory_budget=2**30)
    image = 8 * T * (T + N)  # what one image keeps for the backward
    for budget in [0, 1, 1792, 4 * image // 3, 5 * image, 18_000, 2**20]:  # 18,000: 9 kept, chunks of 2
        out = value_and_grads(concept_similarity, V, P, weight, mask, memory_budget=budget)
        for x, y in zip(out, expected):
            assert (x - y).abs().max() < 1e-12, budget


def saved_bytes(V, P, **kwargs):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
        concept_similarity(V, P, **kwargs)
    return sum(saved)


def test_memory_does_not_grow_with_the_number_of_concepts():
    B, T, D, budget = 16, 12, 8, 20_000
    sizes = []
    for N in (10, 100, 1000):
        V, P = random_inputs(B, N, T, D, dtype=torch.float32)
        sizes.append(saved_bytes(V, P, memory_budget=budget) - V.nbytes - P.nbytes)
    assert max(sizes) <= budget
    assert saved_bytes(V, P, memory_budget=0) == V.nbytes + P.nbytes  # everything is computed again


def test_largest_tensor_stays_within_the_budget():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and x.shape not in self.expected:
                    self.size = max(self.size, x.numel() * x.element_size())
            return out

    B, N, T, D, budget = 8, 600, 20, 16, 100_000
    V, P = random_inputs(B, N, T, D, dtype=torch.float32)
    from pooling import _backward, _forward
    mode = Largest()
    mode.expected = {(B, N), (B, T, D), (N, D)}
    with mode, torch.no_grad():
        kept = _forward(V, P, None, budget, 0)[1:]
        _backward(torch.ones(B, N), V, P, None, *kept, budget)
    assert 0 < mode.size <= budget // 4 < B * N * T * 4


def test_zero_tokens_equal_tokens_and_empty_sizes():
    for dtype in (torch.float32, torch.float64):
        V, P = random_inputs(4, 3, 5, 6, dtype=dtype)
        V = V.detach().clone()
        V[0] = 0  # nothing to see: similarity 0
        V[1] = V[1, :1]  # all tokens equal: their own cosine
        V[2, 3] = 0  # one zero token among others
        V.requires_grad_()
        weight = torch.ones(4, 3, dtype=dtype)
        out, dV, dP = value_and_grads(concept_similarity, V, P, weight)
        assert not out[0].any() and torch.allclose(out[1], F.normalize(V[1, 0], dim=0) @ P.T, atol=1e-6)
        assert dV.isfinite().all() and dP.isfinite().all()
        double = [x.detach().double().requires_grad_() for x in (V, P)]
        exact = value_and_grads(plain_similarity, *double, weight.double())
        for x, y in zip((out, dV, dP), exact):  # also where F.normalize divides by its eps
            assert torch.allclose(x.double(), y, rtol=1e-4, atol=1e-5)
    for B, N, T in [(0, 3, 5), (4, 0, 5), (0, 0, 5), (4, 3, 0)]:
        V, P = random_inputs(B, N, T, 6)
        out, dV, dP = value_and_grads(concept_similarity, V, P, torch.ones(B, N, dtype=torch.float64))
        assert out.shape == (B, N) and dV.shape == V.shape and dP.shape == P.shape
        assert not out[:, :0 if T else None].any() and dV.isfinite().all() and dP.isfinite().all()
        assert concept_pool(V, P).shape == (B, N, 6)


def test_masked_tokens_do_not_count_whatever_they_hold():
    V, P = random_inputs(3, 4, 6, 5)
    mask = some_mask(3, 6)
    mask[1] = False
    garbage = V.detach().clone()
    garbage[~mask] = torch.tensor([float("nan"), float("inf"), 1e30, -1e30, 3.0], dtype=torch.float64)
    garbage.requires_grad_()
    out, dV, dP = value_and_grads(concept_similarity, garbage, P, 1.0, mask)
    expected = value_and_grads(naive_similarity, V, P, 1.0, mask)
    assert not out[1].any() and not concept_pool(garbage, P, mask)[1].any() and not dV[~mask].any()
    for x, y in zip((out, dV, dP), expected):
        assert (x - y).abs().max() < 1e-12
    assert (concept_pool(garbage, P, mask) - naive_pool(V, P, mask)).abs().max() < 1e-12


def relative(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


def test_float32_and_bfloat16_accuracy():
    V, P = random_inputs(8, 24, 196, 64)
    weight = torch.randn(8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact = value_and_grads(concept_similarity, V, P, weight)
    half = [x.detach().bfloat16().requires_grad_() for x in (V, P)]
    double = [x.detach().double().requires_grad_() for x in half]  # what bfloat16 inputs should give
    exact_half = value_and_grads(concept_similarity, *double, weight)

    def check_half(out):
        assert relative(out[0], exact_half[0]) < 2e-3  # the scores are bfloat16: the loss averages
        loss, exact_loss = (F.softplus(10 * x.double() - 10).sum() for x in (out[0], exact_half[0]))
        assert abs(loss / exact_loss - 1) < 3e-4
        assert all(relative(x, y) < 6e-3 for x, y in zip(out[1:], exact_half[1:]))

    single = [x.detach().float().requires_grad_() for x in (V, P)]
    out = value_and_grads(concept_similarity, *single, weight.float())
    assert all(relative(x, y) < 1e-5 for x, y in zip(out, exact))
    out = value_and_grads(concept_similarity, *half, weight.float())
    assert out[0].dtype == torch.float32 and out[1].dtype == out[2].dtype == torch.bfloat16
    check_half(out)
    with torch.autocast("cpu", torch.bfloat16):
        under = value_and_grads(concept_similarity, *single, weight.float())
        assert concept_similarity(V, P).dtype == torch.float64  # autocast leaves float64 alone
    assert all(x.dtype == torch.float32 for x in under)
    check_half(under)


def test_only_once_differentiable_and_backward_twice():
    V, P = random_inputs(2, 3, 4, 5)
    out = concept_similarity(V, P).sum()
    first = torch.autograd.grad(out, (V, P), retain_graph=True)
    again = torch.autograd.grad(out, (V, P))  # what is kept for the backward is not overwritten by it
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    (dV,) = torch.autograd.grad(concept_similarity(V, P).sum(), V, create_graph=True)
    with pytest.raises(RuntimeError):
        dV.sum().backward()


def test_gradient_for_one_input_only_and_noncontiguous_inputs():
    V, P = random_inputs(3, 4, 5, 6)
    (dV,) = torch.autograd.grad(concept_similarity(V, P.detach()).sum(), V)
    (dP,) = torch.autograd.grad(concept_similarity(V.detach(), P).sum(), P)
    both = torch.autograd.grad(concept_similarity(V, P).sum(), (V, P))
    assert torch.equal(dV, both[0]) and torch.equal(dP, both[1])
    assert not concept_similarity(V.detach(), P.detach()).requires_grad
    turned = V.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()  # (B, T, D)
    wide = torch.cat([P, P], 1).detach()[:, :6].requires_grad_()
    for x, y in zip(torch.autograd.grad(concept_similarity(turned, wide).sum(), (turned, wide)), both):
        assert (x - y).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_for_any_number_of_concepts(backend):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    import torch._dynamo.testing
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def loss(V, P):
        return F.logsigmoid(10 * concept_similarity(F.normalize(V, dim=-1), P)).sum()

    def eager(V, P):
        return F.logsigmoid(10 * concept_similarity(F.normalize(V, dim=-1), P)).sum()

    for N in (5, 8, 13, 3, 400):
        V, P = random_inputs(4, N, 6, 8, dtype=torch.float32)
        for x, y in zip(torch.autograd.grad(loss(V, P), (V, P)), torch.autograd.grad(eager(V, P), (V, P))):
            assert torch.allclose(x, y, atol=1e-5)
    assert counter.frame_count <= 2  # once for the first N, once for any other
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(loss(V, P), eager(V, P), rtol=1e-5)
