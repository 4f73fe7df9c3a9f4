"""losses.py against the released loss's golden values, against naive loops, and on 1, 2 and 4 processes."""
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from losses import (clip_loss, concept_columns, first_row, gather_features, npc_loss,  # noqa: E402
                    row_counts, siglip_loss, xac_loss)
from pooling import concept_similarity  # noqa: E402


def unit(*shape, seed, dtype=torch.float64):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1).to(dtype)


# ---------------------------------------------------------------------------------------------------------
# the definitions, one logit at a time

def naive_sigmoid(z, labels, count):
    total = z.sum() * 0
    for m in range(z.shape[0]):
        for n in range(z.shape[1]):
            total = total + torch.log(1 + torch.exp(-z[m, n] if labels[m, n] else z[m, n]))
    return total / max(count, 1)


def naive_softmax(z, labels):
    def one_way(z, labels):  # each row's cross-entropy over its columns, averaged over its positives
        rows = []
        for m in range(z.shape[0]):
            log_p = z[m] - torch.log(sum(torch.exp(z[m, n]) for n in range(z.shape[1])))
            positives = [log_p[n] for n in range(z.shape[1]) if labels[m, n]]
            if positives:
                rows.append(-sum(positives) / len(positives))
        return sum(rows) / len(rows) if rows else z.sum() * 0
    return (one_way(z.T, labels.T) + one_way(z, labels)) / 2 if z.numel() else z.sum() * 0


def naive_similarity(tokens, concepts):
    rows = []
    for v in tokens:
        pooled = [(v @ p).softmax(0) @ v for p in concepts]
        rows.append(torch.stack([F.normalize(c, dim=0) @ p for c, p in zip(pooled, concepts)])
                    if pooled else v.sum() * concepts.sum(1))
    return torch.stack(rows)


def labels_from(sets, dedupe):
    """Each image's strings -> the string of each column, and labels (B, N) of the whole batch."""
    pairs = [(m, string) for m, strings in enumerate(sets) for string in strings]
    columns = list(dict.fromkeys(s for _, s in pairs)) if dedupe else [s for _, s in pairs]
    labels = torch.zeros(len(sets), len(columns), dtype=torch.bool)
    for k, (m, string) in enumerate(pairs):
        labels[m, columns.index(string) if dedupe else k] = True
    return columns, labels


# ---------------------------------------------------------------------------------------------------------
# one process

@pytest.mark.parametrize("name", ["c2lip_loss", "c2lip_loss_case2"])
def test_golden_values_of_the_released_loss(name):
    golden = np.load(HERE / "fixtures" / f"{name}.npz")
    names = "image_features text_features concept_features image_tokens logit_scale logit_bias".split()
    inputs = {name: torch.from_numpy(golden[name]).requires_grad_() for name in names}
    I, T, P, V, s, b = inputs.values()
    owners = torch.from_numpy(golden["concept_indices"])  # (N,) each phrase's image
    pairs = torch.stack([owners, torch.arange(len(owners))], dim=1)
    ids = torch.zeros(len(owners), dtype=torch.int64)  # all the same phrase: must not matter without dedupe
    columns, labels = concept_columns(P, ids, pairs, len(I), dedupe=False)
    similarity = concept_similarity(V, columns)
    losses = {"contrastive": siglip_loss(I, T, s, b), "npc": npc_loss(I, columns, labels, s, b),
              "xac": xac_loss(similarity, labels, s, b)}
    assert (similarity - torch.from_numpy(golden["xac_similarity"])).abs().max() < 1e-12
    for term, loss in losses.items():
        assert abs(loss.item() - golden[f"{term}_loss"]) < 1e-6
    total = (losses["contrastive"] + float(golden["npc_loss_scale"]) * losses["npc"]
             + float(golden["xac_loss_scale"]) * losses["xac"])
    assert abs(total.item() - golden["total"]) < 1e-6
    for prefix, loss in [("grad_npc_", losses["npc"]), ("grad_xac_", losses["xac"]), ("grad_", total)]:
        grads = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True, materialize_grads=True)
        for key, grad in zip(inputs, grads):
            assert (grad - torch.from_numpy(golden[prefix + key])).abs().max() < 1e-6, prefix + key


@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_naive_loops(sigmoid, seed):
    B, N, D = 5, 8, 6
    I, T, P = (unit(n, D, seed=10 * seed + i).requires_grad_() for i, n in enumerate([B, B, N]))
    similarity = unit(B, N, seed=10 * seed + 5).requires_grad_()
    s = torch.tensor(7.3, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(-3.1, dtype=torch.float64, requires_grad=True) if sigmoid else None
    labels = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) < 0.35
    labels[1] = False  # an image without a concept
    labels[[0, 2], 3] = True  # a concept of several images
    labels[:, 5] = False  # a column without an image
    eye, shift = torch.eye(B, dtype=torch.bool), 0 if b is None else b
    pairs = [
        (siglip_loss(I, T, s, b) if sigmoid else clip_loss(I, T, s),
         naive_sigmoid(s * I @ T.T + shift, eye, B) if sigmoid else naive_softmax(s * I @ T.T, eye)),
        (npc_loss(I, P, labels, s, b), naive_sigmoid(s * I @ P.T + shift, labels, N) if sigmoid
         else naive_softmax(s * I @ P.T, labels)),
        (xac_loss(similarity, labels, s, b), naive_sigmoid(s * similarity + shift, labels, N) if sigmoid
         else naive_softmax(s * similarity, labels))]
    inputs = [x for x in (I, T, P, similarity, s, b) if x is not None]
    for both in pairs:
        assert both[0].shape == () and abs(both[0] - both[1]).item() < 1e-12
        for x, y in zip(*(torch.autograd.grad(loss, inputs, materialize_grads=True) for loss in both)):
            assert (x - y).abs().max() < 1e-12


def test_clip_loss_is_torch_cross_entropy_and_siglip_loss_is_binary_cross_entropy():
    I, T = unit(16, 8, seed=0), unit(16, 8, seed=1)
    z, target = 100 * I @ T.T, torch.arange(16)
    expected = (F.cross_entropy(z, target) + F.cross_entropy(z.T, target)) / 2
    assert abs(clip_loss(I, T, 100.0) - expected) < 1e-10
    expected = F.binary_cross_entropy_with_logits(z - 10, torch.eye(16).double(), reduction="sum") / 16
    assert abs(siglip_loss(I, T, 100.0, -10.0) - expected) < 1e-10


def test_gradcheck():
    I, P = unit(3, 4, seed=0).requires_grad_(), unit(5, 4, seed=1).requires_grad_()
    s = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
    assert torch.autograd.gradcheck(lambda I, P, s, b: npc_loss(I, P, labels, s, b), (I, P, s, b))
    assert torch.autograd.gradcheck(lambda I, P, s: npc_loss(I, P, labels, s), (I, P, s))
    assert torch.autograd.gradcheck(lambda I, P, s, b: siglip_loss(I, P[:3], s, b), (I, P, s, b))
    assert torch.autograd.gradcheck(lambda I, P, s: clip_loss(I, P[:3], s), (I, P, s))


@pytest.mark.parametrize("b", [-10.0, None])
def test_no_concept_at_all_is_zero_with_a_graph(b):
    I = unit(4, 8, seed=0).requires_grad_()
    tokens = unit(4, 3, 8, seed=1).requires_grad_()
    P = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    empty, padding = none.view(0, 2), torch.tensor([[-1, -1]])
    for dedupe, pairs in [(True, empty), (False, empty), (True, padding), (False, padding)]:
        columns, labels = concept_columns(P, none, pairs, 4, dedupe)
        assert columns.shape == (0, 8) and labels.shape == (4, 0) and labels.dtype == torch.bool
        similarity = concept_similarity(tokens, columns)
        loss = npc_loss(I, columns, labels, s, b) + xac_loss(similarity, labels, s, b)
        inputs = [I, tokens, P, s]
        grads = torch.autograd.grad(loss, inputs)
        assert loss.item() == 0 and all(g.shape == x.shape and not g.any() for g, x in zip(grads, inputs))
    # columns without any positive, as when every image of the softmax form is without a concept
    P, labels = unit(2, 8, seed=3).requires_grad_(), torch.zeros(4, 2, dtype=torch.bool)
    loss = npc_loss(I, P, labels, s, b)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, [I, P, s]))


def test_half_precision_inputs_and_autocast_keep_logits_in_float32():
    I, P = unit(64, 96, seed=0).bfloat16(), unit(80, 96, seed=1).bfloat16()
    labels = torch.rand(64, 80, generator=torch.Generator().manual_seed(0)) < 0.05
    for loss in (lambda I, P: npc_loss(I, P, labels, 100.0, -10.0),
                 lambda I, P: npc_loss(I, P, labels, 100.0),
                 lambda I, P: siglip_loss(I, P[:64], 100.0, -10.0), lambda I, P: clip_loss(I, P[:64], 100.0)):
        exact = loss(I.double(), P.double())
        for inputs in [(I, P), (I.float(), P.float())]:
            with torch.autocast("cpu", torch.bfloat16):
                under = loss(*inputs)
            assert under.dtype == torch.float32 == loss(*inputs).dtype
            assert abs(under / exact - 1) < 1e-5 and abs(loss(*inputs) / exact - 1) < 1e-5
        assert exact.dtype == torch.float64


def test_extreme_logits_stay_finite_and_exact():
    I = unit(3, 4, seed=0, dtype=torch.float32).requires_grad_()
    for loss in (siglip_loss(I, I.detach(), 1e4, -10.0), clip_loss(I, I.detach(), 1e4)):
        assert loss.isfinite() and torch.autograd.grad(loss, I)[0].isfinite().all()
    one = torch.ones(1, 1, dtype=torch.float32)  # z = 20: log(1 + e^-20), where float32 has 1 + e^-20 = 1
    assert siglip_loss(one, one, 30.0, -10.0).item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-5)


def test_concept_columns_by_hand():
    P = torch.arange(5.0)[:, None].requires_grad_()  # rows 0..4, row 3 is padding
    ids = torch.tensor([70, 50, 60, -1, 50])  # 50 twice
    pairs = torch.tensor([[0, 0], [0, 1], [2, 4], [2, 2], [1, 3], [-1, 0]])  # two padded pairs at the end
    columns, labels = concept_columns(P, ids, pairs, 3)
    assert columns.flatten().tolist() == [0, 1, 2]
    assert labels.tolist() == [[True, True, False], [False, False, False], [False, True, True]]
    columns.sum().backward()
    assert P.grad.flatten().tolist() == [1, 1, 1, 0, 0]
    columns, labels = concept_columns(P, ids, pairs, 3, dedupe=False)
    assert columns.flatten().tolist() == [0, 1, 4, 2]
    assert labels.tolist() == [[True, True, False, False], [False] * 4, [False, False, True, True]]


def test_gather_without_processes_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_features(x) is x and row_counts(3) == [3] and first_row(3) == 0


def test_losses_compile_without_a_graph_break():
    I, P, labels = unit(4, 8, seed=0), unit(6, 8, seed=1), torch.rand(4, 6) < 0.4
    for loss in (lambda: npc_loss(I, P, labels, 10.0, -10.0), lambda: npc_loss(I, P, labels, 10.0),
                 lambda: siglip_loss(I, P[:4], 10.0, -10.0), lambda: clip_loss(I, P[:4], 10.0)):
        assert torch.allclose(torch.compile(loss, fullgraph=True, backend="aot_eager")(), loss())


# ---------------------------------------------------------------------------------------------------------
# several processes: the sum of losses, and DDP's gradients, are those of one process with the whole batch

F_IN, D, TOKENS = 5, 6, 4
SETS = [[1, 2], [2], [], [3, 1, 4], [5], [2, 6], [], [1], [7, 3]]  # the strings of each image; repeats abound
SPLITS = {1: [[9]], 2: [[4, 5], [6, 3]], 4: [[2, 1, 3, 3], [3, 0, 4, 2]]}  # image rows of each process
BATCHES = {"repeats": SETS, "a process without concepts": [[], []] + SETS[2:5] + [[], [], [], [8]],
           "no concept": [[]] * 9}
CASES = [(batch, kind, dedupe, term) for batch in BATCHES for kind in ("sigmoid", "softmax")
         for dedupe in (True, False) for term in ("contrastive", "npc", "xac", "total")]


class Towers(torch.nn.Module):
    def __init__(self, sigmoid):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.token, self.text = (torch.nn.Linear(F_IN, D).double() for _ in range(3))
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.logit_bias = torch.nn.Parameter(torch.tensor(-2.0, dtype=torch.float64)) if sigmoid else None

    def forward(self, images, texts):
        tokens = F.normalize(self.token(images), dim=-1)  # (b, T, D)
        pooled = F.normalize(self.image(images.mean(1)), dim=-1)  # (b, D)
        return pooled, tokens, F.normalize(self.text(texts), dim=-1), self.logit_scale.exp(), self.logit_bias


def batch_inputs():
    g = torch.Generator().manual_seed(5)
    images = torch.randn(9, TOKENS, F_IN, generator=g, dtype=torch.float64)
    captions = torch.randn(9, F_IN, generator=g, dtype=torch.float64)
    return images, captions, torch.randn(9, F_IN, generator=g, dtype=torch.float64)  # the last: each string's


def reference(batch, kind, dedupe, term):
    """Loss and gradients from the definitions alone."""
    model = Towers(kind == "sigmoid")
    images, captions, strings = batch_inputs()
    columns, labels = labels_from(BATCHES[batch], dedupe)
    I, V, T, s, b = model(images, torch.cat([captions, strings[columns]]))
    T, P = T[:9], T[9:]
    eye, z_npc, z_xac = torch.eye(9, dtype=torch.bool), s * I @ P.T, s * naive_similarity(V, P)
    if kind == "sigmoid":
        terms = {"contrastive": naive_sigmoid(s * I @ T.T + b, eye, 9),
                 "npc": naive_sigmoid(z_npc + b, labels, len(P)),
                 "xac": naive_sigmoid(z_xac + b, labels, len(P))}
    else:
        terms = {"contrastive": naive_softmax(s * I @ T.T, eye),
                 "npc": naive_softmax(z_npc, labels), "xac": naive_softmax(z_xac, labels)}
    terms["total"] = terms["contrastive"] + terms["npc"] + 0.5 * terms["xac"]
    grads = torch.autograd.grad(terms[term], list(model.parameters()), materialize_grads=True)
    return terms[term].detach(), dict(zip(dict(model.named_parameters()), grads))


def step(model, split, batch, kind, dedupe, term):
    """This process's share of the loss times the world size, after backward."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    start, b = sum(split[:rank]), split[rank]
    images, captions, strings = (batch_inputs()[0][start:start + b], batch_inputs()[1][start:start + b],
                                 batch_inputs()[2])
    sets = BATCHES[batch][start:start + b]
    unique = list(dict.fromkeys(string for strings_ in sets for string in strings_))
    pairs = [(m, unique.index(string)) for m, strings_ in enumerate(sets) for string in strings_]
    pad = 2 if rank == 1 else 0  # padded to a static shape here, not there
    ids = torch.tensor([1000 - u for u in unique] + [-1] * pad, dtype=torch.int64)
    pairs = torch.tensor(pairs + [(-1, -1)] * pad, dtype=torch.int64).view(-1, 2)
    I, V, T, s, bias = model(images, torch.cat([captions, strings[unique], strings[[0] * pad]]))
    columns, labels = concept_columns(T[b:], ids, pairs, b, dedupe)
    texts, offset = gather_features(T[:b]), first_row(b)
    assert offset == start and len(texts) == 9
    assert len(columns) == len(labels_from(BATCHES[batch], dedupe)[0])
    terms = {"contrastive": siglip_loss(I, texts, s, bias, offset) if kind == "sigmoid"
             else clip_loss(I, texts, s, offset),
             "npc": npc_loss(I, columns, labels, s, bias),
             "xac": xac_loss(concept_similarity(V, columns), labels, s, bias)}
    terms["total"] = terms["contrastive"] + terms["npc"] + 0.5 * terms["xac"]
    loss = terms[term] * world
    used = sum(x.sum() * 0 for x in (I, V, T, s, bias) if x is not None)  # DDP wants every output in the loss
    (loss + used).backward()
    return loss.detach()


def worker(rank, world, folder):
    torch.set_num_threads(1)
    from datetime import timedelta
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=timedelta(seconds=40))
    results = {}
    models = {kind: torch.nn.parallel.DistributedDataParallel(Towers(kind == "sigmoid"))
              for kind in ("sigmoid", "softmax")}
    for split in SPLITS[world]:
        for case in CASES:
            model = models[case[1]]
            model.zero_grad()
            loss = step(model, split, *case)
            dist.all_reduce(loss)
            results[(tuple(split), *case)] = (loss / world, {k.removeprefix("module."): p.grad.clone()
                                                             for k, p in model.named_parameters()})
    # gather: uneven, empty, ints, bfloat16
    rows = [3, 0, 1, 2][:world]
    for dtype in (torch.int64, torch.bfloat16, torch.float32):
        expected = torch.cat([torch.full((n, 2), r, dtype=dtype) for r, n in enumerate(rows)])
        gathered = gather_features(torch.full((rows[rank], 2), rank, dtype=dtype))
        assert torch.equal(gathered, expected)
        assert gathered.requires_grad == (dtype.is_floating_point and world > 1)
    # the backward sums over processes: process r weighs row j by (r + 1) (j + 1)
    x = torch.zeros(rows[rank], requires_grad=True)
    weights = torch.arange(1.0, sum(rows) + 1)
    (gather_features(x) * weights * (rank + 1)).sum().backward()
    own = weights[sum(rows[:rank]):sum(rows[:rank + 1])] * sum(range(1, world + 1))
    assert torch.equal(x.grad, own)
    # only one process's features need a gradient: no hang
    x = torch.ones(2, requires_grad=rank == 0)
    gather_features(x).sum().backward()
    assert rank or x.grad.tolist() == [world, world]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spawn(world, folder, seconds=120):
    os.environ["OMP_NUM_THREADS"] = "1"
    context = torch.multiprocessing.spawn(worker, (world, str(folder)), nprocs=world, join=False)
    end = time.time() + seconds
    try:
        while not context.join(timeout=1):
            assert time.time() < end, f"{world} processes hang"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def references():
    return {case: reference(*case) for case in CASES}


def compare(case, loss, grads, references):
    expected, expected_grads = references[case]
    assert abs(loss - expected).item() < 1e-10, case
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).abs().max().item() < 1e-10, (case, name)


def test_without_process_group_equals_the_definitions(references):
    for case in CASES:
        model = Towers(case[1] == "sigmoid")
        loss = step(model, [9], *case)
        compare(case, loss, {k: p.grad for k, p in model.named_parameters()}, references)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_equal_the_whole_batch(world, tmp_path, references):
    for results in spawn(world, tmp_path):  # every process's view, of loss and of DDP's averaged gradients
        assert len(results) == len(SPLITS[world]) * len(CASES)
        for (_, *case), (loss, grads) in results.items():
            compare(tuple(case), loss, grads, references)
