"""The picture at the top of the README: a caption, its phrases, and where each phrase looks in the image.

    python tests/study/method_picture.py --checkpoint out/nano/last.pt --output assets/method.png

The maps are those of the given model on a held-out scene: the similarity of each patch token with the phrase, whose
softmax is the attention that pools the patches (XAC). Needs matplotlib.
"""
import argparse
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from concepts import extract
from data import Scenes
from model import CLIP
from pooling import concept_similarity

INK = "#222222"
COLOURS = ("#c04f15", "#1f6f8b")       # one for each phrase, apart also for colour-blind readers


def box(axes, x, y, width, height, text, colour, fill="white", size=11):
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.006,rounding_size=0.012",
                           facecolor=fill, edgecolor=colour, linewidth=1.6)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK, fontsize=size)


def arrow(axes, start, end, colour=INK):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, linewidth=1.4, color=colour,
                                   shrinkA=2, shrinkB=2, zorder=0))     # behind the boxes


def image_at(figure, image, x, y, width, height, colour=None, **options):
    axes = figure.add_axes((x, y, width, height))
    shown = axes.imshow(image, **options)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour or INK)
        spine.set_linewidth(2 if colour else 1)
    return shown


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", required=True, help="a checkpoint of train.py's default run")
parser.add_argument("--scene", type=int, default=30, help="which held-out scene (30)")
parser.add_argument("--output", default="assets/method.png", help="the picture to write (assets/method.png)")
args = parser.parse_args()

model = CLIP.load(args.checkpoint).eval()
row = Scenes(1000, "val", seed=1)[args.scene]
phrases = extract(row["caption"])
with torch.inference_mode():
    pixels = model.transform(row["image"])[None]                                        # (1, 3, S, S)
    _, patch_tokens = model.encode_image(pixels, normalize=True, return_tokens=True)    # (1, T, D)
    concepts = model.encode_text(model.tokenize(phrases), normalize=True)               # (2, D)
    maps = (patch_tokens[0] @ concepts.T).T                                             # (2, T)
    pooled = concept_similarity(patch_tokens, concepts)[0].tolist()                     # (2,)
side = model.config.image_size // model.config.patch_size
maps = maps.view(len(phrases), side, side).numpy()

figure = plt.figure(figsize=(11, 4.4), dpi=200)
canvas = figure.add_axes((0, 0, 1, 1))
canvas.set_xlim(0, 1)
canvas.set_ylim(0, 1)
canvas.axis("off")
titles = ((0.12, "image and caption"), (0.36, "phrases"), (0.6, "similarity of each\npatch with the phrase"),
          (0.875, "the two losses"))
for x, title in titles:
    canvas.text(x, 0.93, title, ha="center", va="center", fontsize=12, color=INK)

image_at(figure, row["image"], 0.03, 0.36, 0.18, 0.45)
box(canvas, 0.01, 0.14, 0.22, 0.1, row["caption"], INK, size=10)
low, high = maps.min(), maps.max()
for number, (phrase, colour) in enumerate(zip(phrases, COLOURS)):
    y = 0.5 - 0.44 * number
    box(canvas, 0.29, y + 0.12, 0.14, 0.1, phrase, colour)
    arrow(canvas, (0.235, 0.19), (0.285, y + 0.17), colour)                 # caption -> phrase
    arrow(canvas, (0.435, y + 0.17), (0.53, y + 0.17), colour)              # phrase -> map
    arrow(canvas, (0.215, 0.62 - 0.1 * number), (0.53, y + 0.26), "#aaaaaa")   # image -> map
    shown = image_at(figure, maps[number], 0.535, y, 0.135, 0.345, colour, cmap="cividis", vmin=low, vmax=high)
    arrow(canvas, (0.675, y + 0.17), (0.755, y + 0.17), colour)
    text = (f"NPC: “{phrase}” fits the image\n\n"
            f"XAC: it fits the patches that it\nattends to (cosine {pooled[number]:.2f})")
    box(canvas, 0.76, y + 0.06, 0.23, 0.22, text, colour, size=9.5)
bar = figure.colorbar(shown, cax=figure.add_axes((0.685, 0.06, 0.006, 0.12)))
bar.ax.tick_params(labelsize=6)
figure.savefig(args.output)
print(f"wrote {args.output}: scene {args.scene}, {row['caption']!r}")
