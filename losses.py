"""Contrastive losses over images, captions and concepts: pure functions of features, exact at any world size.

Every loss compares this process's own images (b rows) with the captions or concepts of all processes
(N columns), and returns this process's share: its part of the sum divided by the global count. Summed over
processes the shares are the loss of the whole batch on one device. DistributedDataParallel averages
gradients, so multiply by the world size before backward; then W processes of B / W images give the gradient
of one process with B images, for every parameter, logit_scale and logit_bias too:

    columns, offset = gather_features(text_features), first_row(len(image_features))
    loss = siglip_loss(image_features, columns, logit_scale.exp(), logit_bias, offset)
    (loss * world_size).backward()

Captions and concepts are gathered with gradient, images and their patch tokens never: work and memory per
process fall with the world size. Every process must call the same losses in the same order, also with no
image or no concept of its own. Features are L2-normalised, in any float dtype; the logits and all that
follows are at least float32, under autocast too. `logit_scale` is always the multiplier itself, which is
exp() of the parameter that CLIP and SigLIP store. Without torch.distributed everything is local.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------------
# between processes

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

    Processes may hold different numbers of rows, also none; `counts` is row_counts(n) where that is known.
    The backward, a collective, sums the gradients that all processes have for this one's rows: a float
    result takes part in it on every process, also where x itself needs no gradient.
    """
    if not _distributed():
        return x
    counts = row_counts(len(x), x.device) if counts is None else counts
    if x.is_floating_point() and torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()  # else this process would miss the others' backward: a hang
    return _Gather.apply(x, counts)


def _global_sum(x):
    """Sum of an integer tensor over processes, no gradient."""
    if _distributed():
        x = x.contiguous()
        dist.all_reduce(x)
    return x


def _column_logsumexp(logits):
    """logsumexp over the rows of all processes: (b, N) -> (N,). Only N numbers per process are exchanged."""
    return gather_features(logits.logsumexp(dim=0, keepdim=True)).logsumexp(dim=0)  # (W, N) -> (N,)


# ---------------------------------------------------------------------------------------------------------
# concepts as columns

def concept_columns(concept_features, concept_ids, pairs, batch_size, dedupe=True):
    """Global columns and this process's labels, from each process's own list of unique concepts.

    concept_features (U, D): one row for each unique concept string of this process.
    concept_ids (U,) int64: equal for equal strings on all processes (a hash >= 0); negative marks padding.
    pairs (P, 2) int64: (image row, row of concept_features) for each concept of each image of this process;
        a negative image row marks padding, and so does a padded concept.
    batch_size: the number b of this process's images.

    Returns features (N, D) with gradient and labels (b, N) bool; columns are in rank order.
    dedupe=True: equal strings are one column, wherever they come from, positive for every image that holds
    the string; the first occurrence's feature stands for all and takes the whole gradient (exact as long as
    equal strings have equal features: no dropout). dedupe=False: one column for each pair, positive for its
    own image only, so that the same phrase in other images counts as negative, as in C2LIP's released code.
    """
    pairs = pairs[pairs[:, 0] >= 0]
    image, concept = pairs[concept_ids[pairs[:, 1]] >= 0].T  # (P,), (P,), without padding
    if not dedupe:  # every pair is a concept of its own
        concept_features, concept = concept_features[concept], torch.arange(len(image), device=image.device)
    counts = row_counts(len(concept_features), concept_features.device)
    features = gather_features(concept_features, counts)  # (M, D), M the sum of U
    index = torch.arange(len(features), device=features.device)
    ids = gather_features(concept_ids, counts) if dedupe else index  # (M,)
    unique, inverse = ids.unique(return_inverse=True)
    first = torch.full_like(unique, len(ids)).scatter_reduce_(0, inverse, index, "amin")[inverse]  # (M,)
    is_column = (first == index) & (ids >= 0)  # (M,)
    features = features[is_column]  # (N, D)
    column = (is_column.cumsum(0) - 1)[first]  # (M,)
    labels = torch.zeros(batch_size, len(features), dtype=torch.bool, device=features.device)
    labels[image, column[_start(counts) + concept]] = True
    return features, labels


# ---------------------------------------------------------------------------------------------------------
# from logits (b, N) and labels (b, N) to this process's share

def _float(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(rows, columns, logit_scale):
    """(b, D), (N, D) -> (b, N), at least float32 also under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return logit_scale * (_float(rows) @ _float(columns).T)


def _sigmoid_share(logits, labels, count):
    """-sum log sigmoid(y z) / count, y = +1 where labels, else -1 (SigLIP, eq. 1)."""
    return -F.logsigmoid(torch.where(labels, logits, -logits)).sum() / max(count, 1)


def _softmax_share(logits, labels):
    """Half the cross-entropy of columns over rows plus half that of rows over columns, several positives.

        1/2 mean_n mean_{m in P(n)} (logsumexp_k z_kn - z_mn)
      + 1/2 mean_m mean_{n in P(m)} (logsumexp_k z_mk - z_mn)

    over the columns n and the rows m, of all processes, that have a positive. CLIP's loss if each has one.
    """
    in_column = _global_sum(labels.sum(0))  # (N,) positives of each column, on all processes
    in_row = labels.sum(1, keepdim=True)  # (b, 1)
    columns, rows = (in_column > 0).sum(), _global_sum((in_row > 0).sum())
    to_rows = (_column_logsumexp(logits) - logits) / (in_column * columns).clamp_min(1)  # (b, N)
    to_columns = (logits.logsumexp(dim=1, keepdim=True) - logits) / (in_row * rows).clamp_min(1)
    return 0.5 * ((to_rows + to_columns) * labels).sum()


def _concept_share(logits, labels, logit_bias):
    if logit_bias is None:
        return _softmax_share(logits, labels)
    return _sigmoid_share(logits + logit_bias, labels, labels.shape[1])


def _diagonal(logits, offset):
    """(b, N) bool: row i's own column is offset + i."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    return columns == torch.arange(logits.shape[0], device=logits.device)[:, None] + offset


# ---------------------------------------------------------------------------------------------------------
# the losses

def siglip_loss(image_features, text_features, logit_scale, logit_bias, offset=0):
    """Sigmoid loss of images and captions (Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training).

    -sum_ij log sigmoid(y_ij (logit_scale I_i.T_j + logit_bias)) / B, y = +1 for i = j, else -1.
    image_features (b, D) of this process, text_features (B, D) of all, normalised; offset: the column of
    the first image's caption. Returns this process's share, a scalar of at least float32.
    """
    logits = _logits(image_features, text_features, logit_scale) + logit_bias  # (b, B)
    return _sigmoid_share(logits, _diagonal(logits, offset), len(text_features))


def clip_loss(image_features, text_features, logit_scale, offset=0):
    """Symmetric cross-entropy of images and captions (Radford et al. 2021, CLIP, figure 3).

    Arguments and result as in siglip_loss, without a bias.
    """
    logits = _logits(image_features, text_features, logit_scale)  # (b, B)
    return _softmax_share(logits, _diagonal(logits, offset))


def npc_loss(image_features, concept_features, labels, logit_scale, logit_bias=None):
    """Noun-phrase contrast: each image against every concept of the batch (C2LIP, L_npc).

    image_features (b, D) of this process, concept_features (N, D) of all, normalised; labels (b, N) bool,
    true where the image's caption holds the concept, several per column allowed (see concept_columns).
    With logit_bias: -sum_mn log sigmoid(y_mn (logit_scale I_m.P_n + logit_bias)) / N.
    Without: the softmax analogue for CLIP weights, on z = logit_scale I P^T,
        1/2 [ mean over concepts n of the mean over n's images m of -log softmax over all images (z_.n)_m
            + mean over images m with a concept of the mean over m's concepts n of -log softmax (z_m.)_n ].
    Returns this process's share, a scalar of at least float32; 0 (with a graph) without any concept.
    """
    return _concept_share(_logits(image_features, concept_features, logit_scale), labels, logit_bias)


def xac_loss(similarity, labels, logit_scale, logit_bias=None):
    """Cross-attention concept contrast: like npc_loss, with attention-pooled images (C2LIP, L_xac).

    similarity (b, N): cosine of concept n and image m's tokens pooled by n's attention, as
    pooling.concept_similarity returns it for this process's patch tokens and the concepts of all. The rest
    as in npc_loss, on z = logit_scale similarity (+ logit_bias).
    """
    return _concept_share(logit_scale * _float(similarity), labels, logit_bias)
