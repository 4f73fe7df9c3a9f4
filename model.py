"""CLIP and SigLIP in one file: a timm ViT, a small text transformer, a tokenizer, a preprocessing.

Everything that the weights do not say (activation, pooling, context length, preprocessing, tokenizer) lives in
CLIPConfig and travels in every checkpoint:

    model = CLIP.load("out/nano/last.pt").eval()
    images = torch.stack([model.transform(Image.open(f)) for f in files])           # (B, 3, S, S)
    logits = model.encode_image(images, True) @ model.encode_text(model.tokenize(texts), True).T

CLIP.from_pretrained reads the weights of open_clip, transformers and OpenAI. The two families differ in a handful
of places, all of them marked `siglip` below:
    clip    class token, pre-norm;     causal text, read at the end-of-text token;  heads without bias
    siglip  attention pool, no class;  text sees all positions, read at the last;   text head with bias
"""
import html
import json
import math
import os
import string
import unicodedata
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import methodcaller

import torch
import torch.nn.functional as F
from timm.layers import get_act_layer, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision import transforms

ACTS = ("gelu", "gelu_tanh", "quick_gelu")


@dataclass
class CLIPConfig:
    name: str = "nano"
    family: str = "siglip"              # clip | siglip: decides structure, see the top of this file
    embed_dim: int = 96                 # of the joint space
    image_size: int = 32
    patch_size: int = 8
    vision_width: int = 96
    vision_layers: int = 3
    vision_heads: int = 3
    vision_mlp: int = 384               # hidden units of each MLP
    vision_act: str = "gelu"            # gelu | gelu_tanh | quick_gelu; not in the weights, and it matters
    text_width: int = 96
    text_layers: int = 3
    text_heads: int = 3
    text_mlp: int = 384
    text_act: str = "gelu"
    vocab_size: int = 1024
    context_length: int = 16
    logit_scale: float = math.log(20)   # initial value, a logarithm; exp(logit_scale) multiplies cosines
    logit_bias: float | None = -10.0    # initial value; None: a softmax model without bias
    value_tokens: str = "A"             # patch tokens of class-token ViTs: A | B | D, see CLIP.encode_image
    resize: str = "squash"              # squash: Resize((S, S)); shortest: Resize(S), CenterCrop(S)
    interpolation: str = "bicubic"      # bicubic | bilinear
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)
    text_clean: str = "canonicalize"    # lower (CLIP) | canonicalize (SigLIP): what happens before the tokenizer
    pad_id: int = 0
    tokenizer: str = ""                 # the text of a tokenizer.json

    def __post_init__(self):
        self.mean, self.std = tuple(self.mean), tuple(self.std)     # lists after a trip through json
        for key, allowed in dict(family=("clip", "siglip"), value_tokens=("A", "B", "D"), vision_act=ACTS,
                                 text_act=ACTS, resize=("squash", "shortest"), interpolation=("bicubic", "bilinear"),
                                 text_clean=("lower", "canonicalize")).items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"CLIPConfig.{key} is {getattr(self, key)!r}, expected one of {', '.join(allowed)}")

STRUCTURE = ("family", "embed_dim", "patch_size", "vision_width", "vision_layers", "vision_heads", "vision_mlp",
             "text_width", "text_layers", "text_heads", "text_mlp", "vocab_size", "context_length")
# timm's word: width, layers, heads, hidden units of each MLP
TOWERS = {"small": (512, 12, 8, 2048), "base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096)}
_CLIP = dict(family="clip", vocab_size=49408, context_length=77, logit_scale=math.log(1 / 0.07), logit_bias=None,
             mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), resize="shortest",
             text_clean="lower")
_QUICK = dict(_CLIP, vision_act="quick_gelu", text_act="quick_gelu")
_SIGLIP = dict(vocab_size=32000, context_length=64, pad_id=1, logit_scale=math.log(10))
_SIGLIP2 = dict(_SIGLIP, vocab_size=256000, pad_id=0, text_act="gelu_tanh")


def _named(name, image, text, patch_size, rest, image_size):
    towers = {f"{t}_{k}": n for t, word in (("vision", image), ("text", text))
              for k, n in zip(("width", "layers", "heads", "mlp"), TOWERS[word])}
    return CLIPConfig(name.replace("*", f"-{image_size}" * (image_size != 224)), embed_dim=TOWERS[text][0],
                      image_size=image_size, patch_size=patch_size, **towers, **rest)

S, B, L = TOWERS
MODELS = {c.name: c for c in [CLIPConfig()] + [_named(*row, size) for *row, sizes in (      # open_clip's names
    ("ViT-B-32", B, S, 32, _CLIP, [224]), ("ViT-B-32-quickgelu", B, S, 32, _QUICK, [224]),
    ("ViT-B-16", B, S, 16, _CLIP, [224]), ("ViT-B-16-quickgelu", B, S, 16, _QUICK, [224]),
    ("ViT-L-14*", L, B, 14, _CLIP, [224, 336]), ("ViT-L-14*-quickgelu", L, B, 14, _QUICK, [224, 336]),
    ("ViT-B-16-SigLIP*", B, B, 16, _SIGLIP, [224, 256, 384, 512]), ("ViT-L-16-SigLIP*", L, L, 16, _SIGLIP, [256, 384]),
    ("ViT-B-32-SigLIP2*", B, B, 32, dict(_SIGLIP2, vision_act="gelu_tanh"), [256]),
    ("ViT-B-16-SigLIP2*", B, B, 16, _SIGLIP2, [224, 256, 384, 512]),
    ("ViT-L-16-SigLIP2*", L, L, 16, _SIGLIP2, [256, 384])) for size in sizes]}     # *: the size, unless that is 224


def timm_name(c):
    """timm's name of a config's image tower (its activation aside); None where there is none, as for nano."""
    word = {v: k for k, v in TOWERS.items()}.get((c.vision_width, c.vision_layers, c.vision_heads, c.vision_mlp))
    return f"vit_{word}_patch{c.patch_size}_{c.family}_{c.image_size}" if word else None


def default_source(name):
    """The hub id of a named model's weights, or None. For CLIP they are OpenAI's, whose activation is quick_gelu."""
    if name in MODELS and name != "nano":
        return f"timm/{name}" if "SigLIP" in name else f"timm/{timm_name(MODELS[name])}.openai"


# -----------------------------------------------------------------------------
# the text tower, of timm's blocks: one rename table then serves both towers

def run_blocks(blocks, x, checkpointing, mask=None):
    for block in blocks:
        x = checkpoint(block, x, mask, use_reentrant=False) if checkpointing else block(x, mask)
    return x


def last_block(block, x, row, mask=None):
    """One pre-norm block of timm's, evaluated only where its output is read: at `row` (B,) of x (B, L, C).
    Exact, and saves most of the block: only keys and values are needed of the other rows.
    Returns the rows (B, C), and the values (B, L, C) from which class-token ViTs make their patch tokens.
    """
    B, L, C = x.shape
    H, qkv = block.attn.num_heads, block.attn.qkv
    y, rows = block.norm1(x), torch.arange(B, device=x.device)
    q = F.linear(y[rows, row], qkv.weight[:C], qkv.bias[:C]).view(B, H, 1, C // H)
    k, v = F.linear(y, qkv.weight[C:], qkv.bias[C:]).chunk(2, -1)                   # (B, L, C) each
    a = F.scaled_dot_product_attention(q, *(t.view(B, L, H, C // H).transpose(1, 2) for t in (k, v)), attn_mask=mask)
    z = x[rows, row] + block.attn.proj(a.reshape(B, C))
    return z + block.mlp(block.norm2(z)), v


class TextTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, self.siglip, self.grad_checkpointing = config, config.family == "siglip", False
        norm, std = partial(nn.LayerNorm, eps=1e-6 if self.siglip else 1e-5), c.text_width ** -0.5
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_width)
        self.pos_embed = nn.Parameter(torch.empty(c.context_length, c.text_width))
        self.blocks = nn.ModuleList(
            Block(c.text_width, c.text_heads, c.text_mlp / c.text_width, qkv_bias=True, norm_layer=norm,
                  act_layer=get_act_layer(c.text_act)) for _ in range(c.text_layers))
        self.norm = norm(c.text_width)
        self.head = nn.Linear(c.text_width, c.embed_dim, bias=self.siglip)

        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        deep = std * (2 * c.text_layers) ** -0.5    # of layers that write into the residual stream
        stds = {"qkv": std, "proj": deep, "fc1": (2 * c.text_width) ** -0.5, "fc2": deep, "head": std}
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=stds[name.split(".")[-1]])
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, tokens):
        """tokens (N, L) int64 -> (N, embed_dim). Causal models accept any L that holds every end-of-text token."""
        N, L = tokens.shape
        if self.siglip and L != len(self.pos_embed):
            raise ValueError(f"SigLIP text must be padded to {len(self.pos_embed)} tokens, got {L}: "
                             "its padding is attended to and the last position is read")
        x = self.token_embedding(tokens) + self.pos_embed[:L]                       # (N, L, C)
        causal = None if self.siglip else x.new_full((L, L), -math.inf).triu(1)
        x = run_blocks(self.blocks[:-1], x, self.grad_checkpointing and self.training, causal)
        if self.siglip:
            row, mask = torch.full((N,), L - 1, device=tokens.device), None
        else:   # the end-of-text token has the highest id; the first one counts, whatever the padding is
            row = tokens.argmax(-1)
            mask = (torch.arange(L, device=tokens.device) <= row[:, None])[:, None, None]     # (N, 1, 1, L)
        x, _ = last_block(self.blocks[-1], x, row, mask)                            # (N, C)
        return self.head(self.norm(x))      # LayerNorm acts a row at a time, so it may follow the pooling


# -----------------------------------------------------------------------------
# the model

class CLIP(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, siglip = config, config.family == "siglip"
        self.config = c
        self.visual = VisionTransformer(
            img_size=c.image_size, patch_size=c.patch_size, embed_dim=c.vision_width, depth=c.vision_layers,
            num_heads=c.vision_heads, mlp_ratio=c.vision_mlp / c.vision_width, act_layer=get_act_layer(c.vision_act),
            norm_layer=partial(nn.LayerNorm, eps=1e-6 if siglip else 1e-5), class_token=not siglip, pre_norm=not siglip,
            global_pool="map" if siglip else "token", num_classes=0)
        if not siglip:
            self.visual.head = nn.Linear(c.vision_width, c.embed_dim, bias=False)   # timm's own head has a bias
            nn.init.normal_(self.visual.head.weight, std=c.vision_width ** -0.5)
        self.text = TextTransformer(c)
        self.logit_scale = nn.Parameter(torch.tensor(float(c.logit_scale)))
        self.logit_bias = None if c.logit_bias is None else nn.Parameter(torch.tensor(float(c.logit_bias)))
        self.tokenize, self.transform = Tokenizer(c), image_transform(c)

    def encode_image(self, images, normalize=False, return_tokens=False):
        """images (B, 3, S, S), as model.transform makes them -> image_features (B, D).

        With return_tokens also patch_tokens (B, T, D): for each patch a vector in the joint space of images and
        texts, made of the patch's value in the last attention (no query, so no mixing between patches there).
        siglip: the attention pool applied to one patch alone (C2LIP, sec. 3.3): x + mlp(norm(x)), x = proj(v).
        clip, by config.value_tokens, with p = proj(v) of the last block and x its input:
            A  head(norm(p)): cheapest, the last block is needed at the class token only (the default);
            B  MaskCLIP (Zhou et al. 2022): u = x + p, u = u + mlp(norm2(u)), head(norm(u));
            D  head(norm(output of the last block)): ordinary patch outputs, mixed by attention.
        """
        vit, siglip = self.visual, self.config.family == "siglip"
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))                   # (B, T or 1 + T, C)
        x = run_blocks(vit.blocks if siglip else vit.blocks[:-1], x, vit.grad_checkpointing and self.training)
        if siglip:
            features, tokens = attention_pool(vit.attn_pool, vit.norm(x), return_tokens)
        else:
            block, variant = vit.blocks[-1], self.config.value_tokens
            y, v = last_block(block, x, x.new_zeros(len(x), dtype=torch.long))      # row 0: the class token
            features = vit.head(vit.norm(y))
            if return_tokens:
                p = block(x)[:, 1:] if variant == "D" else block.attn.proj(v[:, 1:])            # (B, T, C)
                if variant == "B":
                    p = x[:, 1:] + p
                    p = p + block.mlp(block.norm2(p))
                tokens = vit.head(vit.norm(p))                                      # (B, T, D)
        if normalize:
            features = F.normalize(features, dim=-1)
            tokens = F.normalize(tokens, dim=-1) if return_tokens else None
        return (features, tokens) if return_tokens else features

    def encode_text(self, tokens, normalize=False):
        """tokens (N, L) int64 from model.tokenize -> text_features (N, D)."""
        x = self.text(tokens)
        return F.normalize(x, dim=-1) if normalize else x

    def forward(self, images, tokens, concept_tokens=None, return_tokens=False):
        """One pass through both towers, so that DistributedDataParallel sees every parameter in one forward.

        Returns a dict of normalised image_features (B, D) and text_features (N, D), with concept_tokens (U, L') also
        concept_features (U, D), with return_tokens also patch_tokens (B, T, D), and the scalars logit_scale
        (exponentiated) and logit_bias (or None).
        """
        image = self.encode_image(images, True, return_tokens)
        out = {"image_features": image[0] if return_tokens else image, "text_features": self.encode_text(tokens, True),
               "logit_scale": self.logit_scale.exp(), "logit_bias": self.logit_bias}
        if concept_tokens is not None:
            out["concept_features"] = self.encode_text(concept_tokens, True)
        if return_tokens:
            out["patch_tokens"] = image[1]
        return out

    def checkpoint(self):
        """What CLIP.load needs, as plain types and tensors: {"config": dict, "model": state_dict}."""
        return {"config": asdict(self.config), "model": self.state_dict()}

    @classmethod
    def load(cls, path):
        """A ready model (fp32, CPU) from a checkpoint of train.py alone. Raises ValueError for any other file."""
        if not os.path.isfile(path):
            raise ValueError(f"no checkpoint at {path}: train.py writes them to OUT_DIR/last.pt")
        state, config = _read_weights(str(path))
        if config is None:
            raise ValueError(f"{path} is not a checkpoint of this project (--init reads weights of other projects)")
        return _fill(cls(config), state, path)

    @classmethod
    def from_pretrained(cls, source=None, model=None, image_size=None):
        """A ready model (fp32, CPU) from released weights. Raises ValueError.

        source: a hub id; a folder as open_clip or transformers write it; one file of open_clip, transformers, OpenAI
            or this project; None: default_source(model). Activation, preprocessing, tokenizer come from its config.
        model: a name in MODELS. Needed for a file, which has no config; elsewhere the structure must agree with it, and
            the activation if it ends in -quickgelu (a plain name leaves that to the source).
        image_size: if not that of the name or source; position embeddings are resampled, with a warning.
        """
        if model is not None and model not in MODELS:
            raise ValueError(f"no model {model!r}: expected one of {', '.join(MODELS)}")
        source, named = source or default_source(model), MODELS.get(model)
        if not source:
            raise ValueError(f"no released weights are known for model {model}: give a hub id, a folder or a file")
        config, weights = (None, source) if os.path.isfile(source) else _read_folder(source)
        state, own = _read_weights(weights)
        config = config or own
        if config is None:      # a bare file
            if model is None:
                raise ValueError(f"{source} does not tell its architecture: name it (--model), or give its folder")
            quick = MODELS.get(model + "-quickgelu", named)
            config = quick if "input_resolution" in state else named        # which only OpenAI's own files have
            if config is not quick:
                warnings.warn(f"{source} is loaded with the exact GELU; OpenAI's and DFN's need {quick.name}")
        elif model and config.name != model:
            differ = [f"{k} {getattr(config, k)}, not {getattr(named, k)}" for k in (*STRUCTURE, "vision_act")
                      if getattr(config, k) != getattr(named, k) and (k != "vision_act" or "quickgelu" in model)]
            if differ:
                raise ValueError(f"{source} is no {model}: it has {'; '.join(differ)}. Leave out the model's name")
            config = replace(config, name=model, image_size=named.image_size)
        return _fill(cls(replace(config, image_size=image_size or config.image_size)), state, source)


def attention_pool(pool, x, return_tokens):
    """timm's AttentionPoolLatent on x (B, T, C) -> pooled (B, C), and with return_tokens every patch's value
    token (B, T, C): what the pool gives when it attends to that patch alone."""
    B, T, C = x.shape
    H = pool.num_heads
    q = pool.q(pool.latent).view(1, 1, H, C // H).transpose(1, 2).expand(B, -1, -1, -1)         # (B, H, 1, C/H)
    k, v = pool.kv(x).chunk(2, -1)                                                              # (B, T, C) each
    y = F.scaled_dot_product_attention(q, *(t.view(B, T, H, C // H).transpose(1, 2) for t in (k, v))).reshape(B, 1, C)
    y = pool.proj(torch.cat([y, v], 1) if return_tokens else y)                                 # (B, 1 [+ T], C)
    y = y + pool.mlp(pool.norm(y))
    return y[:, 0], y[:, 1:]


# -----------------------------------------------------------------------------
# what goes in: texts and images

PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl"})


def clean_text(text, how):
    """Texts as the checkpoints saw them. lower: CLIP; canonicalize: SigLIP, also without punctuation."""
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)).translate(PLAIN))
    if how == "canonicalize":
        text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(text.lower().split())


class Tokenizer:
    """Texts -> token ids, from the text of any tokenizer.json that adds its own end-of-text token."""

    def __init__(self, config):
        from tokenizers import Tokenizer as Backend
        self.config, self.backend = config, Backend.from_str(config.tokenizer) if config.tokenizer else None
        if self.backend:
            self.backend.no_padding()
            self.backend.enable_truncation(config.context_length)       # keeps the end-of-text token
            if (top := self.backend.get_vocab_size()) > config.vocab_size:
                raise ValueError(f"the tokenizer has {top} tokens, the model embeds {config.vocab_size}: give its own")

    def __call__(self, texts, trim=False):
        """list of N str -> LongTensor (N, context_length).

        trim=True: for causal models (N, L) with L the longest text, rounded up to a multiple of 8 so that
        torch.compile meets few shapes. Exact there (nothing behind the end-of-text token is seen); no effect on SigLIP.
        """
        if not self.backend:
            raise ValueError("this model has no tokenizer: set_tokenizer(model, path), or --tokenizer, gives it one")
        c, texts = self.config, [texts] if isinstance(texts, str) else texts
        rows = [e.ids for e in self.backend.encode_batch([clean_text(t, c.text_clean) for t in texts])]
        length = c.context_length
        if trim and c.family == "clip" and rows:
            length = min(length, -(-max(map(len, rows)) // 8) * 8)
        return torch.tensor([ids + [c.pad_id] * (length - len(ids)) for ids in rows]).long().view(-1, length)


def read_tokenizer(path):
    """The text of a tokenizer.json, for CLIPConfig.tokenizer. Raises ValueError."""
    from tokenizers import Tokenizer as Backend
    try:
        return Backend.from_file(path) and open(path, encoding="utf-8").read()
    except Exception as error:      # tokenizers raises Exception itself
        raise ValueError(f"{path} is not a tokenizer ({error}): expected a tokenizer.json as the hub has it") from None


def set_tokenizer(model, path):
    """Gives the model the tokenizer in a file, and returns the model. Raises ValueError."""
    model.config.tokenizer = read_tokenizer(path)
    model.tokenize = Tokenizer(model.config)
    return model


def image_transform(config):
    """PIL image -> (3, S, S) float tensor; equal to open_clip's evaluation transform of both families."""
    s, how = config.image_size, transforms.InterpolationMode(config.interpolation)
    resize = ([transforms.Resize((s, s), how)] if config.resize == "squash"
              else [transforms.Resize(s, how), transforms.CenterCrop(s)])
    return transforms.Compose([*resize, methodcaller("convert", "RGB"), transforms.ToTensor(),
                               transforms.Normalize(config.mean, config.std)])


# -----------------------------------------------------------------------------
# weights of other projects: nothing below is needed to understand or train a model

def _table(text):
    return dict(pair.split("=") for pair in text.split())

# {our name: theirs}, replaced in this order; (qkv) makes three of one
_RESBLOCK = _table("""
    .norm1.=.ln_1.  .norm2.=.ln_2.  .attn.qkv.=.attn.in_proj_  .attn.proj.=.attn.out_proj.  .mlp.fc1.=.mlp.c_fc.
    .mlp.fc2.=.mlp.c_proj.  .blocks.=.transformer.resblocks.  .pos_embed=.positional_embedding""")
_HF = _table("""
    visual.norm.=visual.post_layernorm.  text.norm.=text.final_layer_norm.  visual.=vision_model.  text.=text_model.
    .norm_pre.=.pre_layrnorm.  .blocks.=.encoder.layers.  .norm1.=.layer_norm1.  .norm2.=.layer_norm2.
    .attn.qkv.=.self_attn.(qkv)_proj.  .attn.proj.=.self_attn.out_proj.
    .patch_embed.proj.=.embeddings.patch_embedding.  .token_embedding.=.embeddings.token_embedding.
    .cls_token=.embeddings.class_embedding  .pos_embed=.embeddings.position_embedding.weight
    .attn_pool.latent=.head.probe  .attn_pool.q.=.head.attention.in_proj_  .attn_pool.kv.=.head.attention.in_proj_
    .attn_pool.proj.=.head.attention.out_proj.  .attn_pool.norm.=.head.layernorm.  .attn_pool.=.head.""")
_HF_CLIP = _table("visual.head.=visual_projection.  text.head.=text_projection.") | _HF
LAYOUTS = {     # (format, family): (a name that only this format has, table of the image tower, of the text tower)
    ("open_clip", "clip"): (
        "visual.class_embedding",
        _table(""".patch_embed.proj.=.conv1.  .cls_token=.class_embedding  .norm_pre.=.ln_pre.  .head.weight=.proj
                  visual.norm.=visual.ln_post.""") | _RESBLOCK,
        _table("text.norm.=ln_final.  text.head.weight=text_projection") | _RESBLOCK | {"text.": ""}),
    ("open_clip", "siglip"): ("visual.trunk.attn_pool.latent", _table("visual.=visual.trunk."),
                              _table("text.norm.=text.ln_final.  .head.=.text_projection.") | _RESBLOCK),
    ("transformers", "clip"): ("vision_model.embeddings.class_embedding", _HF_CLIP, _HF_CLIP),
    ("transformers", "siglip"): ("vision_model.head.probe", _HF, _HF),
    ("this project", "clip"): ("visual.cls_token", {}, {}),
    ("this project", "siglip"): ("visual.attn_pool.latent", {}, {})}
TRANSPOSED = ("visual.proj", "text_projection")     # x @ W there, Linear here
NO_WEIGHTS = ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")


def _views(model, format):
    """{a name of theirs: [our tensors]}, in their shape but in our memory; the rows of several are one of theirs."""
    views = {}
    _, visual, text = LAYOUTS[format, model.config.family]
    for name, x in model.state_dict().items():
        for ours, theirs in {"visual": visual, "text": text}.get(name.split(".")[0], {}).items():
            name = name.replace(ours, theirs)
        if name in TRANSPOSED:
            x = x.T
        elif "embedding" in name:
            x = x.squeeze()             # (1, 1, C) -> (C,) and (1, T, C) -> (T, C)
        if "(qkv)" in name:
            views |= {name.replace("(qkv)", letter): [part] for letter, part in zip("qkv", x.chunk(3))}
        else:
            views.setdefault(name, []).append(x)
    return views


def _fill(model, state, source):
    """Copies weights in any of LAYOUTS into the model, and returns it. Strict: anything amiss is a ValueError."""
    c = model.config
    format, family = next((k for k, (mark, *_) in LAYOUTS.items() if mark in state), (None, None))
    if family != c.family:
        raise ValueError(f"{source} holds {family} weights in the format of {format}, but {c.name} is a {c.family}" if
                         format else f"{source} has none of the formats open_clip, OpenAI, transformers (CLIPModel, "
                         f"SiglipModel), this project: its names are {', '.join(list(state)[:3])}, ...")
    views, state = _views(model, format), {k: x for k, x in state.items() if k.split(".")[-1] not in NO_WEIGHTS}
    bad = {"of another shape": [], "unexpected": sorted(state.keys() - views), "missing": sorted(views.keys() - state)}
    for name in views.keys() & state.keys():
        parts, x = views[name], state[name]
        shape = parts[0].shape if len(parts) == 1 else torch.cat(parts).shape
        if name.startswith("vis") and "pos" in name and x.shape != shape and x.shape[-1] == shape[-1]:
            prefix = int(family == "clip")      # the class token has a position, too
            old, new = (math.isqrt(size[-2] - prefix) for size in (x.shape, shape))
            warnings.warn(f"{source}: position embeddings resampled from {old} x {old} to {new} x {new} patches")
            x = x.float().view(1, -1, shape[-1])
            x = resample_abs_pos_embed(x, [new, new], num_prefix_tokens=prefix).view(shape)
        if x.shape == shape or x.numel() == shape.numel() == 1:
            for part, rows in zip(parts, [x] if len(parts) == 1 else x.split([len(p) for p in parts])):
                part.copy_(rows.reshape(part.shape))
        else:
            bad["of another shape"].append(f"{name} {list(x.shape)} for {list(shape)}")
    if any(bad.values()):
        likely = ("weights of another model or size" if bad["of another shape"] else
                  "parts that this architecture lacks" if bad["unexpected"] else "half a file")
        what = "; ".join(f"{len(v)} {k} ({', '.join(v[:3])}{', ...' * (len(v) > 3)})" for k, v in bad.items() if v)
        raise ValueError(f"{source} does not fit {c.name}: {what}. It was read as {format} {family}; likely {likely}")
    return model


def _read_weights(path):
    """(state dict with the file's own names, CLIPConfig if this project wrote it). Runs no code of the file."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            saved = load_file(path)
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        config = CLIPConfig(**saved["config"]) if "config" in saved and "model" in saved else None
        state = saved["model"] if config else saved.get("state_dict", saved)
        state = {k.replace("_orig_mod.", "").removeprefix("module."): x for k, x in state.items() if torch.is_tensor(x)}
        return state, config
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].split('. ')[0]}"
        if "TorchScript" in str(error):
            why = f"a TorchScript archive holds code; take the safetensors of {default_source('ViT-B-32')} on the hub"
        raise ValueError(f"{path} holds no readable weights ({why}): expected .safetensors, .bin or .pt of open_clip, "
                         "transformers, OpenAI or this project") from None


# -----------------------------------------------------------------------------
# configs of other projects

# {their path: a field of CLIPConfig, or another word of _read_config}; preprocess: the preprocessing's own part or file
PATHS = {
    "open_clip": _table("""
        embed_dim=embed_dim  init_logit_bias=logit_bias  quick_gelu=quick_gelu
        vision_cfg.image_size=image_size  vision_cfg.patch_size=patch_size  vision_cfg.width=vision_width
        vision_cfg.layers=vision_layers  vision_cfg.head_width=head_width  vision_cfg.mlp_ratio=vision_ratio
        vision_cfg.act_kwargs=vision_kwargs  vision_cfg.timm_model_name=tower
        text_cfg.width=text_width  text_cfg.layers=text_layers  text_cfg.heads=text_heads  text_cfg.mlp_ratio=text_ratio
        text_cfg.act_kwargs=text_kwargs  text_cfg.vocab_size=vocab_size  text_cfg.context_length=context_length
        text_cfg.tokenizer_kwargs=clean  preprocess.mean=mean  preprocess.std=std
        preprocess.interpolation=interpolation  preprocess.resize_mode=resize"""),
    "transformers": _table("""
        projection_dim=projection_dim  text_config.projection_size=projection_size
        vision_config.image_size=image_size  vision_config.patch_size=patch_size
        text_config.vocab_size=vocab_size  text_config.max_position_embeddings=context_length
        preprocess.image_mean=mean  preprocess.image_std=std  preprocess.resample=resample  preprocess.size=size
    """ + "".join(f"""
        {t}_config.hidden_size={t}_width  {t}_config.num_hidden_layers={t}_layers  {t}_config.hidden_act={t}_act
        {t}_config.num_attention_heads={t}_heads  {t}_config.intermediate_size={t}_mlp""" for t in ("vision", "text")))}


def _read_config(format, cfg, pre):
    """A peer's config and preprocessing -> CLIPConfig. What is left out has the peer's default, as in `base`."""
    parts = {**cfg, "preprocess": pre}
    given = cfg | {f"{s}.{k}": v for s, part in parts.items() if isinstance(part, dict) for k, v in part.items()}
    if format == "open_clip":
        base = MODELS["ViT-B-16-SigLIP" if "vision_cfg.timm_model_name" in given else "ViT-B-16"]
        base = replace(base, logit_bias=given.get("init_logit_bias"))
    elif cfg.get("model_type") not in ("clip", "siglip"):
        raise ValueError(f"model_type is {cfg.get('model_type')!r}: expected clip or siglip")
    else:
        base = MODELS["ViT-B-32-quickgelu"] if cfg["model_type"] == "clip" else replace(
            MODELS["ViT-B-16-SigLIP"], vision_act="gelu_tanh", text_act="gelu_tanh")
    siglip = base.family == "siglip"
    eps = 1e-6 if siglip else 1e-5
    for path, ours in {
            "vision_cfg.timm_pool": "map", "vision_cfg.timm_proj": "none", "vision_cfg.pool_type": "tok",
            "text_cfg.pool_type": "last" if siglip else "argmax", "text_cfg.no_causal_mask": siglip,
            "text_cfg.proj_bias": siglip, "text_cfg.norm_kwargs": {"eps": eps}, "vision_config.layer_norm_eps": eps,
            "text_config.layer_norm_eps": eps}.items():
        if given.get(path, ours) != ours:
            raise ValueError(f"{path} is {given[path]!r}, but this code can only do {ours!r}")
    w = asdict(base) | {word: given[path] for path, word in PATHS[format].items() if given.get(path) is not None}
    if format == "open_clip":
        for t in ("vision", "text"):
            w[t + "_mlp"] = int(w[t + "_width"] * w.get(t + "_ratio", 4))
            tanh = w.get(t + "_kwargs", {}).get("approximate") == "tanh"
            w[t + "_act"] = "quick_gelu" if w.get("quick_gelu") else "gelu_tanh" if tanh else "gelu"
        w["text_clean"] = w.get("clean", {}).get("clean", base.text_clean)
        w["vision_heads"] = w["vision_width"] // w.get("head_width", 64)
        if siglip:      # its image tower is given by timm's name
            towers = {timm_name(m): asdict(m) for m in MODELS.values()}
            w |= {k: v for k, v in towers[w["tower"]].items() if k.startswith(("vision_", "image_", "patch_"))}
    else:
        w |= {t + "_act": w[t + "_act"].replace("gelu_pytorch_tanh", "gelu_tanh") for t in ("vision", "text")}
        w["embed_dim"] = w.get("projection_size", w["text_width"]) if siglip else w.get("projection_dim", 512)
        w["interpolation"] = "bilinear" if w.get("resample") == 2 else "bicubic"
        if isinstance(w.get("size"), dict):
            w["resize"] = "squash" if "height" in w["size"] else "shortest"
    return CLIPConfig(**{k: w[k] for k in asdict(base)})


FORMATS = {     # (config, weights, weights of old)
    "open_clip": ("open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "transformers": ("config.json", "model.safetensors", "pytorch_model.bin")}
WANTED = "{} and {} (or {}) or {} and {} (or {})".format(*FORMATS["open_clip"], *FORMATS["transformers"])


def _find(source):
    """(names of the files in a folder or hub repo, a function from name to path). Without a network: what is cached."""
    if os.path.isdir(source):
        return os.listdir(source), partial(os.path.join, source)
    source = source.removeprefix("hf-hub:")
    if source.count("/") != 1 or source[0] in "./~" or source.endswith((".pt", ".bin", ".safetensors")):
        raise ValueError(f"{source}: no such file or folder, nor a hub id (owner/name)")
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    try:    # one question of our own: without a network, a download would retry for 20 seconds
        return [f.rfilename for f in HfApi().model_info(source, timeout=3).siblings], partial(hf_hub_download, source)
    except Exception as error:
        try:
            return _find(snapshot_download(source, local_files_only=True))
        except OSError:     # not in the cache either
            raise ValueError(f"{source} is not here, the hub cannot be reached or refuses ({type(error).__name__}): "
                             f"get {WANTED}, tokenizer.json, tokenizer_config.json, preprocessor_config.json, from "
                             f"https://huggingface.co/{source}, into one folder, and give that folder") from None


def _read_folder(source):
    """(CLIPConfig, path of the weights) of a folder or hub repo in the layout of open_clip or of transformers."""
    names, path_of = _find(source)
    format, name, weights = next(((f, config, w) for f, (config, *both) in FORMATS.items() for w in both
                                  if config in names and w in names), (None, None, None))
    if format is None:
        raise ValueError(f"{source} lacks {WANTED}")
    try:
        cfg, pre, tok = (json.load(open(path_of(n), encoding="utf-8")) if n in names else {}
                         for n in (name, "preprocessor_config.json", "tokenizer_config.json"))
        c = (_read_config(format, cfg, pre) if format == "transformers" else
             _read_config(format, cfg["model_cfg"], cfg.get("preprocess_cfg", {})))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{source}: this code cannot build {name} ({type(error).__name__}: {error})") from None
    c.name = os.path.basename(source.rstrip("/"))
    if "tokenizer.json" in names:
        c.tokenizer = read_tokenizer(path_of("tokenizer.json"))
        # a SigLIP attends to its pads, so they must be the very ones of the training
        ids, pad = {t["content"]: t["id"] for t in json.loads(c.tokenizer)["added_tokens"]}, tok.get("pad_token")
        if c.family == "siglip":
            c.pad_id = ids.get(pad["content"] if isinstance(pad, dict) else pad, int(c.vocab_size != 256000))
    else:
        warnings.warn(f"{source} has no tokenizer.json; set_tokenizer(model, path), or --tokenizer, gives it one")
    return c, path_of(weights)
