"""Cross-modal attention pooling without parameters: an image as a concept sees it (C2LIP).

A concept p of unit length attends over an image's value tokens V at temperature 1 and pools them:
    s = V p,   a = softmax_t(s),   c = sum_t a_t V_t,   similarity = c.p / |c|
The similarity is the cosine of c and p. concept_pool returns c. concept_similarity returns the
similarity, fast and in little memory, for training.
"""
from contextlib import contextmanager

import torch

EPS = 1e-12  # the smallest |c| that is divided by, as in torch.nn.functional.normalize


def concept_pool(patch_tokens, concepts, mask=None):
    """Pool the tokens of each image by each concept, for inference and for tests.

    Parameters
    ----------
    patch_tokens : Tensor (B, T, D)
    concepts : Tensor (N, D)
    mask : Tensor (B, T) bool, optional
        True for the tokens that count. An image without any pools to zero.

    Returns
    -------
    Tensor (B, N, D)
        The pooled vectors, not normalised.
    """
    attention = (patch_tokens @ concepts.T).transpose(1, 2)  # (B, N, T)
    if mask is None:
        return attention.softmax(dim=-1) @ patch_tokens  # (B, N, D)
    mask = mask[:, None]  # (B, 1, T)
    attention = attention.masked_fill(~mask, torch.finfo(attention.dtype).min).softmax(dim=-1)
    return attention.masked_fill(~mask, 0) @ patch_tokens.masked_fill(~mask.transpose(1, 2), 0)


def concept_similarity(patch_tokens, concepts, mask=None, memory_budget=None):
    """normalize(concept_pool(patch_tokens, concepts)) . concepts, without the pooled vectors.

    It is exact, in memory that grows with N only by the result. With G = V V^T (T, T),
        c.p = sum_t a_t s_t   and   |c|^2 = a^T G a,
    so no pooled vector is made. Images go in chunks, and the backward repeats what the memory
    budget cannot keep. It can be differentiated once.

    With bfloat16 inputs, or under autocast, the products with V and P are in that dtype, but G, the
    softmax and the sums of the forward are float32; the gradient of V is summed over chunks of
    concepts in that dtype. Float32 is true float32, also where TF32 is allowed.

    Parameters
    ----------
    patch_tokens : Tensor (B, T, D)
        Of any float dtype. C2LIP normalises them.
    concepts : Tensor (N, D)
        Of any float dtype. C2LIP normalises them.
    mask : Tensor (B, T) bool, optional
        True for the tokens that count.
    memory_budget : int, optional
        Bytes beyond inputs, result and gradients, by default 20 MiB on a CPU and 512 MiB elsewhere.
        It changes speed only. One image and one concept are always taken.

    Returns
    -------
    Tensor (B, N)
        In float32, or float64 for float64. An image has similarity 0 where no token counts, or
        where all its tokens are zero.
    """
    device = patch_tokens.device.type
    if memory_budget is None:
        memory_budget = (20 if device == "cpu" else 512) * 2**20
    dtype = torch.promote_types(patch_tokens.dtype, concepts.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    v, q = patch_tokens.to(dtype), concepts.to(dtype)
    # whether there will be a backward to keep something for
    keep = torch.is_grad_enabled() and (v.requires_grad or q.requires_grad)
    half = memory_budget // 2  # one for what is kept, the other for the chunk at work
    return _Similarity.apply(v, q, mask, half, keep)


def token_similarity(patch_tokens, text_tokens):
    """Pool each image by each token of its own texts, as the local loss of FSC-CLIP does.

    Oh et al. 2024, Preserving multi-modal capabilities of pre-trained VLMs for improving
    vision-linguistic compositionality. A token y of unit length weighs the patches by how much
    nearer to it they are than the farthest one:
        s = V y,   w = s - min_t(s),   c = sum_t w_t V_t,   similarity = c.y / |c|
    No gradient passes through w. The released code divides w by its largest value and by its sum
    as well, which cancels here; where all patches are equally near it gives nan, and this 0.

    Parameters
    ----------
    patch_tokens : Tensor (B, T, D)
        Of any float dtype. Our towers normalise them, the released code does not.
    text_tokens : Tensor (B, Q, D)
        All tokens of all texts of each image, normalised, of any float dtype (float64 beside
        float64 only).

    Returns
    -------
    Tensor (B, Q)
        In float32, or float64 for float64. Memory grows as B Q T, since no c is made: with
        G = V V^T, c.y = w.s and |c|^2 = w^T G w. It can be differentiated once.
    """
    return _TokenSimilarity.apply(_wide(patch_tokens), _wide(text_tokens))


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


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _chunks(v, q, mask, half):
    """Yield slices of images, their tokens and mask (b, T, 1), and all slices of concepts.

    half: the bytes that the arrays of one chunk may take.
    """
    T = v.shape[1]
    number_of_bytes = 8 if v.dtype == torch.float64 else 4
    rows = half // max(T * number_of_bytes, 1)  # of T numbers, that there is room for
    # an image takes up to six (T, n) arrays and two (T, T)
    n = max(1, min(len(q), (rows - 2 * T) // 6))
    b = max(1, rows // (6 * n + 2 * T))
    concept_slices = [slice(start, start + n) for start in range(0, len(q), n)]
    for start in range(0, len(v), b):
        i = slice(start, start + b)
        v_i, mask_i = v[i], None
        if mask is not None:  # tokens that do not count are zero, whatever was there
            mask_i = mask[i, :, None]
            v_i = v_i.masked_fill(~mask_i, 0)
        yield i, v_i, mask_i, concept_slices


def _scores(v, q, mask):
    """(b, T, D), (n, D) -> S = V Q^T (b, T, n)."""
    s = _wide(v.flatten(0, 1) @ q.T).view(*v.shape[:2], len(q))
    return s if mask is None else s.masked_fill_(~mask, torch.finfo(s.dtype).min)


def _attend(s, gram, mask):
    """S (b, T, n), G (b, T, T) -> attention a and u = G a (b, T, n); c.p and |c|^2 (b, 1, n)."""
    a = s.softmax(dim=1)
    if mask is not None:
        a.masked_fill_(~mask, 0)  # differs only where no token counts
    u = gram @ a
    return a, u, (a * s).sum(1, keepdim=True), (a * u).sum(1, keepdim=True)


def _outputs(v, q, mask, half, keep):
    """Make room for the similarity, and for the S and G that are kept for the backward.

    These are of the first images, of as many as `half` holds, in bytes.
    """
    B, T, _ = v.shape
    N = q.shape[0]
    dtype = torch.promote_types(v.dtype, torch.float32)
    number_of_bytes = 8 if dtype == torch.float64 else 4
    kept = 0
    if keep:
        size = number_of_bytes * T * (T + N)
        kept = torch.sym_min(B, half // torch.sym_max(size, 1))
    similarity = v.new_empty((B, N), dtype=dtype)
    kept_s = v.new_empty((kept, T, N), dtype=dtype)
    kept_gram = v.new_empty((kept, T, T), dtype=dtype)
    return similarity, kept_s, kept_gram


def _forward(v, q, mask, half, keep):
    similarity, kept_s, kept_gram = _outputs(v, q, mask, half, keep)
    with _full_precision(v.device):
        for i, v_i, mask_i, concept_slices in _chunks(v, q, mask, half):
            gram = _wide(v_i) @ _wide(v_i).mT  # (b, T, T)
            kept = len(kept_gram[i])  # b, or less where the room ends, as a slice does
            kept_gram[i] = gram[:kept]
            for n in concept_slices:
                s = _scores(v_i, q[n], mask_i)
                kept_s[i, :, n] = s[:kept]
                _, _, dot, square = _attend(s, gram, mask_i)
                similarity[i, n] = (dot / square.clamp_min(EPS**2).sqrt()).squeeze(1)
    return similarity, kept_s, kept_gram


def _backward(grad, v, q, mask, kept_s, kept_gram, half):
    dv = v.new_zeros(v.shape)  # contiguous, unlike zeros_like
    dq = q.new_zeros(q.shape, dtype=kept_s.dtype)
    with _full_precision(v.device):
        for i, v_i, mask_i, concept_slices in _chunks(v, q, mask, half):
            is_kept = len(kept_gram[i]) == len(v_i)  # in part is as good as not at all
            gram = kept_gram[i] if is_kept else _wide(v_i) @ _wide(v_i).mT
            for n in concept_slices:
                s = kept_s[i, :, n] if is_kept else _scores(v_i, q[n], mask_i)
                a, u, dot, square = _attend(s, gram, mask_i)
                # With g = dL/dsimilarity / |c| and r = c.p / |c|^2: dS = g a (1 + s - r u). The
                # centring term of the softmax is absent, because the scale of a cancels:
                # sum_t a_t (s_t - r u_t) = c.p - r |c|^2 = 0.
                g = grad[i, None, n] / square.clamp_min(EPS**2).sqrt()  # (b, 1, n)
                r = torch.where(square > EPS**2, dot / square, 0)  # a clamped |c| is a constant
                ds = torch.addcmul(s, u, r, value=-1, out=u)  # in place, to stay in the budget
                ds = ds.add_(1).mul_(a).mul_(g).to(v.dtype)  # (b, T, n)
                dq[n] += ds.flatten(0, 1).T @ v_i.flatten(0, 1)
                dv[i].flatten(0, 1).addmm_(ds.flatten(0, 1), q[n])
                through_length = ((a * (g * r)) @ a.mT).to(v.dtype)  # (b, T, T), through |c|
                dv[i].baddbmm_(through_length, v_i, alpha=-1)
    return dv, dq.to(q.dtype)


# As custom operators torch.compile takes them whole: no graph break, and any N. They are for the
# compiler only, because the first call of an operator imports all of it.
_forward_op = torch.library.custom_op(
    "c2lip::concept_similarity", _forward, mutates_args=(),
    schema="(Tensor v, Tensor q, Tensor? mask, SymInt half, bool keep)"
           " -> (Tensor, Tensor, Tensor)")
_backward_op = torch.library.custom_op(
    "c2lip::concept_similarity_backward", _backward, mutates_args=(),
    schema="(Tensor grad, Tensor v, Tensor q, Tensor? mask, Tensor kept_s, Tensor kept_gram,"
           " SymInt half) -> (Tensor, Tensor)")


def _gradients(grad, v, q, *_):
    """Make room for what _backward returns."""
    return v.new_empty(v.shape), q.new_empty(q.shape)


_forward_op.register_fake(_outputs)
_backward_op.register_fake(_gradients)


class _Similarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, q, mask, half, keep):
        forward = _forward_op if torch.compiler.is_compiling() else _forward
        similarity, kept_s, kept_gram = forward(v, q, mask, half, keep)
        ctx.save_for_backward(v, q, mask, kept_s, kept_gram)
        ctx.half = half
        return similarity

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        backward = _backward_op if torch.compiler.is_compiling() else _backward
        return *backward(grad, *ctx.saved_tensors, ctx.half), None, None, None


class _TokenSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, y):
        with _full_precision(v.device):
            s = y @ v.mT  # (B, Q, T)
            w = s - s.amin(dim=-1, keepdim=True)
            dot = (w * s).sum(-1, keepdim=True)  # (B, Q, 1)
            square = (w * (w @ (v @ v.mT))).sum(-1, keepdim=True)
        ctx.save_for_backward(v, y, w, dot, square)
        return (dot / square.clamp_min(EPS**2).sqrt()).squeeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        v, y, w, dot, square = ctx.saved_tensors
        with _full_precision(v.device):
            # dsimilarity / dV_t = w_t (y - r c) / |c| with r = c.y / |c|^2, where c = w V
            g = w * (grad[..., None] / square.clamp_min(EPS**2).sqrt())  # (B, Q, T)
            r = torch.where(square > EPS**2, dot / square, 0)  # a clamped |c| is a constant
            dv = g.mT @ y - ((g * r).mT @ w) @ v  # (B, T, D)
            return dv, g @ v
