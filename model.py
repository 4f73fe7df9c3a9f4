"""CLIP and SigLIP in one file: a timm ViT, a text transformer, a tokenizer and the preprocessing.

    model = CLIP.load("out/nano/last.pt").eval()
    pictures = [Image.open(path).convert("RGB") for path in paths]
    images = torch.stack([model.transform(picture) for picture in pictures])  # (B, 3, S, S)
    image_features = model.encode_image(images, normalize=True)  # (B, D)
    text_features = model.encode_text(model.tokenize(texts), normalize=True)  # (N, D)
    cosines = image_features @ text_features.T  # (B, N)

What the weights do not say (activation, context length, preprocessing, tokenizer) is in CLIPConfig,
which travels in every checkpoint. The two families differ in few places, marked `siglip` below:

    clip    image: class token, norm before the blocks, head without bias
            text: causal, read at the end-of-text token, head without bias
    siglip  image: no class token, an attention pool, no head
            text: every position sees all others, read at the last one, head with bias

The second half of the file, behind a rule, reads and writes the weights of other projects:
CLIP.from_pretrained, export, and `python model.py export`. Nothing there is needed for training.
"""
import argparse
import hashlib
import html
import json
import math
import os
import re
import unicodedata
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter

if __name__ == "__main__":  # read here, as the imports below take seconds
    parser = argparse.ArgumentParser(
        description="Writes a new folder that open_clip, transformers or timm loads by itself.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("--checkpoint", required=True,
                        help="A checkpoint of train.py, or any source that train.py --init takes.")
    parser.add_argument("--model", help="Its architecture, where --checkpoint does not say it.")
    parser.add_argument("--format", required=True, choices=["open_clip", "transformers", "timm"],
                        help="Who is to load it. timm loads the image tower.")
    parser.add_argument("--output", required=True, help="A new folder.")
    args = parser.parse_args()

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import get_act_layer, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from tokenizers import Tokenizer as Backend
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision import transforms

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
CHOICES = {  # of the fields of CLIPConfig that are words
    "family": ("clip", "siglip"),
    "vision_act": ACTIVATIONS,
    "text_act": ACTIVATIONS,
    "resize": ("squash", "shortest"),
    "interpolation": ("bicubic", "bilinear"),
    "text_clean": ("lower", "canonicalize"),
}
LARGEST = {  # far above any model there is: a damaged config must not fill the memory
    "embed_dim": 2**14,
    "image_size": 2**13,
    "patch_size": 2**13,
    "vocab_size": 2**22,
    "context_length": 2**16,
}
LARGEST_TOWER = (2**14, 2**9, 2**10, 2**17)  # width, layers, heads, hidden units


@dataclass
class CLIPConfig:
    """All that is needed to build a model and to feed it. The defaults are those of nano."""

    name: str = "nano"
    family: str = "siglip"  # clip | siglip: decides the structure, see the top of this file
    embed_dim: int = 96  # D, of the space that images and texts share
    image_size: int = 32
    patch_size: int = 8
    vision: tuple = (96, 3, 3, 384)  # image tower: width, layers, heads, hidden units of each MLP
    text: tuple = (96, 3, 3, 384)  # text tower: the same
    vision_act: str = "gelu"  # gelu | gelu_tanh | quick_gelu: the wrong one costs accuracy silently
    text_act: str = "gelu"
    vocab_size: int = 1024
    context_length: int = 16
    logit_scale: float = math.log(20)  # initial value; exp(logit_scale) multiplies the cosines
    logit_bias: float | None = -10.0  # initial value; None: a softmax model, which has no bias
    resize: str = "squash"  # squash: both sides to S; shortest: the shorter to S, then a crop
    interpolation: str = "bicubic"  # bicubic | bilinear
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)
    text_clean: str = "canonicalize"  # lower | canonicalize: see clean_text
    pad_id: int = 0
    tokenizer: str = ""  # the whole text of a tokenizer.json

    def __post_init__(self):
        """Raises a ValueError for a field that no model can have."""
        def expect(field, holds, expected):
            if not holds:
                value = getattr(self, field)
                raise ValueError(f"CLIPConfig.{field} is {value!r:.100}, expected {expected}")

        for field in ("vision", "text", "mean", "std"):
            if isinstance(getattr(self, field), list):
                setattr(self, field, tuple(getattr(self, field)))  # json only knows lists
        for field, allowed in CHOICES.items():
            expect(field, getattr(self, field) in allowed, f"one of {', '.join(allowed)}")
        for field, largest in LARGEST.items():
            size = getattr(self, field)
            expect(field, is_size(size, largest), f"a whole number from 1 to {largest}")
        expect("patch_size", self.patch_size <= self.image_size,
               f"at most the {self.image_size} pixels of the image")
        for field in ("vision", "text"):
            expect(field, is_tower(getattr(self, field)),
                   "width (a multiple of the heads), layers, heads, hidden units: whole numbers "
                   f"from 1 to {LARGEST_TOWER}")
        expect("embed_dim", not self.siglip or self.embed_dim == self.vision[0],
               f"{self.vision[0]}, the width of the image tower, as a siglip has no head there")
        expect("mean", are_numbers(self.mean, 3), "three numbers")
        expect("std", are_numbers(self.std, 3) and 0 not in self.std, "three numbers, none 0")
        expect("logit_scale", are_numbers((self.logit_scale,), 1), "a number")
        expect("logit_bias", self.logit_bias is None or are_numbers((self.logit_bias,), 1),
               "a number or None")
        last = self.vocab_size - 1
        expect("pad_id", is_size(self.pad_id, last, 0), f"a whole number from 0 to {last}")
        for field in ("tokenizer", "name"):
            expect(field, isinstance(getattr(self, field), str), "text")

    @property
    def siglip(self):
        return self.family == "siglip"

    @property
    def norm_eps(self):
        return 1e-6 if self.siglip else 1e-5


def are_numbers(values, count):
    if not isinstance(values, tuple) or len(values) != count:
        return False
    return all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)


def is_size(value, largest, smallest=1):
    return type(value) is int and smallest <= value <= largest


def is_tower(value):
    if not isinstance(value, tuple) or len(value) != 4:
        return False
    sizes = all(is_size(size, largest) for size, largest in zip(value, LARGEST_TOWER))
    return sizes and value[0] % value[2] == 0


def mlp_ratio(width, hidden):
    """The ratio of which int(width * ratio), with which timm and open_clip build, is hidden.

    hidden / width may be the float below that: int(88 * (120 / 88)) is 119.
    """
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def clip_config(patch_size, image_size, vision, text, act="gelu"):
    """A CLIP as OpenAI published it (Radford et al. 2021). OpenAI's own weights need quick_gelu."""
    return CLIPConfig(
        family="clip", embed_dim=text[0], image_size=image_size, patch_size=patch_size,
        vision=vision, text=text, vision_act=act, text_act=act,
        vocab_size=49408, context_length=77, logit_scale=math.log(1 / 0.07), logit_bias=None,
        resize="shortest", mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711), text_clean="lower", pad_id=0)


def siglip_config(patch_size, image_size, tower):
    """A SigLIP (Zhai et al. 2023), whose two towers have one size."""
    return CLIPConfig(
        family="siglip", embed_dim=tower[0], image_size=image_size, patch_size=patch_size,
        vision=tower, text=tower, vocab_size=32000, context_length=64,
        logit_scale=math.log(10), logit_bias=-10.0, pad_id=1)


def siglip2_config(patch_size, image_size, tower, vision_act):
    """A SigLIP 2 (Tschannen et al. 2025): as before, with Gemma's tokenizer and another GELU."""
    config = siglip_config(patch_size, image_size, tower)
    return replace(config, vision_act=vision_act, text_act="gelu_tanh", vocab_size=256000, pad_id=0)


def scratch_config(patch_size, image_size, vision, text, siglip):
    """A small model of either family that has no released weights: to be trained from nothing."""
    return CLIPConfig(
        family="siglip" if siglip else "clip", embed_dim=text[0],
        image_size=image_size, patch_size=patch_size, vision=vision, text=text,
        vocab_size=4096, context_length=32, logit_scale=math.log(10 if siglip else 1 / 0.07),
        logit_bias=-10.0 if siglip else None)


SMALL = (512, 12, 8, 2048)  # towers: width, layers, heads, hidden units of each MLP
BASE = (768, 12, 12, 3072)
LARGE = (1024, 24, 16, 4096)
SO400M = (1152, 27, 16, 4304)
MODELS = {  # patch size, image size, towers, activation; ViT-...: by the names of open_clip
    "nano": CLIPConfig(),
    "nano-48": CLIPConfig(image_size=48),
    "micro": scratch_config(8, 48, (128, 4, 2, 512), (128, 3, 2, 512), siglip=False),
    "micro-siglip": scratch_config(8, 48, (128, 4, 2, 512), (128, 3, 2, 512), siglip=True),
    "small-112": scratch_config(16, 112, (384, 12, 6, 1536), (384, 6, 6, 1536), siglip=False),
    "small-112-siglip": scratch_config(16, 112, (384, 12, 6, 1536), (384, 6, 6, 1536), siglip=True),
    "ViT-B-32": clip_config(32, 224, BASE, SMALL),
    "ViT-B-32-quickgelu": clip_config(32, 224, BASE, SMALL, "quick_gelu"),
    "ViT-B-16": clip_config(16, 224, BASE, SMALL),
    "ViT-B-16-quickgelu": clip_config(16, 224, BASE, SMALL, "quick_gelu"),
    "ViT-L-14": clip_config(14, 224, LARGE, BASE),
    "ViT-L-14-336": clip_config(14, 336, LARGE, BASE),
    "ViT-L-14-quickgelu": clip_config(14, 224, LARGE, BASE, "quick_gelu"),
    "ViT-L-14-336-quickgelu": clip_config(14, 336, LARGE, BASE, "quick_gelu"),
    "ViT-B-16-SigLIP": siglip_config(16, 224, BASE),
    "ViT-B-16-SigLIP-256": siglip_config(16, 256, BASE),
    "ViT-B-16-SigLIP-384": siglip_config(16, 384, BASE),
    "ViT-B-16-SigLIP-512": siglip_config(16, 512, BASE),
    "ViT-L-16-SigLIP-256": siglip_config(16, 256, LARGE),
    "ViT-L-16-SigLIP-384": siglip_config(16, 384, LARGE),
    "ViT-SO400M-14-SigLIP-378": siglip_config(14, 378, SO400M),
    "ViT-SO400M-14-SigLIP-384": siglip_config(14, 384, SO400M),
    "ViT-B-32-SigLIP2-256": siglip2_config(32, 256, BASE, "gelu_tanh"),
    "ViT-B-16-SigLIP2": siglip2_config(16, 224, BASE, "gelu"),
    "ViT-B-16-SigLIP2-256": siglip2_config(16, 256, BASE, "gelu"),
    "ViT-B-16-SigLIP2-384": siglip2_config(16, 384, BASE, "gelu"),
    "ViT-B-16-SigLIP2-512": siglip2_config(16, 512, BASE, "gelu"),
    "ViT-L-16-SigLIP2-256": siglip2_config(16, 256, LARGE, "gelu"),
    "ViT-L-16-SigLIP2-384": siglip2_config(16, 384, LARGE, "gelu"),
    "ViT-L-16-SigLIP2-512": siglip2_config(16, 512, LARGE, "gelu_tanh"),
    "ViT-SO400M-14-SigLIP2": siglip2_config(14, 224, SO400M, "gelu"),
    "ViT-SO400M-14-SigLIP2-378": siglip2_config(14, 378, SO400M, "gelu"),
    "ViT-SO400M-16-SigLIP2-256": siglip2_config(16, 256, SO400M, "gelu_tanh"),
    "ViT-SO400M-16-SigLIP2-384": siglip2_config(16, 384, SO400M, "gelu_tanh"),
    "ViT-SO400M-16-SigLIP2-512": siglip2_config(16, 512, SO400M, "gelu_tanh"),
}
for model_name, model_config in MODELS.items():
    model_config.name = model_name


# -----------------------------------------------------------------------------
# The text tower. Its blocks are timm's, so that one table of renames serves both towers.


def run_blocks(blocks, x, checkpointing, mask=None):
    """x (B, L, C) through the blocks. With checkpointing the backward pass computes them again."""
    for block in blocks:
        if checkpointing:
            x = checkpoint(block, x, mask, use_reentrant=False)
        else:
            x = block(x, mask)
    return x


def last_block(block, x, row, mask=None):
    """One pre-norm block of timm's, computed only where its output is read.

    This is exact and saves most of the block: the other rows only give their keys and values.

    x (B, L, C), row (B,) int64: which of the L rows is read. mask (B, 1, 1, L) is added to its
    attention scores. Returns the rows' outputs (B, C), and the values of all rows (B, L, C), from
    which a class-token ViT makes its patch tokens.
    """
    B, L, C = x.shape
    heads = block.attn.num_heads
    weight, bias = block.attn.qkv.weight, block.attn.qkv.bias  # (3 C, C), (3 C,)
    batch = torch.arange(B, device=x.device)
    y = block.norm1(x)
    q = F.linear(y[batch, row], weight[:C], bias[:C])  # (B, C)
    k, v = F.linear(y, weight[C:], bias[C:]).chunk(2, -1)  # (B, L, C) each
    attended = F.scaled_dot_product_attention(
        q.view(B, heads, 1, C // heads),
        k.view(B, L, heads, C // heads).transpose(1, 2),  # (B, heads, L, C / heads)
        v.view(B, L, heads, C // heads).transpose(1, 2),
        attn_mask=mask,
    )  # (B, heads, 1, C / heads)
    z = x[batch, row] + block.attn.proj(attended.reshape(B, C))
    z = z + block.mlp(block.norm2(z))
    return z, v


class TextTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.siglip = config.siglip
        self.grad_checkpointing = False
        width, layers, heads, mlp = config.text
        norm_layer = partial(nn.LayerNorm, eps=config.norm_eps)
        act_layer = get_act_layer(config.text_act)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, width))
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            block = Block(width, heads, mlp_ratio=mlp_ratio(width, mlp), qkv_bias=True,
                          norm_layer=norm_layer, act_layer=act_layer)
            self.blocks.append(block)
        self.norm = norm_layer(width)
        self.head = nn.Linear(width, config.embed_dim, bias=self.siglip)
        self.init_weights(width, layers)

    def init_weights(self, width, layers):
        """The initialisation of OpenAI's CLIP: normal weights, biases of zero."""
        residual = (2 * width * layers) ** -0.5  # of what writes into the residual stream
        stds = {
            "token_embedding": 0.02,
            "pos_embed": 0.01,
            "qkv": width**-0.5,
            "proj": residual,
            "fc1": (2 * width) ** -0.5,
            "fc2": residual,
            "head": width**-0.5,
        }
        for name, parameter in self.named_parameters():
            layer = name.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
            if layer not in stds:
                continue  # a norm, which keeps its ones and zeros
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=stds[layer])
            else:
                nn.init.zeros_(parameter)

    def forward(self, tokens, return_tokens=False):
        """tokens (N, L) int64 -> features (N, D), and with return_tokens the outputs of all
        tokens (N, L, D), otherwise None.

        A causal model accepts any L that holds every end-of-text token; a SigLIP only its own.
        """
        N, L = tokens.shape
        if self.siglip and L != len(self.pos_embed):
            raise ValueError(
                f"SigLIP text must be padded to {len(self.pos_embed)} tokens, got {L}: "
                "it sees the pads")
        x = self.token_embedding(tokens) + self.pos_embed[:L]  # (N, L, C)
        if self.siglip:
            row = torch.full((N,), L - 1, device=tokens.device)
            causal = None
        else:
            # The end-of-text token has the highest id. The first one counts, whatever the padding.
            row = tokens.argmax(-1)
            causal = x.new_full((L, L), -math.inf).triu(1)
        checkpointing = self.grad_checkpointing and self.training
        x = run_blocks(self.blocks[:-1], x, checkpointing, causal)  # (N, L, C)
        if return_tokens:
            x = run_blocks(self.blocks[-1:], x, checkpointing, causal)
            x = self.head(self.norm(x))  # (N, L, D)
            return x[torch.arange(N, device=x.device), row], x
        mask = None if self.siglip else causal[row][:, None, None]  # (N, 1, 1, L)
        x, _ = last_block(self.blocks[-1], x, row, mask)  # (N, C)
        return self.head(self.norm(x)), None  # a norm acts on each row, so it may follow the choice


# -----------------------------------------------------------------------------
# The model


class CLIP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width, layers, heads, mlp = config.vision
        self.visual = VisionTransformer(
            img_size=config.image_size, patch_size=config.patch_size,
            embed_dim=width, depth=layers, num_heads=heads, mlp_ratio=mlp_ratio(width, mlp),
            act_layer=get_act_layer(config.vision_act),
            norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
            class_token=not config.siglip, pre_norm=not config.siglip,
            global_pool="map" if config.siglip else "token", num_classes=0)
        if not config.siglip:  # timm's own head would have a bias
            self.visual.head = nn.Linear(width, config.embed_dim, bias=False)
            nn.init.normal_(self.visual.head.weight, std=width**-0.5)
        self.text = TextTransformer(config)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale)))
        self.logit_bias = None
        if config.logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias)))
        self.tokenize = Tokenizer(config)
        self.transform = image_transform(config)

    def encode_image(self, images, normalize=False, return_tokens=False):
        """images (B, 3, S, S), as model.transform makes them -> image_features (B, D).

        With return_tokens also patch_tokens (B, T, D): for each patch a vector in the space that
        images and texts share. It is made of the patch's value in the last attention alone, without
        a query, so that this layer does not mix the patches.
            siglip: what the attention pool gives for one patch alone (C2LIP, section 3.3)
            clip:   head(norm(proj(value))) of the last block
        normalize makes all of them unit vectors.
        """
        vit = self.visual
        x = vit.patch_embed(images)  # (B, T, C)
        x = vit.norm_pre(vit._pos_embed(x))  # (B, T, C); clip: (B, 1 + T, C), class token first
        if self.config.siglip:
            features, tokens = self._siglip_features(x, return_tokens)
        else:
            features, tokens = self._clip_features(x, return_tokens)
        if normalize:
            features = unit(features)
        if not return_tokens:
            return features
        if normalize:
            tokens = unit(tokens)
        return features, tokens

    def _siglip_features(self, x, return_tokens):
        """x (B, T, C) before the blocks -> pooled (B, C), tokens (B, T, C) or None; C is D."""
        vit = self.visual
        C = x.shape[-1]
        x = run_blocks(vit.blocks, x, vit.grad_checkpointing and self.training)
        x = vit.norm(x)
        pool = vit.attn_pool
        features = pool(x)  # (B, C)
        if not return_tokens:
            return features, None
        values = F.linear(x, pool.kv.weight[C:], pool.kv.bias[C:])  # (B, T, C)
        tokens = pool.proj(values)
        tokens = tokens + pool.mlp(pool.norm(tokens))  # as the pool goes on after its attention
        return features, tokens

    def _clip_features(self, x, return_tokens):
        """x (B, 1 + T, C) before the blocks -> the class token (B, D), tokens (B, T, D) or None."""
        vit = self.visual
        x = run_blocks(vit.blocks[:-1], x, vit.grad_checkpointing and self.training)
        class_row = x.new_zeros(len(x), dtype=torch.long)
        y, values = last_block(vit.blocks[-1], x, class_row)  # (B, C), (B, 1 + T, C)
        features = vit.head(vit.norm(y))  # (B, D)
        if not return_tokens:
            return features, None
        tokens = vit.blocks[-1].attn.proj(values[:, 1:])  # (B, T, C)
        return features, vit.head(vit.norm(tokens))

    def encode_text(self, tokens, normalize=False, return_tokens=False):
        """tokens (N, L) int64, as model.tokenize makes them -> text_features (N, D).

        With return_tokens also the outputs of all tokens (N, L, D), never normalised: what each
        would give in the place of the one that is read.
        """
        features, outputs = self.text(tokens, return_tokens)
        if normalize:
            features = unit(features)
        return (features, outputs) if return_tokens else features

    def forward(self, images, tokens, spans=None, negative_images=None, return_patches=False,
                return_words=False, **more_tokens):
        """One pass through both towers: DistributedDataParallel must see all parameters in one.

        images, negative_images (B, 3, S, S), tokens (B, L) int64: the captions
        spans           (B, M, 2) int64: phrases as tokens [first, end) of their caption, which give
                        concept_features (B M, D); (0, 0) is padding, whose features mean nothing
        return_patches  patch_tokens (B, T, D) as well
        return_words    word_features (B, 1 + K, L, D) as well: the outputs of all tokens of a
                        caption and of its negative_tokens (B, K, L), which have the same L
        more_tokens     any NAME_tokens (..., L') int64, which give NAME_features (..., D)
        Returns a dict; all features are unit vectors.
            logit_scale (a factor, no logarithm), logit_bias (or None)
            image_features (B, D), negative_image_features (B, D), text_features (B, D)
            and what is named above
        """
        out = {"logit_scale": self.logit_scale.exp(), "logit_bias": self.logit_bias}
        if return_patches:
            features = self.encode_image(images, True, return_tokens=True)
            out["image_features"], out["patch_tokens"] = features
        else:
            out["image_features"] = self.encode_image(images, True)
        if negative_images is not None:
            out["negative_image_features"] = self.encode_image(negative_images, True)
        if return_words or spans is not None:
            out["text_features"], outputs = self.encode_text(tokens, True, return_tokens=True)
        else:
            out["text_features"] = self.encode_text(tokens, True)
        if spans is not None:
            out["concept_features"] = span_features(outputs, spans)
        if return_words:
            negatives = more_tokens.pop("negative_tokens")
            features, words = self.encode_text(negatives.flatten(0, 1), True, return_tokens=True)
            out["negative_features"] = features.unflatten(0, negatives.shape[:2])
            words = words.unflatten(0, negatives.shape[:2])  # (B, K, L, D)
            out["word_features"] = unit(torch.cat([outputs[:, None], words], dim=1))
        for name, texts in more_tokens.items():
            features = self.encode_text(texts.flatten(0, -2), True)
            out[name.replace("_tokens", "_features")] = features.unflatten(0, texts.shape[:-1])
        return out

    def checkpoint(self):
        """What CLIP.load needs, in plain types and tensors. The digest tells later damage."""
        fields, state = asdict(self.config), self.state_dict()
        return {"config": fields, "model": state, "digest": digest(fields, state)}

    @classmethod
    def load(cls, path):
        """A ready model (float32, on the CPU) from a checkpoint of train.py.

        Raises ValueError for any other file.
        """
        config = None
        if os.path.isfile(path):
            state, config, intact = read_weights(str(path))
        if config is None:
            inside = os.path.join(path, "last.pt")
            if os.path.isfile(inside):
                raise ValueError(f"{path} is the folder of a run: give {inside}")
            raise ValueError(f"no checkpoint at {path} that train.py wrote "
                             "(--init reads weights of other projects)")
        return build(cls, config, state, intact, path)

    @classmethod
    def from_pretrained(cls, source=None, model=None, image_size=None):
        """A ready model (float32, on the CPU) from released weights. Raises ValueError.

        source      a hub id; a folder as open_clip or transformers write it; one file of open_clip,
                    transformers, OpenAI or this project; None: the default source of `model`.
                    Activation, preprocessing and tokenizer come from its config.
        model       a name in MODELS: needed for a file without a config. Elsewhere the source must
                    agree with its structure, and if it ends in -quickgelu with its activation.
        image_size  if another is wanted; position embeddings are resampled, with a warning.
        """
        if model is not None and model not in MODELS:
            raise ValueError(f"no model {model!r}: expected one of {', '.join(MODELS)}")
        source = str(source or SOURCES.get(model, ""))
        if not source:
            raise ValueError(f"no released weights are known for model {model}: "
                             "give a hub id, a folder or a file, or begin without any "
                             "(train.py --init scratch)")
        if os.path.isfile(source):
            state, config, intact = read_weights(source)
        else:
            config, path = read_folder(source)
            state, _, intact = read_weights(path)
        if config is None:
            config = config_of_bare_file(state, source, model)
        elif model is not None:
            config = config_as_named(config, source, model)
        if image_size is not None:
            config = replace(config, image_size=image_size)
        return build(cls, config, state, intact, source)


def digest(fields, state):
    """sha256 of a checkpoint's config and weights, in hex: half a second for a ViT-B/16."""
    sha = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def unit(x):
    """x / |x| along the last dimension, in float32 (or float64).

    On a GPU autocast makes it float32 by itself, on a CPU it would be bfloat16: eight bits are not
    enough for cosines that are multiplied by 100.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(x, dim=-1)


def no_decay(name, parameter):
    """Whether weight decay should pass over a parameter of CLIP, as in open_clip's trainer.

    These are the vectors: biases, norms, logit_scale, logit_bias, and the class token, which is a
    vector in open_clip but (1, 1, C) in timm. Position embeddings decay in both.
    """
    return parameter.ndim < 2 or name.endswith("cls_token")


def span_features(outputs, spans):
    """outputs (B, L, D) of a caption's tokens, spans (B, M, 2) -> their unit means (B M, D)."""
    position = torch.arange(outputs.shape[1], device=outputs.device)  # (L,)
    first, end = spans[..., :1], spans[..., 1:]  # (B, M, 1) each
    inside = (first <= position) & (position < end)  # (B, M, L)
    # The sum is the mean but for its length. The padding (0, 0) gives zeros.
    sums = inside.to(outputs.dtype) @ outputs  # (B, M, D)
    return unit(sums.flatten(0, 1))


# -----------------------------------------------------------------------------
# What goes in: texts and images

def plain_signs():
    """The table {sign: what open_clip's cleaning (by ftfy) makes of it} for str.translate."""
    table = {}
    table.update(dict.fromkeys("‘’‚‛ʼ", "'"))
    table.update(dict.fromkeys("“”„‟", '"'))
    ligatures = "ĲĳǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ"
    full_width = "".join(map(chr, range(0xFF01, 0xFFF0)))  # and half-width: as Japanese fonts have
    for sign in ligatures + full_width:
        table[sign] = unicodedata.normalize("NFKC", sign)
    table.update({"ŉ": "'n", "ﬅ": "ſt"})
    unseen = (range(0x09), range(0x0E, 0x20), range(0x206A, 0x2070), range(0xFFF9, 0xFFFD))
    for codes in (*unseen, (0x0B, 0x7F, 0xFEFF)):
        table.update(dict.fromkeys(map(chr, codes)))  # None: left out
    return str.maketrans(table)


PLAIN = plain_signs()


def clean_text(text, how):
    """The text as the released weights saw it in their training.

    how: "lower" (CLIP) makes lower case and single spaces; "canonicalize" (SigLIP) also removes
    punctuation. Equal to open_clip's for any sign, except that broken encodings (U+0080 to U+009F
    among them) are not repaired.
    """
    text = html.unescape(html.unescape(text))
    text = unicodedata.normalize("NFC", text.translate(PLAIN))
    if how == "canonicalize":
        text = text.replace("_", " ")
        text = re.sub(r"[!-/:-@\[-`{-~]", "", text)
    return " ".join(text.lower().split())


class Tokenizer:
    """Texts -> token ids, from any tokenizer.json that adds its own end-of-text token."""

    def __init__(self, config):
        self.config = config
        self.backend = None
        if not config.tokenizer:
            return
        self.backend = parse_tokenizer(config.tokenizer, config.context_length)
        size = self.backend.get_vocab_size()
        if size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {size} tokens, the model embeds {config.vocab_size}: "
                "give its own")

    def encode(self, texts):
        """list of str -> list of tokenizers.Encoding, cleaned and cut to the context length."""
        if self.backend is None:
            raise ValueError(f"this model has no tokenizer: {tokenizer_help(self.config.name)}")
        texts = list(texts)  # a generator can be read once only
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"expected a list of texts (str), got {text!r:.80} among them")
        cleaned = [clean_text(text, self.config.text_clean) for text in texts]
        with tokenizer_errors("the model's tokenizer fails"):
            return self.backend.encode_batch(cleaned)

    def __call__(self, texts, trim=False):
        """list of N str -> LongTensor (N, context_length).

        trim cuts a causal model's batch behind its longest text: (N, L). This is exact there, as
        nothing behind the end-of-text token is seen. L is rounded up to a multiple of 8, so that
        torch.compile meets few lengths. It does nothing for a SigLIP.
        """
        if isinstance(texts, str):
            texts = [texts]
        rows = [encoding.ids for encoding in self.encode(texts)]
        length = self.config.context_length
        if trim and rows and not self.config.siglip:
            longest = max(len(ids) for ids in rows)
            length = min(length, math.ceil(longest / 8) * 8)
        padded = [ids + [self.config.pad_id] * (length - len(ids)) for ids in rows]
        tokens = torch.tensor(padded, dtype=torch.long).view(-1, length)
        if tokens.numel() and tokens.max() >= self.config.vocab_size:
            raise ValueError(f"the tokenizer gives id {tokens.max()}, the model embeds "
                             f"{self.config.vocab_size} tokens: give its own")
        return tokens

    def word_mask(self, texts, length):
        """Which of the tokens of N texts are theirs: (N, length) bool.

        Not the padding, nor a start of text, whose output is that of any text in a causal model.
        The end of text is among them.
        """
        mask = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, encoding in enumerate(self.encode(texts)):
            has_start = len(encoding.ids) > 1 and encoding.special_tokens_mask[0]
            mask[row, int(has_start):len(encoding.ids)] = True
        return mask

    def spans(self, text, phrases):
        """For each phrase the tokens [(first, end)] of the text where it first stands as words.

        A phrase that is not in the text, or that the context length cuts, gets all of the text's
        tokens except the special ones.
        """
        encoding = self.encode([text])[0]
        offsets = encoding.offsets  # (first, end) character of each token in the cleaned text
        special = encoding.special_tokens_mask
        words = [i for i in range(len(special)) if not special[i]] or [0]  # of no text
        cleaned = clean_text(text, self.config.text_clean)
        spans = []
        for phrase in phrases:
            pattern = r"(?<!\w)" + re.escape(clean_text(phrase, self.config.text_clean))
            match = re.search(rf"{pattern}(?!\w)", cleaned)
            if not match:  # "a man" of "a man's back", of which canonicalize makes "mans"
                match = re.search(rf"{pattern}s(?!\w)", cleaned)
            start, end = match.span() if match else (0, 0)
            inside = [i for i in words if offsets[i][0] < end and offsets[i][1] > start]
            if not inside or offsets[inside[-1]][1] < end:
                inside = words
            spans.append((inside[0], inside[-1] + 1))
        return spans


def first_line(error):
    """What a library's error says, cut to one line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0]


@contextmanager
def tokenizer_errors(what):
    """Makes a ValueError of one line of whatever the tokenizers library raises.

    It raises Exception itself, and where its Rust code panics a BaseException.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # a class that cannot be imported
        if not isinstance(error, Exception) and not panic:
            raise  # a signal
        raise ValueError(f"{what} ({first_line(error)})") from None


def parse_tokenizer(text, context_length):
    """The text of a tokenizer.json -> tokenizers.Tokenizer that cuts and does not pad.

    Raises ValueError, also for what would only fail at the first text.
    """
    with tokenizer_errors("this is not a tokenizer"):
        backend = Backend.from_str(text)
        backend.no_padding()
        backend.enable_truncation(context_length)  # keeps the end-of-text token
        backend.encode("a photo, 2 dogs")
        special = backend.encode("").ids
    if not special:
        raise ValueError("this tokenizer adds no end-of-text token")
    return backend


def read_tokenizer(path):
    """The text of a tokenizer.json, for CLIPConfig.tokenizer. Raises ValueError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        parse_tokenizer(text, 512)
        return text
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a tokenizer ({error}): expected a tokenizer.json "
                         "as the hub has it") from None


def set_tokenizer(model, path):
    """Gives the model the tokenizer of a file, and returns the model. Raises ValueError."""
    model.config.tokenizer = read_tokenizer(path)
    model.tokenize = Tokenizer(model.config)
    return model


def to_rgb(image):
    """The image in 8 bits. ValueError for one of 16 or 32, which pillow would make white."""
    if image.mode[0] in "IF":
        raise ValueError(f"an image of mode {image.mode} would lose what is above 255: "
                         "give it in 8 bits, as data.load_image does")
    return image.convert("RGB")


def image_transform(config):
    """PIL image -> (3, S, S) float32: open_clip's transform for evaluation, bit by bit.

    As open_clip it drops transparency and shows what was hidden, and it resizes an image that has a
    palette without smoothing. data.load_image puts white beneath first, as transformers' processors
    do, and gives RGB, whatever the file holds.
    """
    size = config.image_size
    interpolation = transforms.InterpolationMode(config.interpolation)
    resize = (size, size) if config.resize == "squash" else size
    return transforms.Compose([
        transforms.Resize(resize, interpolation),
        transforms.CenterCrop(size),
        to_rgb,
        transforms.ToTensor(),
        transforms.Normalize(config.mean, config.std),
    ])


# =============================================================================
# Weights of other projects, in and out. Nothing below is needed to understand or train a model.
#
# What a tensor is called depends on the project and on the family, its layout: "open_clip clip".
# RENAMES and MARKS are tables of that; fill reads by them, renamed writes. What a config says is
# read by read_open_clip and read_transformers, and written by write_open_clip, write_transformers
# and write_timm, each to be read beside the documentation of that project.

FILES = {  # of a folder: the config, the weights, the weights in the older format
    "open_clip":
        ("open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "transformers": ("config.json", "model.safetensors", "pytorch_model.bin"),
}
WANTED = " or ".join(f"{config} and {new} (or {old})" for config, new, old in FILES.values())


def timm_name(config):
    """What timm calls the image tower of a named model."""
    size = {BASE: "base", LARGE: "large", SO400M: "so400m"}[config.vision]
    return f"vit_{size}_patch{config.patch_size}_{config.family}_{config.image_size}"


SOURCES = {}  # {name in MODELS: hub id of its weights}; a CLIP's are OpenAI's
TOWERS = {}  # {timm's name: a named SigLIP with this image tower}
for model_name, model_config in MODELS.items():
    if not model_name.startswith("ViT-"):
        continue  # trained from nothing
    if model_config.family == "clip":
        SOURCES[model_name] = f"timm/{timm_name(model_config)}.openai"
    else:
        SOURCES[model_name] = f"timm/{model_name}"
        TOWERS[timm_name(model_config)] = model_config


# -----------------------------------------------------------------------------
# Names of tensors

# For each layout: parts of our names, and what stands there in theirs, replaced in this order.
# {qkv} makes three tensors of one; two of ours that get the same name become one.
OPEN_CLIP_BLOCK = {
    ".blocks.": ".transformer.resblocks.",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attn.qkv.": ".attn.in_proj_",
    ".attn.proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".pos_embed": ".positional_embedding",
}
TRANSFORMERS_BOTH = {
    "visual.norm.": "visual.post_layernorm.",
    "visual.": "vision_model.",
    "text.norm.": "text.final_layer_norm.",
    "text.": "text_model.",
    ".blocks.": ".encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.{qkv}_proj.",
    ".attn.proj.": ".self_attn.out_proj.",
    ".patch_embed.proj.": ".embeddings.patch_embedding.",
    ".token_embedding.": ".embeddings.token_embedding.",
    ".pos_embed": ".embeddings.position_embedding.weight",
}
RENAMES = {
    "this project clip": {},
    "this project siglip": {},
    "open_clip clip": {
        "visual.norm.": "visual.ln_post.",
        "visual.norm_pre.": "visual.ln_pre.",
        "visual.patch_embed.proj.": "visual.conv1.",
        "visual.cls_token": "visual.class_embedding",
        "visual.head.weight": "visual.proj",
        "text.norm.": "ln_final.",
        "text.head.weight": "text_projection",
        **OPEN_CLIP_BLOCK,
        "text.": "",
    },
    "open_clip siglip": {  # only of the text tower: the other is timm's there, too
        "text.norm.": "text.ln_final.",
        "text.head.": "text.text_projection.",
        **OPEN_CLIP_BLOCK,
    },
    "transformers clip": {
        "visual.head.": "visual_projection.",
        "visual.norm_pre.": "visual.pre_layrnorm.",  # so it is spelt there
        "visual.cls_token": "visual.embeddings.class_embedding",
        "text.head.": "text_projection.",
        **TRANSFORMERS_BOTH,
    },
    "transformers siglip": {
        ".attn_pool.latent": ".head.probe",
        ".attn_pool.q.": ".head.attention.in_proj_",
        ".attn_pool.kv.": ".head.attention.in_proj_",
        ".attn_pool.proj.": ".head.attention.out_proj.",
        ".attn_pool.norm.": ".head.layernorm.",
        ".attn_pool.": ".head.",
        **TRANSFORMERS_BOTH,
    },
}
MARKS = {  # a tensor that only this layout has
    "this project clip": "visual.cls_token",
    "this project siglip": "visual.attn_pool.latent",
    "open_clip clip": "visual.class_embedding",
    "open_clip siglip": "visual.trunk.attn_pool.latent",
    "transformers clip": "vision_model.embeddings.class_embedding",
    "transformers siglip": "vision_model.head.probe",
}
POSITIONS = (  # of the image tower
    "visual.pos_embed", "visual.positional_embedding", "visual.trunk.pos_embed",
    "vision_model.embeddings.position_embedding.weight")
NO_WEIGHTS = ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")


def named_as(model, layout):
    """{name in the layout: [our tensors]}: in the layout's shape, but in our memory.

    Copying into them loads a model. Several tensors of ours are the rows of one of theirs.
    """
    named = {}
    for name, tensor in model.state_dict().items():
        theirs = name
        if layout == "open_clip siglip" and name.startswith("visual."):
            theirs = name.replace("visual.", "visual.trunk.")
        else:
            for ours, other in RENAMES[layout].items():
                theirs = theirs.replace(ours, other)
        if theirs in ("visual.proj", "text_projection"):
            tensor = tensor.T  # x @ W there, Linear here
        elif name == "visual.cls_token" and theirs.endswith("class_embedding"):
            tensor = tensor[0, 0]  # (1, 1, C) -> (C,)
        elif name == "visual.pos_embed" and "position" in theirs:
            tensor = tensor[0]  # (1, T, C) -> (T, C)
        elif tensor.ndim == 0 and layout == "transformers siglip":
            tensor = tensor.view(1)
        if "{qkv}" in theirs:
            for letter, third in zip("qkv", tensor.chunk(3)):
                named[theirs.replace("{qkv}", letter)] = [third]
        else:
            named.setdefault(theirs, []).append(tensor)
    return named


def renamed(model, layout):
    """{name in the layout: tensor}, ready to be saved."""
    return {name: joined(parts) for name, parts in named_as(model, layout).items()}


def joined(parts):
    """The tensor of which our tensors are the rows, one after the other."""
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def find_layout(state, source):
    for layout, mark in MARKS.items():
        if mark in state:
            return layout
    raise ValueError(
        f"{source} has none of the formats open_clip, OpenAI, transformers (CLIPModel, "
        f"SiglipModel), this project: its names are {', '.join(list(state)[:3])}, ...")


def build(cls, config, state, intact, source):
    """A model of the config with the weights. Raises ValueError, whatever is wrong with either."""
    try:
        model = cls(config)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{source}: {error}") from None
    fill(model, state, source)  # first, as it knows more of what is wrong
    if not intact:
        raise ValueError(f"{source} is damaged: its weights or its config are not those that were "
                         "saved (their sha256 differs). Take another checkpoint")
    return model


def fill(model, state, source):
    """Copies weights in any layout into the model.

    It is strict: a tensor that is missing, unexpected or of another shape is a ValueError.
    """
    config = model.config
    layout = find_layout(state, source)
    if layout.split()[-1] != config.family:
        raise ValueError(f"{source} holds weights in the format of {layout}, "
                         f"but {config.name} is a {config.family}")
    named = named_as(model, layout)
    state = {k: x for k, x in state.items() if k.split(".")[-1] not in NO_WEIGHTS}
    other_shape = []
    for name, parts in named.items():
        if name not in state:
            continue
        tensor = state[name]
        check_finite(tensor, name, source)
        shape = joined(parts).shape
        if name in POSITIONS and tensor.shape != shape and tensor.shape[-1:] == shape[-1:]:
            tensor = resample_positions(tensor, shape, config, source)
        if tensor.shape != shape and not tensor.numel() == shape.numel() == 1:
            other_shape.append(f"{name} {list(tensor.shape)} for {list(shape)}")
        elif len(parts) == 1:
            parts[0].copy_(tensor.reshape(shape))
        else:
            for part, rows in zip(parts, tensor.split([len(part) for part in parts])):
                part.copy_(rows)

    misfits = (  # the first kind tells most of the cause
        ("of another shape", other_shape, "weights of another model or size"),
        ("unexpected", sorted(state.keys() - named.keys()), "parts that this architecture lacks"),
        ("missing", sorted(named.keys() - state.keys()), "half a file"))
    counts, causes = [], []
    for kind, names, cause in misfits:
        if names:
            more = ", ..." if len(names) > 3 else ""
            counts.append(f"{len(names)} {kind} ({', '.join(names[:3])}{more})")
            causes.append(cause)
    if counts:
        raise ValueError(f"{source} does not fit {config.name}: {'; '.join(counts)}. "
                         f"It was read as {layout}; likely {causes[0]}")


def check_finite(tensor, name, source):
    """Raises a ValueError for a tensor that is no weight: not of floats, or NaN among them."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise ValueError(f"{source}: {name} is {tensor.dtype} ({tensor.layout}), expected a dense "
                         "tensor of floats: another file, or a damaged one")
    # The sum alone is fast and needs no memory; it may overflow where every number is finite.
    if tensor.sum(dtype=torch.float32).isfinite():
        return
    bad = (~tensor.float().isfinite()).sum().item()
    if bad:
        raise ValueError(f"{source}: {name} has {bad} of {tensor.numel()} values that are NaN or "
                         "infinite: the training went wrong or the file is damaged")


def resample_positions(tensor, shape, config, source):
    """Position embeddings of a square of patches -> those of another square, of the given shape."""
    prefix = 1 if config.family == "clip" else 0  # the class token has a position, too
    patches = tensor.shape[-2] - prefix if tensor.ndim == len(shape) else 0
    old = math.isqrt(max(patches, 0))
    new = math.isqrt(shape[-2] - prefix)
    if patches < 1 or old * old != patches:
        return tensor  # no square: fill says that the shape is wrong
    warnings.warn(f"{source}: position embeddings resampled from {old} x {old} "
                  f"to {new} x {new} patches")
    tensor = tensor.float().reshape(1, -1, shape[-1])
    return resample_abs_pos_embed(tensor, [new, new], num_prefix_tokens=prefix).view(shape)


# -----------------------------------------------------------------------------
# In: files, folders, the hub


def read_weights(path):
    """What a file of weights holds, see unpack. Runs no code of the file. Raises ValueError."""
    try:
        if path.endswith(".safetensors"):
            return unpack(load_file(path))
        return unpack(torch.load(path, "cpu", weights_only=True))
    except Unsupported as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error).split('. ')[0]}"
        if "TorchScript" in str(error):
            why = ("a TorchScript archive holds code; take the safetensors of "
                   f"{SOURCES['ViT-B-32']} on the hub")
        raise ValueError(
            f"{path} holds no readable weights ({why}): expected .safetensors, .bin or .pt of "
            "open_clip, transformers, OpenAI or this project") from None


def unpack(saved):
    """(state dict in its own layout, CLIPConfig, whether both are as they were saved).

    Only files of this project have a config and can tell the third; others give None and True.
    """
    if "config" not in saved or "model" not in saved:
        return plain_names(saved.get("state_dict", saved)), None, True
    fields = dict(saved["config"])
    variant = fields.pop("value_tokens", "A")  # earlier versions had more kinds of patch tokens
    if variant != "A":
        raise Unsupported(f"value_tokens is {variant!r}, but this code can only do 'A'")
    unknown = fields.keys() - CLIPConfig.__dataclass_fields__
    if unknown:
        raise Unsupported(f"its config has {', '.join(sorted(unknown))}, which this version of the "
                          "code does not know: was it written by a newer one?")
    try:
        config = CLIPConfig(**fields)
    except ValueError as error:
        raise Unsupported(str(error)) from None
    state = plain_names(saved["model"])
    expected = saved.get("digest")  # earlier versions wrote none
    return state, config, expected is None or digest(fields, state) == expected


def plain_names(saved):
    """The tensors in a state dict, without what wrappers put before their names."""
    state = {}
    for name, tensor in saved.items():
        if torch.is_tensor(tensor):
            if not name.isprintable():
                raise ValueError(f"a tensor is called {name!r}")
            name = name.replace("_orig_mod.", "")  # torch.compile
            state[name.removeprefix("module.")] = tensor  # DistributedDataParallel
    if "visual.class_embedding" in state:  # open_clip's CustomTextCLIP: a CLIP all the same
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    return state


def config_of_bare_file(state, source, model):
    """The config of a named model, with its tokenizer, for weights in a file without one."""
    if model is None:
        raise ValueError(f"{source} does not tell its architecture: name it (--model), "
                         "or give its folder")
    config = MODELS[model]
    quick = MODELS.get(model + "-quickgelu", config)
    if "input_resolution" in state:  # only OpenAI's own files have this
        config = quick
    elif config is not quick:
        warnings.warn(f"{source} is loaded with the exact GELU; "
                      f"OpenAI's and DFN's need {quick.name}")
    return replace(config, tokenizer=released_tokenizer(model))


def released_tokenizer(model):
    """The text of the tokenizer.json of a named model's default source, or "" and a warning."""
    hub = SOURCES.get(model)
    if hub is None:
        return ""
    try:
        names, path_of = find_source(hub)
        if "tokenizer.json" in names:
            return read_tokenizer(path_of("tokenizer.json"))
        why = f"{hub} has no tokenizer.json"
    except (ValueError, OSError):
        why = "the hub cannot be reached"
    warnings.warn(f"{model} has no tokenizer yet, as {why}: {tokenizer_help(model)}")
    return ""


def tokenizer_help(model):
    """The end of a message: how to give a model its tokenizer, and where that of a name is."""
    where = ""
    if model in SOURCES:
        where = f", that of https://huggingface.co/{SOURCES[model]}/blob/main/tokenizer.json"
    return f"set_tokenizer(model, path), or --tokenizer, gives it one{where}"


STRUCTURE = (  # what a source must have in common with the model that it is said to be
    "family", "embed_dim", "patch_size", "vision", "text", "vocab_size", "context_length")


def config_as_named(config, source, model):
    """The config of a source, which must be the named model's, under that name and at its size."""
    if config.name == model:
        return config
    named = MODELS[model]
    fields = (*STRUCTURE, "vision_act") if "quickgelu" in model else STRUCTURE
    differ = []
    for field in fields:
        value, expected = getattr(config, field), getattr(named, field)
        if value != expected:
            differ.append(f"{field} {value}, not {expected}")
    if differ:
        raise ValueError(f"{source} is no {model}: it has {'; '.join(differ)}. "
                         "Leave out the model's name")
    return replace(config, name=model, image_size=named.image_size)


def find_source(source):
    """(names of the files in a folder or hub repository, a function from a name to its path).

    Without a network: the hub's files that are in its cache on this machine.
    """
    if os.path.isdir(source):
        return os.listdir(source), partial(os.path.join, source)
    source = source.removeprefix("hf-hub:")
    is_file = source.endswith((".pt", ".bin", ".safetensors"))
    if source in MODELS:
        loads = f", which loads {SOURCES[source]}" if source in SOURCES else ""
        raise ValueError(
            f"{source} is the name of a model, not of weights: give it as --model{loads}")
    if source.count("/") != 1 or source[0] in "./~" or is_file:
        raise ValueError(f"{source}: no such file or folder, nor a hub id (owner/name)")
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    try:  # one question of our own: without a network, a download would retry for 20 seconds
        repository = HfApi().model_info(source, timeout=3)
        names = [file.rfilename for file in repository.siblings]
        return names, partial(hf_hub_download, source)
    except Exception as error:
        why = type(error).__name__
    try:
        folder = snapshot_download(source, local_files_only=True)
    except OSError:  # not in the cache either
        raise ValueError(
            f"{source} is not here, the hub cannot be reached or refuses ({why}): put {WANTED}, "
            "tokenizer.json, tokenizer_config.json, preprocessor_config.json of "
            f"https://huggingface.co/{source} into a folder, and give that") from None
    return find_source(folder)


def read_folder(source):
    """(CLIPConfig, path of the weights) of a folder or hub repository.

    It must be laid out as open_clip or as transformers write it. Raises ValueError.
    """
    names, path_of = find_source(source)
    project, config_name, weights_name = find_files(names, source)

    def read(name):
        if name not in names:
            return {}
        with open(path_of(name), encoding="utf-8") as file:
            return json.load(file)

    try:
        content = read(config_name)
        if project == "open_clip":
            config = read_open_clip(content)
        elif "preprocessor_config.json" in names:
            config = read_transformers(content, read("preprocessor_config.json"))
        else:
            processor = read("processor_config.json")
            config = read_transformers(content, get(processor, "image_processor", {}))
        pad_token = read("tokenizer_config.json").get("pad_token")
    except Exception as error:
        why = f" ({type(error).__name__}: {error})"
        if isinstance(error, Unsupported):
            why = f": {error}"
            if project == "open_clip":
                why += ". evaluate.py --init open_clip:NAME/PRETRAINED evaluates what it can build"
        raise ValueError(f"{source}: this code cannot build {config_name}{why}") from None
    config.name = os.path.basename(source.rstrip("/"))
    if "tokenizer.json" in names:
        config.tokenizer = read_tokenizer(path_of("tokenizer.json"))
        if config.siglip:
            config.pad_id = find_pad(config, pad_token)
    else:
        warnings.warn(f"{source} has no tokenizer.json; {tokenizer_help(config.name)}")
    return config, path_of(weights_name)


def find_files(names, source):
    """(project, name of the config, name of the weights) among the names of a folder's files."""
    for project, (config, new, old) in FILES.items():
        for weights in (new, old):
            if config in names and weights in names:
                return project, config, weights
    if "last.pt" in names:
        raise ValueError(f"{source} is the folder of a run: give {os.path.join(source, 'last.pt')}")
    raise ValueError(f"{source} lacks {WANTED}")


def find_pad(config, pad_token):
    """The id of a SigLIP's pad. It attends to its pads: they must be those of the training.

    pad_token: as tokenizer_config.json has it, a str or {"content": str}, or None.
    """
    if isinstance(pad_token, dict):
        pad_token = pad_token.get("content")
    for token in json.loads(config.tokenizer).get("added_tokens", []):
        if token["content"] == pad_token:
            return token["id"]
    if isinstance(pad_token, str):  # it may be a token as others are
        pad_id = Backend.from_str(config.tokenizer).token_to_id(pad_token)
        if pad_id is not None:
            return pad_id
    return 0 if config.vocab_size == 256000 else 1  # SigLIP 2 and SigLIP


# -----------------------------------------------------------------------------
# Configs of other projects, in and out


class Unsupported(ValueError):
    """A config is sound, but describes a model that this code cannot build."""


def get(section, key, default):
    """section[key]; what is left out, or null, has the default."""
    value = section.get(key)
    return default if value is None else value


def only(content, section, **allowed):
    """Raises Unsupported if a section of a config says anything else than what this code can do."""
    values = get(content, section, {})
    for key, expected in allowed.items():
        value = get(values, key, expected)
        if value != expected:
            raise Unsupported(
                f"{section}/{key} is {value!r}, but this code can only do {expected!r}")


def ours_of(table, theirs):
    """Our word in a table {our word: their word}. A word that is not there stays as it is."""
    for word, other in table.items():
        if other == theirs:
            return word
    return theirs


def without_none(content):
    """The dict, and all dicts in it, without the keys whose value is None."""
    kept = {}
    for key, value in content.items():
        if isinstance(value, dict):
            value = without_none(value)
        if value is not None:
            kept[key] = value
    return kept


# open_clip: the classes CLIPVisionCfg and CLIPTextCfg in open_clip/model.py, PreprocessCfg in
# open_clip/transform.py. The image tower of a CLIP is open_clip's own and described by numbers,
# that of a SigLIP is timm's and described by its name.
TANH = {"approximate": "tanh"}


def read_open_clip(content):
    """The content of open_clip_config.json -> CLIPConfig. What it leaves out has a default there.

    Raises KeyError, TypeError, AttributeError or ValueError.
    """
    model_cfg, preprocess_cfg = content["model_cfg"], get(content, "preprocess_cfg", {})
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    tower = vision_cfg.get("timm_model_name")
    check_open_clip(content, tower)
    if not tower:
        base = MODELS["ViT-B-16"]
    elif tower.startswith("local-dir:"):  # an export of this project, which tells all numbers
        base = MODELS["nano"]
    else:
        base = TOWERS[tower]

    width, layers, heads, mlp = base.vision
    head_width = get(vision_cfg, "head_width", width // heads)
    ratio = get(vision_cfg, "mlp_ratio", mlp_ratio(width, mlp))
    width = get(vision_cfg, "width", width)
    vision = (width, get(vision_cfg, "layers", layers), width // head_width, int(width * ratio))
    width, layers, heads, mlp = base.text
    ratio = get(text_cfg, "mlp_ratio", mlp_ratio(width, mlp))
    width = get(text_cfg, "width", width)
    text = (width, get(text_cfg, "layers", layers), get(text_cfg, "heads", heads),
            int(width * ratio))

    vision_act, text_act = base.vision_act, "gelu"
    if model_cfg.get("quick_gelu"):
        vision_act = text_act = "quick_gelu"
    if vision_cfg.get("act_kwargs") == TANH:
        vision_act = "gelu_tanh"
    if text_cfg.get("act_kwargs") == TANH:
        text_act = "gelu_tanh"
    return replace(
        base, vision=vision, text=text, vision_act=vision_act, text_act=text_act,
        embed_dim=get(model_cfg, "embed_dim", base.embed_dim),
        image_size=get(vision_cfg, "image_size", base.image_size),
        patch_size=get(vision_cfg, "patch_size", base.patch_size),
        vocab_size=get(text_cfg, "vocab_size", base.vocab_size),
        context_length=get(text_cfg, "context_length", base.context_length),
        logit_bias=model_cfg.get("init_logit_bias"),
        resize=get(preprocess_cfg, "resize_mode", base.resize),
        interpolation=get(preprocess_cfg, "interpolation", base.interpolation),
        mean=get(preprocess_cfg, "mean", base.mean),
        std=get(preprocess_cfg, "std", base.std),
        text_clean=get(get(text_cfg, "tokenizer_kwargs", {}), "clean", base.text_clean))


def check_open_clip(content, tower):
    """Raises Unsupported if open_clip would build anything else than this code."""
    model_cfg = content["model_cfg"]
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    other = None
    if tower and tower not in TOWERS and not tower.startswith("local-dir:"):
        other = f"the image tower is timm's {tower!r}"
    elif not tower and isinstance(vision_cfg.get("layers"), list):
        other = "the image tower is a ResNet"
    elif text_cfg.get("hf_model_name"):
        other = f"the text tower is transformers' {text_cfg['hf_model_name']!r}"
    elif model_cfg.get("multimodal_cfg"):
        other = "this is a CoCa, with a decoder of captions"
    if other:
        raise Unsupported(f"{other}, but this code can only do the ViTs and the text transformers "
                          f"of open_clip itself, and of timm {', '.join(TOWERS)}")
    if tower:
        only(content, "model_cfg", custom_text=True)
        only(model_cfg, "vision_cfg", timm_pool="map", timm_proj="none")
        only(model_cfg, "text_cfg", pool_type="last", no_causal_mask=True, proj_bias=True)
        only(text_cfg, "norm_kwargs", eps=1e-6)
    else:
        only(model_cfg, "vision_cfg", pool_type="tok", no_ln_pre=False, attentional_pool=False,
             ls_init_value=None)
        only(model_cfg, "text_cfg", pool_type="argmax", no_causal_mask=False, proj_bias=False)
        only(text_cfg, "norm_kwargs", eps=1e-5)
    only(model_cfg, "text_cfg", embed_cls=False, proj_type="linear", ls_init_value=None)


def write_open_clip(config, tower):
    """CLIPConfig -> {"open_clip_config.json": content}.

    tower: the name of a SigLIP's image tower that open_clip gives to timm; None for a CLIP.
    """
    siglip = config.siglip
    vision_width, vision_layers, vision_heads, vision_mlp = config.vision
    text_width, text_layers, text_heads, text_mlp = config.text
    content = {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "init_logit_bias": config.logit_bias,
            "custom_text": True if siglip else None,
            "quick_gelu": config.text_act == "quick_gelu",
            "vision_cfg": {
                "image_size": config.image_size,
                "timm_model_name": tower,
                "timm_pool": "map" if siglip else None,
                "timm_proj": "none" if siglip else None,
                "pool_type": None if siglip else "tok",
                "patch_size": config.patch_size,
                "width": vision_width,
                "layers": vision_layers,
                "head_width": vision_width // vision_heads,
                "mlp_ratio": mlp_ratio(vision_width, vision_mlp),
                "act_kwargs": TANH if config.vision_act == "gelu_tanh" else None,
            },
            "text_cfg": {
                "width": text_width,
                "layers": text_layers,
                "heads": text_heads,
                "mlp_ratio": mlp_ratio(text_width, text_mlp),
                "act_kwargs": TANH if config.text_act == "gelu_tanh" else None,
                "vocab_size": config.vocab_size,
                "context_length": config.context_length,
                "pool_type": "last" if siglip else "argmax",
                "no_causal_mask": siglip,
                "proj_bias": siglip,
                "norm_kwargs": {"eps": config.norm_eps},
                "tokenizer_kwargs": {"clean": config.text_clean},
                # With any name open_clip reads our tokenizer.json, without one it takes CLIP's.
                "hf_tokenizer_name": None if config.vocab_size == 49408 else config.name,
            },
        },
        "preprocess_cfg": {
            "mean": config.mean,
            "std": config.std,
            "interpolation": config.interpolation,
            "resize_mode": config.resize,
        },
    }
    return {"open_clip_config.json": without_none(content)}


# transformers: the classes CLIPConfig, SiglipConfig, CLIPImageProcessor, SiglipImageProcessor.
TRANSFORMERS_ACT = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
TRANSFORMERS_TOWER = (  # what we call width, layers, heads, hidden units
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
PIL_FILTER = {"bicubic": 3, "bilinear": 2}


def read_transformers(content, preprocessor):
    """The contents of config.json and of preprocessor_config.json -> CLIPConfig.

    What they leave out has transformers' default: google's files say little else than a size.
    Raises TypeError, AttributeError or ValueError.
    """
    model_type = get(content, "model_type", "clip")
    if model_type == "siglip":
        base = MODELS["ViT-B-16-SigLIP"]
        base = replace(base, vision_act="gelu_tanh", text_act="gelu_tanh")
    elif model_type == "clip":
        base = MODELS["ViT-B-32-quickgelu"]
    else:
        raise Unsupported(f"model_type is {model_type!r}, "
                          "but this code can only do 'clip' or 'siglip'")
    only(content, "vision_config", layer_norm_eps=base.norm_eps)
    only(content, "text_config", layer_norm_eps=base.norm_eps)
    vision_config, text_config = get(content, "vision_config", {}), get(content, "text_config", {})
    vision = [get(vision_config, *item) for item in zip(TRANSFORMERS_TOWER, base.vision)]
    text = [get(text_config, *item) for item in zip(TRANSFORMERS_TOWER, base.text)]
    if base.siglip:
        embed_dim = get(text_config, "projection_size", text[0])
    else:
        embed_dim = get(content, "projection_dim", base.embed_dim)
    resize = base.resize
    size = preprocessor.get("size")
    if isinstance(size, dict):  # older files have a number
        resize = "squash" if "height" in size else "shortest"
    return replace(
        base, vision=vision, text=text, embed_dim=embed_dim, resize=resize,
        image_size=get(vision_config, "image_size", base.image_size),
        patch_size=get(vision_config, "patch_size", base.patch_size),
        vision_act=ours_of(TRANSFORMERS_ACT, get(vision_config, "hidden_act", base.vision_act)),
        text_act=ours_of(TRANSFORMERS_ACT, get(text_config, "hidden_act", base.text_act)),
        vocab_size=get(text_config, "vocab_size", base.vocab_size),
        context_length=get(text_config, "max_position_embeddings", base.context_length),
        interpolation=ours_of(PIL_FILTER, get(preprocessor, "resample", base.interpolation)),
        mean=get(preprocessor, "image_mean", base.mean),
        std=get(preprocessor, "image_std", base.std))


def write_transformers(config):
    """CLIPConfig -> {"config.json": content, "preprocessor_config.json": content}."""
    siglip = config.siglip
    content = {
        "model_type": config.family,
        "architectures": ["SiglipModel" if siglip else "CLIPModel"],
        "projection_dim": None if siglip else config.embed_dim,
        "vision_config": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            **dict(zip(TRANSFORMERS_TOWER, config.vision)),
            "hidden_act": TRANSFORMERS_ACT[config.vision_act],
            "layer_norm_eps": config.norm_eps,
        },
        "text_config": {
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context_length,
            **dict(zip(TRANSFORMERS_TOWER, config.text)),
            "hidden_act": TRANSFORMERS_ACT[config.text_act],
            "layer_norm_eps": config.norm_eps,
            "projection_size": config.embed_dim if siglip else None,
            "bos_token_id": 0 if siglip else None,
            "eos_token_id": 2,  # a CLIP is then read at the highest id
        },
    }
    side = config.image_size
    square = {"height": side, "width": side}
    squash = config.resize == "squash"
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor" if squash else "CLIPImageProcessor",
        "image_mean": config.mean,
        "image_std": config.std,
        "resample": PIL_FILTER[config.interpolation],
        "size": square if squash else {"shortest_edge": side},
        "crop_size": square,
        "do_convert_rgb": True,
    }
    return {"config.json": without_none(content), "preprocessor_config.json": preprocessor}


def write_timm(config):
    """CLIPConfig -> {"config.json": content} for the image tower, as timm's models on the hub have.

    The architecture is a function in timm/models/vision_transformer.py, which model_args overrule.
    The projection of a CLIP is timm's classifier; a SigLIP has none.
    """
    width, layers, heads, mlp = config.vision
    num_classes = 0 if config.siglip else config.embed_dim
    content = {
        "architecture": f"vit_base_patch16_{config.family}_224",
        "num_classes": num_classes,
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": width,
            "depth": layers,
            "num_heads": heads,
            "mlp_ratio": mlp_ratio(width, mlp),
            "act_layer": config.vision_act,
            "num_classes": num_classes,
        },
        "pretrained_cfg": {
            "input_size": [3, config.image_size, config.image_size],
            "mean": config.mean,
            "std": config.std,
            "interpolation": config.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "squash" if config.resize == "squash" else "center",
        },
    }
    return {"config.json": content}


# -----------------------------------------------------------------------------
# Out


def export(model, format, directory):
    """Writes a new folder that open_clip, transformers or timm (image tower) loads by itself.

    Where open_clip has no name for a SigLIP's image tower, its config holds the folder's own place.
    Returns the call that loads it. Raises ValueError for what a format cannot say.
    """
    if os.path.exists(directory):
        raise ValueError(f"{directory} exists: give a new folder")
    weights = "model.safetensors"
    if format == "open_clip":
        tensors, files = export_open_clip(model, directory)
        weights = "open_clip_model.safetensors"
        call = f'open_clip.create_model_from_pretrained("local-dir:{directory}")'
    elif format == "transformers":
        tensors, files = export_transformers(model)
        [architecture] = files["config.json"]["architectures"]
        call = (f'{architecture}.from_pretrained("{directory}"), '
                f'AutoProcessor.from_pretrained("{directory}")')
    elif format == "timm":
        tensors, files = dict(model.visual.state_dict()), write_timm(model.config)
        if not model.config.siglip:
            tensors["head.bias"] = torch.zeros(model.config.embed_dim)  # timm's head has one
        call = f'timm.create_model("local-dir:{directory}", pretrained=True)'
    else:
        raise ValueError(f"no format {format!r}: expected open_clip, transformers or timm")
    os.makedirs(directory)
    save_file(tensors, os.path.join(directory, weights), metadata={"format": "pt"})
    for name, content in files.items():
        if not isinstance(content, str):
            content = json.dumps(content, indent=1)
        with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
            file.write(content)
    return call


def export_open_clip(model, directory):
    """({name: tensor}, {file name: its text, or content for json})."""
    config = model.config
    acts = {config.vision_act, config.text_act}
    if "quick_gelu" in acts and (config.siglip or len(acts) == 2):
        raise ValueError("open_clip knows quick_gelu only in both towers of a clip: "
                         "this model can go to transformers")
    files = write_tokenizer_config(model) | {"tokenizer.json": config.tokenizer}
    tower = None
    if config.siglip:
        tower = find_tower(config)
        if tower is None:  # timm has no name for it, and reads the folder, too
            tower = f"local-dir:{os.path.abspath(directory)}"
            files |= write_timm(config)
    files |= write_open_clip(config, tower)
    return renamed(model, f"open_clip {config.family}"), files


def find_tower(config):
    """timm's name of a SigLIP's image tower, or None."""
    fields = attrgetter("vision", "vision_act", "patch_size", "image_size")
    for name, known in TOWERS.items():
        if fields(known) == fields(config):
            return name
    return None


def export_transformers(model):
    """({name: tensor}, {file name: its text, or content for json})."""
    config = model.config
    if config.logit_bias is not None and not config.siglip:
        raise ValueError("transformers' CLIPModel has no logit_bias, which this model was trained "
                         "with: use open_clip")
    files = write_tokenizer_config(model) | write_transformers(config)
    tokenizer = json.loads(config.tokenizer)
    normalizers = list(CLEAN_TEXT[config.text_clean])  # transformers has no other place for it
    if tokenizer["normalizer"]:
        normalizers.append(tokenizer["normalizer"])
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    files["tokenizer.json"] = json.dumps(tokenizer)
    tensors = renamed(model, f"transformers {config.family}")
    if config.logit_bias is None and config.siglip:  # trained with the softmax loss
        tensors["logit_bias"] = torch.zeros(1)
    return tensors, files


def write_tokenizer_config(model):
    """{"tokenizer_config.json": content}, which both want beside a tokenizer.json."""
    end_token = model.tokenize.encode([""])[0].tokens[-1]
    pad_token = end_token  # as OpenAI's; a CLIP never sees it
    if model.config.siglip:
        pad_token = model.tokenize.backend.id_to_token(model.config.pad_id)
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.context_length,
        "eos_token": end_token,
        "pad_token": pad_token,
        "model_input_names": ["input_ids"],
    }
    return {"tokenizer_config.json": without_none(content)}


# clean_text, as the steps of a tokenizer.json
SINGLE_SPACES = [
    {"type": "Lowercase"},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Strip", "strip_left": True, "strip_right": True},
]
NO_PUNCTUATION = [
    {"type": "Replace", "pattern": {"String": "_"}, "content": " "},
    {"type": "Replace", "pattern": {"Regex": r"[!-/:-@\[-`{-~]"}, "content": ""},
]
CLEAN_TEXT = {"lower": SINGLE_SPACES, "canonicalize": NO_PUNCTUATION + SINGLE_SPACES}


if __name__ == "__main__":
    try:
        model = CLIP.from_pretrained(args.checkpoint, args.model)
        call = export(model, args.format, args.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"model.py: {error}")
    print(f"wrote {args.output}; load it with\n    {call}")
    if args.format == "open_clip" and model.config.siglip and find_tower(model.config) is None:
        print("If you move the folder, change timm_model_name in its open_clip_config.json, which "
              "is where it lies now.")
    if args.format != "transformers":
        print("Put white beneath transparent images, as data.load_image does, before you give them "
              f"to {args.format}, which would drop the transparency.")
