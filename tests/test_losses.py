"""losses.py against the released loss's golden values, against naive loops, and on 1, 2 and 4 processes."""
import math
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import losses  # noqa: E402
from losses import (METHODS as METHOD_TABLE, TERMS, Features, awc_loss, ce_clip_loss, clic_loss, clip_loss,  # noqa: E402
                    con_clip_loss, concept_columns, degla_loss, extra_terms, first_row, fisher_weights, gather_features,
                    gather_together, gift_loss, negclip_loss, npc_loss, pgd_attack, plan_batch, row_counts, share_concepts,
                    siglip_loss, tecoa_loss, triplet_clip_loss, xac_loss)
from pooling import concept_similarity, token_similarity  # noqa: E402


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


def naive_choice(scores, right):
    """Cross-entropy of one list of scalars."""
    return torch.log(sum(torch.exp(x) for x in scores)) - scores[right]


def naive_methods(I, T, N, mask, J, image_mask, s, b, thresholds, teacher):
    """Every hard-negative method on a whole batch, from its formula -> {method: {term: scalar}, ...}, thresholds."""
    B, K = mask.shape
    valid = [(i, k) for i in range(B) for k in range(K) if mask[i, k]]
    negative = {i: [N[i, k] for k in range(K) if mask[i, k]] for i in range(B)}
    zero = s * 0

    def mean(values):
        return sum(values) / len(values) if values else zero

    def pairs(grid):  # sigmoid: (image, text, whether true) of each pair
        return sum((torch.log(1 + torch.exp(-(s * x @ y + b) if true else s * x @ y + b)) for x, y, true in grid),
                   zero)

    def neg(images, texts, others, right):  # image i: right[i] are its texts (numbers), others follow texts
        columns = texts + others
        if b is not None:
            return pairs([(x, y, c in right[i]) for i, x in enumerate(images) for c, y in enumerate(columns)]
                         ) / max(1, sum(map(len, right)))
        to_texts = [mean([naive_choice([s * x @ y for y in columns], c) for c in right[i]])
                    for i, x in enumerate(images) if right[i]]
        to_images = []
        for c, y in enumerate(columns):
            own = [i for i in range(len(images)) if c in right[i]]
            if own:
                to_images.append(mean([naive_choice([s * x @ y for x in images], i) for i in own]))
        return (mean(to_texts) + mean(to_images)) / 2

    all_negatives = [N[i, k] for i, k in valid]
    contrastive = neg(list(I), list(T), all_negatives, [{i} for i in range(B)])

    def choice(lists):  # the first of each list is the true one
        if b is None:
            return mean([naive_choice(scores, 0) for scores in lists])
        return mean([torch.log(1 + torch.exp(-scores[0] - b)) + sum((torch.log(1 + torch.exp(x + b))
                                                                     for x in scores[1:]), zero) for scores in lists])

    hinges = [torch.relu(thresholds[k] + s * I[i] @ N[i, k] - s * I[i] @ T[i]) for i, k in valid]
    imc = choice([[s * I[i] @ T[i]] + [s * T[i] @ n for n in all_negatives] for i in range(B)])
    new = []
    for k in range(K):
        own = [s * I[i] @ N[i, k] for i in range(B) if mask[i, k]]
        margin = mean([s * I[i] @ T[i] for i in range(B)]) - mean(own)
        new.append(min(max(margin.item(), 0), 10) if own else thresholds[k].item())
    tgc = mean([naive_choice([10 * T[i] @ teacher["text_features"][i]] + [10 * T[i] @ n for n in negative[i]], 0)
                for i in range(B)])
    igc = choice([[s * I[i] @ T[i]] + [s * I[i] @ n for n in negative[i]] for i in range(B)])
    distances = [I[i] - teacher["image_features"][i] for i in range(B)]
    distances += [T[i] - teacher["text_features"][i] for i in range(B)]
    distances += [N[i, k] - teacher["negative_features"][i, k] for i, k in valid]
    distill = sum((x ** 2).sum() for x in distances)

    # CoN-CLIP and TripletCLIP: an image's own negative captions, if it has a negative image
    with_image = [i for i in range(B) if image_mask[i]]
    wrong = [J[i] for i in with_image]
    swapped = [{c for c, (j, _) in enumerate(valid) if j == i} for i in with_image]
    if b is None:
        third = [mean([naive_choice([s * J[i] @ y for y in all_negatives + list(T)], c) for c in own])
                 for i, own in zip(with_image, swapped) if own]
        con = (mean([naive_choice([s * I[i] @ y for y in list(T) + all_negatives], i) for i in range(B)])
               + mean([naive_choice([s * T[i] @ x for x in list(I) + wrong], i) for i in range(B)]) + mean(third)) / 3
    else:
        con = pairs([(x, y, c == i) for i, x in enumerate(I) for c, y in enumerate(list(T) + all_negatives)]
                    + [(x, y, c in own) for x, own in zip(wrong, swapped)
                       for c, y in enumerate(all_negatives + list(T))]) / (B + sum(map(len, swapped)))
    triplet = contrastive + neg(wrong, all_negatives, list(T), swapped)
    others = naive_tecoa_gift_clic(I, T, N, mask, s, b, teacher)
    return {**others, "negclip": {"loss": contrastive}, "ce_clip": {"contrastive": contrastive, "cmr": mean(hinges), "imc": imc},
            "degla": {"contrastive": contrastive, "tgc": tgc, "igc": igc, "distill": distill},
            "con_clip": {"loss": con}, "triplet_clip": {"loss": triplet}}, torch.tensor(new, dtype=torch.float64)


def naive_tecoa_gift_clic(I, T, N, mask, s, b, teacher):
    """Row i has caption number i % 5; CLIC's other captions are N, the last of them false."""
    B, K = mask.shape
    same = [[j for j in range(B) if j % 5 == i % 5] for i in range(B)]
    z = [[s * I[i] @ T[j] for j in range(B)] for i in range(B)]

    def mean(values):
        return sum(values) / len(values)

    def cross_entropy(scores, weights):
        return sum(weights[n] * naive_choice(scores, n) for n in range(len(scores)) if weights[n])

    def sigmoid(score, true):
        return torch.log(1 + torch.exp(-(score + b) if true else score + b))

    def share(scores, i, smoothing):
        return cross_entropy(scores, [(1 - smoothing) * (j in same[i]) / len(same[i]) + smoothing / B for j in range(B)])

    columns = [[z[i][j] for i in range(B)] for j in range(B)]
    pairs = b is not None and sum(sigmoid(z[i][j], j in same[i]) for i in range(B) for j in range(B)) / B
    tecoa = mean([share(z[i], i, 0) for i in range(B)]) if b is None else pairs
    ita = sum(mean([share(side[i], i, 0.2) for i in range(B)]) for side in (z, columns)) if b is None else pairs
    cd = 0
    before = [[(s * teacher["image_features"][i] @ teacher["text_features"][j]).detach() for j in range(B)] for i in range(B)]
    for now, then in ((z, before), (columns, [[before[i][j] for i in range(B)] for j in range(B)])):
        targets = [(torch.stack(row) / 2).softmax(0) for row in then]
        cd = cd + 4 * mean([cross_entropy([x / 2 for x in row], target) for row, target in zip(now, targets)])
    methods = {"tecoa": {"loss": tecoa}, "gift": {"cd": cd, "ita": ita}}
    if K < 2:
        return methods
    N = clic_captions(N, mask)
    contrasts, choices = [], []
    for texts in [list(T)] + [list(N[:, k]) for k in range(K - 1)]:
        scores = [[s * I[i] @ texts[j] for j in range(B)] for i in range(B)]
        false = [s * I[i] @ N[i, K - 1] for i in range(B)]
        if b is None:
            there = mean([naive_choice(scores[i], i) for i in range(B)])
            back = mean([naive_choice([scores[i][j] for i in range(B)], j) for j in range(B)])
            contrasts.append((there + back) / 2)
            choices += [naive_choice([scores[i][i], false[i]], 0) if mask[i, K - 1] else s * 0 for i in range(B)]
        else:
            contrasts.append(sum(sigmoid(scores[i][j], i == j) for i in range(B) for j in range(B)) / B)
            choices += [sigmoid(scores[i][i], True) + (sigmoid(false[i], False) if mask[i, K - 1] else 0) for i in range(B)]
    uni = mean([((T[i] - N[i, 0]) ** 2).sum() for i in range(B)])
    return {**methods, "clic": {"pairs": mean(contrasts), "sneg": mean(choices), "uni": uni}}


def clic_captions(N, mask):
    """Of (B, K, D), whose other columns hold true captions: what is not valid there is 0."""
    return torch.cat([N[:, :-1] * mask[:, :-1, None], N[:, -1:]], dim=1)


def our_methods(I, T, N, mask, J, image_mask, s, b, thresholds, teacher, offset=0):
    """The same from losses.py: I, J, image_mask and teacher's images of this process, the rest of all."""
    common, images = (I, T, N, mask), (J, image_mask)
    ce_clip = ce_clip_loss(*common, thresholds, s, b, offset)
    new = ce_clip.pop("thresholds")
    numbers = torch.arange(len(T)) % 5
    same = numbers[offset:offset + len(I), None] == numbers
    others = {"tecoa": {"loss": tecoa_loss(I, T, same, s, b)}, "gift": gift_loss(I, T, teacher, same, s, b)}
    if mask.shape[1] > 1:
        others["clic"] = clic_loss(I, T, clic_captions(N, mask), mask, s, b, offset)
    return {**others, "negclip": {"loss": negclip_loss(*common, s, b, offset)}, "ce_clip": ce_clip,
            "degla": degla_loss(*common, teacher, s, b, offset),
            "con_clip": {"loss": con_clip_loss(*common, *images, s, b, offset)},
            "triplet_clip": {"loss": triplet_clip_loss(*common, *images, s, b, offset)}}, new


def labels_from(sets, dedupe):
    """Each image's strings -> the string of each column, and labels (B, N) of the whole batch."""
    pairs = [(m, string) for m, strings in enumerate(sets) for string in strings]
    dedupe = {"plan for spans": "span", "plan for pairs": False}.get(dedupe, dedupe)
    if dedupe == "span":  # a column for each occurrence, of every image with the string
        return [s for _, s in pairs], torch.tensor([[s in strings for _, s in pairs] for strings in sets]).bool()
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


def test_golden_values_of_the_released_clic_gift_and_tecoa():
    """Inputs at random, and what the three released codes made of them: losses, and the pixels of an attack."""
    golden = {name: torch.from_numpy(x) for name, x in np.load(HERE / "fixtures" / "clic_gift_tecoa.npz").items()}
    I, T, N, s = (golden[name] for name in ("image_features", "text_features", "caption_features", "logit_scale"))
    numbers = golden["caption_numbers"]
    teacher = {"image_features": golden["teacher_image_features"], "text_features": golden["teacher_text_features"]}
    found = clic_loss(I, T, N, torch.ones(N.shape[:2], dtype=torch.bool), s)
    found |= gift_loss(I, T, teacher, numbers[:, None] == numbers, s)
    needs = fisher_weights([golden["gradients"]])
    found["awc"] = awc_loss([golden["parameters"]], [golden["anchors"]], needs)
    for name, loss in found.items():
        assert abs(loss - golden[name]) < 1e-10, name

    def loss(pixels):
        features = F.normalize(((pixels - 0.4) / 0.3).flatten(1) @ golden["weight"], dim=-1)
        return tecoa_loss(features, T, torch.eye(len(T), dtype=torch.bool), s)

    attacked = pgd_attack(golden["pixels"], golden["noise"], loss, 2 / 255, 5)
    assert (attacked - golden["attacked"]).abs().max() < 1e-12


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


def test_count_is_the_divisor_of_the_sigmoid_form_only():
    I, P, similarity = unit(4, 6, seed=0), unit(5, 6, seed=1), unit(4, 5, seed=2)
    labels = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    pairs = int(labels.sum())
    assert pairs != 5
    for count in (pairs, labels.sum(), torch.tensor(0)):
        losses_ = npc_loss(I, P, labels, 7.0, -3.0, count), xac_loss(similarity, labels, 7.0, -3.0, count)
        for loss, z in zip(losses_, (I @ P.T, similarity)):
            assert abs(loss - naive_sigmoid(7 * z - 3, labels, int(count))) < 1e-12
        assert npc_loss(I, P, labels, 7.0, None, count) == npc_loss(I, P, labels, 7.0)
    assert npc_loss(I, P, labels, 7.0, -3.0, 5) == npc_loss(I, P, labels, 7.0, -3.0)


def test_the_count_of_pairs_weighs_a_pair_alike_in_any_batch():
    """The same images and phrases twice: twice the pairs, as many columns."""
    I, P = unit(4, 6, seed=0), unit(5, 6, seed=1)
    labels = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    twice, both = torch.cat([I, I]), torch.cat([labels, labels])
    all_pairs = [npc_loss(x, P, y, 7.0, -3.0, y.sum()) for x, y in ((I, labels), (twice, both))]
    different = [npc_loss(x, P, y, 7.0, -3.0) for x, y in ((I, labels), (twice, both))]
    assert abs(all_pairs[1] - all_pairs[0]) < 1e-12 and abs(different[1] - 2 * different[0]) < 1e-12


def test_plan_by_hand():
    ids = torch.tensor([70, 50, 60, -1, 50])  # 50 twice
    pairs = torch.tensor([[0, 0], [0, 1], [0, 4], [2, 4], [2, 2], [1, 3], [-1, 0]])  # 50 twice in image 0
    tokens = torch.tensor([[7, 0], [5, 1], [6, 0], [0, 0], [5, 1]])
    plan = plan_batch(3, ids, pairs, tokens)
    assert plan.rows == [3] and plan.offset == 0 and plan.negative_mask is None
    assert plan.tokens.tolist() == [[7, 0], [5, 1], [6, 0]] and plan.given.tolist() == [0, 1, 2]
    assert plan.labels.tolist() == [[True, True, False], [False] * 3, [False, True, True]]
    assert plan.given_counts == [3] and plan.pairs == 4
    filled = plan_batch(3, ids, pairs, tokens, pad_id=9, multiple=4)
    assert filled.tokens.tolist() == plan.tokens.tolist() + [[9, 9]] and filled.given.tolist() == [0, 1, 2]
    own = plan_batch(3, ids, pairs)  # everyone encodes its own
    assert own.tokens is None and own.given.tolist() == [0, 1, 2] and torch.equal(own.labels, plan.labels)
    spans = plan_batch(3, ids, pairs, merge=False)
    assert spans.given.tolist() == [0, 1, 2, 4] and spans.pairs == 4
    released = plan_batch(3, ids, pairs, dedupe=False)
    assert released.given.tolist() == [0, 1, 4, 4, 2] and released.pairs == 5
    assert released.labels.sum() == 5 and released.labels.any(0).all()
    for with_pairs in (plan, own, spans, released):  # as concept_columns has it
        how = {id(spans): (True, False), id(released): (False,)}.get(id(with_pairs), ())
        columns, labels = concept_columns(torch.arange(5.0)[:, None], ids, pairs, 3, *how)
        assert torch.equal(labels, with_pairs.labels)
        assert columns.flatten().tolist() == with_pairs.given.tolist()
    fewer = plan_batch(3, ids, pairs, tokens[:2])  # 60 is no column, and 50 again is one
    assert fewer.tokens.tolist() == [[7, 0], [5, 1]] and fewer.given_counts == [2]
    assert torch.equal(fewer.labels, plan.labels[:, :2])
    mask = torch.tensor([[True], [False]])
    plain = plan_batch(2, negative_mask=mask, unit_mask=~mask)
    assert plain.rows == [2] and plain.labels is None and torch.equal(plain.negative_mask, mask)
    assert torch.equal(plain.unit_mask, ~mask)
    none = torch.zeros(0, dtype=torch.int64)
    empty = plan_batch(2, none, none.view(0, 2), none.view(0, 4), multiple=8)
    assert empty.tokens.shape == (8, 4) and empty.labels.shape == (2, 0) and empty.pairs == 0
    with pytest.raises(ValueError, match="dedupe=True"):
        plan_batch(3, ids, pairs, tokens, dedupe=False)


@pytest.mark.parametrize("sigmoid", [True, False])
def test_methods_are_their_losses(sigmoid):
    x = method_inputs(5, 4, 6, 3, sigmoid)
    P, V = unit(7, 6, seed=20), unit(5, 3, 6, seed=21)
    labels = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    similarity = concept_similarity(V, P)
    I, T, s, b = x["I"], x["T"], x["s"], x["b"]
    given = Features(I, T, s, b, 0, P, labels, similarity, None, x["N"], x["mask"], x["J"], x["image_mask"],
                     x["teacher"], x["thresholds"])
    plain = siglip_loss(I, T, s, b) if sigmoid else clip_loss(I, T, s)
    concepts = {"npc": npc_loss(I, P, labels, s, b), "xac": xac_loss(similarity, labels, s, b)}
    ours, thresholds = our_methods(**x)
    expected = {"siglip": {"contrastive": plain}, "clip": {"contrastive": plain},
                "c2lip": {"contrastive": plain, **concepts},
                "ce_clip": {**ours["ce_clip"], "thresholds": thresholds}, "degla": ours["degla"]}
    expected |= {name: {"contrastive": ours[name]["loss"]} for name in ("negclip", "con_clip", "triplet_clip", "tecoa")}
    expected |= {"gift": {"contrastive": plain}, "clic": clic_loss(I, T, x["N"], x["mask"], s, b)}
    for name in expected:
        method = METHOD_TABLE[name]
        terms = method.loss(given)
        assert terms.keys() == expected[name].keys()
        assert {"contrastive", *method.weights} <= terms.keys() or name in ("gift", "clic")     # which take turns
        assert all(torch.equal(terms[term], expected[name][term]) for term in terms)
        assert set(terms) <= {"contrastive", "thresholds", *TERMS}
    replayed = METHOD_TABLE["gift"].loss(replace(given, replayed=True))
    assert replayed == ours["gift"] and replayed.keys() | {"awc"} == METHOD_TABLE["gift"].weights.keys()
    single = METHOD_TABLE["clic"].loss(replace(given, negative_features=None, negative_mask=None))
    assert single == {"contrastive": plain}
    two_rows = torch.tensor([0, 1, 0, 2, 3])
    same = replace(given, caption_labels=two_rows[:, None] == two_rows)
    assert METHOD_TABLE["tecoa"].loss(same)["contrastive"] == tecoa_loss(I, T, same.caption_labels, s, b)
    z, shift = s * I @ T.T, 0 if b is None else b
    naive = naive_sigmoid(z + shift, same.caption_labels, 5) if sigmoid else naive_softmax(z, same.caption_labels)
    assert abs(METHOD_TABLE["gift"].loss(same)["contrastive"] - naive) < 1e-12
    extra = extra_terms(given, {"npc": 1.0, "xac": 0.01, "distill": 0.5, "cmr": 1.0})
    assert extra.keys() == {"npc", "xac", "distill"} and extra["npc"] == concepts["npc"]
    assert torch.equal(extra["distill"], ours["degla"]["distill"])
    assert extra_terms(given, {"npc": 0.0, "xac": 1.0}).keys() == {"xac"}
    without = Features(I, T, s, b, negative_features=x["N"], negative_mask=x["mask"])
    assert METHOD_TABLE["c2lip"].loss(without).keys() == {"contrastive"}
    assert METHOD_TABLE["degla"].loss(without).keys() == {"contrastive", "igc"}
    assert extra_terms(without, {"npc": 1.0, "xac": 0.01, "distill": 0.5}) == {}
    by_count = METHOD_TABLE["c2lip"].loss(replace(given, concept_count=labels.sum()))
    assert torch.equal(by_count["npc"], npc_loss(I, P, labels, s, b, labels.sum()))
    assert torch.equal(by_count["xac"], xac_loss(similarity, labels, s, b, labels.sum()))


def method_inputs(B, K, D, seed, sigmoid, scale=5.3):
    g = torch.Generator().manual_seed(seed)
    x = {name: unit(*shape, seed=100 * seed + i).requires_grad_() for i, (name, shape) in enumerate(
        {"I": (B, D), "T": (B, D), "N": (B, K, D), "J": (B, D)}.items())}
    x["s"] = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    x["b"] = torch.tensor(-2.1, dtype=torch.float64, requires_grad=True) if sigmoid else None
    x["mask"], x["image_mask"] = torch.rand(B, K, generator=g) < 0.6, torch.rand(B, generator=g) < 0.6
    x["thresholds"] = 3 * torch.rand(K, generator=g, dtype=torch.float64)
    shapes = {"image_features": (B, D), "text_features": (B, D), "negative_features": (B, K, D)}
    x["teacher"] = {name: unit(*shape, seed=100 * seed + 10 + i) for i, (name, shape) in enumerate(shapes.items())}
    return x


def compare_methods(x):
    """Every term and its gradients, ours against the naive loops."""
    leaves = {name: y for name, y in x.items() if torch.is_tensor(y) and y.requires_grad}
    (ours, new), (naive, naive_new) = our_methods(**x), naive_methods(**x)
    assert not new.requires_grad and new.shape == naive_new.shape and ((new - naive_new).abs() < 1e-12).all()
    for method, terms in naive.items():
        assert ours[method].keys() == terms.keys()
        for term, expected in terms.items():
            loss = ours[method][term]
            assert loss.shape == () and abs(loss - expected).item() < 1e-12, (method, term)
            grads, expected = (torch.autograd.grad(y, list(leaves.values()), retain_graph=True, allow_unused=True,
                                                   materialize_grads=True) for y in (loss, expected))
            for name, grad, right in zip(leaves, grads, expected):
                assert ((grad - right).abs() < 1e-12).all(), (method, term, name)


@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_hard_negative_methods_equal_naive_loops(sigmoid, seed):
    x = method_inputs(5, (3, 1, 4, 2)[seed], 6, seed, sigmoid)
    x["mask"][1] = False  # a caption without a negative: with a negative image here, without one there
    x["image_mask"][1] = seed % 2 == 0
    x["mask"][2], x["image_mask"][2] = True, seed % 2 == 1
    if seed == 2:
        x["mask"][:, 1] = False  # a kind that no caption has
    with torch.no_grad():  # what is not valid may hold anything
        x["N"][~x["mask"]] = 1e6
        x["J"][~x["image_mask"]] = -1e6
    compare_methods(x)


@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("K", [0, 2])
def test_without_any_valid_negative(sigmoid, K):
    x = method_inputs(4, K, 6, 7, sigmoid)
    x["mask"][:] = False
    for with_images in (True, False):
        x["image_mask"][:] = with_images
        compare_methods(x)
    I, T, s, b = x["I"], x["T"], x["s"], x["b"]
    plain = siglip_loss(I, T, s, b) if sigmoid else clip_loss(I, T, s)
    ours, new = our_methods(**x)
    assert torch.equal(new, x["thresholds"]) and ours["ce_clip"]["cmr"] == 0 and ours["degla"]["tgc"] == 0
    for loss in (ours["negclip"]["loss"], ours["triplet_clip"]["loss"], ours["con_clip"]["loss"] * (1 if b else 1.5)):
        assert abs(loss - plain) < 1e-12


def test_methods_equal_their_closed_forms():
    B, D = 6, 8
    x = method_inputs(B, 1, D, 3, False)
    x["mask"][:], x["image_mask"][:] = True, True
    I, T, N, J, s = x["I"], x["T"], x["N"], x["J"], x["s"]
    rows, CE = torch.arange(B), F.cross_entropy
    for b in (None, torch.tensor(-3.0, dtype=torch.float64)):
        ours, _ = our_methods(**{**x, "b": b})
        swapped = (negclip_loss(I, T, N, x["mask"], s, b) + negclip_loss(J, N[:, 0], T[:, None], x["mask"], s, b))
        assert abs(ours["triplet_clip"]["loss"] - swapped) < 1e-12
    n = N[:, 0]
    expected = (CE(s * I @ torch.cat([T, n]).T, rows) + CE(s * T @ torch.cat([I, J]).T, rows)
                + CE(s * J @ torch.cat([n, T]).T, rows)) / 3
    assert abs(con_clip_loss(I, T, N, x["mask"], J, x["image_mask"], s) - expected) < 1e-12
    # NegCLIP as released: 2B images, 4B texts in the order captions, hard captions, negatives of both
    hard, captions, negatives = unit(B, D, seed=50), unit(B, D, seed=51), unit(B, D, seed=52)
    images, texts = torch.cat([I, hard]), torch.cat([T, captions])
    logits = s * images @ torch.cat([texts, n, negatives]).T
    released = (CE(logits, torch.arange(2 * B)) + CE(logits.T[:2 * B], torch.arange(2 * B))) / 2
    ours = negclip_loss(images, texts, torch.cat([n, negatives])[:, None], torch.ones(2 * B, 1).bool(), s)
    assert abs(ours - released) < 1e-12


def test_weights_that_a_loss_needs_stay():
    """GIFT: the Fisher information of a batch, 1 in the mean of each parameter, times squared distances."""
    shapes = [(3, 4), (5,), (2, 2)]
    gradients = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    gradients[2].zero_()    # a parameter that the loss does not need at all
    parameters = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    anchors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    expected = 0.0
    for gradient, parameter, anchor in zip(gradients[:2], parameters, anchors):
        mean = sum(x.item() ** 2 for x in gradient.flatten()) / gradient.numel()
        for x, p, a in zip(gradient.flatten(), parameter.flatten(), anchor.flatten()):
            expected += (x * x / mean * (p - a) ** 2).item()
    needs = fisher_weights(gradients)
    loss = awc_loss(parameters, anchors, needs)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    for p, a, need, slope in zip(parameters, anchors, needs, torch.autograd.grad(loss, parameters)):
        torch.testing.assert_close(slope, 2 * need * (p - a).detach())
    assert needs[0].mean().item() == pytest.approx(1) and needs[2].count_nonzero() == 0


def test_an_attack_stays_in_its_cube_and_depends_on_no_other_image():
    g = torch.Generator().manual_seed(0)
    pixels = torch.rand(4, 3, 5, 5, generator=g, dtype=torch.float64)
    noise = torch.randint(256, pixels.shape, generator=g, dtype=torch.uint8)
    slope, epsilon = torch.randn(pixels.shape, generator=g, dtype=torch.float64), 4 / 255
    start = pgd_attack(pixels, noise, None, epsilon, 0)     # no step: the random start alone
    assert torch.equal(start, (pixels + epsilon * (noise.double() / 127.5 - 1)).clamp(0, 1))
    one = pgd_attack(pixels, noise, lambda x: (x * slope).sum(), epsilon, 1)
    torch.testing.assert_close(one, (start + slope.sign() / 255).clamp(pixels - epsilon, pixels + epsilon).clamp(0, 1))
    # of a linear loss the highest point of the cube is a corner, which enough steps reach
    corner = (pixels + epsilon * slope.sign()).clamp(0, 1)
    torch.testing.assert_close(pgd_attack(pixels, noise, lambda x: (x * slope).sum(), epsilon, 8), corner)
    weight = torch.randn(75, 6, generator=g, dtype=torch.float64)
    texts, same = unit(4, 6, seed=1), torch.eye(4, dtype=torch.bool)

    def loss(x, rows=slice(None)):
        return tecoa_loss(F.normalize(x.flatten(1) @ weight, dim=-1), texts, same[rows], 20.0)

    attacked = pgd_attack(pixels, noise, loss, epsilon, 3)
    assert loss(attacked) > loss(pixels) and not attacked.requires_grad
    for i in range(4):
        rows = slice(i, i + 1)
        alone = pgd_attack(pixels[rows], noise[rows], lambda x: loss(x, rows), epsilon, 3)
        assert torch.equal(alone, attacked[rows])


def test_ce_clip_thresholds_stay_between_0_and_10():
    one, mask = torch.eye(3, dtype=torch.float64), torch.tensor([[1, 1, 0, 1]] * 3).bool()
    negatives = torch.stack([-one, one, -one, one.roll(1, 0)], 1)  # cosine -1, 1, none, 0 with the image
    terms = ce_clip_loss(one, one * 0.9, negatives, mask, torch.tensor([1.0, 2, 3, 4]).double(), 8.0)
    assert torch.allclose(terms["thresholds"], torch.tensor([10, 0, 3, 7.2]).double())
    # hinges: relu(1 - 8 - 7.2), relu(2 + 8 - 7.2), relu(4 + 0 - 7.2): the mean over three valid ones
    assert abs(terms["cmr"].item() - 2.8 / 3) < 1e-12


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
def test_torch_func_takes_the_losses(b):
    """Gradients of many losses at once, and second ones, as influence functions want them."""
    torch.manual_seed(3)
    images = F.normalize(torch.randn(2, 4, 6, dtype=torch.float64), dim=-1)  # two batches
    concepts = F.normalize(torch.randn(5, 6, dtype=torch.float64), dim=-1)
    labels = torch.rand(4, 5) < 0.4

    def loss(x):
        return npc_loss(x, concepts, labels, 20.0, b)

    found = torch.func.vmap(torch.func.grad(loss))(images)
    for x, gradient in zip(images, found):
        x = x.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(x), x)[0])
    hessian = torch.func.jacrev(torch.func.grad(loss))(images[0])
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, images[0]))


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


PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_"}


def tf32_allowed():
    """What cuBLAS goes by, since torch 2.9 and before."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


class TF32Products(TorchDispatchMode):
    """Lists the float32 products that are computed while TF32 is allowed; `seen` counts all."""
    def __init__(self):
        super().__init__()
        self.allowed, self.seen = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS and args[-1].dtype == torch.float32:
            self.seen += 1
            if tf32_allowed():
                self.allowed.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def c2lip_features(device, dtype=torch.float32):
    """Leaves, and a batch of 6 images and 9 concepts made of them."""
    g = torch.Generator().manual_seed(3)
    leaves = [torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()
              for shape in [(6, 16), (6, 16), (9, 16), (6, 7, 16)]]
    I, T, P, V = (F.normalize(x, dim=-1) for x in leaves)
    labels = (torch.rand(6, 9, generator=g) < 0.3).to(device)
    scale, bias = (torch.tensor(x, device=device, dtype=dtype) for x in (100.0, -10.0))
    return leaves, Features(I, T, scale, bias, 0, P, labels, concept_similarity(V, P))


@pytest.mark.parametrize("softmax", [False, True])
def test_no_product_of_the_losses_is_in_tf32(softmax, tf32):
    mode = TF32Products()
    with mode:
        _, features = c2lip_features("cpu")
        if softmax:
            features.logit_bias = None
        sum(METHOD_TABLE["c2lip"].loss(features).values()).backward()
    assert mode.seen >= 6 + 5 and not mode.allowed  # three of each of two losses, and of pooling
    assert tf32_allowed() and torch.backends.cuda.matmul.allow_tf32  # the caller's choice is in force again
    with pytest.raises(ZeroDivisionError), losses._full_precision(torch.device("cpu")):
        1 / 0
    assert tf32_allowed() and torch.backends.cuda.matmul.allow_tf32


def test_float32_under_cuda_autocast():
    """On fake CUDA tensors, with the real rules of CUDA's autocast."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        before = torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)  # torch.autocast does nothing without a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            x = torch.randn(6, 16, device="cuda")
            assert (x @ x.T).dtype == torch.bfloat16 and F.normalize(x @ x.T).dtype == torch.float32
            for dtype in (torch.float32, torch.bfloat16):
                I, T, P, V = (torch.randn(*shape, device="cuda", dtype=dtype)
                              for shape in [(6, 16), (6, 16), (9, 16), (6, 7, 16)])
                labels = torch.zeros(6, 9, dtype=torch.bool, device="cuda")
                assert losses._logits(I, P, 100.0).dtype == torch.float32
                similarity = concept_similarity(V, P)
                assert similarity.dtype == torch.float32
                for bias in (-10.0, None):
                    features = Features(I, T, 100.0, bias, 0, P, labels, similarity)
                    terms = METHOD_TABLE["c2lip"].loss(features)
                    assert len(terms) == 3
                    assert all(x.dtype == torch.float32 and x.is_cuda for x in terms.values())
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", before)


class ToCPU(TorchDispatchMode):
    """Lists the operations that bring data from a GPU: each waits for all that was sent to it before.

    Real tensors, which are on the CPU, are computed with as ever, also where others are fake.
    """
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves([args, kwargs]) if isinstance(x, torch.Tensor)]
        goes_away = "cuda" in str(kwargs.get("device"))
        if not inputs or goes_away or any(isinstance(x, FakeTensor) for x in inputs):
            out = func(*args, **kwargs)
        else:
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cuda" for x in inputs) and any(x.device.type == "cpu" for x in outputs):
            self.found.append(func)
        return out


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("method", METHOD_TABLE)
def test_no_loss_waits_for_a_gpu(method, softmax, monkeypatch):
    """Fake tensors have no values: whatever asks for one (item, nonzero, unique, a mask as index) fails."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)  # there is no GPU
    mask, image_mask = torch.rand(4, 2) < 0.6, torch.tensor([True, False, True, True])
    plan = plan_batch(4, torch.tensor([5, 6, 7, -1]), torch.tensor([[0, 0], [1, 1], [2, 2], [3, 0], [-1, 0]]),
                      torch.ones(4, 3, dtype=torch.int64), negative_mask=mask, unit_mask=mask)
    # the backward of fake CUDA tensors needs a GPU; on fake CPU tensors it is the same one
    for device in ("cuda", "cpu"):
        with FakeTensorMode(allow_non_fake_inputs=True), ToCPU() as to_cpu:
            def features(*shape):
                return torch.randn(*shape, 8, device=device, requires_grad=True)

            placed = plan.to(device)
            concepts = features(3).index_select(0, placed.given)
            inputs = Features(
                features(4), features(4), torch.tensor(10.0, device=device),
                None if softmax else torch.tensor(-5.0, device=device), plan.offset,
                concepts, placed.labels, concept_similarity(features(4, 6), concepts), plan.pairs,
                features(4, 2), placed.negative_mask, features(4), image_mask,
                {"image_features": features(4).detach(), "text_features": features(4).detach(),
                 "negative_features": features(4, 2).detach()}, torch.zeros(2, device=device),
                caption_similarity=concept_similarity(features(4, 6), torch.cat([features(4), concepts])),
                sentence_labels=placed.labels,
                paraphrase_features=features(4), paraphrase_mask=torch.tensor([True, False, True, True]),
                word_similarity=token_similarity(features(4, 6), features(4, 15)).view(4, 3, 5),
                word_mask=torch.ones(4, 3, 5, dtype=torch.bool), unit_features=features(4, 2),
                foil_features=features(4, 2), unit_mask=placed.unit_mask)
            terms = METHOD_TABLE[method].loss(inputs)
            terms.pop("thresholds", None)
            terms |= extra_terms(inputs, dict.fromkeys(TERMS, 1))
            if method == "gift":
                terms |= METHOD_TABLE[method].loss(replace(inputs, replayed=True))
            assert all(x.device.type == device for x in terms.values()) and not to_cpu.found
            if device == "cpu":
                sum(terms.values()).backward()
            with pytest.raises(Exception, match="aten"):  # so it would be found
                terms["npc"].item()
            terms["npc"].detach().cpu()
            assert len(to_cpu.found) == (device == "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_losses_on_a_gpu_equal_float64_where_tf32_is_allowed(tf32):
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        leaves, features = c2lip_features(device, dtype)
        terms = list(METHOD_TABLE["c2lip"].loss(features).values())
        results.append(terms + list(torch.autograd.grad(sum(terms), leaves)))
    for exact, ours in zip(*results):
        assert (ours.cpu() - exact).norm() < 1e-5 * exact.norm()


def test_methods_keep_logits_in_float32_under_autocast():
    def half(x):
        return {k: half(v) if k == "teacher" else v.detach().bfloat16() if k in "ITNJ" or "features" in k else v
                for k, v in x.items()}
    for sigmoid in (True, False):
        x = half(method_inputs(16, 3, 32, 5, sigmoid, scale=100.0))
        exact, _ = our_methods(**{k: v.double() if k in "ITNJ" else v for k, v in x.items()})
        x["s"], x["thresholds"] = x["s"].detach().float(), x["thresholds"].float()
        x["b"] = x["b"].detach().float() if sigmoid else None
        with torch.autocast("cpu", torch.bfloat16):
            under, new = our_methods(**x)
        assert new.dtype == torch.float32
        for method, terms in exact.items():
            for term, value in terms.items():
                assert under[method][term].dtype == torch.float32
                assert abs(under[method][term] / value - 1) < 1e-5, (method, term)


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
    columns, labels = concept_columns(P, ids, pairs, 3, merge=False)  # each row its own column, by string positive
    assert columns.flatten().tolist() == [0, 1, 2, 4]
    assert labels.tolist() == [[True, True, False, True], [False] * 4, [False, True, True, True]]
    columns, labels = concept_columns(P, ids, pairs, 3, dedupe=False)
    assert columns.flatten().tolist() == [0, 1, 4, 2]
    assert labels.tolist() == [[True, True, False, False], [False] * 4, [False, False, True, True]]


def test_concept_columns_of_pairs_that_are_not_there():
    P, ids = unit(3, 8, seed=0), torch.tensor([7, 5, 6])
    padded = torch.tensor([[0, 0], [1, -1], [-1, 2]])  # a negative number is padding in either place
    for dedupe in (True, False):
        _, labels = concept_columns(P, ids, padded, 2, dedupe=dedupe)
        assert labels.sum() == 1 and labels[0, 0]
    with pytest.raises(ValueError, match=r"pairs is \[2, 0\]: expected images below 2 and concepts below 3"):
        concept_columns(P, ids, torch.tensor([[0, 0], [2, 0]]), 2)
    with pytest.raises(ValueError, match="concepts below 3"):
        concept_columns(P, ids, torch.tensor([[0, 3]]), 2)
    with pytest.raises(ValueError, match="4 concept_features, but 3 ids"):
        concept_columns(unit(4, 8, seed=0), ids, padded, 2)


def test_rows_without_a_column_of_their_own_are_refused():
    I, T = unit(5, 8, seed=0), unit(4, 8, seed=1)
    for loss in (lambda *a: siglip_loss(*a[:2], 10.0, -10.0, *a[2:]), lambda *a: clip_loss(*a[:2], 10.0, *a[2:])):
        loss(I[:2], T, 2)
        for wrong in ((I, T), (I[:4], T, 1), (I[:2], T, -1)):
            with pytest.raises(ValueError, match="expected one for each row"):
                loss(*wrong)


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
CASES += [(batch, kind, how, "total") for batch in BATCHES for kind in ("sigmoid", "softmax")
          for how in ("span", "shared", "plan", "plan for spans", "plan for pairs")]
METHODS = ("negclip", "ce_clip", "degla", "con_clip", "triplet_clip", "tecoa", "gift", "clic")
CASES += [(masks, kind, K, method) for masks, K in [("some", 3), ("some", 1), ("none", 2), ("none", 0)]
          for kind in ("sigmoid", "softmax") for method in METHODS if method != "clic" or K > 1]


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


def negatives_of(masks, K):
    """Negative captions (9, K) and images of the whole batch, their masks, thresholds."""
    g = torch.Generator().manual_seed(6 + K)
    captions = torch.randn(9, K, F_IN, generator=g, dtype=torch.float64)
    images = torch.randn(9, TOKENS, F_IN, generator=g, dtype=torch.float64)
    mask, image_mask = torch.rand(9, K, generator=g) < 0.6, torch.rand(9, generator=g) < 0.6
    if K == 3:
        image_mask[:3] = False  # a process without any negative image
    if K == 1:
        mask[5:] = False  # one without any valid negative caption
    if masks == "none":
        mask[:] = False
    return captions, images, mask, image_mask, torch.linspace(0, 2, K, dtype=torch.float64)


def method_features(model, rows, masks, K):
    """The arguments of `rows` of the batch, by name; the teacher is another model."""
    captions, images, mask, image_mask, thresholds = negatives_of(masks, K)
    inputs = (torch.cat([batch_inputs()[0][rows], images[rows]]),
              torch.cat([batch_inputs()[1][rows], captions[rows].flatten(0, 1)]))
    b = len(mask[rows])
    I, V, T, s, bias = model(*inputs)
    teacher = Towers(bias is not None)
    with torch.no_grad():
        for p in teacher.parameters():
            p += 0.1
        I0, _, T0, _, _ = teacher(*inputs)
    x = dict(I=I[:b], T=T[:b], N=T[b:].view(b, K, D), mask=mask[rows], J=I[b:], image_mask=image_mask[rows],
             s=s, b=bias, thresholds=thresholds, teacher={"image_features": I0[:b], "text_features": T0[:b],
                                                          "negative_features": T0[b:].view(b, K, D)})
    return x, sum(y.sum() * 0 for y in (I, V, T, s, bias) if y is not None)  # DDP wants every output in the loss


def weighted(terms):
    return sum(weight * term for weight, term in zip((1, 0.7, 0.4, 0.2), terms.values()))


def method_reference(masks, kind, K, method):
    model = Towers(kind == "sigmoid")
    x, _ = method_features(model, slice(0, 9), masks, K)
    methods, thresholds = naive_methods(**x)
    loss = weighted(methods[method])
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return loss.detach(), dict(zip(dict(model.named_parameters()), grads)), thresholds


def method_step(model, split, masks, kind, K, method):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    start, b = sum(split[:rank]), split[rank]
    x, used = method_features(model, slice(start, start + b), masks, K)
    for name in ("T", "N", "mask"):
        x[name] = gather_features(x[name])
    with torch.no_grad():
        for name in ("text_features", "negative_features"):
            x["teacher"][name] = gather_features(x["teacher"][name])
    methods, thresholds = our_methods(**x, offset=first_row(b))
    loss = weighted(methods[method]) * world
    (loss + used).backward()
    return loss.detach(), thresholds


def reference(batch, kind, dedupe, term):
    """Loss and gradients from the definitions alone."""
    if term in METHODS:
        return method_reference(batch, kind, dedupe, term)
    model = Towers(kind == "sigmoid")
    images, captions, strings = batch_inputs()
    columns, labels = labels_from(BATCHES[batch], dedupe)
    texts = strings[columns]
    # every pair counts, where a plan says how many there are
    count = sum(map(len, BATCHES[batch])) if str(dedupe).startswith("plan") else len(texts)
    if dedupe in ("span", "plan for spans"):  # the feature depends on the caption
        texts = texts + captions[[m for m, strings_ in enumerate(BATCHES[batch]) for _ in strings_]]
    I, V, T, s, b = model(images, torch.cat([captions, texts]))
    T, P = T[:9], T[9:]
    eye, z_npc, z_xac = torch.eye(9, dtype=torch.bool), s * I @ P.T, s * naive_similarity(V, P)
    if kind == "sigmoid":
        terms = {"contrastive": naive_sigmoid(s * I @ T.T + b, eye, 9),
                 "npc": naive_sigmoid(z_npc + b, labels, count),
                 "xac": naive_sigmoid(z_xac + b, labels, count)}
    else:
        terms = {"contrastive": naive_softmax(s * I @ T.T, eye),
                 "npc": naive_softmax(z_npc, labels), "xac": naive_softmax(z_xac, labels)}
    terms["total"] = terms["contrastive"] + terms["npc"] + 0.5 * terms["xac"]
    grads = torch.autograd.grad(terms[term], list(model.parameters()), materialize_grads=True)
    return terms[term].detach(), dict(zip(dict(model.named_parameters()), grads)), None


def step(model, split, batch, kind, dedupe, term):
    """This process's share of the loss times the world size, after backward; and CE-CLIP's thresholds."""
    if term in METHODS:
        return method_step(model, split, batch, kind, dedupe, term)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    start, b = sum(split[:rank]), split[rank]
    images, captions, strings = (batch_inputs()[0][start:start + b], batch_inputs()[1][start:start + b],
                                 batch_inputs()[2])
    sets = BATCHES[batch][start:start + b]
    unique = list(dict.fromkeys(string for strings_ in sets for string in strings_))
    pairs = [(m, unique.index(string)) for m, strings_ in enumerate(sets) for string in strings_]
    pad = 2 if rank == 1 else 0  # padded to a static shape here, not there
    texts = strings[unique]
    if dedupe in ("span", "plan for spans"):
        texts = strings[[unique[u] for _, u in pairs]] + captions[[m for m, _ in pairs]]
        unique, pairs = [unique[u] for _, u in pairs], [(m, n) for n, (m, _) in enumerate(pairs)]
    ids = torch.tensor([1000 - u for u in unique] + [-1] * pad, dtype=torch.int64)
    pairs = torch.tensor(pairs + [(-1, -1)] * pad, dtype=torch.int64).view(-1, 2)
    texts, feature_ids = torch.cat([texts, strings[[0] * pad]]), None
    if dedupe == "shared":  # texts of different length; each string is encoded by one process, as many by each
        tokens = torch.tensor(unique + [0] * pad).view(-1, 1).expand(-1, rank + 1).long()
        tokens, feature_ids = share_concepts(tokens, ids, pad_id=7)
        assert tokens.shape[1] == world and (tokens[:, 1:] == tokens[:, :1]).logical_or(tokens[:, 1:] == 7).all()
        assert (1000 - tokens[:, 0] == feature_ids).all()
        counts, strings_of_all = row_counts(len(tokens)), {s for strings_ in BATCHES[batch] for s in strings_}
        assert sum(counts) == len(strings_of_all) and max(counts) - min(counts) <= 1
        texts = strings[tokens[:, 0]]
    if str(dedupe).startswith("plan"):
        tokens = torch.tensor(unique + [0] * pad).view(-1, 1).expand(-1, rank + 1).long()
        how = (tokens, True, True) if dedupe == "plan" else (None, "spans" in dedupe, False)
        plan = plan_batch(b, ids, pairs, *how, torch.full((b, 2), rank % 2 == 0), 7, 2)
        assert plan.rows == row_counts(b) and plan.pairs == sum(map(len, BATCHES[batch]))
        assert plan.negative_mask[:, 1].tolist() == [r % 2 == 0 for r, n in enumerate(split) for _ in range(n)]
        if dedupe == "plan":
            encoded = len(plan.given)
            assert len(plan.tokens) == max(2, encoded + encoded % 2) and (plan.tokens[encoded:] == 7).all()
            texts = strings[torch.where(plan.tokens[:, 0] == 7, 0, plan.tokens[:, 0])]
            texts[:encoded] = strings[plan.tokens[:encoded, 0]]
    I, V, T, s, bias = model(images, torch.cat([captions, texts]))
    if str(dedupe).startswith("plan"):
        texts, columns = gather_together([T[:b], T[b:].index_select(0, plan.given)], [plan.rows, plan.given_counts])
        labels, offset, count = plan.labels, plan.offset, plan.pairs
    else:
        columns, labels = concept_columns(T[b:], ids, pairs, b, bool(dedupe), dedupe != "span", feature_ids)
        texts, offset, count = gather_features(T[:b]), first_row(b), None
    assert offset == start and len(texts) == 9
    assert len(columns) == len(labels_from(BATCHES[batch], dedupe)[0])
    terms = {"contrastive": siglip_loss(I, texts, s, bias, offset) if kind == "sigmoid"
             else clip_loss(I, texts, s, offset),
             "npc": npc_loss(I, columns, labels, s, bias, count),
             "xac": xac_loss(concept_similarity(V, columns), labels, s, bias, count)}
    terms["total"] = terms["contrastive"] + terms["npc"] + 0.5 * terms["xac"]
    loss = terms[term] * world
    used = sum(x.sum() * 0 for x in (I, V, T, s, bias) if x is not None)  # DDP wants every output in the loss
    (loss + used).backward()
    return loss.detach(), None


class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def step_collectives(rank, world):
    """What C2LIP's loss exchanges in a step: shapes and numbers of the plan; features, their gradient."""
    features = [torch.randn(n, D, requires_grad=True) for n in (3, 2 + rank)]
    with Collectives() as mode:
        ids, pairs = torch.arange(2 + rank), torch.tensor([[0, 0], [2, 1]])
        plan = plan_batch(3, ids, pairs, ids[:, None])
        texts, columns = gather_together([features[0], features[1].index_select(0, plan.given % (2 + rank))],
                                         [plan.rows, plan.given_counts])
        images, scale, bias = texts.detach()[:3], torch.tensor(10.0), torch.tensor(-5.0)
        similarity = concept_similarity(torch.randn(3, 4, D), columns)
        given = Features(images, texts, scale, bias, plan.offset, columns, plan.labels, similarity, plan.pairs)
        sum(METHOD_TABLE["c2lip"].loss(given).values()).backward()
    return dict(mode.found)


def worker(rank, world, folder):
    torch.set_num_threads(1)
    from datetime import timedelta
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=timedelta(minutes=10))  # ends a hang, and no loaded machine needs it
    results = {}
    models = {kind: torch.nn.parallel.DistributedDataParallel(Towers(kind == "sigmoid"))
              for kind in ("sigmoid", "softmax")}
    for split in SPLITS[world]:
        for case in CASES:
            model = models[case[1]]
            model.zero_grad()
            loss, thresholds = step(model, split, *case)
            dist.all_reduce(loss)
            results[(tuple(split), *case)] = (loss / world, {k.removeprefix("module."): p.grad.clone()
                                                             for k, p in model.named_parameters()}, thresholds)
    # gather: uneven, empty, ints, bfloat16
    rows = [3, 0, 1, 2][:world]
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float32):
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
    assert step_collectives(rank, world) == ({"allgather_": 3, "allreduce_": 1} if world > 1 else {})
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spawn(world, folder):
    os.environ["OMP_NUM_THREADS"] = "1"
    context = torch.multiprocessing.spawn(worker, (world, str(folder)), nprocs=world, join=False)
    try:
        while not context.join():
            pass
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def references():
    return {case: reference(*case) for case in CASES}


def compare(case, loss, grads, thresholds, references):
    expected, expected_grads, expected_thresholds = references[case]
    assert abs(loss - expected).item() < 1e-10, case
    if thresholds is not None:
        assert ((thresholds - expected_thresholds).abs() < 1e-10).all(), case
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).abs().max().item() < 1e-10, (case, name)


def test_without_process_group_equals_the_definitions(references):
    for case in CASES:
        model = Towers(case[1] == "sigmoid")
        loss, thresholds = step(model, [9], *case)
        compare(case, loss, {k: p.grad for k, p in model.named_parameters()}, thresholds, references)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_equal_the_whole_batch(world, tmp_path, references):
    for results in spawn(world, tmp_path):  # every process's view, of loss and of DDP's averaged gradients
        assert len(results) == len(SPLITS[world]) * len(CASES)
        for (_, *case), (loss, grads, thresholds) in results.items():
            compare(tuple(case), loss, grads, thresholds, references)
