"""Contrastive losses over images, captions, concepts and hard negatives: pure functions, exact at any world size.

Every loss compares this process's own images (b rows) with the captions or concepts of all processes (N columns),
and returns this process's share: its part of the sum divided by the global count. Summed over processes the shares
are the loss of the whole batch on one device. DistributedDataParallel averages gradients, so multiply by the world
size before backward; then every parameter's gradient is that of one process with the whole batch:

    columns, offset = gather_features(text_features), first_row(len(image_features))
    loss = siglip_loss(image_features, columns, logit_scale.exp(), logit_bias, offset)
    (loss * world_size).backward()

Captions and concepts are gathered with gradient, images and their patch tokens never: work and memory per process
fall with the world size. Every process must call the same losses in the same order, also with no row of its own.
Features are L2-normalised, in any float dtype; logits and all that follows are at least float32, under autocast too.
`logit_scale` is the multiplier itself, exp() of the parameter that CLIP and SigLIP store.

The hard-negative methods take K negatives of each caption, gathered like the captions: negative_features (B, K, D)
and mask (B, K) bool. Where mask is false there is none: whatever finite feature is there, it is in no sum or count.
"""
from dataclasses import dataclass, field
from typing import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F


# ---- between processes -----------------------------------------------------
def _distributed():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def row_counts(rows, device=None):
    """The number of rows on each process, a list of ints; waits for the other processes."""
    if not _distributed():
        return [rows]
    counts = torch.empty(dist.get_world_size(), dtype=torch.int64, device=device)  # (W,)
    dist.all_gather(list(counts.split(1)), torch.tensor([rows], device=device))
    return counts.tolist()


def _start(counts):
    return sum(counts[:dist.get_rank()]) if _distributed() else 0


def first_row(rows, device=None):
    """The index of this process's first row among the rows of all processes."""
    return _start(row_counts(rows, device))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, counts):
        ctx.counts, ctx.dtype = counts, x.dtype
        padded = x.new_zeros(max(counts), *x.shape[1:])  # collectives want one shape everywhere
        padded[:len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        if padded.numel():
            dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts)])  # (sum of counts, ...)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # every process used every row, so its gradient is the sum over processes, in float32 at least
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True,
                       memory_format=torch.contiguous_format)
        if grad.numel():
            dist.all_reduce(grad)
        return grad.split(ctx.counts)[dist.get_rank()].to(ctx.dtype), None


def gather_features(x, counts=None):
    """Rows of all processes, in rank order: (n, ...) -> (sum of n, ...), with gradient for float dtypes.

    Processes may hold different numbers of rows, also none; `counts` is row_counts(n) where that is known. The
    backward, a collective on every process even where x needs no gradient, sums all processes' gradients of these rows.
    """
    if not _distributed():
        return x
    counts = row_counts(len(x), x.device) if counts is None else counts
    if x.is_floating_point() and torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()  # else this process would miss the others' backward: a hang
    return _Gather.apply(x, counts)


def _global_sum(x):
    """Sum over processes, the same number on each; no gradient."""
    x = x.detach().contiguous()
    if _distributed():
        dist.all_reduce(x)
    return x


def _column_logsumexp(logits):
    """logsumexp over the rows of all processes: (b, N) -> (N,). Only N numbers per process are exchanged."""
    return gather_features(logits.logsumexp(dim=0, keepdim=True)).logsumexp(dim=0)  # (W, N) -> (N,)


# ---- concepts as columns ---------------------------------------------------
def _strings(ids):
    """(M,) -> the S different ids, sorted; of each of the M its place there; where each of the S first occurs."""
    unique, string = ids.unique(return_inverse=True)
    first = torch.full_like(unique, len(ids))
    return unique, string, first.scatter_reduce_(0, string, torch.arange(len(ids), device=ids.device), "amin")


def share_concepts(concept_tokens, concept_ids, pad_id=0):
    """This process's equal share of all processes' different concepts, so that each is encoded once, and once only.

    concept_tokens (U, L) and concept_ids (U,) of this process, as below -> tokens (U', L') and ids (U',), to encode and
    to give to concept_columns as concept_features and feature_ids. L may differ between processes: pad_id fills up.
    """
    counts, lengths = (row_counts(n, concept_tokens.device) for n in concept_tokens.shape)
    padded = F.pad(concept_tokens, (0, max(lengths) - concept_tokens.shape[1]), value=pad_id)  # (U, L')
    tokens, ids = gather_features(padded, counts), gather_features(concept_ids, counts)  # (M, L'), (M,)
    unique, _, first = _strings(ids)
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if _distributed() else (1, 0)
    mine = first[unique >= 0].tensor_split(world_size)[rank]
    return tokens[mine], ids[mine]


def concept_columns(concept_features, concept_ids, pairs, batch_size, dedupe=True, merge=True, feature_ids=None):
    """Global columns and this process's labels, from each process's own list of concepts.

    concept_features (U, D): one row for each unique concept string of this process (merge=False: for each occurrence),
        or for each string of feature_ids, where share_concepts chose others for this process to encode.
    concept_ids (U,) int64: equal for equal strings on all processes (a hash >= 0); negative marks padding.
    pairs (P, 2) int64: (image row, row of concept_features) for each concept of each of this process's b = batch_size
        images; a negative image row marks padding, and so does a padded concept.

    Returns features (N, D) with gradient and labels (b, N) bool; columns are in rank order.
    dedupe=True: equal strings are one column, wherever they come from, positive for every image that holds the string;
    the first occurrence's feature stands for all and takes the whole gradient (exact as long as equal strings have
    equal features: no dropout). Where they differ, as pooled from each caption's span, merge=False: each row is a
    column, positive for every image that holds its string. dedupe=False: one column for each pair, positive for its own
    image only, so that the same phrase in other images counts as negative, as in C2LIP's released code.
    """
    pairs = pairs[pairs[:, 0] >= 0]
    image, concept = pairs[concept_ids[pairs[:, 1]] >= 0].T  # (P,), (P,), without padding
    if not dedupe:  # every pair is a concept of its own
        concept_features, concept = concept_features[concept], torch.arange(len(image), device=image.device)
    counts = row_counts(len(concept_features), concept_features.device)
    features = gather_features(concept_features, counts)  # (M, D), M the sum of U
    index = torch.arange(len(features), device=features.device)
    if dedupe:
        ids = gather_features(concept_ids if feature_ids is None else feature_ids, counts)  # (M,)
        held = concept_ids[concept]  # (P,)
    else:
        ids, held = index, _start(counts) + concept
    unique, string, first = _strings(ids)  # (S,), (M,), (S,)
    holds = torch.zeros(batch_size, len(unique), dtype=torch.bool, device=features.device)  # (b, S)
    holds[image, torch.searchsorted(unique, held)] = True
    is_column = (ids >= 0) & (first[string] == index if merge else True)  # (M,)
    return features[is_column], holds[:, string[is_column]]  # (N, D), (b, N)


# ---- from logits (b, N) and labels (b, N) to this process's share ----------
def _float(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(rows, columns, logit_scale):
    """(b, D), (N, D) -> (b, N), at least float32 also under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return logit_scale * (_float(rows) @ _float(columns).T)


def _sigmoid_share(logits, labels, count):
    """-sum log sigmoid(y z) / count, y = +1 where labels, else -1 (SigLIP, eq. 1)."""
    return -F.logsigmoid(torch.where(labels, logits, -logits)).sum() / max(count, 1)


def _rows_share(logits, labels):
    """mean_m mean_{n in P(m)} (logsumexp_k z_mk - z_mn): of all processes' rows m with positive columns P(m)."""
    in_row = labels.sum(1, keepdim=True)  # (b, 1)
    rows = _global_sum((in_row > 0).sum())
    return ((logits.logsumexp(dim=1, keepdim=True) - logits) * labels / (in_row * rows).clamp_min(1)).sum()


def _columns_share(logits, labels):
    """The same of the columns with positive rows, over the rows of all processes."""
    in_column = _global_sum(labels.sum(0))  # (N,) positives of each column, on all processes
    columns = (in_column > 0).sum()
    return ((_column_logsumexp(logits) - logits) * labels / (in_column * columns).clamp_min(1)).sum()


def _contrast_share(logits, labels, logit_bias, count):
    """Without a bias, half by rows and half by columns: CLIP's loss if each has one positive. Else sigmoid."""
    if logit_bias is None:
        return 0.5 * (_columns_share(logits, labels) + _rows_share(logits, labels))
    return _sigmoid_share(logits + logit_bias, labels, count)


def _choices(rows, first, others, valid, scale):
    """Logits of each row's own candidates: (b, D), (b, D), (b, K, D), (b, K) -> (b, 1 + K), -inf if not valid."""
    candidates = torch.cat([first[:, None], others], dim=1)  # (b, 1 + K, D)
    logits = scale * (_float(rows)[:, None] * _float(candidates)).sum(-1)
    return logits.masked_fill(F.pad(~valid, (1, 0)), -torch.inf)


def _choice_share(logits, logit_bias, count):
    """-log softmax of each row's first column / count; with a bias the sigmoid loss, the first column positive."""
    if logit_bias is None:
        return (logits.logsumexp(dim=1) - logits[:, 0]).sum() / max(count, 1)
    return _sigmoid_share(logits + logit_bias, torch.arange(logits.shape[1], device=logits.device) == 0, count)


def _diagonal(logits, offset):
    """(b, N) bool: row i's own column is offset + i."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    return columns == torch.arange(logits.shape[0], device=logits.device)[:, None] + offset


# ---- the losses ------------------------------------------------------------
def siglip_loss(image_features, text_features, logit_scale, logit_bias, offset=0):
    """Sigmoid loss of images and captions (Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training).

    -sum_ij log sigmoid(y_ij (logit_scale I_i.T_j + logit_bias)) / B, y = +1 for i = j, else -1.
    image_features (b, D) of this process, text_features (B, D) of all, normalised; offset: the column of the first
    image's caption. Returns this process's share, a scalar of at least float32.
    """
    logits = _logits(image_features, text_features, logit_scale) + logit_bias  # (b, B)
    return _sigmoid_share(logits, _diagonal(logits, offset), len(text_features))


def clip_loss(image_features, text_features, logit_scale, offset=0):
    """Symmetric cross-entropy (Radford et al. 2021, CLIP, figure 3). Arguments and result as in siglip_loss."""
    logits = _logits(image_features, text_features, logit_scale)  # (b, B)
    return _contrast_share(logits, _diagonal(logits, offset), None, len(text_features))


def npc_loss(image_features, concept_features, labels, logit_scale, logit_bias=None):
    """Noun-phrase contrast: each image against every concept of the batch (C2LIP, L_npc).

    image_features (b, D) of this process, concept_features (N, D) of all, normalised; labels (b, N) bool, true where
    the image's caption holds the concept, several per column allowed (see concept_columns).
    With logit_bias: -sum_mn log sigmoid(y_mn (logit_scale I_m.P_n + logit_bias)) / N.
    Without: the softmax analogue for CLIP weights, on z = logit_scale I P^T,
        1/2 [ mean over concepts n of the mean over n's images m of -log softmax over all images (z_.n)_m
            + mean over images m with a concept of the mean over m's concepts n of -log softmax (z_m.)_n ].
    Returns this process's share, a scalar of at least float32; 0 (with a graph) without any concept.
    """
    logits = _logits(image_features, concept_features, logit_scale)  # (b, N)
    return _contrast_share(logits, labels, logit_bias, labels.shape[1])


def xac_loss(similarity, labels, logit_scale, logit_bias=None):
    """Cross-attention concept contrast: like npc_loss, with attention-pooled images (C2LIP, L_xac).

    similarity (b, N): cosine of concept n and image m's tokens pooled by n's attention, from pooling.concept_similarity
    of this process's patch tokens and all concepts. The rest as in npc_loss, z = logit_scale similarity (+ logit_bias).
    """
    return _contrast_share(logit_scale * _float(similarity), labels, logit_bias, labels.shape[1])


# ---- the methods with hard negatives ---------------------------------------
def negclip_loss(image_features, text_features, negative_features, mask, logit_scale, logit_bias=None, offset=0):
    """Negative captions as more columns (Yuksekgonul et al. 2023, When and why VLMs behave like bags-of-words).

    1/2 [CE(s I [T; T-]^T) + CE(s T I^T)], CE the mean over rows of the cross-entropy with the row's own column.
    image_features (b, D) of this process, text_features (B, D), negative_features (B, K, D), mask (B, K) of all.
    With logit_bias: siglip_loss with the negatives as columns without an image, still divided by B. Returns this
    process's share, a scalar of at least float32: that of clip_loss or siglip_loss if no negative is valid.
    Hard images are rows of the batch like others: the released 2B images x 4B texts are this loss of 2B rows.
    """
    texts = torch.cat([text_features, negative_features[mask]])  # (B + V, D), V valid negatives
    logits = _logits(image_features, texts, logit_scale)  # (b, B + V)
    return _contrast_share(logits, _diagonal(logits, offset), logit_bias, len(text_features))


def ce_clip_loss(image_features, text_features, negative_features, mask, thresholds, logit_scale, logit_bias=None,
                 offset=0):
    """CE-CLIP (Zhang et al. 2024, Contrasting intra-modal and ranking cross-modal hard negatives).

    Arguments as in negclip_loss; thresholds (K,) from the step before, zeros at first. Returns a dict of shares (the
    paper weighs them 1, 0.2, 0.3) and the next step's thresholds:
      contrastive  negclip_loss
      cmr          mean over the valid negatives of relu(thresholds_k + s I_i.T-_ik - s I_i.T_i)
      imc          mean_i CE([s I_i.T_i | s T_i.T-_jk for all j, k], the first); sigmoid of the same with a bias
      thresholds   (K,) mean_i s I_i.T_i - mean_i s I_i.T-_ik in [0, 10], equal on all processes; kept if no valid k
    The released IMC attracts the first negative instead; the released CMR divides by B K, valid or not.
    """
    own, count = slice(offset, offset + len(image_features)), len(text_features)
    texts, valid = text_features[own], mask[own]
    choices = _choices(image_features, texts, negative_features[own], valid, logit_scale)
    positive, negative = choices[:, :1], choices[:, 1:]  # (b, 1), (b, K)
    sums = _global_sum(torch.cat([positive, negative.masked_fill(~valid, 0)], dim=1).sum(0))  # (1 + K,)
    margins = (sums[0] / max(count, 1) - sums[1:] / mask.sum(0).clamp_min(1)).clamp(0, 10)
    imc = torch.cat([positive, _logits(texts, negative_features[mask], logit_scale)], dim=1)  # (b, 1 + V)
    cmr = (thresholds + negative - positive).relu().sum() / mask.sum().clamp_min(1)  # not valid: relu(-inf) = 0
    contrastive = negclip_loss(image_features, text_features, negative_features, mask, logit_scale, logit_bias, offset)
    return {"contrastive": contrastive, "cmr": cmr, "imc": _choice_share(imc, logit_bias, count),
            "thresholds": torch.where(mask.any(0), margins, thresholds)}


def degla_loss(image_features, text_features, negative_features, mask, teacher, logit_scale, logit_bias=None,
               offset=0):
    """DeGLA (Hu et al. 2025, Decoupled global-local alignment for improving compositional understanding).

    Arguments as in negclip_loss; teacher: a dict of the same features from the averaged weights, image_features of
    this process, the others of all, no gradient. Returns a dict of shares (the paper weighs them 1, 0.1, 0.1, 0.005):
      contrastive  negclip_loss
      tgc          mean_i CE([10 T_i.teacher's T_i | 10 T_i.T-_ij for all j], the first), with a bias too
      igc          mean_i CE([s I_i.T_i | s I_i.T-_ij for all j], the first); sigmoid of the same with a bias
      distill      squared distances of all I, T, valid T- from the teacher's, summed over the whole batch
    Both means are over all B, 0 for a caption without a valid negative. The released TGC takes other captions' masks.
    """
    own, count = slice(offset, offset + len(image_features)), len(text_features)
    texts, negatives, valid = text_features[own], negative_features[own], mask[own]
    igc = _choices(image_features, texts, negatives, valid, logit_scale)  # (b, 1 + K)
    contrastive = negclip_loss(image_features, text_features, negative_features, mask, logit_scale, logit_bias, offset)
    terms = {"contrastive": contrastive, "igc": _choice_share(igc, logit_bias, count)}
    if teacher is None:
        return terms
    teacher_texts = teacher["text_features"][own]
    tgc = _choices(texts, teacher_texts, negatives, valid, 10)  # (b, 1 + K)
    student = torch.cat([image_features, texts, negatives[valid]])
    target = torch.cat([teacher["image_features"], teacher_texts, teacher["negative_features"][own][valid]])
    return {"contrastive": contrastive, "tgc": _choice_share(tgc, None, count),
            "igc": terms["igc"], "distill": (_float(student) - _float(target)).square().sum()}


def _with_negative_images(image_features, text_features, negative_features, mask, negative_image_features,
                          image_mask, logit_scale, offset):
    """[I; I-] against [T; T-], valid ones only: logits and true pairs, (b + v, B + V)."""
    b, B = len(image_features), len(text_features)
    images = torch.cat([image_features, negative_image_features[image_mask]])  # (b + v, D)
    texts = torch.cat([text_features, negative_features[mask]])  # (B + V, D)
    logits = _logits(images, texts, logit_scale)
    own_negatives = image_mask.nonzero() + offset == mask.nonzero()[:, 0]  # (v, V)
    return logits, torch.block_diag(_diagonal(logits[:b, :B], offset), own_negatives)


def con_clip_loss(image_features, text_features, negative_features, mask, negative_image_features, image_mask,
                  logit_scale, logit_bias=None, offset=0):
    """CoN-CLIP (Singh et al. 2024, Learn "no" to say "yes" better), negated captions and distractor images.

    1/3 [CE(s I [T; T-]^T) + CE(s T [I; I-]^T) + CE(s I- [T-; T]^T)]. Arguments and result as in negclip_loss, and
    negative_image_features (b, D), image_mask (b,) of this process, false where there is no such image. The third
    term's mean is over the I- whose own T- is valid too (of K > 1 all are its own); an I- or T- without its partner is
    still false for all others. With logit_bias: [I; I-] x [T; T-], each pair once, by the number of true pairs.
    """
    logits, labels = _with_negative_images(image_features, text_features, negative_features, mask,
                                           negative_image_features, image_mask, logit_scale, offset)
    if logit_bias is not None:
        return _sigmoid_share(logits + logit_bias, labels, _global_sum(labels.sum()))
    b, B = len(image_features), len(text_features)
    return (_rows_share(logits[:b], labels[:b]) + _columns_share(logits[:, :B], labels[:, :B])
            + _rows_share(logits[b:], labels[b:])) / 3


def triplet_clip_loss(image_features, text_features, negative_features, mask, negative_image_features, image_mask,
                      logit_scale, logit_bias=None, offset=0):
    """TripletCLIP (Patel et al. 2024): negclip_loss twice, with the parts of (I, T) and (I-, T-) exchanged.

    Neg(I, T, T-) + Neg(I-, T-, T), Neg(I, T, T-) = 1/2 [CE(s I [T; T-]^T) + CE(s T I^T)]; arguments, result and who
    is in a mean as in con_clip_loss. With logit_bias: I x [T; T-] by B plus I- x [T; T-] by the number of true pairs.
    """
    logits, labels = _with_negative_images(image_features, text_features, negative_features, mask,
                                           negative_image_features, image_mask, logit_scale, offset)
    b = len(image_features)
    return (_contrast_share(logits[:b], labels[:b], logit_bias, len(text_features))
            + _contrast_share(logits[b:], labels[b:], logit_bias, _global_sum(labels[b:].sum())))


# ---- the methods: a function each, all of one signature ---------------------
@dataclass
class Features:
    """What the loss of a method may read. What the method does not want is None.

    B rows and N concepts are those of all processes, b rows are this process's own. Features are normalised.
    """
    image_features: torch.Tensor                             # (b, D)
    text_features: torch.Tensor                              # (B, D), with gradient
    logit_scale: torch.Tensor                                # the multiplier itself
    logit_bias: torch.Tensor | None = None                   # None: the softmax form of every loss
    offset: int = 0                                          # the column of this process's first row
    concept_features: torch.Tensor | None = None             # (N, D), with gradient
    concept_labels: torch.Tensor | None = None               # (b, N) bool
    concept_similarity: torch.Tensor | None = None           # (b, N), from pooling.concept_similarity
    negative_features: torch.Tensor | None = None            # (B, K, D), with gradient
    negative_mask: torch.Tensor | None = None                # (B, K) bool
    negative_image_features: torch.Tensor | None = None      # (b, D)
    negative_image_mask: torch.Tensor | None = None          # (b,) bool
    teacher: dict | None = None     # image_features (b, D), text_features (B, D), negative_features (B, K, D)
    thresholds: torch.Tensor | None = None                   # (K,), of ce_clip, from the step before


def _negatives(features):
    return (features.image_features, features.text_features, features.negative_features, features.negative_mask)


def _negative_images(features):
    return (*_negatives(features), features.negative_image_features, features.negative_image_mask)


def _form(features):
    return (features.logit_scale, features.logit_bias, features.offset)


def _image_text_loss(features):
    images, texts = features.image_features, features.text_features
    if features.logit_bias is None:
        return clip_loss(images, texts, features.logit_scale, features.offset)
    return siglip_loss(images, texts, *_form(features))


def extra_terms(features, weights):
    """The terms that can be added to any method: npc, xac and distill.

    weights: {term: weight}, without those terms that the method gives itself. Returns {term: share} of the terms
    whose weight is not 0 and whose inputs are there.
    """
    terms = {}
    if weights.get("npc") and features.concept_features is not None:
        terms["npc"] = npc_loss(features.image_features, features.concept_features, features.concept_labels,
                                features.logit_scale, features.logit_bias)
    if weights.get("xac") and features.concept_similarity is not None:
        terms["xac"] = xac_loss(features.concept_similarity, features.concept_labels,
                                features.logit_scale, features.logit_bias)
    if weights.get("distill") and features.teacher is not None:
        terms["distill"] = _distance(features)
    return terms


def _distance(features):
    """Squared distances of this process's features from the teacher's, summed."""
    own = slice(features.offset, features.offset + len(features.image_features))
    total = (_float(features.image_features) - _float(features.teacher["image_features"])).square().sum()
    for name in ("text_features", "negative_features"):
        if features.teacher.get(name) is not None:
            student, teacher = getattr(features, name)[own], features.teacher[name][own]
            total = total + (_float(student) - _float(teacher)).square().sum()
    return total


def c2lip(features):
    terms = {"contrastive": _image_text_loss(features)}
    return terms | extra_terms(features, {"npc": 1.0, "xac": 1.0})


def siglip(features):
    return {"contrastive": _image_text_loss(features)}


def clip(features):
    return {"contrastive": _image_text_loss(features)}


def negclip(features):
    return {"contrastive": negclip_loss(*_negatives(features), *_form(features))}


def ce_clip(features):
    return ce_clip_loss(*_negatives(features), features.thresholds, *_form(features))


def degla(features):
    return degla_loss(*_negatives(features), features.teacher, *_form(features))


def con_clip(features):
    return {"contrastive": con_clip_loss(*_negative_images(features), *_form(features))}


def triplet_clip(features):
    return {"contrastive": triplet_clip_loss(*_negative_images(features), *_form(features))}


@dataclass(frozen=True)
class Method:
    """A row of METHODS: a loss and what it needs."""
    loss: Callable                  # Features -> {term: this process's share}; ce_clip also returns "thresholds"
    weights: dict = field(default_factory=dict)     # {term: default weight}; contrastive is 1.0
    negatives: str | None = None    # captions with something wrong: "swap", "typed" or "negate"
    negative_images: bool = False   # images that go with the negative captions
    neighbours: bool = False        # rows bring similar images, which become rows of the batch
    teacher: bool = False           # features from the averaged weights
    defaults: dict = field(default_factory=dict)    # of train.py's other flags


METHODS = {
    "c2lip": Method(c2lip, {"npc": 1.0, "xac": 0.01}),
    "siglip": Method(siglip, defaults={"loss": "siglip"}),
    "clip": Method(clip, defaults={"loss": "clip"}),
    "negclip": Method(negclip, negatives="swap", neighbours=True),
    "ce_clip": Method(ce_clip, {"cmr": 0.2, "imc": 0.3}, negatives="typed"),
    "degla": Method(degla, {"tgc": 0.1, "igc": 0.1, "distill": 0.005}, negatives="typed", teacher=True,
                    defaults={"ema": 0.9996}),
    "con_clip": Method(con_clip, negatives="negate", negative_images=True, defaults={"freeze": "visual"}),
    "triplet_clip": Method(triplet_clip, negatives="swap", negative_images=True),
}

TERMS = {
    "npc": "Noun-phrase contrast of C2LIP: every image against every concept of the batch.",
    "xac": "Cross-attention contrast of C2LIP: the same, with the image pooled by each concept's attention.",
    "cmr": "Cross-modal ranking of CE-CLIP: an image is closer to its caption than to a negative, by a margin.",
    "imc": "Intra-modal contrast of CE-CLIP: a caption's image against all negative captions.",
    "tgc": "Text-grounded contrast of DeGLA: a caption's teacher feature against its own negative captions.",
    "igc": "Image-grounded contrast of DeGLA: an image's caption against its own negative captions.",
    "distill": "Self-distillation of DeGLA: squared distance of all features from those of averaged weights.",
}
