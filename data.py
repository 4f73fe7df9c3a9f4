"""Where batches come from: built-in scenes, tables of image-caption pairs, and tar shards.

A row is a dict with
    image           PIL image, RGB (or uint8 (3, H, W): see load_fast)
    caption         str
    captions        list of str, of rows of files: all, of which caption is one
    key             str, its name in reports
    seed            int, of all that is random in the row from then on, see Seeded
    concepts        optional list of str, the noun phrases of the caption
    negatives       optional list of str, false captions ("" in place of one that there is not)
    negative_image  optional PIL image that the caption does not describe
    neighbour       optional row, a hard negative for this one
    partner         optional row that can be read, with which this becomes a pair, see join_pair
    units           optional list of (part of the caption, false version of it), both str
    paraphrase      optional str, a second true caption (of rows of files: one of their others)
A row that cannot be read is {"key": ..., "error": ...}, so that it is counted and not lost.

In this order: Scenes; CaptionFile, which are the pairs on disk; the index of a file; the readers of
tables and tars; images; train_transform and Collate, from rows to batches; Epochs and Seeded, the
order of the rows; how many workers; the tokenizer of a model from scratch.
"""
import ast
import concurrent.futures
import contextlib
import fcntl
import functools
import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import tempfile
import warnings
import zlib
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, UnidentifiedImageError
from tokenizers import ByteLevelBPETokenizer, processors
from torch.utils.data import Dataset, Sampler
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from tqdm import tqdm

from concepts import (CAPTION_KEYS, DELIMITERS, SWAP_TAGS, WORD, different_words, exchange,
                      extract_batch, index_phrases, negate, read_table, shuffle_bigrams,
                      start_worker, string_id, substitute_negatives, swap_negatives, swappable,
                      unit_pairs)
from model import clean_text

# The loader's workers are the parallelism; threads of the tokenizer would only get in their way.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BICUBIC = transforms.InterpolationMode.BICUBIC

# ---- scenes: pictures that are made, not read ------------------------------

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
MORE_COLOURS = COLOURS | {
    "pink": (250, 150, 190),
    "brown": (125, 75, 35),
    "gray": (140, 140, 140),
    "olive": (130, 140, 30),
}
MORE_SHAPES = SHAPES + ("frame", "bar", "pillar", "funnel", "bowl", "slash")


@dataclass(frozen=True)
class World:
    """What scenes may show: so many objects, each of another colour, shape and cell."""
    objects: int
    named: int          # of them by the caption, the first
    colours: dict       # name -> (red, green, blue)
    shapes: tuple
    grid: int = 2       # cells on a side of the image, each with one object at most


# In the small world a batch of 128 holds captions that differ in little but their binding, and from
# those any contrastive loss can learn it. Natural captions are not like that. In the large world
# such near misses are rare: a bag of words tells nearly all scenes of a batch apart. The crowded
# world has rarer ones still: what a caption says has to be found beside an object it does not name.
# The world of many objects has smaller ones, half of them not named, for images of 48 pixels.
WORLDS = {
    "small": World(2, 2, COLOURS, SHAPES),
    "large": World(3, 3, MORE_COLOURS, MORE_SHAPES),
    "crowded": World(4, 3, MORE_COLOURS, MORE_SHAPES),
    "many": World(6, 3, MORE_COLOURS, MORE_SHAPES, grid=3),
}


class Scenes(Dataset):
    """Objects of different colours and shapes, each in a cell of its own: only binding is hard.

    Scene i is a function of (seed, i) alone. Of all sets of objects a tenth, chosen by a
    checksum, is kept for split "val", so held-out scenes show sets that were never trained on.

    The four negatives of a scene are false by construction. They change the first two objects:
    the colours exchanged, another colour, another shape, and the objects exchanged ("" where the
    caption has no relation).

    length           how many scenes there are
    split            "train" or "val"
    image_size       side of the square image in pixels
    relations        share of captions that say "left of", "right of", "above" or "below"
                     instead of the first "and"
    negative_images  draw the first negative, too, as negative_image
    world            name in WORLDS: "small" shows two objects, "large" three of more kinds,
                     "crowded" four of those, of which the caption names three, and "many" six
                     smaller ones, of which it names three
    """

    def __init__(self, length, split="train", seed=0, image_size=32, relations=0.0,
                 negative_images=False, world="small"):
        self.world = WORLDS[world]
        self.length = length
        self.split = split
        self.seed = seed
        self.image_size = image_size
        self.relations = relations
        self.negative_images = negative_images

    def __len__(self):
        return self.length

    def objects(self, index):
        """Return the (colour, shape) of each object, those that the caption names first and in its
        order, their cells (numbered row by row), and the generator of all else that is random in
        this scene."""
        world = self.world
        rng = random.Random(f"{self.seed} {self.split} {index}")
        while True:
            colours = rng.sample(list(world.colours), world.objects)
            shapes = rng.sample(world.shapes, world.objects)
            objects = list(zip(colours, shapes))
            checksum = zlib.crc32(repr(sorted(objects[:world.named])).encode())
            held_out = checksum % 10 == 0
            if held_out == (self.split == "val"):
                return objects, rng.sample(range(world.grid**2), world.objects), rng

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        shown, cells, rng = self.objects(index)
        image = self.render(shown, cells, rng)
        link = "and"
        if rng.random() < self.relations:
            link = relation(*cells[:2], self.world.grid)
        objects, unnamed = shown[:self.world.named], shown[self.world.named:]
        wrong = wrong_objects(objects, unnamed, self.world, rng)
        negatives = [describe(others, link) for others in wrong]
        if link == "and":
            negatives[3] = ""       # "b and a" is as true as "a and b"
        caption = describe(objects, link)
        row = {
            "image": image,
            "caption": caption,
            "concepts": [f"a {colour} {shape}" for colour, shape in objects],
            "negatives": negatives,
            "paraphrase": exchange_first_two(objects, cells, link, self.world.grid),
            "units": scene_units(objects, wrong, link),
            "objects": objects,
            "key": f"scene {self.split} {index}",
        }
        if self.negative_images:
            _, _, rng = self.objects(index)         # anew: places and sizes stay
            row["negative_image"] = self.render(wrong[0] + unnamed, cells, rng)
        return row

    def render(self, objects, cells, rng):
        """Draw one or more (colour, shape), each somewhere in its cell."""
        size = self.image_size
        side = size / self.world.grid       # of a cell
        grey = rng.randint(0, 40)
        image = Image.new("RGB", (size, size), (grey, grey, grey))
        draw = ImageDraw.Draw(image)
        for (colour, shape), cell in zip(objects, cells):
            row, column = divmod(cell, self.world.grid)
            radius = rng.uniform(0.38, 0.48) * side
            x = side * column + rng.uniform(radius, side - radius)
            y = side * row + rng.uniform(radius, side - radius)
            draw_shape(draw, shape, x, y, radius, self.world.colours[colour])
        return image


def describe(objects, link):
    """The caption of some (colour, shape); the link stands between the first two."""
    phrases = [f"a {colour} {shape}" for colour, shape in objects]
    first_two = f" {link} ".join(phrases[:2])
    return " and ".join([first_two, *phrases[2:]])


def scene_units(objects, wrong, link):
    """CS-CLIP's units: the relation of two objects, colours exchanged; the first in false forms."""
    first = describe(objects[:1], link)
    units = [(describe(objects[:2], link), describe(wrong[0][:2], link))]
    for others in wrong[1:3]:
        units.append((first, describe(others[:1], link)))
    return units


def exchange_first_two(objects, cells, link, grid):
    """The same caption, told from the second object: "b right of a" for "a left of b"."""
    first, second, *rest = objects
    if link != "and":
        link = relation(cells[1], cells[0], grid)
    return describe([second, first, *rest], link)


def relation(first, second, grid):
    """Where the first cell lies, seen from the second (cells 0 1 above 2 3 in a grid of 2)."""
    if first % grid < second % grid:
        return "left of"
    if first % grid > second % grid:
        return "right of"
    if first < second:
        return "above"
    return "below"


def wrong_objects(objects, unnamed, world, rng):
    """Four false lists of the objects that a caption names: see Scenes."""
    (colour0, shape0), (colour1, shape1), *rest = objects
    shown_colours = [colour for colour, _ in objects + unnamed]
    shown_shapes = [shape for _, shape in objects + unnamed]
    other_colours = [colour for colour in world.colours if colour not in shown_colours]
    other_shapes = [shape for shape in world.shapes if shape not in shown_shapes]
    new_colour = rng.choice(other_colours)
    new_shape = rng.choice(other_shapes)
    return [
        [(colour1, shape0), (colour0, shape1), *rest],
        [(new_colour, shape0), (colour1, shape1), *rest],
        [(colour0, new_shape), (colour1, shape1), *rest],
        [(colour1, shape1), (colour0, shape0), *rest],
    ]


def draw_shape(draw, shape, x, y, r, fill):
    """Draw one shape around (x, y); r is half its width in pixels, fill its colour."""
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
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=max(1, round(r / 2.5)))
    elif shape == "frame":
        draw.rectangle(box, outline=fill, width=max(1, round(r / 2.5)))
    elif shape == "bar":
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
    elif shape == "pillar":
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)
    elif shape == "funnel":
        draw.polygon([(x, y + r), (x + r, y - r), (x - r, y - r)], fill=fill)
    elif shape == "bowl":
        draw.pieslice((x - r, y - 2 * r, x + r, y + r), 0, 180, fill=fill)
    else:       # slash
        draw.line((x - r, y + r, x + r, y - r), fill=fill, width=max(1, round(r / 2)))


# ---- tables and tars: pairs on disk ----------------------------------------

IMAGE_KEYS = ("image", "image_path", "filepath", "file_name", "filename", "path")
# Optional columns. With --captions, BESIDE_CAPTIONS come from that table.
BESIDE_CAPTIONS = ("concepts", "negatives", "units")
BESIDE_IMAGES = ("negative_image", "neighbours")
# Columns of the table that --captions names, see JoinedCaptions.
JOIN_KEYS = ("url", "image_url", "key", "__key__", "Image Path", *IMAGE_KEYS)
# Raise it when make_sample or a reader keeps something else of a row: older indices are made anew.
ROWS_VERSION = 2
# What the members of a tar are, by their ending; others are passed over.
MEMBERS = {
    ".jpg": "image",
    ".jpeg": "image",
    ".png": "image",
    ".webp": "image",
    ".txt": "txt",
    ".json": "json",
}
MAX_PIXELS = 89_478_485     # above which pillow warns, where it does
# All that pillow may open; an EPS named x.jpg, for one, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Train the tokenizer on the captions of so many rows at most, and on so many letters of a word.
TOKENIZER_ROWS = 200_000
TOKENIZER_LETTERS = 100
# Several files of so many bytes together are read by several processes.
PARALLEL_FROM = 2**26
# So many reports of a file are kept; all of them are counted.
MAX_REPORTS = 1000
# The longest name that a tar may give to a member, in bytes.
MAX_NAME = 2**20


class CaptionFile(Dataset):
    """Image-caption pairs of tables (.csv, .tsv, .jsonl), tar shards, and the annotations of COCO
    and Karpathy (.json), as one data set.

    Optional columns or json keys of any of them: concepts and negatives (lists, or texts with |
    in between), negative_image (a path), neighbours (numbers of rows of the same file, counted
    from 0; those of rows that are not used or not there, such as -1, are passed over), and units (a
    json list of pairs, a part of the caption and a false version of it).

    sources      files joined by "::"; {000..331}, {a,b}, * and ? are patterns, as in a shell
    image_root   folder that the image paths of tables are relative to
    image_key    column of the image paths; by default the first of IMAGE_KEYS that there is
    caption_key  column or json key of the captions, or several joined by commas; by default the
                 first of CAPTION_KEYS that is not empty. A list in a column, in json or as Python
                 prints it, is several captions, of which `Seeded` draws one.
    captions     a table with the captions of the images in sources, joined by the first of
                 JOIN_KEYS that it has to the images' key, url or path
    max_pixels   largest image that is decoded, see load_image
    fast_decode  images are what load_fast gives, not load_image
    index_dir    folder for the indices of the files, see open_index; by default beside each file.
                 Each set of keys and captions has its own, about 1.4 times as large as a table;
                 they may be deleted when nothing reads the files

    Opening takes the same memory for any number of rows. Raises ValueError for files that cannot
    be used. Nothing else is lost without a trace:

    skipped    [(name, why)] of what was lost
    lost_rows  how many rows that was. A damaged tar is reckoned to have had as many rows as the
               whole ones beside it have on average, or twice what is left if it is alone.
    remarks    [(name, what)] of what looks like a mistake in the files, though no row was lost

    And source_sizes is a list of how many rows each of the sources has, see weigh_sources.
    """

    def __init__(self, sources, image_root="", image_key=None, caption_key=None, captions=None,
                 max_pixels=None, fast_decode=False, index_dir=None):
        self.root = image_root
        self.max_pixels = max_pixels
        self.load = load_fast if fast_decode else load_image
        self.skipped = []
        self.remarks = []
        columns = set()
        caption_keys = []
        if caption_key:
            caption_keys = [key.strip() for key in caption_key.split(",")]
        joined = None
        if captions:
            joined = JoinedCaptions(captions, caption_keys, index_dir)
            self.remarks += joined.remarks
            columns |= joined.columns
        paths = []
        part_bounds = [0]       # source i has the parts part_bounds[i]:part_bounds[i + 1]
        for source in sources.split("::"):
            paths += expand(source)
            part_bounds.append(len(paths))
        image_key = image_key.strip() if image_key else None
        options = Options(image_key, caption_keys, joined, index_dir)
        self.parts = open_parts(paths, options)         # the rows of each file
        for part in self.parts:
            self.skipped += part.skipped
            self.remarks += part.remarks
            columns |= part.columns
        if joined:
            self.skipped = joined.unused(self.parts) + self.skipped
        # The first row of each file in the whole data set, and the number of all rows.
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])
        self.source_sizes = np.diff(self.starts[part_bounds]).tolist()
        self.lost_rows = count_lost(self.parts)
        self._check(sources, options, columns)

    def _check(self, sources, options, columns):
        """Raise ValueError if a table, or all of it, or a column that was asked for, is empty."""
        tables = [part for part in self.parts if not is_tar(part.path)]
        useless = [part.path for part in tables if not part]
        missing = set(options.caption_keys) - columns
        if tables and options.image_key:
            missing |= {options.image_key} - columns
        if useless or missing or len(self) == 0:
            names = sorted(to_text(name) for name in columns)
            absent = f", not {', '.join(sorted(missing))}" if missing else ""
            why = "".join(f"; skipped {name}: {reason}" for name, reason in self.skipped[:1])
            raise ValueError(
                f"{', '.join(useless) or sources}: no images with captions in its columns or keys "
                f"{', '.join(names[:30])} (split at commas in .csv, tabs in .tsv){absent}; name "
                f"them with --image-key, --caption-key{why}")

    @property
    def captions(self):
        """All captions of at most TOKENIZER_ROWS rows, evenly spaced, to train a tokenizer on."""
        step = -(-len(self) // TOKENIZER_ROWS)
        texts = []
        for index in range(0, len(self), step):
            texts += self.sample(index)["captions"]
        return texts

    def __len__(self):
        return int(self.starts[-1])

    def sample(self, index):
        """What the file says of a row, without reading its image: key, image, captions, ...

        image is a path relative to image_root, or [tar, offset, size].
        """
        part, number = self._find(index)
        return part.read(number)

    def _find(self, index):
        """The file that holds a row of the data set, and the row's number among those it keeps."""
        which = bisect_right(self.starts, index) - 1
        return self.parts[which], index - int(self.starts[which])

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part, number = self._find(index)
        row = {"key": f"{part.path} (row {number + 1} of its index)"}
        try:
            row = part.read(number)
            part.check_unchanged()
            self._open_images(row)
            self._read_lists(row, part, index - number)
        except Exception as error:      # pillow's decoders raise nearly anything
            message = " ".join(to_text(error).split())
            return {"key": row["key"], "error": message or type(error).__name__}
        row["caption"] = row["captions"][0]
        return row

    def _open_images(self, row):
        negative = row.get("negative_image", "")
        if not isinstance(negative, str):       # a list would be taken as a place in a tar
            raise ValueError(f"negative_image {to_text(negative):.40}: expected a path")
        for name in ("image", "negative_image"):
            place = row.get(name)
            if isinstance(place, str):
                place = os.path.join(self.root, place)
            if place is not None:
                row[name] = self.load(place, self.max_pixels)

    def _read_lists(self, row, part, first):
        """The texts of a row become lists; first is the index of its file's first row."""
        if "concepts" in row:
            row["concepts"] = parse_list(row["concepts"])
        if "negatives" in row:
            row["negatives"] = parse_list(row["negatives"], empty=True)
        if "units" in row:
            row["units"] = parse_units(row["units"])
        if "neighbours" in row:
            numbers = row["neighbours"]
            if isinstance(numbers, (int, float)):
                numbers = [numbers]
            places = part.places(parse_list(numbers))
            row["neighbours"] = [first + place for place in places]


@dataclass
class Options:
    """How files are read, see CaptionFile."""
    image_key: str | None
    caption_keys: list
    joined: "JoinedCaptions | None"
    index_dir: str | None

    def identity(self, split):
        """What an index depends on beside its file; split: see file_and_split."""
        joined = self.joined.identity if self.joined else None
        return ["rows", ROWS_VERSION, self.image_key, self.caption_keys, joined, split]


def open_parts(paths, options):
    """Open the rows of each file, with a progress bar where that takes time."""
    # None: no bar where nobody sees it, which is not on a terminal.
    quiet = True if os.environ.get("RANK", "0") != "0" else None
    with tqdm(desc="reading", unit=" rows", delay=1, disable=quiet) as bar:
        index_new(paths, options, bar)
        parts = []
        for number, path in enumerate(paths, 1):
            bar.set_description(f"reading file {number:,} of {len(paths):,}", refresh=False)
            parts.append(Part(path, options, bar))
    return parts


def index_new(paths, options, bar):
    """Read the files that have no index yet by several processes, if there is much to read.

    The ranks of a host read different files. Later each waits for those that another is reading.
    """
    rank = int(os.environ.get("LOCAL_RANK", 0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    new = []
    size = 0
    for path in paths[rank::ranks]:
        file, split = file_and_split(path)
        if keeps_index(file) and not has_index(file, options.identity(split), options.index_dir):
            new.append(path)
            size += os.path.getsize(file)
    if len(paths) == 1 or size < PARALLEL_FROM:
        return
    # Forked, as the loader's workers are: they import nothing anew.
    pool = concurrent.futures.ProcessPoolExecutor(
        min(default_workers(), len(new)), multiprocessing.get_context("fork"), start_worker)
    with pool:
        counts = pool.map(functools.partial(index_one, options=options), new)
        try:
            for number, rows in enumerate(counts, 1):
                bar.set_description(f"read {number:,} of {len(new):,} files", refresh=False)
                bar.update(rows)
        except concurrent.futures.BrokenExecutor:
            raise OSError("a process that reads --data was killed, most often for want of memory: "
                          "start again, it goes on with the next file") from None


def index_one(path, options):
    """Open the rows of a file, so that it has an index; returns their number. What is wrong with
    it is said when it is opened again."""
    try:
        return len(Part(path, options, tqdm(disable=True)))
    except (ValueError, OSError):
        return 0


class Part:
    """The usable rows of one file, by its index.

    skipped, remarks    see CaptionFile: the first MAX_REPORTS
    lost     the number of rows that are not usable; where the file itself is torn, an estimate
    columns  the names of all columns or keys of the file
    """

    def __init__(self, path, options, bar):
        self.path = path
        file, split = file_and_split(path)
        self.index, remarks = open_index(
            file, options.identity(split), options.index_dir,
            lambda writer: write_rows(path, options, writer, bar))
        about = self.index.about
        self.skipped = [tuple(pair) for pair in about["skipped"]]
        self.remarks = [tuple(pair) for pair in about["remarks"]] + remarks
        self.lost = about["lost"]
        self.torn = about["torn"]
        self.columns = set(about["columns"])
        self.stamp = about["stamp"]

    def __len__(self):
        return len(self.index)

    def read(self, number):
        """Row number of those that are usable: see CaptionFile.sample."""
        row = self.index.read(number)
        if is_tar(self.path):
            row["key"] = f"{self.path} {row['key']}"
            row["image"] = [self.path, *row["image"]]
        return row

    def check_unchanged(self):
        """Raise OSError if a tar is not the one whose places are known any more."""
        if is_tar(self.path) and file_stamp(self.path) != self.stamp:
            raise OSError("its tar has changed since training began")

    def places(self, texts):
        """Indices of usable rows from texts of row numbers in the file, without the others."""
        numbers = self.index.column("numbers")
        found = []
        for text in texts:
            number = row_number(text)
            place = int(np.searchsorted(numbers, number))
            if place < len(self) and numbers[place] == number:
                found.append(place)
        return found


def row_number(text):
    """The whole number that a text is, 1.0 as well, which is how pandas writes a column with gaps.
    ValueError for anything else."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer() or abs(number) >= 2**53:
        raise ValueError(f"neighbours {text:.40}: expected numbers of rows, from 0")
    return int(number)


def write_rows(path, options, writer, bar):
    """Write the rows of a file into an index, with the columns
    numbers  the number of each row in the file, where some are not usable
    used     the places of the joined captions that were used
    Returns what is to be remembered of the file, see Part."""
    try:
        return write_each(read_pairs(path), path, options, writer, bar)
    except ScatteredTar:
        writer.clear()
        return write_each(read_pairs(path, scattered=True), path, options, writer, bar)


def write_each(rows, path, options, writer, bar):
    """Write rows, and note what there is to report, see write_rows."""
    notes = Notes()
    number = 0
    for row in name_errors(path, rows):
        if isinstance(row, Report):
            notes.add(row)
            number += row.rows
            continue
        notes.add_columns(row)
        sample = make_sample(path, number, row, options, writer)
        if isinstance(sample, Report):
            notes.add(sample)
        else:
            writer.text(sample)
            writer.number("numbers", number)
        number += 1
        if number % 1000 == 0:
            bar.update(1000)
    return vars(notes)


class Notes:
    """What is remembered of a file beside its rows: see Part."""

    def __init__(self):
        self.columns = {}       # an ordered set of names
        self.skipped = []
        self.remarks = []
        self.lost = 0
        self.torn = False

    def add(self, report):
        pairs = self.skipped if report.rows else self.remarks
        if len(pairs) < MAX_REPORTS:
            pairs.append((report.name, report.why))
        self.lost += report.rows
        self.torn |= report.torn

    def add_columns(self, row):
        if row.keys() != self.columns.keys():       # most rows have those of the first
            self.columns.update(dict.fromkeys(row))


class JoinedCaptions:
    """A table of captions, found by the name of an image: its key, its url or its path.

    Several rows of one name are several captions. The names are found by their hashes, which are
    sorted in the table's index, so that 10 million captions are not in memory.
    """

    def __init__(self, path, caption_keys, index_dir):
        self.path = path
        identity = ["captions", ROWS_VERSION, caption_keys]
        self.index, remarks = open_index(
            path, identity, index_dir,
            lambda writer: write_captions(path, caption_keys, writer))
        about = self.index.about
        self.identity = [os.path.abspath(path), about["stamp"]]
        self.columns = set(about["columns"])
        self.name_column = about["name_column"]
        # Rows lost here count where an image misses its caption.
        self.remarks = [tuple(pair) for pair in about["remarks"] + about["skipped"]] + remarks

    def find(self, row, image):
        """Return the rows about one image, [] if there are none, and where their name is in the
        order of hashes."""
        hashes = self.index.column("hashes")
        order = self.index.column("order")
        for name in (row.get("key"), row.get("url"), image):
            if name in (None, ""):      # a blank name is none
                continue
            hashed = name_hash(name)
            place = int(np.searchsorted(hashes, hashed))
            found = []
            for number in order[place:np.searchsorted(hashes, hashed, "right")]:
                other, about = self.index.read(int(number))
                if other == str(name):
                    found.append(about)
            if found:
                return found, place
        return [], None

    def unused(self, parts):
        """[] or one (name, why) about the captions that fit no image of some parts."""
        hashes = self.index.column("hashes")
        first_of_name = np.ones(len(hashes), bool)
        first_of_name[1:] = hashes[1:] != hashes[:-1]
        for part in parts:
            first_of_name[part.index.column("used")] = False
        lost = int(first_of_name.sum())
        if not lost:
            return []
        first = self.index.column("order")[first_of_name].min()
        name, _ = self.index.read(int(first))
        why = f"{lost:,} {self.name_column} fit no image, the first is {name!r}"
        return [(self.path, why)]


def name_hash(name):
    """63 bits that stand for a name of an image, equal on all processes."""
    digest = hashlib.blake2b(str(name).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def write_captions(path, caption_keys, writer):
    """Write a table of captions into an index: texts [name, dict], with the columns
    hashes  of the names, sorted
    order   the numbers of the texts in this order
    Returns what is to be remembered of the table, see JoinedCaptions."""
    notes = Notes()
    name_column = ""
    wanted = {*(caption_keys or CAPTION_KEYS), *BESIDE_CAPTIONS}
    hashes = array("q")
    for row in name_errors(path, read_rows(path)):
        if isinstance(row, Report):
            notes.add(row)
            continue
        notes.add_columns(row)
        column = first_present(JOIN_KEYS, row)
        name_column = column or name_column
        name = row.get(column)
        name = "" if name is None else str(name)
        about = {key: value for key, value in row.items() if key in wanted}
        writer.text([name, about])
        hashes.append(name_hash(name))
    if not name_column:
        names = ", ".join(map(to_text, notes.columns))
        raise ValueError(f"{path}: its columns or keys {names:.200} do not say of which image a "
                         f"caption is: expected one of {', '.join(JOIN_KEYS)}")
    beside = [column for column in BESIDE_CAPTIONS if column in notes.columns]
    if beside and len(set(hashes)) < len(hashes):
        notes.add(Report(path, f"several rows are of one image: their {', '.join(beside)} are not "
                               "used, as each belongs to one of its captions"))
    order = np.argsort(hashes, kind="stable")
    writer.numbers("hashes", np.array(hashes)[order])
    writer.numbers("order", order)
    return {**vars(notes), "name_column": name_column}


@dataclass
class Report:
    """What a reader gives in place of rows that are lost, or as a remark."""
    name: str           # of the row or file, for the user
    why: str            # what is the matter with it
    rows: int = 0       # so many are lost
    torn: bool = False  # the file itself is damaged, and rows an estimate


def count_lost(parts):
    """The number of rows that files have lost, see CaptionFile.lost_rows."""
    whole = [len(part) for part in parts if is_tar(part.path) and not part.torn]
    total = 0
    for part in parts:
        lost = part.lost
        if part.torn:
            expected = 2 * len(part)
            if whole:
                expected = round(sum(whole) / len(whole))
            lost = max(lost, expected - len(part))
        total += lost
    return total


def make_sample(path, number, row, options, writer):
    """What is kept of a row of a table or tar: a dict without empty values, or a Report.

    Where captions are joined, the writer is told which were used.
    """
    name, key, image = name_and_image(path, number, row, options.image_key)
    sources = [row]
    if options.joined:
        sources, place = options.joined.find(row, image)
        if sources:
            writer.number("used", place)
    try:
        captions = captions_of(sources, options.caption_keys)
    except ValueError as error:
        return Report(name, f"caption {error}", 1)
    if not image:
        return Report(name, "no image", 1)
    if not captions:
        return Report(name, "no caption", 1)
    sample = {"key": key, "image": image, "captions": captions}
    of_captions = {}
    if len(sources) == 1:       # else they would be of one caption, and train with all
        of_captions = sources[0]
    for source, columns in ((of_captions, BESIDE_CAPTIONS), (row, BESIDE_IMAGES)):
        for column in columns:
            if not is_empty(source.get(column)):
                sample[column] = source[column]
    return sample


def name_and_image(path, number, row, image_key):
    """Return a row's name in reports, its key, and where its image is (false without one).

    The image is a path, as the table has it, or [offset, size] in the tar, where the key is
    without the tar's name, so that an index stays true when its folder is moved.
    """
    if is_tar(path):
        return f"{path} {row['key']}", row["key"], row["image"]
    column = image_key or first_present(IMAGE_KEYS, row)
    image = row.get(column)
    image = None if is_empty(image) else str(image)
    name = f"{to_text(image or '(no image)')} (row {number + 1})"
    return name, name, image


def captions_of(rows, caption_keys):
    """All captions of some rows: of each column that was asked for, or else of the first of
    CAPTION_KEYS that is not empty."""
    texts = []
    for row in rows:
        for key in caption_keys or CAPTION_KEYS:
            found = parse_list(row[key], separator=None) if row.get(key) else []
            texts += found
            if found and not caption_keys:
                break
    return texts


def is_empty(value):
    """Whether a cell or json value says nothing: None, NaN (an empty cell of pandas), a blank text
    or an empty list."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value or value == []


def first_present(keys, row):
    """The first of the keys that the row has, "" without one."""
    for key in keys:
        if key in row:
            return key
    return ""


# ---- an index of a file ----------------------------------------------------

INDEX_FORMAT = 1
TEXT_ENCODER = json.JSONEncoder(check_circular=False)       # a fifth faster: no value holds itself
INDEX_MARK = b"c2lip-1\n"           # the last bytes of an index that is whole
INDEX_FOLDER = ".c2lip-index"       # beside the file
INDEX_FROM = 2**22                  # bytes of a table that has one, see keeps_index
# The digest of an index is over so many blocks at most, of so many bytes.
DIGEST_BLOCKS = 32
DIGEST_SIZE = 2**16


class Index:
    """Json texts and columns of integers in one file, which is mapped into memory and not read:
    it opens at once, and all processes of a host share its pages.

    The file: the texts one behind the other, zeros up to a multiple of 8 bytes, the columns
    (int64), a json text about all this, the length of this text (int64), INDEX_MARK.

    about  what was known of the file when the index was written
    """

    def __init__(self, content, path=None):
        """content: uint8 array; path: the file that it is mapped from, None if from none.
        Raises ValueError if it is not whole."""
        self.content = content
        self.path = path
        if content[-8:].tobytes() != INDEX_MARK:
            raise ValueError("no mark at the end")
        length = int(content[-16:-8].view(np.int64)[0])
        size = len(content) - 16 - length               # of texts and columns
        self.about = json.loads(content[size:-16].tobytes())
        if self.about["digest"] != sampled_digest(content[:size]):
            raise ValueError("another digest")
        self.ends = self.column("ends")

    @classmethod
    def map(cls, path):
        """Open an index by its file. Raises ValueError or OSError."""
        size = os.path.getsize(path)
        if size == 0:
            raise ValueError("it is empty")
        # As mmap does, but without a file that stays open: of those a process may have 1,024.
        mapped = torch.from_file(path, size=size, dtype=torch.uint8)
        return cls(mapped.numpy(), path)

    def __reduce__(self):
        # A worker that is spawned, not forked, maps the file itself.
        if self.path:
            return Index.map, (self.path,)
        return Index, (self.content,)

    def column(self, name):
        """int64 (N,), a view of the file; empty if nothing was written into this column."""
        first, count = self.about["places"].get(name, (0, 0))
        return self.content[first:first + 8 * count].view(np.int64)

    def __len__(self):
        return len(self.ends)

    def read(self, number):
        """The value of a json text. Raises ValueError for one that is damaged."""
        first = self.ends[number - 1] if number else 0
        try:
            return json.loads(self.content[first:self.ends[number]].tobytes())
        except ValueError:
            raise ValueError(
                f"the index {self.path} is damaged: remove it, and start again") from None


class IndexWriter:
    """Writes an Index in little memory: texts to its file, columns to files without a name.

    path  of the index, which appears there when it is finished; None: it stays in memory

    Its methods raise OSError where they cannot write.
    """

    def __init__(self, path=None):
        self.path = path
        self.file = io.BytesIO()
        self.size = 0               # of the texts
        make_file = io.BytesIO
        if path:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self.partial = f"{path}.{os.urandom(8).hex()}.partial"
            self.file = open(self.partial, "w+b")
            make_file = functools.partial(tempfile.TemporaryFile, dir=os.path.dirname(path))
        self.columns = defaultdict(make_file)       # name -> file

    def text(self, value):
        """Write the next text."""
        content = TEXT_ENCODER.encode(value).encode()
        self.file.write(content)
        self.size += len(content)
        self.number("ends", self.size)

    def number(self, column, value):
        """Write the next number of a column."""
        self.columns[column].write(value.to_bytes(8, "little"))

    def numbers(self, column, values):
        """Write a whole column, int64."""
        self.columns[column].write(values.tobytes())

    def clear(self):
        """Begin anew."""
        self.file.seek(0)
        self.file.truncate()
        for column in self.columns.values():
            column.close()
        self.columns.clear()
        self.size = 0

    def finish(self, about):
        """Write the columns and what is known about the file; returns the Index."""
        places = self._copy_columns()
        digest = sampled_digest(self._content())
        self._write_about({**about, "places": places, "digest": digest})
        if self.path is None:
            return Index(self._content())
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.partial, self.path)     # others see a whole index or none
        return Index.map(self.path)

    def _copy_columns(self):
        """Write the columns behind the texts; returns {name: (position, how many numbers)}."""
        self.file.write(bytes(-self.size % 8))
        places = {}
        for name, column in self.columns.items():
            places[name] = (self.file.tell(), column.tell() // 8)
            column.seek(0)
            shutil.copyfileobj(column, self.file, 2**20)
        return places

    def _write_about(self, about):
        """Write the end of the file, see Index."""
        text = json.dumps(about).encode()
        text += b" " * (-len(text) % 8)         # its length, too, is at a multiple of 8 bytes
        length = len(text).to_bytes(8, "little")
        self.file.write(text + length + INDEX_MARK)

    def _content(self):
        """All bytes so far, as an array."""
        if self.path is None:
            return np.frombuffer(self.file.getvalue(), np.uint8)
        self.file.flush()
        if self.file.tell() == 0:
            return np.zeros(0, np.uint8)
        return np.memmap(self.partial, np.uint8, "r")

    def close(self):
        """Remove what was written, unless it is finished."""
        for file in (self.file, *self.columns.values()):
            with contextlib.suppress(OSError):      # a full disk again
                file.close()
        if self.path:
            with contextlib.suppress(OSError):
                os.remove(self.partial)


def sampled_digest(content):
    """CRC-32 of blocks that are spread over an array of bytes: finds what is cut, zeroed or of
    another file, without reading gigabytes at each start."""
    step = max(DIGEST_SIZE, -(-len(content) // DIGEST_BLOCKS))
    digest = len(content)
    for first in range(0, len(content), step):
        digest = zlib.crc32(content[first:first + DIGEST_SIZE], digest)
    return digest


def file_stamp(path):
    """What tells whether a file is the same as before: [size, time of change in ns]."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


def open_index(path, identity, index_dir, write):
    """Open the index of a file; write it first if there is none for just this file and identity.

    write       writes the rows of the file to an IndexWriter and returns what to remember
    identity    json value: what the rows depend on, beside the file
    index_dir   where indices are; None: beside the file or, where that cannot be written, in the
                user's cache folder. Where neither can be, they are in this process's memory.
    Returns the Index, and remarks about it as CaptionFile has them.
    """
    if not keeps_index(path):
        return write_index(path, None, write), []
    for folder in index_folders(path, index_dir):
        try:
            return find_or_write(path, index_path(path, identity, folder), write)
        except CannotWrite as error:
            problem = error.strerror
    # The text names the folder, so that Python shows this warning once a folder.
    warnings.warn(f"{index_dir or os.path.dirname(path)}: {problem}: indices of its files are kept "
                  "in memory only, and made anew at each start. Give a folder with --index-dir")
    return write_index(path, None, write), []


def keeps_index(path):
    """Whether the index of a file is kept on disk. A small table is read into memory each time: it
    takes a moment, and no file is left behind."""
    return is_tar(path) or os.path.getsize(path) >= INDEX_FROM


def has_index(path, identity, index_dir):
    """Whether the index of a file, see open_index, is on disk."""
    folders = index_folders(path, index_dir)
    return any(os.path.exists(index_path(path, identity, folder)) for folder in folders)


def find_or_write(path, target, write):
    """Open the index of a file at its place, or write it there; see open_index.

    Raises CannotWrite if it is not there, and cannot be.
    """
    index, remarks = find_index(path, target)
    if index is not None:
        return index, remarks
    with locked(target) as alone:
        index, remarks = find_index(path, target)       # another process may have written it
        if index is None:
            remove_old(target, alone)
            index = write_index(path, target, write)
        return index, remarks


def find_index(path, target):
    """Return the Index of a file at its place, or None, and a remark if it is damaged."""
    try:
        return Index.map(target), []
    except FileNotFoundError:
        return None, []
    except Exception as error:      # damage raises nearly anything
        problem = str(error) or type(error).__name__
        return None, [(path, f"its index was damaged ({problem}) and is made anew")]


def write_index(path, target, write):
    """Write the index of a file to its place, None for memory; reads the file a second time if it
    is changed meanwhile. Raises ValueError for a file that cannot be read, or CannotWrite."""
    for _ in range(2):
        stamp = file_stamp(path)
        try:
            with contextlib.closing(IndexWriter(target)) as writer:
                about = write(writer)
                if file_stamp(path) == stamp:
                    return writer.finish({**about, "stamp": stamp})
        except ValueError:
            if file_stamp(path) == stamp:
                raise
        except OSError as error:        # of the writer: see name_errors
            raise CannotWrite(error.errno, error.strerror) from error
    raise ValueError(f"{path} is being written: it changed twice while it was read")


class CannotWrite(OSError):
    """An index cannot be written to a place: no permission, a full disk."""


def index_folders(path, index_dir):
    """Where the index of a file may be, in the order of preference."""
    if index_dir:
        return [index_dir]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [os.path.join(os.path.dirname(path), INDEX_FOLDER),
            os.path.join(cache, "c2lip", "index")]


def index_path(path, identity, folder):
    """The index of a file in a folder: its name has a hash of what the rows depend on, and the
    file's size and time. In a folder that is not beside the file the hash is of its place, too."""
    place = None
    if os.path.basename(folder) != INDEX_FOLDER:
        place = os.path.abspath(path)
    name = os.path.basename(path)
    text = json.dumps([INDEX_FORMAT, name, place, identity])
    hashed = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    size, time = file_stamp(path)
    return os.path.join(folder, f"{name[:100]}.{hashed}.{size}.{time}.index")


def remove_old(target, alone):
    """Remove the indices of former states of a file and, if no other process can be writing one,
    what a kill has left of one. A process that still uses one keeps its pages."""
    endings = (".index", ".partial", ".lock") if alone else ".index"
    name = target.rsplit(".", 3)[0]         # without size, time and ending
    for old in glob.glob(glob.escape(name) + ".*"):
        if old.endswith(endings) and old not in (target, f"{target}.lock"):
            with contextlib.suppress(OSError):
                os.remove(old)


@contextlib.contextmanager
def locked(target):
    """Let one process at a time write an index; the others wait, however long it takes. A kill
    ends the lock. Gives whether it is the only one: a file system may have no locks, then all
    write, and the last one is kept. Raises CannotWrite where no file can be made."""
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        file = open(f"{target}.lock", "w")
    except OSError as error:
        raise CannotWrite(error.errno, error.strerror) from error
    with file:
        alone = False
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        try:
            yield alone
        finally:
            # Whoever waits for this file, or makes another of its name, looks for the index first.
            with contextlib.suppress(OSError):
                os.remove(file.name)


# ---- patterns, tables, tars: reading them ----------------------------------

def expand(source):
    """Return the files that "a/{08..11}.tar", "{a,b}.csv" or "*.tar" name, as a shell would.

    Raises ValueError for one that is not there.
    """
    if os.path.isfile(file_and_split(source)[0]):
        return [source]
    braces = re.search(r"\{((\d+)\.\.(\d+)|[^{}]*,[^{}]*)\}", source)
    if not braces:
        paths = [path for path in sorted(glob.glob(source)) if os.path.isfile(path)]
        if paths:
            return paths
        raise ValueError(
            f"no file {source}: expected tables with a row for each image-caption pair, or "
            "tar shards; '{00000..00331}.tar' and '*.tar', in quotes, are many")
    inside, first, last = braces.groups()
    words = inside.split(",")
    if first:
        numbers = range(int(first), int(last) + 1)
        words = [str(number).zfill(len(first)) for number in numbers]
    paths = []
    for word in words or [inside]:      # a range of none: then no file has this name
        paths += expand(source.replace(braces[0], word, 1))
    return paths


def is_tar(path):
    return path.lower().endswith(".tar")


# Another format is a generator of dicts and Reports here, and its ending in keeps_index. (Tars hold
# their images, which concerns name_and_image and Part, too.)
def read_pairs(path, scattered=False):
    """The rows of a file, dicts, and Reports: see read_shard, read_annotations, read_rows."""
    if is_tar(path):
        return read_shard(path, scattered)
    if file_and_split(path)[0].endswith(".json"):
        return read_annotations(path)
    return read_rows(path)


def name_errors(path, rows):
    """Yield the rows; an error of reading them becomes a ValueError that names the file."""
    try:
        yield from rows
    except OSError as error:
        raise ValueError(f"{path} cannot be read to its end: {error}") from None


def file_and_split(path):
    """"FILE.json#val" -> ("FILE.json", "val"); any other path -> (path, "train")."""
    match = re.fullmatch(r"(.*\.json)#(\w+)", path)
    return match.groups() if match else (path, "train")


def read_annotations(path):
    """Yield the images of COCO's captions_train2017.json or of Karpathy's dataset_flickr8k.json
    (Karpathy and Fei-Fei 2015), each a dict of image and caption, a list of all its captions.

    Karpathy's file has all splits, of which "#SPLIT" behind its name chooses one; the default,
    train, has restval, too, as is usual for COCO. Raises ValueError for other files, and for a
    split that the file does not have.
    """
    file, split = file_and_split(path)
    splits = ("train", "restval") if split == "train" else (split,)
    found = set()       # the splits that there are
    rows = []
    try:
        with open(file, encoding="utf-8") as f:
            content = json.load(f)
        captions = {}           # COCO: id of an image -> list
        for annotation in content.get("annotations", ()):
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        for image in content["images"]:
            if "sentences" not in image:
                rows.append({"image": image["file_name"], "caption": captions.get(image["id"])})
                continue
            found.add(image["split"])
            if image["split"] in splits:
                name = os.path.join(image.get("filepath", ""), image["filename"])
                sentences = [sentence["raw"] for sentence in image["sentences"]]
                rows.append({"image": name, "caption": sentences})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = " ".join(str(error).split())
        raise ValueError(
            f"{file}: expected captions_*.json of COCO or dataset_*.json of Karpathy's splits "
            f"({type(error).__name__} {what:.100})") from None
    if not found and path != file:
        raise ValueError(f"{path}: {file} has no splits: give it without #{split}")
    if not rows:
        there_are = ", ".join(sorted(map(str, found))) or "no images at all"
        raise ValueError(f"{path}: no images of this split, but {there_are}")
    yield from rows


def read_rows(path):
    """Yield the rows of a .csv, .tsv or .jsonl file as dicts, and Reports.

    A .csv has quotes, a .tsv has none. Raises ValueError for a file that cannot be used at all.
    """
    kind = os.path.splitext(path)[1].lower()
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{path}: expected a .csv, .tsv or .jsonl file, or .tar, or a .json as "
                         f"COCO's, got {kind or 'no ending'!r}")
    number = 0
    odd = {}        # see tally
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
        lines = watch_bytes(f, odd)
        if kind == ".jsonl":
            rows = read_json_lines(lines)
        else:
            rows = read_table(lines, DELIMITERS[kind], path)
        for number, (row, problem) in enumerate(rows, 1):
            if row and problem and runs_over(row, problem):
                row = None
                problem = "a quote that is not closed"
            if row is None:
                yield Report(path, f"row {number:,}: {problem}", 1)
                continue
            if problem:
                tally(odd, "row", problem, number)
            yield row
    if number == 0:
        raise ValueError(f"{path}: no rows")
    yield from remarks_of(path, odd)


def runs_over(row, problem):
    """Whether a quote of a row with a problem ran over the end of its line: then its cell ends
    with the line break, and what is in it may be only a part of the text."""
    cells = [cell for cell in row.values() if cell]
    return problem.startswith("a quote") and bool(cells) and cells[-1].endswith(("\n", "\r"))


def tally(odd, what, problem, number):
    """Count in odd, {(what, problem): [count, number of the first]}, what would fill pages if each
    instance were reported."""
    odd.setdefault((what, problem), [0, number])[0] += 1


def remarks_of(path, odd):
    """A Report of each sort that was tallied."""
    for (what, problem), (count, first) in odd.items():
        yield Report(path, f"{count:,} {what}s, the first is {what} {first:,}: {problem}")


def watch_bytes(lines, odd):
    """Yield the lines, and count those with bytes that were no UTF-8."""
    for number, line in enumerate(lines, 1):
        tally_bytes(odd, "line", line, number)
        yield line


def tally_bytes(odd, what, text, number):
    if "\ufffd" in text:
        problem = "bytes that are no UTF-8, read as \ufffd. Save the file as UTF-8"
        tally(odd, what, problem, number)


def read_json_lines(lines):
    """Yield (object, ""), or (None, what is wrong), for each line that is not blank."""
    for line in lines:
        if not line.strip():
            continue
        row = parse_json(line)
        if row:
            yield row, ""
        else:
            yield None, "not an object in json"


def read_shard(path, scattered=False):
    """Yield the samples of a tar, as img2dataset and webdataset write them, as dicts; Reports at
    the end of what is odd, and if it is damaged.

    Each has key, image ([offset, size] in the tar, or None), txt if there is one, and the keys of
    its json. Members of one name, but for the ending, are one sample; a second image or text of
    that name begins another one.

    scattered  the members of a sample may stand anywhere, and all samples are in memory. Without
               it they stand side by side: raises ScatteredTar at the end if they did not
    """
    size = os.path.getsize(path)
    damages = []
    odd = {}        # see tally
    join = join_scattered if scattered else join_neighbours
    count = 0
    with open(path, "rb") as f:
        for sample in join(useful_members(f, size, damages)):
            count += 1
            json_text = sample.pop("json", "")
            tally_bytes(odd, "sample", json_text + sample.get("txt", ""), count)
            yield {**parse_json(json_text), **sample}
    yield from remarks_of(path, odd)
    if not damages and not count:
        damages.append(DamagedTar("no image and no caption is in it", 0))
    for damage in damages:      # one at most
        lost = 1
        if damage.position:
            lost = max(1, math.ceil((size / damage.position - 1) * count))
        yield Report(f"{path} is damaged or cut off from byte {damage.position:,} on",
                     f"{damage}; rows lost: {lost:,} or more", lost, torn=True)


def useful_members(f, size, damages):
    """Yield (key, kind, content) of the members of a tar that MEMBERS names: [offset, size] of an
    image, else a text. Where the tar is damaged it ends, and adds the DamagedTar to a list."""
    try:
        for name, offset, length in tar_members(f, size):
            key, ending = os.path.splitext(name.removeprefix("./"))
            kind = MEMBERS.get(ending.lower())
            if kind == "image":
                yield key, kind, [offset, length]
            elif kind:
                yield key, kind, read_at(f, offset, length).decode("utf-8", "replace")
    except DamagedTar as damage:
        damages.append(damage)


def join_neighbours(members):
    """Yield the sample of members that follow one another under one name. Raises ScatteredTar at
    the end if a name came back."""
    sample = {}
    names = array("q")          # 8 bytes for each sample: all that stays in memory
    for key, kind, content in members:
        if sample.get("key") != key:
            names.append(hash(key))
        if sample.get("key") != key or sample.get(kind):
            if sample:
                yield sample
            sample = {"key": key, "image": None}
        sample[kind] = content
    if sample:
        yield sample
    hashes = np.sort(names)
    if (hashes[1:] == hashes[:-1]).any():
        raise ScatteredTar


def join_scattered(members):
    """The samples of members in any order, a list in the order of their first members."""
    samples = []
    latest = {}         # the sample that a name belongs to now
    for key, kind, content in members:
        if key not in latest or latest[key].get(kind):
            latest[key] = {"key": key, "image": None}
            samples.append(latest[key])
        latest[key][kind] = content
    return samples


class ScatteredTar(Exception):
    """The members of a sample do not stand side by side in a tar."""


class DamagedTar(ValueError):
    """A tar cannot be read on from a position, in bytes."""

    def __init__(self, why, position):
        super().__init__(why)
        self.position = position


# The kinds of members of a tar (POSIX ustar and pax, GNU) that matter here.
TAR_FILES = (b"0", b"\0", b"7")
TAR_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")      # links, devices, folders
TAR_LONG_NAME = b"L"
TAR_PAX_HEADER = b"x"
TAR_IGNORED = (b"K", b"g")      # the target of a link, a header for all members
TAR_BLOCK = 512
# Where the fields of a header are.
TAR_NAME = slice(0, 100)
TAR_SIZE = slice(124, 136)
TAR_CHECKSUM = slice(148, 156)
TAR_KIND = slice(156, 157)
TAR_MAGIC = slice(257, 263)
TAR_PREFIX = slice(345, 500)


def tar_members(f, size):
    """Yield (name, offset, size) of each file in an open tar of so many bytes, and in tars that
    were written behind it.

    Raises DamagedTar where it is cut off, or where something else is in place of a header. Only
    headers are read, several times as fast as by tarfile, which moreover ends in silence at a
    damaged header, and never ends at a negative size.
    """
    position = 0        # behind the last member that is whole
    while position < size:
        try:
            start = skip_empty_blocks(f, position, size)
            if start >= size:
                return
            name, offset, length, kind = read_member(f, start, size)
        except ValueError as error:
            raise DamagedTar(str(error), position) from None
        if kind in TAR_FILES and not name.endswith("/"):
            yield name, offset, length
        position = next_block(offset + length)
    raise DamagedTar("the mark of its end is missing", min(position, size))


def next_block(position):
    """A position rounded up to whole blocks of a tar."""
    return -(-position // TAR_BLOCK) * TAR_BLOCK


def skip_empty_blocks(f, position, size):
    """The position behind empty blocks: two of them, or one at the end, are the end of a tar."""
    start = position
    while position < size:
        block = read_at(f, position, min(TAR_BLOCK, size - position))
        if block.count(0) < len(block):
            break
        position += TAR_BLOCK
    if position < size and position - start == TAR_BLOCK:
        raise ValueError("an empty block between its members")
    return position


def read_member(f, position, size):
    """Return name, offset and size of the content, and kind of the member at a position of a tar,
    behind the extended headers that may describe it. Raises ValueError."""
    described = {}
    while True:
        name, length, kind = parse_tar_header(read_at(f, position, TAR_BLOCK))
        position += TAR_BLOCK
        if kind == TAR_LONG_NAME:
            text = read_at(f, position, min(length, MAX_NAME))
            described["path"] = text.rstrip(b"\0").decode("utf-8", "replace")
        elif kind == TAR_PAX_HEADER:
            described.update(parse_pax(read_at(f, position, min(length, MAX_NAME))))
        elif kind not in TAR_IGNORED:
            break
        position = next_block(position + length)
    name = described.get("path", name)
    length = int(described.get("size", length))
    if kind in TAR_WITHOUT_CONTENT:
        length = 0
    if not 0 <= length <= size - position:
        raise ValueError("its last member is cut off")
    return name, position, length, kind


def parse_tar_header(block):
    """Name, size and kind of a member from the 512 bytes of its header. Raises ValueError."""
    check_tar_header(block)
    length = parse_tar_number(block[TAR_SIZE])
    if length < 0:
        raise ValueError("a header with a negative size")
    name = block[TAR_NAME].partition(b"\0")[0]
    prefix = block[TAR_PREFIX].partition(b"\0")[0]
    if prefix and block[TAR_MAGIC] == b"ustar\0":
        name = prefix + b"/" + name
    return name.decode("utf-8", "replace"), length, block[TAR_KIND]


def check_tar_header(block):
    """Raise ValueError unless the checksum is the sum of all bytes, its own taken as blanks."""
    checksum = parse_tar_number(block[TAR_CHECKSUM])
    content = block[:TAR_CHECKSUM.start] + b" " * 8 + block[TAR_CHECKSUM.stop:]
    # Some old tars have the sum of signed bytes.
    if checksum != sum(content) and checksum != np.frombuffer(content, np.int8).sum():
        raise ValueError("a damaged header")


def parse_tar_number(field):
    """A number in octal digits or, behind a byte that says so, in binary. Raises ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if field[0] == 0xff:
        return int.from_bytes(field, "big", signed=True)
    digits = field.partition(b"\0")[0].strip()
    if not re.fullmatch(rb"-?[0-7]*", digits):
        raise ValueError("a damaged header")
    return int(digits or b"0", 8)


def parse_pax(content):
    """A dict from the records "LENGTH KEY=VALUE\\n" of a pax header. Raises ValueError."""
    described = {}
    while content:
        digits = content.partition(b" ")[0]
        length = int(digits)
        if length <= len(digits):
            raise ValueError("a damaged pax header")
        record = content[len(digits) + 1:length - 1]
        key, _, value = record.partition(b"=")
        described[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        content = content[length:]
    return described


def read_at(f, position, length):
    """So many bytes of an open file; raises ValueError if there are fewer."""
    f.seek(position)
    content = f.read(length)
    if len(content) < length:
        raise ValueError("it is cut off")
    return content


def to_text(value):
    """A str that can be printed and encoded: lone surrogates, which json can hold, become "?"."""
    text = str(value)
    if text.isascii():
        return text
    return text.encode("utf-8", "replace").decode()


def parse_json(text):
    """The object in a json text, {} if there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


LIST_OF_TEXTS = re.compile(r"""\s*\[\s*['"]""")
# numpy prints ['a' 'b'], which Python would read as one text
WITHOUT_COMMA = re.compile(r"""['"]\s+['"]""")


def parse_list(value, separator="|", empty=False):
    """A list of stripped strings from a list, a list that was written as a text (see list_in_text),
    or a text with separators.

    separator  between the strings of a text; None: the text is one string, if it is no list
    empty      keep empty strings
    Raises ValueError for a list of anything but texts and numbers, and for a broken one: a text
    that begins with "[" or, where the separator is None and "[a] dog" is a caption, with "['".
    """
    texts = []
    for item in as_list(value, separator):
        if isinstance(item, (dict, list, tuple)):
            raise ValueError(f"{to_text(item):.40} in a list: expected a text")
        texts.append("" if item is None else to_text(item).strip())
    return texts if empty else [text for text in texts if text]


def as_list(value, separator):
    """The list that a value is, or that a text stands for: see parse_list."""
    if value is None or value != value:     # NaN, an empty cell of pandas
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        listed = list_in_text(value)
        if listed is not None:
            return listed
        if separator or LIST_OF_TEXTS.match(value):
            raise ValueError(f"{value:.40} is no list in json")
    if isinstance(value, str):
        return value.split(separator) if separator else [value]
    if not isinstance(value, list):
        raise ValueError(f"{to_text(value):.40}: expected a text, or a list of texts")
    return value


def list_in_text(text):
    """The list that a text is, in json or as Python prints it ("['a', 'b']"), which is how pandas
    writes a column of lists; None if it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if WITHOUT_COMMA.search(text):
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def parse_units(value):
    """A list of pairs of texts, or a text of one, see list_in_text. Else raises ValueError."""
    units = list_in_text(value) if isinstance(value, str) else value
    if not isinstance(units, list) or not all(is_pair(unit) for unit in units):
        raise ValueError(f"units {to_text(value)[:60]!r}: expected a json list of pairs of texts, "
                         '[["a red dog", "a black dog"], ...]')
    return [(to_text(unit).strip(), to_text(foil).strip()) for unit, foil in units]


def is_pair(value):
    """Whether it is a list of two texts, neither of which is blank."""
    is_two = isinstance(value, (list, tuple)) and len(value) == 2
    return is_two and all(isinstance(text, str) and text.strip() for text in value)


def load_image(file, max_pixels=None):
    """Read an image, whole, as RGB: 16 bits become 8, what is transparent becomes white. It is as
    it was stored, whatever orientation EXIF gives it.

    file        a path, an open file, or [tar, offset, size]
    max_pixels  larger images are refused before they are decoded, since a small file can hold one
                that takes gigabytes; None: 89,478,485, above which pillow warns
    Raises OSError for what is no image, or a truncated one, and ValueError for a too large one.
    """
    with open_image(open_bytes(file), max_pixels) as image:
        image.load()
        if image.mode.startswith("I"):
            levels = np.asarray(image).clip(0, 65535) // 257
            return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image if image.mode == "RGB" else image.convert("RGB")


def load_fast(file, max_pixels=None):
    """As load_image, but a JPEG becomes a uint8 tensor (3, H, W), which is cropped and resized
    twice as fast as a PIL image, at a difference of a few hundredths of a level in the mean.

    What torchvision cannot decode (CMYK, other formats, damage) is left to pillow.
    """
    if isinstance(file, str):
        file = [file, 0, os.path.getsize(file)]
    content = open_bytes(file).read()
    with open_image(io.BytesIO(content), max_pixels) as image:
        plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    if plain:
        try:
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            return decode_jpeg(encoded, ImageReadMode.RGB)
        except RuntimeError:
            pass        # pillow says what is the matter, or knows better
    return load_image(io.BytesIO(content), max_pixels)


def open_bytes(file):
    """[tar, offset, size] -> an open file of these bytes; anything else is returned as it is."""
    if not isinstance(file, list):
        return file
    path, offset, size = file
    # Opened anew by each process: workers that were forked would share one position.
    with open(path, "rb", buffering=0) as f:
        return io.BytesIO(os.pread(f.fileno(), size, offset))


def open_image(file, max_pixels=None):
    """Open an image without decoding it, see load_image."""
    limit = max_pixels or Image.MAX_IMAGE_PIXELS or MAX_PIXELS
    if Image.MAX_IMAGE_PIXELS is not None:      # pillow refuses twice as many
        Image.MAX_IMAGE_PIXELS = max(limit, Image.MAX_IMAGE_PIXELS)
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise OSError(f"cannot identify image file as one of {', '.join(FORMATS)}") from None
    width, height = image.size
    if width * height > limit:
        image.close()
        raise ValueError(f"{width} x {height} pixels are more than --max-pixels {limit}")
    return image


# ---- from rows to batches --------------------------------------------------

def train_transform(config):
    """The paper's augmentation: a crop of at least 90 % of the area, resized to a square, and no
    flip, because left and right are in the captions. The sides of a crop are 3:4 to 4:3. An image
    much longer than that has no such crop of 90 %, and gives its middle, as torchvision does it.

    PIL image or uint8 (3, H, W) -> uint8 (3, S, S); its randomness is from torch's generator, and
    the same for both. Pixels stay bytes until they are where the model is: a quarter of the memory
    and of the copies; normalize_images does the rest.
    """
    return functools.partial(crop, size=[config.image_size, config.image_size])


def crop(image, size, area=(0.9, 1), ratio=(3 / 4, 4 / 3)):
    """See train_transform; area: shares of the image's, ratio: width to height of the crop."""
    box = transforms.RandomResizedCrop.get_params(image, area, ratio)
    # The kernel for PIL images is pillow's own, that for bytes is torchvision's.
    image = v2.functional.resized_crop(image, *box, size, BICUBIC, antialias=True)
    if not isinstance(image, torch.Tensor):
        image = v2.functional.pil_to_tensor(image)
    return image.contiguous()       # else the batch would be channels-last


def normalize_images(images, config):
    """Bytes -> what the model takes: uint8 (..., 3, S, S) to float32, on the images' own device.

    The same numbers as torchvision's ToTensor and Normalize. Floats are taken to be normalised
    already and come back as they are.
    """
    if images.is_floating_point():
        return images
    normalised = images.float().div_(255)
    # Numbers, not tensors of them: a tensor would be copied to a GPU, which the CPU waits for.
    for channel, (mean, std) in enumerate(zip(config.mean, config.std)):
        normalised.select(-3, channel).sub_(mean).div_(std)
    return normalised


def unnormalize_images(images, config):
    """The inverse of normalize_images: bytes, or normalised floats (..., 3, S, S), to floats from
    0 to 1, on which attacks work. What normalize_pixels does to them can be differentiated."""
    if not images.is_floating_point():
        return images / 255
    mean, std = images.new_tensor([config.mean, config.std])[:, :, None, None]      # (3, 1, 1)
    return (images * std + mean).clamp(0, 1)


def normalize_pixels(pixels, config):
    """Floats from 0 to 1 (..., 3, S, S) -> what the model takes."""
    return v2.functional.normalize(pixels, config.mean, config.std)


# What negatives captions get, and K, how many.
NEGATIVES = {
    "swap": 1,      # two words exchanged
    "typed": 4,     # swap_each_kind
    "negate": 1,
    "mixed": 3,     # make_each_sort
    "pairs": 4,     # join_pair's, of which three are true
}


@dataclass
class Collate:
    """Rows -> a batch. Runs in the loader's workers, where it extracts concepts and tokenizes.

    A batch of B rows, neighbours of rows behind all others, rows with a partner as one:
    images (B, 3, S, S) as the transform gives them (train_transform: uint8, see normalize_images),
    tokens (B, L), keys and captions (lists of str)
    bad                  [(key, error)] of the rows that could not be read
    fallback             how many captions are their own concept, for want of another noun phrase
    concept_tokens       (U, L'), each different string once
    concept_ids          (U,) int64, a hash of the lower-case string; -1 for padding
    pairs                (P, 2) int64, (image, concept)
    spans                (B, M, 2) int64 with spans, instead of concept_tokens: [first, end) in
                         the caption's tokens; (0, 0) for padding. Then concept_ids is (B * M,),
                         and the concepts in pairs are counted in B * M.
    negative_tokens      (B, K, L'), and negative_mask (B, K) bool, false where there is none
    word_mask            (B, 1 + K, L) bool, of captions and negatives: Tokenizer.word_mask
    negative_images      (B, 3, S, S), and negative_image_mask (B,) bool; zero where there is none
    paraphrase_tokens    (B, L'), and paraphrase_mask (B,) bool, false where there is none
    unit_tokens          (B, units, 2, L'), and unit_mask (B, units) bool, false where there is none
    sentence_tokens      (U', L'), each different string once
    sentence_ids         (U,) int64, of these and then of all other sentences of the batch
    sentence_pairs       (P, 2) int64, (image, any sentence of its caption, also the only one)
    noise                (B, 3, S, S) uint8, uniform, a function of the row's own seed
    """
    # Image of a row -> tensor (3, S, S), its randomness from torch's generator.
    transform: Callable
    # List of str -> LongTensor (N, L), with .spans and .word_mask where they are asked for.
    tokenize: Callable
    # Add concepts, the row's own or those of its caption; their number is rounded up to a multiple,
    # for torch.compile; or each is a span of the caption's tokens, not a text of its own.
    with_concepts: bool = True
    pad_concepts: int = 1
    spans: bool = False
    # A key of NEGATIVES, whose K texts are added, the row's own first; and for "pairs" the side of
    # the image that a row and its partner become.
    negatives: str | None = None
    pair_size: int | None = None
    # Captions and negatives get the same L, and a word_mask.
    words: bool = False
    # Add the rows' negative_image, and their paraphrase.
    negative_images: bool = False
    paraphrases: bool = False
    # So many parts of each caption, each with a false version of it: drawn from the row's own
    # units, or else made by concepts.unit_pairs.
    units: int = 0
    # Of each caption of several sentences, so many as texts of their own, drawn by the row's seed.
    sentences: int = 0
    # Add noise, with which losses.pgd_attack begins.
    noise: bool = False

    def __call__(self, rows):
        rows, errors = with_neighbours(rows)
        if rows and "partner" in rows[0]:       # all rows of a batch have one, or none has
            rows = [join_pair(row, self.pair_size) for row in rows]
        batch = {
            "bad": errors,
            "keys": [row["key"] for row in rows],
            "captions": [row["caption"] for row in rows],
            "fallback": 0,
        }
        if rows:
            self.add_images(batch, rows)
            self.add_texts(batch, rows)
        return batch

    def add_images(self, batch, rows):
        images = [self.pixels_of(row) for row in rows]
        batch["images"] = torch.stack(images)                                   # (B, 3, S, S)
        if self.noise:
            seeds = [row["seed"] for row in rows]
            batch["noise"] = noise_of(seeds, images[0].shape)                   # (B, 3, S, S)
        if self.negative_images:
            self.add_negative_images(batch, rows)

    def add_texts(self, batch, rows):
        batch["tokens"] = self.tokenize(batch["captions"], trim=True)           # (B, L)
        if self.has_negatives(rows):
            self.add_negatives(batch, rows)
        if self.paraphrases:
            self.add_paraphrases(batch, rows)
        if self.units:
            self.add_units(batch, rows)
        if self.sentences:
            self.add_sentences(batch, rows)
        if self.with_concepts and self.spans:
            self.add_spans(batch, rows)
        elif self.with_concepts:
            self.add_concepts(batch, rows)

    def pixels_of(self, row):
        if "pixels" in row:     # of a pair: join_images has cropped it
            return row["pixels"]
        return self.augment(row["image"], row["seed"])

    def augment(self, image, seed):
        """The transform, its randomness a function of the row's own seed: the same in any worker
        and after any resume."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image)

    def add_negative_images(self, batch, rows):
        images = []
        for row, positive in zip(rows, batch["images"]):
            if "negative_image" in row:
                images.append(self.augment(row["negative_image"], row["seed"]))
            else:
                images.append(torch.zeros_like(positive))
        batch["negative_images"] = torch.stack(images)                          # (B, 3, S, S)
        batch["negative_image_mask"] = torch.tensor(["negative_image" in row for row in rows])

    def has_negatives(self, rows):
        if self.negatives == "pairs":
            return "pixels" in rows[0]      # a batch of single images has none
        return self.negatives is not None

    def add_negatives(self, batch, rows):
        texts = []                                                              # B * K
        for row in rows:
            texts += self.negatives_of(row)
        K = NEGATIVES[self.negatives]
        mask = torch.tensor([text != "" for text in texts])                     # (B * K,)
        batch["negative_mask"] = mask.view(-1, K)                               # (B, K)
        if self.words:
            self.add_words(batch, texts)
        else:
            tokens = self.tokenize(texts, trim=True)                            # (B * K, L')
            batch["negative_tokens"] = tokens.unflatten(0, (-1, K))             # (B, K, L')

    def add_words(self, batch, negatives):
        """Tokenize captions and negatives together, so that they have the same L."""
        K = NEGATIVES[self.negatives]
        texts = []                                                              # B * (1 + K)
        for i, caption in enumerate(batch["captions"]):
            texts += [caption, *negatives[i * K:(i + 1) * K]]
        tokens = self.tokenize(texts, trim=True)                                # (B * (1 + K), L)
        mask = self.tokenize.word_mask(texts, tokens.shape[1])                  # (B * (1 + K), L)
        tokens = tokens.unflatten(0, (-1, 1 + K))                               # (B, 1 + K, L)
        batch["tokens"] = tokens[:, 0].contiguous()                             # (B, L)
        batch["negative_tokens"] = tokens[:, 1:].contiguous()                   # (B, K, L)
        batch["word_mask"] = mask.unflatten(0, (-1, 1 + K))                     # (B, 1 + K, L)

    def negatives_of(self, row):
        """K false captions, "" for none: the row's own, or made from its caption by its seed."""
        caption = row["caption"]
        own = row.get("negatives", [])
        rng = random.Random(row["seed"])
        if self.negatives == "pairs":
            texts = own         # of join_pair
        elif self.negatives == "negate":
            texts = [negate(caption, rng)]
        elif self.negatives == "swap":
            texts = [text for text in own if text] or [swap_any_kind(caption, rng)]
        elif self.negatives == "typed":
            texts = own or swap_each_kind(caption, rng)
        else:
            texts = own or make_each_sort(caption, rng)
        K = NEGATIVES[self.negatives]
        return (texts + [""] * K)[:K]

    def add_paraphrases(self, batch, rows):
        texts = [row.get("paraphrase", "") for row in rows]
        batch["paraphrase_tokens"] = self.tokenize(texts, trim=True)            # (B, L')
        batch["paraphrase_mask"] = torch.tensor([text != "" for text in texts])

    def add_units(self, batch, rows):
        texts = []                                                              # B * units * 2
        for row in rows:
            for unit, foil in self.units_of(row):
                texts += [unit, foil]
        tokens = self.tokenize(texts, trim=True)                                # (..., L')
        batch["unit_tokens"] = tokens.unflatten(0, (-1, self.units, 2))
        mask = torch.tensor([text != "" for text in texts[::2]])                # (B * units,)
        batch["unit_mask"] = mask.view(-1, self.units)                          # (B, units)

    def units_of(self, row):
        """So many (part of the caption, false version of it), ("", "") for none."""
        rng = random.Random(row["seed"])
        pairs = row.get("units")
        if not pairs:
            pairs = unit_pairs(row["caption"], rng, self.units, row.get("concepts"))
        drawn = rng.sample(pairs, min(self.units, len(pairs)))
        return drawn + [("", "")] * (self.units - len(drawn))

    def add_sentences(self, batch, rows):
        held = [split_sentences(row["caption"]) for row in rows]
        drawn = []
        for row, sentences in zip(rows, held):
            if len(sentences) > 1:
                rng = random.Random(row["seed"])
                drawn += rng.sample(sentences, min(self.sentences, len(sentences)))
        drawn = list(dict.fromkeys(drawn))      # each once
        # Those drawn are list 0, before those of the captions, so that they are numbered first; so
        # their own pairs come first, and captions count from 1.
        _, ids, pairs = index_phrases([drawn, *held])
        caption, sentence = pairs[len(drawn):].unbind(dim=1)                            # (P,), (P,)
        batch["sentence_tokens"] = self.tokenize(drawn, trim=True)                      # (U', L')
        batch["sentence_ids"] = ids                                                     # (U,)
        batch["sentence_pairs"] = torch.stack([caption - 1, sentence], dim=1)           # (P, 2)

    def add_concepts(self, batch, rows):
        """Each different string once; see losses.concept_columns for what becomes of them."""
        concepts, batch["fallback"] = concepts_of(rows)
        strings, ids, pairs = index_phrases(concepts)
        padding = -len(strings) % self.pad_concepts
        batch["concept_tokens"] = self.tokenize(strings + [""] * padding, trim=True)    # (U, L')
        batch["concept_ids"] = torch.cat([ids, torch.full((padding,), -1)])             # (U,)
        batch["pairs"] = pairs                                                          # (P, 2)

    def add_spans(self, batch, rows):
        """Concepts as places in their caption's tokens, each row padded to M concepts."""
        concepts, batch["fallback"] = concepts_of(rows)
        concepts = [list(dict.fromkeys(phrases)) for phrases in concepts]
        M = max(len(phrases) for phrases in concepts)
        spans = torch.zeros(len(rows), M, 2, dtype=torch.int64)
        ids = torch.full((len(rows), M), -1)
        pairs = []
        for i, phrases in enumerate(concepts):
            places = self.tokenize.spans(batch["captions"][i], phrases)
            spans[i, :len(phrases)] = torch.tensor(places)
            for j, phrase in enumerate(phrases):
                ids[i, j] = string_id(phrase)
                pairs.append((i, i * M + j))
        batch["spans"] = spans                                                          # (B, M, 2)
        batch["concept_ids"] = ids.flatten()                                            # (B * M,)
        batch["pairs"] = torch.tensor(pairs)                                            # (P, 2)


def swap_any_kind(caption, rng):
    """The caption with two words or phrases exchanged, "" if none can be."""
    return rng.choice(swap_negatives(caption, rng) or [""])


def swap_each_kind(caption, rng):
    """The caption with two nouns exchanged, two adjectives, two verbs, two phrases; "" for none."""
    texts = []
    for kind in ("noun", "adjective", "verb", "phrase"):
        swapped = swap_negatives(caption, rng, (kind,))     # one, or none
        texts.append("".join(swapped))
    return texts


def make_each_sort(caption, rng):
    """A caption with an exchange, one with a substitute, and one in another order; "" for none."""
    texts = []
    for make in (swap_negatives, substitute_negatives, shuffle_bigrams):
        texts.append(rng.choice(make(caption, rng) or [""]))
    return texts


def with_neighbours(rows):
    """Return rows and, behind them, their neighbours; and [(key, error)] of those of both that
    could not be read."""
    everything = rows + [row["neighbour"] for row in rows if "neighbour" in row]
    errors = [(row["key"], row["error"]) for row in everything if "error" in row]
    return [row for row in everything if "error" not in row], errors


def join_pair(row, size):
    """A row and its partner as one row: two images as one, and captions of both (CLIC).

    pixels     uint8 (3, S, S): join_images, in random order
    caption    the first sentences of both captions, "A. B."
    negatives  three more true captions: "B. A.", and two of other sentences, from the rest of the
               captions or the rows' other captions, each again A or B for want of others; and
               "A. B." or "B. A." with two words exchanged, "" if there are none
    paraphrase the first sentences of both paraphrases, if there are both

    All but the last as in CLIC's released code, by the row's own seed; there the exchange also
    takes adverbs, prepositions, numbers and pronouns, by spaCy's tags, or any two words.
    """
    partner = row["partner"]
    rng = random.Random(row["seed"])
    first, rest = split_caption(row)
    second, partner_rest = split_caption(partner)
    negatives = [join_texts(second, first)]
    for texts in zip(draw_two(rest, rng), draw_two(partner_rest, rng)):
        negatives.append(join_texts(*rng.sample(texts, 2)))
    negatives.append(exchange_between(*rng.sample([first, second], 2), rng))
    pair = {
        "key": f"{row['key']} with {partner['key']}",
        "seed": row["seed"],
        "pixels": join_images(row["image"], partner["image"], size, rng),
        "caption": join_texts(first, second),
        "negatives": negatives,
    }
    if row.get("concepts") and partner.get("concepts"):
        pair["concepts"] = row["concepts"] + partner["concepts"]
    if row.get("paraphrase") and partner.get("paraphrase"):
        first, *_ = split_sentences(row["paraphrase"])
        second, *_ = split_sentences(partner["paraphrase"])
        pair["paraphrase"] = join_texts(first, second)
    return pair


def split_caption(row):
    """The caption's first sentence, and a list of what else is true of the image, never empty."""
    first, *rest = split_sentences(row["caption"])
    others = [text for text in row.get("captions", []) if text != row["caption"]]
    return first, rest + others or [first]


def split_sentences(text):
    """Its sentences, cut behind ".", "!" and "?" where space follows, but not behind the point of a
    word that has one, such as "Dr. Smith"."""
    text = text.strip()
    sentences = []
    start = 0
    for word in WORD.finditer(text):
        end = word.end()
        if word[0] in ".!?" and text[end:end + 1].isspace():
            sentences.append(text[start:end].strip())
            start = end
    return [*sentences, text[start:].strip()]


def draw_two(texts, rng):
    return rng.sample(texts, 2) if len(texts) > 1 else texts * 2


def join_texts(first, second):
    """Two texts as sentences, one behind the other."""
    return f"{as_sentence(first)} {as_sentence(second)}"


def as_sentence(text):
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."


def exchange_between(first, second, rng):
    """Two joined texts in which a word of the first and one of the second, of the same kind and
    neither in both, have changed places; "" if there are none, or if now the second text stands
    before the first, which is as true."""
    text = join_texts(first, second)
    border = len(as_sentence(first))
    spans = swappable(text)
    before = [span for span in spans if span[1] <= border]
    behind = [span for span in spans if span[0] > border]
    choices = []
    for kind in ("noun", "adjective", "verb"):
        for tags in SWAP_TAGS[kind]:
            left = different_words(text, before, tags)
            right = different_words(text, behind, tags)
            own_left = words_not_in(text, left, right)
            own_right = words_not_in(text, right, left)
            if own_left and own_right:
                choices.append((own_left, own_right))
    if not choices:
        return ""
    own_left, own_right = rng.choice(choices)
    exchanged = exchange(text, rng.choice(own_left), rng.choice(own_right))
    if exchanged.lower() == join_texts(second, first).lower():
        return ""
    return exchanged


def words_not_in(text, spans, others):
    """The spans whose word is the word of no other."""
    known = [text[start:end].lower() for start, end in others]
    return [(start, end) for start, end in spans if text[start:end].lower() not in known]


def join_images(first, second, size, rng):
    """Two images as one, uint8 (3, S, S): halves of it, one above the other if the first is wide,
    else side by side. Each is squashed into its half; which comes first is random."""
    wide = is_wide(first)
    halves = []
    for image, length in zip(rng.sample([first, second], 2), (size // 2, size - size // 2)):
        shape = [length, size] if wide else [size, length]
        image = v2.functional.resize(image, shape, BICUBIC, antialias=True)
        if not isinstance(image, torch.Tensor):
            image = v2.functional.pil_to_tensor(image)
        halves.append(image)
    return torch.cat(halves, dim=1 if wide else 2)


def is_wide(image):
    height, width = v2.functional.get_size(image)
    return width >= height


def noise_of(seeds, shape):
    """Uniform bytes (B, *shape), a row for each seed."""
    noise = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randint(256, shape, dtype=torch.uint8, generator=generator))
    return torch.stack(noise)


def concepts_of(rows):
    """Return the concepts of each row (lists of str), its own or those found in its caption, and
    the number of captions that stand for themselves, because no other noun phrase was found."""
    fallback = 0
    concepts = []
    found = iter(extract_batch([row["caption"] for row in rows if not row.get("concepts")]))
    for row in rows:
        if row.get("concepts"):
            concepts.append(row["concepts"])
            continue
        whole = [row["caption"].strip()]
        phrases = next(found) or whole      # of a blank caption none are found
        concepts.append(phrases)
        if phrases == whole:
            fallback += 1
    return concepts, fallback


# ---- order of an epoch -----------------------------------------------------

# Raise it when the order of rows or anything drawn at random of them changes: a checkpoint is
# resumed only by code of the same number.
ORDER = 3
FEISTEL_ROUNDS = 6
# The largest weight of a source.
MAX_WEIGHT = 1_000_000
# So many rows are drawn at most, until one can be the partner of another, see Seeded.
MAX_DRAWS = 10


class Epochs(Sampler):
    """Batches of (turn, index) for one process, over all epochs: the index of a row, and how many
    times it was shown before, which without weights is the epoch.

    The order is a function of (seed, epoch) and nothing else, and of constant cost: a process
    computes its own rows only, at any step, for any length. An epoch has
    ceil(length / batch_size) batches, equal up to one row, and every row once; the batch of all
    processes together is the same for any world_size.

    With sources an epoch shows some rows more often than others. Each source goes through its own
    rows again and again, each time in another order, and an epoch takes the next so many of them:
    over the epochs the rows of a source are shown equally often, to within one showing. A row that
    an epoch shows twice may be twice in a batch.

    length      number of rows of the data
    batch_size  rows of a batch, of all processes together
    start_step, stop_step    the first batch, and the one behind the last (default: one epoch)
    sources     [(rows, shown)]: how many rows each source has, in the order of the data, and how
                many of them an epoch shows, see weigh_sources; None: every row once
    """

    def __init__(self, length, batch_size, seed=0, rank=0, world_size=1, start_step=0,
                 stop_step=None, sources=None):
        self.sources = sources or [(length, length)]
        self.length = sum(shown for _, shown in self.sources)       # of an epoch
        if batch_size > self.length:
            raise ValueError(f"--batch-size {batch_size} is more than the {self.length} rows of an "
                             f"epoch: give at most {self.length}")
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = -(-self.length // batch_size)
        fewest = self.length // self.steps_per_epoch
        if fewest < world_size:
            raise ValueError(f"--batch-size {batch_size}: the {self.length} rows of an epoch make "
                             f"batches of {fewest}, fewer than the {world_size} processes: give a "
                             "larger one, or start fewer processes")
        self.start = start_step
        self.stop = self.steps_per_epoch if stop_step is None else stop_step

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        for step in range(self.start, self.stop):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            first, size = share(self.length, self.steps_per_epoch, step_in_epoch)
            offset, size = share(size, self.world_size, self.rank)
            positions = np.arange(first + offset, first + offset + size)
            slots = permute(positions, self.length, f"{self.seed} {epoch}")
            turns, rows = self._rows(epoch, slots)
            yield list(zip(turns.tolist(), rows.tolist()))

    def _rows(self, epoch, slots):
        """Turns and rows that stand in some slots of an epoch, which are numbered by source."""
        turns = np.empty_like(slots)
        rows = np.empty_like(slots)
        first_row = 0
        first_slot = 0
        for number, (size, shown) in enumerate(self.sources):
            own = (slots >= first_slot) & (slots < first_slot + shown)
            shown_before = epoch * shown + slots[own] - first_slot
            turn, place = np.divmod(shown_before, max(1, size))
            # An epoch that shows the whole source needs no order here: its slots have one.
            if size and shown % size:
                for t in np.unique(turn):
                    key = f"{self.seed} source {number} {t}"
                    place[turn == t] = permute(place[turn == t], size, key)
            turns[own] = turn
            rows[own] = first_row + place
            first_row += size
            first_slot += shown
        return turns, rows


def weigh_sources(sizes, weights):
    """Return [(rows, shown)] for Epochs: with weight 2 an epoch shows each row of a source twice,
    with 0.5 half of the rows, and the other half in the next epoch.

    sizes    the number of rows of each source
    weights  text such as "1,2", a number for each source
    Raises ValueError for weights that are none.
    """
    words = weights.split(",")
    if len(words) != len(sizes):
        raise ValueError(f"--data-weights {weights}: {len(words)} weights for {len(sizes)} sources "
                         "of --data, which are joined by '::'; give one for each")
    sources = []
    for word, size in zip(words, sizes):
        try:
            weight = float(word)
        except ValueError:
            weight = math.nan
        if not 0 < weight <= MAX_WEIGHT:
            raise ValueError(f"--data-weights {weights}: {word.strip()!r} is not a number above 0 "
                             f"and up to {MAX_WEIGHT:,}")
        shown = max(1, round(weight * size)) if size else 0
        sources.append((size, shown))
    return sources


class EveryOther(Sampler):
    """The batches of an Epochs; the first, third, ... of a run ask Seeded for partners (CLIC)."""

    def __init__(self, epochs):
        self.epochs = epochs

    def __len__(self):
        return len(self.epochs)

    def __iter__(self):
        for step, batch in enumerate(self.epochs, self.epochs.start):
            if step % 2 == 0:
                batch = [(turn, index, "partner") for turn, index in batch]
            yield batch


def share(length, parts, number):
    """Start and size of part `number` of a range, cut into parts that are equal up to one."""
    size, larger = divmod(length, parts)        # the first parts are the larger ones
    return number * size + min(number, larger), size + (number < larger)


def permute(positions, length, key):
    """Where a random permutation of range(length) takes some positions; no array of all is made.

    positions   int array of numbers in range(length)
    key         str; another key is another permutation

    A Feistel network (a cipher, Luby and Rackoff 1988) permutes the numbers of an even number of
    bits, at least as many numbers as length; what falls outside of the range is put through it
    again until it falls inside, which is a permutation of the range (Black and Rogaway 2002).
    """
    half = max(4, -(-(length - 1).bit_length() // 2))
    digest = hashlib.blake2b(key.encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    round_keys = np.frombuffer(digest, "<u8")
    values = np.array(positions, np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        values[outside] = encipher(values[outside], half, round_keys)
        outside = values >= length
    return values.astype(np.int64)


def encipher(values, half, round_keys):
    """A permutation of the numbers of 2 * half bits, uint64 (N,)."""
    bits = np.uint64(half)
    mask = np.uint64((1 << half) - 1)
    left = values >> bits
    right = values & mask
    for round_key in round_keys:
        left, right = right, left ^ (scramble(right, round_key) & mask)
    return (left << bits) | right


def scramble(values, key):
    """A function of uint64 that looks random in all its bits (the finalizer of splitmix64)."""
    values = (values + key) * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Seeded(Dataset):
    """Rows by (turn, index), see Epochs, each with a seed of its own, a function of (seed, turn,
    index).

    By this seed one caption of several is drawn and, if they are asked for, one neighbour, and
    another caption as paraphrase.
    An item (turn, index, "partner") brings another row, any of the data, as its partner, and no
    neighbour.
    """

    def __init__(self, dataset, seed, neighbours=True, paraphrases=False, sources=None):
        self.dataset = dataset
        self.sources = sources or [(len(dataset), 1)]       # of Epochs, by which partners are drawn
        self.seed = seed
        self.neighbours = neighbours
        self.paraphrases = paraphrases

    def __getitem__(self, item):
        turn, index, *wanted = item
        # A row with a partner brings no neighbour, which has no partner to be joined with.
        row, rng = self.draw(turn, index, self.neighbours and not wanted)
        if wanted and "error" not in row:
            row["partner"] = self.draw_partner(row, index, turn, rng)
        return row

    def draw(self, turn, index, neighbours=False):
        """A row, and the generator of what else is random in it. A neighbour or partner, which is
        drawn as well, has none of its own."""
        seed = zlib.crc32(f"{self.seed} {turn} {index}".encode())
        # Not of the seed itself: what Collate draws of it would depend on what is drawn here.
        rng = random.Random(f"row {seed}")
        row = {**self.dataset[index], "seed": seed}
        if "captions" in row:
            row["caption"] = rng.choice(row["captions"])
        if neighbours and row.get("neighbours"):
            row["neighbour"], _ = self.draw(turn, rng.choice(row["neighbours"]))
        if self.paraphrases and "captions" in row:
            others = [text for text in row["captions"] if text != row["caption"]]
            if others:
                row["paraphrase"] = rng.choice(others)
        return row, rng

    def draw_partner(self, row, index, turn, rng):
        """Another row that can be read, its image wide if this one's is, and else not.

        If MAX_DRAWS draws bring none, the last that can be read, or else this row itself: none is
        lost for want of a partner. Those that cannot be read are reported when it is their turn.
        """
        partner = {**row}
        for _ in range(MAX_DRAWS):
            other = self.draw_index(rng)
            drawn, _ = self.draw(turn, other)
            if other == index or "error" in drawn:
                continue
            partner = drawn
            if is_wide(partner["image"]) == is_wide(row["image"]):
                break
        return partner

    def draw_index(self, rng):
        """Of any row, those of a source as often as an epoch shows them."""
        number = 0
        if len(self.sources) > 1:
            shown = [shown for _, shown in self.sources]
            [number] = rng.choices(range(len(shown)), shown)
        first = sum(size for size, _ in self.sources[:number])
        return first + rng.randrange(self.sources[number][0])


# ---- how many workers ------------------------------------------------------

def default_workers(most=16):
    """How many processes may read data for this one: the cores that it may really use, shared by
    the ranks of this host (torchrun's LOCAL_WORLD_SIZE), at least 1 and at most `most`."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):        # taskset, slurm
        cores = len(os.sched_getaffinity(0))
    quota = cgroup_cores()                      # docker, kubernetes
    if quota is not None:
        cores = min(cores, quota)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(most, int(cores / ranks)))


def cgroup_cores(root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """Cores' worth of time that the control group grants, a float; None without a limit.

    A limit of version 2 is cpu.max, "QUOTA PERIOD" in microseconds or "max PERIOD", in the folder
    of the process's group or any above it; of version 1, two files.
    """
    folders = [root]
    for line in read_lines(own):
        if line.startswith("0::/"):
            path = root
            for name in line[4:].split("/"):
                path = os.path.join(path, name)
                folders.append(path)
    limits = [read_lines(os.path.join(folder, "cpu.max")) for folder in folders]
    pairs = [lines[0].split() for lines in limits if lines]
    quota = read_lines(os.path.join(root, "cpu/cpu.cfs_quota_us"))
    period = read_lines(os.path.join(root, "cpu/cpu.cfs_period_us"))
    if quota and period and quota[0] != "-1":
        pairs.append([quota[0], period[0]])
    cores = [int(quota) / int(period) for quota, period in pairs if quota != "max"]
    return min(cores, default=None)


def read_lines(path):
    """The lines of a small file, [] if it cannot be read."""
    try:
        with open(path) as f:
            return f.read().splitlines()
    except OSError:
        return []


# ---- tokenizer -------------------------------------------------------------

def train_tokenizer(captions, vocab_size=1024):
    """Train a small lower-case byte-level BPE.

    Returns the text of a tokenizer.json, the number of its tokens, and the length of the longest
    caption in tokens. <pad> is 0; <eos> ends every text and has the highest id, by which CLIP's
    text tower finds it. Of very long words, such as addresses, only the first letters count: the
    time of training grows with the square of the length.
    """
    captions = [shorten_words(clean_text(caption, "canonicalize")) for caption in captions]
    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator(captions, vocab_size - 1, min_frequency=0, special_tokens=["<pad>"],
                            show_progress=False)
    bpe.add_special_tokens(["<eos>"])
    eos = ("<eos>", bpe.token_to_id("<eos>"))
    bpe.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[eos])
    longest = max(len(encoding.ids) for encoding in bpe.encode_batch(captions))
    return bpe.to_str(), bpe.get_vocab_size(), longest


def shorten_words(text):
    """The text, no word of it longer than TOKENIZER_LETTERS."""
    return " ".join(word[:TOKENIZER_LETTERS] for word in text.split(" "))
