"""Where batches come from: built-in scenes, tables of image-caption pairs (.csv, .tsv, .jsonl), and tar shards.

A row is a dict: image (PIL), caption, key (its name in reports), and optional: concepts, negatives (lists of str, "" in
place of one that there is not), negative_image, neighbour (a row). What cannot be read is {"key", "error"}, not lost.
"""
import csv
import hashlib
import io
import json
import os
import random
import re
import tarfile
import warnings
import zlib
from array import array

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import ByteLevelBPETokenizer, processors
from torch.utils.data import Dataset, Sampler
from torchvision import transforms
from tqdm import tqdm

from concepts import extract_batch, negate, swap_negatives
from model import clean_text

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # the loader's workers are the parallelism
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 230), "yellow": (240, 220, 50),
           "purple": (150, 60, 190), "orange": (245, 140, 30), "cyan": (60, 210, 220), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")


class Scenes(Dataset):
    """Two objects of different colour and shape, one a quadrant: nothing is hard here but binding.

    Scene i is a function of (seed, i). Pairs of objects whose checksum falls into one class of ten are for split "val"
    only: held-out scenes show pairs never seen together. relations: share of captions with "left of", "right of",
    "above" or "below" instead of "and". Negatives are false by construction: colours exchanged, another colour, another
    shape, objects exchanged ("" without a relation); negative_images=True renders the first of them.
    """
    def __init__(self, length, split="train", seed=0, image_size=32, relations=0.0, negative_images=False):
        self.length, self.split, self.seed, self.image_size = length, split, seed, image_size
        self.relations, self.negative_images = relations, negative_images

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
        image, link = self.render(pair, cells, rng), "and"
        if rng.random() < self.relations:       # where the second is, seen from the first
            x, y = cells[1] % 2 - cells[0] % 2, cells[1] // 2 - cells[0] // 2
            link = {1: "left of", -1: "right of"}.get(x) or {1: "above", -1: "below"}[y]
        (colour0, shape0), (colour1, shape1) = pair
        colour2 = rng.choice([colour for colour in COLOURS if colour not in (colour0, colour1)])
        shape2 = rng.choice([shape for shape in SHAPES if shape not in (shape0, shape1)])
        swapped = [(colour1, shape0), (colour0, shape1)]
        wrong = [swapped, [(colour2, shape0), pair[1]], [(colour0, shape2), pair[1]], pair[::-1]]
        caption, *negatives = [f"a {a} {b} {link} a {c} {d}" for (a, b), (c, d) in [pair] + wrong]
        row = {"image": image, "caption": caption, "concepts": caption.split(f" {link} "), "objects": pair,
               "negatives": negatives[:3] + [negatives[3] * (link != "and")], "key": f"scene {self.split} {index}"}
        if self.negative_images:
            row["negative_image"] = self.render(swapped, cells, self.objects(index)[2])     # places and sizes stay
        return row

    def render(self, pair, cells, rng):
        """The image of one or more (colour, shape), each somewhere in its quadrant."""
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


# ------------------------- image-caption pairs from tables and tar shards
IMAGE_KEYS = ("image", "image_path", "filepath", "file_name", "filename", "path")
CAPTION_KEYS = ("txt", "caption", "title", "text", "caption_text")
JOIN_KEYS = ("url", "image_url", "key", "__key__", "Image Path", *IMAGE_KEYS)
MEMBERS = {".jpg": "image", ".jpeg": "image", ".png": "image", ".webp": "image", ".txt": "txt", ".json": "json"}


class CaptionFile(Dataset):
    """Image-caption pairs of tables and tar shards: sources are joined by "::", and {000..331} and {a,b} expand.

    image_root: the folder of a table's image paths. image_key, caption_key: columns (json keys); of several captions,
    in columns a,b or a json list, `Seeded` draws one. captions: a table of the captions instead, joined by the first
    of JOIN_KEYS it has to the images' key, url or path. Optional columns or json keys: concepts, negatives (lists, or
    separated by |), negative_image (a path), neighbours (numbers of rows of the same table, from 0; others are passed
    over). skipped: [(name, why)] of what has no image or caption; what cannot be read becomes a row {"key", "error"}.
    """
    def __init__(self, sources, image_root="", image_key=None, caption_key=None, captions=None):
        self.root, given = image_root, caption_key.split(",") if caption_key else []
        self.skipped, self.neighbours, joined, used, seen, bare = [], {}, {}, set(), set(), []
        wanted, lines, ends = {*(given or CAPTION_KEYS), "concepts", "negatives"}, io.BytesIO(), array("q", [0])
        for row in read_rows(captions) if captions else ():
            join_column = next((key for key in JOIN_KEYS if key in row), "")
            seen.update(row)
            about = {name: value for name, value in row.items() if name in wanted}      # not all of a wide table
            joined.setdefault(str(row.get(join_column) or ""), []).append(about)
        paths = [path for source in sources.split("::") for path in expand(source)]
        for path in tqdm(paths, "reading", unit="file", delay=1, disable=os.environ.get("RANK", "0") != "0"):
            tar, first, numbers, near = path.endswith(".tar"), len(ends) - 1, array("q"), {}
            for number, row in enumerate(read_shard(path) if tar else read_rows(path)):
                image_column = "image" if tar else image_key or next((key for key in IMAGE_KEYS if key in row), "")
                image = row.get(image_column)
                key = f"{path} {row['key']}" if tar else f"{image or '(no image)'} (row {number + 1})"
                names = [name for name in map(str, (row.get("key"), row.get("url"), image)) if name in joined][:1]
                about = joined[names[0]] if names else [] if captions else [row]        # the dicts with its captions
                texts = []      # of all columns that were given, else of the first that is not empty
                for some in about:
                    for column in given or [key for key in CAPTION_KEYS if some.get(key)][:1]:
                        texts += parse_list(some.get(column), None)
                used.update(names)
                seen.update(row)
                if not image or not texts:
                    self.skipped.append((key, "no caption" if image else "no image"))
                    continue
                sample = {"key": key, "image": [path, *image] if tar else str(image), "captions": texts,
                          "concepts": about[0].get("concepts"), "negatives": about[0].get("negatives"),
                          "negative_image": row.get("negative_image")}
                lines.write(json.dumps({name: value for name, value in sample.items() if value}).encode())
                ends.append(lines.tell())
                numbers.append(number)
                if some := parse_list(row.get("neighbours")):
                    near[str(number)] = some
            places = dict(zip(map(str, numbers), range(first, len(ends)))) if near else {}      # of the rows kept
            self.neighbours |= {places[n]: [places[i] for i in some if i in places] for n, some in near.items()}
            bare += [] if numbers or tar else [path]
        lost = [name for name in joined if name not in used]
        if lost:
            self.skipped.insert(0, (captions, f"{len(lost):,} {join_column} fit no image, the first is {lost[0]!r}"))
        if bare or len(ends) == 1 or set(given) - seen:
            raise ValueError(f"{', '.join(bare) or sources}: no images with captions in its columns or keys "
                             f"{', '.join(sorted(map(str, seen))[:30])} (split at commas in .csv, tabs in .tsv); name "
                             f"them with --image-key, --caption-key; skipped {self.skipped[:1]}")
        self.lines, self.ends = lines.getvalue(), np.array(ends)    # no object a row
        self.captions = [text for i in range(min(len(self), 200_000)) for text in self.sample(i)["captions"]]

    def __len__(self):
        return len(self.ends) - 1

    def sample(self, index):
        row = json.loads(self.lines[self.ends[index]:self.ends[index + 1]])
        return row | ({"neighbours": self.neighbours[index]} if index in self.neighbours else {})

    def __getitem__(self, index):
        row = self.sample(index)
        try:
            for name in {"image", "negative_image"} & row.keys():
                row[name] = load_image(os.path.join(self.root, row[name]) if isinstance(row[name], str) else row[name])
            for name in {"concepts", "negatives"} & row.keys():
                row[name] = parse_list(row[name], empty=name == "negatives")
            return {**row, "caption": row["captions"][0]}
        except Exception as error:      # of pillow's decoders, nearly any
            return {"key": row["key"], "error": " ".join(str(error).split()) or type(error).__name__}


def expand(source):
    """The files of "a/{08..11}.tar" or "{a,b}.csv", as a shell names them; ValueError for one that is not there."""
    found = re.search(r"\{((\d+)\.\.(\d+)|[^{}]*,[^{}]*)\}", source)
    if found and not os.path.exists(source):
        words, first, last = found.groups()
        words = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)] if first else words.split(",")
        return [path for word in words or [found[1]] for path in expand(source.replace(found[0], word, 1))]
    if not os.path.isfile(source):
        raise ValueError(f"no file {source}: --data takes tables with a row for each image-caption pair, or tar shards")
    return [source]


def read_rows(path):
    """Yield the rows of a .csv, .tsv or .jsonl file as dicts; ValueError for a file that cannot be used at all."""
    kind, row = os.path.splitext(path)[1].lower(), None
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{path}: expected a .csv, .tsv or .jsonl file, or .tar, got {kind or 'no ending'!r}")
    csv.field_size_limit(2**31 - 1)     # long captions are no mistake
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
        rows = csv.DictReader(f, delimiter="\t" if kind == ".tsv" else ",") if kind != ".jsonl" else (
            parse_json(line) for line in f if line.strip())
        for number, row in enumerate(rows, 1):
            if not row:
                raise ValueError(f"{path}: row {number} is not an object in json")
            yield row
    if row is None:
        raise ValueError(f"{path}: no rows")


def read_shard(path):
    """Samples of a tar as img2dataset and webdataset write it: dicts of .json, txt, key and image ([offset, size]).

    Kept beside it, under its size and time. A second image or text of a key begins another sample.
    """
    stat = os.stat(path)
    cached = f"{path}.{stat.st_size}.{stat.st_mtime_ns}.jsonl"
    if os.path.exists(cached):
        return read_rows(cached)
    rows, latest, end = [], {}, 0
    try:
        with tarfile.open(path, "r:", errors="replace") as tar:
            for member in tar:
                if member.offset_data + member.size > stat.st_size:
                    raise tarfile.ReadError("cut off")
                end = tar.offset
                key, ending = os.path.splitext(member.name.removeprefix("./"))
                kind = MEMBERS.get(ending.lower())
                if kind is None or not member.isreg():
                    continue
                if key not in latest or latest[key].get(kind):
                    latest[key] = {"key": key, "image": None}
                    rows.append(latest[key])
                latest[key][kind] = [member.offset_data, member.size] if kind == "image" else (
                    tar.extractfile(member).read().decode("utf-8", "replace"))
            tar.fileobj.seek(end)
            if any(tar.fileobj.read(1024) or b"cut") or not rows:
                raise tarfile.ReadError("tarfile ends at a damaged header without a word")
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        rows.append({"key": f"is damaged or cut off from byte {end:,} on"})
    rows = [{**parse_json(row.pop("json", "")), **row} for row in rows]
    try:
        with open(f"{cached}.{os.urandom(8).hex()}", "w") as f:     # others see a whole index or none
            f.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(f.name, cached)
    except OSError as error:    # once a folder
        warnings.warn(f"{os.path.dirname(path)}: {error.strerror}: indices of its shards are kept in memory only")
    return rows


def parse_json(text):
    """The object in a json text, {} if there is none."""
    try:
        row = json.loads(text)
        return row if isinstance(row, dict) else {}
    except (ValueError, RecursionError):
        return {}


def parse_list(value, separator="|", empty=False):
    """A list of strings from a list, a json list, or texts between separators (None: the text is one, if not json)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            if separator:
                raise
    if isinstance(value, str):
        value = value.split(separator) if separator else [value]
    values = ["" if v is None else str(v).strip() for v in value] if isinstance(value, list) else []
    return [text for text in values if text or empty]


def load_image(file):
    """Any image file, or [tar, offset, size] -> RGB, whole (a truncated file raises OSError); 16 bits become 8."""
    if isinstance(file, list):
        with open(file[0], "rb", buffering=0) as f:     # by each process for itself: workers may be forked
            file = io.BytesIO(os.pread(f.fileno(), file[2], file[1]))
    with Image.open(file) as image:
        image.load()
        if image.mode.startswith("I"):
            return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image if image.mode == "RGB" else image.convert("RGB")


# ------------------------- from rows to batches
def train_transform(config):
    """The paper's augmentation: a crop of at least 90 % of the area, no flip (left and right are in the captions)."""
    return transforms.Compose([
        transforms.RandomResizedCrop(config.image_size, (0.9, 1), (3 / 4, 4 / 3), Image.BICUBIC),
        transforms.ToTensor(), transforms.Normalize(config.mean, config.std)])


class Collate:
    """Rows -> a batch. Runs in the loader's workers: extracts concepts where a row has none, and tokenizes.

    images (B, 3, S, S), tokens (B, L), keys, captions, bad [(key, error)], fallback: the number of captions that are
    their own concept, for want of another noun phrase. Neighbours of rows become rows, after all others. Concepts, each
    string once: concept_tokens (U, L'), concept_ids (U,), a hash, pairs (P, 2) (image, concept); pad_concepts rounds U
    up to a multiple (id -1), for torch.compile. With spans, instead of concept_tokens: spans (B, M, 2) in the caption's
    tokens, (0, 0) and id -1 for padding; concept_ids is (B * M,), and pairs count in B * M. negatives: "swap" (K = 1),
    "typed" (noun, adjective, verb, phrase: K = 4), "negate" (K = 1), a row's own first -> negative_tokens (B, K, L'),
    negative_mask (B, K). negative_images -> negative_images, zero without one, and negative_image_mask (B,).
    """
    def __init__(self, transform, tokenize, with_concepts=True, pad_concepts=1, negatives=None, negative_images=False,
                 spans=False):
        self.transform, self.tokenize = transform, tokenize
        self.with_concepts, self.pad_concepts, self.spans = with_concepts, pad_concepts, spans
        self.negatives, self.negative_images = negatives, negative_images

    def __call__(self, rows):
        rows = rows + [r["neighbour"] for r in rows if "neighbour" in r]
        bad, rows = [(r["key"], r["error"]) for r in rows if "error" in r], [r for r in rows if "error" not in r]
        batch = {"bad": bad, "keys": [r["key"] for r in rows], "captions": [r["caption"] for r in rows], "fallback": 0}
        if not rows:
            return batch
        batch["images"] = torch.stack([self.augment(r["image"], r["seed"]) for r in rows])      # (B, 3, S, S)
        batch["tokens"] = self.tokenize(batch["captions"], trim=True)                           # (B, L)
        if self.negative_images:
            batch["negative_image_mask"] = torch.tensor(["negative_image" in r for r in rows])  # (B,)
            batch["negative_images"] = torch.stack([                                            # (B, 3, S, S)
                self.augment(r["negative_image"], r["seed"]) if "negative_image" in r else torch.zeros_like(image)
                for r, image in zip(rows, batch["images"])])
        if self.negatives:
            texts = [text for row in rows for text in self.negatives_of(row)]                   # B * K
            batch["negative_mask"] = torch.tensor([text != "" for text in texts]).view(len(rows), -1)
            batch["negative_tokens"] = self.tokenize(texts, trim=True).view(*batch["negative_mask"].shape, -1)
        if not self.with_concepts:
            return batch
        without = [r for r in rows if not r.get("concepts")]
        for row, found in zip(without, extract_batch([r["caption"] for r in without])):
            row["concepts"] = found or [row["caption"].strip()]
            batch["fallback"] += row["concepts"] == [row["caption"].strip()]
        concepts = [list(dict.fromkeys(row["concepts"])) for row in rows]
        if self.spans:
            width = max(1, *map(len, concepts))
            places = [self.tokenize.spans(row["caption"], some) for row, some in zip(rows, concepts)]
            batch["spans"] = torch.tensor([p + [(0, 0)] * (width - len(p)) for p in places])   # (B, M, 2)
            strings = [c for some in concepts for c in some + [None] * (width - len(some))]     # B * M
            pairs = [(i // width, i) for i, c in enumerate(strings) if c is not None]
        else:
            index = {}      # concept string -> its row in concept_tokens
            pairs = [(i, index.setdefault(c, len(index))) for i, some in enumerate(concepts) for c in some]
            strings = list(index) + [None] * (-len(index) % self.pad_concepts)
            batch["concept_tokens"] = self.tokenize([c or "" for c in strings], trim=True)      # (U, L')
        batch["concept_ids"] = torch.tensor([-1 if c is None else string_id(c) for c in strings])       # (U,)
        batch["pairs"] = torch.tensor(pairs).view(-1, 2)                                        # (P, 2)
        return batch

    def negatives_of(self, row):
        """K strings, "" for none, from the row or by its seed."""
        rng, own = random.Random(row["seed"]), row.get("negatives", [])
        if self.negatives == "negate":
            return [negate(row["caption"], rng)]
        if self.negatives == "swap":
            return [rng.choice([text for text in own if text][:1] or swap_negatives(row["caption"], rng) or [""])]
        kinds = ("noun", "adjective", "verb", "phrase")
        own = own or ["".join(swap_negatives(row["caption"], rng, (kind,))) for kind in kinds]
        return (own + [""] * 4)[:4]

    def augment(self, image, seed):
        """The transform, its randomness a function of the row's own seed: the same in any worker, after any resume."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image)


def string_id(text):
    """A 63-bit hash of the lower-case text, equal on all processes."""
    digest = hashlib.blake2b(text.lower().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Epochs(Sampler):
    """Batches of (epoch, index) for one process, over all epochs: a function of (seed, epoch) and nothing else.

    An epoch has ceil(length / batch_size) batches, equal up to one row, of every row once, for any world_size alike.
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
    """Gives every row a seed from (seed, epoch, index); by it one caption of several and, if asked, one neighbour."""
    def __init__(self, dataset, seed, neighbours=True):
        self.dataset, self.seed, self.neighbours = dataset, seed, neighbours

    def __getitem__(self, item):
        epoch, index = item
        seed = zlib.crc32(f"{self.seed} {epoch} {index}".encode())
        row, rng = {**self.dataset[index], "seed": seed}, random.Random(seed)
        if "captions" in row:
            row["caption"] = rng.choice(row["captions"])
        if self.neighbours and row.get("neighbours"):       # a neighbour brings none of its own
            row["neighbour"] = Seeded(self.dataset, self.seed, False)[epoch, rng.choice(row["neighbours"])]
        return row


def train_tokenizer(captions, vocab_size=1024):
    """A small lower-case byte-level BPE -> (text of a tokenizer.json, number of tokens, length of the longest caption).

    <pad> is 0; <eos> ends every text and has the highest id, by which CLIP's text tower finds it.
    """
    captions = [clean_text(c, "canonicalize") for c in captions]
    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator(captions, vocab_size - 1, min_frequency=0, special_tokens=["<pad>"], show_progress=False)
    bpe.add_special_tokens(["<eos>"])
    bpe.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", bpe.token_to_id("<eos>"))])
    return bpe.to_str(), bpe.get_vocab_size(), max(len(e.ids) for e in bpe.encode_batch(captions))
