"""All of SugarCrepe, ours against the official protocol item by item, with the same weights; and both times.

    python tests/bench_sugarcrepe.py --data-dir data            # the folder that holds sugarcrepe/*.json

A randomly initialised open_clip ViT-B/32, and a random image under each of the 1,560 file names: no download. The
official way encodes image, caption and negative of each item by themselves (--cached: each different one once, which
changes nothing but the time). Prints, for each subset, both counts of correct items and on how many they differ.
"""
import argparse
import functools
import glob
import json
import os
import subprocess
import sys
import tempfile
import time

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
from bench_tokenizer import openai_tokenizer  # noqa: E402

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--data-dir", default="data")
p.add_argument("--cached", action="store_true", help="official, but each image and text only once")
p.add_argument("--threads", type=int, default=2)
args = p.parse_args()
torch.set_num_threads(args.threads)
torch.manual_seed(0)
subsets = {os.path.basename(path)[:-5]: list(json.load(open(path, encoding="utf-8")).values())
           for path in sorted(glob.glob(os.path.join(args.data_dir, "sugarcrepe", "*.json")))}
if not subsets:
    sys.exit(f"no json files under {os.path.join(args.data_dir, 'sugarcrepe')}: evaluate.py --bench sugarcrepe gets "
             "them")

with tempfile.TemporaryDirectory() as folder:
    for name in sorted({item["filename"] for items in subsets.values() for item in items}):
        Image.effect_noise((6, 6), 90).convert("RGB").resize((100, 80)).save(os.path.join(folder, name))
    theirs = open_clip.create_model("ViT-B-32").eval().requires_grad_(False)
    for parameter in theirs.parameters():
        if parameter.ndim < 2:      # biases and norms too, or half the weights would be zeros and ones
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as f:
        f.write(openai_tokenizer(folder)[0])

    started = time.time()
    subprocess.run([sys.executable, "evaluate.py", "--init", os.path.join(folder, "model.safetensors"), "--model",
                    "ViT-B-32", "--tokenizer", os.path.join(folder, "tokenizer.json"), "--bench", "sugarcrepe",
                    "--data-dir", os.path.abspath(args.data_dir), "--image-root", folder, "--json",
                    os.path.join(folder, "ours.json")], cwd=os.path.dirname(HERE), check=True,
                   env={**os.environ, "OMP_NUM_THREADS": str(args.threads)})
    ours, our_time = json.load(open(os.path.join(folder, "ours.json")))["results"]["sugarcrepe"], time.time() - started

    tokenize, transform = open_clip.get_tokenizer("ViT-B-32"), open_clip.image_transform(224, is_train=False)

    def image(name):
        return theirs.encode_image(transform(Image.open(os.path.join(folder, name)))[None], normalize=True)

    def text(caption):
        return theirs.encode_text(tokenize([caption]), normalize=True)

    if args.cached:
        image, text = functools.lru_cache(None)(image), functools.lru_cache(None)(text)
    started = time.time()
    for subset, items in subsets.items():
        official = []
        for item in items:
            features = image(item["filename"])
            positive, negative = (features @ text(item[key]).T for key in ("caption", "negative_caption"))
            official.append(int(positive.item() > negative.item()))
        differ = sum(a != b for a, b in zip(official, ours[subset]["correct"]))
        print(f"{subset}: {len(items)} items, correct: ours {sum(ours[subset]['correct'])}, official {sum(official)}; "
              f"they differ on {differ}", flush=True)
    print(f"ours {our_time:.0f} s with start and loading, official {time.time() - started:.0f} s")
