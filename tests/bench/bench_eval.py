"""All of SugarCrepe and SugarCrepe++, ours against the official protocol item by item, same weights; and both times.

    python tests/bench/bench_eval.py --data-dir data      # the folder that holds sugarcrepe/*.json and sugarcrepe_pp/*.json
    python tests/bench/bench_eval.py --data-dir data --layers 2 --cached      # the same counts, in minutes
    OMP_NUM_THREADS=1 python tests/bench/bench_eval.py --threads 1 --images data/coco/val2017 --rounds 3    # the speed

With --images, only the items of the first 100 photographs there that have any, in rounds: in each, ours on all items
and the official way on a twelfth of them; the median of the ratios of their CPU times is printed.

A randomly initialised open_clip ViT-B/32, and a random image under each of the 1,560 file names: no download. The
official way encodes the image and the texts of each item by themselves (--cached: each different one once, which
changes nothing but the time; --timed N: only N items, spread over all, so that the ratio of the times takes minutes).
Prints, for each subset, both counts of correct items and on how many they differ.
"""
import argparse
import contextlib
import functools
import glob
import io
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), HERE]
import evaluate  # noqa: E402
from bench_tokenizer import openai_tokenizer  # noqa: E402
from model import CLIP, MODELS, set_tokenizer  # noqa: E402

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--data-dir", default="data")
p.add_argument("--bench", default="sugarcrepe,sugarcrepe_pp")
p.add_argument("--cached", action="store_true", help="official, but each image and text only once")
p.add_argument("--timed", type=int, help="official on so many items only; its time is scaled to all")
p.add_argument("--layers", type=int, default=12, help="of both towers")
p.add_argument("--threads", type=int, default=2)
p.add_argument("--images", help="folder of photographs, instead of random images under the file names")
p.add_argument("--rounds", type=int, default=1, help="with --images")
args = p.parse_args()
torch.set_num_threads(args.threads)
torch.manual_seed(0)
rows = {}
for bench in args.bench.split(","):
    for path in sorted(glob.glob(os.path.join(args.data_dir, bench, "*.json"))):
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
        rows[bench, os.path.basename(path)[:-5]] = list(found.values()) if isinstance(found, dict) else found
if args.images:
    named = {item["filename"] for items in rows.values() for item in items}
    photographs = sorted(named & set(os.listdir(args.images)))[:100]
    rows = {key: [item for item in items if item["filename"] in photographs] for key, items in rows.items()}
if not rows:
    sys.exit(f"no json files under {args.data_dir}: python evaluate.py download sugarcrepe gets them")

with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
    for name in sorted({item["filename"] for items in rows.values() for item in items}):
        if args.images:
            os.symlink(os.path.abspath(os.path.join(args.images, name)), os.path.join(folder, name))
            continue
        Image.effect_noise((6, 6), 90).convert("RGB").resize((100, 80)).save(os.path.join(folder, name))
    theirs = open_clip.model.CLIP(512, {"layers": args.layers, "width": 768, "patch_size": 32, "image_size": 224},
                                  {"layers": args.layers, "width": 512, "heads": 8}).eval()
    for parameter in theirs.parameters():
        if parameter.ndim < 2:      # biases and norms too, or half the weights would be zeros and ones
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as f:
        f.write(openai_tokenizer(folder)[0])
    MODELS["bench"] = replace(MODELS["ViT-B-32"], vision=(768, args.layers, 12, 3072),
                              text=(512, args.layers, 8, 2048))
    ours = CLIP.from_pretrained(os.path.join(folder, "model.safetensors"), "bench").eval()
    set_tokenizer(ours, os.path.join(folder, "tokenizer.json"))

    def seconds():
        """Of processors, not of the clock: others may use the machine."""
        return sum(os.times()[:4])

    def run_ours():
        started = seconds()
        with contextlib.redirect_stdout(io.StringIO()):     # of all that is skipped
            evaluate.run(ours, args.bench.split(","), data_dir=args.data_dir, image_root=folder, device="cpu",
                         allow_missing=True)
        return seconds() - started

    def run_official(items):
        started = seconds()
        for item in items:
            features = image(item["filename"])
            for key in ("caption", "caption2", "negative_caption"):
                if key in item:
                    (features @ text(item[key]).T).item()
        return seconds() - started

    tokenize, transform = open_clip.get_tokenizer("ViT-B-32"), open_clip.image_transform(224, is_train=False)

    def image(name):
        return theirs.encode_image(transform(Image.open(os.path.join(folder, name)))[None], normalize=True)

    def text(caption):
        return theirs.encode_text(tokenize([caption]), normalize=True)

    if args.images:
        every, ratios = sum(rows.values(), []), []
        print(f"{len(every)} items on {len(photographs)} photographs", flush=True)
        for number in range(args.rounds):
            some = every[number::12]
            ours_time, official_time = run_ours(), run_official(some) * len(every) / len(some)
            ratios.append(official_time / ours_time)
            print(f"ours {ours_time:.1f} s, official {official_time:.1f} s: {ratios[-1]:.1f} times", flush=True)
        print(f"median of {args.rounds}: {statistics.median(ratios):.1f} times as fast")
        sys.exit()
    ours_time, results = 0, {}
    for bench in args.bench.split(","):     # one after the other, for the time of each
        started = time.time()
        results |= evaluate.run(ours, [bench], data_dir=args.data_dir, image_root=folder, device="cpu")
        print(f"{bench}: ours {time.time() - started:.0f} s", flush=True)
        ours_time += time.time() - started

    if args.cached:
        image, text = functools.lru_cache(None)(image), functools.lru_cache(None)(text)
    count, official_time = sum(map(len, rows.values())), 0
    every = max(1, count // args.timed) if args.timed else 1
    for (bench, subset), items in rows.items():
        started, numbers = time.time(), range(0, len(items), every)
        official = {"": []} if bench == "sugarcrepe" else {"_itt": [], "_tot": []}
        for item in (items[i] for i in numbers):
            keys = [k for k in ("caption", "caption2", "negative_caption") if k in item]
            i, t = image(item["filename"]), [text(item[k]) for k in keys]
            *good, bad = [(i @ x.T).item() for x in t]
            official["_itt" if "_itt" in official else ""].append(int(min(good) > bad))
            if "_tot" in official:
                one, two, three = t
                official["_tot"].append(int((one @ two.T).item() > max((one @ three.T).item(), (two @ three.T).item())))
        official_time += (time.time() - started) * len(items) / len(numbers)
        for ending, correct in official.items():
            mine = [results[bench][subset + ending]["correct"][i] for i in numbers]
            print(f"{bench} {subset}{ending}: {len(correct)} items, correct: ours {sum(mine)}, official "
                  f"{sum(correct)}; they differ on {sum(a != b for a, b in zip(mine, correct))}", flush=True)
    print(f"ours {ours_time:.0f} s, official {official_time:.0f} s"
          f"{' (scaled)' * (every > 1)}: {official_time / ours_time:.1f} times as fast")
