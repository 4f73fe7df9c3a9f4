"""What this project computes, pinned: a rewrite that is meant to change nothing must pass these tests unchanged.

Pinned are the loss terms and gradient norms of every method, the figures of every benchmark, concepts and hard
negatives of 2,000 captions, the files of every export, and what is said about damaged inputs. Everything is driven
through the command lines and a few names that callers use. The values lie in fixtures/pins.json, which

    python tests/test_pins.py --write                   # all of them, about two minutes
    python tests/test_pins.py --write benchmarks        # one group: methods, pairs, benchmarks, captions, ...

writes anew. Do that only for a change of behaviour that is wanted, and say in the commit which values moved and why.

Weights are made by an explicit formula, not by a random generator, and the tokenizer is a file, so that the values are
the same on other machines. The methods start from train.py's own seeded weights, which are pinned with them.
"""
import hashlib
import io
import json
import os
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from PIL import Image

FIXTURES = HERE / "fixtures"
PINS = FIXTURES / "pins.json"
TOKENIZER = FIXTURES / "pins_tokenizer.json"
METHODS = ("c2lip", "siglip", "clip", "negclip", "ce_clip", "degla", "con_clip", "triplet_clip", "tecoa", "gift", "clic",
           "fsc_clip", "cs_clip")
ADDED_TERMS = ["--caption-xac-weight", "0.1", "--paraphrase-weight", "0.5"]       # terms that any method takes


def sha(content):
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- running scripts

def run_jobs(folder, jobs):
    """Run scripts of the project as a user would, without paying for the import of torch each time.

    jobs: dicts of name, script (a path), args, and world (number of processes, 1). One interpreter imports the
    libraries and forks for each process of each job. Returns {name: (exit status, stdout, stderr)} of rank 0.
    """
    path = Path(folder, "jobs.json")
    path.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, __file__, "--jobs", str(path)], env=environment, check=True)
    results = {}
    for job in jobs:
        texts = [Path(folder, f"{job['name']}.0.{stream}").read_text() for stream in ("out", "err")]
        status = int(Path(folder, f"{job['name']}.0.status").read_text())
        results[job["name"]] = (status, *texts)
    return results


def work_off(path):
    """The other side of run_jobs: fork, run, wait; in this process nothing of the project is ever imported."""
    import nltk, safetensors.torch, timm, tokenizers, torchvision      # noqa: F401, E401: shared by all forks
    import torch.distributed, torch.utils.tensorboard                  # noqa: F401, E401
    folder = Path(path).parent
    for job in json.loads(Path(path).read_text()):
        world = job.get("world", 1)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        children = {}
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                be_process(job, folder, rank, world, port)
            children[pid] = rank
        while children:
            pid, status = os.wait()
            rank = children.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            (folder / f"{job['name']}.{rank}.status").write_text(str(code))
            if code:        # one that died would leave the others waiting
                for other in children:
                    os.kill(other, 9)


def be_process(job, folder, rank, world, port):
    """Become one process of a job: never returns."""
    status = 1
    try:
        for number, stream in ((1, "out"), (2, "err")):
            file = os.open(folder / f"{job['name']}.{rank}.{stream}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            os.dup2(file, number)
        if world > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        replace_downloads()
        sys.path[0] = str(Path(job["script"]).parent)
        sys.argv = [job["script"], *map(str, job["args"])]
        os.chdir(sys.path[0])
        runpy.run_path(job["script"], run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# ------------------------------------------------------------------------------------------------- made inputs

WORDS = "a the red blue dog cat sits runs on under table chair two small near man woman".split()


def numbers(name, shape):
    """float64 in [-1, 1), multiples of 2**-23 and so exact in float32: a hash of the name and of the position."""
    with np.errstate(over="ignore"):
        x = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode())) * np.uint64(2 ** 31)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x = x ^ (x >> np.uint64(31))
    return torch.from_numpy(((x >> np.uint64(40)).astype(np.float64) / 2 ** 23 - 1).reshape(shape))


def made_tokenizer():
    """The text of a tokenizer.json, and its number of tokens."""
    text = TOKENIZER.read_text("utf-8")
    return text, 1 + max(token["id"] for token in json.loads(text)["added_tokens"])


@torch.no_grad()
def made_model(**changes):
    """A nano model with weights by a formula; the scale of each is a power of 2, so that they are exact as well."""
    from model import CLIP, MODELS
    text, size = made_tokenizer()
    model = CLIP(replace(MODELS["nano"], tokenizer=text, vocab_size=size, context_length=32, **changes))
    for name, p in model.named_parameters():
        x = numbers(name, p.shape).to(p.dtype)
        if p.ndim == 0:
            continue
        if "norm" in name and name.endswith("weight"):
            p.copy_(1 + x / 4)
        elif p.ndim == 1:
            p.copy_(x / 8)
        elif "embedding" in name or "pos_embed" in name or "token" in name or "latent" in name:
            p.copy_(x)
        else:
            fan_in = p[0].numel()
            p.copy_(x * 2.0 ** round(0.5 * np.log2(3 / fan_in)))
    return model.eval()


def caption(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))


def picture(path, rng):
    """Coloured noise of 5 x 5, enlarged; the content is a png whatever the name, since jpeg is not exact."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    size = (rng.randint(60, 90), rng.randint(60, 90))
    Image.frombytes("RGB", (5, 5), rng.randbytes(75)).resize(size).save(path, "PNG")


def write_rows(path, rows):
    """A benchmark's file as its authors write it: json, or .jsonl with a row on each line."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    text = "\n".join(map(json.dumps, rows)) if str(path).endswith("jsonl") else json.dumps(rows)
    Path(path).write_text(text)


# ------------------------------------------------------------------------------------------------- methods

SMALL = ["--dtype", "float64", "--steps", "3", "--log-every", "1", "--batch-size", "32", "--eval-every", "0",
         "--warmup", "2", "--lr", "3e-4"]
TERMS = ("loss", "contrastive", "npc", "xac", "caption_xac", "paraphrase", "cmr", "imc", "tgc", "igc", "cd", "ita", "awc",
         "pairs", "sneg", "uni", "ghn", "lhn", "units", "distill", "grad_norm", "lr", "logit_scale", "logit_bias",
         "own_concept")


def logged(folder):
    """The pinned columns of log.jsonl's rows of steps."""
    rows = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in TERMS if name in row} for row in rows if "loss" in row]


def train_all(folder, runs, world=1, extra=()):
    """runs {name: args of train.py} -> {name: rows of the log}."""
    jobs = [{"name": name, "script": str(ROOT / "train.py"), "world": world,
             "args": [*args, *extra, "--out-dir", str(Path(folder, name))]} for name, args in runs.items()]
    for name, (status, out, err) in run_jobs(folder, jobs).items():
        assert status == 0, f"train.py {name}: {err}"
    return {name: logged(Path(folder, name)) for name in runs}


def find_methods(folder, world=1, extra=()):
    """Every method with its defaults, on the built-in scenes; what is evaluated at the end is small, to be quick."""
    picture(f"{folder}/0.png", random.Random(0))
    Path(folder, "small.csv").write_text("image,caption\n0.png,a red circle\n")
    common = [*SMALL, "--bench", "retrieval", "--val-data", f"{folder}/small.csv", "--image-root", str(folder)]
    runs = {method: ["--method", method] for method in METHODS}
    runs["siglip_added"] = ["--method", "siglip", *ADDED_TERMS]
    return train_all(folder, {name: [*common, *args] for name, args in runs.items()}, world, extra)


def made_pairs(folder):
    """A table of 48 pairs: some with negatives, a negative image, neighbours, concepts, units, several captions; and two
    more columns of captions, of several sentences and of few different names."""
    rng = random.Random(11)
    captions = (FIXTURES / "captions.txt").read_text("utf-8").splitlines()
    rows = []
    for i in range(48):
        picture(f"{folder}/{i}.png", rng)
        picture(f"{folder}/not{i}.png", rng)
        row = {"image": f"{i}.png", "caption": captions[i], "paragraph": " ".join(captions[2 * i:2 * i + 3]),
               "label": WORDS[i % 7]}
        if i % 4 == 0:
            row["negatives"] = [captions[i + 1], "", captions[i + 2].upper(), captions[i + 3]]
        if i % 3 == 0:
            row["negative_image"] = f"not{i}.png"
        if i % 5:
            row["neighbours"] = [(i + 7) % 48, (3 * i) % 48]
        if i % 6 == 0:
            row["concepts"] = ["a thing", f"number {i}", "a thing"]
        if i % 5 == 1:
            row["units"] = [[captions[i], captions[i + 1]], ["a thing", "no thing"], [captions[i], captions[i + 2]]]
        if i % 7 == 0:
            row["caption"] = [captions[i], captions[i + 60]]
        rows.append(row)
    write_rows(f"{folder}/pairs.jsonl", rows)
    return f"{folder}/pairs.jsonl"


def find_pairs(folder, world=1, extra=()):
    """The paths that scenes do not take: negatives and phrases out of captions, rows' own, neighbours, spans."""
    table = made_pairs(str(Path(folder, "made")))
    common = ["--data", table, "--image-root", os.path.dirname(table), "--preset", "nano", *SMALL, "--batch-size", "16"]
    runs = {method: ["--method", method] for method in ("negclip", "ce_clip", "con_clip", "triplet_clip")}
    runs["c2lip_no_dedupe"] = ["--no-dedupe"]
    runs["c2lip_softmax"] = ["--loss", "clip"]
    runs["c2lip_span_distill"] = ["--concept-features", "span", "--distill-weight", "0.1", "--ema", "0.9"]
    runs["degla_softmax"] = ["--method", "degla", "--loss", "clip"]
    runs["fsc_clip_softmax"] = ["--method", "fsc_clip", "--loss", "clip"]
    runs["cs_clip"] = ["--method", "cs_clip"]
    runs["tecoa_labels"] = ["--method", "tecoa", "--caption-key", "label"]
    runs["gift_replay"] = ["--method", "gift", "--replay", table]
    runs["clic_paragraphs"] = ["--method", "clic", "--loss", "clip", "--caption-key", "caption,paragraph"]
    runs["siglip_sentences"] = ["--method", "siglip", *ADDED_TERMS, "--caption-xac-sentences", "2", "--caption-key",
                                "caption,paragraph"]
    return train_all(folder, {name: [*common, *args] for name, args in runs.items()}, world, extra)


# ------------------------------------------------------------------------------------------------- benchmarks

CLASSES = ["red dog", "blue cat", "man", "woman", "chair", "table", "two"]
TORCHVISION = ("CIFAR10", "CIFAR100", "Food101", "STL10", "OxfordIIITPet", "FGVCAircraft", "DTD", "SUN397")


class SmallData:
    """Stands in for a torchvision data set: 21 images of 7 classes, whatever it is asked for."""
    classes = [name.replace(" ", "_") for name in CLASSES]

    def __init__(self, root, **options):
        self.name = os.path.basename(root)
        self._labels = [i % 7 for i in range(21)]

    def __len__(self):
        return 21

    def __getitem__(self, i):
        noise = random.Random(f"{self.name} {i}").randbytes(75)
        return Image.frombytes("RGB", (5, 5), noise).resize((70, 64)), self._labels[i]


def replace_downloads():
    import torchvision
    for name in TORCHVISION:
        setattr(torchvision.datasets, name, SmallData)


def accept_made_files(project, data):
    """THE ONE PLACE that knows how evaluate.py keeps official counts and hashes: adapt it if that changes.

    `project` is a copy of this project, so its tables may be edited: in assets/benchmarks.json every entry with a path
    and a count n gets those of the made file, and no sha256; assets/imagenet.json gets few classes and prompts.
    """
    path = Path(project, "assets", "benchmarks.json")
    table = json.loads(path.read_text("utf-8"))

    def visit(entry):
        if not isinstance(entry, dict):
            return
        if "n" in entry and "path" in entry and Path(data, entry["path"]).is_file():    # not of later benchmarks
            text = Path(data, entry["path"]).read_text()
            entry["n"] = len(text.splitlines() if entry["path"].endswith("jsonl") else json.loads(text))
            entry["sha256"] = None
        elif "n" in entry and "folder" in entry:
            entry["n"] = len(list(Path(data, entry["folder"]).glob("*/*")))
        for value in entry.values():
            visit(value)

    visit(table)
    path.write_text(json.dumps(table))
    Path(project, "assets", "imagenet.json").write_text(json.dumps(
        {"source": "made", "classes": CLASSES, "templates": ["a {}.", "the small {}", "{} on a table"]}))


def make_sugarcrepe(data, rng):
    names = [f"{i:012d}.jpg" for i in range(9)]
    for name in names:
        picture(f"{data}/coco/val2017/{name}", rng)
    for subset in ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att"):
        items = {}
        for i in range(0, 40, 2):       # ids with gaps, as in the official swap_obj
            text = caption(rng)
            shuffled = " ".join(rng.sample(text.split(), len(text.split())))
            negative = text.upper() + " " if i % 10 == 0 else shuffled      # the first is a tie
            items[str(i)] = {"filename": rng.choice(names), "caption": text, "negative_caption": negative}
        write_rows(f"{data}/sugarcrepe/{subset}.json", items)
        for number, item in enumerate(items.values()):
            words = item["caption"].split()
            item.update(id=number, caption2=" ".join(rng.sample(words, len(words))))
        write_rows(f"{data}/sugarcrepe_pp/{subset}.json", list(items.values()))


def make_aro_and_retrieval(data, rng):
    for i in range(6):
        picture(f"{data}/aro/images/{i}.jpg", rng)
    relation, attribution = [], []
    for i in range(70):
        true = caption(rng)
        row = {"image_path": f"{i % 6}.jpg", "bbox_x": rng.randint(0, 20), "bbox_y": rng.randint(0, 20),
               "bbox_w": rng.randint(10, 30), "bbox_h": rng.randint(10, 30), "true_caption": true,
               "false_caption": true.upper() if i % 10 == 0 else caption(rng)}
        relations = ["riding", "behind", "near", "with", "to the left of"]      # near and with are left out
        attributes = ["red", "big"] if i < 30 else ["old", "wet"] if i < 55 else ["hot", "dry"]
        relation.append({**row, "relation_name": rng.choice(relations)})
        attribution.append({**row, "attributes": attributes})
    write_rows(f"{data}/aro/visual_genome_relation.json", relation)
    write_rows(f"{data}/aro/visual_genome_attribution.json", attribution)
    for name, file in (("coco", "coco_karpathy_test"), ("flickr30k", "flickr30k_test")):
        rows = [{"image": f"{name}-images/{i}.jpg", "caption": [caption(rng) for _ in range(rng.randint(1, 3))]}
                for i in range(15)]
        rows[3]["caption"][0] = rows[4]["caption"][0]       # another image's caption as well
        rows[5]["caption"][0] = "dog"                       # has one order only
        for row in rows:
            picture(f"{data}/{name}/{row['image']}", rng)
        write_rows(f"{data}/{name}/{file}.json", rows)


def make_valse(data, rng):
    folders = ("valse/images", "coco/val2017", "coco/val2014", "coco/train2014")
    for i, folder in enumerate(folders):
        picture(f"{data}/{folder}/{i}.jpg", rng)
    for subset in ("existence", "plurals", "counting-small-quant", "counting-hard", "counting-adversarial", "relations",
                   "action-replacement", "actant-swap", "coreference-standard", "coreference-hard", "foil-it"):
        rows = {}
        for i in range(20):
            text = caption(rng)
            rows[f"x{i}"] = {"image_file": f"{i % 4}.jpg", "caption": text, "foil": text if i == 3 else caption(rng),
                             "mturk": {"caption": i % 4, "foil": 0, "other": 0}}
        write_rows(f"{data}/valse/{subset}.json", rows)


def make_pairings(data, rng):
    """Winoground, ColorSwap and COLA: two images and two captions."""
    pairs = [(f"a{rng.randrange(6)}", f"b{rng.randrange(6)}", caption(rng), caption(rng)) for _ in range(60)]
    pairs[:3] = [("a0", "b0", "a dog", "A dog!"), ("a1", "a1", "a red cat", "the man"), ("a2", "a2", "a dog", "a dog")]
    for name in sorted({name for pair in pairs for name in pair[:2]}):
        for folder in ("winoground/data/images", "colorswap/images", "cola/images"):
            picture(f"{data}/{folder}/{name}.png", random.Random(name))
    write_rows(f"{data}/winoground/data/examples.jsonl", [
        dict(zip(("image_0", "image_1", "caption_0", "caption_1"), pair)) for pair in pairs])
    write_rows(f"{data}/colorswap/test.json", [
        {"image_1": f"images/{a}.png", "image_2": f"images/{b}.png", "caption_1": s, "caption_2": t}
        for a, b, s, t in pairs])
    write_rows(f"{data}/cola/COLA_multiobjects_matching_benchmark.json", [
        [f"https://x.org/{a}.png", s, f"https://x.org/{b}.png", t] for a, b, s, t in pairs])


@torch.no_grad()
def by_liking(model, path, texts):
    """The texts, those first that fit the image best."""
    image = model.encode_image(model.transform(Image.open(path))[None], True)[0]
    scores = (model.encode_text(model.tokenize(texts), True) @ image).tolist()
    return sorted(texts, key=lambda text: -scores[texts.index(text)])


def make_whatsup(data, rng):
    model = made_model()
    for subset, others in (("images", ("on", "under")), ("clevr", ("in-front_of", "behind"))):
        rows = []
        for number, (first, last) in enumerate((
                ("dog", "red-table"), ("cat", "chair"), ("man", "table"), ("two", "woman"))):
            sides = ("left_of", "right_of") + others
            for i, side in enumerate(sides):
                name = f"data/controlled_{subset}/{first}_{side}_{last}.jpeg"
                picture(f"{data}/whatsup/{name}", rng)
                options = [f"A {first} {s.replace('_', ' ')} a {last}" for s in (side, *sides[:i], *sides[i + 1:])]
                if number == 0 or number == 1 and i < 2:    # one set is wholly correct, and a pair of another
                    options = by_liking(model, f"{data}/whatsup/{name}", options)
                if number == 3 and side == "right_of":
                    options[2] = options[0]                 # a tie
                rows.append({"image_path": name, "caption_options": options})
        write_rows(f"{data}/whatsup/controlled_{subset}_dataset.json", rows)
    for subset in ("coco_qa_one_obj", "coco_qa_two_obj", "vg_qa_one_obj", "vg_qa_two_obj"):
        rows = [[i % 3 + 100, caption(rng), caption(rng)] for i in range(12)]
        rows[0][2] = rows[0][1]
        for i in (100, 101, 102):
            name = f"coco/val2017/{i:012d}.jpg" if "coco" in subset else f"whatsup/data/vg_images/{i}.jpg"
            picture(f"{data}/{name}", random.Random(i))
        write_rows(f"{data}/whatsup/{subset}.json", rows)


def make_classes(data, rng):
    for label in range(7):
        for i in range(2 + label % 3):
            picture(f"{data}/imagenet/val/n{label}/{i}.png", rng)
            picture(f"{data}/folder/n{label}/{i}.png", rng)
    Path(data, "names.txt").write_text("\n".join(CLASSES) + "\n")


def make_tables(data, rng):
    """The same twelve pairs as a table and as two tar shards."""
    rows = []
    for shard in range(2):
        with tarfile.open(f"{data}/{shard}.tar", "w") as tar:
            for i in range(6):
                name = f"{shard}{i}.png"
                picture(f"{data}/pairs/{name}", rng)
                rows.append((name, "a dog" if i == 5 else caption(rng)))
                Path(data, "text").write_text(rows[-1][1])
                tar.add(f"{data}/pairs/{name}", name)
                tar.add(f"{data}/text", name.replace("png", "txt"))
    Path(data, "pairs.csv").write_text("\n".join(["image,caption", *map(",".join, rows), "00.png,a red chair"]))


# subsets and means that came after these pins
ADDED = {f"{data}mean_r{k}" for data in ("", "coco_", "flickr30k_") for k in (1, 5)} | {"top1_macro"}


def find_benchmarks(folder):
    """Figures of every benchmark: {run: {bench: {subset: ...}}}. The runs are commands."""
    folder = Path(folder)
    project, data = folder / "project", folder / "data"
    project.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, project)
    shutil.copytree(ROOT / "assets", project / "assets")
    for number, make in enumerate((make_sugarcrepe, make_aro_and_retrieval, make_valse, make_pairings, make_whatsup,
                                   make_classes, make_tables)):
        make(str(data), random.Random(number))
    accept_made_files(project, data)
    torch.save(made_model().checkpoint(), folder / "siglip.pt")
    clip = made_model(family="clip", patch_size=16, logit_bias=None, text_clean="lower", resize="shortest")
    torch.save(clip.checkpoint(), folder / "clip.pt")
    names = ("sugarcrepe,sugarcrepe_pp,aro,valse,winoground,colorswap,whatsup,cola,retrieval,imagenet,folder,cifar10,"
             "cifar100,food101,stl10,pets,aircraft,dtd,sun397")
    flags = {"all": ["--bench", names, "--data", data / "folder", "--classes", data / "names.txt"],
             "scenes": ["--bench", "scenes"],
             "clip": ["--bench", "sugarcrepe_pp,winoground,retrieval,imagenet"],
             "table": ["--bench", "retrieval", "--data", data / "pairs.csv", "--image-root", data / "pairs"],
             "tar": ["--bench", "retrieval", "--data", data / "{0..1}.tar"],
             "missing": ["--bench", "sugarcrepe,retrieval", "--image-root", data / "coco", "--allow-missing"],
             "wise_ft": ["--bench", "sugarcrepe", "--init", folder / "siglip.pt", "--interpolate", "0.25"]}
    moved = made_model()
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.add_(numbers("moved " + name, p.shape).to(p.dtype) * 0.125)
    torch.save(moved.checkpoint(), folder / "moved.pt")
    checkpoints = {"clip": "clip.pt", "wise_ft": "moved.pt"}
    jobs = [{"name": name, "script": str(project / "evaluate.py"), "args": [
        "--checkpoint", str(folder / checkpoints.get(name, "siglip.pt")), "--data-dir", str(data), "--device", "cpu",
        "--json", str(folder / f"{name}.json"), *map(str, args)]} for name, args in flags.items()]
    (data / "coco" / "val2017" / "000000000004.jpg").rename(data / "coco" / "held.jpg")
    missing = [job for job in jobs if job["name"] == "missing"]
    results = run_jobs(folder, missing)
    (data / "coco" / "held.jpg").rename(data / "coco" / "val2017" / "000000000004.jpg")
    results |= run_jobs(folder, [job for job in jobs if job not in missing])
    found = {}
    for name, (status, out, err) in results.items():
        assert status == 0, f"evaluate.py {name}: {err}"
        answer = json.loads((folder / f"{name}.json").read_text())["results"]
        found[name] = {bench: {subset: figures(r) for subset, r in subsets.items() if subset not in ADDED}
                       for bench, subsets in answer.items()}
    return found


def figures(result):
    """Of one subset or mean; which items are correct as a string of 0 and 1, of many their hash."""
    kept = {name: result[name] for name in ("right", "n", "ties", "chance", "accuracy", "low", "high") if name in result}
    if "correct" in result:
        text = "".join(map(str, result["correct"]))
        kept["correct"] = text if len(text) <= 70 else sha(text)
    return kept


# ------------------------------------------------------------------------------------------------- captions

BLOCK = 50


def made_captions():
    """2,000: the captions in fixtures, and what else users have: joined, shouted, without a full stop, odd letters."""
    lines = []
    for name in ("captions.txt", "concepts_captions.txt"):
        lines += (FIXTURES / name).read_text("utf-8").splitlines()
    lines = list(dict.fromkeys(line for line in lines if line.strip()))
    changed = []
    for i, line in enumerate(lines * 4):
        other = lines[(7 * i + 3) % len(lines)]
        bare = line.rstrip(" .")
        changed.append((
            f"{bare}, and {other[0].lower()}{other[1:]}", line.upper(), bare.lower(), f"{line} {other}",
            bare.title(), f"{bare} \u2014 \u201c{other.rstrip('.')}\u201d \U0001f600", f"two {bare[0].lower()}{bare[1:]}s",
            bare.replace(" a ", " the man's ").replace("'", "\u2019"), f"{bare} with {other.split()[-1]}!?",
            " ".join(bare.split()[::-1]), f"<b>{bare}</b> &amp; 3 {other.split()[1]}; 1999",
        )[i % 11])
    found = list(dict.fromkeys(lines + changed))[:1990]
    found += ["", " ", ".", "dog", "A", "\u4e00\u53ea\u732b", "1 2 3", "the the the", "Running.", "!!!\n\tWow\n"]
    assert len(found) == 2000
    return found


def find_captions(folder=None):
    """Hashes of blocks of 50 captions, and some in full; swaps and negations draw from a generator for each."""
    from concepts import extract_batch, negate, swap_negatives
    captions = made_captions()
    concepts = extract_batch(captions)
    swaps = [swap_negatives(text, random.Random(i)) for i, text in enumerate(captions)]
    kinds = [[swap_negatives(text, random.Random(i), (kind,)) for kind in ("noun", "adjective", "verb", "phrase")]
             for i, text in enumerate(captions)]
    negations = [[negate(text, random.Random(i)), negate(text)] for i, text in enumerate(captions)]
    found = {}
    for name, rows in (("captions", captions), ("concepts", concepts), ("swaps", swaps), ("swaps by kind", kinds),
                       ("negations", negations)):
        blocks = [json.dumps(rows[i:i + BLOCK]) for i in range(0, len(rows), BLOCK)]
        found[name] = [sha(block) for block in blocks]
    plain = [0, 1, 2, 250, 611, 613, 617, 700, 850, 1000, 1234, 1500, 1990, 1997]
    found["plain"] = [{"caption": captions[i], "concepts": concepts[i], "swaps": swaps[i], "negations": negations[i]}
                      for i in plain]
    return found


# ------------------------------------------------------------------------------------------------- exports

def exported():
    """{name: (model, formats)}."""
    clip = dict(family="clip", logit_bias=None, text_clean="lower", resize="shortest")
    return {"siglip": (made_model(), ("open_clip", "transformers", "timm")),
            "siglip_softmax": (made_model(logit_bias=None, vision_act="gelu_tanh", text_act="gelu_tanh"),
                               ("transformers",)),
            "clip": (made_model(**clip), ("open_clip", "transformers", "timm")),
            "clip_quick": (made_model(**clip, vision_act="quick_gelu", text_act="quick_gelu", interpolation="bilinear",
                                      mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28)), ("open_clip", "transformers")),
            "clip_bias": (made_model(**{**clip, "logit_bias": -10.0}), ("open_clip",))}


def find_exports(folder):
    """{model format: {file: its text, or the sha256 of a large one}}, through the command line."""
    folder, jobs = Path(folder), []
    for name, (model, formats) in exported().items():
        torch.save(model.checkpoint(), folder / f"{name}.pt")
        jobs += [{"name": f"{name}-{format}", "script": str(ROOT / "model.py"), "args": [
            "export", "--checkpoint", str(folder / f"{name}.pt"), "--format", format,
            "--output", str(folder / f"exported-{name}-{format}")]} for format in formats]
    found = {}
    for name, (status, out, err) in run_jobs(folder, jobs).items():
        assert status == 0, f"model.py export {name}: {err}"
        found[name] = {path.name: file_content(path, folder)
                       for path in sorted(Path(folder, f"exported-{name}").iterdir())}
    return found


def file_content(path, folder):
    content = path.read_bytes()
    if path.suffix == ".json" and len(content) < 4000:
        return content.decode().replace(str(folder), "FOLDER")
    return hashlib.sha256(content).hexdigest()


def find_named_export(folder):
    """Configs of a tower with a name of its own in timm, which are written differently; 340 MB, so apart."""
    from model import CLIP, MODELS, export
    text, size = made_tokenizer()
    found = {}
    for name in ("ViT-B-16-SigLIP", "ViT-B-32"):
        config = replace(MODELS[name], text=(96, 1, 3, 384), tokenizer=text, vocab_size=size)
        with torch.device("meta"):
            model = CLIP(config)
        model = model.to_empty(device="cpu")
        for format in ("open_clip", "transformers", "timm"):
            where = Path(folder, f"{name}-{format}")
            export(model, format, str(where))
            found[where.name] = {path.name: file_content(path, folder) for path in sorted(where.iterdir())
                                 if path.suffix == ".json" and path.name != "tokenizer.json"}
    return found


# ------------------------------------------------------------------------------------------------- damaged inputs

def in_order(match):
    """Tensors of another shape may come in any order."""
    return ", ".join(sorted(re.findall(r"\S+ \[.*?\] for \[.*?\]", match[0])))


def plain(text, folder):
    """A message without the temporary folder, and without what Python, torch or json say inside its brackets."""
    text = str(text).replace(str(folder), "FOLDER")
    text = re.sub(r"weights \((\w+): .*?\): expected", r"weights (\1: ...): expected", text)
    text = re.sub(r"(?<=of another shape \()text\S+ \[.*?\](?=\))", in_order, text)
    text = re.sub(r"object at 0x\w+", "object at ADDRESS", text)
    text = re.sub(r"is not a tokenizer \(.*?\): expected", "is not a tokenizer (...): expected", text)
    return re.sub(r"(this code cannot build \S+) \(.*\)$", r"\1 (...)", text)


def read_table(folder, *sources, **options):
    """What CaptionFile says and holds: the message it stops with, or rows, skipped ones and unreadable ones."""
    from data import CaptionFile
    options = {"image_root": str(folder), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = CaptionFile("::".join(str(Path(folder, source)) for source in sources), **options)
        except (ValueError, OSError) as error:
            return {"stops": plain(error, folder), "type": type(error).__name__}
    rows = [data[i] for i in range(len(data))]
    bad = [[plain(row["key"], folder), plain(row["error"], folder)] for row in rows if "error" in row]
    return {"rows": len(data), "captions": data.captions, "bad": bad,
            "skipped": [[plain(key, folder), plain(why, folder)] for key, why in data.skipped],
            "neighbours": [row.get("neighbours") for row in rows] if any("neighbours" in r for r in rows) else None}


def find_tables(folder):
    """Damaged and odd tables."""
    folder = Path(folder)
    for name in ("a", "b", "c"):
        picture(f"{folder}/{name}.png", random.Random(name))
    content = (folder / "c.png").read_bytes()
    (folder / "half.png").write_bytes(content[:len(content) // 2])
    (folder / "text.png").write_text("no image at all")
    (folder / "zero.png").write_text("")
    good = "image,caption\na.png,a red wall\nb.png,a blue wall\n"
    files = {
        "good.csv": good,
        "empty.csv": "",
        "header only.csv": "image,caption\n",
        "blank lines.csv": "\n\n\n",
        "no image column.csv": "picture,caption\na.png,a red wall\n",
        "no caption column.csv": "image,words\na.png,a red wall\n",
        "semicolons.csv": good.replace(",", ";"),
        "commas.tsv": good,
        "wrong ending.txt": good,
        "no ending": good,
        "gaps.csv": "image,caption\na.png,\n,a wall\nb.png,a blue wall\n,,\nc.png\nc.png,one,two,three\n",
        "bom.csv": "\ufeff" + good,
        "quotes.csv": 'image,caption\na.png,"a ""red"" wall\nover two lines"\nb.png,"open\nc.png,x\n',
        "bad images.csv": "image,caption\n" + "".join(
            f"{name}.png,a wall\n" for name in ("a", "half", "text", "zero", "not there")),
        "bad lists.jsonl": "".join(json.dumps(row) + "\n" for row in (
            {"image": "a.png", "caption": "a cat", "concepts": '["a cat"'},
            {"image": "a.png", "caption": '["a cat"', "negatives": "a dog||a cow"},
            {"image": "b.png", "caption": ["one", "", "two"], "concepts": {"x": 1}},
            {"image": "b.png", "caption": 7}, {"image": 5, "caption": "a number"},
            {"image": "b.png", "caption": "", "text": "the other column"})),
        "broken line.jsonl": '{"image": "a.png", "caption": "a cat"}\n{"image": "b.png", "cap\n',
        "a list.jsonl": '{"image": "a.png", "caption": "a cat"}\n["b.png", "a dog"]\n',
        "lone.jsonl": "not json",
        "neighbours.jsonl": "".join(json.dumps(row) + "\n" for row in (
            {"image": "a.png", "caption": "one", "neighbours": [1, 2, 9]}, {"image": "", "caption": "no image"},
            {"image": "b.png", "caption": "three", "neighbours": "0|1|x"}, {"image": "c.png", "caption": "four"})),
        "joined.csv": "image,caption\na.png,from the table\nz.png,fits nothing\nb.png,\n",
        "fits nothing.csv": "image,caption\ny.png,fits nothing\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.csv").write_bytes("image,caption\na.png,caf\u00e9 cr\u00e8me\n".encode("latin-1"))
    (folder / "binary.csv").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\x01\x02\xff" * 9)
    names = [*files, "latin.csv", "binary.csv"]
    found = {name: read_table(folder, name) for name in names}
    found["two files"] = read_table(folder, "good.csv", "gaps.csv")
    found["one of two without pairs"] = read_table(folder, "good.csv", "no image column.csv")
    found["not there"] = read_table(folder, "none.csv")
    found["braces"] = read_table(folder, "{good,none}.csv")
    found["a folder"] = read_table(folder, "")
    found["no such key"] = read_table(folder, "good.csv", caption_key="title")
    found["no such image key"] = read_table(folder, "good.csv", image_key="file")
    found["two caption keys"] = read_table(folder, "good.csv", caption_key="caption,image")
    found["joined"] = read_table(folder, "good.csv", captions=str(folder / "joined.csv"))
    found["joined to nothing"] = read_table(folder, "good.csv", captions=str(folder / "fits nothing.csv"))
    found["joined to none"] = read_table(folder, "good.csv", captions=str(folder / "none.csv"))
    return found


def write_tar(path, members):
    with tarfile.open(path, "w", bufsize=512) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def find_tars(folder):
    """Damaged and odd shards."""
    folder, members = Path(folder), []
    for i in range(8):
        buffer = io.BytesIO()
        noise = random.Random(i).randbytes(75)
        Image.frombytes("RGB", (5, 5), noise).resize((30, 24)).save(buffer, "PNG")
        row = {"url": f"http://x/{i}.jpg", "caption": f"json {i}", "alt": [f"alt {i}", f"other {i}"]}
        members += [(f"{i:05d}.png", buffer.getvalue()), (f"{i:05d}.json", json.dumps(row).encode()),
                    (f"{i:05d}.txt", f"text {i}".encode())]
    write_tar(folder / "good.tar", members)
    whole = (folder / "good.tar").read_bytes()
    # where the members lie depends on the size of a png, which is not the same in each version of its library
    places = {member.name: member for member in tarfile.open(folder / "good.tar")}
    (folder / "cut in an image.tar").write_bytes(whole[:places["00005.png"].offset_data + 40])
    (folder / "cut in a header.tar").write_bytes(whole[:places["00003.png"].offset + 100])
    (folder / "cut behind a sample.tar").write_bytes(whole[:places["00004.png"].offset])
    damaged = bytearray(whole)
    damaged[places["00002.png"].offset:places["00002.png"].offset + 300] = b"\xff" * 300
    (folder / "damaged header.tar").write_bytes(damaged)
    damaged[places["00002.png"].offset:places["00002.png"].offset + 512] = bytes(512)
    (folder / "zeros.tar").write_bytes(damaged)
    inside = bytearray(whole)
    start = places["00001.png"].offset_data + 20
    inside[start:start + 60] = bytes(60)
    (folder / "damaged image.tar").write_bytes(inside)
    (folder / "no tar.tar").write_bytes(b"this is no tar file" * 99)
    (folder / "zero.tar").write_bytes(b"")
    write_tar(folder / "no members.tar", [])
    write_tar(folder / "only texts.tar", members[2::3])
    write_tar(folder / "only images.tar", members[::3])
    known = dict(members)
    write_tar(folder / "gaps.tar", [(name, known[name]) for name in known if name not in (
        "00001.png", "00002.json", "00002.txt", "00003.json")] + [("00004.txt", b"second"), ("notes.pdf", b"x")])
    odd = [("zero.png", b""), ("zero.txt", b"a"), ("text.png", b"not an image"), ("text.txt", b"b"),
           ("blank.png", members[0][1]), ("blank.txt", b" \n"), ("json.png", members[0][1]), ("json.json", b"{broken"),
           ("latin.PNG", members[3][1]), ("latin.txt", "caf\u00e9".encode("latin-1")),
           ("./sub/dir.v2.jpg", members[6][1]), ("./sub/dir.v2.txt", b"in a folder")]
    write_tar(folder / "odd members.tar", odd)
    found = {path.stem: read_table(folder, path.name) for path in sorted(folder.glob("*.tar"))}
    found["json key"] = read_table(folder, "gaps.tar", caption_key="caption")
    found["several captions"] = read_table(folder, "good.tar", caption_key="alt,caption")
    found["no such key"] = read_table(folder, "good.tar", caption_key="title")
    found["all that hold something"] = read_table(folder, "{good,zero,no tar}.tar")
    found["again, from its index"] = read_table(folder, "cut in an image.tar")
    text = json.dumps(found)
    for name in ("cut in an image", "cut in a header", "cut behind a sample", "damaged header", "zeros"):
        text = re.sub(r"from byte [\d,]+ on", "from byte N on", text)
    return json.loads(text)


def loaded(read, folder):
    """What a reader of weights says, or that it returned a model whose weights are those of made_model()."""
    expected = made_model().state_dict()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = read()
        except (ValueError, OSError) as error:
            return {"stops": plain(error, folder), "type": type(error).__name__}
    same = all(torch.equal(x, expected[name]) for name, x in model.state_dict().items() if name in expected)
    ours = [plain(w.message, folder) for w in said if issubclass(w.category, UserWarning)]
    return {"name": model.config.name, "same weights": same, "warns": ours}


def find_checkpoints(folder):
    """Damaged and odd checkpoints, through CLIP.load and CLIP.from_pretrained."""
    from model import CLIP
    from safetensors.torch import save_file
    folder, model = Path(folder), made_model()
    saved = model.checkpoint()
    weights = saved["model"]
    first = next(name for name in weights if name.startswith("text.blocks"))
    files = {
        "good": saved,
        "old config key": {**saved, "config": {**saved["config"], "value_tokens": "A"}},
        "unknown config key": {**saved, "config": {**saved["config"], "colour": "red"}},
        "wrong config value": {**saved, "config": {**saved["config"], "family": "siglop"}},
        "other width": {**saved, "config": {**saved["config"], "embed_dim": 64}},
        "no config": {"model": weights},
        "weights alone": weights,
        "state_dict": {"state_dict": weights},
        "compiled": {**saved, "model": {f"_orig_mod.{name}": x for name, x in weights.items()}},
        "parallel": {**saved, "model": {f"module.{name}": x for name, x in weights.items()}},
        "one missing": {**saved, "model": {name: x for name, x in weights.items() if name != first}},
        "one too many": {**saved, "model": {**weights, "text.extra": torch.zeros(2)}},
        "another shape": {**saved, "model": {**weights, first: torch.zeros(3, 5)}},
        "no names we know": {**saved, "model": {"layer.weight": torch.zeros(2, 2)}},
        "empty": {},
        "a list": [1, 2],
    }
    for name, content in files.items():
        torch.save(content, folder / f"{name}.pt")
    whole = (folder / "good.pt").read_bytes()
    (folder / "half.pt").write_bytes(whole[:len(whole) // 2])
    (folder / "zero.pt").write_bytes(b"")
    (folder / "text.pt").write_text("weights")
    torch.save({"model": subprocess.Popen}, folder / "holds code.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "archive.pt")
    save_file(weights, folder / "alone.safetensors")
    (folder / "half.safetensors").write_bytes((folder / "alone.safetensors").read_bytes()[:5000])
    found = {f"load {path.name}": loaded(lambda: CLIP.load(path), folder)
             for path in sorted([*folder.glob("*.pt"), *folder.glob("*.safetensors")])}
    found["load not there"] = loaded(lambda: CLIP.load(folder / "none.pt"), folder)
    found["load a folder"] = loaded(lambda: CLIP.load(folder), folder)

    def pretrained(source, *args):
        return loaded(lambda: CLIP.from_pretrained(str(folder / source), *args), folder)

    for name in ("good.pt", "weights alone.pt", "state_dict.pt", "half.pt", "text.pt", "archive.pt", "none.pt",
                 "half.safetensors"):
        found[f"from {name}"] = pretrained(name)
    found["from weights alone.pt as nano"] = pretrained("weights alone.pt", "nano")
    found["from alone.safetensors as ViT-B-32"] = pretrained("alone.safetensors", "ViT-B-32")
    found["from good.pt as ViT-B-16-SigLIP"] = pretrained("good.pt", "ViT-B-16-SigLIP")
    found["from good.pt as nano"] = pretrained("good.pt", "nano")
    found["from good.pt as ViT-B-31"] = pretrained("good.pt", "ViT-B-31")
    found["from nothing"] = loaded(lambda: CLIP.from_pretrained(), folder)
    found["from nano"] = loaded(lambda: CLIP.from_pretrained(None, "nano"), folder)
    found |= damaged_folders(folder, model, pretrained)
    return found


def damaged_folders(folder, model, pretrained):
    """An export whose files are lost or changed one by one."""
    from model import export
    found = {}
    (folder / "nothing").mkdir()
    found["from an empty folder"] = pretrained("nothing")
    for format, config in (("open_clip", "open_clip_config.json"), ("transformers", "config.json")):
        export(model, format, str(folder / format))
        content = json.loads((folder / format / config).read_text())
        weights = next(path.name for path in (folder / format).glob("*.safetensors"))
        cases = {"whole": None, "no tokenizer": "tokenizer.json", "no weights": weights, "no config": config}
        for name, lost in cases.items():
            copied = shutil.copytree(folder / format, folder / f"{format} {name}")
            if lost:
                (copied / lost).unlink()
            found[f"from {format} {name}"] = pretrained(copied.name)
        texts = {"broken config": json.dumps(content)[:-9], "empty config": "{}", "a list as config": "[]"}
        for name, text in texts.items():
            copied = shutil.copytree(folder / format, folder / f"{format} {name}")
            (copied / config).write_text(text)
            found[f"from {format} {name}"] = pretrained(copied.name)
        copied = shutil.copytree(folder / format, folder / f"{format} half")
        (copied / weights).write_bytes((copied / weights).read_bytes()[:9999])
        found[f"from {format} half weights"] = pretrained(copied.name)
        copied = shutil.copytree(folder / format, folder / f"{format} tokenizer")
        (copied / "tokenizer.json").write_text("{}")
        found[f"from {format} empty tokenizer"] = pretrained(copied.name)
    return found


# ------------------------------------------------------------------------------------------------- the tests

FIND = {"methods": find_methods, "pairs": find_pairs, "benchmarks": find_benchmarks, "captions": find_captions,
        "exports": find_exports, "named export": find_named_export, "tables": find_tables, "tars": find_tars,
        "checkpoints": find_checkpoints}


def pins(group):
    return json.loads(PINS.read_text("utf-8"))[group]


def differences(found, pinned, where="", rel=1e-7):
    """Yield a line for each value that is not the pinned one; floats within rel (or 1e-12)."""
    if isinstance(found, dict) and isinstance(pinned, dict):
        for name in [*pinned, *(name for name in found if name not in pinned)]:
            if name not in found or name not in pinned:
                yield f"{where}/{name}: {'not found' if name not in found else 'not pinned'}"
            else:
                yield from differences(found[name], pinned[name], f"{where}/{name}", rel)
    elif isinstance(found, list) and isinstance(pinned, list) and len(found) == len(pinned):
        for i, (a, b) in enumerate(zip(found, pinned)):
            yield from differences(a, b, f"{where}[{i}]", rel)
    elif type(found) in (int, float) and type(pinned) in (int, float):
        if found != pytest.approx(pinned, rel=rel, abs=1e-12):
            yield f"{where}: {found!r}, pinned is {pinned!r}"
    elif found != pinned:
        yield f"{where}: {found!r}, pinned is {pinned!r}"


def check(found, pinned, **options):
    lines = list(differences(found, pinned, **options))
    assert not lines, "\n".join([f"{len(lines)} values differ from fixtures/pins.json:", *lines[:40]])


def test_each_method(tmp_path):
    check(find_methods(tmp_path), pins("methods"))


def test_each_method_on_pairs(tmp_path):
    check(find_pairs(tmp_path), pins("pairs"))


@pytest.mark.slow
def test_each_method_on_two_processes(tmp_path):
    check(find_methods(tmp_path, world=2), pins("methods"))


@pytest.mark.slow
def test_each_method_on_pairs_on_two_processes(tmp_path):
    """own_concept and neighbours are counted a process; all the rest is the same."""
    found = find_pairs(tmp_path, world=2)
    pinned = pins("pairs")
    for row in (row for rows in (*found.values(), *pinned.values()) for row in rows):
        del row["own_concept"]
    check(found, pinned)


@pytest.mark.slow
def test_each_method_in_parts(tmp_path):
    check(find_methods(tmp_path, extra=("--accum", "2")), pins("methods"))


def test_each_benchmark(tmp_path):
    check(find_benchmarks(tmp_path), pins("benchmarks"))


@pytest.mark.parametrize("name", ["captions", "concepts", "swaps", "swaps by kind", "negations", "plain"])
def test_captions(name, captions):
    """The first difference tells a block: captions[50 * i:50 * i + 50] of made_captions()."""
    check(captions[name], pins("captions")[name])


@pytest.fixture(scope="module")
def captions():
    return find_captions()


def test_exports(tmp_path):
    check(find_exports(tmp_path), pins("exports"))


@pytest.mark.slow
def test_exports_of_named_towers(tmp_path):
    check(find_named_export(tmp_path), pins("named export"))


@pytest.mark.parametrize("group", ["tables", "tars", "checkpoints"])
def test_damaged(group, tmp_path):
    check(FIND[group](tmp_path), pins(group))


def write(groups):
    """Write the values of these groups, or of all, into fixtures/pins.json."""
    values = json.loads(PINS.read_text("utf-8")) if PINS.exists() else {}
    torch.set_num_threads(1)
    for group in groups or FIND:
        with tempfile.TemporaryDirectory() as folder:
            found = json.loads(json.dumps(FIND[group](folder)))
        lines = list(differences(found, values.get(group, {}), group))
        print(f"{group}: {len(lines)} values changed", *lines[:10], sep="\n    ")
        values[group] = found
    # a line for each case: a changed value is then seen in git diff
    parts = []
    for group, cases in values.items():
        rows = [f" {json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items()]
        parts.append(f"{json.dumps(group)}: {{\n" + ",\n".join(rows) + "\n}")
    PINS.write_text("{\n" + ",\n".join(parts) + "\n}\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--jobs"]:
        work_off(sys.argv[2])
    elif sys.argv[1:2] == ["--write"]:
        write(sys.argv[2:])
    else:
        sys.exit(__doc__)
