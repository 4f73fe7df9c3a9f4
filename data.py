"""Where batches come from: built-in scenes, or image-caption pairs from .csv, .tsv and .jsonl files.

A row is a dict: image (PIL), caption (str), key (names the row in reports), optional concepts (list of str).
`Collate` turns rows into a batch; whatever cannot be read becomes {"key", "error"} and is counted, never lost.
"""
import csv
import hashlib
import json
import os
import random
import zlib

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset, Sampler
from torchvision import transforms

from concepts import extract_batch
from model import clean_text

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # the loader's workers are the parallelism

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 230), "yellow": (240, 220, 50),
           "purple": (150, 60, 190), "orange": (245, 140, 30), "cyan": (60, 210, 220), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")


class Scenes(Dataset):
    """Two objects of different colour and shape, one a quadrant: nothing is hard here but binding.

    Everything about scene i is a function of (seed, i). The pairs of objects are split: those whose checksum falls
    into one class of ten are drawn by split "val" only, so that held-out scenes show pairs never seen together.
    """

    def __init__(self, length, split="train", seed=0, image_size=32):
        self.length, self.split, self.seed, self.image_size = length, split, seed, image_size

    def __len__(self):
        return self.length

    def objects(self, index):
        """[(colour, shape), (colour, shape)] in the order of the caption, and their quadrants, two of 0..3."""
        rng = random.Random(f"{self.seed} {self.split} {index}")
        while True:
            pair = list(zip(rng.sample(list(COLOURS), 2), rng.sample(SHAPES, 2)))
            held_out = zlib.crc32(repr(sorted(pair)).encode()) % 10 == 0
            if held_out == (self.split == "val"):
                return pair, rng.sample(range(4), 2), rng

    def __getitem__(self, index):
        pair, cells, rng = self.objects(index)
        concepts = [f"a {colour} {shape}" for colour, shape in pair]
        return {"image": self.render(pair, cells, rng), "caption": " and ".join(concepts), "concepts": concepts,
                "key": f"scene {self.split} {index}", "objects": pair}

    def render(self, pair, cells, rng):
        size = self.image_size
        image = Image.new("RGB", (size, size), (rng.randint(0, 40),) * 3)
        draw, half = ImageDraw.Draw(image), size / 2
        for (colour, shape), cell in zip(pair, cells):
            r = rng.uniform(0.38, 0.48) * half
            x = half * (cell % 2) + rng.uniform(r, half - r)
            y = half * (cell // 2) + rng.uniform(r, half - r)
            draw_shape(draw, shape, x, y, r, COLOURS[colour])
        return image


def draw_shape(draw, shape, x, y, r, fill):
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=fill)
    elif shape == "cross":
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)
    else:
        draw.ellipse(box, outline=fill, width=max(1, round(r / 2.5)))


# -----------------------------------------------------------------------------
# image-caption pairs from a table

IMAGE_KEYS = ("image", "image_path", "filepath", "file_name", "filename", "path")
CAPTION_KEYS = ("caption", "title", "text", "caption_text")


class CaptionFile(Dataset):
    """Rows of a .csv, .tsv or .jsonl file: an image path (relative to image_root), a caption, optional concepts.

    Keys that are not given are looked for among IMAGE_KEYS and CAPTION_KEYS. `concepts` is a list (json, or
    separated by |); rows without it get theirs from concepts.py, in the loader's workers.
    Raises ValueError, in one sentence, for a file that cannot be used at all; a single bad row is only counted.
    """

    def __init__(self, path, image_root="", image_key=None, caption_key=None):
        self.path, self.root = path, image_root
        rows = read_rows(path)
        columns = list(rows[0])
        if len(columns) == 1 and any(mark in columns[0] for mark in ",;\t|"):
            raise ValueError(f"{path} has the single column {columns[0]!r}: a wrong separator; "
                             "expected commas in .csv, tabs in .tsv")
        self.image_key = pick_key(path, columns, image_key, IMAGE_KEYS, "--image-key")
        self.caption_key = pick_key(path, columns, caption_key, CAPTION_KEYS, "--caption-key")
        texts = ([value if isinstance(value, str) else "" for value in (r.get(self.image_key), r.get(self.caption_key))]
                 for r in rows)
        self.rows = [(image, caption, r.get("concepts")) for (image, caption), r in zip(texts, rows)]

    def __len__(self):
        return len(self.rows)

    @property
    def captions(self):
        return [caption for _, caption, _ in self.rows]

    def __getitem__(self, index):
        name, caption, concepts = self.rows[index]
        key = f"{name or '(no image)'} (row {index + 1})"
        if not caption.strip():
            return {"key": key, "error": "empty caption"}
        try:
            row = {"image": load_image(os.path.join(self.root, name)), "caption": caption, "key": key}
            if concepts:
                row["concepts"] = parse_list(concepts)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return {"key": key, "error": " ".join(str(error).split())}
        return row


def read_rows(path):
    """All rows of a .csv, .tsv or .jsonl file as a list of dicts with the same first keys."""
    kind = os.path.splitext(path)[1].lower()
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{path}: expected a .csv, .tsv or .jsonl file, got {kind or 'no ending'!r}")
    if not os.path.isfile(path):
        raise ValueError(f"no file {path}: --data takes a table with a row for each image-caption pair")
    csv.field_size_limit(2**31 - 1)     # long captions are no mistake
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
        if kind == ".jsonl":
            rows = []
            for number, line in enumerate(f, 1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not json ({error})") from None
                if rows and not isinstance(rows[-1], dict):
                    raise ValueError(f"{path}, line {number}: expected an object such as "
                                     '{"image": "a.jpg", "caption": "a cat"}')
        else:
            try:
                rows = list(csv.DictReader(f, delimiter="\t" if kind == ".tsv" else ","))
            except csv.Error as error:
                raise ValueError(f"{path} is no table of text: {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def pick_key(path, columns, key, known, flag):
    found = [key] if key else [k for k in known if k in columns]
    if not found or found[0] not in columns:
        wanted = f"no column {key!r}" if key else f"none of the columns {', '.join(known)}"
        raise ValueError(f"{path} has {wanted}; its columns are {', '.join(map(str, columns))}: name one with {flag}")
    return found[0]


def parse_list(value):
    """A list of strings from a list, a json list, or texts separated by |."""
    if isinstance(value, str):
        value = json.loads(value) if value.lstrip().startswith("[") else value.split("|")
    return [text.strip() for text in map(str, value) if text.strip()]


def load_image(path):
    """Any image file -> RGB, whole (a truncated file raises OSError); transparency becomes white."""
    with Image.open(path) as image:
        image.load()
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


# -----------------------------------------------------------------------------
# from rows to batches

def train_transform(config):
    """The paper's augmentation: a crop of at least 90 % of the area, no flip (left and right are in the captions)."""
    return transforms.Compose([
        transforms.RandomResizedCrop(config.image_size, scale=(0.9, 1), ratio=(3 / 4, 4 / 3),
                                     interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(), transforms.Normalize(config.mean, config.std)])


class Collate:
    """Rows -> a batch. Runs in the loader's workers: extracts concepts where a row has none, and tokenizes.

    images (B, 3, S, S), tokens (B, L), and for the concepts, each different string once:
    concept_tokens (U, L'), concept_ids (U,) a 63-bit hash of each string, equal on all processes, and
    pairs (P, 2): (image, concept) for every concept of every caption. pad_concepts rounds U up to a multiple (with
    id -1), for torch.compile. Also: keys (B), captions (B), bad [(key, error)], fallback: the number of captions that
    are their own concept, for want of another noun phrase.
    """

    def __init__(self, transform, tokenize, with_concepts=True, pad_concepts=1):
        self.transform, self.tokenize = transform, tokenize
        self.with_concepts, self.pad_concepts = with_concepts, pad_concepts

    def __call__(self, rows):
        bad = [(r["key"], r["error"]) for r in rows if "error" in r]
        rows = [r for r in rows if "error" not in r]
        batch = {"bad": bad, "keys": [r["key"] for r in rows], "captions": [r["caption"] for r in rows], "fallback": 0}
        if not rows:
            return batch
        batch["images"] = torch.stack([self.augment(r) for r in rows])              # (B, 3, S, S)
        batch["tokens"] = self.tokenize(batch["captions"], trim=True)               # (B, L)
        if not self.with_concepts:
            return batch

        without = [r for r in rows if "concepts" not in r]
        for row, found in zip(without, extract_batch([r["caption"] for r in without])):
            row["concepts"] = found or [row["caption"].strip()]
            batch["fallback"] += row["concepts"] == [row["caption"].strip()]
        index = {}      # concept string -> its row in concept_tokens
        pairs = [(i, index.setdefault(concept, len(index)))
                 for i, row in enumerate(rows) for concept in dict.fromkeys(row["concepts"])]
        padding = -len(index) % self.pad_concepts
        batch["concept_tokens"] = self.tokenize(list(index) + [""] * padding, trim=True)            # (U, L')
        batch["concept_ids"] = torch.tensor([string_id(c) for c in index] + [-1] * padding)         # (U,)
        batch["pairs"] = torch.tensor(pairs).view(-1, 2)                                            # (P, 2)
        return batch

    def augment(self, row):
        """The transform, its randomness a function of the row's own seed: the same in any worker, after any resume."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(row["seed"])
            return self.transform(row["image"])


def string_id(text):
    return int.from_bytes(hashlib.blake2b(text.lower().encode(), digest_size=8).digest(), "big") >> 1


class Epochs(Sampler):
    """Batches of (epoch, index) for one process, over all epochs: a function of (seed, epoch) and nothing else.

    Each epoch is cut into ceil(length / batch_size) batches of equal size, up to one: every row comes exactly once
    an epoch, there is no small last batch, and the global order does not depend on the number of processes.
    """

    def __init__(self, length, batch_size, seed=0, rank=0, world_size=1, start_step=0, stop_step=None):
        if batch_size > length:
            raise ValueError(f"--batch-size {batch_size} is more than the {length} rows of data: give at most {length}")
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.steps_per_epoch = -(-length // batch_size)
        self.start, self.stop = start_step, self.steps_per_epoch if stop_step is None else stop_step

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        epoch = None
        for step in range(self.start, self.stop):
            if epoch != step // self.steps_per_epoch:
                epoch = step // self.steps_per_epoch
                generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {epoch}".encode()))
                batches = torch.randperm(self.length, generator=generator).tensor_split(self.steps_per_epoch)
            batch = batches[step % self.steps_per_epoch].tensor_split(self.world_size)[self.rank]
            yield [(epoch, index) for index in batch.tolist()]


class Seeded(Dataset):
    """Gives every row of a data set the seed of its augmentation, from (seed, epoch, index)."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, item):
        epoch, index = item
        return {**self.dataset[index], "seed": zlib.crc32(f"{self.seed} {epoch} {index}".encode())}


def train_tokenizer(captions, vocab_size=1024):
    """A small lower-case byte-level BPE from captions, for a model trained from scratch: the text of a tokenizer.json.

    <pad> is 0; <eos> ends every text and has the highest id, by which CLIP's text tower finds it.
    Returns (json text, number of tokens, length of the longest caption).
    """
    captions = [clean_text(c, "canonicalize") for c in captions]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, special_tokens=["<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens(["<eos>"])
    bpe.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", bpe.token_to_id("<eos>"))])
    longest = max(len(e.ids) for e in bpe.encode_batch(captions))
    return bpe.to_str(), bpe.get_vocab_size(), longest
