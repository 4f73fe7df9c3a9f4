"""Real pairs in three commands: the emoji of the npm package emoji-datasource-google as train.csv and val.csv.

    npm pack emoji-datasource-google && tar xf emoji-datasource-google-*.tgz
    python tests/bench/make_emoji.py package data/emoji
    python train.py --data data/emoji/train.csv --val-data data/emoji/val.csv --epochs 30 --batch-size 128 --lr 3e-3

Each caption is the emoji's name, its skin tone if it has one, and its kind: "woman firefighter with dark skin tone,
person role". Every tenth emoji is held out with all its skin tones. About 3,700 images of 64 x 64 pixels.
"""
import csv
import json
import os
import sys

TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}
package, output = sys.argv[1:]
rows = {"train": [], "val": []}
with open(os.path.join(package, "emoji.json"), encoding="utf-8") as f:
    emoji = sorted(json.load(f), key=lambda e: e["sort_order"])
for number, e in enumerate(emoji):
    name, kind = (e["name"] or e["short_name"]).lower(), e["subcategory"].replace("-", " ")
    for tone, variant in {"": e, **e.get("skin_variations", {})}.items():
        image = os.path.abspath(os.path.join(package, "img", "google", "64", variant["image"]))
        tones = " and ".join(TONES[t] for t in tone.split("-") if t)
        if os.path.exists(image):
            rows["val" if number % 10 == 9 else "train"].append(
                [image, f"{name}{f' with {tones} skin tone' if tones else ''}, {kind}"])
os.makedirs(output, exist_ok=True)
for split, pairs in rows.items():
    with open(os.path.join(output, split + ".csv"), "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([["image", "caption"], *pairs])
    print(f"{output}/{split}.csv: {len(pairs)} pairs, such as {pairs[len(pairs) // 2][1]!r}")
