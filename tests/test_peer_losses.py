"""The later terms of losses.py against naive loops in float64, and on 1, 2 and 4 processes."""
import functools
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
from losses import (caption_xac_loss, cs_clip_loss, first_row, fsc_clip_loss, gather_features,  # noqa: E402
                    paraphrase_loss)
from pooling import concept_pool, concept_similarity, token_similarity  # noqa: E402

F_IN, D, TOKENS, B, K, L = 5, 6, 4, 9, 3, 4
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
        for name in ("T", "P", "N", "W", "U", "foils"):
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

    inputs = {"images": random(B, TOKENS), "T": random(B), "P": random(B), "N": random(B, K), "W": random(B, 1 + K, L),
              "U": random(B, K), "foils": random(B, K)}
    valid = {"P": mask(B), "N": mask(B, K), "W": torch.rand(B, 1 + K, L, generator=g) < 0.6}
    valid["N"][1] &= masks == "all"         # a row without a negative
    valid["W"][:, 0, 0] = True              # each caption has a word,
    valid["W"][:, 1:, 0] = valid["N"]       # and each negative;
    valid["W"][:, 1:] &= valid["N"][..., None]      # where there is none, no token counts
    valid["S"] = mask(B, B * K)             # who holds the units, as if they were sentences of captions
    valid["U"] = mask(B, K)
    valid["U"][:, 1] &= masks == "all"      # units that no caption has
    valid["U"][:3] &= masks == "all"        # a process without any
    return inputs, valid


def sigmoid_sum(grid):
    """(logit, whether true) of each pair -> sum of -log sigmoid."""
    return sum(torch.log(1 + torch.exp(-z if true else z)) for z, true in grid)


def cross_entropy(scores, right):
    return torch.log(sum(torch.exp(z) for z in scores)) - scores[right]


# ------------------------------------------------------------------------------------------------- one logit at a time

def naive_caption_xac(x, masks, sentences=()):
    """sentences: of each image, which of the queries behind the captions its caption holds."""
    queries = [*x["T"], *(x["U"].flatten(0, 1) if len(sentences) else ())]
    own = [[i, *(B + n for n in range(len(queries) - B) if sentences[i, n])] for i in range(B)]
    pooled = [[(v @ t).softmax(0) @ v for t in queries] for v in x["V"]]
    z = [[x["s"] * F.normalize(c, dim=0) @ t for c, t in zip(row, queries)] for row in pooled]
    if x["b"] is not None:
        grid = [(z[i][j] + x["b"], j in own[i]) for i in range(B) for j in range(len(queries))]
        return {"caption_xac": sigmoid_sum(grid) / len(queries)}
    rows = [sum(cross_entropy(z[i], j) for j in own[i]) / len(own[i]) for i in range(B)]
    columns = []
    for j in range(len(queries)):
        images = [i for i in range(B) if j in own[i]]
        if images:
            columns.append(sum(cross_entropy([z[i][j] for i in range(B)], i) for i in images) / len(images))
    return {"caption_xac": (sum(rows) / B + sum(columns) / len(columns)) / 2}


def naive_sentences(x, masks):
    return naive_caption_xac(x, masks, masks["S"])


def naive_paraphrase(x, masks):
    rows = [i for i in range(B) if masks["P"][i]]
    z = {i: [x["s"] * x["P"][i] @ t for t in x["T"]] for i in rows}
    if not rows:
        return {"paraphrase": x["s"] * 0}
    if x["b"] is not None:
        grid = [(z[i][j] + x["b"], i == j) for i in rows for j in range(B)]
        return {"paraphrase": sigmoid_sum(grid) / len(rows)}
    return {"paraphrase": sum(cross_entropy(z[i], i) for i in rows) / len(rows)}


def naive_focal(scores, b):
    """Rows of [the true logit, those of the negatives], with the row's mean of those that have a negative."""
    rows = []
    for z in scores:
        if len(z) == 1:
            continue
        total = 0
        for c in range(len(z)):
            if b is None:
                p = torch.exp(z[c]) / sum(torch.exp(y) for y in z)
                q = 0.02 / len(z) + (0.98 if c == 0 else 0)
                total = total - q * (1 - p) ** 2 * torch.log(p)
            else:
                p = 1 / (1 + torch.exp(-z[c] - b if c == 0 else z[c] + b))
                total = total - 0.99 * (1 - p) ** 2 * torch.log(p) - 0.01 * p ** 2 * torch.log(1 - p)
        rows.append(total)
    return sum(rows) / len(rows) if rows else scores[0][0] * 0


def naive_fsc_clip(x, masks):
    texts = [[0, *(1 + k for k in range(K) if masks["N"][i, k])] for i in range(B)]
    ghn, lhn = [], []
    for i in range(B):
        features = [x["T"][i], *x["N"][i]]
        ghn.append([x["s"] * x["I"][i] @ features[c] for c in texts[i]])
        local = []
        for c in texts[i]:
            scores = []
            for y in x["W"][i, c][masks["W"][i, c]]:
                with torch.no_grad():
                    near = torch.stack([v @ y for v in x["V"][i]])
                    weights = (near - near.min()) / (near.max() - near.min())
                    weights = weights / weights.sum()
                pooled = sum(w * v for w, v in zip(weights, x["V"][i]))
                scores.append(x["s"] * F.normalize(pooled, dim=0) @ y)
            local.append(torch.log(sum(torch.exp(score) for score in scores)))
        lhn.append(local)
    return {"ghn": naive_focal(ghn, x["b"]), "lhn": naive_focal(lhn, x["b"])}


def naive_cs_clip(x, masks):
    of_each_k = []
    for k in range(K):
        rows = [i for i in range(B) if masks["U"][i, k]]
        if not rows:
            continue
        z = {i: [x["s"] * x["I"][i] @ x["U"][j, k] for j in rows] + [x["s"] * x["I"][i] @ x["foils"][i, k]] for i in rows}
        if x["b"] is not None:
            grid = [(z[i][c] + x["b"], c == n) for n, i in enumerate(rows) for c in range(len(rows) + 1)]
            of_each_k.append(sigmoid_sum(grid) / len(rows))
            continue
        both = [cross_entropy(z[i], n) + cross_entropy([z[j][n] for j in rows], n) for n, i in enumerate(rows)]
        of_each_k.append(sum(both) / (2 * len(rows)))
    return {"units": sum(of_each_k) / len(of_each_k) if of_each_k else x["s"] * 0}


# ------------------------------------------------------------------------------------------------- ours, of some rows

def our_caption_xac(x, masks, offset):
    return {"caption_xac": caption_xac_loss(concept_similarity(x["V"], x["T"]), x["s"], x["b"], offset)}


def our_sentences(x, masks, offset):
    similarity = concept_similarity(x["V"], torch.cat([x["T"], x["U"].flatten(0, 1)]))
    return {"caption_xac": caption_xac_loss(similarity, x["s"], x["b"], offset, masks["S"])}


def our_paraphrase(x, masks, offset):
    return {"paraphrase": paraphrase_loss(x["P"], x["T"], masks["P"], x["s"], x["b"], offset)}


def our_fsc_clip(x, masks, offset):
    similarity = token_similarity(x["V"], x["W"].flatten(1, 2)).view(masks["W"].shape)
    return fsc_clip_loss(x["I"], x["T"], x["N"], masks["N"], similarity, masks["W"], x["s"], x["b"], offset)


def our_cs_clip(x, masks, offset):
    return {"units": cs_clip_loss(x["I"], x["U"], x["foils"], masks["U"], x["s"], x["b"], offset)}


NAIVE = {"caption_xac": naive_caption_xac, "paraphrase": naive_paraphrase, "fsc_clip": naive_fsc_clip,
         "cs_clip": naive_cs_clip, "sentences": naive_sentences}
OURS = {"caption_xac": our_caption_xac, "paraphrase": our_paraphrase, "fsc_clip": our_fsc_clip, "cs_clip": our_cs_clip,
        "sentences": our_sentences}
OF_ALL = ("T", "N", "U")        # what the processes gather, in this order
MASKS_OF_ALL = ("N", "U")
CASES = [(name, kind, masks) for name in OURS for kind in ("sigmoid", "softmax") for masks in ("some", "none", "all")]


def weighted(terms):
    return sum(weight * term for weight, term in zip((1, 0.7, 0.4), terms.values()))


@functools.cache
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


# What the released code of FSC-CLIP gives for random inputs: the two losses, and the norms of their gradients with
# respect to I, T, N, patches, words.
RELEASED_FSC_CLIP = {
    0: (1.2570258188931065, 1.2549838764383803, 5.36302628934788, 3.8744936750627423, 3.0091977858236594,
        2.871006153546007, 1.3692939281430005),
    1: (6.404991765237648, 1.3909401824682857, 6.227653944475292, 4.0464075903362735, 3.405060995715189,
        2.271320831175368, 0.983085075200944),
}


@pytest.mark.parametrize("seed", RELEASED_FSC_CLIP)
def test_fsc_clip_equals_the_released_code(seed):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shapes = [(5, 6), (5, 6), (5, 3, 6), (5, 7, 6)]
    I, T, N, V = leaves = [F.normalize(random(*shape), dim=-1).requires_grad_() for shape in shapes]
    words = random(5, 4, 4, 6).requires_grad_()         # which the released code normalises itself
    word_mask = torch.rand(5, 4, 4, generator=g) < 0.7
    word_mask[..., 0] = True
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[1] = False
    similarity = token_similarity(V, F.normalize(words, dim=-1).flatten(1, 2)).view(5, 4, 4)
    terms = fsc_clip_loss(I, T, N, mask, similarity, word_mask, 9.0)
    gradients = torch.autograd.grad(terms["ghn"], leaves[:3], retain_graph=True)
    gradients += torch.autograd.grad(terms["lhn"], [V, words])
    found = [*terms.values(), *(gradient.norm() for gradient in gradients)]
    for ours, theirs in zip(found, RELEASED_FSC_CLIP[seed], strict=True):       # its labels are float32
        assert ours.item() == pytest.approx(theirs, abs=1e-6)


def test_words_pool_without_pooled_vectors():
    """Values and gradients of token_similarity against autograd; an image of equal patches is 0, not nan."""
    V = F.normalize(torch.randn(3, 5, 6, dtype=torch.float64), dim=-1).requires_grad_()
    y = F.normalize(torch.randn(3, 8, 6, dtype=torch.float64), dim=-1).requires_grad_()
    near = y @ V.mT
    weights = (near - near.amin(-1, keepdim=True)).detach()
    expected = (F.normalize(weights @ V, dim=-1) * y).sum(-1)
    ours = token_similarity(V, y)
    assert (ours - expected).abs().max() < 1e-12
    upstream = torch.randn(3, 8, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(out, [V, y], upstream) for out in (ours, expected))):
        assert (a - b).abs().max() < 1e-12
    equal = torch.ones(1, 5, 4).requires_grad_()
    zero = token_similarity(equal, torch.ones(1, 2, 4) / 2)
    zero.sum().backward()
    assert not zero.any() and not equal.grad.any() and zero.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert (token_similarity(V.float(), y.float()) - expected).abs().max() < 1e-6


# The same of CS-CLIP's, for I, units, foils.
RELEASED_CS_CLIP = {
    0: (2.379464390205646, 3.1479790130981122, 2.912608645864892, 0.6775285515933692),
    1: (2.321024781862589, 2.7441536125977573, 2.6892104664029532, 0.7234482619215319),
}


@pytest.mark.parametrize("seed", RELEASED_CS_CLIP)
def test_cs_clip_equals_the_released_code(seed):
    g = torch.Generator().manual_seed(seed)
    leaves = [F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1).requires_grad_()
              for shape in [(6, 8), (6, 2, 8), (6, 2, 8)]]
    mask = torch.rand(6, 2, generator=g) < 0.7
    loss = cs_clip_loss(*leaves, mask, 9.0)
    found = [loss, *(gradient.norm() for gradient in torch.autograd.grad(loss, leaves))]
    assert [x.item() for x in found] == pytest.approx(RELEASED_CS_CLIP[seed], abs=1e-12)
