"""Pictures for the README and for papers, drawn with pillow only: training curves, and where concepts attend.

    python tests/pictures.py plot out/a/log.jsonl out/b/log.jsonl --output curves.png
    python tests/pictures.py show --checkpoint out/a/last.pt,out/b/last.pt --scene 5 --output attention.png
    python tests/pictures.py show --checkpoint X --image photo.jpg --caption "a cat on a red couch"
"""
import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image as to_pil

from concepts import extract
from data import Scenes, load_image
from model import CLIP
from pooling import concept_pool

CURVES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")      # Okabe and Ito 2008
HEAT = "#000004", "#fcffa4", "#bc3754"      # from, to and between
ROUND = [m * 10.0 ** e for e in range(-9, 10) for m in (1, 2, 5)]


def read_log(path):
    """A log.jsonl of train.py -> {"loss": {step: value}, "scenes.swap_att": {step: percent}, ...}."""
    curves = {}
    for line in Path(path).read_text("utf-8", "replace").splitlines():
        try:
            row = json.loads(line)
            found = {f"{bench}.{name}": 100 * r["accuracy"] for bench, subsets in row.get("eval", {}).items()
                     for name, r in subsets.items()} | row
            for key in [k for k, v in found.items() if "step" in row and type(v) in (int, float) and math.isfinite(v)]:
                curves.setdefault(key, {})[row["step"]] = found[key]    # after a resume, the later of two
        except (ValueError, AttributeError, TypeError):
            print(f"{path}: a line skipped that is not of train.py")
    return curves


def plot(args):
    """plot LOG.jsonl ...: curves of the loss and each evaluated subset in percent, or those of --keys."""
    logs, font = [read_log(path) for path in args.files], ImageFont.load_default(26)
    known = dict.fromkeys(key for log in logs for key in log)
    keys = args.keys.split(",") if args.keys else [key for key in known if key == "loss" or "." in key]
    if not logs or not all(logs) or not keys or not set(keys) <= set(known) or len(logs) > len(CURVES):
        raise ValueError(f"plot takes up to {len(CURVES)} logs, none empty, and --keys from: {', '.join(known)}")
    columns, top = min(3, len(keys)), 40 * len(logs) + 40
    canvas = Image.new("RGB", (720 * columns, top - len(keys) // -columns * 480), "white")      # at twice its size
    draw = ImageDraw.Draw(canvas)
    for y, path, colour in zip(range(40, top, 40), args.files, CURVES):
        draw.line((120, y, 170, y), colour, 6)
        draw.text((186, y), Path(path).resolve().parent.name, "black", font, "lm")
    for i, key in enumerate(keys):
        left, bottom = 720 * (i % columns) + 120, 480 * (i // columns) + top + 400      # of the axes, 560 x 350
        curves = {c: np.array(sorted(log[key].items())).T for c, log in zip(CURVES, logs) if key in log}    # (2, n)
        last, highest = np.concatenate(list(curves.values()), 1).max(1).clip(1e-9)
        lowest = min(0, *(value.min() for _, value in curves.values()))
        unit = next(u for u in ROUND if (lowest // u + 5) * u >= highest)
        draw.text((left, bottom - 374), key, "black", font, "ls")
        for k in range(6):
            draw.line((left, bottom - 70 * k, left + 560, bottom - 70 * k), "#DDDDDD", 2)
            draw.text((left - 14, bottom - 70 * k), f"{(lowest // unit + k) * unit:.4g}", "black", font, "rm")
            draw.text((left + 112 * k, bottom + 14), f"{last * k / 5:.4g}", "black", font, "ma")
        for colour, (step, value) in curves.items():
            points = zip(left + 560 * step / last, bottom - 70 * (value / unit - lowest // unit))
            draw.line(list(points), colour, 5, "curve")
    canvas.resize((canvas.width // 2, canvas.height // 2), Image.Resampling.LANCZOS).save(args.output or "curves.png")


@torch.no_grad()
def show(args):
    """show --checkpoint A,B ...: where --concepts (or those of --caption) attend in --image (or the --scene).
    A row a checkpoint: the image, and a heat map a concept of softmax_t(V p), a square a patch, from 0 (black) to the
    largest weight in the row (light yellow), with the cosine of the concept and what it pools."""
    paths = (args.checkpoint or "").split(",")
    for number, path in enumerate(paths):
        model = CLIP.load(path).eval()
        row = ({"image": load_image(args.image), "caption": ""} if args.image else
               Scenes(args.scene + 1, "val", 1, model.config.image_size)[args.scene])
        concepts = args.concepts or extract(args.caption or row["caption"])
        if not concepts:
            raise ValueError("show has no concepts for --image: give --concepts, or a --caption that holds them")
        tokens = model.encode_image(model.transform(row["image"])[None], True, True)[1]     # (1, T, D)
        texts = model.encode_text(model.tokenize(concepts), True)                           # (N, D)
        scores = F.cosine_similarity(concept_pool(tokens, texts)[0], texts)                 # (N,)
        attention = (tokens[0] @ texts.T).softmax(0).T                                      # (N, T)
        side, seen = math.isqrt(attention.shape[1]), transforms.Compose(model.transform.transforms[:-1])(row["image"])
        seen = ImageOps.fit(to_pil(seen), (224, 224), Image.Resampling.BICUBIC)         # as the model sees it
        canvas = canvas if number else Image.new("RGB", (240 * len(concepts) + 240, 280 * len(paths)), "white")
        texts = [f"{concept[:30]}\ncosine {score:.2f}" for concept, score in zip(concepts, scores)]
        texts = [f"{Path(path).resolve().parent.name}\nmaximum {attention.max():.3f}, mean {1 / side ** 2:.3f}"] + texts
        for i, text in enumerate(texts):
            heat = to_pil((attention[i - 1] / attention.max()).view(1, side, side)).resize((224, 224), 0)
            heat = Image.blend(seen.convert("L").convert("RGB"), ImageOps.colorize(heat, *HEAT), 0.8)
            canvas.paste(heat if i else seen, (240 * i + 8, 280 * number + 8))
            ImageDraw.Draw(canvas).text((240 * i + 8, 280 * number + 236), text, "black", ImageFont.load_default(14))
    canvas.save(args.output or "attention.png")


COMMANDS = {"plot": plot, "show": show}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog="\n\n".join(f.__doc__ for f in COMMANDS.values()))
    p.add_argument("command", choices=COMMANDS)
    p.add_argument("files", nargs="*", help="plot: log.jsonl of train.py, up to 7")
    p.add_argument("--keys", help="plot: curves, joined by commas, such as loss,scenes.swap_att")
    p.add_argument("--checkpoint", help="show: checkpoints, joined by commas")
    p.add_argument("--image", help="show: an image file")
    p.add_argument("--scene", type=int, default=0, help="show: number of a held-out built-in scene (0)")
    p.add_argument("--concepts", nargs="+", help="show: phrases")
    p.add_argument("--caption", help="show: text to take the concepts from")
    p.add_argument("--output", help="the .png to write (curves.png, attention.png)")
    return p


def main(argv):
    args = parser().parse_args(argv)
    try:
        COMMANDS[args.command](args)
    except (ValueError, OSError) as error:
        sys.exit(f"pictures.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
