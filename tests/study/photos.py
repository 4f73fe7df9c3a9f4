"""Photographs: the methods side by side, trained from nothing on Flickr8k's captions.

    python tests/study/photos.py --data DIR --output out/photos
    python tests/study/photos.py --data DIR --prepare out/photos-128        a small copy, to carry

DIR holds train.csv and test.csv with the columns image and caption, a row for each of the several
captions of a photograph, and the folder images. Any data set in this form will do. None comes with
this project.

Every arm trains the same model with the same batches, steps and optimizer, by train.py in a process
of its own, --jobs at once. Judged are, on the test photographs:

    retrieval    by evaluate.py: R@1, 5, 10 from photograph to caption and back
    swaps        the photograph must prefer its caption to the same one with two nouns, adjectives,
                 verbs or noun phrases exchanged (concepts.swap_negatives)
    substitutes  ... with one attribute, noun, number or preposition replaced by another of its
                 class (concepts.substitute_negatives)
    negations    ... with one statement negated (concepts.negate)

and with --coco DIR, a folder as evaluate.py's --data-dir, on whatever of COCO val2017 is there:

    sugarcrepe   by evaluate.py: the items whose photographs are there
    pointing     by evaluate.py: the patch most similar to a category lies in a box of it

Each of swaps, substitutes and negations is also judged with another photograph, drawn at random, in
place of the caption's own. What a model still gets right then it knows from the text alone, and the
difference, "gain by seeing" in the table, is what it owes to the photograph.

Swaps, substitutes and negations are made by rules: some are odd as sentences, and a few are true of
the photograph. They are the same for all arms. Chance is 50 %, a tie counts as wrong. Finished runs
are kept: started again, the script goes on where it was.

Two arms fine-tune: "plain, on" and "c2lip, on" begin with the weights of the arm plain of their
seed, and take --tune-steps steps at a third of the rate. "plain, longer" takes --longer times the
steps: as long as c2lip, whose concepts cost time.
"""
import argparse
import csv
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from concepts import (extract_batch, negate, substitute_negatives, swap_negatives,  # noqa: E402
                      word_frequency)
from data import load_image, train_tokenizer  # noqa: E402
from model import CLIP, MODELS  # noqa: E402

ARMS = {  # flags of train.py after those that all arms share
    "plain": [],
    "plain, longer": [],
    "clip": ["--method", "clip", "--loss", "clip"],
    "c2lip": ["--method", "c2lip"],
    "c2lip, xac1": ["--method", "c2lip", "--xac-weight", "1"],
    "npc": ["--method", "c2lip", "--xac-weight", "0"],
    "xac": ["--method", "c2lip", "--npc-weight", "0", "--xac-weight", "1"],
    "negclip": ["--method", "negclip"],
    "ce_clip": ["--method", "ce_clip"],
    "plain, on": [],
    "c2lip, on": ["--method", "c2lip"],
}
TUNED = ("plain, on", "c2lip, on")
SWAPS = ("noun", "adjective", "verb", "phrase")
SUBSTITUTES = ("attribute", "noun", "number", "preposition")
RECALLS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")
SETTINGS = ("model", "loss", "batch_size", "lr", "dtype")  # a kept result must agree in these
ANOTHER, GAIN = ", another", ", gain by seeing"  # what follows a kind of items in the table
# Student's t, by the number of seeds; from 10 on as of 10, which is too wide rather than too narrow
T_975 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


# ---- the data --------------------------------------------------------------
def read_pairs(path):
    """Rows of a .csv: dicts with image, caption, and concepts (a list), extracted if they lack."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"image", "caption"} <= rows[0].keys():
        raise ValueError(f"{path}: expected rows with the columns image and caption")
    if "concepts" in rows[0]:
        for row in rows:
            row["concepts"] = json.loads(row["concepts"])
    else:
        found = extract_batch([row["caption"] for row in rows])
        for row, concepts in zip(rows, found):
            row["concepts"] = concepts
    return rows


def write_pairs(path, rows):
    """The same table, with the concepts as json, so that no run extracts them again."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "concepts"])
        for row in rows:
            writer.writerow([row["image"], row["caption"], json.dumps(row["concepts"])])


def prepare(source, target, pixels):
    """A copy of train and test with photographs of pixels x pixels, as JPEGs of quality 85."""
    (target / "images").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = read_pairs(source / f"{split}.csv")
        write_pairs(target / f"{split}.csv", rows)
        for name in dict.fromkeys(row["image"] for row in rows):
            image = load_image(str(source / "images" / name))
            small = image.resize((pixels, pixels), Image.Resampling.BICUBIC)
            small.save(target / "images" / name, "JPEG", quality=85)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"wrote {target}: {size / 2**20:.1f} MiB")


# ---- what the captions are compared with -----------------------------------
def make_items(rows, frequency, seed=0):
    """{kind: [(image, caption, wrong caption), ...]}, the same for every model.

    frequency: how often the training captions use a word, so that no wrong caption is betrayed by
    a word that is rare.
    """
    rng = random.Random(seed)
    items = {}
    for kind in SWAPS:
        some = items[f"swap {kind}"] = []
        for row in rows:
            for wrong in swap_negatives(row["caption"], rng, (kind,)):
                some.append((row["image"], row["caption"], wrong))
    for kind in SUBSTITUTES:
        some = items[f"substitute {kind}"] = []
        for row in rows:
            for wrong in substitute_negatives(row["caption"], rng, (kind,), frequency):
                some.append((row["image"], row["caption"], wrong))
    some = items["negate"] = []
    for row in rows:
        some.append((row["image"], row["caption"], negate(row["caption"], rng)))
    return items


@torch.inference_mode()
def encode_all(model, device, names, image_folder, texts):
    """Normalised features of images (n, D) and texts (m, D), float32 on the CPU."""
    image_features = []
    for start in range(0, len(names), 250):
        pictures = [load_image(str(image_folder / name)) for name in names[start:start + 250]]
        pixels = torch.stack([model.transform(picture) for picture in pictures])
        image_features.append(model.encode_image(pixels.to(device), True).cpu())
    text_features = []
    for start in range(0, len(texts), 1000):
        tokens = model.tokenize(texts[start:start + 1000])
        text_features.append(model.encode_text(tokens.to(device), True).cpu())
    return torch.cat(image_features), torch.cat(text_features)


def interval(right, photographs, samples=1000, seed=0):
    """95 % interval of the mean of right (n,): a bootstrap of photographs, each with its items."""
    rng = np.random.default_rng(seed)
    _, index = np.unique(photographs, return_inverse=True)
    sums = np.bincount(index, right)
    counts = np.bincount(index)
    means = []
    for _ in range(samples):
        drawn = rng.integers(len(counts), size=len(counts))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def judge_items(checkpoint, items, image_folder, device):
    """{kind, or kind with another photograph: {"accuracy", "low", "high", "n"}} of a model."""
    model = CLIP.load(checkpoint).eval().to(device)
    image_rows, text_rows = {}, {}  # name or text: its row among the features
    for some in items.values():
        for image, caption, wrong in some:
            image_rows.setdefault(image, len(image_rows))
            text_rows.setdefault(caption, len(text_rows))
            text_rows.setdefault(wrong, len(text_rows))
    images, texts = encode_all(model, device, list(image_rows), image_folder, list(text_rows))
    others = another_of_each(len(images))  # (M,)
    results = {}
    for kind, some in items.items():
        if not some:  # in a small table
            continue
        photographs = torch.tensor([image_rows[image] for image, _, _ in some])  # (n,)
        captions = texts[[text_rows[caption] for _, caption, _ in some]]  # (n, D)
        wrongs = texts[[text_rows[wrong] for _, _, wrong in some]]  # (n, D)
        for name, shown in ((kind, photographs), (kind + ANOTHER, others[photographs])):
            margins = (images[shown] * (captions - wrongs)).sum(1)
            is_right = (margins > 0).double().numpy()
            low, high = interval(is_right, photographs.numpy())
            results[name] = {"accuracy": is_right.mean(), "low": low, "high": high, "n": len(some)}
    return results


def another_of_each(count, seed=0):
    """For each of so many photographs the number of another one: a random ring through all."""
    ring = np.random.default_rng(seed).permutation(count)
    others = np.empty(count, dtype=np.int64)
    others[ring] = np.roll(ring, 1)
    return torch.from_numpy(others)


# ---- one run ---------------------------------------------------------------
def steps_of(args, arm):
    """How many steps an arm takes."""
    if arm in TUNED:
        return args.tune_steps
    if arm == "plain, longer":
        return round(args.steps * args.longer)
    return args.steps


def train(args, arm, seed, folder, deadline):
    """train.py until its last step, or until the deadline, at which it saves and ends."""
    steps, lr = steps_of(args, arm), args.lr
    start = ["--model", args.model, "--init", "scratch",
             "--tokenizer", str(args.output / "tokenizer.json")]
    if arm in TUNED:
        lr = args.lr / 3
        start = ["--preset", "c2lip", "--init", str(args.output / f"plain-{seed}" / "last.pt")]
    command = [
        sys.executable, "train.py", "--out-dir", str(folder), "--resume", "auto", *start,
        "--method", args.loss, "--loss", args.loss, "--seed", str(seed),
        "--data", str(args.output / "train.csv"), "--image-root", str(args.data / "images"),
        "--steps", str(steps), "--batch-size", str(args.batch_size), "--lr", str(lr),
        "--weight-decay", "0.2", "--beta2", "0.98", "--grad-clip", "1",
        "--warmup", str(steps // 20), "--eval-every", "0", "--log-every", "20",
        "--workers", str(args.workers), "--device", args.device, "--dtype", args.dtype,
        "--compile" if args.compile else "--no-compile", *ARMS[arm]]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()  # it saves after its step
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if not (folder / "last.pt").exists():
        tail = (folder / "output.txt").read_text()[-1500:]
        raise RuntimeError(f"{folder.name}: train.py wrote no checkpoint\n{tail}")


def steps_done(folder):
    """The step of a run's last checkpoint; 0 without one."""
    path = folder / "last.pt"
    if not path.exists():
        return 0
    return torch.load(path, mmap=True, weights_only=True)["step"]


def evaluated(args, folder, bench, *flags):
    """{subset: {"accuracy", "low", "high", "n", "chance"}} of a run, by evaluate.py."""
    path = folder / f"{bench}.json"
    command = [sys.executable, "evaluate.py", "--checkpoint", str(folder / "last.pt"),
               "--bench", bench, "--device", args.device, "--json", str(path), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{folder.name}: evaluate.py: {done.stderr[-1500:]}")
    figures = {}
    for subset, result in json.loads(path.read_text())["results"][bench].items():
        kept = ("accuracy", "low", "high", "n", "chance")
        figures[subset] = {key: result[key] for key in kept}
    return figures


def benchmarks(args, folder):
    """Retrieval, and what there is of COCO: {name: figures}."""
    found = evaluated(args, folder, "retrieval", "--data", str(args.data / "test.csv"),
                      "--image-root", str(args.data / "images"))
    figures = {name: found[name] for name in RECALLS}
    if args.coco is None:
        return figures
    where = ["--data-dir", str(args.coco), "--allow-missing"]
    found = evaluated(args, folder, "sugarcrepe", *where)
    for name in ("replace", "swap", "add", "micro"):
        figures[f"sugarcrepe {name}"] = found[name]
    boxes = args.coco / "coco" / "boxes.json"
    if boxes.exists():
        where += ["--data", str(boxes)]
    figures["pointing"] = evaluated(args, folder, "pointing", *where)["coco"]
    return figures


def one_run(args, arm, seed, items, deadline):
    """The result of an arm and a seed: from its file if it is there, else trained and judged."""
    folder = args.output / f"{arm.replace(', ', '-')}-{seed}"
    path = folder / "result.json"
    settings = {name: str(getattr(args, name)) for name in SETTINGS}
    if path.exists():
        result = json.loads(path.read_text())
        if result["settings"] == settings and result["steps"] == steps_of(args, arm):
            return result
    seconds = None  # unknown of a run that was complete, but for its figures
    if steps_done(folder) < steps_of(args, arm):
        began = time.monotonic()
        train(args, arm, seed, folder, deadline)
        seconds = time.monotonic() - began
    steps = steps_done(folder)
    figures = benchmarks(args, folder)
    figures |= judge_items(folder / "last.pt", items, args.data / "images", args.device)
    result = {"arm": arm, "seed": seed, "steps": steps, "seconds": seconds, "settings": settings,
              "figures": figures}
    path.write_text(json.dumps(result, indent=1))
    return result


# ---- the table -------------------------------------------------------------
def cell(values, sign=""):
    """Mean and half of Student's 95 % interval, in percent; of one or two seeds each value."""
    values = 100 * np.array(values)
    if len(values) < 3:
        return " / ".join(f"{value:{sign}.1f}" for value in values)
    half = T_975[min(len(values), 10)] * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():{sign}.1f} ± {half:.1f}"


def row_names(figures):
    """The rows of the table: all figures, and what each gains by the caption's own photograph."""
    names = []
    for name in figures:
        names.append(name)
        if name.endswith(ANOTHER):
            names.append(name.removesuffix(ANOTHER) + GAIN)
    return names


def accuracies(results, arm, name):
    """{seed: accuracy} of one arm and one row."""
    found = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        if result["arm"] == arm:
            found[result["seed"]] = accuracy(result["figures"], name)
    return found


def accuracy(figures, name):
    """A figure; a gain is that with the own photograph less that with another."""
    if not name.endswith(GAIN):
        return figures[name]["accuracy"]
    own = name.removesuffix(GAIN)
    return figures[own]["accuracy"] - figures[own + ANOTHER]["accuracy"]


def items_and_chance(figures, name):
    """How many items a row has, and its chance in percent."""
    if name.endswith(GAIN):
        return figures[name.removesuffix(GAIN)]["n"], 0.0
    return figures[name]["n"], 100 * figures[name].get("chance", 0.5)


def table(results, arms):
    """Markdown: rows as in row_names; a column for each arm, and for its difference to plain."""
    compared = [arm for arm in arms if arm != "plain" and "plain" in arms]
    columns = ["", "items", "chance", *arms, *[f"{arm} - plain" for arm in compared]]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    figures = results[0]["figures"]
    for name in row_names(figures):
        count, chance = items_and_chance(figures, name)
        cells = [name.replace("_", " "), f"{count:,}", f"{chance:.1f}"]
        for arm in arms:
            values = accuracies(results, arm, name)
            cells.append(cell(list(values.values())))
        plain = accuracies(results, "plain", name)
        for arm in compared:
            values = accuracies(results, arm, name)
            both = sorted(values.keys() & plain.keys())
            cells.append(cell([values[seed] - plain[seed] for seed in both], "+"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_report(args, results, photographs):
    """table.md, from whatever is there so far -> its text."""
    runs = []
    for result in results:
        run = f"{result['arm']}, seed {result['seed']}: {result['steps']:,} steps"
        if result["seconds"] is not None:
            run += f" in {result['seconds']:.0f} s"
        runs.append(run)
    passes = args.steps * args.batch_size / photographs
    text = f"""{args.model} from random weights, --loss {args.loss}, {args.steps:,} steps of \
{args.batch_size} at {args.lr:g}: {passes:.0f} passes over {photographs:,} photographs.

{table(results, args.arms)}

Percent on the test photographs; mean over seeds ± half of Student's 95 % interval, of fewer than
three seeds each value. Runs on {args.device}: {"; ".join(runs)}.
"""
    (args.output / "table.md").write_text(text, encoding="utf-8")
    return text


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    flag = parser.add_argument
    flag("--data", type=Path, required=True, help="folder of train.csv, test.csv and images/")
    flag("--output", type=Path, default=Path("out/photos"), help="folder of runs and table.md")
    flag("--prepare", type=Path, metavar="DIR", help="write a small copy of --data there, and end")
    flag("--pixels", type=int, default=128, help="of the photographs of that copy (128)")
    flag("--coco", type=Path, help="folder with sugarcrepe/ and coco/val2017/, as --data-dir of "
         "evaluate.py; with coco/boxes.json also pointing")
    flag("--arms", nargs="+", default=["plain", "c2lip"], choices=ARMS, metavar="ARM",
         help=f"some of: {' / '.join(ARMS)}")
    flag("--loss", choices=("siglip", "clip"), default="siglip", help="sigmoid or softmax")
    flag("--seeds", type=int, default=3, help="runs of each arm, with seeds 0, 1, ... (3)")
    flag("--model", default="micro", choices=MODELS, metavar="NAME", help="in model.MODELS (micro)")
    flag("--steps", type=int, default=1000, help="of each run (1000)")
    flag("--tune-steps", type=int, default=300, help="of each run that fine-tunes (300)")
    flag("--longer", type=float, default=1.5, help="of 'plain, longer', in --steps (1.5)")
    flag("--batch-size", type=int, default=128, help="of each step (128)")
    flag("--lr", type=float, default=1e-3, help="peak learning rate (1e-3)")
    flag("--workers", type=int, default=0, help="processes of each run that read photographs (0)")
    flag("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time (cores)")
    flag("--minutes", type=float, default=1e6, help="runs are ended, and judged, after these")
    flag("--device", default="cuda" if has_gpu else "cpu")
    flag("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if has_gpu else "float32")
    flag("--compile", action="store_true", help="torch.compile: pays in long runs only")
    args = parser.parse_args()
    return args


def prepare_output(args):
    """The captions with their concepts, and a tokenizer of them, for all runs -> the captions."""
    rows = read_pairs(args.data / "train.csv")
    write_pairs(args.output / "train.csv", rows)
    captions = [row["caption"] for row in rows]
    tokenizer, _, _ = train_tokenizer(captions, MODELS[args.model].vocab_size)
    (args.output / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    return rows


def main():
    args = parse_arguments()
    if args.prepare:
        prepare(args.data, args.prepare, args.pixels)
        return
    began = time.monotonic()
    deadline = began + 60 * args.minutes
    args.data, args.output = args.data.resolve(), args.output.resolve()
    if args.coco is not None:
        args.coco = args.coco.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = prepare_output(args)
    photographs = len({row["image"] for row in rows})
    frequency = word_frequency([row["caption"] for row in rows])
    items = make_items(read_pairs(args.data / "test.csv"), frequency)
    counts = ", ".join(f"{kind} {len(some):,}" for kind, some in items.items())
    print(f"{len(rows):,} captions of {photographs:,} photographs; items: {counts}", flush=True)

    def run(arm, seed):
        try:
            return one_run(args, arm, seed, items, deadline)
        except (RuntimeError, OSError, ValueError) as error:  # the other runs go on
            print(f"FAILED {error}", flush=True)
            return None

    results = []
    every = [(arm, seed) for seed in range(args.seeds) for arm in args.arms]
    tuned = [some for some in every if some[0] in TUNED]    # after all others: they begin with them
    with tqdm(total=len(every), unit="run") as bar:
        for some_runs in ([some for some in every if some not in tuned], tuned):
            with ThreadPoolExecutor(args.jobs) as pool:
                for future in as_completed([pool.submit(run, *some) for some in some_runs]):
                    result = future.result()
                    bar.update()
                    if result is not None:
                        results.append(result)
                        write_report(args, results, photographs)
                        bar.write(f"{result['arm']}, seed {result['seed']}: done")
    if results:
        print("\n" + write_report(args, results, photographs))
        print(f"wrote {args.output / 'table.md'}")
    if len(results) < len(every):
        sys.exit(f"photos.py: {len(every) - len(results)} of {len(every)} runs failed")


if __name__ == "__main__":
    main()
