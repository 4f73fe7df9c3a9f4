"""The later terms of losses.py against naive loops in float64, and on 1, 2 and 4 processes."""
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from losses import caption_xac_loss, first_row, gather_features, paraphrase_loss  # noqa: E402
from pooling import concept_pool, concept_similarity  # noqa: E402

F_IN, D, TOKENS, B = 5, 6, 4, 9
SPLITS = {1: [[9]], 2: [[4, 5], [0, 9]], 4: [[2, 1, 3, 3], [3, 0, 4, 2]]}  # image rows of each process


class Towers(torch.nn.Module):
    """Linear maps; everything is normalised but the words."""
    def __init__(self, sigmoid):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.token, self.text = (torch.nn.Linear(F_IN, D).double() for _ in range(3))
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.logit_bias = torch.nn.Parameter(torch.tensor(-2.0, dtype=torch.float64)) if sigmoid else None

    def forward(self, inputs):
        out = {"s": self.logit_scale.exp(), "b": self.logit_bias}
        out["I"] = F.normalize(self.image(inputs["images"].mean(1)), dim=-1)
        out["V"] = F.normalize(self.token(inputs["images"]), dim=-1)
        for name in ("T", "P"):
            out[name] = F.normalize(self.text(inputs[name]), dim=-1)
        return out


def batch(masks, seed=5):
    """Inputs and masks of the whole batch; masks: some, none, or all are valid."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, F_IN, generator=g, dtype=torch.float64)

    def mask(*shape):
        some = torch.rand(*shape, generator=g) < 0.6
        return {"some": some, "none": some & False, "all": some | True}[masks]

    inputs = {"images": random(B, TOKENS), "T": random(B), "P": random(B)}
    return inputs, {"P": mask(B)}


def sigmoid_sum(grid):
    """(logit, whether true) of each pair -> sum of -log sigmoid."""
    return sum(torch.log(1 + torch.exp(-z if true else z)) for z, true in grid)


def cross_entropy(scores, right):
    return torch.log(sum(torch.exp(z) for z in scores)) - scores[right]


# ------------------------------------------------------------------------------------------------- one logit at a time

def naive_caption_xac(x, masks):
    pooled = [[(v @ t).softmax(0) @ v for t in x["T"]] for v in x["V"]]
    z = [[x["s"] * F.normalize(c, dim=0) @ t for c, t in zip(row, x["T"])] for row in pooled]
    if x["b"] is not None:
        return {"caption_xac": sigmoid_sum([(z[i][j] + x["b"], i == j) for i in range(B) for j in range(B)]) / B}
    columns = [[z[i][j] for i in range(B)] for j in range(B)]
    both = [cross_entropy(z[i], i) + cross_entropy(columns[i], i) for i in range(B)]
    return {"caption_xac": sum(both) / (2 * B)}


def naive_paraphrase(x, masks):
    rows = [i for i in range(B) if masks["P"][i]]
    z = {i: [x["s"] * x["P"][i] @ t for t in x["T"]] for i in rows}
    if not rows:
        return {"paraphrase": x["s"] * 0}
    if x["b"] is not None:
        grid = [(z[i][j] + x["b"], i == j) for i in rows for j in range(B)]
        return {"paraphrase": sigmoid_sum(grid) / len(rows)}
    return {"paraphrase": sum(cross_entropy(z[i], i) for i in rows) / len(rows)}


# ------------------------------------------------------------------------------------------------- ours, of some rows

def our_caption_xac(x, masks, offset):
    return {"caption_xac": caption_xac_loss(concept_similarity(x["V"], x["T"]), x["s"], x["b"], offset)}


def our_paraphrase(x, masks, offset):
    return {"paraphrase": paraphrase_loss(x["P"], x["T"], masks["P"], x["s"], x["b"], offset)}


NAIVE = {"caption_xac": naive_caption_xac, "paraphrase": naive_paraphrase}
OURS = {"caption_xac": our_caption_xac, "paraphrase": our_paraphrase}
OF_ALL = {"T"}                  # what the processes gather
MASKS_OF_ALL = set()
CASES = [(name, kind, masks) for name in OURS for kind in ("sigmoid", "softmax") for masks in ("some", "none", "all")]


def weighted(terms):
    return sum(weight * term for weight, term in zip((1, 0.7, 0.4), terms.values()))


def reference(name, kind, masks):
    model = Towers(kind == "sigmoid")
    inputs, valid = batch(masks)
    loss = weighted(NAIVE[name](model(inputs), valid))
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return loss.detach(), dict(zip(dict(model.named_parameters()), gradients))


def step(model, split, name, masks):
    """This process's share of the loss times the number of processes, after backward."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = slice(sum(split[:rank]), sum(split[:rank + 1]))
    inputs, valid = batch(masks)
    x = model({key: value[own] for key, value in inputs.items()})
    used = sum(y.sum() * 0 for y in x.values() if y is not None)    # DDP wants every output in the loss
    x |= {key: gather_features(x[key]) for key in OF_ALL}
    valid = {key: mask if key in MASKS_OF_ALL else mask[own] for key, mask in valid.items()}
    offset = first_row(split[rank])
    loss = weighted(OURS[name](x, valid, offset)) * world
    (loss + used).backward()
    return loss.detach()


def compare(case, loss, gradients):
    expected, expected_gradients = reference(*case)
    assert abs(loss - expected).item() < 1e-10, case
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).abs().max() < 1e-10, (case, name)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_equals_the_naive_loop(case):
    name, kind, masks = case
    model = Towers(kind == "sigmoid")
    loss = step(model, [B], name, masks)
    zero = torch.zeros(())
    compare(case, loss, {key: zero if p.grad is None else p.grad for key, p in model.named_parameters()})


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=timedelta(minutes=10))
    results = []
    models = {kind: torch.nn.parallel.DistributedDataParallel(Towers(kind == "sigmoid"))
              for kind in ("sigmoid", "softmax")}
    for split in SPLITS[world]:
        for name, kind, masks in CASES:
            model = models[kind]
            model.zero_grad()
            loss = step(model, split, name, masks)
            dist.all_reduce(loss)
            gradients = {key.removeprefix("module."): p.grad.clone() for key, p in model.named_parameters()}
            results.append(((name, kind, masks), loss / world, gradients))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_equal_the_whole_batch(world, tmp_path):
    os.environ["OMP_NUM_THREADS"] = "1"
    context = torch.multiprocessing.spawn(worker, (world, str(tmp_path)), nprocs=world, join=False)
    try:
        while not context.join():
            pass
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    for rank in range(world):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert len(results) == len(SPLITS[world]) * len(CASES)
        for case, loss, gradients in results:
            compare(case, loss, gradients)


# ------------------------------------------------------------------------------------------------- by hand

def test_captions_pool_as_the_definition_says():
    V, T = (F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1) for shape in [(5, 7, 8), (5, 8)])
    pooled = F.normalize(concept_pool(V, T), dim=-1)
    z = 10 * (pooled * T).sum(-1)
    rows = torch.arange(5)
    expected = (F.cross_entropy(z, rows) + F.cross_entropy(z.T, rows)) / 2
    assert abs(caption_xac_loss(concept_similarity(V, T), 10.0) - expected) < 1e-12


def test_paraphrases_as_released():
    """The released code: cross-entropy of the paraphrases' rows over all captions, one way."""
    P, T = (F.normalize(torch.randn(6, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    expected = F.cross_entropy(20 * P @ T.T, torch.arange(6))
    assert abs(paraphrase_loss(P, T, torch.ones(6).bool(), 20.0) - expected) < 1e-12
