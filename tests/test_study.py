"""The studies run, in small; what they measure is no matter of tests."""
import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def study(script, *args):
    command = [sys.executable, os.path.join(HERE, "study", script), *map(str, args)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_scenes_over_seeds(tmp_path):
    """Two arms, two seeds, then one more arm: the table has all, and complete runs are not repeated."""
    flags = ["--output", tmp_path, "--quick", "--seeds", "2", "--parts", "scratch", "--arms", "SigLIP, plain"]
    study("scenes.py", *flags)
    kept = tmp_path / "scratch" / "siglip--plain-0" / "last.pt"
    before = kept.stat().st_mtime_ns
    table = study("scenes.py", *flags, "C2LIP")
    assert kept.stat().st_mtime_ns == before
    assert "| SigLIP, plain | " in table and "| C2LIP | " in table
    assert "Differences from SigLIP, plain, in points:\n\n| | np binding" in table and "(p " in table


@pytest.mark.slow
def test_what_is_tuned_comes_first(tmp_path):
    """The part many trains what it tunes, and takes that model's figures in its own world."""
    table = study("scenes.py", "--output", tmp_path, "--quick", "--seeds", "1", "--parts", "many", "--arms", "C2LIP")
    before, tuned = tmp_path / "wide" / "clip--plain-0", tmp_path / "many" / "c2lip-0"
    rows = [json.loads(line) for line in open(before / "log.jsonl")]
    figures = next(row["eval"] for row in rows if "eval" in row and row["step"] == 4)
    assert f"| before | {100 * figures['scenes_many']['np_binding']['accuracy']:.1f} | " in table
    settings = json.loads(open(tuned / "log.jsonl").readline())["args"]
    assert settings["world"] == "many" and settings["init"] == str(before / "last.pt") and settings["loss"] == "clip"


@pytest.mark.slow
def test_photographs(tmp_path):
    """Made ones: training, retrieval, word exchanges, real layouts of COCO's items, and fine-tuning."""
    rng = np.random.default_rng(0)
    captions = ["a red dog runs after a white cat", "two men sit on a green bench near a small boat",
                "a girl in a blue dress holds a black ball", "three birds fly over a brown house"]
    (tmp_path / "data" / "images").mkdir(parents=True)
    for split, count in (("train", 48), ("test", 12)):
        with open(tmp_path / "data" / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption"])
            for i in range(count):
                pixels = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{split}{i}.jpg")
                writer.writerow([f"{split}{i}.jpg", captions[i % 4]])
    coco = tmp_path / "coco" / "coco"
    coco.mkdir(parents=True)
    (coco / "val2017").symlink_to(tmp_path / "data" / "images")
    (coco / "boxes.json").write_text(json.dumps({"test0.jpg": [["dog", 0, 0, 40, 30]]}))
    (tmp_path / "coco" / "sugarcrepe").mkdir()
    item = {"filename": "test0.jpg", "caption": captions[0], "negative_caption": captions[1]}
    for subset in ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att"):
        path = tmp_path / "coco" / "sugarcrepe" / f"{subset}.json"
        path.write_text(json.dumps({"0": item}))
    table = study("photos.py", "--data", tmp_path / "data", "--coco", tmp_path / "coco",
                  "--output", tmp_path / "out", "--arms", "plain", "c2lip, on", "--seeds", 1,
                  "--steps", 2, "--tune-steps", 2, "--batch-size", 16)
    assert "c2lip, on - plain" in table
    for row in ("t2i r10", "sugarcrepe swap", "pointing", "swap noun", "swap noun, another", "substitute attribute", "negate"):
        assert f"| {row} | " in table
