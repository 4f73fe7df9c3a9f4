"""Benchmarks, a function each, over one shared scorer: python evaluate.py --checkpoint out/nano/last.pt --bench scenes

Every bench returns {subset: accuracy, n, 95 % interval, chance}; a tie is never counted as correct, because a model
that scores two captions alike has not told them apart. Intervals are Wilson's, of a binomial proportion.
"""
import argparse
import hashlib
import http.client
import json
import math
import os
import random
import sys
import urllib.request

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import COLOURS, SHAPES, CaptionFile, Scenes, load_image
from model import CLIP, set_tokenizer


# -----------------------------------------------------------------------------
# the shared scorer: each image and each text is encoded once

class Images(torch.utils.data.Dataset):
    """load(i) -> PIL image, transformed; (i, None, why) for what cannot be read."""

    def __init__(self, load, length, transform):
        self.load, self.length, self.transform = load, length, transform

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        try:
            return index, self.transform(self.load(index)), ""
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return index, None, " ".join(str(error).split())


@torch.inference_mode()
def encode_images(model, load, length, args, hint=""):
    """load(i) -> PIL image for i < length; returns normalised image_features (length, D), float32, on the CPU.

    Unreadable images are an error (with `hint`, what to do), or with --allow-missing rows of NaN, counted.
    """
    loader = DataLoader(Images(load, length, model.transform), args.batch_size, num_workers=args.workers,
                        collate_fn=list)
    features = torch.full((length, model.config.embed_dim), float("nan"))
    bad = []
    for batch in tqdm(loader, "images", leave=False, disable=length < 2000):
        bad += [why for _, image, why in batch if image is None]
        if bad and not args.allow_missing:
            raise ValueError(f"cannot read an image: {bad[0]}. {hint}, or skip such images with --allow-missing")
        index, images = [i for i, x, _ in batch if x is not None], [x for _, x, _ in batch if x is not None]
        if images:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                x = torch.stack(images).to(args.device, model.logit_scale.dtype)
                x = model.encode_image(x, normalize=True)
            features[index] = x.float().cpu()
    if bad:
        print(f"skipped {len(bad)} of {length} images, the first: {bad[0]}")
    if len(bad) == length:
        raise ValueError(f"none of the {length} images can be read, the first: {bad[0]}. {hint}")
    return features


@torch.inference_mode()
def encode_texts(model, texts, args):
    """list of N str -> normalised text_features (N, D), float32, on the CPU.

    Equal token rows are encoded once: faster, and texts that the tokenizer cannot tell apart tie exactly.
    """
    tokens, inverse = model.tokenize(texts).unique(dim=0, return_inverse=True)      # (U, L), (N,)
    causal = model.config.family == "clip"      # behind the end-of-text token nothing is seen: cut it off
    lengths = tokens.argmax(1) + 1 if causal else torch.full((len(tokens),), tokens.shape[1])
    features = torch.empty(len(tokens), model.config.embed_dim)
    batches = lengths.argsort().split(args.batch_size)
    for index in tqdm(batches, "texts", leave=False, disable=len(tokens) < 5000):
        batch = tokens[index, :lengths[index].max()].to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            features[index] = model.encode_text(batch, normalize=True).float().cpu()
    return features[inverse]


def choose(image_features, text_features):
    """Whether the first text is strictly the best: (N, D), (N, K, D) -> (N,) bool."""
    scores = (image_features[:, None] * text_features).sum(-1)      # (N, K); equal rows tie, unlike in a matmul
    return scores[:, 0] > scores[:, 1:].amax(1)


def first_of(model, image_features, texts, args):
    """The same from N lists of K texts, encoded together, so that texts of equal tokens tie whatever the batches."""
    features = encode_texts(model, [text for row in texts for text in row], args)   # (N K, D)
    return choose(image_features, features.view(len(texts), -1, features.shape[1]))


def proportion(correct, chance):
    """(n,) bool -> accuracy with Wilson's 95 % interval low..high, n, chance, and item by item: correct, 0s and 1s."""
    n, z2 = len(correct), 1.959964 ** 2
    p = correct.double().mean().item()
    centre, half = p + z2 / (2 * n), math.sqrt(z2 * p * (1 - p) / n + (z2 / (2 * n)) ** 2)
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return {"accuracy": p, "n": n, "low": max(0.0, min(p, low)), "high": min(1.0, max(p, high)), "chance": chance,
            "correct": correct.int().tolist()}


def recall_at_1(similarity, positive):
    """Whether the best column is a positive of its row, ties wrong: (N, M) float, (N, M) bool -> (N,) bool."""
    best = similarity.masked_fill(~positive, -2).amax(1)
    return best > similarity.masked_fill(positive, -2).amax(1)


# -----------------------------------------------------------------------------
# benches: (model, args) -> {subset: proportion}

def scenes(model, args, n=1000, seed=1):
    """Held-out built-in scenes: two objects that training never showed together, in captions it never saw.

    np_binding: "a red circle" against "a red square", where the square is blue; swap_att: the two colours exchanged in
    the caption; replace_att / replace_obj: the first object with a colour / shape that the scene does not hold.
    i2t_r1, t2i_r1: retrieval among all n; whatever shows (or says) the same two objects counts as correct.
    """
    data, rng = Scenes(n, "val", seed, model.config.image_size), random.Random(seed)
    pairs = [data.objects(i)[0] for i in range(n)]
    image_features = encode_images(model, lambda i: data[i]["image"], n, args)

    def caption(*objects):
        return " and ".join(f"a {colour} {shape}" for colour, shape in objects)

    rows = {"np_binding": [], "swap_att": [], "replace_att": [], "replace_obj": []}
    for (c1, s1), (c2, s2) in pairs:
        true = caption((c1, s1), (c2, s2))
        c3 = rng.choice([c for c in COLOURS if c not in (c1, c2)])
        s3 = rng.choice([s for s in SHAPES if s not in (s1, s2)])
        rows["np_binding"].append((caption((c1, s1)), caption((c1, s2))))
        rows["swap_att"].append((true, caption((c2, s1), (c1, s2))))
        rows["replace_att"].append((true, caption((c3, s1), (c2, s2))))
        rows["replace_obj"].append((true, caption((c1, s3), (c2, s2))))
    results = {name: proportion(first_of(model, image_features, texts, args), 0.5) for name, texts in rows.items()}

    similarity = image_features @ encode_texts(model, [caption(*p) for p in pairs], args).T
    scene = [str(sorted(p)) for p in pairs]
    positive = torch.tensor([[a == b for a in scene] for b in scene])
    chance = positive.float().mean().item()
    results["i2t_r1"] = proportion(recall_at_1(similarity, positive), chance)
    results["t2i_r1"] = proportion(recall_at_1(similarity.T, positive), chance)
    return results


def retrieval(model, args):
    """Image-to-text and text-to-image R@1 on the rows of --data: whether the best text (image) is the query's own.

    Rows with the same image path belong together, and so do equal captions: an image's positives are all its captions
    wherever they stand, a caption's positives all images that carry it. Captions without a readable image are left out.
    """
    if not args.data:
        raise ValueError("--bench retrieval needs --data pairs.csv (and --image-root DIR, if its paths are relative)")
    data = CaptionFile(args.data, args.image_root, args.image_key, args.caption_key)
    names, captions = (list(dict.fromkeys(column)) for column in zip(*((n, c) for n, c, _ in data.rows if c.strip())))
    if len(names) < 2 or len(captions) < 2:
        raise ValueError(f"{args.data} holds {len(names)} images with {len(captions)} captions: retrieval needs two")
    image_features = encode_images(model, lambda i: load_image(os.path.join(args.image_root, names[i])), len(names),
                                   args, f"Check --image-root ({args.image_root or 'not given'})")
    row, column = {n: i for i, n in enumerate(names)}, {c: i for i, c in enumerate(captions)}
    positive = torch.zeros(len(names), len(captions), dtype=torch.bool)
    for name, caption, _ in data.rows:
        if caption.strip():
            positive[row[name], column[caption]] = True
    positive = positive[~image_features.isnan().any(1)]
    image_features = image_features[~image_features.isnan().any(1)]
    shown = positive.any(0)                             # captions that kept an image
    positive = positive[:, shown]
    similarity = image_features @ encode_texts(model, [c for c, s in zip(captions, shown) if s], args).T
    chance = positive.float().mean().item()
    return {"i2t_r1": proportion(recall_at_1(similarity, positive), chance),
            "t2i_r1": proportion(recall_at_1(similarity.T, positive.T), chance)}


SUGARCREPE = {  # file -> sha256; 1652, 788, 1406, 245, 666, 2062 and 692 items
    "replace_obj": "9d299600639947e9d15281a9ded1382b376cf4ea088a8d08a1314bfe76e81898",
    "replace_att": "9fe55fd4c0a9ad1f85d486d9f6d0215b41f867eb025026e7f7b5ce44352545ee",
    "replace_rel": "356bcc2fc4c6aed3f4d9fd50acc58489bb1fe70c28791f9368d4cbf9ea39cdc9",
    "swap_obj": "073cdb8e253d053614e80710834d9773b09dbc1dd0a412f6f9492262caa1dcad",
    "swap_att": "7a7ce04e5c4c80412b48c6f0c1347fb1a2f5d54c0be6aa429b64d390e442f8d0",
    "add_obj": "1b9d76b93139a937b8dc1ada92a4f05ecc821bb3c291d752428bafadd4bb0682",
    "add_att": "012d88d729693d193760e6f3393b06a1cf874380a9db0062e937201199fe044d",
}
COCO = "Get http://images.cocodataset.org/zips/val2017.zip (about 780 MB), unzip it, and give --image-root .../val2017"


def sugarcrepe(model, args):
    """SugarCrepe (Hsieh et al. 2023): a COCO val2017 image against its caption and one hard negative, 7 subsets.

    As the official code does, an item is correct if the caption scores strictly higher than the negative.
    """
    items = {}
    for name, sha256 in SUGARCREPE.items():
        path = os.path.join(args.data_dir, "sugarcrepe", f"{name}.json")
        fetch(f"https://raw.githubusercontent.com/RAIVNLab/sugar-crepe/main/data/{name}.json", path, sha256)
        with open(path, encoding="utf-8") as f:
            items[name] = list(json.load(f).values())   # keyed by id; the ids of swap_obj have gaps
    names = sorted({item["filename"] for rows in items.values() for item in rows})
    paths = [os.path.join(args.image_root, name) for name in names]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing and (not args.allow_missing or len(missing) == len(paths)):
        raise ValueError(f"{len(missing)} of {len(paths)} images are missing, the first is {missing[0]}. {COCO}"
                         + ("" if args.allow_missing else ", or skip what is missing with --allow-missing"))
    features = dict(zip(names, encode_images(model, lambda i: load_image(paths[i]), len(paths), args, COCO)))

    results = {}
    for name, rows in items.items():
        kept = [row for row in rows if not features[row["filename"]].isnan().any()]
        if len(kept) < len(rows):
            print(f"sugarcrepe {name}: {len(rows) - len(kept)} of {len(rows)} items skipped, without their image")
        if kept:
            images = torch.stack([features[row["filename"]] for row in kept])           # (N, D)
            texts = [(row["caption"], row["negative_caption"]) for row in kept]
            results[name] = proportion(first_of(model, images, texts, args), 0.5)
    return results


def sugarcrepe_means(results):
    """The averages that are in use, which differ: over items, over the 7 subsets, over the means of the 3 groups."""
    if len(results) < len(SUGARCREPE):
        return {}
    accuracy = {name: r["accuracy"] for name, r in results.items()}
    means = {group: float(np.mean([a for name, a in accuracy.items() if name.startswith(group)]))
             for group in ("replace", "swap", "add")}
    micro = sum(r["accuracy"] * r["n"] for r in results.values()) / sum(r["n"] for r in results.values())
    return {**means, "macro_7": float(np.mean(list(accuracy.values()))),
            "macro_3": float(np.mean(list(means.values()))), "micro": micro}


BENCHES = {"scenes": scenes, "retrieval": retrieval, "sugarcrepe": sugarcrepe}
MEANS = {"sugarcrepe": sugarcrepe_means}


# -----------------------------------------------------------------------------
# files and tables

def fetch(url, path, sha256):
    """Make sure that the file of this checksum lies at path: downloads it, resuming what an earlier call broke off."""
    by_hand = f"fetch {url} by hand and put it at {path}"
    if not os.path.isfile(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        part = path + ".part"
        have = os.path.getsize(part) if os.path.exists(part) else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                have = have if reply.status == 206 else 0       # a server may ignore the range
                total = int(reply.headers.get("Content-Length", 0)) + have
                with open(part, "ab" if have else "wb") as f, tqdm(
                        total=total, initial=have, unit="B", unit_scale=True, desc=os.path.basename(path)) as bar:
                    while chunk := reply.read(1 << 16):
                        bar.update(f.write(chunk))
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"cannot download {url} ({error}): try again to resume, or {by_hand}") from None
        os.replace(part, path)
    with open(path, "rb") as f:
        found = hashlib.sha256(f.read()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} is not the official file (sha256 {found[:12]}..., expected {sha256[:12]}...): "
                         f"delete it and try again, or {by_hand}")


def print_table(bench, results, means=None):
    width = max(len(name) for name in results)
    print(f"\n{bench:{width}s}    chance  accuracy      n    95 % interval")
    for name, r in results.items():
        print(f"{name:{width}s}  {100 * r['chance']:8.1f}  {100 * r['accuracy']:8.1f}  {r['n']:5d}"
              f"    {100 * r['low']:5.1f} .. {100 * r['high']:5.1f}")
    if means:
        print("means: " + "  ".join(f"{name} {100 * mean:.1f}" for name, mean in means.items()))


def run(benches, model, args, quiet=False):
    """The named benches on a model in eval mode, each printed as a table; returns {bench: {subset: proportion}}."""
    results = {}
    for bench in benches:
        results[bench] = BENCHES[bench](model, args)
        if not quiet:
            print_table(bench, results[bench], MEANS[bench](results[bench]) if bench in MEANS else None)
    return results


def parser():
    p = argparse.ArgumentParser(description="Evaluate a checkpoint.", epilog="benches: " + ", ".join(
        f"{name} ({f.__doc__.splitlines()[0].rstrip('.:')})" for name, f in BENCHES.items()),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # what to evaluate
    p.add_argument("--checkpoint", help="a checkpoint of train.py, such as out/nano/last.pt; needs no other flag")
    p.add_argument("--init", help="instead of --checkpoint: public weights (hub id, folder or file)")
    p.add_argument("--model", help="with --init: the architecture, where the source does not say it")
    p.add_argument("--tokenizer", help="a tokenizer.json, for weights that came without one")
    p.add_argument("--bench", default="scenes", help="names joined by commas: " + ", ".join(BENCHES))
    # data
    p.add_argument("--data-dir", default="data", help="where benchmark files are kept, and downloaded to")
    p.add_argument("--image-root", default="", help="folder of the images (sugarcrepe: COCO val2017)")
    p.add_argument("--data", help="retrieval: a .csv, .tsv or .jsonl file of pairs")
    p.add_argument("--image-key", help="retrieval: the column of image paths; found by itself where its name is usual")
    p.add_argument("--caption-key", help="retrieval: the column of captions")
    p.add_argument("--allow-missing", action="store_true", help="skip images that cannot be read, and count them")
    # how
    p.add_argument("--json", metavar="FILE", help="write the results to FILE")
    p.add_argument("--batch-size", type=int, default=250, help="images, or texts, a forward pass")
    p.add_argument("--workers", type=int, default=0, help="processes that read images")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the towers (autocast)")
    return p


def main():
    p = parser()
    args = p.parse_args()
    args.benches = args.bench.split(",")
    for name in args.benches:
        if name not in BENCHES:
            p.error(f"no bench {name!r}: expected one of {', '.join(BENCHES)}, joined by commas")
    if bool(args.checkpoint) == bool(args.init or args.model):
        p.error("give what to evaluate: --checkpoint FILE, or --init SOURCE (or --model NAME for its default weights)")
    try:
        model = CLIP.load(args.checkpoint) if args.checkpoint else CLIP.from_pretrained(args.init, args.model)
        if args.tokenizer:
            set_tokenizer(model, args.tokenizer)
        results = run(args.benches, model.to(args.device).eval(), args)
    except (ValueError, OSError) as error:      # what a user can mend; anything else is ours, and keeps its trace
        sys.exit(f"evaluate.py: {error}")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"checkpoint": args.checkpoint or args.init or args.model, "results": results,
                       "means": {b: MEANS[b](results[b]) for b in results if b in MEANS}}, f, indent=1)
        print(f"\nwrote {args.json}")


if __name__ == "__main__":
    main()
