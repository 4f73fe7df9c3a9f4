"""Score image-text models on compositionality benchmarks, by the official rules and with intervals.

    python evaluate.py --checkpoint out/nano/last.pt                      the built-in scenes
    python evaluate.py describe sugarcrepe                                its protocol and source
    python evaluate.py download sugarcrepe                                what it needs, into data/
    python evaluate.py --checkpoint X.pt --bench sugarcrepe --json A.json
    python evaluate.py --init timm/ViT-B-16-SigLIP --bench sugarcrepe --json B.json
    python evaluate.py compare A.json B.json                              two results, item by item
    python evaluate.py compare A.json B.json C.json --columns headline    one table over benchmarks

On your own data, retrieval of pairs and zero-shot classification of a folder for each class:

    python evaluate.py --checkpoint X.pt --data pairs.csv --image-root images
    python evaluate.py --checkpoint X.pt --data photos --classes names.txt

From Python, for any object that has encode_image, encode_text, tokenize and transform:

    results = evaluate.run(model, ["sugarcrepe"], data_dir="data")
    print(results["sugarcrepe"]["swap_att"]["accuracy"])

How it works: a benchmark is a function that reads its files and yields tasks, which say what images
and texts there are (Choices: a few compete in each item; Ranking: all compete). The images and
texts of all tasks are encoded once, by all processes together. A task then gives each item a
margin: positive if the model is right, 0 for a tie. A tie is never correct, since a model that
scores two captions alike has not told them apart. Intervals are bootstraps over images: the items
of one image move together.

To add a benchmark: its function beside sugarcrepe, its name in READERS, and in
assets/benchmarks.json what it is and, for tables of several, its columns in "headline". To check a
figure: --json keeps all items, and sha256 of weights and data.
"""
import argparse
import collections
import contextlib
import csv
import functools
import hashlib
import http.client
import importlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Callable

# ---- command line ------------------------------------------------------------------------------

ASSETS = Path(__file__).resolve().parent / "assets"
DATA = json.loads((ASSETS / "benchmarks.json").read_text("utf-8"))
TABLE = DATA["benches"]         # {bench: about, source, files, folders, archives, means, ...}
ARCHIVES = DATA["archives"]     # {name: url, path to download to, folder that it makes}
PROMPTS = json.loads((ASSETS / "classes.json").read_text("utf-8"))  # {bench: templates, classes}
TORCHVISION = {name: spec["torchvision"] for name, spec in TABLE.items() if "torchvision" in spec}
GROUPS = DATA["groups"]         # {table over benchmarks: {bench: subsets in its columns}}
BENCHES = {name: spec["about"] for name, spec in TABLE.items()}
COMMANDS = {
    "evaluate": "score a model on benchmarks; the word itself may be left out",
    "download": "fetch the files of benchmarks, as far as they may be fetched",
    "compare": "compare two files of --json item by item, or print tables of several",
    "describe": "print the protocol of a benchmark, its source and what to download",
    "verify": "score public checkpoints and print these figures beside the published ones",
    "plot": "draw the curves of training runs, or results as bars or radar charts",
    "show": "draw which parts of an image are most similar to each phrase of its caption",
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """A mistake costs two lines, not a page of usage."""
        self.exit(2, f"{self.prog}: {message}\nsee: {self.prog} --help\n")


def list_lines(title, table):
    lines = [f"  {name:16s} {text}" for name, text in table.items()]
    return "\n".join([title, *lines])


def build_parser():
    parser = Parser(prog="evaluate.py")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def add_command(name, **options):
        prog = "evaluate.py" if name == "evaluate" else f"evaluate.py {name}"
        return commands.add_parser(name, prog=prog, help=COMMANDS[name], **options)

    add_evaluate_arguments(add_command(
        "evaluate",
        description=__doc__.split("\nFrom Python")[0],
        epilog=list_lines("benchmarks (--bench):", BENCHES) + "\n\n" + list_lines(
            "other commands, each with its own --help:", COMMANDS),
        formatter_class=argparse.RawDescriptionHelpFormatter))

    p = add_command("download", description=(
        "Fetch files of benchmarks, and say how to get the rest. A download that was broken off is "
        "continued, each file's sha256 is checked, archives are unpacked."))
    p.add_argument("benches", nargs="+", metavar="BENCH", help="names of benchmarks")
    add_data_dir(p)

    add_compare_arguments(add_command("compare", description=(
        "Compare results of --json. Two files: B - A in percent with a 95 % interval (paired "
        "bootstrap over images), the items gained (right in B only) and lost (right in A only), "
        "and p by the exact McNemar test, which takes items as independent. More: a table.")))

    p = add_command("describe", description="Print what a benchmark asks and what it needs.")
    p.add_argument("bench", metavar="BENCH", help="name of a benchmark")
    add_data_dir(p)

    add_verify_arguments(add_command("verify", description=(
        "Score public checkpoints on the benchmarks whose files are there, and print each figure "
        "beside the published one: is the difference within --tolerance points?")))

    p = add_command("plot", description=(
        "Draw curves of runs, each a log.jsonl of train.py: each evaluated subset in percent, and "
        "the loss if it sums the same in all runs. Of files of --json, draw results as bars."))
    p.add_argument("files", nargs="+", metavar="FILE", help="log.jsonl or --json files, up to 7")
    p.add_argument("--keys", metavar="A,B", help="only these curves, such as loss,scenes.swap_att; "
                   "of --json the same as --columns of compare")
    p.add_argument("--radar", action="store_true",
                   help="draw results of --json as outlines of models on radial axes")
    p.add_argument("--output", default="curves.png", metavar="FILE",
                   help=".png, .svg or .pdf file to write (default: curves.png)")

    add_show_arguments(add_command("show", description=(
        "Draw the cosine of each patch of an image and each phrase of its caption: a row for each "
        "model, all on one scale.")))
    return parser


def add_compare_arguments(p):
    p.add_argument("files", nargs="+", metavar="JSON", help="two or more files written by --json")
    p.add_argument("--items", action="store_true",
                   help="of two files, print each item gained and lost")
    p.add_argument("--format", dest="form", choices=("text", "markdown", "latex", "csv"),
                   help="print a table to paste, a row a model; the best is marked where the "
                        "paired interval of its lead over the second excludes 0")
    p.add_argument("--columns", metavar="A,B",
                   help="of such tables: names of subsets or means, or all; or for one table over "
                        f"all benchmarks one of {', '.join(GROUPS)} (default: headline, and means)")
    p.add_argument("--reference", action="store_true", help="add published results to such tables")


def add_show_arguments(p):
    p.add_argument("--checkpoint", default="", metavar="A,B",
                   help="checkpoints of train.py, joined by commas: a row each")
    p.add_argument("--image", metavar="FILE", help="an image file; default: a built-in scene")
    p.add_argument("--scene", type=from_zero, default=0, metavar="N",
                   help="number of the held-out built-in scene (default: 0)")
    p.add_argument("--caption", help="text whose noun phrases are shown")
    p.add_argument("--concepts", nargs="+", metavar="PHRASE", help="phrases to show instead")
    p.add_argument("--boxes", metavar="FILE",
                   help="draw where the things of the phrases are: COCO's instances, or a json "
                        "{file name: [[category, x, y, width, height], ...]}")
    p.add_argument("--output", default="attention.png", metavar="FILE",
                   help=".png, .svg or .pdf file to write (default: attention.png)")


def add_verify_arguments(p):
    p.add_argument("--registry", metavar="FILE",
                   help="a json of your own: {NAME: {init or checkpoint, model, figures: {bench: "
                        "{subset: percent}}}} (default: what assets/benchmarks.json has published)")
    p.add_argument("--bench", metavar="A,B", help="only these benchmarks (default: all)")
    p.add_argument("--tolerance", type=float, default=0.3, metavar="POINTS",
                   help="largest difference in percent that counts as equal (default: 0.3)")
    add_data_arguments(p)
    add_speed_arguments(p)


def add_evaluate_arguments(parser):
    p = parser.add_argument_group("the model")
    p.add_argument("--checkpoint", metavar="FILE,...",
                   help="a checkpoint of train.py, such as out/nano/last.pt; several joined by "
                        "commas, and --init beside them, are scored in turn and stand in one table")
    p.add_argument("--init", metavar="SOURCE,...",
                   help="public weights: a hub id, a folder or a file; of open_clip any model, by "
                        "open_clip:NAME/PRETRAINED (PRETRAINED: a name that it lists, or a file)")
    p.add_argument("--model", metavar="NAME",
                   help="architecture of --init, if it does not say; alone: its default weights")
    p.add_argument("--tokenizer", metavar="FILE",
                   help="a tokenizer.json, for weights that came without one")
    p.add_argument("--interpolate", type=float, metavar="A",
                   help="score the weights (1 - A) * --init + A * --checkpoint (WiSE-FT)")

    p = parser.add_argument_group("the benchmarks and their files")
    p.add_argument("--bench", metavar="A,B",
                   help="names joined by commas, or all: every benchmark whose files are there "
                        "(default: scenes; with --data FILE retrieval, with --data DIR folder)")
    add_data_arguments(p)
    p.add_argument("--data", metavar="PATH",
                   help="your own data for retrieval, choices, folder or pointing; describe NAME "
                        "shows what it looks like")
    p.add_argument("--image-key", metavar="COLUMN",
                   help="the column of --data with paths of images (default: image, filepath, ...)")
    p.add_argument("--caption-key", metavar="COLUMN",
                   help="the column of --data with captions (default: caption, title, text, ...)")
    p.add_argument("--classes", metavar="FILE",
                   help="names of the classes of folder, one a line, in the order of the folders")
    p.add_argument("--pooled", action="store_true",
                   help="score an image by the patches that each text pools, as in XAC and FLAIR, "
                        "not by its features: any benchmark but those of pointing")
    p.add_argument("--attack", type=float, default=0.0, metavar="E",
                   help="score zero-shot classification, and single of scenes, also on images that "
                        "an attack has changed by at most E of 255 a pixel (default: no attack)")
    p.add_argument("--attack-steps", type=int, default=5, metavar="N",
                   help="its steps, each of 1 of 255 (default: 5, as in TeCoA's released code)")

    p = parser.add_argument_group("what comes out")
    p.add_argument("--json", dest="json_path", metavar="FILE",
                   help="write all results item by item, for compare and for your own scripts")
    p.add_argument("--reference", action="store_true", help="print published results beside these")

    add_speed_arguments(parser)


def add_data_dir(p):
    p.add_argument("--data-dir", default="data", metavar="DIR",
                   help="folder of the benchmarks' files, as download fills it (default: data)")


def add_data_arguments(p):
    add_data_dir(p)
    p.add_argument("--image-root", default="", metavar="DIR",
                   help="folder of the images, where they are not in their place in --data-dir")
    p.add_argument("--allow-missing", action="store_true",
                   help="leave out items whose image is missing or damaged, and take files with "
                        "fewer rows than the official ones: what is there is scored, and counted")


def from_one(text):
    """A type of argparse: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, 1 or more")
    return int(text)


def from_zero(text):
    """A type of argparse: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, 0 or more")
    return int(text)


def add_speed_arguments(parser):
    p = parser.add_argument_group("how it runs (torchrun shares the work between processes)")
    p.add_argument("--batch-size", type=from_one, default=250, metavar="N",
                   help="images or texts in a forward pass (default: 250)")
    p.add_argument("--workers", type=from_zero, metavar="N",
                   help="processes that read images (default: 0 on a CPU, with a GPU up to 8)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda, where there is one")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                   help="precision of the towers; bfloat16 is by autocast (default: float32)")


def parse(argv):
    """A list of str -> the arguments. Where no command is named, evaluate is meant."""
    if not argv or argv[0] not in COMMANDS:
        argv = ["evaluate", *argv]
    return build_parser().parse_args(argv)


if __name__ == "__main__":
    # --help and mistakes are answered here, before the imports below: they take seconds
    parse(sys.argv[1:])

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # waiting threads leave the cores to others

import numpy as np                                                                    # noqa: E402
import torch                                                                          # noqa: E402
import torch.distributed as dist                                                      # noqa: E402
import torch.nn.functional as F                                                       # noqa: E402
import torchvision                                                                    # noqa: E402
from PIL import Image                                                                 # noqa: E402
from timm.data import ImageNetInfo                                                    # noqa: E402
from torch.utils.data import DataLoader, Dataset                                      # noqa: E402
from tqdm import tqdm                                                                 # noqa: E402

from concepts import default_extractor, extract, plural_of                            # noqa: E402
from data import (CaptionFile, Scenes, load_image, noise_of, parse_list,              # noqa: E402
                  read_rows, relation)
from losses import pgd_attack, tecoa_loss                                             # noqa: E402
from model import CLIP, set_tokenizer                                                 # noqa: E402
from pooling import concept_similarity                                                # noqa: E402

PROTOCOL = 6        # raised whenever a change here or in benchmarks.json may change a figure
ELEVEN = "classification_11"    # of GROUPS: the mean of these sets is a result of its own
ELEVEN_SETS = [(bench, subset) for bench, (subset,) in GROUPS[ELEVEN].items()]
GET = "python evaluate.py download"
OWN_DATA = {        # {bench on a user's own data: what to give}
    "retrieval": "--data pairs.csv --image-root images",
    "choices": "--data mine.csv --image-root images",
    "folder": "--data photos --classes names.txt"}
NO_PATCHES = "this model's encode_image gives no patch tokens (return_tokens=True)"
MAX_MEMBERS = 2_000_000      # files in an archive; ImageNet has 1.4 million
RANK = int(os.environ.get("RANK", 0))           # of this process, as torchrun says
WORLD = int(os.environ.get("WORLD_SIZE", 1))    # number of processes


class Missing(ValueError):
    """Files of a benchmark that are not there. The message says how to get them."""


class MissingImages(Missing):
    """Images of a part of a benchmark. It says nothing: absence counts those of all parts."""


@contextlib.contextmanager
def expecting(what, advice=""):
    """Whatever is wrong in the content of a file becomes one line of what was expected."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{what} ({error!s:.200}){advice}") from None


def import_package(name, package, use):
    """A package that few need. Raises ValueError with how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{use}: pip install {package}") from None


def print0(*text):
    if RANK == 0:
        print(*text)


# ---- rules: scores of items -> margins, positive where the model is right ----------------------
# N items have I images and K texts each; the score of an image and a text is their cosine, or that
# of pooled_scores: (N, I, K).

def first_text_wins(scores):
    """Each of the I images has K / I texts of its own, and strictly prefers the first of them."""
    I = scores.shape[1]
    own = scores.unflatten(2, (I, -1)).diagonal(dim1=1, dim2=2)     # (N, K / I, I)
    margins = own[:, 0] - own[:, 1:].amax(1)                        # (N, I)
    return margins.amin(1)


def both_captions_win(scores):
    """SugarCrepe++, image to text: both captions strictly beat the third text on the image."""
    return scores[:, 0, :2].amin(1) - scores[:, 0, 2]


def captions_are_nearest(scores):
    """SugarCrepe++, text only (N, K, K): captions are nearer to each other than to the third."""
    return scores[:, 0, 1] - scores[:, :2, 2].amax(1)


def text_score(scores):
    """Winoground: each of two images strictly prefers its own caption."""
    first = scores[:, 0, 0] - scores[:, 0, 1]
    second = scores[:, 1, 1] - scores[:, 1, 0]
    return torch.minimum(first, second)


def image_score(scores):
    """Winoground: each of two captions strictly prefers its own image."""
    return text_score(scores.mT)


def group_score(scores):
    """Winoground: both of these."""
    return torch.minimum(text_score(scores), image_score(scores))


PAIRED = {"text": (text_score, 1 / 4), "image": (image_score, 1 / 4), "group": (group_score, 1 / 6)}


# ---- tasks: what is compared -------------------------------------------------------------------

def open_picture(path, *box):
    """The image at path, or the part of it in box: x, y, width, height in pixels."""
    image = load_image(path)
    if box:
        x, y, width, height = box
        image = image.crop((x, y, x + width, y + height))
    return image


@dataclass(frozen=True)
class Picture:
    """An image that is opened when it is encoded. Pictures of equal name and part are the same."""
    name: str                       # a path, if it has one; what the bootstrap draws
    part: tuple = ()                # the box of a crop, or the number in a data set
    load: Callable = field(default=open_picture, compare=False)     # (name, *part) -> RGB image
    missing: bool = field(default=False, compare=False)             # known not to be there

    def open(self):
        return self.load(self.name, *self.part)


@dataclass
class Outcome:
    """How a model did on the N items of a subset."""
    subset: str                     # the name of the result
    margins: torch.Tensor           # (N,), positive where it is right, 0 for a tie, NaN: no image
    chance: float | list            # share that is right by blind choice: of all, or of each item
    images: list                    # N names of images, by which the bootstrap draws
    items: list                     # N items in words
    labels: list | None = None      # N classes or None: SUBSET_macro is the mean of their means
    partial: str = ""               # what the table says of a file that is not whole
    attack: list = field(default_factory=list)      # of images: how far, of 255, and its steps


@dataclass
class Choices:
    """N items of I images and K texts each, of which few compete."""
    subset: str                     # as in Outcome
    margin: Callable                # one of the rules above
    chance: float | list            # as in Outcome
    images: list                    # N tuples of I Pictures
    texts: list                     # N tuples of K strings
    labels: list | None = None
    partial: str = ""
    text_only: bool = False         # texts are compared with each other: scores (N, K, K)

    def outcomes(self, image_features, text_features, pooled=None):
        """Yield one Outcome. The two functions give normalised features (n, I, D) and (n, K, D) for
        lists of tuples. pooled: scores by pooled_scores, to be judged by instead of cosines."""
        margins = []
        for start in range(0, len(self.images), 2000):
            part = slice(start, start + 2000)
            if pooled is None:
                texts = text_features(self.texts[part])
                queries = texts if self.text_only else image_features(self.images[part])
                # equal rows give equal sums, and so a tie: a matmul does not promise that
                scores = (queries[:, :, None] * texts[:, None]).sum(-1)     # (n, I, K)
            else:
                scores = pooled[part]
            margins.append(self.margin(scores))
        names = ["|".join(x.name for x in row) for row in self.images]
        items = [" | ".join((name, *texts)) for name, texts in zip(names, self.texts)]
        yield Outcome(self.subset, torch.cat(margins), self.chance, names, items, self.labels)

    def competing(self, text_features):
        """Which images meet which texts: N tuples of I Pictures, features (N, K, D)."""
        return self.images, text_features(self.texts)

    def needed(self):
        """The pictures and texts of the items whose images are there; the others cost nothing."""
        for pictures, texts in zip(self.images, self.texts):
            if self.text_only:
                yield (), texts
            elif not any(x.missing for x in pictures):
                yield pictures, texts


@dataclass
class Ranking:
    """N images and M texts that all compete. A query ("i2t": an image, "t2i": a text) is right if
    its best positive is among the k best: R@k, or top k where texts are classes."""
    images: list                    # N tuples of one Picture
    texts: list                     # M tuples of strings, whose features are averaged
    positive: torch.Tensor          # (N, M) bool
    recalls: dict                   # {name of the result: ("i2t" or "t2i", k)}
    labels: list | None = None      # of the images, as in Outcome, for k = 1
    partial: str = ""               # as in Outcome
    text_only = False               # as in Choices

    def outcomes(self, image_features, text_features, pooled=None):
        """As Choices.outcomes, with pooled (1, N, M); yields one Outcome for each of recalls."""
        if pooled is None:
            images = image_features(self.images)[:, 0]              # (N, D)
            texts = self.candidates(text_features)                  # (M, D)
            is_read = ~images.isnan().any(1)                        # (N,)
        else:
            is_read = ~pooled[0].isnan().all(1)
        for subset, (way, k) in self.recalls.items():
            positive = findable = self.positive
            if way == "t2i":
                positive = self.positive.T
                findable = positive[:, is_read]
            if pooled is not None:
                scores = pooled[0] if way == "i2t" else pooled[0].T
                blocks = scores.split(500)
            elif way == "i2t":
                blocks = cosines(images, texts)
            else:
                blocks = cosines(texts, images)
            names, items = self.queries(way)
            labels = self.labels if (way, k) == ("i2t", 1) else None
            margins = ranking_margins(blocks, positive, k)
            yield Outcome(subset, margins, blind_recall(findable, k), names, items, labels)

    def queries(self, way):
        """Of each image (i2t) or text (t2i): the image by which it is drawn, and it in words."""
        names = [picture.name for picture, in self.images]
        if way == "i2t":
            return names, names
        first_image = self.positive.byte().argmax(0)                # (M,), of those that it fits
        return [names[i] for i in first_image.tolist()], [prompts[0] for prompts in self.texts]

    def competing(self, text_features):
        """As Choices.competing: all images and all texts are one item."""
        pictures = tuple(itertools.chain(*self.images))
        return [pictures], self.candidates(text_features)[None]     # (1, M, D)

    def candidates(self, text_features):
        """The features of all texts (M, D)."""
        texts = text_features(self.texts)                           # (M, prompts, D)
        if texts.shape[1] > 1:
            texts = F.normalize(texts.mean(1), dim=-1)[:, None]
        return texts[:, 0]

    def needed(self):
        """All texts, since each is a candidate, and the pictures that are there."""
        for row in self.images:
            if not row[0].missing:
                yield row, ()
        for texts in self.texts:
            yield (), texts


@dataclass
class Pointing:
    """N items of an image and a phrase: does the patch whose token is most similar to the phrase
    lie in a box of what it names? The margin is the largest similarity inside minus that outside;
    chance is the share of patches that are inside, which blind pointing would hit."""
    subset: str
    images: list                    # N tuples of one Picture
    texts: list                     # N tuples of one string
    boxes: list                     # N lists of (x, y, width, height) in pixels of the image
    labels: list | None = None      # as in Outcome
    partial: str = ""

    def outcome(self, model, text_features, options):
        """The one Outcome; under torchrun the processes share the images."""
        texts = text_features(self.texts)[:, 0]                             # (N, D)
        pictures = [picture for picture, in self.images]
        own = []                        # what this process has found, see share
        for items, size, patches in each_image(model, pictures, options):
            side = math.isqrt(len(patches))
            seen = seen_box(model, size)
            for item in items:
                inside = patches_inside(self.boxes[item], seen, side)       # (T,)
                found = point(patches @ texts[item], inside)
                own.append((torch.tensor([item]), torch.tensor([found])))
        margins, chances = share(own, len(self.images), width=2).T          # (N,) each
        names = [picture.name for picture in pictures]
        items = [f"{name} | {text}" for name, (text,) in zip(names, self.texts)]
        return Outcome(self.subset, margins, chances.tolist(), names, items, self.labels)

    def needed(self):
        """The texts; images are encoded to patch tokens, and not by encode_images."""
        for texts in self.texts:
            yield (), texts


def point(similarity, inside):
    """(T,), (T,) bool -> margin, and the share of the patches that are inside."""
    best = similarity[inside].max().item()
    other = UNREAD                  # where no patch is outside
    if not inside.all():
        other = similarity[~inside].max().item()
    return best - other, inside.float().mean().item()


def patches_inside(boxes, seen, side):
    """Which of side x side patches lie in a box: its middle does, or that of the box lies in it (or
    nearest to it), so that small things have a patch, too. seen: see seen_box -> (T,) bool."""
    left, right, bottom, top = seen
    width, height = (right - left) / side, (bottom - top) / side            # of a patch
    x = left + width * (torch.arange(side) + 0.5)
    y = top + height * (torch.arange(side) + 0.5)
    inside = torch.zeros(side, side, dtype=torch.bool)                      # rows, columns
    for box_x, box_y, box_width, box_height in boxes:
        columns = (x >= box_x) & (x <= box_x + box_width)
        rows = (y >= box_y) & (y <= box_y + box_height)
        inside |= rows[:, None] & columns
        column = int((box_x + box_width / 2 - left) // width)
        row = int((box_y + box_height / 2 - top) // height)
        inside[min(max(row, 0), side - 1), min(max(column, 0), side - 1)] = True
    return inside.flatten()


def cosines(queries, targets):
    """(Q, D), (M, D) -> yield the cosines of 500 queries at a time (<= 500, M), to save memory."""
    targets, inverse = targets.unique(dim=0, return_inverse=True)       # equal targets must tie
    for some in queries.split(500):
        yield (some @ targets.T)[:, inverse]


# Scores below all cosines: of targets without features, and of positives among the others, which
# come last, so that a query with fewer than k others is right.
UNREAD, NOT_OTHER = -2.0, -3.0


def ranking_margins(blocks, positive, k):
    """Scores of 500 queries after 500 (<= 500, M), positive (Q, M) bool -> margins (Q,): the best
    positive minus the k-th best other. NaN where the query or all of its positives are NaN; other
    targets of NaN are never found."""
    margins = []
    for block, mask in zip(blocks, positive.split(500)):
        scores = block.nan_to_num(UNREAD)                               # (<= 500, M)
        best = scores.masked_fill(~mask, UNREAD).amax(1)
        best = best.masked_fill(best == UNREAD, float("nan"))
        others = scores.masked_fill(mask, NOT_OTHER)
        others = others.topk(min(k, scores.shape[1])).values
        margins.append(best - others[:, -1])
    return torch.cat(margins)


def blind_recall(positive, k):
    """(Q, M) bool -> for each query the chance that k targets, drawn blindly, hold a positive."""
    n = positive.shape[1]
    tries = torch.arange(min(k, n))[:, None]                            # (k, 1)
    miss = (n - tries - positive.sum(1)).double() / (n - tries)         # (k, Q)
    return (1 - miss.clamp(0).prod(0)).tolist()


# ---- encoding ----------------------------------------------------------------------------------

@dataclass
class Options:
    """What run takes beside the model and the benchmarks."""
    data_dir: str = "data"          # folder of the benchmarks' files, as download fills it
    image_root: str = ""            # folder of the images, where they are not in data_dir
    # own data: pairs (retrieval), a folder of classes, captions and negatives (choices), or boxes
    data: str | None = None
    image_key: str | None = None    # column of data with paths of images; None: a usual name
    caption_key: str | None = None  # column of data with captions; None: a usual name
    classes: str | None = None      # file with the name of each class of folder, one a line
    allow_missing: bool = False     # leave out what is missing or damaged, and count it
    batch_size: int = 250           # images or texts in a forward pass
    workers: int = 0                # processes that read images
    device: Any = None              # None: where the model is
    dtype: str = "float32"          # of the towers; bfloat16 is by autocast
    pooled: bool = False            # judge by pooled_scores instead of cosines
    attack: float = 0.0             # how far an attack may change a pixel, of 255; 0: no attack
    attack_steps: int = 5           # its steps, see attacked_outcomes
    quiet: bool = False             # print no tables


UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)   # pillow's errors


@dataclass
class PictureData(Dataset):
    """Item i is (i, pixels of picture i as the model's transform makes them, its width and height),
    or None where the picture cannot be read and that is allowed."""
    pictures: list
    transform: Callable
    allow_missing: bool

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        try:
            image = self.pictures[i].open()
            return i, self.transform(image), image.size
        except UNREADABLE as error:
            if self.allow_missing:
                return None
            raise ValueError(f"cannot read {self.pictures[i].name} ({error}): check --image-root, "
                             "or --allow-missing") from None


def stack_readable(items):
    """Items of PictureData -> numbers (n,), pixels (n, 3, S, S), sizes; None if n is 0."""
    readable = [item for item in items if item is not None]
    if not readable:
        return None
    numbers, pixels, sizes = zip(*readable)
    return torch.tensor(numbers), torch.stack(pixels), sizes


def read_batches(model, pictures, options):
    """Yield this process's batches of pictures, as stack_readable gives them."""
    batches = torch.arange(len(pictures)).split(options.batch_size)[RANK::WORLD]
    loader = DataLoader(
        PictureData(pictures, model.transform, options.allow_missing),
        batch_sampler=[batch.tolist() for batch in batches],
        collate_fn=stack_readable,
        num_workers=options.workers,
        multiprocessing_context="fork" if options.workers else None)
    for batch in progress(loader, len(pictures)):
        if batch is not None:
            yield batch


def encode_images(model, pictures, options):
    """N different pictures -> Lookup of their normalised features, NaN for what cannot be read."""
    own = []                            # what this process has encoded, see share
    for numbers, pixels, _ in read_batches(model, pictures, options):
        own.append((numbers, forward(model, model.encode_image, pixels, options)))
    features = share(own, len(pictures))
    bad = features.isnan().any(1).nonzero()[:, 0].tolist()
    if bad and len(bad) == len(pictures):
        raise ValueError(f"none of {len(bad)} images can be read, the first is "
                         f"{pictures[0].name}: check --image-root")
    if bad:
        print0(f"skipped {len(bad)} of {len(pictures)} images, which cannot be read; the first: "
               f"{pictures[bad[0]].name}")
    return Lookup(features, {picture: row for row, picture in enumerate(pictures)})


def encode_texts(model, texts, options):
    """N different texts -> Lookup of their normalised features. Those of equal tokens tie."""
    all_tokens = model.tokenize(texts)
    if not options.quiet:
        report_cut(model, texts, all_tokens)
    tokens, rows = all_tokens.unique(dim=0, return_inverse=True)            # (U, L), (N,)
    lengths = torch.full((len(tokens),), tokens.shape[1])
    if getattr(getattr(model, "config", None), "family", "") == "clip":
        # nothing is seen behind the end-of-text token of a causal model: cut it off
        lengths = tokens.argmax(1) + 1
    own = []
    batches = lengths.argsort().split(options.batch_size)[RANK::WORLD]
    for numbers in progress(batches, len(tokens)):
        longest = lengths[numbers].max()
        batch = tokens[numbers, :longest]
        own.append((numbers, forward(model, model.encode_text, batch, options)))
    return Lookup(share(own, len(tokens)), dict(zip(texts, rows.tolist())))


def progress(batches, count):
    off = count < 2000 or RANK > 0
    return tqdm(batches, "encoding", leave=False, disable=True if off else None)    # None: no tty


@torch.inference_mode()
def forward(model, encoder, inputs, options):
    """One batch through one tower -> normalised features (..., D), float32 on the CPU."""
    return without_nan(differentiable_forward(model, encoder, inputs, options).cpu())


def without_nan(features):
    """The features as they are. NaN means elsewhere that there is no image, so that a model that
    makes some would lose these items, and have the others counted."""
    if features.isnan().any():
        raise ValueError("the model gives features that are no numbers (NaN): expected weights "
                         "without NaN, and numbers that --dtype can hold; check the training's "
                         "log, or give --dtype float32")
    return features


def differentiable_forward(model, encoder, inputs, options):
    """As forward, on the device of the model."""
    device, dtype = model_place(model)
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        features = encoder(inputs.to(device))
    return F.normalize(features.float(), dim=-1)


def model_place(model):
    """The device and dtype of a model's weights."""
    if hasattr(model, "parameters"):
        for parameter in model.parameters():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def patch_tokens(model, pixels, options):
    """(n, 3, S, S) -> normalised patch tokens (n, T, D), float32 on the CPU."""
    def encoder(pixels):
        return model.encode_image(pixels, return_tokens=True)[1]

    return forward(model, encoder, pixels, options)


def gives_patch_tokens(model):
    return "return_tokens" in inspect.signature(model.encode_image).parameters


def each_image(model, pictures, options):
    """Yield of each different image that this process can read: its places in the list pictures,
    its width and height, its patch tokens (T, D)."""
    places = {}
    for place, picture in enumerate(pictures):
        if not picture.missing:
            places.setdefault(picture, []).append(place)
    different = list(places)
    for numbers, pixels, sizes in read_batches(model, different, options):
        tokens = patch_tokens(model, pixels, options)                       # (n, T, D)
        for number, size, patches in zip(numbers.tolist(), sizes, tokens):
            yield places[different[number]], size, patches


def pooled_scores(model, images, texts, options):
    """Scores where each text pools the patch tokens of an image as in pooling.py, and is compared
    with what it pooled: what XAC trains, and how FLAIR (Xiao et al. 2025) retrieves.

    images: N tuples of I Pictures, texts (N, K, D) -> (N, I, K), NaN without image. Images are read
    for each task anew, since all of their patch tokens would take much memory.
    """
    device, _ = model_place(model)
    pictures, item_of = [], []      # each picture, and the number of its item
    for item, some in enumerate(images):
        pictures += some
        item_of += [item] * len(some)
    queries = [some.unique(dim=0, return_inverse=True) for some in texts]   # equal texts must tie
    own = []
    for places, _, patches in each_image(model, pictures, options):
        for place in places:
            different, inverse = queries[item_of[place]]
            scores = concept_similarity(patches[None].to(device), different.to(device)).cpu()
            own.append((torch.tensor([place]), scores[:, inverse]))         # (1, K)
    scores = share(own, len(pictures), width=texts.shape[1])                # (N * I, K)
    return scores.unflatten(0, (len(images), -1))


def share(own, count, width=1):
    """Each process's own [(numbers (n,), features (n, D)), ...] -> features (count, D) of all, NaN
    where there are none. width: D, if nobody has any."""
    pieces = own
    if WORLD > 1:
        gathered = [None] * WORLD
        dist.all_gather_object(gathered, own)
        pieces = sum(gathered, [])
    if pieces:
        width = pieces[0][1].shape[1]
    features = torch.full((count, width), float("nan"))
    for numbers, some in pieces:
        features[numbers] = some
    return features


class Lookup:
    """Features by what they are of: a list of N tuples of K keys -> (N, K, D), NaN for unknown."""

    def __init__(self, features, rows):
        unknown = torch.full((1, features.shape[1]), float("nan"))
        self.features = torch.cat([features, unknown])      # row -1 is the unknown one
        self.rows = rows                                    # {key: its row of features}

    def __call__(self, items):
        numbers = []
        for item in items:
            numbers.append([self.rows.get(key, -1) for key in item])
        return self.features[torch.tensor(numbers)]


# ---- results with intervals --------------------------------------------------------------------

def bootstrap(columns, samples=2000, seed=0):
    """[(images (n,), as numbers, values (n,), weights (n,)), ...] -> (1 + samples, columns).

    Row 0 holds each column's weighted mean; each other row the same over as many images as there
    are, drawn with replacement, with all their items: the same draws for all columns. NaN where
    none of a column's few images was drawn."""
    rng = np.random.default_rng(seed)
    # images that no column has any more are not drawn
    used, rows = np.unique(np.concatenate([column[0] for column in columns]), return_inverse=True)
    size = len(used)
    totals, sums = [], []
    for images, values, weights in columns:
        of_column, rows = rows[:len(images)], rows[len(images):]
        totals.append(np.bincount(of_column, weights, size))
        sums.append(np.bincount(of_column, values * weights, size))
    total = np.stack(totals, 1)                         # (images, columns): weight of each image
    value = np.stack(sums, 1)                           # (images, columns): what it adds
    means = [value.sum(0) / total.sum(0)]
    for _ in range(samples):
        drawn = rng.integers(size, size=size)
        count = np.bincount(drawn, minlength=size)      # how often each image was drawn
        weight = count @ total
        means.append(np.divide(count @ value, weight, np.full_like(weight, np.nan),
                               where=weight > 0))
    return np.stack(means)


# What a result holds, beside n and chance:
#     of a subset   right, ties; of each item correct (0 or 1), image (a number), items (in words);
#                   partial and attack, as in Outcome, where they are not empty
#     of a macro    of (the subset), weights (of its items)
#     of a mean     parts (names of subsets, macros or other means)
# accuracy, low and high come last, from draws that all share.
def summarize(outcomes, means, samples=2000):
    """Outcomes of tasks -> {subset or mean: {accuracy, low, high, n, chance, ...}}.

    A subset of which no item has its image is left out, and so are the means that it is a part of.

    means: {name: subsets or earlier names}. Each is the plain mean of its parts, but "micro" is the
    mean over items. Intervals are 95 %, by percentiles of the bootstrap; where all draws agree, as
    where all items are right, it knows nothing, and either side is as long as that of Wilson's
    interval of as many items as there are images, all of them right.
    """
    results, correct = {}, {}
    numbers = {}            # {name of an image: its number in all subsets}
    for outcome in outcomes:
        for name in outcome.images:     # the unread, too: a number means the same in all files
            numbers.setdefault(name, len(numbers))
        outcome = leave_out_unread(outcome)
        if len(outcome.margins) == 0:
            continue
        results[outcome.subset] = count_right(outcome, numbers)
        correct[outcome.subset] = results[outcome.subset]["correct"]
        if outcome.labels:
            add_macro(results, outcome)
    if not results:
        names = ", ".join(outcome.subset for outcome in outcomes)
        raise ValueError(f"none of the items of {names} has an image that can be read: check "
                         "--image-root")
    add_means(results, means)
    for name, draws in resample(results, correct, samples).items():
        add_interval(results[name], draws, len(images_of(results, name)))
    return results


def images_of(results, name, chosen=None):
    """The different images, as numbers, that a subset or mean is of; with chosen, {subset: (n,)
    bool}, those of chosen items."""
    result = results[name]
    if "parts" in result:
        return set().union(*[images_of(results, part, chosen) for part in result["parts"]])
    subset = result.get("of", name)
    images = np.array(results[subset]["image"])
    counts = np.array(result.get("weights", np.ones(len(images)))) > 0
    if chosen:
        counts &= chosen[subset]
    return set(images[counts].tolist())


def leave_out_unread(outcome):
    """An Outcome without the items whose image could not be read, which are counted."""
    n = len(outcome.margins)
    kept = (~outcome.margins.isnan()).nonzero()[:, 0].tolist()
    if len(kept) == n:
        return outcome
    print0(f"{outcome.subset}: {n - len(kept)} of {n} items skipped, without their image")
    lists = {}
    for name in ("images", "items", "labels", "chance"):
        values = getattr(outcome, name)
        lists[name] = [values[i] for i in kept] if isinstance(values, list) else values
    return replace(outcome, margins=outcome.margins[kept], **lists)


def count_right(outcome, numbers):
    """The result of a subset, without its accuracy. numbers: {name of an image: its number}."""
    right = (outcome.margins > 0).int()
    result = {
        "right": right.sum().item(), "n": len(right), "ties": int((outcome.margins == 0).sum()),
        "chance": float(np.mean(outcome.chance)), "correct": right.tolist(),
        "image": [numbers[name] for name in outcome.images], "items": outcome.items}
    if outcome.partial:
        result["partial"] = outcome.partial
    if outcome.attack:
        result["attack"] = outcome.attack
    return result


def add_macro(results, outcome):
    """The mean over a subset's labels of their means: each item weighs 1 / (items of its label)."""
    count = collections.Counter(outcome.labels)
    weights = [0 if label is None else 1 / count[label] for label in outcome.labels]
    n = sum(weight > 0 for weight in weights)
    if n:
        chance = outcome.chance
        if isinstance(chance, list):
            chance = float(np.average(chance, weights=weights))
        results[f"{outcome.subset}_macro"] = {
            "n": n, "chance": chance, "of": outcome.subset, "weights": weights}


def add_means(results, means):
    """Put those means whose parts are all there into results, without their accuracy."""
    for name, parts in means.items():
        if set(parts) <= set(results):
            chances = [results[part]["chance"] for part in parts]
            n = sum(results[part]["n"] for part in parts)
            results[name] = {"n": n, "parts": parts,
                             "chance": float(mean_of_parts(results, name, parts, chances))}


def mean_of_parts(results, name, parts, values):
    """The mean called name of the values of its parts: over items if it is micro, else the plain
    one. Values are numbers or arrays."""
    weights = [results[part]["n"] for part in parts] if name == "micro" else None
    return np.average(values, 0, weights)


def resample(results, values, samples=2000, seed=0):
    """Bootstrap {subset or mean: result}, with a value of each item in {subset: (n,)} -> {subset or
    mean: (1 + samples,)}, the mean itself first, of those that have values."""
    columns = {}
    for name, result in results.items():
        subset = result.get("of", name)
        if subset in values and "parts" not in result:
            images = np.array(results[subset]["image"])
            weights = np.array(result.get("weights", np.ones(len(images))))
            columns[name] = images, np.array(values[subset]), weights
    if not columns:
        return {}
    draws = dict(zip(columns, bootstrap(list(columns.values()), samples, seed).T))
    for name, result in results.items():
        parts = result.get("parts")
        if parts and set(parts) <= set(draws):
            draws[name] = mean_of_parts(results, name, parts, [draws[part] for part in parts])
    return draws


def add_interval(result, draws, image_count):
    accuracy = draws[0].item()
    low, high = np.nanquantile(draws[1:], (0.025, 0.975)).tolist()
    if high - low < 1e-9:
        edge = 3.84 / (image_count + 3.84)      # of Wilson's interval; 3.84 is 1.96^2
        low, high = max(0.0, accuracy - edge), min(1.0, accuracy + edge)
    result["accuracy"] = accuracy
    result["low"] = min(accuracy, low)
    result["high"] = max(accuracy, high)


def run(model, benches, **options):
    """Score a model as it is (call its eval() first) on benchmarks: names in BENCHES, or ["all"].

    model: any object with
        encode_image(pixels (n, 3, S, S)) -> (n, D) and encode_text(tokens (n, L)) -> (n, D);
        transform(RGB image of pillow) -> pixels (3, S, S) and tokenize(list of str) -> tokens.
    options: the fields of Options. Under torchrun all processes call this, and share the work.

    Returns {bench: {subset or mean: {accuracy, low, high, n, chance, ...}}}, shares from 0 to 1;
    subsets also hold right, ties, and item by item correct (0 or 1), image (a number) and items.
    Raises ValueError, with a line that says what to do, for files that are missing or damaged.
    """
    options = Options(**options)
    if options.device is not None and hasattr(model, "to"):
        model.to(options.device)
    tasks, missing = read(benches, options, image_size(model), gives_patch_tokens(model))
    for line in missing:
        print0(f"not there: {line}")
    results = score(model, tasks, options)
    if not options.quiet:
        for bench, subsets in results.items():
            print_table(bench, subsets)
    return results


def check(benches, **options):
    """Raise whatever run would raise before it encodes anything, without a model: for unknown
    benchmarks, files or columns that are missing, and where no image of a task can be opened."""
    check_names(benches)
    options = Options(**options)
    tasks, _ = read(benches, options)
    for bench, some in tasks.items():
        for task in some:
            check_pictures(bench, task, options)


def check_pictures(bench, task, options):
    """Open pictures of a task until one can be read."""
    for picture in itertools.chain(*task.images):
        data = PictureData([picture], lambda image: image, options.allow_missing)
        if not picture.missing and data[0] is not None:
            return
    raise ValueError(f"{bench}: none of its images can be read, the last is {picture.name}: check "
                     "--image-root")


def score(model, tasks, options):
    """tasks {bench: [Choices, Ranking or Pointing, ...]} -> results, as run returns them."""
    check_attack(model, tasks, options)
    pictures, texts = needed_by(tasks)
    image_features = encode_images(model, [] if options.pooled else pictures, options)
    text_features = encode_texts(model, texts, options)
    results = {}
    for bench, some in tasks.items():
        outcomes, last = [], {}
        for task in some:
            outcomes += judge(model, task, image_features, text_features, options, last)
        names = [outcome.subset for outcome in outcomes]
        results[bench] = summarize(outcomes, means_of(bench, names))
    mean = find_result(results, ELEVEN_SETS)
    if mean:
        results[ELEVEN] = {"mean": mean}
    if options.pooled:
        for subsets in results.values():
            for result in subsets.values():
                result["pooled"] = True
    return results


def needed_by(tasks):
    """The different pictures and texts of {bench: tasks}, in the order of the tasks."""
    pictures, texts = {}, {}            # dicts for their order
    for task in itertools.chain(*tasks.values()):
        for some_pictures, some_texts in task.needed():
            pictures.update(dict.fromkeys(some_pictures))
            texts.update(dict.fromkeys(some_texts))
    return list(pictures), list(texts)


def judge(model, task, image_features, text_features, options, last):
    """The outcomes of a task, and those under attack. last: pooled scores of the task before."""
    if isinstance(task, Pointing):
        outcomes = [task.outcome(model, text_features, options)]
    else:
        pooled = None
        if options.pooled and not task.text_only:
            # Winoground's rules share both lists
            what = type(task), id(task.images), id(task.texts)
            if what not in last:
                last.clear()
                last[what] = pooled_scores(model, *task.competing(text_features), options)
            pooled = last[what]
        outcomes = list(task.outcomes(image_features, text_features, pooled))
    if is_attacked(task, options):
        outcomes += attacked_outcomes(model, task, text_features, options)
    for outcome in outcomes:
        outcome.partial = task.partial
    return outcomes


def is_attacked(task, options):
    """Only images ask in zero-shot classification, which is what an attack is for."""
    if options.attack <= 0 or not isinstance(task, Ranking):
        return False
    return all(way == "i2t" for way, _ in task.recalls.values())


def check_attack(model, tasks, options):
    """Raise ValueError for an attack that has nothing to attack, no step, or no way to pixels."""
    if options.attack and options.pooled:
        raise ValueError("--attack and --pooled exclude each other: give one of them")
    attacked = any(is_attacked(task, options) for task in itertools.chain(*tasks.values()))
    if not options.attack >= 0 or options.attack_steps < 1:     # nan is not, either
        raise ValueError(f"--attack {options.attack:g} --attack-steps {options.attack_steps}: "
                         "expected at least 0, and at least 1 step")
    if options.attack and not attacked:
        raise ValueError(f"--attack {options.attack:g}: it needs a benchmark of zero-shot "
                         f"classification, such as cifar10, folder or scenes, and these are "
                         f"{', '.join(tasks)}")
    if options.attack:
        mean_and_std(model)
        check_gradient(model, options)


def check_gradient(model, options):
    """Raise ValueError where none comes from the features of an image back to its pixels."""
    pixels = model.transform(Image.new("RGB", (64, 64)))[None].requires_grad_()
    features = differentiable_forward(model, model.encode_image, pixels, options)
    gradient = None
    if features.requires_grad:
        [gradient] = torch.autograd.grad(features.sum(), [pixels], allow_unused=True)
    if gradient is None:
        raise ValueError("--attack: the model's encode_image gives no gradient to pixels: expected "
                         "one without torch.no_grad, inference_mode or detach, in it or around "
                         "this call; give the model such a one, or leave --attack out")


def mean_and_std(model):
    """Those by which the model's transform normalises pixels: (2, 3). Raises ValueError where it
    does not say: an attack moves pixels, and so has to undo what the transform did to them."""
    steps = getattr(model.transform, "transforms", None) or [model.transform]
    last = steps[-1]
    if not hasattr(last, "mean") or not hasattr(last, "std"):
        raise ValueError(f"--attack: the model's transform ends with {type(last).__name__}: "
                         "expected torchvision's Compose with Normalize as its last step; give "
                         "the model such a transform, or leave --attack out")
    return torch.tensor([last.mean, last.std])


def attacked_outcomes(model, task, text_features, options):
    """Outcomes of a classification on images that an attack has changed: attacked_top1, ...

    Projected gradient descent (losses.pgd_attack) knows the model and all texts, and raises the
    cross-entropy of an image's own, as in Mao et al. 2023 (TeCoA): from a random start, which is a
    function of the image's number, each of --attack-steps by 1 of 255, within --attack. The paper
    attacks images as they are before they are resized, here their pixels are what the tower sees.
    """
    device, _ = model_place(model)
    mean, std = mean_and_std(model).to(device)[:, :, None, None]    # (3, 1, 1) each
    texts = task.candidates(text_features).to(device)               # (M, D)
    scale = model.logit_scale.exp().item() if hasattr(model, "logit_scale") else 100.0

    def encode(pixels):
        inputs = (pixels - mean) / std
        return differentiable_forward(model, model.encode_image, inputs, options)

    def loss(pixels, labels):
        return tecoa_loss(encode(pixels), texts, labels, scale)

    pictures = [picture for picture, in task.images]
    own = []
    for numbers, images, _ in read_batches(model, pictures, options):
        pixels = (images.to(device) * std + mean).clamp(0, 1)
        labels = task.positive[numbers].to(device)                  # (n, M)
        noise = noise_of(numbers.tolist(), images.shape[1:]).to(device)
        attacked = pgd_attack(pixels, noise, functools.partial(loss, labels=labels),
                              options.attack / 255, options.attack_steps)
        with torch.no_grad():
            own.append((numbers, without_nan(encode(attacked).cpu())))
    features = share(own, len(task.images))[:, None]                # (N, 1, D)
    for outcome in task.outcomes(lambda images: features, text_features):
        yield replace(outcome, subset=f"attacked_{outcome.subset}",
                      attack=[options.attack, options.attack_steps])


def means_of(bench, subsets):
    """{name: its parts}, see summarize: of benchmarks.json, or where the data says what subsets
    there are, all of them (macro, micro), or those of each of Winoground's rules."""
    if bench == "vismin":
        return {rule: [name for name in subsets if name.endswith(f"_{rule}")] for rule in PAIRED}
    if bench in ("choices", "mmvp") and len(subsets) > 1:
        return {"macro": subsets, "micro": subsets}
    return TABLE.get(bench, {}).get("means", {})


def report_cut(model, texts, tokens):
    """Say how many texts are longer than the model's context: what is cut off decides nothing, and
    texts that differ only there tie. tokens (N, L) are those of the N texts."""
    if tokens.shape[1] < 2:
        return
    # A text is cut if it fills all places, and is the same to the model without its last word. The
    # place before the last tells whether it does: the last is padding, or ends the text.
    full = (tokens[:, -2] != tokens[:, -1]).nonzero()[:, 0].tolist()
    if not full:
        return
    shorter = model.tokenize([without_last_word(texts[i]) for i in full])
    if shorter.shape != tokens[full].shape:     # it pads to the longest text, and cuts none
        return
    same = (shorter == tokens[full]).all(1).tolist()
    cut = [texts[i] for i, is_same in zip(full, same) if is_same]
    if cut:
        print0(f"{len(cut)} of {len(texts)} texts are cut at the model's {tokens.shape[1]} tokens; "
               "those that differ only behind them tie, and ties count as errors. The first: "
               f"{cut[0]!r}")


def without_last_word(text):
    """A text of one word, or in a script without spaces, loses its last letter."""
    words = text.rsplit(maxsplit=1)
    return words[0] if len(words) > 1 else text[:-1]


def image_size(model):
    """The side in pixels of the images that a model takes."""
    return model.transform(Image.new("RGB", (64, 64))).shape[-1]


def print_table(bench, results, reference=False):
    """A line for each subset and mean, in percent. reference: published figures with sources."""
    title = bench
    if any("pooled" in result for result in results.values()):
        title = f"{bench} (pooled)"
    width = max(len(name) for name in (title, *results))
    print0(f"\n{title:{width}s}    chance  accuracy     right / n      ties    95 % interval")
    for name, r in results.items():
        count = f"mean over {r['n']:6d} items"
        if "right" in r:
            count = f"{r['right']:6d} / {r['n']:<6d} {r['ties']:5d}"
        line = (f"{name:{width}s}  {100 * r['chance']:8.1f}  {100 * r['accuracy']:8.1f}  "
                f"{count:21s}    {100 * r['low']:5.1f} .. {100 * r['high']:5.1f}  "
                f"{r.get('partial', '')}")
        print0(line.rstrip())
    published = TABLE.get(bench, {}).get("published", {})
    if reference and published:
        columns = [(bench, name) for name in results if any(name in x for x in published.values())]
        print0("\n" + format_table(bench, columns, ["ours"], [{bench: results}], reference=True))
        for method, figures in published.items():
            print0(f"{method} (published): {figures['source']}")


# ---- reading: the files of a benchmark ---------------------------------------------------------

@dataclass
class Source:
    """The files of one part of a benchmark, as benchmarks.json lists them."""
    bench: str
    subset: str
    options: Options
    image_size: int = 32            # of the model, for built-in drawings
    has_patches: bool = True        # whether the model gives patch tokens
    partial: str = ""               # what is to be said of a file that is not whole
    images: dict = field(default_factory=dict)      # {path: is it there?}, filled by pictures

    @property
    def spec(self):
        return TABLE[self.bench]

    def rows(self, *strings, kinds=None, part=None):
        """The rows of this part's file, or of another part's: dicts, or lists. strings: keys (of a
        list: places) of texts; kinds: {key or place: type of its value}. Raises Missing if there
        is no file, ValueError if it is not the official one."""
        keys = dict.fromkeys(strings, str) | (kinds or {})
        file = self.spec["files"][part or self.subset]
        n = file.get("n")               # None: not known
        path = Path(self.options.data_dir, file["path"])
        if not path.exists():
            raise Missing(f"{self.bench}: no {path}; get it: {GET} {self.bench}")
        with expecting(f"{path} is not the official file of {n or 'unknown'} rows",
                       f": delete it and get it: {GET} {self.bench}"):
            rows, digest = read_folder(path) if path.is_dir() else read_file(path)
            named = ", ".join(map(str, keys))
            official = n in (None, len(rows)) and file.get("sha256") in (None, digest)
            if not all(has_keys(row, keys) for row in rows):
                raise ValueError(f"{len(rows)} rows, not all with {named}")
            if self.options.allow_missing and n and 0 < len(rows) < n:
                self.partial = f"partial: {len(rows):,} of the official {n:,} rows"
            elif rows and len(rows) == n and not official:
                raise ValueError("its sha256 is another")
            elif not rows or not official:
                raise ValueError(f"{len(rows)} rows, all with {named}")
        return rows

    def pictures(self, items, boxes=None):
        """N tuples of file names -> N tuples of Pictures: in --image-root, or else the first of the
        benchmark's folders that has it. boxes: for each item x, y, width, height of a crop."""
        options = self.options
        folders = [Path(options.data_dir, folder) for folder in self.spec["folders"]]
        if options.image_root:
            folders.insert(0, options.image_root)
        paths, missing = {}, set()
        for name in dict.fromkeys(itertools.chain(*items)):
            tried = [os.path.join(folder, name) for folder in folders]
            paths[name] = next(filter(os.path.isfile, tried), tried[0])
            if not os.path.isfile(paths[name]):
                missing.add(name)
            self.images[paths[name]] = name not in missing
        if missing and not (options.allow_missing and len(missing) < len(paths)):
            raise MissingImages
        pictures = []
        for names, box in zip(items, boxes or [()] * len(items)):
            pictures.append(tuple(
                Picture(paths[name], box, missing=name in missing) for name in names))
        return pictures


def read_file(path):
    """The rows of a .csv or .jsonl file, of a json list, of Karpathy's json files, which have them
    under images, or the values of another json dict -> rows, sha256 of the file."""
    content = path.read_bytes()
    if path.suffix.startswith(".jsonl"):
        rows = [json.loads(line) for line in content.splitlines()]
    elif path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
    else:
        rows = json.loads(content)
    if isinstance(rows, dict):      # the values are by number, with gaps in SugarCrepe's swap_obj
        images = rows.get("images")
        rows = images if isinstance(images, list) else list(rows.values())
    return rows, hashlib.sha256(content).hexdigest()


def read_folder(path):
    """A folder of json files -> their contents; of texts -> rows {name, text}; no sha256: None."""
    rows = []
    for file in sorted(path.iterdir(), key=lambda file: (len(file.stem), file.stem)):
        if file.suffix == ".json":
            rows.append(json.loads(file.read_text("utf-8")))
        elif file.suffix == ".txt":
            rows.append({"name": file.stem, "text": file.read_text("utf-8")})
    return rows, None


def has_keys(row, keys):
    """Whether a row, a dict or a list, holds values of these kinds: {key or place: kind}."""
    if isinstance(row, list):
        row = dict(enumerate(row))
    if not isinstance(row, dict):
        return False
    return all(key in row and is_kind(row[key], kind) for key, kind in keys.items())


def is_kind(value, kind):
    """kind: str, dict, ...; (int, float) and so on for one of them; [str] for a list of strings."""
    if kind == [str]:
        return isinstance(value, list) and value != [] and all(is_kind(x, str) for x in value)
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):      # half of a surrogate pair is no text, though json allows it
        return value.encode("utf-8", "ignore").decode() == value
    return True


def read(benches, options, image_size=32, has_patches=True, skip=False):
    """Read benchmarks: what images and texts they compare.

    benches: a list of names, or ["all"]: see read_all
    image_size, has_patches: of the model, see Source
    skip: pass over what is not there, as --allow-missing does where another part of the same
        benchmark is there

    Returns {bench: [Choices, Ranking or Pointing, ...]}, and a line for each benchmark of which
    something is not there. Raises Missing for what is not there and may not be passed over, and
    ValueError for what is there and not as it should be.
    """
    if isinstance(benches, str) or not benches:
        raise ValueError(f"benches is {benches!r}: expected a list of names")
    if options.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {options.dtype!r}: expected float32 or bfloat16")
    if options.pooled and not has_patches:
        raise ValueError(f"--pooled: {NO_PATCHES}")
    if list(benches) == ["all"]:
        return read_all(options, image_size, has_patches)
    check_names(benches)
    tasks, missing = {}, []
    for bench in benches:
        found, absent = read_bench(bench, options, image_size, has_patches)
        may_lack = skip or (options.allow_missing and found)
        if absent and not may_lack:
            raise Missing(absent)
        if absent:
            missing.append(absent)
        if found:
            tasks[bench] = found
    return tasks, missing


def read_all(options, image_size, has_patches):
    """As read, of all benchmarks: whatever is wrong with one of them is a line, and no error."""
    tasks, missing = {}, []
    for bench in BENCHES:
        try:
            found, absent = read_bench(bench, options, image_size, has_patches)
        except (ValueError, OSError) as error:
            found, absent = [], plain_words(error)
        if absent:
            missing.append(absent)
        if found:
            tasks[bench] = found
    return tasks, missing


def read_bench(bench, options, image_size, has_patches):
    """Read all parts of a benchmark, most of which have a file each.

    Returns the tasks of those that are there, and one line on what is not there, or "". Raises
    ValueError for what is there and not as it should be.
    """
    parts = TABLE[bench].get("files", [bench])
    if bench == "retrieval" and options.data and not os.path.isdir(options.data):
        parts = ["data"]
    tasks = []
    errors = []         # Missing, of each part that is not there
    images = {}         # {path: is it there?}, of all parts
    for part in parts:
        source = Source(bench, part, options, image_size, has_patches, images=images)
        try:
            tasks += read_part(source)
        except Missing as error:
            errors.append(error)
    return tasks, absence(bench, options, errors, images)


def read_part(source):
    """The tasks of one part of a benchmark. Raises Missing for files or images not there."""
    tasks = list(READERS[source.bench](source))
    for task in tasks:
        if not task.images or not task.texts:
            raise ValueError(f"{source.bench}: no item of {source.subset} is left to score")
        task.partial = source.partial
    return tasks


def absence(bench, options, errors, images):
    """The line of read_bench: the first file that is not there, and how many images are not."""
    reasons = []
    if errors and bench == "retrieval" and not options.data:
        reasons.append(f"{needs_data(bench)}, or the official files")
    files = [str(error) for error in errors if not isinstance(error, MissingImages)]
    if files:
        more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
        reasons.append(f"{files[0]}{more}")
    if len(files) < len(errors):
        gone = [path for path, there in images.items() if not there]
        reasons.append(
            f"{bench}: {len(gone)} of {len(images)} images are missing, the first is "
            f"{gone[0][:300]}. Give --image-root DIR, or get them: {GET} {bench}; "
            "--allow-missing skips some, but not all")
    return "; ".join(reasons)


def needs_data(bench):
    return f"{bench}: --data is missing, for example {OWN_DATA[bench]}"


# ---- benchmarks: the docstring is the protocol -------------------------------------------------

# A scene's caption and its negative: colours c, shapes s, objects 1 and 2, and the rest of them.
SCENE_CAPTIONS = {
    "np_binding": ("a {c1} {s1}", "a {c1} {s2}"),
    "swap_att": ("a {c1} {s1} and a {c2} {s2}{rest}", "a {c2} {s1} and a {c1} {s2}{rest}"),
    "replace_att": ("a {c1} {s1} and a {c2} {s2}{rest}", "a {c3} {s1} and a {c2} {s2}{rest}"),
    "replace_obj": ("a {c1} {s1} and a {c2} {s2}{rest}", "a {c1} {s3} and a {c2} {s2}{rest}"),
    "swap_obj": ("a {c1} {s1} {where} a {c2} {s2}{rest}", "a {c2} {s2} {where} a {c1} {s1}{rest}"),
    "add": ("a {c1} {s1}", "a {c1} {s1} and a {c3} {s3}"),
}


def scenes(source, n=1000, seed=1):
    """Built-in drawings of two objects that training never showed together, 1,000 of them.

    The caption must score strictly higher than its negative, where the image shows a red circle
    and, left of it, a blue square:
        np_binding   "a red circle" against "a red square"
        swap_att     "a red circle and a blue square": the colours exchanged
        replace_att  the same with a colour that is not there; replace_obj with a shape
        swap_obj     "a red circle right of a blue square": the objects exchanged
        add          "a red circle" against that and an object that is not there
    seen_np_binding is np_binding on pairs of objects that training does show. i2t_r1, t2i_r1:
    retrieval among the 1,000 captions of swap_att; whatever says, or shows, the same two objects is
    right. single: one object alone among the 48 captions "a red circle"; single_colour and
    single_shape ask for its colour and its shape only.
    """
    yield from scene_tasks("small", source, n, seed)


def scenes_large(source, n=1000, seed=1):
    """Built-in drawings of three objects of 12 colours and 12 shapes, which few captions share.

    As `scenes`, of which `python evaluate.py describe scenes` tells the subsets. They change the
    first two objects; the third stays as it is. single asks for one of 144 objects.
    """
    yield from scene_tasks("large", source, n, seed)


def scenes_crowded(source, n=1000, seed=1):
    """Built-in drawings of four objects of 12 colours and 12 shapes; a caption names three of them.

    As `scenes`, of which `python evaluate.py describe scenes` tells the subsets. They change the
    first two objects, to what is false of the others, too. In retrieval each caption is right whose
    three objects an image shows.
    """
    yield from scene_tasks("crowded", source, n, seed)


def scenes_many(source, n=1000, seed=1):
    """Built-in drawings of six small objects of 12 colours and 12 shapes; a caption names three.

    As `scenes_crowded`, in nine cells instead of four. For images of 48 pixels and more, in which
    an object covers as many pixels as one of four does in 32.
    """
    yield from scene_tasks("many", source, n, seed)


def scenes_pointing(source, n=1000, seed=1):
    """Built-in drawings of two objects that training never showed together, 1,000 of them; for each
    object the patch most similar to "a red circle" must lie in its quadrant (chance 25)."""
    yield from scene_pointing("small", source, n, seed)


def scenes_crowded_pointing(source, n=1000, seed=1):
    """The 1,000 built-in drawings of scenes_crowded; for each of their four objects, named by a
    caption or not, the patch most similar to "a red circle" must lie in its quadrant (chance 25).
    """
    yield from scene_pointing("crowded", source, n, seed)


def scenes_many_pointing(source, n=1000, seed=1):
    """The 1,000 built-in drawings of scenes_many; for each of their six objects, named by a caption
    or not, the patch most similar to "a red circle" must lie in its cell (chance 11)."""
    yield from scene_pointing("many", source, n, seed)


def scene_pointing(world, source, n, seed):
    need_patches(source)
    data = Scenes(n, "val", seed, source.image_size, world=world)
    pictures = [picture for picture, in scene_pictures(data, f"{world} val {seed}", n)]
    images, texts, boxes = [], [], []
    for i, picture in enumerate(pictures):
        for name, *box in scene_boxes(data, i):
            images.append((picture,))
            texts.append((f"a {name}",))
            boxes.append([box])
    name = "quadrant" if data.world.grid == 2 else "cell"
    yield Pointing(name, images, texts, boxes)


def scene_boxes(data, i):
    """[name, x, y, width, height] of each object of scene i: the cell that it lies in."""
    objects, cells, _ = data.objects(i)
    side = data.image_size / data.world.grid
    boxes = []
    for (colour, shape), cell in zip(objects, cells):
        row, column = divmod(cell, data.world.grid)
        boxes.append([f"{colour} {shape}", side * column, side * row, side, side])
    return boxes


def need_patches(source):
    """For benchmarks of pointing."""
    if source.options.pooled:
        raise Missing(f"{source.bench}: it compares patches, which --pooled does not change")
    if not source.has_patches:
        raise Missing(f"{source.bench}: {NO_PATCHES}")


def scene_tasks(world, source, n, seed):
    held_out = Scenes(n, "val", seed, source.image_size, world=world)
    captions = scene_captions(held_out, n, seed)
    images = scene_pictures(held_out, f"{world} val {seed}", n)
    for subset, texts in captions.items():
        yield Choices(subset, first_text_wins, 1 / 2, images, texts)
        if subset == "swap_att":
            yield scene_retrieval(held_out, images, [caption for caption, _ in texts])

    seen = Scenes(n, "train", seed + 1000, source.image_size, world=world)
    texts = scene_captions(seen, n, seed)["np_binding"]
    images = scene_pictures(seen, f"{world} train {seed + 1000}", n)
    yield Choices("seen_np_binding", first_text_wins, 1 / 2, images, texts)
    yield from single_objects(seen, n, seed)


def scene_pictures(data, name, n):
    """Scenes -> n tuples of one Picture."""
    def load(name, i):
        return data[i]["image"]

    return [(Picture(f"{name} {i}", (i,), load),) for i in range(n)]


def scene_captions(data, n, seed):
    """{subset: n tuples of a scene's caption and its negative}."""
    rng = random.Random(seed)
    captions = {subset: [] for subset in SCENE_CAPTIONS}
    for i in range(n):
        objects, cells, _ = data.objects(i)
        colours = [colour for colour, _ in objects]
        shapes = [shape for _, shape in objects]
        also_named = objects[2:data.world.named]
        words = {
            "c1": colours[0], "s1": shapes[0], "c2": colours[1], "s2": shapes[1],
            "c3": rng.choice([colour for colour in data.world.colours if colour not in colours]),
            "s3": rng.choice([shape for shape in data.world.shapes if shape not in shapes]),
            "rest": "".join(f" and a {colour} {shape}" for colour, shape in also_named),
            "where": relation(*cells[:2], data.world.grid),
        }
        for subset, (true, false) in SCENE_CAPTIONS.items():
            captions[subset].append((true.format(**words), false.format(**words)))
    return captions


def scene_retrieval(data, images, captions):
    """Whatever caption names only what an image shows, in any order, is right."""
    shown = [set(data.objects(i)[0]) for i in range(len(images))]
    named = [set(data.objects(i)[0][:data.world.named]) for i in range(len(images))]
    fits = []
    for objects in shown:
        fits.append([others <= objects for others in named])
    recalls = {"i2t_r1": ("i2t", 1), "t2i_r1": ("t2i", 1)}
    return Ranking(images, tuples(captions), torch.tensor(fits), recalls)


def single_objects(data, n, seed):
    """One object in each image, in turn each that the world has. Right is the object, or whatever
    has its colour, or its shape."""
    objects = list(itertools.product(data.world.colours, data.world.shapes))
    texts = [(f"a {colour} {shape}",) for colour, shape in objects]

    def load(name, i):
        rng = random.Random(f"{seed} {i}")
        return data.render([objects[i % len(objects)]], [rng.randrange(4)], rng)

    images = [(Picture(f"single {seed} {i}", (i,), load),) for i in range(n)]
    parts = {"single": slice(2), "single_colour": slice(0, 1), "single_shape": slice(1, 2)}
    for subset, part in parts.items():
        fits = []
        for i in range(n):
            shown = objects[i % len(objects)]
            fits.append([shown[part] == other[part] for other in objects])
        yield Ranking(images, texts, torch.tensor(fits), {subset: ("i2t", 1)})


def sugarcrepe(source):
    """A COCO image, its caption and one hard negative: the caption must score strictly higher.

    7 subsets, 7,511 items on 1,560 images. Three averages are in use, which differ: macro_7 over
    the subsets, macro_3 over the groups replace, swap and add, micro over the items.

        swap_obj.json  {"0": {"filename": "000000222455.jpg", "caption": "...",
                              "negative_caption": "..."}, "1": ...}
    """
    rows = source.rows("filename", "caption", "negative_caption")
    images = source.pictures(pick(rows, "filename"))
    texts = pick(rows, "caption", "negative_caption")
    yield Choices(source.subset, first_text_wins, 1 / 2, images, texts)


def pick(rows, *keys):
    """For each row a tuple of the values of these keys."""
    return [tuple(row[key] for key in keys) for row in rows]


def group(rows, key):
    """{value of key: the rows that have it}, in order of first appearance."""
    groups = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def tuples(items):
    """[a, b, ...] -> [(a,), (b,), ...]: items of one image, or one text."""
    return [(item,) for item in items]


def sugarcrepe_pp(source):
    """A COCO image, two captions that mean the same, and a negative that shares most words.

    itt (image to text): both captions strictly beat the negative on the image. tot (text only): the
    captions are strictly nearer to each other than either is to the negative. Some negatives equal
    their caption, so that no model is right there. 5 subsets, 4,757 items.

        swap_obj.json  [{"id": 0, "filename": "000000222455.jpg", "caption": "...",
                         "caption2": "...", "negative_caption": "..."}, ...]
    """
    rows = source.rows("filename", "caption", "caption2", "negative_caption")
    images = source.pictures(pick(rows, "filename"))
    texts = pick(rows, "caption", "caption2", "negative_caption")
    yield Choices(f"{source.subset}_itt", both_captions_win, 1 / 3, images, texts)
    yield Choices(f"{source.subset}_tot", captions_are_nearest, 1 / 3, images, texts,
                  text_only=True)


def aro(source):
    """vg_relation, vg_attribution: on a crop of Visual Genome the caption must score strictly
    higher than the same with its objects, or attributes, exchanged. coco_order, flickr30k_order:
    the caption against four shuffles of its words (see orders); an item is one caption.

    Published are vg_relation_macro, the mean over relations without the symmetric ones and those
    that the original leaves out, and vg_attribution_macro, the mean over pairs of attributes with
    25 items or more. A shuffle that changes nothing is a tie: wrong here, right in the original.

        visual_genome_relation.json  [{"image_path": "2414605.jpg", "bbox_x": 0, "bbox_y": 10,
            "bbox_w": 90, "bbox_h": 80, "relation_name": "behind", "true_caption": "...",
            "false_caption": "..."}, ...]; visual_genome_attribution.json has "attributes"
        coco_karpathy_test.json  [{"image": "val2014/COCO_val2014_000000391895.jpg",
            "caption": ["...", "...", "...", "...", "..."]}, ...]
    """
    if source.subset in ("coco_order", "flickr30k_order"):
        names, captions = captions_of_images(source)
        images = source.pictures(names)     # first, since the next line takes a while
        texts = [orders(caption) for caption in captions]
        yield Choices(source.subset, first_text_wins, 1 / 5, images, texts)
    elif source.subset == "vg_relation":
        yield aro_swap(source, "relation_name", str, least=1)
    else:
        yield aro_swap(source, "attributes", [str], least=25)


BOX = dict.fromkeys(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), (int, float))


def aro_swap(source, label_key, label_type, least):
    rows = source.rows("image_path", "true_caption", "false_caption",
                       kinds={label_key: label_type, **BOX})
    images = source.pictures(pick(rows, "image_path"), pick(rows, *BOX))
    texts = pick(rows, "true_caption", "false_caption")
    labels = [str(row[label_key]) for row in rows]
    count = collections.Counter(labels)
    left_out = source.spec["files"][source.subset].get("left_out", ())
    for i, label in enumerate(labels):
        if label in left_out or count[label] < least:
            labels[i] = None
    return Choices(source.subset, first_text_wins, 1 / 2, images, texts, labels)


def captions_of_images(source):
    """Rows of an image and several captions -> a file name (in a tuple) and a text for each."""
    names, texts = [], []
    for row in source.rows("image", kinds={"caption": [str]}):
        names += [(row["image"],)] * len(row["caption"])
        texts += row["caption"]
    return names, texts


def orders(caption):
    """A caption and ARO's four shuffles of its words: of nouns and of adjectives; of all others; of
    the words within each three; of the threes. Cleaned and cut to 30 words as there. The shuffles
    are random, seeded by the caption; parts of speech are of concepts.py."""
    words = default_extractor().words(caption)
    rng = random.Random(caption)
    places = range(len(words))
    nouns = [i for i in places if words[i].tag in ("NN", "NNS", "NNP", "NNPS", "QN")]
    adjectives = [i for i in places if words[i].tag in ("JJ", "JJR", "JJS", "ORG")]
    others = [i for i in places if i not in nouns and i not in adjectives]
    threes = [places[i:i + 3] for i in places[::3]]

    shuffles = [list(places)]
    for groups in ([nouns, adjectives], [others], threes):
        order = list(places)
        for group in groups:
            for place, word in zip(group, rng.sample(group, len(group))):
                order[place] = word
        shuffles.append(order)
    shuffles.append(list(itertools.chain(*rng.sample(threes, len(threes)))))
    spellings = [caption[word.start:word.end] for word in words]
    texts = [" ".join(spellings[i] for i in order) for order in shuffles[1:]]
    return tuple(clean_order(text) for text in (caption, *texts))


def clean_order(text):
    words = re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()
    return " ".join(words[:30])


def valse(source):
    """A caption must score strictly higher than its foil, in which a phrase was exchanged. Only
    items whose caption at least 2 of 3 annotators found true; 11 pieces of 7 phenomena.

        existence.json  {"...": {"image_file": "v7w_2366235.jpg", "caption": "...", "foil": "...",
                                 "mturk": {"foil": 0, "caption": 3, "other": 0}, ...}, ...}
    """
    rows = source.rows("image_file", "caption", "foil", kinds={"mturk": dict})
    for row in rows:
        count = row["mturk"].get("caption", 0)
        if not is_kind(count, (int, float)):
            raise ValueError(f"valse {source.subset}: mturk's caption is {count!r:.40}: expected "
                             f"a number; get the file again: {GET} valse")
    rows = [row for row in rows if row["mturk"].get("caption", 0) >= 2]
    images = source.pictures(pick(rows, "image_file"))
    yield Choices(source.subset, first_text_wins, 1 / 2, images, pick(rows, "caption", "foil"))


def winoground(source):
    """Two images and two captions of the same words. text: each image strictly prefers its own
    caption; image: each caption its own image; group: both. Chance is 1/4, 1/4 and 1/6.

        examples.jsonl  {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1",
                         "caption_0": "...", "caption_1": "..."}
    """
    rows = source.rows("image_0", "image_1", "caption_0", "caption_1")
    names = [(f"{one}.png", f"{two}.png") for one, two in pick(rows, "image_0", "image_1")]
    yield from paired_choices(source, names, pick(rows, "caption_0", "caption_1"))


def paired_choices(source, names, texts, rules=PAIRED):
    """N pairs of file names, and of captions, by each of the rules {subset: (margin, chance)}."""
    images = source.pictures(names)
    for subset, (margin, chance) in rules.items():
        yield Choices(subset, margin, chance, images, texts)


def colorswap(source):
    """As Winoground; the captions differ in two colours exchanged. The 300 items of the test split.

        test.json  [{"image_1": "images/0_1.png", "image_2": "images/0_2.png",
                     "caption_1": "...", "caption_2": "..."}, ...]
    """
    rows = source.rows("image_1", "image_2", "caption_1", "caption_2")
    names = pick(rows, "image_1", "image_2")
    yield from paired_choices(source, names, pick(rows, "caption_1", "caption_2"))


def whatsup(source):
    """The caption with the true preposition must score strictly highest: of four on photographs
    made for it (A: household objects, B: objects on a table), of two on COCO and Visual Genome.

    A_pair, B_pair: of the same two objects left and right, or the other two prepositions, are both
    right; A_set, B_set: all four are.

        controlled_images_dataset.json  [{"image_path": "data/controlled_images/
            mug_left_of_plate.jpeg", "caption_options": ["true", "...", "...", "..."]}, ...]
        coco_qa_one_obj.json  [[398377, "A photo of a dog on the left", "... on the right"], ...]
    """
    if source.subset in ("A", "B"):
        yield from whatsup_controlled(source)
        return
    rows = source.rows(1, 2, kinds={0: (int, str)})
    if source.subset.startswith("coco"):
        names = [(f"val2017/{str(row[0]):0>12}.jpg",) for row in rows]
    else:
        names = [(f"data/vg_images/{row[0]}.jpg",) for row in rows]
    images = source.pictures(names)
    yield Choices(source.subset, first_text_wins, 1 / 2, images, pick(rows, 1, 2))


def whatsup_controlled(source):
    rows = source.rows("image_path", kinds={"caption_options": [str]})
    images = source.pictures(pick(rows, "image_path"))
    texts = [tuple(row["caption_options"]) for row in rows]
    yield Choices(source.subset, first_text_wins, 1 / 4, images, texts)
    pairs, sets = {}, {}        # {objects: [images, texts]} in which all must be right
    for row, image, options in zip(rows, images, texts):
        name = os.path.basename(row["image_path"])          # mug_left_of_plate.jpeg
        if name.count("_") < 2:
            raise ValueError(f"whatsup {source.subset}: an image is called {name:.60}: expected "
                             f"OBJECT_PREPOSITION_OBJECT; get the file again: {GET} whatsup")
        first, preposition, *_, second = name.split("_")
        sideways = preposition in ("left", "right")
        for groups, key in (pairs, (first, second, sideways)), (sets, (first, second)):
            some_images, some_texts = groups.get(key, ((), ()))
            groups[key] = some_images + image, some_texts + options
    for name, groups, size in ("pair", pairs, 2), ("set", sets, 4):
        subset = f"{source.subset}_{name}"
        whole = [group for group in groups.values() if len(group[0]) == size]
        if len(whole) < len(groups):    # of a part of the file
            print0(f"{subset}: {len(groups) - len(whole)} of {len(groups)} skipped, which lack "
                   f"some of their {size} images")
        if whole:
            images, texts = zip(*whole)
            yield Choices(subset, first_text_wins, (1 / 4) ** size, list(images), list(texts))


def cola(source):
    """Two images and two captions that share objects and attributes: each caption must strictly
    prefer its own image. The 210 items of the multi-object part.

        COLA_multiobjects_matching_benchmark.json  [["https://.../2414605.jpg", "caption",
                                                     "https://.../2414606.jpg", "caption"], ...]
    """
    rows = source.rows(0, 1, 2, 3)
    names = []
    for first, second in pick(rows, 0, 2):
        names.append((re.sub("http.*/", "", first), re.sub("http.*/", "", second)))
    yield from paired_choices(source, names, pick(rows, 1, 3), {source.subset: PAIRED["image"]})


def bivlc(source):
    """An image of COCO and its caption, and a negative caption of SugarCrepe with an image that was
    made for it. As Winoground: text, image and group score, chance 1/4, 1/4 and 1/6. The 2,933
    items of the test split; download writes them in this form, by the package datasets.

        test.jsonl  {"image": "0_image.jpg", "negative_image": "0_negative_image.jpg",
                     "caption": "...", "negative_caption": "...", "type": "add", "subtype": "obj"}
    """
    rows = source.rows("image", "negative_image", "caption", "negative_caption")
    names = pick(rows, "image", "negative_image")
    yield from paired_choices(source, names, pick(rows, "caption", "negative_caption"))


def vismin(source):
    """Two images that differ in one object, attribute, count or spatial relation, and a caption of
    each. As Winoground, by category: CATEGORY_text, _image and _group; text, image and group are
    the means over categories. 2,084 items; download writes them in this form, by datasets.

        test.jsonl  {"image_0": "0_image_0.jpg", "image_1": "0_image_1.jpg", "text_0": "...",
                     "text_1": "...", "category": "object", ...}
    """
    rows = source.rows("image_0", "image_1", "text_0", "text_1", "category")
    for category, some in group(rows, "category").items():
        rules = {f"{category}_{rule}": found for rule, found in PAIRED.items()}
        names = pick(some, "image_0", "image_1")
        yield from paired_choices(source, names, pick(some, "text_0", "text_1"), rules)


def mmvp(source):
    """Two images that CLIP's image tower finds alike, and a statement about each: each text "a
    photo of STATEMENT" must strictly prefer its own image. 135 pairs, 15 in each of 9 patterns.

        Questions.csv  Question ID,Type,Statement: two rows in turn are a pair
        MLLM_VLM Images/TYPE/ID.jpg, TYPE as in the first row of the pair
    """
    rows = [list(row.values()) for row in source.rows()]
    if any(len(row) != 3 or not all(row) for row in rows) or len(rows) % 2:
        raise ValueError("mmvp: expected pairs of rows of three values: ID, type, statement")
    pairs = []
    for (one, pattern, this), (two, _, that) in zip(rows[::2], rows[1::2]):
        names = f"{pattern}/{one}.jpg", f"{pattern}/{two}.jpg"
        pairs.append((pattern, names, (f"a photo of {this}", f"a photo of {that}")))
    for pattern, some in group(pairs, 0).items():
        _, names, texts = zip(*some)
        yield from paired_choices(source, names, list(texts), {pattern: PAIRED["image"]})


def negbench(source):
    """Four captions of an image, of which one is true: it must score strictly highest. Some say
    what is there (positive), some what is not (negative), some both (hybrid). coco and voc are over
    all items, coco_negative and so on over those whose true caption is of that kind.

        COCO_val_mcq_llama3.1_rephrased.csv  columns image_path, caption_0 to caption_3,
            correct_answer (0 to 3), correct_answer_template (positive, negative, hybrid)
    """
    keys = [f"caption_{i}" for i in range(4)]
    rows = source.rows(*keys, "image_path", "correct_answer", "correct_answer_template")
    images = source.pictures([(os.path.basename(row["image_path"]),) for row in rows])
    texts = []
    for row in rows:
        captions = [row[key] for key in keys]
        number = row["correct_answer"].removesuffix(".0")
        if number not in ("0", "1", "2", "3"):
            raise ValueError(f"negbench: correct_answer {number!r:.40}: expected 0 to 3")
        true = captions.pop(int(number))
        texts.append((true, *captions))
    yield Choices(source.subset, first_text_wins, 1 / 4, images, texts)
    for kind in ("positive", "negative", "hybrid"):
        some = [i for i, row in enumerate(rows) if row["correct_answer_template"] == kind]
        if some:
            yield Choices(f"{source.subset}_{kind}", first_text_wins, 1 / 4,
                          [images[i] for i in some], [texts[i] for i in some])


def hard_positives(source):
    """A caption, the same with a word or an order changed that keeps its meaning (hard positive),
    and one that does not (hard negative): both of the first must strictly beat the third. swap: on
    crops of Visual Genome; replace_att, replace_rel: on whole images. Chance is 1/3.

        data/vl_checklist_attributes.json  [{"image_id": "2401814",
            "image_path": "data/VG_100K_2/2401814.jpg", "true_caption": "walking elephant",
            "false_caption": "jumping elephant"}, ...]
        swapped_data/vl_checklist_attributes.json  the same with the hard positive as true_caption
    """
    if source.subset.endswith("_positive"):     # the second file of another part
        return
    keys = "image_path", "true_caption", "false_caption"
    box = BOX if source.subset == "swap" else {}
    rows = source.rows(*keys, kinds=box)
    positives = source.rows(*keys, part=f"{source.subset}_positive")
    if len(rows) != len(positives):
        raise ValueError(f"hard_positives {source.subset}: {len(rows)} captions and "
                         f"{len(positives)} hard positives")
    names = [(row["image_path"].removeprefix("data/"),) for row in rows]
    texts = [(row["true_caption"], other["true_caption"], other["false_caption"])
             for row, other in zip(rows, positives)]
    images = source.pictures(names, pick(rows, *box))
    yield Choices(source.subset, both_captions_win, 1 / 3, images, texts)


def vl_checklist(source):
    """A caption must score strictly higher than the same with an object, attribute or relation
    changed; where a row has several of either, the first counts. Published are the means of
    attribute, object and relation, over sets; macro_3 is theirs.

        Attribute/vg/color.json  [["VG_100K/2372476.jpg",
                                   {"POS": ["red car"], "NEG": ["blue car"]}], ...]
    """
    rows = source.rows(0, kinds={1: dict})
    texts = []
    for _, captions in rows:
        if not has_keys(captions, {"POS": [str], "NEG": [str]}):
            raise ValueError(f"vl_checklist {source.subset}: a row has no texts under POS and NEG")
        texts.append((captions["POS"][0], captions["NEG"][0]))
    images = source.pictures(pick(rows, 0))
    yield Choices(source.subset, first_text_wins, 1 / 2, images, texts)


def retrieval(source):
    """Images find their captions (i2t) and captions their images (t2i), among all of Karpathy's
    test split of COCO or Flickr30k, or of --data. R@k: the best positive is among the k best.

    Each caption is a query of its own, as published. In --data an image's positives are all
    captions that any row gives it (a row may have several: --caption-key a,b, or a json list), and
    equal captions are one, positive for all their images.
    Captions whose image is missing stay candidates.

        mine.csv  image,caption
                  a.jpg,a red dog and a blue cat
        coco_karpathy_test.json  [{"image": "val2014/COCO_val2014_000000391895.jpg",
                                   "caption": ["...", "...", "...", "...", "..."]}, ...]
    """
    if source.subset == "data":
        yield own_retrieval(source.options)
        return
    names, texts = captions_of_images(source)
    yield pairs_to_ranking(source.pictures(names), texts, f"{source.subset}_")


def flickr8k(source):
    """As retrieval, on the 1,000 test images of Flickr8k with 5 captions each (Karpathy's split).

        dataset_flickr8k.json  {"images": [{"filename": "1000268201_693b08cb0e.jpg",
            "split": "test", "sentences": [{"raw": "..."}, ...], ...}, ...], ...}
    """
    names, texts = [], []
    for row in source.rows("filename", "split", kinds={"sentences": list}):
        if row["split"] != "test":
            continue
        for sentence in row["sentences"]:
            if not has_keys(sentence, {"raw": str}):
                raise ValueError("flickr8k: a sentence of dataset_flickr8k.json has no text (raw)")
            names.append((row["filename"],))
            texts.append(sentence["raw"])
    yield pairs_to_ranking(source.pictures(names), texts)


def long_retrieval(source):
    """R@1 both ways between images and long descriptions; fine_t2i_r1: from each sentence of them,
    split after full stops, to its image. Descriptions are cut at the model's context, and counted.

        docci_descriptions.jsonlines  {"split": "test", "image_file": "test_00000.jpg",
            "description": "...", ...}: the 5,000 of the test split
        iiw_400.jsonl  {"image/key": "aar_test_04600", "IIW": "...", ...}: 400, images of DOCCI-AAR
        dci/densely_captioned_images  complete/X.json {"image": "sa_1.jpg", "short_caption": "...",
            "extra_caption": "...", ...} and photos/sa_1.jpg: 7,805; short and extra caption
        urban1k/Urban1k  image/1.jpg and caption/1.txt: 1,000
    """
    if source.subset == "docci":
        rows = source.rows("split", "image_file", "description")
        pairs = pick(group(rows, "split").get("test", []), "image_file", "description")
    elif source.subset == "iiw":
        rows = source.rows("image/key", "IIW")
        pairs = [(f"{row['image/key']}.jpg", row["IIW"]) for row in rows]
    elif source.subset == "dci":
        rows = source.rows("image", "short_caption", "extra_caption")
        pairs = [(row["image"], f"{row['short_caption']}\n{row['extra_caption']}") for row in rows]
    else:
        pairs = [(f"{row['name']}.jpg", row["text"]) for row in source.rows("name", "text")]
    pictures = source.pictures([(name,) for name, _ in pairs])
    texts = [text for _, text in pairs]
    yield pairs_to_ranking(pictures, texts, f"{source.subset}_", ks=[1])
    images, sentences = [], []
    for picture, text in zip(pictures, texts):
        found = re.split(r"(?<=[.!?])\s+", text.strip())
        images += [picture] * len(found)
        sentences += found
    fine = pairs_to_ranking(images, sentences)
    fine.recalls = {f"{source.subset}_fine_t2i_r1": ("t2i", 1)}
    yield fine


def own_retrieval(options):
    """Pairs of a table or of tar shards; in a shard an image is [tar, offset, size]."""
    data = CaptionFile(options.data, options.image_root, options.image_key, options.caption_key)
    pictures, texts = [], []
    for i in range(len(data)):
        row = data.sample(i)
        if isinstance(row["image"], list):
            picture = Picture(row["key"], tuple(row["image"]), open_member)
        else:
            picture = Picture(os.path.join(options.image_root, row["image"]))
        pictures += [(picture,)] * len(row["captions"])
        texts += row["captions"]
    if data.skipped:
        name, why = data.skipped[0]
        print0(f"{options.data}: {len(data.skipped)} rows or files skipped, the first is {name}: "
               f"{why}")
    for name, what in data.remarks:
        print0(f"{name}: {what}")
    return pairs_to_ranking(pictures, texts, keys=texts)


MOST_PAIRS = 10**10     # of an image and a text, each a byte of memory


def open_member(name, *tar_offset_size):
    return load_image(list(tar_offset_size))


def pairs_to_ranking(pictures, texts, prefix="", keys=None, ks=(1, 5, 10)):
    """N tuples of a picture, and N texts -> Ranking of the different pictures and of all texts, or
    where these have keys, of the texts of different ones; R@k for each of ks."""
    keys = keys or range(len(texts))
    rows = {picture: i for i, picture in enumerate(dict.fromkeys(pictures))}
    columns = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    if len(rows) * len(columns) > MOST_PAIRS:
        raise ValueError(f"retrieval among {len(rows):,} images and {len(columns):,} texts takes "
                         f"too much memory: expected at most {MOST_PAIRS:,} pairs of them, give a "
                         "part of these files")
    text_of = dict(zip(keys, texts))
    positive = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for picture, key in zip(pictures, keys):
        positive[rows[picture], columns[key]] = True
    recalls = {}
    for way in ("i2t", "t2i"):
        for k in ks:
            recalls[f"{prefix}{way}_r{k}"] = (way, k)
    return Ranking(list(rows), tuples(text_of[key] for key in columns), positive, recalls)


def pointing(source):
    """Each photograph of COCO val2017 and each category with a box in it: the patch whose token is
    most similar to "a photo of a NAME" must lie in a box of that category. coco is the mean over
    these pairs, coco_macro over categories. Chance is the share of the patches in the boxes.

        coco/annotations/instances_val2017.json, as COCO gives it out, or --data FILE:
        boxes.json  {"000000000139.jpg": [["chair", x, y, width, height], ...], ...}
    """
    need_patches(source)
    boxes = {}          # {(file name, category): its boxes}
    path = source.options.data
    if not path:
        path = os.path.join(source.options.data_dir, "coco/annotations/instances_val2017.json")
    if not os.path.isfile(path):
        raise Missing(f"{source.bench}: no {path}; get it: {GET} {source.bench}")
    for name, (category, *box) in read_boxes(path):
        boxes.setdefault((name, category), []).append(box)
    images = source.pictures([(name,) for name, _ in boxes])
    categories = [category for _, category in boxes]
    texts = tuples(f"a photo of a {category}" for category in categories)
    yield Pointing("coco", images, texts, list(boxes.values()), categories)


def read_boxes(path):
    """-> [(file name, [category, x, y, width, height]), ...], in pixels."""
    number = (int, float)
    with expecting(f"{path}: expected COCO's instances, or {{file: [[category, x, y, width, "
                   "height], ...]}"):
        content = json.loads(Path(path).read_text("utf-8"))
        if "annotations" in content:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            categories = {category["id"]: category["name"] for category in content["categories"]}
            rows = [(names[a["image_id"]], [categories[a["category_id"]], *a["bbox"]])
                    for a in content["annotations"]]
        else:
            rows = []
            for name, some in content.items():
                rows += [(name, row) for row in some]
        for name, row in rows:
            kinds = {0: str, 1: number, 2: number, 3: number, 4: number}
            if not has_keys(row, kinds) or len(row) != len(kinds):
                raise ValueError(f"a box is {row!r:.60}")
    return rows


def imagenet(source):
    """Zero-shot classification, top 1 and 5, with the 1,000 class names and 80 prompts of OpenAI
    (assets/imagenet.json). A class is the normalised mean of its prompts' normalised features. Of
    imagenet_a and imagenet_r, only the 200 classes that have a folder compete.

        imagenet/val/n01440764/ILSVRC2012_val_00000293.JPEG: a folder for each class, named by
        WordNet's number or, in ImageNet-V2, by that of the class, 0 to 999
    """
    known = json.loads((ASSETS / "imagenet.json").read_text("utf-8"))
    data = image_folder(source, os.path.join(source.options.data_dir, source.spec["folder"]))
    names = known["classes"]
    try:
        if source.bench == "imagenet_v2":
            names = [names[int(number)] for number in data.classes]
        elif len(data.classes) < len(names):
            numbers = ImageNetInfo().label_names()      # in the order of the 1,000 classes
            names = [names[numbers.index(name)] for name in data.classes]
    except (ValueError, IndexError) as error:
        raise ValueError(f"{source.bench}: a folder is no class of ImageNet: {error}") from None
    yield classification(source, data, names, known["templates"], source.spec["n"])


def folder(source):
    """Zero-shot classification of --data DIR, a folder of images for each class, top 1 and 5, with
    the prompt "a photo of a {}.". --classes FILE has a name, one a line, for each sorted folder."""
    if not source.options.data:
        raise Missing(needs_data("folder"))
    data = image_folder(source, source.options.data)
    path = source.options.classes or "no --classes"
    if not os.path.isfile(path):
        raise Missing(f"folder: {path}: give --classes FILE, with a name for each of the "
                      f"{len(data.classes)} folders, one a line")
    with expecting(f"{path}: expected a name on each line, in UTF-8"):
        names = Path(path).read_text("utf-8-sig").strip().splitlines()
    names = [name.strip() for name in names]
    if len(names) != len(data.classes) or "" in names:
        raise ValueError(f"--classes {path}: {len(names)} lines, of which {names.count('')} are "
                         f"empty: expected a name for each of the {len(data.classes)} folders, "
                         f"{', '.join(data.classes[:3])}, ...")
    yield classification(source, data, names, ["a photo of a {}."])


def choices(source):
    """Your own test: each caption must score strictly higher than all of its negatives.

    --data is a .csv, .tsv or .jsonl file with the columns image (a path, --image-root is its
    folder), caption and negative, or negative_1, negative_2 and so on, or a list in json; with a
    column subset there is a result for each of its values, their mean (macro), and that over all
    items (micro). Chance is the mean over items of 1 / (1 + negatives).

        mine.csv  image,caption,negative,subset
                  a.jpg,a red dog and a blue cat,a blue dog and a red cat,colour
    """
    options = source.options
    if not options.data:
        raise Missing(needs_data("choices"))
    groups = {}         # {subset: rows of (picture, caption, negatives)}
    for number, row in enumerate(read_table(options.data), 1):
        subset, item = read_choice(row, f"{options.data}: row {number}", options)
        groups.setdefault(subset, []).append(item)
    if not groups:
        raise ValueError(f"{options.data}: none of its rows can be read")
    for subset, rows in groups.items():
        most = max(len(negatives) for _, _, negatives in rows)
        texts = []
        for _, caption, negatives in rows:      # an item with fewer has its first again: no change
            texts.append((caption, *negatives, *[negatives[0]] * (most - len(negatives))))
        chances = [1 / (1 + len(negatives)) for _, _, negatives in rows]
        images = tuples(picture for picture, _, _ in rows)
        yield Choices(subset, first_text_wins, chances, images, texts)


def read_choice(row, where, options):
    """A row of choices -> its subset, and (picture, caption, negatives). where it is, in words."""
    image_key, caption_key = options.image_key or "image", options.caption_key or "caption"
    image, caption = row.get(image_key), row.get(caption_key)
    negatives = []
    for column, value in row.items():
        if column and re.fullmatch(r"negatives?(_\d+)?", column):       # but not negative_image
            with expecting(f"{where}: expected texts as {column}"):
                negatives += parse_list(value, separator=None)
    if not (image and caption and negatives):
        filled = [str(column) for column, value in row.items() if value]
        raise ValueError(f"{where} needs {image_key}, {caption_key} and negative, and has "
                         f"{', '.join(filled) or 'nothing'}")
    subset = row.get("subset") or "choices"
    for name, value in (("image", image), ("caption", caption), ("subset", subset)):
        if not is_kind(value, str):
            raise ValueError(f"{where} has {value!r:.80} as {name}: expected text")
    if subset in ("macro", "micro"):
        raise ValueError(f"{where}: the subset {subset} would be taken for the mean of that name: "
                         "call it otherwise")
    return subset, (Picture(os.path.join(options.image_root, image)), caption, negatives)


def read_table(path):
    """The rows of a .csv, .tsv or .jsonl file; what is not one is told, not lost."""
    if not os.path.isfile(path):
        raise Missing(f"no file {path}: --data takes a .csv, .tsv or .jsonl file")
    for row in read_rows(path):
        if isinstance(row, dict):
            yield row
        else:
            print0(f"{row.name}: {row.why}")


def image_folder(source, path):
    try:
        return torchvision.datasets.ImageFolder(path, loader=load_image)
    except (RuntimeError, OSError) as error:
        how = source.spec.get("by_hand", "give --data DIR, a folder of images for each class")
        raise Missing(f"{source.bench}: {error}; {how}") from None


def torchvision_set(source, download=False):
    """Zero-shot classification of a test split of torchvision.datasets, top 1 and 5, by its class
    names and one prompt, such as "a photo of a {}." (Radford et al. 2021); flowers and those behind
    it by CLIP_benchmark's names and prompts. Both are in assets/classes.json. top1_macro is the
    mean over classes. Caltech101 has no test split: all images count, of 101 kinds of objects and a
    background.

    classification_11 is the mean of the eleven sets on which pre-training is usually compared, of
    aircraft, pets, caltech101 and flowers over classes.
    """
    spec = source.spec["torchvision"]
    path = os.path.join(source.options.data_dir, source.spec["folder"])
    try:
        make = getattr(torchvision.datasets, spec["class"])
        data = make(path, download=download, **spec["split"])
    except (RuntimeError, OSError) as error:
        error = " ".join(str(error).split())
        raise Missing(f"{source.bench}: {error}; get it: {GET} {source.bench}") from None
    except ImportError as error:        # flowers and cars want scipy
        raise Missing(f"{source.bench}: {error}: pip install {error.name or 'it'}") from None
    if spec["class"] == "Caltech101":       # torchvision leaves the background out
        data = image_folder(source, os.path.join(data.root, "101_ObjectCategories"))
    known = PROMPTS[source.bench]
    yield classification(source, data, known.get("classes") or data.classes, known["templates"])


def classification(source, data, classes, templates, count=None):
    """A data set of torchvision, a name for each class, prompts with {} -> Ranking."""
    if hasattr(data, "samples"):
        names = [path for path, _ in data.samples]
    else:
        path = os.path.join(source.options.data_dir, source.spec["folder"])
        names = [f"{path} {i}" for i in range(len(data))]
    is_whole = count in (None, len(names))
    found = len(getattr(data, "classes", classes))      # not all of torchvision's have names
    if found != len(classes) or not (is_whole or source.options.allow_missing):
        raise ValueError(f"{source.bench}: {found} classes, {len(names)} images instead of "
                         f"{len(classes)}, {count or len(names)}")
    if not is_whole:
        source.partial = (f"partial: {len(names):,} of the official {count:,} images, of "
                          f"{found:,} classes")

    def load(name, i):
        return data[i][0].convert("RGB")        # MNIST is grey

    pictures = [(Picture(name, (i,), load),) for i, name in enumerate(names)]
    labels = torch.as_tensor(class_numbers(data)).long()        # STL10's are bytes
    texts = []
    for name in classes:
        name = name.replace("_", " ")
        texts.append(tuple(template.replace("{}", name) for template in templates))
    positive = F.one_hot(labels, len(classes)).bool()
    recalls = {"top1": ("i2t", 1), "top5": ("i2t", 5)}
    return Ranking(pictures, texts, positive, recalls, labels=labels.tolist())


def class_numbers(data):
    """The label of each image, under the name that this data set of torchvision has for it."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(data, name):
            return getattr(data, name)
    if hasattr(data, "_samples"):       # [(path, label), ...]
        return [label for _, label in data._samples]
    raise ValueError(f"{type(data).__name__} has no labels")


READERS = {reader.__name__: reader for reader in (
    scenes, scenes_large, scenes_crowded, scenes_many, scenes_pointing, scenes_crowded_pointing,
    scenes_many_pointing, sugarcrepe, sugarcrepe_pp, aro, valse, winoground, colorswap, whatsup,
    cola, bivlc, vismin, mmvp, negbench, hard_positives, vl_checklist, retrieval, flickr8k,
    long_retrieval, pointing, imagenet, folder, choices)}
READERS |= dict.fromkeys(("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch"), imagenet)
READERS |= dict.fromkeys(TORCHVISION, torchvision_set)


# ---- download ----------------------------------------------------------------------------------

def download(benches, data_dir):
    """Fetch what may be fetched of some benchmarks, and print how to get the rest."""
    check_names(benches)
    for bench in benches:
        spec = TABLE[bench]
        if bench in TORCHVISION:
            source = Source(bench, bench, Options(data_dir=data_dir))
            list(torchvision_set(source, download=True))
        for file in spec.get("files", {}).values():
            if "url" in file:
                path = os.path.join(data_dir, file["path"])
                fetch(file["url"], path, file.get("sha256"), data_dir)
        for name in spec.get("archives", []):
            fetch_archive(ARCHIVES[name], data_dir)
        if "hub" in spec:
            export_hub(**spec["hub"], folder=os.path.join(data_dir, bench))
        if "by_hand" in spec:
            print(f"{bench}, by hand: {spec['by_hand'].replace('DATA', data_dir)}")
        else:
            print(f"{bench}: there")


def export_hub(repository, split, images, folder):
    """Write a data set of the hub as FOLDER/SPLIT.jsonl and image files, byte for byte, through the
    package datasets. images: its columns of images."""
    path = os.path.join(folder, f"{split}.jsonl")
    if os.path.isfile(path):
        return
    datasets = import_package("datasets", "datasets", f"{repository} is a data set of the hub")
    rows = datasets.load_dataset(repository, split=split)
    for name in images:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    os.makedirs(folder, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        for name in images:
            content = row[name]["bytes"]
            row[name] = f"{number}_{name}.jpg"      # whatever its format: pillow looks inside
            Path(folder, row[name]).write_bytes(content)
        lines.append(json.dumps(row))
    Path(f"{path}.part").write_text("\n".join(lines), "utf-8")
    os.replace(f"{path}.part", path)


def fetch_archive(archive, data_dir):
    """Fetch and unpack an archive, unless the folder that it makes is there."""
    path = os.path.join(data_dir, archive["path"])
    folder = os.path.join(data_dir, archive["makes"])
    if os.path.isdir(folder) and not os.path.isfile(path):
        return
    fetch(archive["url"], path, archive.get("sha256"), data_dir)
    unpack(path, os.path.dirname(folder))
    os.remove(path)         # not before it is unpacked as a whole


def fetch(url, path, sha256, data_dir):
    """Make sure that the file of url lies at path, and is the true one, or raise ValueError. Where
    its sha256 is not known (None), that of the first download is printed, kept in
    DATA_DIR/sha256.json and compared from then on."""
    by_hand = f"try again, or fetch {url} by hand and put it at {path}"
    if not os.path.isfile(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        part = f"{path}.part"
        try:
            fetch_part(url, part)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ValueError(f"cannot download {url} ({error}): {by_hand}") from None
        os.replace(part, path)
        Path(f"{part}.json").unlink(missing_ok=True)
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    expected = sha256 or first_digest(data_dir, path, digest)
    if digest != expected:
        raise ValueError(f"{path} is not the official file, of sha256 {expected[:12]}...: delete "
                         f"it and {by_hand}")


def first_digest(data_dir, path, digest):
    """The sha256 that path had when it was first downloaded; digest, if this is the first time."""
    record = os.path.join(data_dir, "sha256.json")
    name = os.path.relpath(path, data_dir)
    known = {}
    if os.path.isfile(record):
        with expecting(f"{record}: expected {{file: sha256}}", ": delete it"):
            known = dict(json.loads(Path(record).read_text("utf-8")))
    if name not in known:
        print(f"{path}: its true sha256 is not known; from now on it is that of this first "
              f"download, {digest}")
        known[name] = digest
        Path(record).write_text(json.dumps(known, indent=1), "utf-8")
    return known[name]


def fetch_part(url, part):
    """Download url to part. An earlier part is continued if the server says that the file still has
    the same size and ETag (kept in PART.json); otherwise the download begins again."""
    record = f"{part}.json"
    known, start = None, 0
    if os.path.isfile(part) and os.path.isfile(record):
        with contextlib.suppress(ValueError):       # a full disk may have cut the record off
            known = json.loads(Path(record).read_text("utf-8"))
            start = os.path.getsize(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        reply = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:       # it has no bytes from there on: it has changed
            raise
        os.remove(part)
        return fetch_part(url, part)
    with reply:
        about = {"size": whole_size(reply), "etag": reply.headers["ETag"]}
        if reply.headers.get_content_type() == "text/html":
            raise ValueError("a web page came instead of the file, perhaps a limit of its server")
        if start and reply.status == 206 and about != known:
            os.remove(part)
            return fetch_part(url, part)
        if reply.status != 206:     # the whole file, from the beginning
            start = 0
        Path(record).write_text(json.dumps(about), "utf-8")
        copy_reply(reply, part, start, about["size"])


def whole_size(reply):
    """The size in bytes of the whole file that a server sends (a part of), or None."""
    size = reply.headers["Content-Length"]
    if reply.status == 206:
        size = (reply.headers["Content-Range"] or "").split("/")[-1]    # bytes 5-9/10
    return int(size) if size and size.isdigit() else None


def copy_reply(reply, part, start, size):
    small = size is not None and size < 2**24
    bar = tqdm(desc=Path(part).stem, total=size, initial=start, unit="B", unit_scale=True,
               disable=True if small else None)      # None: where there is no terminal
    with open(part, "ab" if start else "wb") as f, bar:
        while block := reply.read(2**20):
            f.write(block)
            bar.update(len(block))
    done = os.path.getsize(part)
    if size is not None and done != size:
        raise ValueError(f"it broke off after {done:,} of {size:,} bytes; a new call continues")


def unpack(archive, folder):
    """Unpack a zip or tar of plain files and folders. Raises ValueError for anything else in it:
    names that lead out of the folder, links, or far more files or bytes than images take."""
    limit = 4 * os.path.getsize(archive) + 2**30
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as z:
                check_members([(m.filename, m.file_size) for m in z.infolist()], folder, limit)
                z.extractall(folder)
            return
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            check_members([(m.name, m.size) for m in members], folder, limit)
            special = [m.name for m in members if not (m.isfile() or m.isdir())]
            if special:
                raise ValueError(f"{special[0]!r} is neither a file nor a folder")
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"{archive} is damaged or not what it should be: {error}. Delete it and "
                         "try again") from None


def check_members(members, folder, limit):
    """members: (name, size) of each."""
    root = os.path.realpath(folder)
    for name, _ in members:
        path = os.path.realpath(os.path.join(root, name))
        if os.path.commonpath([root, path]) != root:
            raise ValueError(f"{name!r} lies outside of its folder")
    size = sum(size for _, size in members)
    if size > limit or len(members) > MAX_MEMBERS:
        raise ValueError(f"it would unpack to {len(members):,} files of {size:,} bytes")


def check_names(benches):
    for bench in benches:
        if bench not in BENCHES:
            alone = " (the word all stands alone)" if bench == "all" else ""
            raise ValueError(f"no bench {bench!r}{alone}: expected some of {', '.join(BENCHES)}")


def describe(bench, data_dir):
    """Print the protocol of a benchmark, where it is from, and which files go where."""
    check_names([bench])
    spec = TABLE[bench]
    print(f"{bench}: {BENCHES[bench]}\n")
    print(inspect.getdoc(READERS[bench]))
    if bench in TORCHVISION:
        name, split = TORCHVISION[bench]["class"], TORCHVISION[bench]["split"]
        first, *others = PROMPTS[bench]["templates"]
        print(f"\nHere torchvision.datasets.{name}, {split}; prompt {first!r} and {len(others)} "
              "more.")
    if "source" in spec:
        print(f"\nsource: {spec['source']}")
    needed = list(spec.get("files", {}).values())
    needed += [ARCHIVES[name] for name in spec.get("archives", [])]
    if needed:
        print(f"\n{GET} {bench} --data-dir {data_dir}   fetches:")
    for file in needed:
        path = os.path.join(data_dir, file.get("makes", file["path"]))
        size = f"{file['size'] / 1e6:,.1f} MB" if "size" in file else ""
        there = "there" if os.path.exists(path) else "not there"
        print(f"  {path:52s} {size:>10s}  {there:9s}  {file.get('url', 'by hand')}")
    if "by_hand" in spec:
        print(f"\nby hand: {spec['by_hand'].replace('DATA', data_dir)}")


# ---- comparison --------------------------------------------------------------------------------

def mcnemar(gained, lost):
    """Two-sided p of the exact McNemar test, which takes the items as independent."""
    changed = gained + lost
    ways, tail = 1, 0           # ways: to choose k of what has changed
    for k in range(min(gained, lost) + 1):
        tail += ways
        ways = ways * (changed - k) // (k + 1)
    return min(1.0, 2 * tail / 2 ** changed)


def read_results(path):
    """A file of --json -> its model's name, {bench: {subset or mean: result, with its data}}."""
    file = json.loads(Path(path).read_text("utf-8"))
    alone = ""
    if file["protocol"] < 6 and file.get("settings", {}).get("allow_missing"):
        # missing images had no number then: item by item it equals no other file
        alone = path
    found = {}
    for bench, subsets in file["results"].items():
        data = file["protocol"], file["data_sha256"].get(bench), alone
        found[bench] = {name: {**result, "data": data} for name, result in subsets.items()}
    return model_name(file), found


def read_all_results(paths):
    """-> the models' names and their results, as read_results gives them."""
    read = []
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"no file {path}: expected files of --json")
        with expecting(f"{path}: expected files of --json"):
            read.append(read_results(path))
    names, results = zip(*read)
    return distinct(names, paths), results


def all_keys(dicts):
    """The different keys of several dicts (or values of lists), in order of first appearance."""
    return list(dict.fromkeys(itertools.chain(*dicts)))


def model_name(file):
    """Of what a file of --json holds: out/nano/last.pt -> nano; a hub id stays as it is."""
    name = file["checkpoint"]
    path = Path(name)
    if path.suffix == ".pt" and path.parent.name:
        name = path.parent.name
    if file.get("interpolate") is not None:
        name = f"{name} at {file['interpolate']:g}"
    return f"{name} (pooled)" if file.get("pooled") else name


def distinct(names, paths):
    """The names of several models; where two of different paths are equal, the paths."""
    count = collections.Counter(name for name, _ in set(zip(names, paths)))
    return [path if count[name] > 1 else name for name, path in zip(names, paths)]


def compare(files, items=False, form=None, columns=None, reference=False):
    """Print the difference of two files of --json on all that both have, or a table of several."""
    names, results = read_all_results(files)
    if form is None and not columns and not reference and len(files) == 2:
        compare_two(*names, *results, items)
        return
    if items:
        raise ValueError("--items are those of two files: give two, and neither --format, "
                         "--columns nor --reference, which make a table")
    for title, chosen in choose_tables(results, columns):
        print(format_table(title, chosen, names, results, form or "text", reference) + "\n")
        unlike = [" ".join(column) for column in chosen if not is_of_same_items(results, column)]
        if unlike:      # a table for a paper goes into a file, without this
            print("not of the same items, data, attack or protocol version in all files: "
                  f"{', '.join(unlike)}\n", file=sys.stderr if form else sys.stdout)


def is_of_same_items(results, column):
    """Whether all models that have this (bench, subset) were scored on the same."""
    bench, subset = column
    items = []
    for file in results:
        if subset in file.get(bench, {}):
            items.append(what_was_scored(file[bench][subset]))
    return all(some == items[0] for some in items)


def what_was_scored(result):
    """Equal for two results that may be compared item by item."""
    return [result.get(key) for key in ("n", "data", "image", "attack")]


def choose_tables(results, columns=None):
    """Of several models' {bench: {subset or mean: results}} -> [(title, [(bench, subset), ...])]:
    what stands in the columns of each table.

    columns: a group of benchmarks.json (headline, attribute, ...) for one table over benchmarks;
    names of subsets joined by commas, or "all", for a table of each benchmark; None: the headlines,
    and of each benchmark the means, if it has any. Raises ValueError if nothing is so named.
    """
    known = {}          # {bench: its subsets}
    for bench in all_keys(results):
        known[bench] = all_keys([file.get(bench, {}) for file in results])
    tables = []
    if columns in GROUPS or columns is None and len(known) > 1:
        title = columns or "headline"
        group = []
        for bench, subsets in GROUPS[title].items():
            group += [(bench, name) for name in subsets if name in known.get(bench, ())]
        tables.append((title, group))
    if columns not in GROUPS:
        for bench, subsets in known.items():
            if bench != ELEVEN:                         # which is a group
                chosen = choose_subsets(subsets, results, bench, columns)
                tables.append((bench, [(bench, name) for name in chosen]))
    tables = [table for table in tables if table[1]]
    if not tables:
        raise ValueError(f"no figure of these files is named {columns}: expected names of subsets "
                         f"or means joined by commas, all, or one of {', '.join(GROUPS)}")
    return tables


def choose_subsets(subsets, results, bench, columns):
    """Those of a benchmark's subsets and means that columns asks for, see choose_tables."""
    if columns == "all":
        return subsets
    if columns:
        return [name for name in columns.split(",") if name in subsets]
    known = collections.ChainMap(*[file.get(bench, {}) for file in results])
    return [name for name in subsets if "parts" in known[name]] or subsets


def compare_two(name_a, name_b, a, b, items):
    """a, b: {bench: {subset or mean: results}}."""
    print(f"A: {name_a}, B: {name_b}")
    print("B - A in percent. gained: items right in B only; lost: in A only. Interval: 95 %, "
          "paired bootstrap over images.\np: exact McNemar test, which takes items as independent."
          "\n")
    print(f"{'percent':32s}     n      A      B   B - A    95 % interval        p  gained  lost")
    for bench in a:
        if bench in b:
            compare_bench(bench, a[bench], b[bench], items)
    compare_eleven(a, b)
    alone = []
    for bench in all_keys([a, b]):
        names = set(a.get(bench, {})) ^ set(b.get(bench, {}))
        alone += [f"{bench} {name}" for name in sorted(names)]
    print(f"in one file only: {', '.join(alone) or 'none'}")


def compare_bench(bench, a, b, items):
    """a, b: {subset or mean: results} of one benchmark."""
    for name, difference in paired_differences(bench, a, b).items():
        line = difference_line(f"{bench} {name}", a[name], b[name], difference)
        if "correct" not in a[name]:
            print(f"{line}     mean")
            continue
        change = np.subtract(b[name]["correct"], a[name]["correct"])
        gained, lost = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
        p = mcnemar(len(gained), len(lost))
        print(f"{line}  {p:7.2g}  {len(gained):6d}{len(lost):6d}")
        if items:
            for word, numbers in ("gained", gained), ("lost", lost):
                for number in numbers:
                    print(f"    {word}: {a[name]['items'][number]}")


def compare_eleven(a, b):
    """The mean of the eleven sets, where both files hold all: it has no items, but they have."""
    mean_a, mean_b = find_result(a, ELEVEN_SETS), find_result(b, ELEVEN_SETS)
    if mean_a and mean_b:
        difference = paired_mean(ELEVEN_SETS, 0, 1, all_differences([a, b]))
        print(f"{difference_line(f'{ELEVEN} mean', mean_a, mean_b, difference)}     mean")


def difference_line(name, a, b, difference):
    """a, b: two models' results; difference: their Difference."""
    low, high = difference.interval()
    return (f"{name:32s}{a['n']:6d} {100 * a['accuracy']:6.1f} {100 * b['accuracy']:6.1f}  "
            f"{difference.draws[0]:+6.1f}  {low:+6.1f} .. {high:+6.1f}")


@dataclass
class Difference:
    """B - A of a subset or mean. Images are (bench, number)."""
    draws: np.ndarray       # (1 + samples,) in percent: of all items first, then of drawn images
    images: set             # all that it is of
    gained: set             # those with an item that only B has right
    lost: set               # those with an item that only A has right

    def interval(self):
        """The ends of the 95 % interval, by percentiles of the bootstrap. Where all changes go one
        way the bootstrap draws none the other way, and knows too little of few images: the exact
        interval (Clopper and Pearson 1934) of the share of changes that go this way is heeded, too.
        Then 0 is outside only if McNemar's p, of as many images, is below 0.05."""
        low, high = np.nanquantile(self.draws[1:], (0.025, 0.975)).tolist()
        changed = len(self.gained | self.lost)
        if not changed:
            edge = 100 * (1 - 0.025 ** (1 / len(self.images)))      # of the share that changes
            return -edge, edge
        if self.gained and self.lost:
            return low, high
        nearest = self.draws[0].item() * (2 * 0.025 ** (1 / changed) - 1)
        return min(low, nearest), max(high, nearest)


def paired_differences(bench, a, b, seed=0):
    """{subset or mean: results} of two models -> {subset or mean: Difference}, of images drawn
    alike for both models and all subsets.

    Raises ValueError where the models were scored on other items.
    """
    shared = {name: result for name, result in a.items() if name in b}
    change = {}         # {subset: 1 where only B is right, -1 where only A is}
    for name in shared:
        if "correct" in a[name] and "correct" in b[name]:
            if what_was_scored(a[name]) != what_was_scored(b[name]):
                raise ValueError(f"{bench} {name}: A ({a[name]['n']} items) and B "
                                 f"({b[name]['n']}) differ in items, data, attack or protocol "
                                 "version: score both again, with the same files of this benchmark")
            change[name] = np.subtract(b[name]["correct"], a[name]["correct"])
    gained = {name: some > 0 for name, some in change.items()}
    lost = {name: some < 0 for name, some in change.items()}
    differences = {}
    for name, shares in resample(shared, change, seed=seed).items():
        images = []
        for chosen in (None, gained, lost):
            images.append({(bench, number) for number in images_of(shared, name, chosen)})
        differences[name] = Difference(100 * shares, *images)
    return differences


def all_differences(results):
    """Several models' {bench: {subset or mean: results}} -> a function that gives the differences
    of two of them, by number, on a benchmark, and draws its images once for all columns."""
    @functools.cache
    def differences(a, b, bench, seed):
        return paired_differences(bench, results[a][bench], results[b][bench], seed)
    return differences


def paired_mean(parts, a, b, differences):
    """The Difference of the mean of parts: [(bench, subset or mean), ...]. Images are drawn anew
    for each benchmark, as mean_of_benches takes them to be independent.

    a, b: numbers of two models of all_differences. Raises ValueError where they were scored on
    other items, or items are not known.
    """
    seeds = {bench: seed for seed, bench in enumerate(dict(parts))}
    found = []
    for bench, subset in parts:
        of_bench = differences(a, b, bench, seeds[bench])
        if subset not in of_bench:
            raise ValueError(f"no items of {bench} {subset} in these files: expected files of "
                             "--json")
        found.append(of_bench[subset])
    return Difference(np.mean([part.draws for part in found], 0),
                      set().union(*[part.images for part in found]),
                      set().union(*[part.gained for part in found]),
                      set().union(*[part.lost for part in found]))


@dataclass
class Cell:
    """A figure in percent, as it is printed; low and high are "" where they are not known."""
    value: str = ""
    low: str = ""
    high: str = ""
    is_best: bool = False


def format_table(title, columns, names, results, form="text", reference=False):
    """Models in rows, figures in columns, percent with 95 % intervals -> str.

    columns: (bench, subset) of each, see choose_tables; a table of a group such as attribute has
    their mean in its last column. names of the models, and for each its {bench: {subset or mean:
    results}}. The best is marked where the paired interval of its lead over the second excludes 0.
    reference: rows of published figures are added.
    """
    groups = [[column] for column in columns]
    if title in GROUPS and title != "headline":
        groups.append(columns)
    head = [title, *column_labels(title, columns), "mean"][:1 + len(groups)]
    rows = [[name] for name in names]
    differences = all_differences(results)
    for parts in groups:
        found = [find_result(file, parts) for file in results]
        best = clear_best(found, parts, differences)
        for number, row in enumerate(rows):
            row.append(make_cell(found[number], number == best))
    if reference:
        published = {bench: TABLE.get(bench, {}).get("published", {}) for bench, _ in columns}
        for method in all_keys(published.values()):
            row = [f"{method} (published)"]
            for parts in groups:
                bench, subset = parts[0]
                figures = published[bench].get(method, {})
                row.append(Cell(str(figures.get(subset, "")) if len(parts) == 1 else ""))
            if any(cell.value for cell in row[1:]):
                rows.append(row)
    return TABLE_FORMS[form](head, rows)


def find_result(file, parts):
    """The result of one (bench, subset), or the mean of several; None if one is not there."""
    subsets = {}        # {bench: those of parts}
    for bench, subset in parts:
        if subset not in file.get(bench, {}):
            return None
        subsets.setdefault(bench, []).append(subset)
    means = [mean_of_subsets(bench, file[bench], names) for bench, names in subsets.items()]
    if len(means) == 1:
        return means[0]
    return mean_of_benches(means, [len(names) for names in subsets.values()])


def mean_of_subsets(bench, results, names):
    """The plain mean of subsets of one benchmark, whose images are drawn once for all of them."""
    if len(names) == 1:
        return results[names[0]]
    results = dict(results)
    add_means(results, {"mean": names})
    correct = {name: result["correct"] for name, result in results.items() if "correct" in result}
    draws = resample(results, correct)
    if "mean" not in draws:
        raise ValueError(f"no items of {bench} {names[0]} and others: expected files of --json")
    add_interval(results["mean"], draws["mean"], len(images_of(results, "mean")))
    return results["mean"]


def mean_of_benches(results, counts):
    """The mean of results on different benchmarks, whose errors are taken as independent; each
    counts as often as it has subsets."""
    accuracies = np.array([result["accuracy"] for result in results])
    below = accuracies - [result["low"] for result in results]
    above = [result["high"] for result in results] - accuracies
    mean = np.average(accuracies, weights=counts).item()
    return {"n": sum(result["n"] for result in results), "accuracy": mean,
            "chance": float(np.average([result["chance"] for result in results], weights=counts)),
            "low": mean - math.hypot(*counts * below) / sum(counts),
            "high": mean + math.hypot(*counts * above) / sum(counts)}


def clear_best(found, parts, differences):
    """The number of the model with the highest accuracy, if its lead over the second is beyond
    chance: the 95 % interval of the paired difference is above 0. Else None, as where they were
    scored on other items. found: what find_result gives for parts, of each model."""
    if parts == [(ELEVEN, "mean")]:     # it has no items of its own
        parts = ELEVEN_SETS
    scored = [number for number, result in enumerate(found) if result]
    if len(scored) < 2:
        return None
    best, second = sorted(scored, key=lambda i: found[i]["accuracy"], reverse=True)[:2]
    try:
        low, _ = paired_mean(parts, second, best, differences).interval()
    except ValueError:
        return None
    return best if low > 0 else None


def make_cell(result, is_best):
    if result is None:
        return Cell()
    value, low, high = (f"{100 * result[name]:.1f}" for name in ("accuracy", "low", "high"))
    return Cell(value, low, high, is_best)


def text_form(head, rows):
    """Aligned columns, as many beside each other as fit into 100 characters."""
    table = [head]
    for name, *cells in rows:
        table.append([name])
        for cell in cells:
            star = "*" if cell.is_best else " "
            interval = f"{star} {cell.low}-{cell.high}" if cell.low else ""
            table[-1].append(cell.value + interval)
    widths = [max(map(len, column)) for column in zip(*table)]
    blocks, used = [[]], widths[0]
    for i in range(1, len(widths)):
        if used + 2 + widths[i] > 100 and blocks[-1]:
            blocks.append([])
            used = widths[0]
        blocks[-1].append(i)
        used += 2 + widths[i]
    lines = []
    for block in blocks:
        for row in table:
            cells = [f"{row[i]:>{widths[i]}s}" for i in block]
            lines.append("  ".join([f"{row[0]:{widths[0]}s}", *cells]).rstrip())
        lines.append("")
    lines.append("percent with 95 % intervals")
    if len(table) > 2:
        lines[-1] += "; *: ahead of the second beyond its paired interval"
    return "\n".join(lines)


def markdown_form(head, rows):
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, *cells in rows:
        lines.append([name])
        for cell in cells:
            value = f"**{cell.value}**" if cell.is_best else cell.value
            lines[-1].append(f"{value} [{cell.low}, {cell.high}]" if cell.low else value)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex_form(head, rows):
    """For the package booktabs."""
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", "\\toprule"]
    lines += [" & ".join(map(escape_latex, head)) + r" \\", "\\midrule"]
    for name, *cells in rows:
        shown = [escape_latex(name)]
        for cell in cells:
            value = f"\\textbf{{{cell.value}}}" if cell.is_best else cell.value
            shown.append(f"{value}$_{{{cell.low}}}^{{{cell.high}}}$" if cell.low else value)
        lines.append(" & ".join(shown) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def escape_latex(name):
    return re.sub(r"([_%#$&{}])", r"\\\1", name)


def csv_form(head, rows):
    """Each figure in three columns: NAME, NAME_low and NAME_high."""
    labels = [Cell(label, f"{label}_low", f"{label}_high") for label in head[1:]]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for name, *cells in [[head[0], *labels], *rows]:
        line = [name]
        for cell in cells:
            line += [cell.value, cell.low, cell.high]
        writer.writerow(line)
    return out.getvalue().rstrip("\n")


TABLE_FORMS = {"text": text_form, "markdown": markdown_form, "latex": latex_form, "csv": csv_form}


# ---- pictures ----------------------------------------------------------------------------------

CURVES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# colours that colour-blind people tell apart (Okabe and Ito 2008)
PLAIN = ("c2lip", "siglip", "clip", "fsc_clip")     # whose term contrastive is the plain loss


def new_figure(width, height):
    """An empty figure of matplotlib, in inches."""
    drawing = import_package("matplotlib.figure", "matplotlib", "pictures are drawn by matplotlib")
    return drawing.Figure((width, height), layout="constrained")


def read_log(path):
    """A log.jsonl of train.py -> {"loss": {step: value}, "scenes.swap_att": {step: percent}, ...},
    and the arguments of the run. Of a step that occurs twice, after a resume, the later counts."""
    curves, arguments, skipped = {}, {}, 0
    for line in Path(path).read_text("utf-8", "replace").splitlines():
        try:
            row = json.loads(line)
            values = dict(row)
            step = row.get("step", 0)
            if type(step) is not int:
                raise ValueError("no step")
            arguments = dict(row.get("args", arguments))
            for bench, subsets in row.get("eval", {}).items():
                for name, result in subsets.items():
                    values[f"{bench}.{name}"] = 100 * result["accuracy"]
        except (ValueError, AttributeError, TypeError, KeyError):
            skipped += 1
            continue
        for key, value in values.items():
            if "step" in row and type(value) in (int, float) and math.isfinite(value):
                curves.setdefault(key, {})[step] = value
    if skipped:
        print(f"{path}: lines skipped that are not of train.py: {skipped}")
    return curves, arguments


def default_keys(logs, runs):
    """The curves to draw of runs with these logs and arguments: each evaluated subset, and the loss
    if it sums the same in all. If not, and no subset is in all, a term that means the same."""
    figures = [key for key in all_keys(logs) if "." in key]
    sums, forms, methods = [], set(), set()
    for log, run in zip(logs, runs):
        if "loss" in log:
            form = "logit_bias" in log          # sigmoid, or softmax
            method = run.get("method")
            settings = {"form": form, "method": method}
            for key, value in run.items():
                if key in ("dedupe", "concept_count") or key.endswith("_weight") and value:
                    settings[key] = value
            sums.append(settings)
            forms.add(form)
            methods.add(method)
    if not sums:
        return figures
    if sums.count(sums[0]) == len(sums):
        return ["loss", *figures]
    differ = "plot: the losses of these runs sum different terms, or weigh them differently"
    if set(figures).intersection(*logs):
        print(f"{differ}, and are left out: --keys loss draws them")
        return figures
    if len(forms) == 1 and methods.issubset(PLAIN):
        print(f"{differ}: their term contrastive is drawn, which is the same in all")
        return ["contrastive", *figures]
    print(f"{differ}: compare their course, not their height")
    return ["loss", *figures]


def plot(files, keys=None, radar=False, output="curves.png"):
    """Draw the curves of runs into a file: default_keys, or those of keys. Of files of --json
    instead, draw their results as bars, or radar charts."""
    if len(files) > len(CURVES):
        raise ValueError(f"plot takes up to {len(CURVES)} files")
    if all(path.endswith(".json") for path in files):
        names, results = read_all_results(files)
        tables = choose_tables(results, keys or "all")
        draw = draw_radars if radar else draw_bars
        save_figure(draw(names, results, tables), output)
        return
    logs, runs = zip(*[read_log(path) for path in files])
    known = all_keys(logs)
    chosen = keys.split(",") if keys else default_keys(logs, runs)
    if not all(logs) or not chosen or not set(chosen) <= set(known):
        raise ValueError("plot takes log.jsonl of train.py, none empty, and --keys from: "
                         + ", ".join(known))
    names = distinct([Path(path).resolve().parent.name for path in files], files)
    save_figure(draw_curves(names, logs, chosen), output)


def draw_curves(names, logs, keys):
    """A panel for each key, a line in it for each run that has it -> Figure."""
    from matplotlib.ticker import MaxNLocator
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = new_figure(3.6 * columns, 2.8 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    handles = {}
    for key, panel in zip(keys, panels):
        for name, log, colour in zip(names, logs, CURVES):
            if key in log:
                steps = sorted(log[key])
                values = [log[key][step] for step in steps]
                marker = "o" if len(steps) < 30 else None
                line, = panel.plot(steps, values, color=colour, marker=marker, markersize=3)
                handles.setdefault(colour, (line, name))
        bench, dot, subset = key.partition(".")
        panel.set_title(f"{subset} ({bench})" if dot else key)
        panel.set_xlabel("step")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.set_ylabel("correct, %" if dot else "")
        panel.grid(alpha=0.3)
    for panel in panels[len(keys):]:
        panel.set_axis_off()
    add_legend(figure, *zip(*handles.values()))
    return figure


def draw_bars(names, results, tables):
    """A panel for each table of choose_tables, in it a group of bars for each column, a bar for
    each model, with 95 % intervals and chance as a line -> Figure."""
    figure = new_figure(10, 3.2 * len(tables) + 0.4)
    panels = figure.subplots(len(tables), 1, squeeze=False).flatten()
    for (title, columns), panel in zip(tables, panels):
        width = 0.8 / len(names)
        for number, (file, colour) in enumerate(zip(results, CURVES)):
            for group_at, column in enumerate(columns):
                found = find_result(file, [column])
                if found:
                    x = group_at + (number - (len(names) - 1) / 2) * width
                    draw_bar(panel, x, width, found, colour)
        labels = column_labels(title, columns)
        panel.set_xticks(range(len(columns)), labels, rotation=30, ha="right")
        panel.set_title(title)
        panel.set_ylabel("correct, %")
        panel.set_ylim(0, 100)
        panel.grid(axis="y", alpha=0.3)
    handles = [panels[0].bar(0, 0, color=colour) for _, colour in zip(names, CURVES)]
    add_legend(figure, handles, names)
    return figure


def add_legend(figure, handles, names):
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)))


def column_labels(title, columns):
    """The name of the benchmark is left out where it is the title."""
    return [subset if bench == title else f"{bench} {subset}" for bench, subset in columns]


def draw_radars(names, results, tables):
    """A panel for each table of choose_tables: an axis from 0 to 100 % for each column that all
    models have, and an outline for each model -> Figure."""
    drawn = []          # a table of fewer than three has no area
    for title, columns in tables:
        shared = [x for x in columns if all(find_result(file, [x]) for file in results)]
        if len(shared) > 2:
            drawn.append((title, shared))
    if not drawn:
        raise ValueError("plot --radar: no three figures that all models have: see --keys")
    figure = new_figure(8 * len(drawn), 5)
    panels = figure.subplots(1, len(drawn), squeeze=False, subplot_kw={"projection": "polar"})[0]
    for (title, columns), panel in zip(drawn, panels):
        angles = np.linspace(0, 2 * np.pi, len(columns), endpoint=False)
        handles = []
        for file, colour in zip(results, CURVES):
            values = [100 * find_result(file, [column])["accuracy"] for column in columns]
            x, y = [*angles, angles[0]], [*values, values[0]]       # closed
            handles += panel.plot(x, y, color=colour, linewidth=2)
            panel.fill(x, y, color=colour, alpha=0.1)
        panel.set_theta_zero_location("N")
        panel.set_theta_direction(-1)
        panel.set_rlabel_position(180 / len(columns))       # between the first two axes
        panel.set_xticks(angles, column_labels(title, columns))
        for label, sine in zip(panel.get_xticklabels(), np.sin(angles)):
            label.set_horizontalalignment(("right", "center", "left")[1 + round(sine)])
        panel.set_ylim(0, 100)
        panel.set_title(f"{title}, correct in %")
    add_legend(figure, handles, names)
    return figure


def draw_bar(panel, x, width, result, colour):
    """One bar around x with its interval, and chance as a line across it."""
    height = 100 * result["accuracy"]
    error = [[height - 100 * result["low"]], [100 * result["high"] - height]]
    panel.bar(x, height, width, color=colour, yerr=error, error_kw={"elinewidth": 1})
    chance = 100 * result["chance"]
    panel.plot([x - width / 2, x + width / 2], [chance, chance], color="black", linewidth=1)


def save_figure(figure, output):
    try:
        figure.savefig(output, dpi=300)
    except ValueError as error:     # of an ending that matplotlib does not know
        raise ValueError(f"--output {output}: {error}") from None
    print(f"wrote {output}")


def similarity_maps(model, image, phrases):
    """Cosines of an image's patch tokens and of phrases -> (phrases, side, side)."""
    options = Options()
    tokens = patch_tokens(model, model.transform(image)[None], options)         # (1, T, D)
    texts = forward(model, model.encode_text, model.tokenize(phrases), options)     # (N, D)
    maps = texts @ tokens[0].T                                                  # (N, T)
    side = math.isqrt(maps.shape[1])
    return maps.unflatten(1, (side, side))


def seen_box(model, size):
    """What a model sees of an image of this size, as imshow's extent: left, right, bottom, top."""
    width, height = size
    if not hasattr(model, "config"):
        raise ValueError("pointing: the model has no config.resize: expected 'shortest' where it "
                         "sees the square in the middle of an image, else 'squash'")
    if model.config.resize == "shortest":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, left + side, top + side, top
    return 0, width, height, 0


def show(checkpoint, image=None, scene=0, caption=None, concepts=None, boxes=None,
         output="attention.png"):
    """Draw the similarity maps of the phrases of a caption, a row for each checkpoint."""
    paths = checkpoint.split(",")
    names = distinct([Path(path).resolve().parent.name for path in paths], paths)
    models = [CLIP.load(path).eval() for path in paths]
    known = []          # [category, x, y, width, height] of each thing in the image
    if image:
        try:
            picture = load_image(image)
        except FileNotFoundError:       # which names it
            raise
        except (OSError, ValueError) as error:
            raise ValueError(f"--image {image}: {error}") from None
        if boxes:
            known = [box for name, box in read_boxes(boxes) if name == os.path.basename(image)]
        if boxes and not known:
            raise ValueError(f"{boxes} has no boxes of {os.path.basename(image)}")
    else:
        data = Scenes(scene + 1, "val", 1, models[0].config.image_size)
        row = data[scene]
        known = scene_boxes(data, scene)
        picture = row["image"]
        caption = caption or row["caption"]
    phrases = concepts or extract(caption or "")
    if not phrases:
        raise ValueError("show has no phrases: give --concepts, or a --caption with noun phrases")
    maps = [similarity_maps(model, picture, phrases) for model in models]
    seen = [seen_box(model, picture.size) for model in models]
    save_figure(draw_maps(picture, phrases, names, maps, seen, known), output)


def boxes_of(phrase, boxes):
    """[category, x, y, width, height] ... -> boxes of the longest category that a phrase names."""
    words = f" {phrase.lower()} "
    named = [box for box in boxes
             if f" {box[0]} " in words or f" {plural_of(box[0])} " in words]
    longest = max([len(box[0]) for box in named], default=0)
    return [box[1:] for box in named if len(box[0]) == longest]


def draw_maps(picture, phrases, names, maps, seen, boxes):
    """A row for each model: the photograph, and over it the map (side, side) of each phrase.

    All maps have one scale, so that a nearly uniform map looks uniform. A cross marks the patch of
    the largest similarity. seen: where each model's map lies on the photograph, see seen_box.
    boxes: [category, x, y, width, height] ..., of which those of a phrase's category are drawn.
    """
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle
    scale = Normalize(min(x.min().item() for x in maps), max(x.max().item() for x in maps))
    width, height = picture.size
    panel_height = 2.6 * min(1.5, height / width)
    figure = new_figure(2.6 * (1 + len(phrases)) + 0.8, (panel_height + 0.4) * len(names))
    panels = figure.subplots(len(names), 1 + len(phrases), squeeze=False)
    for row, name, model_maps, extent in zip(panels, names, maps, seen):
        for panel in row:
            photograph = picture if panel is row[0] else picture.convert("L")
            panel.imshow(photograph, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
            panel.set_axis_off()
        row[0].set_title(name)
        for panel, phrase, values in zip(row[1:], phrases, model_maps):
            shown = panel.imshow(values.numpy(), cmap="viridis", norm=scale, alpha=0.65,
                                 interpolation="bicubic", extent=extent)
            x, y = peak_place(values, extent)
            for colour, size, line in ("black", 15, 4), ("white", 13, 2):       # white, rimmed
                panel.plot(x, y, "+", color=colour, markersize=size, markeredgewidth=line)
                for left, top, *sides in boxes_of(phrase, boxes):
                    panel.add_patch(Rectangle((left, top), *sides, fill=False, edgecolor=colour,
                                              linewidth=line / 2))
            panel.set_xlim(0, width)        # all of the photograph, where the model saw less
            panel.set_ylim(height, 0)
            panel.set_title(phrase)
    figure.colorbar(shown, ax=panels, label="cosine of patch\nand phrase", shrink=0.8)
    return figure


def peak_place(values, extent):
    """The middle of the patch with the largest value, in pixels of the photograph: x, y."""
    side = len(values)
    left, right, bottom, top = extent
    row, column = divmod(int(values.argmax()), side)
    x = left + (column + 0.5) * (right - left) / side
    y = top + (row + 0.5) * (bottom - top) / side
    return x, y


# ---- models ------------------------------------------------------------------------------------

@torch.no_grad()
def interpolate_weights(model, initial, weight):
    """WiSE-FT (Wortsman et al. 2022): model's weights become (1 - weight) * initial's + weight *
    its own. Raises ValueError for models of different structure."""
    ours, theirs = asdict(model.config), asdict(initial.config)
    differ = []
    for key, value in theirs.items():
        # a bare file of weights has no tokenizer: ""
        if value not in ("", ours[key]) and key not in ("name", "logit_scale", "logit_bias"):
            differ.append(key)
    if differ or not 0 <= weight <= 1:
        raise ValueError(f"--interpolate {weight:g}: expected 0 (--init) to 1 (--checkpoint), and "
                         f"as --init the weights that --checkpoint was tuned from; what differs: "
                         f"{', '.join(differ) or 'nothing'}")
    start = initial.state_dict()
    for key, value in model.state_dict().items():
        if key in start:        # a logit_bias that only the tuned model has stays
            value.lerp_(start[key], 1 - weight)
    return model


class OpenCLIP(torch.nn.Module):
    """A model of open_clip of any architecture, with its own transform and tokenizer, as run takes
    it. name: NAME/PRETRAINED, such as ViT-B-32/laion2b_s34b_b79k; PRETRAINED may be a file."""

    def __init__(self, name):
        super().__init__()
        open_clip = import_package("open_clip", "open_clip_torch", f"open_clip:{name}")
        architecture, _, pretrained = name.partition("/")
        known = open_clip.list_models()
        if architecture not in known or not pretrained:
            tags = open_clip.list_pretrained_tags_by_model(architecture)
            raise ValueError(f"open_clip:{name}: expected open_clip:NAME/PRETRAINED with NAME one "
                             f"of {', '.join(known[:9])}, ..., and PRETRAINED a file or, for this "
                             f"NAME, one of {', '.join(tags) or 'none'}")
        try:
            self.model, _, self.transform = open_clip.create_model_and_transforms(
                architecture, pretrained=pretrained, weights_only=True)
            self.tokenize = open_clip.get_tokenizer(architecture)
            self.encode_image = self.model.encode_image
            self.encode_text = self.model.encode_text
        except Exception as error:      # of many kinds: an unknown tag, no network, a wrong file
            first_line = str(error).strip().split("\n")[0]
            raise ValueError(f"open_clip:{name} cannot be read: {first_line[:300]}") from None

    @property
    def logit_scale(self):      # --attack asks for it
        return self.model.logit_scale


def load_source(source, name=None):
    """A model from --init: open_clip's by the prefix open_clip:, else ours."""
    if source and source.startswith("open_clip:"):
        return OpenCLIP(source.removeprefix("open_clip:"))
    return CLIP.from_pretrained(source, name)


def load_interpolated(path, source, name, weight):
    """The checkpoint at path, moved towards --init, see interpolate_weights."""
    return interpolate_weights(CLIP.load(path), CLIP.from_pretrained(source, name), weight)


def models_of(checkpoint, init, name, weight):
    """What --checkpoint, --init, --model and --interpolate mean: [(what it is called, function that
    loads it), ...]."""
    checkpoints = checkpoint.split(",") if checkpoint else []
    sources = init.split(",") if init else []
    if name and not init:
        sources = [None]            # the default weights of that name
    if weight is not None:
        if len(checkpoints) != 1 or len(sources) != 1:
            raise ValueError("--interpolate takes one --checkpoint and one --init (or --model)")
        path, source = checkpoints[0], sources[0]
        return [(path, functools.partial(load_interpolated, path, source, name, weight))]
    if not checkpoints and not sources:
        raise ValueError("give what to evaluate: --checkpoint FILE, or --init SOURCE (or --model "
                         "NAME for its default weights); several are joined by commas")
    models = [(path, functools.partial(CLIP.load, path)) for path in checkpoints]
    models += [(source or name, functools.partial(load_source, source, name))
               for source in sources]
    return models


def fingerprint(model):
    """sha256 of the weights and of everything in the config."""
    digest = hashlib.sha256(repr(getattr(model, "config", None)).encode())
    for name, x in sorted(model.state_dict().items()):
        values = x.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


# ---- commands ----------------------------------------------------------------------------------

def evaluate(bench, json_path, reference, checkpoint=None, init=None, model=None, tokenizer=None,
             interpolate=None, **settings):
    """Score one or several models on benchmarks, print tables, and write --json."""
    benches = (bench or default_bench(settings["data"])).split(",")
    check_command(benches, json_path, checkpoint, settings["data"])
    models = models_of(checkpoint, init, model, interpolate)
    if tokenizer and init and "open_clip:" in init:
        raise ValueError(f"--tokenizer {tokenizer}: a model of open_clip: has its own: expected "
                         "weights that came without one, leave --tokenizer out")
    given = {"init": init, "model": model, "tokenizer": tokenizer, "interpolate": interpolate}
    given |= {"bench": bench, "torch": torch.__version__, "processes": WORLD, **settings}
    options = prepare(settings)
    started = time.time()
    files = []          # what --json holds of each model
    for number, (label, load) in enumerate(models, 1):
        if number > 1:
            print0(f"\n{label}:")
        network = load()
        if tokenizer:
            set_tokenizer(network, tokenizer)
        network.to(options.device).eval()
        size, patches = image_size(network), gives_patch_tokens(network)
        tasks, missing = read(benches, options, size, patches)
        results = score(network, tasks, options)
        for name, subsets in results.items():
            print_table(name, subsets, reference)
        files.append({
            "checkpoint": label, "sha256": fingerprint(network), "protocol": PROTOCOL,
            "pooled": options.pooled, "interpolate": interpolate,
            "data_sha256": data_digests(tasks), "missing": missing, "results": results})
        if json_path and RANK == 0:     # before the next model, which may fail
            write_json(numbered(json_path, number, len(models)), {**files[-1], "settings": given})
    print0(f"\n{time.time() - started:.1f} s")
    for line in all_keys([file["missing"] for file in files]):
        print0(f"not there: {line}")
    if len(files) > 1:
        labels = [model_name(file) for file in files]
        labels = distinct(labels, [file["checkpoint"] for file in files])
        tables = [file["results"] for file in files]
        for title, columns in choose_tables(tables):
            print0("\n" + format_table(title, columns, labels, tables))


def check_command(benches, json_path, checkpoint, data):
    """ValueError for what would be found out only after hours, or not at all."""
    if benches != ["all"]:
        check_names(benches)
    if json_path:
        folder = os.path.dirname(json_path) or "."
        if os.path.isdir(json_path) or not os.path.isdir(folder):
            raise ValueError(f"--json {json_path}: expected a file, in a folder that is there")
    for path in checkpoint.split(",") if checkpoint else []:
        if not os.path.exists(path):
            raise ValueError(f"--checkpoint {checkpoint}: no checkpoint at {path or repr(path)}")
    if not data or benches == ["all"]:
        return
    readers = {"folder"} if os.path.isdir(data) else {"retrieval", "choices", "pointing"}
    if not readers.intersection(benches):
        kind = "a folder" if os.path.isdir(data) else "no folder"
        raise ValueError(f"--data {data}: none of {', '.join(benches)} reads it. As it is {kind}, "
                         f"expected one of {', '.join(sorted(readers))}")


def prepare(settings):
    """Options of flags, with device and workers filled in; torchrun's processes meet."""
    options = Options(**settings)
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: torch finds no GPU with a driver: give --device cpu")
    if options.device is None:
        options.device = "cuda" if has_gpu else "cpu"
    if options.workers is None:
        options.workers = min(8, os.cpu_count() or 1) if options.device == "cuda" else 0
    if WORLD > 1:
        if options.device == "cuda":
            own = int(os.environ.get("LOCAL_RANK", RANK))       # which other launchers may not set
            count = torch.cuda.device_count()
            if own >= count:
                raise ValueError(f"torchrun's process {own} of this machine has no GPU, torch "
                                 f"finds {count}: expected one for each, give --nproc-per-node "
                                 f"{count}")
            torch.cuda.set_device(own)
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    return options


def numbered(path, number, count):
    """The path itself, or of one of several models that with its number before the ending."""
    stem, ending = os.path.splitext(path)
    return path if count == 1 else f"{stem}.{number}{ending}"


def write_json(path, content):
    Path(path).write_text(json.dumps(content))
    print(f"wrote {path}")


def verify(registry, bench, tolerance, **settings):
    """Print our figures of public checkpoints beside the published ones."""
    options = prepare(settings)
    only = bench.split(",") if bench else list(BENCHES)
    check_names(only)
    are_close = []          # of each published figure, whether ours is
    for name, entry in read_registry(registry).items():
        figures = {key: value for key, value in entry["figures"].items() if key in only}
        if not figures:     # another model's
            continue
        try:
            results = score_verified(name, entry, figures, options)
        except (ValueError, OSError) as error:
            print0(f"\n{name}: not verified, {plain_words(error)}")
            continue
        print0(f"\n{name:32s}    ours  published  difference")
        are_close += print_figures(figures, results, tolerance)
    print0(f"\n{sum(are_close)} of {len(are_close)} figures are within {tolerance:g} points")


def score_verified(name, entry, benches, options):
    """The results of a model of the registry on those benchmarks whose files are there. Raises
    ValueError or OSError where there are none, or the model cannot be had."""
    tasks, _ = read(benches, options, skip=True)
    if not tasks:       # said before the weights are downloaded
        raise Missing(f"none of the files of {', '.join(benches)} are there")
    model = load_verified(name, entry, options.data_dir).to(options.device).eval()
    size, patches = image_size(model), gives_patch_tokens(model)
    tasks, missing = read(benches, options, size, patches, skip=True)
    if not tasks:
        raise Missing(missing[0])
    return score(model, tasks, options)


def print_figures(figures, results, tolerance):
    """A line for each published figure, {bench: {subset: percent}}, with ours -> of each that we
    have, whether the two are close."""
    are_close = []
    for bench, subsets in figures.items():
        for subset, published in subsets.items():
            found = find_result(results, [(bench, subset)])
            label = f"{bench + ' ' + subset:32s}"
            if not found:
                print0(f"{label}  not scored: its files are not there, or it is no subset")
                continue
            ours = 100 * found["accuracy"]
            difference = ours - published
            is_close = abs(difference) <= tolerance + 1e-9
            are_close.append(is_close)
            verdict = "" if is_close else f"  more than {tolerance:g}"
            print0(f"{label}  {ours:6.1f}  {published:9.1f}  {difference:+10.1f}{verdict}")
    return are_close


def read_registry(path):
    """{name: {init or checkpoint, model, figures {bench: {subset: percent}}}}: of a json file, or
    the checkpoints of benchmarks.json with what is published of them."""
    if path is None:
        registry = {}
        for name, entry in DATA["checkpoints"].items():
            figures = {}
            for bench, spec in TABLE.items():
                known = dict(spec.get("published", {}).get(name, {}))
                known.pop("source", None)
                if known:
                    figures[bench] = known
            registry[name] = {**entry, "figures": figures}
        return registry
    with expecting(f"{path}: expected {{NAME: {{init or checkpoint, figures: {{bench: {{subset: "
                   "percent}}}}"):
        registry = json.loads(Path(path).read_text("utf-8"))
        for entry in registry.values():
            check_names(entry["figures"])
            for key in ("init", "checkpoint", "model", "path", "url", "sha256"):
                if not is_kind(entry.get(key) or "", str):
                    raise ValueError(f"{key} is no text")
            for known in entry["figures"].values():
                if not all(is_kind(figure, (int, float)) for figure in known.values()):
                    raise ValueError("a figure is no number")
    return registry


def load_verified(name, entry, data_dir):
    """The model of an entry of the registry; a file with a url is downloaded first."""
    if "checkpoint" in entry:
        return CLIP.load(entry["checkpoint"])
    if "path" not in entry:
        return load_source(entry.get("init"), entry.get("model"))
    path = os.path.join(data_dir, entry["path"])
    if "url" in entry and WORLD > 1 and not os.path.isfile(path):
        # processes would write one file between each other
        raise Missing(f"no {path}: verify fetches it without torchrun; after that give torchrun")
    if "url" in entry:
        fetch(entry["url"], path, entry.get("sha256"), data_dir)
    if not os.path.isfile(path):
        raise Missing(f"no {path}: {entry.get('by_hand', 'put the weights there')}")
    return CLIP.from_pretrained(path, entry.get("model"))


def default_bench(data):
    """What --data without --bench means: a table or shards of pairs, or a folder of classes."""
    if not data:
        return "scenes"
    return "folder" if os.path.isdir(data) else "retrieval"


def data_digests(tasks):
    """{bench: sha256 of the names of its image files, and of all its texts, boxes and labels}."""
    digests = {}
    for bench, some in tasks.items():
        content = []
        for task in some:
            pictures = itertools.chain(*task.images)
            names = [Path(picture.name).name for picture in pictures]
            content.append((names, task.texts))
            for name in ("boxes", "labels"):
                if getattr(task, name, None) is not None:
                    content.append(getattr(task, name))
        digests[bench] = hashlib.sha256(repr(content).encode()).hexdigest()
    return digests


FUNCTIONS = {"evaluate": evaluate, "download": download, "compare": compare, "describe": describe,
             "verify": verify, "plot": plot, "show": show}


def call(argv):
    """Do what the command line says; a mistake of the user raises ValueError or OSError."""
    arguments = vars(parse(argv))
    command = arguments.pop("command")
    FUNCTIONS[command](**arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


USERS_ERRORS = (ValueError, OSError, torch.cuda.OutOfMemoryError)


def main(argv):
    try:
        call(argv)
    except USERS_ERRORS as error:       # anything else is a mistake of ours: keep its trace
        if RANK:
            time.sleep(3)       # process 0 says it and ends all, unless this one errs alone
            sys.exit(f"evaluate.py: process {RANK}: {plain_words(error)}")
        sys.exit(f"evaluate.py: {plain_words(error)}")


def plain_words(error):
    """One line for a user, of USERS_ERRORS: of an OSError without its number."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"no file {error.filename}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "the GPU has too little memory: give a smaller --batch-size (default: 250)"
    lines = str(error).strip().splitlines()     # a process that reads images puts its trace first
    return lines[-1] if lines else type(error).__name__


if __name__ == "__main__":
    main(sys.argv[1:])
