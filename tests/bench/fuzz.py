"""Damaged inputs of every kind, and what becomes of each: 1,500 by default, the same for the same --seed.

    OMP_NUM_THREADS=1 python tests/bench/fuzz.py [--number 1500] [--seed 0] [--kinds tar image ...] [--jobs 2]

Good files are made, and each input is one of them with one to three accidents: cut, bits flipped, parts overwritten,
repeated or left out, odd characters put in, and for json also values of other types. Each is tried in a process of its
own, which ends in one of these classes:

    works       the input was read, with whatever is lost in it counted
    one line    ValueError or OSError with a message of one line: what a command prints before it ends
    altered     a checkpoint was read whose weights are not those that were saved, and no word was said
    lost        a table or tar gave fewer rows than it has, and no loss was counted (of a tar: that is cut, nobody knows
                how many, so any number counts)
    trace       any other exception, or a message of several lines
    died        the process was ended by a signal
    hang        it took more than --timeout seconds of CPU time

The exit status is 1 if there was any of the last four. --keep FOLDER keeps their inputs.
"""
import argparse
import copy
import io
import json
import os
import random
import re
import resource
import shutil
import sys
import tarfile
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from PIL import Image

import evaluate
from data import CaptionFile, Seeded, load_fast, load_image, train_tokenizer
from model import CLIP, MODELS, export, read_tokenizer, set_tokenizer
from test_pins import make_aro_and_retrieval, make_pairings, make_sugarcrepe, made_model

torch.set_num_threads(1)
BAD = ("lost", "trace", "died", "hang")


# ---- accidents -------------------------------------------------------------

ODD_BYTES = (b'"', b'""', b"\n", b"\r", b",", b"\t", b"{", b"[", b"}", b"\\ud800", b"\xff", b"\0", b"\xc3", b"-1",
             b"1e999", b"null", b"NaN", b"|", b"#")
ODD_VALUES = (None, True, -1, 0, 1e999, 10**30, "", "x" * 10_000, "\ud800", [], {}, [[]], [None], {"a": 1}, "../../x",
              "[" * 2000)


def damage_bytes(content, rng):
    """Bytes with one to three accidents."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        first = rng.randrange(len(content) + 1)
        last = min(len(content), first + rng.choice((1, 7, 100, 512, 2000)))
        kind = rng.choice(("cut", "flip", "zero", "noise", "repeat", "leave out", "odd"))
        if kind == "cut":
            del content[first:]
        elif kind == "flip" and first < len(content):
            content[first] ^= 1 << rng.randrange(8)
        elif kind == "zero":
            content[first:last] = bytes(last - first)
        elif kind == "noise":
            content[first:last] = rng.randbytes(last - first)
        elif kind == "repeat":
            content[first:first] = content[first:last]
        elif kind == "leave out":
            del content[first:last]
        else:
            content[first:first] = rng.choice(ODD_BYTES)
    return bytes(content)


def damage_json(value, rng):
    """A json value in which something is left out, or is of another type or range."""
    value = copy.deepcopy(value)
    place = value
    while isinstance(place, (dict, list)) and place:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
            if rng.random() < 0.3:
                del place[key]
            else:
                place[key] = rng.choice(ODD_VALUES)
            return value
        place = place[key]
    return rng.choice(ODD_VALUES)


def damage_file(path, rng):
    """Replace a file by a damaged one: json files in either way."""
    if path.suffix == ".json" and rng.random() < 0.6:
        value = json.loads(path.read_bytes())
        for _ in range(rng.randint(1, 3)):
            value = damage_json(value, rng)
        path.write_text(json.dumps(value))
    else:
        path.write_bytes(damage_bytes(path.read_bytes(), rng))


# ---- kinds of inputs: each makes a good one, and tries one -----------------

class Tables:
    """Tables of every format; rows of a .tsv and .jsonl are counted by other means."""

    def make(self, folder):
        rows = [{"image": "a.png", "caption": f"a cat, {i}", "concepts": '["a cat"]', "negatives": "x|y",
                 "neighbours": "1|2"} for i in range(12)]
        Image.new("RGB", (20, 20)).save(folder / "a.png")
        names = ",".join(rows[0])
        (folder / "0.csv").write_text(names + "\n" + "".join(
            ",".join('"' + cell.replace('"', '""') + '"' for cell in row.values()) + "\n" for row in rows))
        (folder / "0.tsv").write_text("\n".join(["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]))
        (folder / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "0.json").write_text(json.dumps({
            "images": [{"id": i, "file_name": "a.png"} for i in range(12)],
            "annotations": [{"image_id": i % 12, "caption": f"a cat {i}"} for i in range(30)]}))
        (folder / "1.json").write_text(json.dumps({"images": [
            {"filename": "a.png", "split": "train", "sentences": [{"raw": "a"}, {"raw": "b"}]} for _ in range(9)]}))

    def choose(self, folder, rng):
        return rng.choice(sorted([*folder.glob("0.*"), folder / "1.json"]))

    def attempt(self, path):
        data = CaptionFile(str(path), str(path.parent))
        read_all(data)
        if path.suffix in (".tsv", ".jsonl"):
            lines = re.split("\r\n|\r|\n", path.read_bytes().decode("utf-8-sig", "replace"))
            if path.suffix == ".jsonl":
                there = sum(line.strip() != "" for line in lines)
            else:
                there = sum(line != "" for line in lines) - 1
            if len(data) + data.lost_rows < there:
                return "lost"
        return "works"


class Tars:
    """Shards of 12 samples."""

    def make(self, folder):
        for number, format in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
            with tarfile.open(folder / f"{number}.tar", "w", format=format) as tar:
                for i in range(12):
                    buffer = io.BytesIO()
                    Image.new("RGB", (24, 20), (i, 20 * i, 9)).save(buffer, ("JPEG", "PNG", "WEBP")[i % 3])
                    about = json.dumps({"caption": [f"a dog {i}", "another"], "url": f"http://x/{i}"}).encode()
                    for ending, content in ((("jpg", "png", "webp")[i % 3], buffer.getvalue()), ("json", about),
                                            ("txt", f"a dog {i}".encode())):
                        info = tarfile.TarInfo(("folder/" * 30 if i == 5 and number else "") + f"{i:06d}.{ending}")
                        info.size = len(content)
                        info.mtime = 1.5 if number == 2 else 1
                        tar.addfile(info, io.BytesIO(content))

    def choose(self, folder, rng):
        return rng.choice(sorted(folder.glob("*.tar")))

    def attempt(self, path):
        data = CaptionFile(str(path))
        read_all(data)
        return "lost" if len(data) < 12 and not data.lost_rows else "works"


class Images:
    """One picture of every format and mode, by both readers."""

    def make(self, folder):
        picture = Image.effect_noise((60, 40), 80)
        for mode, endings in (("RGB", ("jpg", "png", "webp", "gif", "bmp", "tif")), ("L", ("jpg", "png", "tif")),
                              ("CMYK", ("jpg", "tif")), ("P", ("png", "gif")), ("RGBA", ("png", "webp")),
                              ("1", ("png", "bmp")), ("I;16", ("png", "tif"))):
            for ending in endings:
                image = Image.new("I;16", (60, 40), 999) if mode == "I;16" else picture.convert("RGB").convert(mode)
                image.save(folder / f"{mode.replace(';', '')}.{ending}")

    def choose(self, folder, rng):
        return rng.choice(sorted(folder.iterdir()))

    def attempt(self, path):
        """A row counts any Exception of pillow, so here only what is none is a trace; and time."""
        for load in (load_image, load_fast):
            try:
                load(str(path))
            except Exception as error:
                failed = error
            else:
                failed = None
        if failed:
            raise ValueError("image: " + " ".join(str(failed).split()))
        return "works"


class Checkpoints:
    """last.pt of a nano model."""

    def make(self, folder):
        torch.save(made_model().checkpoint(), folder / "good.pt")

    def choose(self, folder, rng):
        return folder / "good.pt"

    def attempt(self, path):
        return "works" if same_weights(CLIP.load(path)) else "altered"


class Folders:
    """Exports to open_clip and transformers: configs and weights."""

    def make(self, folder):
        for format in ("open_clip", "transformers"):
            export(made_model(), format, str(folder / format))

    def choose(self, folder, rng):
        files = [path for path in sorted(folder.glob("*/*")) if path.suffix in (".json", ".safetensors")]
        return rng.choice([path for path in files if path.name != "tokenizer.json"])

    def attempt(self, path):
        return "works" if same_weights(CLIP.from_pretrained(str(path.parent))) else "altered"


class Tokenizers:
    """A tokenizer.json, given to a model that then encodes texts."""

    def make(self, folder):
        text, _, _ = train_tokenizer(["a red cat", "a blue dog and a green bird"] * 9)
        (folder / "tokenizer.json").write_text(text)

    def choose(self, folder, rng):
        return folder / "tokenizer.json"

    def attempt(self, path):
        read_tokenizer(str(path))
        model = set_tokenizer(CLIP(MODELS["nano"]), str(path))
        model.tokenize(["a red cat", "", "unknown wörds"])
        return "works"


class Benchmarks:
    """The files of benchmarks that have no hash here, with the pictures whole."""
    benches = {"sugarcrepe": "sugarcrepe", "sugarcrepe_pp": "sugarcrepe_pp", "aro": "aro", "retrieval": "coco",
               "winoground": "winoground", "colorswap": "colorswap", "cola": "cola"}

    def make(self, folder):
        for number, make in enumerate((make_sugarcrepe, make_aro_and_retrieval, make_pairings)):
            make(str(folder), random.Random(number))

    def choose(self, folder, rng):
        files = [path for name in self.benches.values() for path in sorted((folder / name).rglob("*.json*"))]
        return rng.choice(files)

    def attempt(self, path):
        folder = next(parent for parent in path.parents if parent.parent.name.startswith("input"))
        bench = next(bench for bench, name in self.benches.items() if name == folder.name)
        evaluate.run(made_model(), [bench], data_dir=str(folder.parent), quiet=True, allow_missing=True)
        return "works"


KINDS = {"table": Tables(), "tar": Tars(), "image": Images(), "checkpoint": Checkpoints(), "folder": Folders(),
         "tokenizer": Tokenizers(), "benchmark": Benchmarks()}


def read_all(data):
    """Every row of a data set, as a loader's worker reads it, can be printed."""
    for i in range(len(data)):
        row = Seeded(data, 0)[0, i]
        texts = {name: value for name, value in row.items() if name not in ("image", "negative_image", "neighbour")}
        json.dumps(texts, ensure_ascii=False).encode()


def same_weights(model):
    expected = made_model().state_dict()
    found = model.state_dict()
    return all(torch.equal(found[name], x) for name, x in expected.items())


def accept_made_benchmarks(entry):
    """The official counts and hashes of the benchmarks do not apply to made files."""
    for name, value in entry.items():
        if isinstance(value, dict):
            accept_made_benchmarks(value)
        elif name in ("n", "sha256"):
            entry[name] = None


# ---- the run ---------------------------------------------------------------

def outcome(kind, path):
    """The class of an input, and the message or trace."""
    try:
        return kind.attempt(path), ""
    except (ValueError, OSError, ImportError) as error:
        text = str(error)
        if "\n" in text.strip() or not text:
            return "trace", f"{type(error).__name__} of several lines or none: {text!r}"
        return "one line", text
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.code, str) and "\n" not in error.code:
            return "one line", error.code
        return "trace", "".join(traceback.format_exception(error)[-4:])


def in_a_process(kind, path, timeout):
    """Fork, try the input there, and return its class and text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        warnings.simplefilter("ignore")
        found = outcome(kind, path)
        os.write(writing, json.dumps(found).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as f:
        text = f.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return ("hang" if number in (24, 9) else "died"), f"signal {number}"
    try:
        return tuple(json.loads(text))
    except ValueError:
        return "died", f"exit status {status}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=1500, help="of inputs, shared equally by the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--timeout", type=int, default=60, help="CPU seconds for an input")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the inputs that end badly")
    parser.add_argument("--show", action="store_true", help="print each message of one line, too")
    args = parser.parse_args()
    accept_made_benchmarks(evaluate.DATA)
    counts = {name: Counter() for name in args.kinds}
    with tempfile.TemporaryDirectory() as work:
        os.environ["XDG_CACHE_HOME"] = work
        for name in args.kinds:
            kind = KINDS[name]
            good = Path(work, f"good-{name}")
            good.mkdir()
            kind.make(good)
            for number in range(args.number // len(args.kinds)):
                rng = random.Random(f"{args.seed} {name} {number}")
                chosen = kind.choose(good, rng).relative_to(good)
                folder = Path(work, "input")
                shutil.copytree(good, folder, symlinks=True)
                damage_file(folder / chosen, rng)
                found, text = in_a_process(kind, folder / chosen, args.timeout)
                counts[name][found] += 1
                if found in BAD or args.show:
                    print(f"{name} {number} {chosen}: {found}: {text.strip()[-1500:]}", flush=True)
                if found in BAD and args.keep:
                    shutil.copytree(folder, Path(args.keep, f"{name}-{number}"), dirs_exist_ok=True)
                shutil.rmtree(folder)
    classes = ("works", "one line", "altered", *BAD)
    print(f"{'':12}" + "".join(f"{text:>10}" for text in classes))
    for name, count in counts.items():
        print(f"{name:12}" + "".join(f"{count[text]:10}" for text in classes))
    total = sum(counts.values(), Counter())
    print(f"{'all':12}" + "".join(f"{total[text]:10}" for text in classes))
    sys.exit(any(total[text] for text in BAD))


if __name__ == "__main__":
    main()
