"""CLIP and SigLIP in one file: a timm ViT, a small text transformer, a tokenizer, a preprocessing.

Everything that the weights do not say (activation, pooling, context length, preprocessing, tokenizer) lives in
CLIPConfig and travels in every checkpoint:

    model = CLIP.load("out/nano/last.pt").eval()
    images = torch.stack([model.transform(Image.open(f)) for f in files])           # (B, 3, S, S)
    logits = model.encode_image(images, True) @ model.encode_text(model.tokenize(texts), True).T

CLIP.from_pretrained reads the weights of open_clip, transformers and OpenAI, `python model.py export` writes them;
assets/models.json says what these call things. The two families differ in a handful of places, marked `siglip` below:
    clip    class token, pre-norm;     causal text, read at the end-of-text token;  heads without bias
    siglip  attention pool, no class;  text sees all positions, read at the last;   text head with bias
"""
import argparse
import html
import json
import math
import os
import re
import unicodedata
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from operator import methodcaller

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import get_act_layer, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from tokenizers import Tokenizer as Backend
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision import transforms


@dataclass
class CLIPConfig:
    name: str = "nano"
    family: str = "siglip"              # clip | siglip: decides structure, see the top of this file
    embed_dim: int = 96                 # of the joint space
    image_size: int = 32
    patch_size: int = 8
    vision: tuple = (96, 3, 3, 384)     # the image tower's width, layers, heads, hidden units of each MLP
    text: tuple = (96, 3, 3, 384)       # the text tower's
    vision_act: str = "gelu"            # gelu | gelu_tanh | quick_gelu; not in the weights, and it matters
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
        for key in ("vision", "text", "mean", "std"):
            setattr(self, key, tuple(getattr(self, key)))       # lists after a trip through json
        acts = ("gelu", "gelu_tanh", "quick_gelu")
        for key, allowed in dict(family=("clip", "siglip"), value_tokens=("A", "B", "D"), vision_act=acts,
                                 text_act=acts, resize=("squash", "shortest"), interpolation=("bicubic", "bilinear"),
                                 text_clean=("lower", "canonicalize")).items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"CLIPConfig.{key} is {getattr(self, key)!r}, expected one of {', '.join(allowed)}")

STRUCTURE = ("family", "embed_dim", "patch_size", "vision", "text", "vocab_size", "context_length")
PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "models.json")     # other projects' names
KNOWN = json.load(open(PATH, encoding="utf-8")) if os.path.exists(PATH) else {"models": [], "layouts": {}, "ignore": []}
MODELS = {"nano": CLIPConfig()} | {
    row["name"]: CLIPConfig(row["name"], **KNOWN["kinds"][row["kind"]], **row["config"]) for row in KNOWN["models"]}
SOURCES = {row["name"]: row["source"] for row in KNOWN["models"]}      # default hub ids; OpenAI's weights for CLIP
TOWERS = {row["timm"]: MODELS[row["name"]] for row in KNOWN["models"]}


# ---- the text tower, of timm's blocks: one rename table then serves both towers ----
def run_blocks(blocks, x, checkpointing, mask=None):
    for block in blocks:
        x = checkpoint(block, x, mask, use_reentrant=False) if checkpointing else block(x, mask)
    return x


def last_block(block, x, row, mask=None):
    """One pre-norm block of timm's, evaluated only where its output is read: at `row` (B,) of x (B, L, C). Exact, and
    saves most of the block: of the other rows only keys and values are needed. Returns the rows (B, C), and the values
    (B, L, C), from which class-token ViTs make their patch tokens."""
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
        self.siglip, self.grad_checkpointing = config.family == "siglip", False
        width, layers, heads, mlp = config.text
        norm = partial(nn.LayerNorm, eps=1e-6 if self.siglip else 1e-5)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp / width, qkv_bias=True, norm_layer=norm,
                                          act_layer=get_act_layer(config.text_act)) for _ in range(layers))
        self.norm = norm(width)
        self.head = nn.Linear(width, config.embed_dim, bias=self.siglip)

        std, deep = width ** -0.5, (2 * width * layers) ** -0.5     # deep: what writes into the residual stream
        stds = {"token_embedding": 0.02, "pos_embed": 0.01, "qkv": std, "proj": deep, "fc1": (2 * width) ** -0.5,
                "fc2": deep, "head": std}
        for name, p in self.named_parameters():
            if (layer := name.split(".")[-2:][0]) in stds:
                nn.init.normal_(p, std=stds[layer]) if p.ndim == 2 else nn.init.zeros_(p)

    def forward(self, tokens, return_tokens=False):
        """tokens (N, L) int64 -> (N, D), and with return_tokens the outputs of all tokens (N, L, D), else None.
        Causal models accept any L that holds every end-of-text token."""
        N, L = tokens.shape
        if self.siglip and L != len(self.pos_embed):
            raise ValueError(f"SigLIP text must be padded to {len(self.pos_embed)} tokens, got {L}: it sees the pads")
        x, checkpointing = self.token_embedding(tokens) + self.pos_embed[:L], self.grad_checkpointing and self.training
        # the end-of-text token has the highest id; the first one counts, whatever the padding is
        row = torch.full((N,), L - 1, device=tokens.device) if self.siglip else tokens.argmax(-1)
        causal = None if self.siglip else x.new_full((L, L), -math.inf).triu(1)
        x = run_blocks(self.blocks[:-1], x, checkpointing, causal)
        if return_tokens:
            x = self.head(self.norm(run_blocks(self.blocks[-1:], x, checkpointing, causal)))    # (N, L, D)
            return x[torch.arange(N, device=x.device), row], x
        mask = None if self.siglip else causal[row][:, None, None]                  # (N, 1, 1, L)
        x, _ = last_block(self.blocks[-1], x, row, mask)                            # (N, C)
        return self.head(self.norm(x)), None        # LayerNorm acts a row at a time, so it may follow the pooling


# ---- the model -------------------------------------------------------------
class CLIP(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, siglip, (width, layers, heads, mlp) = config, config.family == "siglip", config.vision
        self.config = c
        self.visual = VisionTransformer(
            img_size=c.image_size, patch_size=c.patch_size, embed_dim=width, depth=layers, num_heads=heads,
            mlp_ratio=mlp / width, act_layer=get_act_layer(c.vision_act), class_token=not siglip, pre_norm=not siglip,
            norm_layer=partial(nn.LayerNorm, eps=1e-6 if siglip else 1e-5),
            global_pool="map" if siglip else "token", num_classes=0)
        if not siglip:
            self.visual.head = nn.Linear(width, c.embed_dim, bias=False)            # timm's own head has a bias
            nn.init.normal_(self.visual.head.weight, std=width ** -0.5)
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
            D  head(norm(output of the last block)): ordinary patch outputs, mixed by attention."""
        vit, siglip = self.visual, self.config.family == "siglip"
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))                   # (B, T or 1 + T, C)
        x = run_blocks(vit.blocks if siglip else vit.blocks[:-1], x, vit.grad_checkpointing and self.training)
        if siglip:
            x, pool, C = vit.norm(x), vit.attn_pool, x.shape[-1]
            features = pool(x)                                                      # (B, C)
            if return_tokens:
                p = pool.proj(F.linear(x, pool.kv.weight[C:], pool.kv.bias[C:]))    # (B, T, C), of the values alone
                tokens = p + pool.mlp(pool.norm(p))
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
        if not return_tokens:
            return F.normalize(features, dim=-1) if normalize else features
        return (F.normalize(features, dim=-1), F.normalize(tokens, dim=-1)) if normalize else (features, tokens)

    def encode_text(self, tokens, normalize=False, return_tokens=False):
        """tokens (N, L) int64 from model.tokenize -> text_features (N, D); with return_tokens also, never normalised,
        what every token would give in the pooled one's place, (N, L, D): head(norm(x))."""
        features, x = self.text(tokens, return_tokens)
        features = F.normalize(features, dim=-1) if normalize else features
        return (features, x) if return_tokens else features

    def forward(self, images, tokens, concept_tokens=None, spans=None, negative_tokens=None, negative_images=None,
                return_tokens=False):
        """One pass through both towers, so that DistributedDataParallel sees every parameter in one forward. Returns a
        dict of the scalars logit_scale (exponentiated) and logit_bias (or None), and normalised: image_features (B, D);
        text_features (B, D); concept_features (U, D) of concept_tokens (U, L'), or (B M, D) of spans (B, M, 2), which
        are means over [first, end) of the captions' own token outputs, anything for (0, 0); negative_features (B, K, D)
        of negative_tokens (B, K, L'); negative_image_features (B, D); with return_tokens patch_tokens (B, T, D)."""
        image = self.encode_image(images, True, return_tokens)
        text = self.encode_text(tokens, True, spans is not None)
        out = {"image_features": image[0] if return_tokens else image, "text_features": text,
               "logit_scale": self.logit_scale.exp(), "logit_bias": self.logit_bias}
        if return_tokens:
            out["patch_tokens"] = image[1]
        if spans is not None:
            out["text_features"], x = text                                          # (B, D), (B, L, D)
            position = torch.arange(x.shape[1], device=x.device)
            inside = ((spans[..., :1] <= position) & (position < spans[..., 1:])).to(x.dtype)   # (B, M, L)
            # the sum is the mean but for its length; (0, 0) is padding, and gives zeros
            out["concept_features"] = F.normalize((inside @ x).flatten(0, 1), dim=-1)           # (B M, D)
        elif concept_tokens is not None:
            out["concept_features"] = self.encode_text(concept_tokens, True)
        if negative_tokens is not None:
            negatives = self.encode_text(negative_tokens.flatten(0, 1), True)                   # (B K, D)
            out["negative_features"] = negatives.view(*negative_tokens.shape[:2], -1)
        if negative_images is not None:
            out["negative_image_features"] = self.encode_image(negative_images, True)
        return out

    def checkpoint(self):
        """What CLIP.load needs, as plain types and tensors: {"config": dict, "model": state_dict}."""
        return {"config": asdict(self.config), "model": self.state_dict()}

    @classmethod
    def load(cls, path):
        """A ready model (fp32, CPU) from a checkpoint of train.py alone. Raises ValueError for any other file."""
        state, config = _read_weights(str(path)) if os.path.isfile(path) else ({}, None)
        if config is None:
            raise ValueError(f"no checkpoint at {path} that train.py wrote (--init reads weights of other projects)")
        return _fill(cls(config), state, path)

    @classmethod
    def from_pretrained(cls, source=None, model=None, image_size=None):
        """A ready model (fp32, CPU) from released weights. Raises ValueError.

        source: a hub id; a folder as open_clip or transformers write it; one file of open_clip, transformers, OpenAI
            or this project; None: the model's default. Activation, preprocessing, tokenizer come from its config.
        model: a name in MODELS, for a file without a config. Elsewhere it must agree with the source's structure, and
            with -quickgelu in the activation.
        image_size: if not that of the name or source; position embeddings are resampled, with a warning."""
        if not KNOWN["models"]:
            raise ValueError(f"{PATH} is missing: it describes the models and formats of other projects")
        if model is not None and model not in MODELS:
            raise ValueError(f"no model {model!r}: expected one of {', '.join(MODELS)}")
        source, named = source or SOURCES.get(model), MODELS.get(model)
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


# ---- what goes in: texts and images ----------------------------------------
def clean_text(text, how):
    """Texts as the checkpoints saw them. lower: CLIP; canonicalize: SigLIP, also without punctuation."""
    plain = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl"})
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)).translate(plain))
    if how == "canonicalize":
        text = re.sub(r"[!-/:-@\[-`{-~]", "", text.replace("_", " "))
    return " ".join(text.lower().split())


class Tokenizer:
    """Texts -> token ids, from the text of any tokenizer.json that adds its own end-of-text token."""

    def __init__(self, config):
        self.config, self.backend = config, Backend.from_str(config.tokenizer) if config.tokenizer else None
        if self.backend:
            self.backend.no_padding()
            self.backend.enable_truncation(config.context_length)       # keeps the end-of-text token
            if (top := self.backend.get_vocab_size()) > config.vocab_size:
                raise ValueError(f"the tokenizer has {top} tokens, the model embeds {config.vocab_size}: give its own")

    def encode(self, texts):
        """list of str -> list of tokenizers.Encoding, cleaned and cut to the context length."""
        if not self.backend:
            raise ValueError("this model has no tokenizer: set_tokenizer(model, path), or --tokenizer, gives it one")
        return self.backend.encode_batch([clean_text(t, self.config.text_clean) for t in texts])

    def __call__(self, texts, trim=False):
        """list of N str -> LongTensor (N, context_length).

        trim: for causal models (N, L) with L the longest text, rounded up to a multiple of 8 for torch.compile's sake.
        Exact there (nothing behind the end-of-text token is seen); no effect on SigLIP."""
        c, rows = self.config, [e.ids for e in self.encode([texts] if isinstance(texts, str) else texts)]
        length = c.context_length
        if trim and c.family == "clip" and rows:
            length = min(length, -(-max(map(len, rows)) // 8) * 8)
        return torch.tensor([ids + [c.pad_id] * (length - len(ids)) for ids in rows]).long().view(-1, length)

    def spans(self, text, phrases):
        """[(first, end)] in the tokens of the text for each phrase, where it first stands as whole words; for a phrase
        that is not there, or that the context length cuts, all of the text's tokens but the special ones."""
        e, how = self.encode([text])[0], self.config.text_clean
        words = [i for i, special in enumerate(e.special_tokens_mask) if not special] or [0]
        text, spans = clean_text(text, how), []
        for phrase in phrases:
            match = re.search(rf"(?<!\w){re.escape(clean_text(phrase, how))}(?!\w)", text)
            start, end = match.span() if match else (0, 0)
            inside = [i for i in words if e.offsets[i][0] < end and e.offsets[i][1] > start]
            inside = inside if inside and e.offsets[inside[-1]][1] >= end else words
            spans.append((inside[0], inside[-1] + 1))
        return spans


def read_tokenizer(path):
    """The text of a tokenizer.json, for CLIPConfig.tokenizer. Raises ValueError."""
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
    resize = transforms.Resize((s, s) if config.resize == "squash" else s, how)
    return transforms.Compose([resize, transforms.CenterCrop(s), methodcaller("convert", "RGB"), transforms.ToTensor(),
                               transforms.Normalize(config.mean, config.std)])


# ---- weights of other projects, in and out: nothing below is needed to understand or train a model ----
# {"format family": what that format calls things}: "about" in assets/models.json says how to read it
LAYOUTS = {"this project clip": {"mark": "visual.cls_token"},
           "this project siglip": {"mark": "visual.attn_pool.latent"}} | KNOWN["layouts"]
FORMATS = {     # (config, weights, weights of old)
    "open_clip": ("open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "transformers": ("config.json", "model.safetensors", "pytorch_model.bin")}
WANTED = "{} and {} (or {}) or {} and {} (or {})".format(*FORMATS["open_clip"], *FORMATS["transformers"])


def _views(model, layout):
    """{a name of theirs: [our tensors]}, in their shape but in our memory; the rows of several are one of theirs."""
    views = {}
    for name, x in model.state_dict().items():
        for ours, theirs in layout.get(name.split(".")[0], {}).items():
            name = name.replace(ours, theirs)
        if name in ("visual.proj", "text_projection"):
            x = x.T                     # x @ W there, Linear here
        elif "embedding" in name:
            x = x.squeeze()             # (1, 1, C) -> (C,) and (1, T, C) -> (T, C)
        elif x.ndim == 0:
            x = x.view(layout.get("scalar", []))
        if "(qkv)" in name:
            views |= {name.replace("(qkv)", letter): [part] for letter, part in zip("qkv", x.chunk(3))}
        else:
            views.setdefault(name, []).append(x)
    return views


def _fill(model, state, source):
    """Copies weights in any of LAYOUTS into the model, and returns it. Strict: anything amiss is a ValueError."""
    c = model.config
    kind = next((kind for kind, layout in LAYOUTS.items() if layout.get("mark") in state), None)
    if not kind:
        raise ValueError(f"{source} has none of the formats open_clip, OpenAI, transformers (CLIPModel, SiglipModel), "
                         f"this project: its names are {', '.join(list(state)[:3])}, ...")
    if kind.split()[-1] != c.family:
        raise ValueError(f"{source} holds weights in the format of {kind}, but {c.name} is a {c.family}")
    views = _views(model, LAYOUTS[kind])
    state = {k: x for k, x in state.items() if k.split(".")[-1] not in KNOWN["ignore"]}
    bad = {"of another shape": [], "unexpected": sorted(state.keys() - views), "missing": sorted(views.keys() - state)}
    for name in views.keys() & state.keys():
        parts, x = views[name], state[name]
        shape = parts[0].shape if len(parts) == 1 else torch.cat(parts).shape
        if name.startswith("vis") and "pos" in name and x.shape != shape and x.shape[-1] == shape[-1]:
            prefix = int(c.family == "clip")      # the class token has a position, too
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
        raise ValueError(f"{source} does not fit {c.name}: {what}. It was read as {kind}; likely {likely}")
    return model


def _read_weights(path):
    """(state dict with the file's own names, CLIPConfig if this project wrote it). Runs no code of the file."""
    try:
        saved = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
        config = CLIPConfig(**saved["config"]) if "config" in saved and "model" in saved else None
        state = saved["model"] if config else saved.get("state_dict", saved)
        state = {k.replace("_orig_mod.", "").removeprefix("module."): x for k, x in state.items() if torch.is_tensor(x)}
        if "visual.class_embedding" in state:       # a clip of open_clip's, which may say text. (custom_text)
            state = {k.removeprefix("text."): x for k, x in state.items()}
        return state, config
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].split('. ')[0]}"
        if "TorchScript" in str(error):
            why = f"a TorchScript archive holds code; take the safetensors of {SOURCES.get('ViT-B-32')} on the hub"
        raise ValueError(f"{path} holds no readable weights ({why}): expected .safetensors, .bin or .pt of open_clip, "
                         "transformers, OpenAI or this project") from None


def _words(c):
    """{word: value} for the files of the peers; a word of the value None is left out there."""
    words, S = asdict(c), c.image_size
    words |= {
        "tower": next((name for name, m in TOWERS.items() if all(getattr(m, key) == words[key] for key in (
            "family", "vision", "vision_act", "patch_size", "image_size"))), None),
        "tokenizer_name": None if c.vocab_size == 49408 else c.name,        # None: open_clip has CLIP's own
        "input_size": [3, S, S], "size": {"height": S, "width": S} if c.resize == "squash" else {"shortest_edge": S}}
    for t in ("vision", "text"):
        width, layers, heads, mlp = words[t]
        words |= {f"{t}_width": width, f"{t}_layers": layers, f"{t}_heads": heads, f"{t}_mlp": mlp,
                  f"{t}_head_width": width // heads, f"{t}_mlp_ratio": mlp / width}
    return words


def _write_config(template, words):
    """{name: text} of a peer's config files."""
    files = {}
    for path, x in template.items():
        if isinstance(x, dict):
            x = x.get(words[x["$"]], words[x["$"]])
        elif str(x).startswith("$"):
            x = words[x[1:]]
        *parents, key = path.removeprefix("+").split("/")
        if x is not None:
            reduce(lambda part, name: part.setdefault(name, {}), parents, files)[key] = x
    return {name: json.dumps(content, indent=1) for name, content in files.items()}


def _read_config(format, files):
    """The inverse, -> CLIPConfig. What the files leave out has the peer's default, as in `base`."""
    if format == "open_clip":
        tower = files["open_clip_config.json"]["model_cfg"]["vision_cfg"].get("timm_model_name")
        base = MODELS["nano"] if str(tower).startswith("local-dir:") else TOWERS[tower] if tower else MODELS["ViT-B-16"]
        base = replace(base, logit_bias=None, text_act="gelu")
    elif files["config.json"].get("model_type") == "siglip":
        base = replace(MODELS["ViT-B-16-SigLIP"], vision_act="gelu_tanh", text_act="gelu_tanh")
    else:
        base = MODELS["ViT-B-32-quickgelu"]
    given = {}
    for path, ours in LAYOUTS[f"{format} {base.family}"]["files"].items():
        theirs = reduce(lambda part, name: (part or {}).get(name), path.split("/"), files)
        if theirs is None:
            continue
        if isinstance(ours, dict):
            given[ours["$"]] = next((value for value, x in ours.items() if x == theirs), theirs)
        elif str(ours).startswith("$"):
            given[ours[1:]] = theirs
        elif theirs != ours:
            raise ValueError(f"{path} is {theirs!r}, but this code can only do {ours!r}")
    w = _words(base) | given
    for t in ("vision", "text"):
        width, layers, heads, mlp = (w[f"{t}_{key}"] for key in ("width", "layers", "heads", "mlp"))
        if format == "open_clip":
            heads, mlp = width // w["vision_head_width"] if t == "vision" else heads, round(width * w[t + "_mlp_ratio"])
            w[t + "_act"] = "quick_gelu" if w["text_act"] == "quick_gelu" else w[t + "_act"]
        w[t] = (width, layers, heads, mlp)
    if format == "transformers" and base.family == "siglip" and "embed_dim" not in given:
        w["embed_dim"] = w["text_width"]
    if isinstance(given.get("size"), dict):
        w["resize"] = "squash" if "height" in given["size"] else "shortest"
    return CLIPConfig(**{key: w[key] for key in asdict(base)})


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
                             f"put {WANTED}, tokenizer.json, tokenizer_config.json, preprocessor_config.json of "
                             f"https://huggingface.co/{source} into a folder, and give that") from None


def _read_folder(source):
    """(CLIPConfig, path of the weights) of a folder or hub repo in the layout of open_clip or of transformers."""
    names, path_of = _find(source)
    format, name, weights = next(((f, config, w) for f, (config, *both) in FORMATS.items() for w in both
                                  if config in names and w in names), (None, None, None))
    if format is None:
        raise ValueError(f"{source} lacks {WANTED}")
    try:
        files = {n: json.load(open(path_of(n), encoding="utf-8")) for n in (
            name, "preprocessor_config.json", "processor_config.json", "tokenizer_config.json") if n in names}
        tok, new = files.pop("tokenizer_config.json", {}), files.pop("processor_config.json", {})
        c = _read_config(format, {"preprocessor_config.json": new.get("image_processor"), **files})
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


def export(model, format, directory):
    """Writes a new folder that open_clip, transformers or timm (image tower) loads by itself; returns that call.
    Raises ValueError for what a format cannot say."""
    c, siglip, words = model.config, model.config.family == "siglip", _words(model.config)
    layout = LAYOUTS[f"{format} {c.family}"]
    if os.path.exists(directory):
        raise ValueError(f"{directory} exists: give a new folder")
    if format == "transformers" and not siglip and c.logit_bias is not None:
        raise ValueError("transformers' CLIPModel has no logit_bias, which this model was trained with: use open_clip")
    if format == "open_clip" and "quick_gelu" in (c.vision_act, c.text_act) and (siglip or c.vision_act != c.text_act):
        raise ValueError("open_clip knows quick_gelu only in both towers of a clip: this model can go to transformers")
    if format == "timm":
        tensors = model.visual.state_dict() | ({} if siglip else {"head.bias": torch.zeros(c.embed_dim)})
    else:
        tensors = {k: torch.cat(x) if len(x) > 1 else x[0].contiguous() for k, x in _views(model, layout).items()}
        words["end_token"] = model.tokenize.encode([""])[0].tokens[-1]
        words["pad_token"] = model.tokenize.backend.id_to_token(c.pad_id) if siglip else words["end_token"]
    if format == "open_clip" and siglip and not words["tower"]:     # one without a name: timm reads it in the folder
        words["tower"] = f"local-dir:{os.path.abspath(directory)}"
        layout = layout | {"files": layout["files"] | LAYOUTS["timm siglip"]["files"]}
    files = _write_config(layout["files"], words) | ({} if format == "timm" else {"tokenizer.json": c.tokenizer})
    if format == "transformers":
        tokenizer = json.loads(c.tokenizer)
        steps = KNOWN["clean_text"][c.text_clean] + [n for n in [tokenizer["normalizer"]] if n]
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}    # the only place for clean_text there
        files["tokenizer.json"] = json.dumps(tokenizer)
        if siglip:
            tensors.setdefault("logit_bias", torch.zeros(1))        # of a model trained with the softmax loss
    os.makedirs(directory)
    save_file(tensors, os.path.join(directory, layout["weights"]), metadata={"format": "pt"})
    for name, text in files.items():
        with open(os.path.join(directory, name), "w", encoding="utf-8") as f:
            f.write(text)
    return layout["call"].format(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=export.__doc__.split(";")[0])
    parser.add_argument("command", choices=["export"])
    parser.add_argument("--checkpoint", required=True, help="of train.py; or any SOURCE that train.py --init takes")
    parser.add_argument("--model", help="its architecture, where --checkpoint does not say it")
    parser.add_argument("--format", required=True, choices=["open_clip", "transformers", "timm"])
    parser.add_argument("--output", required=True, help="a new folder")
    args = parser.parse_args()
    try:
        call = export(CLIP.from_pretrained(args.checkpoint, args.model), args.format, args.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"model.py: {error}")
    print(f"wrote {args.output}; load it with\n    {call}")
