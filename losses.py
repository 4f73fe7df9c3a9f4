"""Contrastive losses over images, captions, concepts and hard negatives, exact at any world size.

What is copied most stands first: siglip_loss, clip_loss, npc_loss, xac_loss, and concept_columns,
which makes the columns of the latter two. Then come what all losses are made of, the losses of
other papers, METHODS, the table that train.py chooses from, and last what processes exchange.

How the shares add up. Every loss but awc_loss takes this process's own rows (b), against the
captions or concepts of all processes (N columns) where it compares them, and returns this process's
share, Tensor () of at least float32: its part of the whole batch's loss. A loss of several terms
returns a dict of shares. On one process the share is the loss. Summed over processes, the shares
are the loss of the whole batch on one device. DistributedDataParallel averages gradients, so
multiply by the world size before the backward. Then the gradient of every parameter is that of one
process with the whole batch:

    texts = gather_features(text_features)
    offset = first_row(len(image_features))
    loss = siglip_loss(image_features, texts, logit_scale.exp(), logit_bias, offset)
    (loss * world_size).backward()

Captions and concepts are gathered with their gradient. Images and their patch tokens never are, so
work and memory of a process fall with the world size. Every process must call the same losses in
the same order, also when it has no row of its own.

Features are L2-normalised, in any float dtype (float64 beside float64 only). Logits, all that
follows and their gradients are computed in float32 at least, also under autocast and where TF32 is
allowed: at a logit_scale of 100 TF32 would change logits by about 0.005 between random features,
and by 0.1 at worst; float32 changes them by 0.00003. (Under torch.compile TF32 is used where the
caller allows it.)
`logit_scale` is the multiplier itself: the exp() of the parameter that CLIP and SigLIP store.

The methods with hard negatives take K negatives of each caption, gathered like the captions:
negative_features (B, K, D) and a mask (B, K) of bool. Where the mask is false there is no negative.
Whatever finite feature stands there enters no sum and no count. Masks may be on the CPU, and best
are, because what is chosen by them has a size that the CPU must know: it would wait for a GPU.
"""
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F


# ---- images, captions and concepts ------------------------------------------------------------
def siglip_loss(image_features, text_features, logit_scale, logit_bias, offset=0):
    """Sigmoid loss of images and captions.

    Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, equation 1:
        -sum_ij log sigmoid(y_ij (logit_scale I_i.T_j + logit_bias)) / B,  y = +1 for i = j, else -1

    Parameters
    ----------
    image_features : Tensor (b, D)
        Of this process, normalised.
    text_features : Tensor (B, D)
        Of all processes, normalised.
    logit_scale, logit_bias : scalar
        The multiplier itself, and what is added.
    offset : int
        The column of the first image's caption.

    Returns
    -------
    Tensor ()
        This process's share, of at least float32.
    """
    logits = _logits(image_features, text_features, logit_scale) + logit_bias  # (b, B)
    return _sigmoid_share(logits, _diagonal(logits, offset), len(text_features))


def clip_loss(image_features, text_features, logit_scale, offset=0):
    """Symmetric cross-entropy (Radford et al. 2021, CLIP, figure 3).

    Arguments and result are those of siglip_loss.
    """
    logits = _logits(image_features, text_features, logit_scale)  # (b, B)
    labels = _diagonal(logits, offset)
    B = len(text_features)
    one_each = torch.ones(B, dtype=torch.int64, device=logits.device)  # a column's positives
    return 0.5 * (_columns_share(logits, labels, one_each) + _rows_share(logits, labels, B))


def npc_loss(image_features, concept_features, labels, logit_scale, logit_bias=None, count=None):
    """Noun-phrase contrast: each image against every concept of the batch (C2LIP, L_npc).

    With logit_bias, y = +1 where labels, else -1:
        -sum_mn log sigmoid(y_mn (logit_scale I_m.P_n + logit_bias)) / count
    Without, the softmax analogue for CLIP's weights, on z = logit_scale I P^T:
        1/2 [ mean over concepts n of the mean over n's images m of -log softmax(z_.n)_m
            + mean over images m of the mean over m's concepts n of -log softmax(z_m.)_n ]
    Images without a concept and concepts without an image are in neither mean.

    Parameters
    ----------
    image_features : Tensor (b, D)
        Of this process, normalised.
    concept_features : Tensor (N, D)
        Of all processes, normalised.
    labels : Tensor (b, N) bool
        Whether the image's caption holds the concept. Several images may hold it (concept_columns).
    logit_scale, logit_bias : scalar
        The multiplier itself, and what is added.
    count : int or Tensor (), optional
        The divisor of the sigmoid loss, by default N. In C2LIP's released code each pair of an
        image and its phrase is a column, so N is the number of pairs. Where equal phrases share a
        column N is smaller, the more so the larger the batch, and a pair weighs more. With the
        number of pairs of all processes, sum(row_counts(int(labels.sum()))), a pair weighs what it
        does there, whatever the batch.

    Returns
    -------
    Tensor ()
        This process's share, of at least float32. It is 0 (with a graph) without any concept.
    """
    logits = _logits(image_features, concept_features, logit_scale)  # (b, N)
    return _contrast_share(logits, labels, logit_bias, count)


def xac_loss(similarity, labels, logit_scale, logit_bias=None, count=None):
    """Cross-attention contrast: npc_loss with images pooled by attention (C2LIP, L_xac).

    similarity (b, N) is the cosine of concept n and image m's tokens, pooled by n's attention. It
    comes from pooling.concept_similarity of this process's patch tokens and all concepts. The rest
    is as in npc_loss, on z = logit_scale similarity (+ logit_bias).
    """
    logits = logit_scale * _float(similarity)  # (b, N)
    return _contrast_share(logits, labels, logit_bias, count)


def concept_columns(concept_features, concept_ids, pairs, batch_size, dedupe=True, merge=True,
                    feature_ids=None):
    """Make the columns of all processes, and this process's labels, of each process's concepts.

    Three things can be a column:

    dedupe and merge (the default)
        A string. It is one column, wherever it comes from, and positive for every image that holds
        it. The feature of its first occurrence stands for all and takes the whole gradient. This
        is exact as long as equal strings have equal features (no dropout).
    dedupe, but not merge
        A row of concept_features, positive for every image that holds its string. For features
        that differ between equal strings, as those do that are pooled from each caption's span.
    not dedupe
        A pair, positive for its own image only. The same phrase in other images counts as
        negative, as in C2LIP's released code.

    Parameters
    ----------
    concept_features : Tensor (U, D)
        A row for each different string of this process (without merge, for each occurrence of a
        string), or for each string of feature_ids.
    concept_ids : Tensor (U,) int64
        A hash of each string, at least 0 and equal for equal strings on all processes. (Those of
        concepts.index_phrases are equal for spellings in other case, too: the first one's feature
        stands for all.) A negative id marks padding. The ids and pairs may be on the CPU, and best
        are.
    pairs : Tensor (P, 2) int64
        (image, row of concept_ids) of each concept of each of this process's images. A negative
        number marks padding, and so does a concept that is padding.
    batch_size : int
        b, the number of this process's images.
    feature_ids : Tensor (U',) int64, optional
        The strings of concept_features, where share_concepts chose them. Needs dedupe and merge.

    Raises
    ------
    ValueError
        For pairs of images or concepts that are not there, and for more or fewer features than ids.

    Returns
    -------
    features : Tensor (N, D)
        The columns of all processes in rank order, with gradient.
    labels : Tensor (b, N) bool
        Whether the column is a concept of the image.
    """
    concept_ids, pairs = concept_ids.cpu(), pairs.cpu()
    if feature_ids is None:
        feature_ids = concept_ids
    elif not (dedupe and merge):
        raise ValueError("feature_ids come from share_concepts, which needs dedupe and merge")
    _check_concepts(concept_features, feature_ids, concept_ids, pairs, batch_size)
    image, _ = _real_pairs(pairs, concept_ids)  # only counted here
    pair_counts, ids_of_all = zip(*_exchange(torch.tensor([len(image)]), feature_ids))
    given, counts, labels = _plan_columns(
        concept_ids, pairs, batch_size, torch.cat(pair_counts).tolist(), ids_of_all, dedupe, merge)
    device = concept_features.device
    features = concept_features.index_select(0, given.to(device))
    return gather_features(features, counts), labels.to(device)


def _check_concepts(concept_features, feature_ids, concept_ids, pairs, batch_size):
    """ValueError for what concept_columns cannot mean."""
    if len(concept_features) != len(feature_ids):
        raise ValueError(f"{len(concept_features)} concept_features, but {len(feature_ids)} ids: "
                         "expected one for each")
    sizes = torch.tensor([batch_size, len(concept_ids)])
    if (pairs >= sizes).any():
        raise ValueError(f"the highest of pairs is {pairs.amax(0).tolist()}: expected images below "
                         f"{batch_size} and concepts below {len(concept_ids)}")


# ---- from logits (b, N) and labels (b, N) to this process's share -----------------------------
def _contrast_share(logits, labels, logit_bias, count):
    """The sigmoid loss with a bias. Without one, half by rows and half by columns.

    The latter is CLIP's loss where each row and each column has one positive. count divides the
    former; None: the number of columns.
    """
    if count is None:
        count = labels.shape[1]
    if logit_bias is not None:
        return _sigmoid_share(logits + logit_bias, labels, count)
    rows, in_column = _positives(labels)
    return 0.5 * (_columns_share(logits, labels, in_column) + _rows_share(logits, labels, rows))


def _sigmoid_share(logits, labels, count):
    """-sum log sigmoid(y z) / count, y = +1 where labels, else -1 (SigLIP, equation 1)."""
    signed = torch.where(labels, logits, -logits)
    count = torch.as_tensor(count).clamp_min(1)  # max(count, 1) would wait for a GPU
    return -F.logsigmoid(signed).sum() / count


def _rows_share(logits, labels, rows):
    """mean_m mean_{n in P(m)} (logsumexp_k z_mk - z_mn).

    m are the rows of all processes that have positive columns P(m), `rows` is their number.
    """
    in_row = labels.sum(1, keepdim=True)  # (b, 1)
    surprise = logits.logsumexp(dim=1, keepdim=True) - logits  # (b, N), -log softmax
    return (surprise * labels / (in_row * rows).clamp_min(1)).sum()


def _columns_share(logits, labels, in_column):
    """The same of columns: the mean over those with positive rows of the mean over these rows.

    The softmax of a column runs over the rows of all processes.
    in_column (N,): how many positive rows a column has, on all processes.
    """
    columns = (in_column > 0).sum()
    surprise = _column_logsumexp(logits) - logits  # (b, N)
    return (surprise * labels / (in_column * columns).clamp_min(1)).sum()


def _column_logsumexp(logits):
    """logsumexp over the rows of all processes: (b, N) -> (N,).

    Only N numbers of each process are exchanged.
    """
    if not _distributed():
        return logits.logsumexp(dim=0)
    own = logits.logsumexp(dim=0, keepdim=True)  # (1, N)
    one_row_each = [1] * dist.get_world_size()
    return gather_features(own, one_row_each).logsumexp(dim=0)  # (W, N) -> (N,)


def _positives(labels):
    """Count over all processes: the rows with a positive, and each column's positives (N,)."""
    rows = labels.any(1).sum(0, keepdim=True)  # (1,)
    sums = _global_sum(torch.cat([rows, labels.sum(0)]))  # (1 + N,)
    return sums[0], sums[1:]


def _diagonal(logits, offset):
    """Labels (b, N) bool, where row i's own column is offset + i."""
    b, N = logits.shape
    if offset < 0 or offset + b > N:
        raise ValueError(f"{b} rows whose own columns begin at offset {offset}, but {N} columns: "
                         "expected one for each row")
    rows = torch.arange(b, device=logits.device)
    columns = torch.arange(N, device=logits.device)
    return columns == rows[:, None] + offset


# ---- logits in full precision -----------------------------------------------------------------
def _logits(rows, columns, logit_scale):
    """logit_scale rows @ columns.T: (b, D), (N, D) -> (b, N), at least float32."""
    rows, columns = _float(rows), _float(columns)
    if torch.compiler.is_compiling():  # which would break the graph at the flags
        with torch.autocast(rows.device.type, enabled=False):
            return logit_scale * (rows @ columns.T)
    return logit_scale * _Product.apply(rows, columns)


class _Product(torch.autograd.Function):
    """rows @ columns.T in full precision: (b, D), (N, D) -> (b, N).

    A function of its own, because the backward runs when the caller's flags are in force again.
    """
    generate_vmap_rule = True  # with setup_context, so that torch.func takes it

    @staticmethod
    def forward(rows, columns):
        with _full_precision(rows.device):
            return rows @ columns.T

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        rows, columns = ctx.saved_tensors
        with _full_precision(grad.device):
            return grad @ columns, grad.T @ rows


@contextmanager
def _full_precision(device):
    """Neither autocast nor TF32 in what is computed here."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        name, exact = "fp32_precision", "ieee"
    else:  # before torch 2.9
        name, exact = "allow_tf32", False
    allowed = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(matmul, name, allowed)


def _float(x):
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- captions in the place of concepts, and paraphrases ---------------------------------------
def caption_xac_loss(similarity, logit_scale, logit_bias=None, offset=0, sentence_labels=None):
    """xac_loss with whole captions in the place of concepts, and sentences of them.

    FLAIR (Xiao et al. 2025, Fine-grained language-informed image representations) has this as its
    text-conditioned sigmoid loss, with an attention that is trained. Here it is C2LIP's, which has
    no parameters.

    As in xac_loss, the sigmoid form is divided by the number of queries, B + S. So captions and
    sentences weigh the same, and the term stays of the size that it has without sentences. FLAIR's
    released code divides likewise, by the queries of an image: K texts of its own, each of one to
    three sentences, and one text of each other image. Here an image meets all texts of the others,
    and a sentence is positive for every image whose caption holds it; there for its own alone.

    Parameters
    ----------
    similarity : Tensor (b, B + S)
        From pooling.concept_similarity with the captions of all processes as queries, and behind
        them S sentences. In the same call as the concepts it is nearly free.
    logit_scale, logit_bias, offset
        As in siglip_loss. A caption is positive for its own image.
    sentence_labels : Tensor (b, S) bool, optional
        Whether the image's caption holds the sentence, as in npc_loss.
    """
    if sentence_labels is None:
        return xac_loss(similarity, _diagonal(similarity, offset), logit_scale, logit_bias)
    captions = similarity[:, :similarity.shape[1] - sentence_labels.shape[1]]
    labels = torch.cat([_diagonal(captions, offset), sentence_labels], dim=1)
    return xac_loss(similarity, labels, logit_scale, logit_bias)


def paraphrase_loss(paraphrase_features, text_features, mask, logit_scale, logit_bias=None,
                    offset=0):
    """READ's sentence alignment: a second caption of an image finds the first among all captions.

    Kwon et al. 2025, Enhancing compositional reasoning in CLIP via reconstruction and alignment of
    text descriptions (weight 0.5):
        mean_i -log softmax_j(s P_i.T_j)_i
    over the images i that have a second caption P_i. With logit_bias it is the sigmoid loss of the
    same rows and columns, divided by the number of these images.

    The form is that of the released code, whose rows are the P and which goes this one way. In the
    paper's formula, as CS-CLIP's code repeats it, the rows are the T. The released code compares
    within each process alone, and draws P also among sentences that a language model wrote.

    Parameters
    ----------
    paraphrase_features : Tensor (b, D)
        Of this process.
    text_features : Tensor (B, D)
        Of all processes.
    mask : Tensor (b,) bool
        Of this process, false where there is no second caption. Without any the loss is 0.
    logit_scale, logit_bias, offset
        As in siglip_loss.
    """
    mask = mask.to(paraphrase_features.device, non_blocking=True)[:, None]  # (b, 1)
    count = _global_sum(mask.sum())
    logits = _logits(paraphrase_features, text_features, logit_scale)  # (b, B)
    labels = _diagonal(logits, offset) & mask
    if logit_bias is None:
        return _rows_share(logits, labels, count)
    logits = (logits + logit_bias).masked_fill(~mask, -torch.inf)  # of which the loss is 0
    return _sigmoid_share(logits, labels, count)


# ---- robust images, and what a model knew before ----------------------------------------------
def pgd_attack(pixels, noise, loss, epsilon, steps, step=1 / 255):
    """Change each pixel by at most epsilon, so that a loss rises.

    Madry et al. 2018, Towards deep learning models resistant to adversarial attacks: projected
    gradient descent from a random start, here with TeCoA's size of a step.

    Parameters
    ----------
    pixels : Tensor (b, 3, S, S)
        From 0 to 1, not normalised.
    noise : Tensor (b, 3, S, S) uint8
        Where an image's attack begins: 0 is epsilon below its pixels, 255 above. If it is a
        function of the image alone, so is the attack, on any number of processes.
    loss : function of such pixels -> Tensor ()
        A sum in which each image has a term of its own.
    epsilon, step : float
        The largest change, and that of one of the `steps`, of pixels from 0 to 1.

    Returns
    -------
    Tensor (b, 3, S, S), from 0 to 1, without a graph.
    """
    start = epsilon * (noise.to(pixels.dtype) / 127.5 - 1)
    changed = (pixels + start).clamp(0, 1)
    for _ in range(steps):
        changed.requires_grad_()
        [gradient] = torch.autograd.grad(loss(changed), [changed])
        changed = changed.detach() + step * gradient.sign()
        changed = changed.clamp(pixels - epsilon, pixels + epsilon).clamp(0, 1)
    return changed


def tecoa_loss(image_features, text_features, labels, logit_scale, logit_bias=None):
    """TeCoA: images that an attack has changed, each against all captions.

    Mao et al. 2023, Understanding zero-shot adversarial robustness for large-scale models:
        mean_i of the mean over i's captions n of -log softmax(s I_i T^T)_n
    with logit_bias the sigmoid loss of the same pairs / B. The paper's texts are the names of
    classes, "This is a photo of a {}", of which an image has one. Here they are the captions of the
    batch. Where the data has classes, give each row that text as its caption: rows of one class
    then are each other's, and a class weighs as much as the batch has rows of it. The paper trains
    the image tower alone; its released code holds logit_scale, too, and gives as its example an
    attack of 2 steps with epsilon 1 / 255.

    Parameters
    ----------
    image_features : Tensor (b, D)
        Of this process, from changed images (pgd_attack, with this loss).
    text_features : Tensor (B, D)
        Of all processes.
    labels : Tensor (b, B) bool
        Whether a caption is the image's own, or equal to it.
    """
    logits = _logits(image_features, text_features, logit_scale)  # (b, B)
    if logit_bias is not None:
        return _sigmoid_share(logits + logit_bias, labels, len(text_features))
    return _rows_share(logits, labels, len(text_features))


def gift_loss(image_features, text_features, teacher, labels, logit_scale, logit_bias=None):
    """GIFT: a model that learns new pairs stays on others near to what it was before.

    Wu et al. 2025, Synthetic data is an elegant GIFT for continual vision-language models. Returns
    a dict of shares, which the paper weighs 1 and 0.25, on pairs of what the model knew:

    cd
        contrastive distillation, by rows and by columns of z = s I T^T and the teacher's z':
            4 [mean_i CE(softmax(z'_i. / 2), z_i. / 2) + mean_j CE(softmax(z'_.j / 2), z_.j / 2)]
        s is the student's for both, without gradient in z'. A bias would cancel.
    ita
        image-text alignment: CE(z) by rows + CE(z) by columns, with labels smoothed by 0.2 (the
        share 0.2 lies evenly on all), or with logit_bias siglip_loss of these pairs

    Both equal the released code's; the paper's formulas were not at hand. There the pairs are of
    images that a diffusion model made, logit_scale is held, and the new pairs are of classes, in a
    cross-entropy with labels smoothed by 0.2. Here new pairs have the contrast of CLIP or SigLIP.

    Parameters
    ----------
    image_features : Tensor (b, D)
        Of this process.
    text_features : Tensor (B, D)
        Of all processes.
    teacher : dict
        The same from the model before, without gradient: image_features, text_features.
    labels : Tensor (b, B) bool
        Whether a caption is the image's own, or equal to it.
    """
    B = len(text_features)
    logits = _logits(image_features, text_features, logit_scale)  # (b, B)
    with torch.no_grad():
        targets = _logits(teacher["image_features"], teacher["text_features"], logit_scale) / 2
        by_rows = targets.softmax(dim=1)
        by_columns = (targets - _column_logsumexp(targets)).exp()
    rows = (logits / 2).logsumexp(dim=1, keepdim=True) - logits / 2  # -log softmax
    columns = _column_logsumexp(logits / 2) - logits / 2
    cd = 4 * (by_rows * rows + by_columns * columns).sum() / max(B, 1)
    if logit_bias is not None:
        return {"cd": cd, "ita": _sigmoid_share(logits + logit_bias, labels, B)}
    ita = 0.8 * _both_ways_share(logits, labels)
    return {"cd": cd, "ita": ita + 0.2 * _both_ways_share(logits, torch.ones_like(labels))}


def _both_ways_share(logits, labels):
    """Cross-entropy by rows + by columns, with equal weight on the labels of each."""
    rows, in_column = _positives(labels)
    return _rows_share(logits, labels, rows) + _columns_share(logits, labels, in_column)


def fisher_weights(gradients):
    """How much each number of each parameter matters to a loss, from the gradient of that loss.

    GIFT's diagonal of the Fisher information, of one batch: squared gradients, divided by their
    mean over a parameter. gradients: a list of tensors. Returns a list of the same shapes.
    """
    squares = [_float(gradient).square() for gradient in gradients]
    return [square / square.mean().clamp_min(1e-30) for square in squares]


def awc_loss(parameters, anchors, weights):
    """GIFT's adaptive weight consolidation: sum of weights (parameters - anchors)^2.

    Three lists of tensors of the same shapes: the parameters, what they were before, and
    fisher_weights of the gradient that cd and ita have in this step. The paper weighs it 1. It is
    no share but the whole, equal on all processes: it is not multiplied by the world size.
    """
    total = 0.0
    for parameter, anchor, weight in zip(parameters, anchors, weights):
        total = total + (weight * (parameter - anchor).square()).sum()
    return total


# ---- hard negatives ---------------------------------------------------------------------------
def negclip_loss(image_features, text_features, negative_features, mask, logit_scale,
                 logit_bias=None, offset=0):
    """NegCLIP: negative captions as more columns.

    Yuksekgonul et al. 2023, When and why vision-language models behave like bags-of-words:
        1/2 [CE(s I [T; T-]^T) + CE(s T I^T)]
    CE is the mean over rows of the cross-entropy with the row's own column. With logit_bias it is
    siglip_loss with the negatives as columns that have no image, still divided by B. NegCLIP also
    draws a similar image for each, with its caption and negatives: give those as further rows.

    Parameters
    ----------
    image_features : Tensor (b, D)
        Of this process.
    text_features : Tensor (B, D)
        Of all processes.
    negative_features : Tensor (B, K, D)
        Of all processes.
    mask : Tensor (B, K) bool
        Of all processes, false where there is no negative.
    logit_scale, logit_bias, offset
        As in siglip_loss.
    """
    texts = torch.cat([text_features, _valid(negative_features, mask)])  # (B + V, D)
    logits = _logits(image_features, texts, logit_scale)  # (b, B + V)
    return _contrast_share(logits, _diagonal(logits, offset), logit_bias, len(text_features))


def _valid(features, mask):
    """Choose the rows where the mask is true: (..., D), (...) -> (V, D)."""
    index = mask.flatten().nonzero().squeeze(1)  # (V,)
    rows = features.flatten(0, mask.ndim - 1)
    return rows.index_select(0, index.to(features.device, non_blocking=True))


def ce_clip_loss(image_features, text_features, negative_features, mask, thresholds, logit_scale,
                 logit_bias=None, offset=0):
    """CE-CLIP: an intra-modal contrast and a ranking with thresholds that adapt.

    Zhang et al. 2024, Contrasting intra-modal and ranking cross-modal hard negatives. Arguments are
    those of negclip_loss, and thresholds (K,) of the step before, which start as zeros. Returns a
    dict of shares, which the paper weighs 1, 0.2 and 0.3, and the thresholds of the next step:

    contrastive
        negclip_loss
    cmr
        mean over the valid negatives of relu(thresholds_k + s I_i.T-_ik - s I_i.T_i)
    imc
        mean_i CE([s I_i.T_i | s T_i.T-_jk for all j, k], the first), or with a bias the sigmoid
        loss of the same
    thresholds
        (K,) mean_i s I_i.T_i - mean_i s I_i.T-_ik, clamped to [0, 10], equal on all processes. It
        stays as it was where no k is valid.

    The released code differs: its IMC attracts the first negative, and its CMR divides by B K,
    valid or not.
    """
    contrastive = negclip_loss(image_features, text_features, negative_features, mask,
                               logit_scale, logit_bias, offset)
    negatives = _valid(negative_features, mask)  # (V, D)
    mask = mask.to(image_features.device, non_blocking=True)
    own = slice(offset, offset + len(image_features))
    texts, valid = text_features[own], mask[own]  # (b, D), (b, K)
    count = len(text_features)

    choices = _choices(image_features, texts, negative_features[own], valid, logit_scale)
    positive, negative = choices[:, :1], choices[:, 1:]  # (b, 1), (b, K)
    hinges = (thresholds + negative - positive).relu()  # (b, K), 0 = relu(-inf) if not valid
    cmr = hinges.sum() / mask.sum().clamp_min(1)

    to_negatives = _logits(texts, negatives, logit_scale)  # (b, V)
    imc = _choice_share(torch.cat([positive, to_negatives], dim=1), logit_bias, count)

    sums = torch.cat([positive, negative.masked_fill(~valid, 0)], dim=1).sum(0)  # (1 + K,)
    sums = _global_sum(sums)
    mean_positive = sums[0] / max(count, 1)
    mean_negative = sums[1:] / mask.sum(0).clamp_min(1)  # (K,)
    margins = (mean_positive - mean_negative).clamp(0, 10)
    return {
        "contrastive": contrastive,
        "cmr": cmr,
        "imc": imc,
        "thresholds": torch.where(mask.any(0), margins, thresholds),
    }


def _choices(rows, first, others, valid, scale):
    """Logits of each row's own candidates, the first and K others, -inf where not valid.

    (b, D), (b, D), (b, K, D), (b, K) -> (b, 1 + K)
    """
    candidates = torch.cat([first[:, None], others], dim=1)  # (b, 1 + K, D)
    logits = scale * (_float(rows)[:, None] * _float(candidates)).sum(-1)
    return logits.masked_fill(F.pad(~valid, (1, 0)), -torch.inf)


def _choice_share(logits, logit_bias, count):
    """-log softmax of each row's first column / count, or the sigmoid loss where there is a bias.

    In the latter the first column is positive and the others are negative.
    """
    if logit_bias is None:
        return (logits.logsumexp(dim=1) - logits[:, 0]).sum() / max(count, 1)
    is_first = torch.arange(logits.shape[1], device=logits.device) == 0
    return _sigmoid_share(logits + logit_bias, is_first, count)


def degla_loss(image_features, text_features, negative_features, mask, teacher, logit_scale,
               logit_bias=None, offset=0):
    """DeGLA: two contrasts with a caption's own negatives, and distillation from averaged weights.

    Hu et al. 2025, Decoupled global-local alignment for improving compositional understanding.
    Arguments are those of negclip_loss, and teacher: a dict of the same features from the averaged
    weights without gradient, image_features of this process, text_features and negative_features of
    all. Returns a dict of shares, which the paper weighs 1, 0.1, 0.1 and 0.005:

    contrastive
        negclip_loss
    tgc
        mean_i CE([10 T_i.teacher's T_i | 10 T_i.T-_ij for all j], the first), with a bias too
    igc
        mean_i CE([s I_i.T_i | s I_i.T-_ij for all j], the first), or with a bias the sigmoid loss
        of the same
    distill
        squared distances of all I, T and valid T- from the teacher's, summed over the whole batch

    Both means are over all B. A caption without a valid negative counts as 0 in the softmax, and in
    the sigmoid form by its positive alone. The released code differs: its TGC takes other captions'
    masks. Without a teacher (None) tgc and distill are left out.
    """
    own = slice(offset, offset + len(image_features))
    texts, negatives = text_features[own], negative_features[own]  # (b, D), (b, K, D)
    valid = mask[own].to(image_features.device, non_blocking=True)  # (b, K)
    count = len(text_features)
    terms = {"contrastive": negclip_loss(image_features, text_features, negative_features, mask,
                                         logit_scale, logit_bias, offset)}
    if teacher is not None:
        tgc = _choices(texts, teacher["text_features"][own], negatives, valid, 10)  # (b, 1 + K)
        terms["tgc"] = _choice_share(tgc, None, count)
    igc = _choices(image_features, texts, negatives, valid, logit_scale)  # (b, 1 + K)
    terms["igc"] = _choice_share(igc, logit_bias, count)
    if teacher is not None:
        terms["distill"] = _distill_share(image_features, texts, negatives, valid, teacher, own)
    return terms


def _distill_share(image_features, texts, negatives, valid, teacher, own):
    """Squared distances of this process's features from the teacher's, summed.

    Without negatives (None) only the images' and the captions'.
    """
    total = _distances(image_features, teacher["image_features"]).sum()
    total = total + _distances(texts, teacher["text_features"][own]).sum()
    if negatives is not None:
        far = _distances(negatives, teacher["negative_features"][own])  # (b, K)
        total = total + far.masked_fill(~valid, 0).sum()
    return total


def _distances(x, y):
    """|x - y|^2 of each row: (..., D), (..., D) -> (...)."""
    return (_float(x) - _float(y)).square().sum(-1)


def fsc_clip_loss(image_features, text_features, negative_features, mask, word_similarity,
                  word_mask, logit_scale, logit_bias=None, offset=0):
    """FSC-CLIP: focal losses over a caption and its own negatives, globally and word by word.

    Oh et al. 2024, Preserving multi-modal capabilities of pre-trained VLMs for improving
    vision-linguistic compositionality. Arguments are those of negclip_loss, and
    pooling.token_similarity's result, word_similarity (b, 1 + K, L), of the tokens of this
    process's captions and of their K negatives; word_mask (b, 1 + K, L) bool is true for the tokens
    that count. Returns a dict of shares, which the paper weighs 0.5 and 0.2 beside CLIP's loss
    (the 0.2 is that of ViT-B/32, other towers have 0.5):

    ghn
        With p the softmax over [s I_i.T_i | s I_i.T-_ik for the n valid k], the mean over the rows
        with n > 0 of sum_c q_c (1 - p_c)^2 (-log p_c), where q = 0.98 + 0.02 / (n + 1) for the
        caption and 0.02 / (n + 1) for each negative.
    lhn
        The same of logsumexp over the words of s word_similarity in the place of s I_i.T. Without
        word_similarity (None) it is left out.

    With logit_bias each candidate c is a choice between true and false of its own, p_c the sigmoid:
    sum_c 0.99 f(p of what it is) + 0.01 f(p of what it is not), f(p) = (1 - p)^2 (-log p).

    The released code differs: a negative that there is not has the logit 0 in its softmax, and each
    process takes the mean over its own rows.
    """
    own = slice(offset, offset + len(image_features))
    valid = mask[own].to(image_features.device, non_blocking=True)  # (b, K)
    count = mask.any(1).sum()
    logits = _choices(image_features, text_features[own], negative_features[own], valid,
                      logit_scale)  # (b, 1 + K)
    terms = {"ghn": _focal_share(logits, valid, logit_bias, count)}
    if word_similarity is not None:
        word_mask = word_mask.to(valid.device, non_blocking=True)
        words = logit_scale * _float(word_similarity)  # (b, 1 + K, L)
        # not -inf, whose gradient would be nan where no word counts
        words = words.masked_fill(~word_mask, torch.finfo(words.dtype).min)
        terms["lhn"] = _focal_share(words.logsumexp(dim=-1), valid, logit_bias, count)
    return terms


def _focal_share(logits, valid, logit_bias, count):
    """FSC-CLIP's focal loss of rows (b, 1 + K), the caption first, over the rows with a negative.

    valid (b, K) tells which negatives there are, count how many rows of all processes have one.
    """
    is_caption = torch.arange(logits.shape[1], device=logits.device) == 0  # (1 + K,)
    is_candidate = F.pad(valid, (1, 0), value=True)  # (b, 1 + K)
    counts = is_candidate & valid.any(1, keepdim=True)  # not where the caption stands alone
    if logit_bias is None:
        log_p = logits.masked_fill(~is_candidate, -torch.inf).log_softmax(dim=1)
        focal = _focal(log_p.masked_fill(~counts, 0))  # of a log p of 0 it is 0
        smoothed = 0.02 * focal / is_candidate.sum(1, keepdim=True)
        losses = 0.98 * (focal * is_caption) + smoothed
    else:
        z = logits.masked_fill(~counts, 0) + logit_bias
        z = torch.where(is_caption, z, -z)  # of what each candidate is
        losses = (0.99 * _focal(F.logsigmoid(z)) + 0.01 * _focal(F.logsigmoid(-z))) * counts
    return losses.sum() / count.clamp_min(1)


def _focal(log_p):
    """(1 - p)^2 (-log p)"""
    return -log_p * torch.expm1(log_p).square()


def cs_clip_loss(image_features, unit_features, foil_features, mask, logit_scale, logit_bias=None,
                 offset=0):
    """CS-CLIP: parts of a caption, each with a false version of it that its own image rejects.

    Kargi et al. 2026, Half-truths break similarity-based retrieval (weight 0.5 beside NegCLIP's
    loss, where a caption has 2 units):
        mean_k 1/2 [CE([s I U_k^T | s I_i.U-_ki]) + CE(s U_k I^T)]
    U_k are the k-th units of all captions, U-_ki the foil of the k-th unit of caption i. Rows and
    columns without a unit are left out, and so is a k that no caption has. With logit_bias it is
    the sigmoid loss of the same pairs, divided by the number of the k-th units.

    The released code differs: a k without any unit counts as 0 in the mean, each process compares
    its own rows alone, and a caption that has no second unit gives the first twice. There and here
    a unit that two captions have in common is negative for each other's image.

    Parameters
    ----------
    image_features : Tensor (b, D)
        Of this process.
    unit_features : Tensor (B, K, D)
        Of all processes.
    foil_features : Tensor (b, K, D)
        Of this process.
    mask : Tensor (B, K) bool
        Of all processes, false where there is no unit.
    logit_scale, logit_bias, offset
        As in siglip_loss.
    """
    own = slice(offset, offset + len(image_features))
    total = 0
    for k in range(mask.shape[1]):
        valid = mask[:, k]
        images = _valid(image_features, valid[own])  # (v, D)
        units = _valid(unit_features[:, k], valid)  # (V, D)
        foils = _valid(foil_features[:, k], valid[own])  # (v, D)
        to_units = _logits(images, units, logit_scale)  # (v, V)
        to_foils = logit_scale * (_float(images) * _float(foils)).sum(1, keepdim=True)  # (v, 1)
        logits = torch.cat([to_units, to_foils], dim=1)  # (v, V + 1)
        labels = _diagonal(logits, int(valid[:offset].sum()))
        count = len(units)
        if logit_bias is not None:
            total = total + _sigmoid_share(logits + logit_bias, labels, count)
            continue
        one_each = torch.ones(count, dtype=torch.int64, device=logits.device)
        columns = _columns_share(to_units, labels[:, :count], one_each)
        total = total + 0.5 * (columns + _rows_share(logits, labels, count))
    return total / mask.any(0).sum().clamp_min(1)


def clic_loss(image_features, text_features, caption_features, mask, logit_scale, logit_bias=None,
              offset=0):
    """CLIC: two images as one, with captions of both, and one in which they exchange a word.

    Peleg et al. 2025, Advancing compositional awareness in CLIP with efficient fine-tuning. Returns
    a dict of shares, equal to the released code's, which the paper weighs 0.5, 0.5 and 1:

    pairs
        the mean over the true captions k of clip_loss(I, T_k), or with a bias of siglip_loss
    sneg
        the mean over k of mean_i CE([s I_i.T_ki | s I_i.T-_i], the first), or with a bias of the
        sigmoid loss of the same. An i without T- counts as 0; with a bias its true pair counts.
    uni
        mean_i |T_1i - T_2i|^2, of the same sentences in the other order

    Parameters
    ----------
    image_features : Tensor (b, D)
        Of this process.
    text_features : Tensor (B, D)
        T_1, of all processes.
    caption_features : Tensor (B, K, D)
        Of all processes: T_2 and further true captions, and T- as the last.
    mask : Tensor (B, K) bool
        Of all processes. Of the last column, false where there is no T-; the others are not read.
    logit_scale, logit_bias, offset
        As in siglip_loss.
    """
    own = slice(offset, offset + len(image_features))
    B = len(text_features)
    captions = [text_features, *caption_features[:, :-1].unbind(1)]  # (B, D) each
    negative = caption_features[own, -1:]  # (b, 1, D)
    valid = mask[own, -1:].to(image_features.device, non_blocking=True)  # (b, 1)
    pairs = sneg = 0.0
    for texts in captions:
        if logit_bias is None:
            pairs = pairs + clip_loss(image_features, texts, logit_scale, offset)
        else:
            pairs = pairs + siglip_loss(image_features, texts, logit_scale, logit_bias, offset)
        choices = _choices(image_features, texts[own], negative, valid, logit_scale)  # (b, 2)
        sneg = sneg + _choice_share(choices, logit_bias, B)
    distances = _distances(captions[0][own], captions[1][own])  # (b,)
    return {
        "pairs": pairs / len(captions),
        "sneg": sneg / len(captions),
        "uni": distances.sum() / max(B, 1),
    }


def con_clip_loss(image_features, text_features, negative_features, mask, negative_image_features,
                  image_mask, logit_scale, logit_bias=None, offset=0):
    """CoN-CLIP: negated captions and distractor images.

    Singh et al. 2024, Learn "no" to say "yes" better:
        1/3 [CE(s I [T; T-]^T) + CE(s T [I; I-]^T) + CE(s I- [T-; T]^T)]
    Arguments and result are those of negclip_loss, and negative_image_features (b, D) and
    image_mask (b,) of this process, false where there is no such image.

    The third term's mean is over the I- whose own T- is valid too (with K > 1 all of them are its
    own). An I- or T- without its partner is still false for all others. With logit_bias it is the
    sigmoid loss of [I; I-] and [T; T-], each pair once, divided by the number of true pairs.
    """
    logits, labels = _with_negative_images(
        image_features, text_features, negative_features, mask, negative_image_features, image_mask,
        logit_scale, offset)
    if logit_bias is not None:
        return _sigmoid_share(logits + logit_bias, labels, _global_sum(labels.sum()))
    b, B = len(image_features), len(text_features)
    rows, in_column = _positives(labels)
    images_to_texts = _rows_share(logits[:b], labels[:b], B)
    texts_to_images = _columns_share(logits[:, :B], labels[:, :B], in_column[:B])
    negatives_to_texts = _rows_share(logits[b:], labels[b:], rows - B)
    return (images_to_texts + texts_to_images + negatives_to_texts) / 3


def triplet_clip_loss(image_features, text_features, negative_features, mask,
                      negative_image_features, image_mask, logit_scale, logit_bias=None, offset=0):
    """TripletCLIP: negclip_loss twice, with the parts of (I, T) and (I-, T-) exchanged.

    Patel et al. 2024, TripletCLIP: improving compositional reasoning of CLIP:
        Neg(I, T, T-) + Neg(I-, T-, T),  Neg(I, T, T-) = 1/2 [CE(s I [T; T-]^T) + CE(s T I^T)]
    Arguments, result and who is in a mean are as in con_clip_loss. With logit_bias it is the
    sigmoid loss of I and [T; T-], divided by B, and that of I- and [T; T-], divided by the number
    of their true pairs.
    """
    logits, labels = _with_negative_images(
        image_features, text_features, negative_features, mask, negative_image_features, image_mask,
        logit_scale, offset)
    b = len(image_features)
    swapped_pairs = _global_sum(labels[b:].sum())
    straight = _contrast_share(logits[:b], labels[:b], logit_bias, len(text_features))
    swapped = _contrast_share(logits[b:], labels[b:], logit_bias, swapped_pairs)
    return straight + swapped


def _with_negative_images(image_features, text_features, negative_features, mask,
                          negative_image_features, image_mask, logit_scale, offset):
    """[I; I-] against [T; T-], valid ones only: logits and true pairs, both (b + v, B + V)."""
    b, B = len(image_features), len(text_features)
    images = torch.cat([image_features, _valid(negative_image_features, image_mask)])  # (b + v, D)
    texts = torch.cat([text_features, _valid(negative_features, mask)])  # (B + V, D)
    logits = _logits(images, texts, logit_scale)
    row_of_image = image_mask.nonzero() + offset  # (v, 1)
    row_of_text = mask.nonzero()[:, 0]  # (V,)
    own_texts = _diagonal(logits[:b, :B], offset)
    own_negatives = (row_of_image == row_of_text).to(logits.device, non_blocking=True)  # (v, V)
    return logits, torch.block_diag(own_texts, own_negatives)


# ---- the methods: a function each, a row of METHODS each --------------------------------------
@dataclass
class Features:
    """What the loss of a method may read. What the method does not want is None.

    b rows are this process's own. B rows and N concepts are those of all processes, in rank order
    and with gradient. All features are normalised.
    """
    image_features: torch.Tensor                                # (b, D)
    text_features: torch.Tensor                                 # (B, D)
    logit_scale: torch.Tensor                                   # the multiplier itself
    logit_bias: torch.Tensor | None = None                      # None: every loss in softmax form
    offset: int = 0                                             # column of this process's first row
    concept_features: torch.Tensor | None = None                # (N, D), see concept_columns
    concept_labels: torch.Tensor | None = None                  # (b, N) bool
    concept_similarity: torch.Tensor | None = None              # (b, N), see pooling.py
    concept_count: int | None = None                            # count of npc_loss, None: N
    negative_features: torch.Tensor | None = None               # (B, K, D), of negative captions
    negative_mask: torch.Tensor | None = None                   # (B, K) bool, false where none is
    negative_image_features: torch.Tensor | None = None         # (b, D)
    negative_image_mask: torch.Tensor | None = None             # (b,) bool
    # From the teacher (averaged weights, or the initial ones where none are averaged), without
    # gradient: image_features (b, D) of this process, text_features (B, D) and, where there are
    # negatives, negative_features (B, K, D) of all processes.
    teacher: dict | None = None
    thresholds: torch.Tensor | None = None                      # (K,) of ce_clip's last step
    caption_labels: torch.Tensor | None = None                  # (b, B) bool, see Method
    replayed: bool = False                                      # a batch of replay, see Method
    caption_similarity: torch.Tensor | None = None              # (b, B + S), see caption_xac_loss
    sentence_features: torch.Tensor | None = None               # (S, D)
    sentence_labels: torch.Tensor | None = None                 # (b, S) bool
    paraphrase_features: torch.Tensor | None = None             # (b, D), of second captions
    paraphrase_mask: torch.Tensor | None = None                 # (b,) bool
    word_similarity: torch.Tensor | None = None                 # (b, 1 + K, L), see fsc_clip_loss
    word_mask: torch.Tensor | None = None                       # (b, 1 + K, L) bool
    unit_features: torch.Tensor | None = None                   # (B, K, D), see cs_clip_loss
    foil_features: torch.Tensor | None = None                   # (b, K, D)
    unit_mask: torch.Tensor | None = None                       # (B, K) bool, false where none is


# Each takes Features f and returns {term: this process's share}.
def plain(f):
    """Images and captions alone: SigLIP's loss where the model has a bias, else CLIP's."""
    if f.logit_bias is None:
        contrastive = clip_loss(f.image_features, f.text_features, f.logit_scale, f.offset)
    else:
        contrastive = siglip_loss(f.image_features, f.text_features, f.logit_scale, f.logit_bias,
                                  f.offset)
    return {"contrastive": contrastive}


def c2lip(f):
    """C2LIP: images and captions, images and concepts, attention-pooled images and concepts."""
    terms = plain(f)
    if f.concept_features is not None:
        terms["npc"] = _npc_share(f)
    if f.concept_similarity is not None:
        terms["xac"] = _xac_share(f)
    return terms


def tecoa(f):
    """TeCoA: images that an attack has changed, against captions."""
    contrastive = tecoa_loss(f.image_features, f.text_features, _caption_labels(f), f.logit_scale,
                             f.logit_bias)
    return {"contrastive": contrastive}


def gift(f):
    """GIFT: new pairs are contrasted, replayed pairs distilled from the model before."""
    labels = _caption_labels(f)
    if f.replayed:
        return gift_loss(f.image_features, f.text_features, f.teacher, labels, f.logit_scale,
                         f.logit_bias)
    logits = _logits(f.image_features, f.text_features, f.logit_scale)
    return {"contrastive": _contrast_share(logits, labels, f.logit_bias, len(f.text_features))}


def negclip(f):
    """NegCLIP: swapped captions as negatives, similar images with theirs as more rows."""
    contrastive = negclip_loss(f.image_features, f.text_features, f.negative_features,
                               f.negative_mask, f.logit_scale, f.logit_bias, f.offset)
    return {"contrastive": contrastive}


def ce_clip(f):
    """CE-CLIP: negatives of four kinds, and a threshold for each, which is returned as well."""
    return ce_clip_loss(f.image_features, f.text_features, f.negative_features, f.negative_mask,
                        f.thresholds, f.logit_scale, f.logit_bias, f.offset)


def degla(f):
    """DeGLA: negatives of four kinds, and a teacher of averaged weights."""
    return degla_loss(f.image_features, f.text_features, f.negative_features, f.negative_mask,
                      f.teacher, f.logit_scale, f.logit_bias, f.offset)


def clic(f):
    """CLIC: every other batch is of images joined in pairs, the others as for clip or siglip."""
    if f.negative_features is None:
        return plain(f)
    return clic_loss(f.image_features, f.text_features, f.negative_features, f.negative_mask,
                     f.logit_scale, f.logit_bias, f.offset)


def fsc_clip(f):
    """FSC-CLIP: a focal loss over a caption and its negatives, and one over their words."""
    terms = fsc_clip_loss(f.image_features, f.text_features, f.negative_features, f.negative_mask,
                          f.word_similarity, f.word_mask, f.logit_scale, f.logit_bias, f.offset)
    return {**plain(f), **terms}


def cs_clip(f):
    """CS-CLIP: swapped captions as negatives, and parts of captions, each with a foil."""
    terms = negclip(f)
    if f.unit_features is not None:
        terms["units"] = cs_clip_loss(f.image_features, f.unit_features, f.foil_features,
                                      f.unit_mask, f.logit_scale, f.logit_bias, f.offset)
    return terms


def con_clip(f):
    """CoN-CLIP: negated captions, and images that they are true of."""
    contrastive = con_clip_loss(f.image_features, f.text_features, f.negative_features,
                                f.negative_mask, f.negative_image_features, f.negative_image_mask,
                                f.logit_scale, f.logit_bias, f.offset)
    return {"contrastive": contrastive}


def triplet_clip(f):
    """TripletCLIP: swapped captions, and images that they are true of."""
    contrastive = triplet_clip_loss(f.image_features, f.text_features, f.negative_features,
                                    f.negative_mask, f.negative_image_features,
                                    f.negative_image_mask, f.logit_scale, f.logit_bias, f.offset)
    return {"contrastive": contrastive}


def _npc_share(f):
    return npc_loss(f.image_features, f.concept_features, f.concept_labels, f.logit_scale,
                    f.logit_bias, f.concept_count)


def _xac_share(f):
    return xac_loss(f.concept_similarity, f.concept_labels, f.logit_scale, f.logit_bias,
                    f.concept_count)


def _caption_labels(f):
    """Which captions are an image's own (b, B): its row's, and equal ones where they are known."""
    if f.caption_labels is not None:
        return f.caption_labels
    return _diagonal(f.image_features.new_empty(len(f.image_features), len(f.text_features)),
                     f.offset)


@dataclass(frozen=True)
class Method:
    """A row of METHODS: a loss, and what train.py must prepare for it.

    A method wants concepts where its weights name npc or xac.
    """
    # One of the functions above. ce_clip also returns "thresholds".
    loss: Callable
    # {term: default weight}. The weight of contrastive is 1.
    weights: dict = field(default_factory=dict)
    # How captions get negatives: "swap" two words, one of each of four kinds ("typed"), "negate",
    # or one of each of FSC-CLIP's three sorts ("mixed"). With "pairs" every other batch is of
    # images joined in pairs, whose "negatives" are three more true captions and, last, a false one.
    negatives: str | None = None
    # The outputs of all tokens of captions and negatives.
    words: bool = False
    # So many parts of each caption, each with a false version of it.
    units: int = 0
    # Rows bring an image that their negative caption is true of.
    negative_images: bool = False
    # Each step has a second batch, of pairs that show what the model knew before it was trained.
    replay: bool = False
    # A caption is true of all rows whose caption is equal, as names of classes are.
    same_captions: bool = False
    # Rows bring a row with a similar image.
    neighbours: bool = False
    # A teacher encodes the batch as well: averaged weights, or the initial ones.
    teacher: bool = False
    # Defaults of other flags of train.py.
    defaults: dict = field(default_factory=dict)


# All methods, with the published weights of their terms.
METHODS = {
    "c2lip": Method(c2lip, {"npc": 1.0, "xac": 0.01}),
    "siglip": Method(plain, defaults={"loss": "siglip"}),
    "clip": Method(plain, defaults={"loss": "clip"}),
    "tecoa": Method(tecoa, same_captions=True, defaults={"freeze": "text", "attack_steps": 2}),
    "gift": Method(gift, {"cd": 1.0, "ita": 0.25, "awc": 1.0}, replay=True, same_captions=True,
                   teacher=True),
    "negclip": Method(negclip, negatives="swap", neighbours=True),
    "ce_clip": Method(ce_clip, {"cmr": 0.2, "imc": 0.3}, negatives="typed"),
    "degla": Method(degla, {"tgc": 0.1, "igc": 0.1, "distill": 0.005}, negatives="typed",
                    teacher=True, defaults={"ema": 0.9996}),
    "clic": Method(clic, {"pairs": 0.5, "sneg": 0.5, "uni": 1.0}, negatives="pairs",
                   defaults={"freeze": "visual"}),
    "fsc_clip": Method(fsc_clip, {"ghn": 0.5, "lhn": 0.2}, negatives="mixed", words=True),
    "cs_clip": Method(cs_clip, {"units": 0.5}, negatives="swap", units=2),
    "con_clip": Method(con_clip, negatives="negate", negative_images=True,
                       defaults={"freeze": "visual"}),
    "triplet_clip": Method(triplet_clip, negatives="swap", negative_images=True),
}

# What each term of a loss does, besides contrastive.
TERMS = {
    "npc": "Noun-phrase contrast: every image against every noun phrase of the batch (C2LIP).",
    "xac": "Cross-attention contrast: the same, with the image pooled by the phrase (C2LIP).",
    "caption_xac": "Cross-attention contrast with whole captions as phrases (FLAIR).",
    "paraphrase": "A second caption of the image finds the first among all (READ, there 0.5).",
    "cmr": "Cross-modal ranking: an image prefers its caption to negatives by a margin (CE-CLIP).",
    "imc": "Intra-modal contrast: a caption is far from all negative captions (CE-CLIP).",
    "tgc": "Text-grounded contrast: a caption is nearer to its teacher than to negatives (DeGLA).",
    "igc": "Image-grounded contrast: an image prefers its caption to that one's negatives (DeGLA).",
    "cd": "Contrastive distillation: replayed pairs score as in the model before (GIFT).",
    "ita": "Image-text alignment: replayed images and their captions find each other (GIFT).",
    "awc": "Adaptive weight consolidation: weights that replayed pairs need stay as before (GIFT).",
    "pairs": "Two images joined as one, against captions of both (CLIC).",
    "sneg": "Joined images prefer each caption to one in which the two exchange a word (CLIC).",
    "uni": "Squared distance of a caption of joined images from its sentences exchanged (CLIC).",
    "ghn": "Focal loss of an image over its caption and that one's negatives (FSC-CLIP).",
    "lhn": "The same, with an image as each word of a text sees it (FSC-CLIP).",
    "units": "An image finds a part of its caption among all, and not its false version (CS-CLIP).",
    "distill": "Squared distance of all features from those of the teacher (DeGLA).",
}

# The terms that any method may take besides its own.
EXTRA_TERMS = ("npc", "xac", "caption_xac", "paraphrase", "distill")


def extra_terms(f, weights):
    """Those of EXTRA_TERMS that have a weight.

    weights is {term: weight} of the terms that the method does not give itself. Returns {term: this
    process's share} of those terms that have a weight other than 0 and whose inputs are there.
    """
    terms = {}
    if weights.get("npc") and f.concept_features is not None:
        terms["npc"] = _npc_share(f)
    if weights.get("xac") and f.concept_similarity is not None:
        terms["xac"] = _xac_share(f)
    if weights.get("caption_xac") and f.caption_similarity is not None:
        terms["caption_xac"] = caption_xac_loss(
            f.caption_similarity, f.logit_scale, f.logit_bias, f.offset, f.sentence_labels)
    if weights.get("paraphrase") and f.paraphrase_features is not None:
        terms["paraphrase"] = paraphrase_loss(
            f.paraphrase_features, f.text_features, f.paraphrase_mask, f.logit_scale,
            f.logit_bias, f.offset)
    if weights.get("distill") and f.teacher is not None:
        own = slice(f.offset, f.offset + len(f.image_features))
        negatives, valid = None, None
        if f.negative_features is not None:
            negatives = f.negative_features[own]
            valid = f.negative_mask[own].to(negatives.device, non_blocking=True)
        terms["distill"] = _distill_share(f.image_features, f.text_features[own], negatives, valid,
                                          f.teacher, own)
    return terms


# ---- what the processes agree on about a batch ------------------------------------------------
@dataclass
class Plan:
    """What the processes have agreed on about a batch before the towers see it.

    What share_concepts, concept_columns, first_row and row_counts do in a step, each with
    collectives of its own, plan_batch does at once, in two, and on the CPU. So a GPU is never
    waited for, and may still be computing the step before:

        plan = plan_batch(len(images), concept_ids, pairs, concept_tokens).to(device)
        ...                                 # encode images, captions and plan.tokens
        texts, columns = gather_together(
            [text_features, concept_features.index_select(0, plan.given)],
            [plan.rows, plan.given_counts])
        loss = npc_loss(image_features, columns, plan.labels, logit_scale, logit_bias)
    """
    rows: list                                      # the number of images of each process
    tokens: torch.Tensor | None = None              # (U', L'), concepts for this process to encode
    given: torch.Tensor | None = None               # (n,), rows of its concept features to gather
    given_counts: list | None = None                # n of each process
    labels: torch.Tensor | None = None              # (b, N) bool, this process's images and columns
    pairs: int = 0                                  # (image, phrase) pairs of all processes
    negative_mask: torch.Tensor | None = None       # (B, K) bool, of all processes, on the CPU
    unit_mask: torch.Tensor | None = None           # (B, K') bool, the same

    @property
    def offset(self):
        """The index of this process's first image among all."""
        return sum(self.rows[:_rank()])

    def to(self, device):
        """Send the tensors but the masks to a device, without waiting for it."""
        def send(x):
            if x is None:
                return None
            if torch.device(device).type == "cuda":
                x = x.pin_memory()  # else the copy would wait for the GPU's queue
            return x.to(device, non_blocking=True)

        return replace(self, tokens=send(self.tokens), given=send(self.given),
                       labels=send(self.labels))


def plan_batch(batch_size, concept_ids=None, pairs=None, concept_tokens=None, dedupe=True,
               merge=True, negative_mask=None, pad_id=0, multiple=1, unit_mask=None):
    """Exchange all that is known of a batch before the towers run. All tensors are on the CPU.

    Parameters
    ----------
    batch_size : int
        b, the number of this process's images.
    concept_ids, pairs : Tensor (U,), (P, 2) int64, optional
        As in concept_columns. None for a loss without concepts.
    concept_tokens : Tensor (U', L) int64, optional
        Where they are given, the processes divide the different concepts as in share_concepts,
        which needs dedupe and merge. Where not, each process encodes its own. They may be only the
        first U' of the U concepts: the others are no columns, but where one is a column of another
        process or row, their pairs are positive there.
    dedupe, merge : bool
        As in concept_columns.
    negative_mask : Tensor (b, K) bool, optional
        This process's, to be gathered.
    pad_id : int
        The token that fills shorter concepts up.
    multiple : int
        Fill the number of shared concepts up to a multiple of it, for torch.compile.
    unit_mask : Tensor (b, K') bool, optional
        This process's, to be gathered.

    Returns
    -------
    Plan
        In its pairs, a phrase counts once for each image that holds it.
    """
    if concept_tokens is not None and not (dedupe and merge):
        raise ValueError("concept_tokens are given, but only equal concepts of one feature can be "
                         "shared: give dedupe=True and merge=True, or no concept_tokens")
    encoded_ids = concept_ids
    if concept_tokens is not None:
        encoded_ids = concept_ids[:len(concept_tokens)]

    sizes_of_all, ids_of_all, tokens_of_all, negative_masks, unit_masks = _show_all(
        _sizes(batch_size, concept_ids, pairs), encoded_ids, concept_tokens, negative_mask,
        unit_mask)
    rows, pair_counts, different_counts = torch.stack(sizes_of_all).T.tolist()

    plan = Plan(rows)
    if negative_mask is not None:
        plan.negative_mask = torch.cat(negative_masks).bool()
    if unit_mask is not None:
        plan.unit_mask = torch.cat(unit_masks).bool()
    if concept_ids is None:
        return plan

    if concept_tokens is not None:
        tokens_of_all, ids_of_all = _divide(tokens_of_all, ids_of_all, pad_id)
        plan.tokens = _fill_up(tokens_of_all[_rank()], multiple, pad_id)
    plan.given, plan.given_counts, plan.labels = _plan_columns(
        concept_ids, pairs, batch_size, pair_counts, ids_of_all, dedupe, merge)
    plan.pairs = sum(different_counts if dedupe else pair_counts)
    return plan


def _show_all(*tensors):
    """_exchange of tensors, or None: for each the list of all processes' own."""
    given = [torch.zeros(0, 0) if x is None else x for x in tensors]
    return zip(*_exchange(*given))


def _sizes(batch_size, concept_ids, pairs):
    """The numbers of images, of real pairs, and of different pairs: (3,)."""
    if concept_ids is None:
        return torch.tensor([batch_size, 0, 0])
    image, concept = _real_pairs(pairs, concept_ids)
    different = torch.stack([image, concept_ids[concept]]).unique(dim=1)  # (2, P')
    return torch.tensor([batch_size, len(image), different.shape[1]])


def _fill_up(tokens, multiple, pad_id):
    """Add rows of padding up to a multiple, and at least to that: (U, L) -> (U', L)."""
    missing = -len(tokens) % multiple
    if len(tokens) == 0 and multiple > 1:
        missing = multiple
    return F.pad(tokens, (0, 0, 0, missing), value=pad_id)


def share_concepts(concept_tokens, concept_ids, pad_id=0):
    """Divide the different concepts of all processes, so that each is encoded once and once only.

    Parameters
    ----------
    concept_tokens : Tensor (U, L) int64
        The concepts of this process. L may differ between processes.
    concept_ids : Tensor (U,) int64
        As in concept_columns.
    pad_id : int
        The token that fills shorter concepts up.

    Returns
    -------
    tokens : Tensor (U', L') int64
        This process's equal share, to be encoded.
    ids : Tensor (U',) int64
        Its ids. concept_columns takes what was encoded as concept_features, and these as
        feature_ids.
    """
    tokens_of_all, ids_of_all = zip(*_exchange(concept_tokens, concept_ids))
    tokens, ids = _divide(tokens_of_all, ids_of_all, pad_id)
    device = concept_tokens.device
    return tokens[_rank()].to(device), ids[_rank()].to(device)


def _divide(tokens_of_all, ids_of_all, pad_id):
    """Divide the different concepts equally, in the order in which they occur.

    Takes lists over processes of tokens (U, L) and ids (U,). Returns such lists of the shares,
    tokens (U', L') and ids (U',), where L' is the longest L.
    """
    chosen = _chosen(ids_of_all, first_only=True)
    length = max(tokens.shape[1] for tokens in tokens_of_all)
    padded = [F.pad(x, (0, length - x.shape[1]), value=pad_id) for x in tokens_of_all]
    tokens = torch.cat([x[index] for x, index in zip(padded, chosen)])  # (S, L')
    ids = torch.cat([x[index] for x, index in zip(ids_of_all, chosen)])  # (S,)
    processes = len(ids_of_all)
    return tokens.tensor_split(processes), ids.tensor_split(processes)


# ---- concepts as columns ----------------------------------------------------------------------
# All that depends on ids is computed on the CPU, where the ids come from: on a GPU each of these
# operations would have to wait for it.
def _plan_columns(concept_ids, pairs, batch_size, pair_counts, ids_of_all, dedupe, merge):
    """Find the columns that concept_columns describes, and this process's labels.

    concept_ids (U,) and pairs (P, 2) are this process's. Lists over processes: pair_counts, the
    number of real pairs, and ids_of_all, the ids of the features. Returns the rows of its
    features that this process gives (n,), the number n of each process, and labels (b, N).
    """
    image, concept = _real_pairs(pairs, concept_ids)
    if not dedupe:
        return concept, pair_counts, _pair_labels(image, pair_counts, batch_size)
    chosen = _chosen(ids_of_all, first_only=merge)
    column_ids = torch.cat([ids[index] for ids, index in zip(ids_of_all, chosen)])  # (N,)
    labels = _id_labels(concept_ids[concept], image, column_ids, batch_size)
    return chosen[_rank()], [len(index) for index in chosen], labels


def _real_pairs(pairs, concept_ids):
    """Drop the padding: (P', 2) -> images (P,), rows of concepts (P,)."""
    pairs = pairs[(pairs >= 0).all(1)]
    pairs = pairs[concept_ids[pairs[:, 1]] >= 0]
    return pairs[:, 0], pairs[:, 1]


def _chosen(ids_of_all, first_only):
    """Choose which ids become columns: not padding, and only first occurrences if so wanted.

    ids_of_all: a list over processes of ids (U,). Returns a list over processes of indices (n,).
    """
    ids = torch.cat(ids_of_all)
    is_chosen = ids >= 0
    if first_only:
        is_chosen = is_chosen & _first_occurrences(ids)
    by_process = is_chosen.split([len(x) for x in ids_of_all])
    return [x.nonzero().squeeze(1) for x in by_process]


def _first_occurrences(ids):
    """Mark each id where it occurs for the first time: (M,) -> (M,) bool."""
    unique_ids, inverse = ids.unique(return_inverse=True)  # (S,), (M,)
    places = torch.arange(len(ids))
    first = torch.full_like(unique_ids, len(ids))
    first.scatter_reduce_(0, inverse, places, "amin")  # (S,)
    return first[inverse] == places


def _id_labels(held_ids, image, column_ids, batch_size):
    """Tell whether image m holds the string of column n: (b, N) bool.

    column_ids (N,) are the strings of the columns; held_ids (P,) are strings that images hold,
    also such as are no column, and image (P,) the images that hold them.
    """
    # The S different strings get the numbers 0 to S - 1, the same in columns and in images.
    strings, numbers = torch.cat([column_ids, held_ids]).unique(return_inverse=True)
    column_numbers, held_numbers = numbers.split([len(column_ids), len(held_ids)])
    holds = torch.zeros(batch_size, len(strings), dtype=torch.bool)  # (b, S)
    holds[image, held_numbers] = True
    return holds[:, column_numbers]


def _pair_labels(image, counts, batch_size):
    """Give each pair a column of its own: image (P,), pairs of each process -> (b, N) bool."""
    labels = torch.zeros(batch_size, sum(counts), dtype=torch.bool)
    start = sum(counts[:_rank()])
    labels[image, start + torch.arange(len(image))] = True
    return labels


# ---- between processes ------------------------------------------------------------------------
def gather_features(x, counts=None):
    """Gather the rows of all processes in rank order, with their gradient.

    The backward is a collective on every process, also where x itself needs no gradient. It sums
    the gradients that all processes have for these rows.

    Parameters
    ----------
    x : Tensor (n, ...)
        This process's rows. Processes may hold different numbers of rows, also none.
    counts : list of int, optional
        row_counts(n), where it is known already.

    Returns
    -------
    Tensor (sum of n, ...)
    """
    if not _distributed():
        return x
    if counts is None:
        counts = row_counts(len(x))
    if x.is_floating_point() and torch.is_grad_enabled() and not x.requires_grad:
        # Without this, a process with a frozen tower would miss the backward's collective, and the
        # others would wait for it forever.
        x = x.detach().requires_grad_()
    return _Gather.apply(x, counts)


def gather_together(tensors, counts):
    """gather_features of several tensors, in one collective each way.

    Parameters
    ----------
    tensors : list of Tensor (n, ...)
        Features of this process, of one dtype. n and what follows may differ.
    counts : list of lists of int
        For each tensor, the number of its rows on each process, as row_counts gives it.

    Returns
    -------
    list of Tensor (sum of n, ...)
    """
    if not _distributed():
        return list(tensors)
    widths = [x.shape[1:].numel() for x in tensors]  # numbers in a row
    sizes = []  # numbers of each tensor of process 0, then of each of process 1, and so on
    numbers_of_process = []
    for rows in zip(*counts):
        own_sizes = [n * width for n, width in zip(rows, widths)]
        sizes += own_sizes
        numbers_of_process.append(sum(own_sizes))
    flat = torch.cat([x.flatten() for x in tensors])
    pieces = gather_features(flat, numbers_of_process).split(sizes)
    gathered = []
    for i, x in enumerate(tensors):
        of_all = torch.cat(pieces[i::len(tensors)])  # tensor i of each process
        gathered.append(of_all.view(-1, *x.shape[1:]))
    return gathered


class _Gather(torch.autograd.Function):
    """gather_features where there are several processes; counts: the rows of each."""
    @staticmethod
    def forward(ctx, x, counts):
        ctx.counts, ctx.dtype = counts, x.dtype
        padded = x.new_zeros(max(counts), *x.shape[1:])  # collectives want one shape everywhere
        padded[:len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        if padded.numel():
            dist.all_gather(parts, padded)
        rows = [part[:n] for part, n in zip(parts, counts)]
        return torch.cat(rows)  # (sum of counts, ...)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # Every process used every row, so its gradient is the sum over processes. A sum of
        # bfloat16 numbers would lose bits, hence float32 at least. all_reduce works in place,
        # hence a copy.
        dtype = torch.promote_types(grad.dtype, torch.float32)
        grad = grad.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if grad.numel():
            dist.all_reduce(grad)
        own = grad.split(ctx.counts)[dist.get_rank()]
        return own.to(ctx.dtype), None


def _global_sum(x):
    """Sum over processes, the same number on each, without a gradient."""
    x = x.detach().clone(memory_format=torch.contiguous_format)     # all_reduce works in place
    if _distributed():
        dist.all_reduce(x)
    return x


def row_counts(rows, device=None):
    """Return the number of rows on each process, a list of ints. Waits for the other processes."""
    if not _distributed():
        return [rows]
    return _all_gather(torch.tensor([rows]), device).flatten().tolist()


def first_row(rows, device=None):
    """Return the index of this process's first row among the rows of all processes."""
    return sum(row_counts(rows, device)[:_rank()])


def _exchange(*tensors):
    """Show every process's own tensors of integers to all processes.

    Every process gives as many tensors, with as many dimensions, of whatever sizes. Returns a list
    over processes of lists of these tensors, on the CPU. Takes two collectives: how many numbers
    and which shapes each process has, then all its numbers in one row.
    """
    tensors = [x.to("cpu", torch.int64) for x in tensors]
    if not _distributed():
        return [tensors]
    own = torch.cat([x.flatten() for x in tensors])
    own_shapes = torch.cat([torch.tensor(x.shape) for x in tensors])
    shapes = _all_gather(F.pad(own_shapes, (1, 0), value=len(own)))
    lengths, shapes = shapes[:, 0], shapes[:, 1:]  # (W,), (W, dimensions of all tensors)
    rows = _all_gather(F.pad(own, (0, int(lengths.max()) - len(own))))  # (W, longest)
    dimensions = [x.ndim for x in tensors]
    return [_cut(row, shape.split(dimensions)) for row, shape in zip(rows, shapes)]


def _cut(row, shapes):
    """Cut a row of numbers into tensors of these shapes; what follows them is padding."""
    tensors = []
    start = 0
    for shape in shapes:
        end = start + int(shape.prod())
        tensors.append(row[start:end].view(shape.tolist()))
        start = end
    return tensors


def _all_gather(x, device=None):
    """Gather the same number of integers from each process: (n,) -> (W, n), on the CPU.

    They travel between CPUs wherever the processes have a backend for that, as in
    init_process_group("cpu:gloo,cuda:nccl"), because a GPU would have to be waited for.
    """
    if device is None:
        device = "cpu" if "cpu" in dist.get_backend_config() else "cuda"
    rows = torch.empty(dist.get_world_size(), len(x), dtype=x.dtype, device=device)
    dist.all_gather(list(rows), x.to(device))
    return rows.cpu()


def _distributed():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _rank():
    return dist.get_rank() if _distributed() else 0
