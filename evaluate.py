"""Every benchmark, exact, with intervals: python evaluate.py --checkpoint out/nano/last.pt --bench scenes

assets/benchmarks.json holds each bench's protocol, source, files, and what of them to compare. Each image and each text
is encoded once over all benches, by all processes together. A tie is never correct: a model that scores two captions
alike has not told them apart. Intervals are bootstraps over images: items of one image move together.
"""
import argparse
import hashlib
import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter, namedtuple
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # threads that spin while they wait starve other processes

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from concepts import default_extractor
from data import COLOURS, SHAPES, CaptionFile, Scenes, load_image
from model import CLIP, set_tokenizer

PROTOCOL = 4    # raised whenever a change here or in assets/benchmarks.json may change a figure
ASSETS = Path(__file__).resolve().parent / "assets"
TABLE = json.loads((ASSETS / "benchmarks.json").read_text("utf-8"))
GET = "python evaluate.py download"
Missing = type("Missing", (ValueError,), {})        # data that is not there; the message says how to get it
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # of torchrun

# what is compared: an image is (function, name, ...), as (picture, path); equal images and equal texts are encoded once

def dot(a, b):
    return (a * b).sum(-1)      # equal rows give equal sums, and so tie, which a matmul does not promise

def choice(i, t):       # each of I images strictly prefers the first of its K / I texts
    scores = dot(i[:, :, None], t.unflatten(1, (i.shape[1], -1)))                       # (N, I, K / I)
    return (scores[..., 0] - scores[..., 1:].amax(-1)).amin(1)

def pairing(a, b):      # each of two a strictly prefers its own b
    return torch.minimum(dot(a[:, 0], b[:, 0]) - dot(a[:, 0], b[:, 1]), dot(a[:, 1], b[:, 1]) - dot(a[:, 1], b[:, 0]))

RULES = {   # normalised images (N, I, D), texts (N, K, D) -> margins (N,), positive if correct, 0 if a tie; and chance
    "choice": (choice, None),       # (I / K) ** I
    "itt": (lambda i, t: dot(i, t[:, :2]).amin(1) - dot(i, t[:, 2:])[:, 0], 1 / 3),
    "tot": (lambda i, t: dot(t[:, 0], t[:, 1]) - dot(t[:, :2], t[:, 2:]).amax(1), 1 / 3),
    "text": (pairing, 1 / 4),
    "image": (lambda i, t: pairing(t, i), 1 / 4),
    "group": (lambda i, t: torch.minimum(pairing(i, t), pairing(t, i)), 1 / 6)}

# N items of I images and K texts each; rules {subset: one of RULES}; labels: SUBSET_macro is the mean of theirs
Choices = namedtuple("Choices", "rules images texts labels", defaults=[None])
# N tuples of one image, M of str (features are averaged), positive (N, M) bool, recalls {subset: (way, k)}:
# whether the best positive of a query ("i2t": an image) is among its k best, which is R@k, or top k
Ranking = namedtuple("Ranking", "images texts positive recalls")

def judge(task, image, text):
    """image, text: functions from lists of n rows to features (n, width, D). Yields (subset, margins (N,), NaN without
    the image, chance, N names of what the bootstrap draws, N items in words, N labels or None)."""
    names = ["|".join(x[1] for x in row) for row in task.images]
    if isinstance(task, Choices):
        parts = [slice(i, i + 2000) for i in range(0, len(names), 2000)]
        for subset, (rule, chance) in ((subset, RULES[rule]) for subset, rule in task.rules.items()):
            margins = torch.cat([rule(image(task.images[part]), text(task.texts[part])) for part in parts])
            I, K, items = len(task.images[0]), len(task.texts[0]), map(" | ".join, zip(names, *zip(*task.texts)))
            yield subset, margins, chance or (I / K) ** I, names, list(items), task.labels
        return
    images, texts = image(task.images)[:, 0], text(task.texts)                          # (N, D), (M, prompts, D)
    texts = F.normalize(texts.mean(1), dim=-1) if texts.shape[1] > 1 else texts[:, 0]
    of = [names[i] for i in task.positive.byte().argmax(0).tolist()]                    # a caption's image
    for subset, (way, k) in task.recalls.items():
        pair, mask = ((images, texts), task.positive) if way == "i2t" else ((texts, images), task.positive.T)
        n, tries = mask.shape[1], torch.arange(min(k, mask.shape[1]))[:, None]
        misses = ((n - tries - mask.sum(1)).double() / (n - tries)).clamp(0).prod(0)           # by k blind draws
        items = names if way == "i2t" else [row[0] for row in task.texts]
        yield subset, rank(*pair, mask, k), 1 - misses.mean().item(), names if way == "i2t" else of, items, None

def rank(queries, targets, positive, k):
    """(Q, D), (M, D), (Q, M) bool -> margins (Q,): the best positive minus the k-th best of the others. NaN where the
    query or all of its positives are NaN; other targets of NaN are never found."""
    targets, inverse = targets.unique(dim=0, return_inverse=True)       # equal targets must tie
    margins = []
    for q, mask in zip(queries.split(500), positive.split(500)):        # COCO's 5,000 x 25,010 would be large
        scores = (q @ targets.T)[:, inverse].nan_to_num(-2.0)                           # (<= 500, M)
        best = scores.masked_fill(~mask, -2).amax(1)
        others = scores.masked_fill(mask, -3).topk(min(k, len(inverse))).values
        margins.append(best.masked_fill(best == -2, float("nan")) - others[:, -1])
    return torch.cat(margins)

def print0(*text):
    if RANK == 0:
        print(*text)

@torch.inference_mode()
def encode(model, inputs, args):
    """N images, or texts' tokens (N, L) -> normalised features (N, D), float32, on the CPU. Processes share."""
    def load(numbers):
        x = torch.full((len(numbers), 3, model.config.image_size, model.config.image_size), float("nan"))
        for pixels, (function, name, *rest) in zip(x, (inputs[i] for i in numbers)):
            try:
                pixels.copy_(model.transform(function(name, *rest)))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                if not args.allow_missing:      # else features of NaN, and no item with this image
                    raise ValueError(f"cannot read {name} ({error}): check --image-root, or --allow-missing") from None
        return torch.tensor(numbers), x.to(model.logit_scale.dtype)
    order = torch.arange(len(inputs))
    if isinstance(inputs, torch.Tensor):
        # in batches by length; in causal models nothing is seen behind the end-of-text token: cut it off
        lengths = inputs.argmax(1) + 1 if model.config.family == "clip" else order * 0 + inputs.shape[1]
        batches = [(i, inputs[i, :lengths[i].max()]) for i in lengths.argsort().split(args.batch_size)[RANK::WORLD]]
    else:
        batches = [i.tolist() for i in order.split(args.batch_size)[RANK::WORLD]]
        batches = DataLoader(range(len(inputs)), batch_sampler=batches, collate_fn=load, num_workers=args.workers,
                             multiprocessing_context="fork" if args.workers else None)
    features = torch.zeros(len(inputs), model.config.embed_dim, device=args.device)
    for i, x in tqdm(batches, "encoding", leave=False, disable=len(inputs) < 2000 or RANK > 0):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            x = (model.encode_image if x.ndim == 4 else model.encode_text)(x.to(args.device))
        features[i.to(args.device)] = F.normalize(x.float(), dim=-1)
    if WORLD > 1:
        dist.all_reduce(features)       # a row is zero on all processes but one
    if bad := features.isnan().any(1).nonzero()[:, 0].tolist():
        print0(f"skipped {len(bad)} of {len(inputs)} images, which cannot be read; the first: {inputs[bad[0]][1]}")
    return features.cpu()

def fingerprint(model):
    """sha256 of the weights and of everything in CLIPConfig."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode() + x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

def cached(model, inputs, args):
    """encode, or what --cache holds of it for the same weights, precision and inputs: of images path, size and time."""
    if not args.cache:
        return encode(model, inputs, args)
    key = inputs.tolist() if isinstance(inputs, torch.Tensor) else [
        (name, *[x for x in rest if isinstance(x, (int, float))], os.path.isfile(name) and (
            os.path.getsize(name), os.stat(name).st_mtime_ns)) for _, name, *rest in inputs]
    key = hashlib.sha256(repr((PROTOCOL, fingerprint(model), args.dtype, key)).encode()).hexdigest()
    path = Path(args.cache, f"{key}.pt")
    found = [torch.load(path, weights_only=True) if path.is_file() and RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(found)       # processes may not share a disk
    features = encode(model, inputs, args) if found[0] is None else found[0]
    if found[0] is None and RANK == 0 and not features.isnan().any():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(features, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    return features

def bootstrap(columns, samples=2000, seed=0):
    """[(images (n,) of 0, 1, ..., values (n,), weights (n,)), ...] -> weighted means (1 + samples, columns): first of
    all, then of as many images as there are, drawn with all their items; the same draws for all columns."""
    rng, size = np.random.default_rng(seed), 1 + max(images.max() for images, _, _ in columns)
    total = np.stack([np.bincount(images, w, size) for images, _, w in columns], 1)             # (images, columns)
    value = np.stack([np.bincount(images, v * w, size) for images, v, w in columns], 1)
    draws = (np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(samples))
    shares = [count @ value / np.maximum(count @ total, 1e-9) for count in draws]
    return np.stack([value.sum(0) / total.sum(0), *shares])

def summarize(outcomes, means, samples=2000):
    """What judge yields, and {mean: subsets or earlier means} -> {subset or mean: accuracy, low, high, n, ...}.
    Intervals are 95 %, by percentiles; where all items agree, Wilson's of as many as there are images. "micro" is the
    mean over items."""
    results, columns, number = {}, {}, {}
    for subset, margins, chance, names, items, labels in outcomes:
        kept = (~margins.isnan()).nonzero()[:, 0].tolist()
        if len(kept) < len(margins):
            print0(f"{subset}: {len(margins) - len(kept)} of {len(margins)} items skipped, without their image")
        if not kept:
            raise ValueError(f"{subset}: none of its items has an image that can be read")
        right = (margins[kept] > 0).numpy().astype(int)
        images = np.array([number.setdefault(names[i], len(number)) for i in kept])
        results[subset] = {"right": right.sum().item(), "n": len(kept), "ties": int((margins == 0).sum()),
                           "chance": chance, "correct": right.tolist(), "image": images.tolist(),
                           "items": [items[i] for i in kept]}
        columns[subset] = images, right, np.ones(len(kept))
        if labels:
            count = Counter(labels[i] for i in kept)
            weights = np.array([0 if labels[i] is None else 1 / count[labels[i]] for i in kept])
            columns[f"{subset}_macro"] = images, right, weights
            results[f"{subset}_macro"] = {"n": int((weights > 0).sum()), "chance": chance}
    shares = dict(zip(columns, bootstrap(list(columns.values()), samples).T))           # each (1 + samples,)
    for name, parts in means.items():
        if set(parts) <= set(shares):
            n = [results[part]["n"] for part in parts]
            shares[name] = np.average([shares[part] for part in parts], 0, n if name == "micro" else None)
            results[name] = {"n": sum(n), "chance": float(np.mean([results[part]["chance"] for part in parts]))}
    for name, r in results.items():
        p, (low, high) = shares[name][0].item(), np.quantile(shares[name][1:], (0.025, 0.975)).tolist()
        edge = 3.84 / (len(set(r.get("image", number))) + 3.84)
        r |= {"accuracy": p, "low": min(p, low) - edge * (p == 1), "high": max(p, high) + edge * (p == 0)}
    return results

def run(benches, model, args, quiet=False, tasks=None):
    """Benches (or read's tasks) on a model in eval mode -> {bench: {subset or mean: results}}. On all processes."""
    tasks = tasks or read(benches, model, args)[0]
    every = [task for parts in tasks.values() for task in parts]
    images = {x: i for i, x in enumerate(dict.fromkeys(x for task in every for row in task.images for x in row))}
    texts = list(dict.fromkeys(text for task in every for row in task.texts for text in row))
    tokens, inverse = model.tokenize(texts).unique(dim=0, return_inverse=True)  # texts of equal tokens tie exactly
    texts, results = dict(zip(texts, inverse.tolist())), {}
    image_features, text_features = cached(model, list(images), args), cached(model, tokens, args)
    for bench, parts in tasks.items():
        spec = TABLE.get(bench, {})
        outcomes = [outcome for task in parts for outcome in judge(
            task, lambda rows: image_features[torch.tensor([[images[x] for x in row] for row in rows])],
            lambda rows: text_features[torch.tensor([[texts[x] for x in row] for row in rows])])]
        results[bench] = summarize(outcomes, spec.get("means", {}))
        if not quiet:
            print_table(bench, results[bench], spec.get("published") if args.reference else None)
    return results

def print_table(bench, results, published=None):
    """A line a subset or mean, in percent; beside it published ones, {method: {subset: percent}}."""
    width, published = max(map(len, (bench, *results))), published or {}
    print0(f"\n{bench:{width}s}    chance  accuracy     right / n      ties    95 % interval" +
           "".join(f"  published: {method}" for method in published))
    for name, r in results.items():
        count = f"{r['right']:6d} / {r['n']:<6d} {r['ties']:5d}" if "right" in r else f"mean over {r['n']:6d} items"
        print0(f"{name:{width}s}  {100 * r['chance']:8.1f}  {100 * r['accuracy']:8.1f}  {count:21s}"
               f"    {100 * r['low']:5.1f} .. {100 * r['high']:5.1f}" +
               "".join(f"  {x.get(name, ''):>{len(method) + 11}}" for method, x in published.items()))

def picture(path, *box):
    image, (x, y, width, height) = load_image(path), box or [0] * 4
    return image.crop((x, y, x + width, y + height)) if box else image

def rows_of(bench, subset, args):
    """The rows of one of a bench's files, and all that is known of it. Raises ValueError if it is not the true file."""
    spec = {**TABLE[bench], **TABLE[bench]["files"][subset]}
    path, keys = Path(args.data_dir, spec["path"]), set(spec["image"] + spec["text"] + spec.get("keys", []))
    if not path.is_file():
        raise Missing(f"{bench}: no {path}; get it: {GET} {bench}")
    content = path.read_bytes()
    try:
        rows = [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else json.loads(content)
        rows = list(rows.values()) if isinstance(rows, dict) else rows      # by id; swap_obj's ids have gaps
        whole = all(keys <= set(row if isinstance(row, dict) else range(len(row))) for row in rows)
        if spec.get("sha256") not in (None, hashlib.sha256(content).hexdigest()) or len(rows) != spec["n"] or not whole:
            raise ValueError(f"{len(rows)} rows, {'all' if whole else 'not all'} with {keys}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the official file of {spec['n']} rows ({error}): {GET} {bench}") from None
    return rows, spec

def find(bench, args, images):
    """(name, *box) of images -> (picture, path, *box): in --image-root, or the first of the bench's folders with it."""
    places = [args.image_root] * bool(args.image_root) + [Path(args.data_dir, f) for f in TABLE[bench]["folders"]]
    paths = {name: [os.path.join(place, name) for place in places] for name, *_ in images}
    paths = {name: next(filter(os.path.isfile, some), some[0]) for name, some in paths.items()}
    missing = [path for path in paths.values() if not os.path.isfile(path)]
    if missing and not (args.allow_missing and len(missing) < len(paths)):
        raise Missing(f"{bench}: {len(missing)} of {len(paths)} images are missing, the first is {missing[0]}. Give "
                      f"--image-root DIR, or get them: {GET} {bench}; --allow-missing skips some, but not all")
    return [(picture, paths[name], *box) for name, *box in images]

def choices(bench, subset, model, args):
    """A bench (from here on: bench, one of its files, model, args): items as assets/benchmarks.json says."""
    (rows, spec), items = rows_of(bench, subset, args), []      # (row, names of images, texts)
    for row in rows:
        names = [spec.get("name", "{}").format(re.sub("http.*/", "", str(row[k]))) for k in spec["image"]]
        texts = row[spec["text"][0]] if len(spec["text"]) == 1 else [row[k] for k in spec["text"]]
        if bench != "valse" or row["mturk"]["caption"] >= 2:        # of three annotators
            items += [(row, names, t) for t in (map(orders, texts) if "orders" in spec else [texts])]
    found = iter(find(bench, args, [(name, *[row[k] for k in spec.get("crop", ())])
                                    for row, names, _ in items for name in names]))
    labels = [str(row[spec["macro"]]) for row, _, _ in items] if "macro" in spec else []
    count, out = Counter(labels), spec.get("left_out", ())
    labels = [None if x in out or count[x] < spec.get("least", 1) else x for x in labels]
    images, texts = [tuple(next(found) for _ in names) for _, names, _ in items], [tuple(t) for _, _, t in items]
    rules = {name.format(subset): rule for name, rule in spec.get("rules", {"{}": "choice"}).items()}
    yield Choices(rules, images, texts, labels)
    for name in spec.get("sets", ()):       # pair, set: of the same objects, and all of it must be correct
        sets = {}
        for (_, names, _), image, text in zip(items, images, texts):
            first, relation, *_, last = os.path.basename(names[0]).split("_")       # mug_left_of_plate.jpeg
            key = first, last, name == "pair" and relation in ("left", "right")
            sets[key] = [x + y for x, y in zip(sets.get(key, [(), ()]), (image, text))]
        yield Choices({f"{subset}_{name}": "choice"}, *zip(*sets.values()))

def orders(caption):
    """A caption and ARO's four shuffles: nouns, and adjectives; all others; the words of each three; the threes.
    Cut to 30 words and cleaned as there. The shuffles are random, seeded by the caption; tags are of concepts.py."""
    words, rng = default_extractor().words(caption), random.Random(caption)
    places = range(len(words))
    nouns = [i for i in places if words[i][2] in ("NN", "NNS", "NNP", "NNPS", "QN")]
    adjectives = [i for i in places if words[i][2] in ("JJ", "JJR", "JJS", "ORG")]
    others, threes = [i for i in places if i not in nouns + adjectives], [places[i:i + 3] for i in places[::3]]
    shuffles = []
    for groups in [nouns, adjectives], [others], threes:
        moved = {i: j for group in groups for i, j in zip(group, rng.sample(group, len(group)))}
        shuffles.append([moved.get(i, i) for i in places])
    shuffles.append([i for three in rng.sample(threes, len(threes)) for i in three])
    texts = [caption] + [" ".join(caption[slice(*words[i][:2])] for i in order) for order in shuffles]
    return [" ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:30]) for text in texts]

def retrieval(bench, subset, model, args):
    if subset == "data":
        data = CaptionFile(args.data, args.image_root, args.image_key, args.caption_key)
        pairs = [((lambda _, *place: load_image([*place]), row["key"], *row["image"])       # a member of a tar shard
                  if isinstance(row["image"], list) else (picture, os.path.join(args.image_root, row["image"])),
                  row["captions"][0], row["captions"][0]) for row in map(data.sample, range(len(data)))]
    else:
        rows = [(row["image"], caption) for row in rows_of(bench, subset, args)[0] for caption in row["caption"]]
        pairs = [(image, i, rows[i][1]) for i, image in enumerate(find(bench, args, [(name,) for name, _ in rows]))]
    texts = {key: caption for _, key, caption in pairs}
    row, column = ({x: i for i, x in enumerate(dict.fromkeys(xs))} for xs in ([p[0] for p in pairs], texts))
    positive = torch.zeros(len(row), len(column), dtype=torch.bool)
    positive[[row[image] for image, _, _ in pairs], [column[key] for _, key, _ in pairs]] = True
    prefix = "" if subset == "data" else f"{subset}_"
    yield Ranking([(image,) for image in row], [(text,) for text in texts.values()], positive,
                  {f"{prefix}{way}_r{k}": (way, k) for way in ("i2t", "t2i") for k in (1, 5, 10)})

def zero_shot(bench, subset, model, args):
    """A class is the normalised mean of its prompts' normalised features (Radford et al. 2021)."""
    spec, known = TABLE[bench], {"templates": [TABLE[bench].get("prompt", "a photo of a {}.")]}
    path = os.path.join(args.data_dir, spec["folder"]) if "folder" in spec else args.data or ""
    try:
        if "torchvision" in spec:
            load = getattr(torchvision.datasets, spec["torchvision"])
            data = load(path, download=args.command == "download", **spec["split"])
        else:
            data = torchvision.datasets.ImageFolder(path, loader=load_image)
            text = Path(ASSETS / "imagenet.json" if bench == "imagenet" else args.classes or "").read_text("utf-8")
            known |= json.loads(text) if bench == "imagenet" else {"classes": text.strip().splitlines()}
    except (RuntimeError, OSError) as error:
        raise Missing(f"{bench}: {error}; get it: {spec.get('by_hand', GET + ' ' + bench)}") from None
    names = [name for name, _ in getattr(data, "samples", ())] or [f"{path} {i}" for i in range(len(data))]
    images = [(lambda _, i: data[i][0], name, i) for i, name in enumerate(names)]
    classes, n = known.get("classes", data.classes), spec.get("n", len(images))
    if len(data.classes) != len(classes) or len(images) != n and not args.allow_missing:
        raise ValueError(f"{bench}: {len(data.classes)} classes, {len(images)} images instead of {len(classes)}, {n}")
    labels = next(getattr(data, name) for name in ("targets", "labels", "_labels") if hasattr(data, name))
    texts = [tuple(prompt.replace("{}", c.replace("_", " ")) for prompt in known["templates"]) for c in classes]
    yield Ranking([(image,) for image in images], texts, F.one_hot(torch.as_tensor(labels), len(classes)).bool(),
                  {"top1": ("i2t", 1), "top5": ("i2t", 5)})

def scenes(bench, subset, model, args, n=1000, seed=1):
    """Held-out built-in scenes: two objects that training never showed together, in captions it never saw."""
    def shown(name, data, i):
        return data[i]["image"]

    for split, of in ("val", seed), ("train", seed + 1000):
        data, rng, rows = Scenes(n, split, of, model.config.image_size), random.Random(seed), []
        images = [((shown, f"{split} {of} {i}", data, i),) for i in range(n)]
        for ((c1, s1), (c2, s2)), cells, _ in map(data.objects, range(n)):
            c3 = rng.choice([c for c in COLOURS if c not in (c1, c2)])      # a colour and a shape that are not there
            s3 = rng.choice([s for s in SHAPES if s not in (s1, s2)])
            (x1, y1), (x2, y2) = ((cell % 2, cell // 2) for cell in cells)
            where = ("left of" if x1 < x2 else "right of") if x1 != x2 else "above" if y1 < y2 else "below"
            rows.append(dict(c1=c1, s1=s1, c2=c2, s2=s2, c3=c3, s3=s3, where=where))
        for name, templates in TABLE["scenes"]["templates"].items():
            texts = [tuple(text.format(**row) for text in templates) for row in rows]
            if split == "val" or name == "np_binding":
                yield Choices({name if split == "val" else f"seen_{name}": "choice"}, images, texts)
            if split == "val" and name == "swap_att":       # the first text of which is the caption
                same = [sorted(text.split(" and ")) for text, _ in texts]
                same = torch.tensor([[a == b for a in same] for b in same])
                yield Ranking(images, [text[:1] for text in texts], same, {"i2t_r1": ("i2t", 1), "t2i_r1": ("t2i", 1)})
    def lonely(name, i):
        rng = random.Random(f"{seed} {i}")
        return data.render([objects[i % 48]], [rng.randrange(4)], rng)
    objects, alone = [(c, s) for c in COLOURS for s in SHAPES], [((lonely, f"single {seed} {i}", i),) for i in range(n)]
    for name, part in ("single", slice(2)), ("single_colour", slice(1)), ("single_shape", slice(1, 2)):
        fits = torch.tensor([[objects[i % 48][part] == o[part] for o in objects] for i in range(n)])
        yield Ranking(alone, [(f"a {c} {s}",) for c, s in objects], fits, {name: ("i2t", 1)})

BENCHES = {bench: choices if "files" in spec else zero_shot for bench, spec in TABLE.items()}
BENCHES |= {"scenes": scenes, "retrieval": retrieval}

def read(benches, model, args):
    """-> {bench: [Choices or Ranking, ...]}, and what is not there (an error, unless that is allowed)."""
    tasks, missing, every = {}, [], benches == ["all"]
    for bench in BENCHES if every else benches:
        subsets = TABLE.get(bench, {}).get("files", [bench])
        for subset in ["data"] if bench == "retrieval" and args.data and not os.path.isdir(args.data) else subsets:
            try:
                tasks.setdefault(bench, []).extend(BENCHES[bench](bench, subset, model, args))
            except Missing as error:
                missing.append(str(error))
                if not (every or args.allow_missing and (tasks[bench] or subset != list(subsets)[-1])):
                    raise
    return {bench: parts for bench, parts in tasks.items() if parts}, missing

def fetch(url, path, sha256=None):
    """Make sure that this file lies at path: curl resumes what an earlier call broke off. Raises ValueError."""
    by_hand, part = f"try again to resume, or fetch {url} by hand and put it at {path}", path + ".part"
    if not os.path.isfile(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        command = ["curl", "-fL", "-C", "-", "--connect-timeout", "10", "-o", part, url]
        if not shutil.which("curl") or subprocess.run(command).returncode:
            raise ValueError(f"cannot download {url}: {by_hand}")
        os.replace(part, path)
    if sha256 and hashlib.sha256(Path(path).read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{path} is not the official file, of sha256 {sha256[:12]}...: delete it and {by_hand}")

def download(args):
    """download BENCH ... --data-dir DIR: what may be fetched of them; of the rest, how to get it."""
    for bench in args.files:
        if bench not in BENCHES:
            raise ValueError(f"no bench {bench!r} to download: expected some of {', '.join(BENCHES)}")
        spec = TABLE[bench]
        if "torchvision" in spec:
            list(zero_shot(bench, bench, None, args))
        for file in [*spec.get("files", {}).values(), *spec.get("archives", [])]:
            path, makes = (os.path.join(args.data_dir, file.get(key, file["path"])) for key in ("path", "makes"))
            if "url" in file and (os.path.isfile(path) or not os.path.isdir(makes)):
                fetch(file["url"], path, file.get("sha256"))
            if os.path.isfile(path) and makes != path:
                shutil.unpack_archive(path, os.path.dirname(makes))
                os.remove(path)     # not before it is unpacked as a whole
        print(f"{bench}, by hand: {spec['by_hand'].replace('DATA', args.data_dir)}" if "by_hand" in spec else bench)

@torch.no_grad()
def interpolate(model, initial, weight):
    """WiSE-FT (Wortsman et al. 2022): model's weights become (1 - weight) * initial's + weight * its own."""
    ours, start = asdict(model.config), initial.state_dict()
    differ = [key for key, value in asdict(initial.config).items() if value not in ("", ours[key]) and
              key not in ("name", "logit_scale", "logit_bias", "value_tokens")]     # "": a bare file has no tokenizer
    if differ or not 0 <= weight <= 1:
        raise ValueError(f"--interpolate {weight:g}: expected 0 (--init) to 1 (--checkpoint), and as --init the "
                         f"weights that --checkpoint was tuned from; what differs: {', '.join(differ) or 'nothing'}")
    for key, value in model.state_dict().items():
        value.lerp_(start.get(key, value), 1 - weight)      # a logit_bias that only the tuned model has stays
    return model

def paired(a, b, images, samples=2000, seed=0):
    """n items right (1) or wrong (0) by A and B -> B - A in percent, low, high (95 %), McNemar's p, gained, lost."""
    change, images = np.subtract(b, a), np.unique(images, return_inverse=True)[1]
    draws = 100 * bootstrap([(images, change, np.ones(len(change)))], samples, seed)[:, 0]
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
    return draws[0], *np.quantile(draws[1:], (0.025, 0.975)), min(1.0, 2 * tail / 2 ** (gained + lost)), gained, lost

def compare(args):
    """compare A.json B.json: B - A in percent, items gained (right in B only) and lost (--items: each of them).
    Interval: 95 %, paired bootstrap over images; p: exact McNemar test, of items taken as independent."""
    try:
        files = [json.loads(Path(path).read_text("utf-8")) for path in args.files]
        a, b = ({f"{bench} {name}": {**r, "data": (file["protocol"], file["data_sha256"][bench])} for bench, subsets in
                 file["results"].items() for name, r in subsets.items() if "correct" in r} for file in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"compare {' '.join(args.files)}: expected two files of --json ({error!r})") from None
    print(f"{compare.__doc__}\n\n{'percent':32s}     n      A      B   B - A    95 % interval        p  gained  lost")
    for key, x, y in ((key, a[key], b[key]) for key in a if key in b):
        if any(x[k] != y[k] for k in ("n", "data", "image")):
            raise ValueError(f"{key}: A ({x['n']} items) and B ({y['n']}) differ in items, data or protocol version")
        difference, low, high, p, gained, lost = paired(x["correct"], y["correct"], x["image"])
        print(f"{key:32s}{x['n']:6d} {100 * x['accuracy']:6.1f} {100 * y['accuracy']:6.1f}  {difference:+6.1f}  "
              f"{low:+6.1f} .. {high:+6.1f}  {p:7.2g}  {gained:6d}{lost:6d}")
        for items, sign in (("gained", 1), ("lost", -1)) if args.items else ():
            changed = np.flatnonzero(np.subtract(y["correct"], x["correct"]) == sign)
            print("".join(f"    {items}: {x['items'][i]}\n" for i in changed), end="")
    print("in one file only: " + (", ".join(a.keys() ^ b.keys()) or "none"))

def evaluate(args):
    """Without a command: what --checkpoint or --init scores on the benches."""
    benches, start = args.bench.split(","), args.init or args.model
    for name in set(benches) - {*BENCHES, "all"}:
        raise ValueError(f"no bench {name!r}: expected all, or one of {', '.join(BENCHES)}, joined by commas")
    if bool(args.checkpoint) + bool(start) != 1 + bool(args.interpolate):
        raise ValueError("give what to evaluate: --checkpoint FILE, or --init SOURCE (or --model NAME for its default "
                         "weights), or both with --interpolate A")
    if WORLD > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    model = CLIP.load(args.checkpoint) if args.checkpoint else CLIP.from_pretrained(args.init, args.model)
    if args.interpolate:
        model = interpolate(model, CLIP.from_pretrained(args.init, args.model), float(args.interpolate))
    model = set_tokenizer(model, args.tokenizer) if args.tokenizer else model
    started, (tasks, missing) = time.time(), read(benches, model.to(args.device).eval(), args)
    results = run(benches, model, args, tasks=tasks)
    print0(f"\n{time.time() - started:.1f} s" + "".join(f"\nnot there: {line}" for line in missing))
    if args.json and RANK == 0:
        data = {bench: repr([([Path(x[1]).name for row in task.images for x in row], task.texts) for task in parts])
                for bench, parts in tasks.items()}      # the names of image files, and all texts
        Path(args.json).write_text(json.dumps({
            "checkpoint": args.checkpoint or start, "sha256": fingerprint(model), "protocol": PROTOCOL,
            "data_sha256": {bench: hashlib.sha256(x.encode()).hexdigest() for bench, x in data.items()},
            "settings": {**vars(args), "torch": torch.__version__, "processes": WORLD},
            "missing": missing, "results": results}))
    if dist.is_initialized():
        dist.destroy_process_group()

COMMANDS = {f.__name__: f for f in (evaluate, download, compare)}

def parser():
    p = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="\n\n".join(
            ["benches"] + [f"{name}: {spec['protocol']} {spec['source']}" for name, spec in TABLE.items()] +
            ["commands"] + [f.__doc__ for f in COMMANDS.values()] + ["plot and show: see plot --help"]))
    p.add_argument("command", nargs="?", choices=COMMANDS, default="evaluate")
    for flag, options in json.loads((ASSETS / "evaluate.json").read_text("utf-8")).items():
        p.add_argument(flag, **options, **({"type": type(options["default"])} if "default" in options else {}))
    p.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    return p

def main(argv):
    if argv[:1] in (["plot"], ["show"]):    # drawn by a script of its own
        return runpy.run_path(str(ASSETS.parent / "tests" / "pictures.py"))["main"](argv)
    args = parser().parse_args(argv)
    try:
        COMMANDS[args.command](args)
    except (ValueError, OSError) as error:      # what a user can mend; anything else is ours, and keeps its trace
        if RANK:
            time.sleep(3)       # process 0 says it
            sys.exit(1)
        sys.exit(f"evaluate.py: {str(error).strip().splitlines()[-1]}")

if __name__ == "__main__":
    main(sys.argv[1:])
