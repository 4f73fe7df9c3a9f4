"""Scenes, tables of pairs, tar shards, images of every kind, batches and their order."""
import csv
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import PIL
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

import data as data_module
from concepts import negate, swap_negatives
from data import (COLOURS, SHAPES, WORLDS, CaptionFile, Collate, Epochs, EveryOther, Scenes, Seeded, default_workers,
                  exchange_between, join_pair, load_fast, load_image, normalize_images, normalize_pixels, permute, string_id,
                  split_caption, split_sentences, train_tokenizer, train_transform, unnormalize_images, weigh_sources)
from losses import plan_batch
from model import MODELS, Tokenizer, image_transform


def nano():
    text, size, longest = train_tokenizer([Scenes(50)[i]["caption"] for i in range(50)])
    return replace(MODELS["nano"], tokenizer=text, vocab_size=size, context_length=longest)


# ------------------------------------------------------------------------------------------------------- scenes

def test_scenes_are_functions_of_seed_and_index():
    a, b = Scenes(100, seed=3), Scenes(5, seed=3)
    for i in range(5):
        assert a[i]["caption"] == b[i]["caption"] and a[i]["image"].tobytes() == b[i]["image"].tobytes()
    assert any(Scenes(5, seed=4)[i]["caption"] != a[i]["caption"] for i in range(5))


def test_held_out_pairs_are_never_trained_on():
    def pairs(split):
        return {str(sorted(Scenes(3000, split)[i]["objects"])) for i in range(3000)}
    train, val = pairs("train"), pairs("val")
    assert len(train) > 500 and len(val) > 50 and not train & val


def test_scene_shows_what_its_caption_says():
    for i in range(50):
        scene = Scenes(50)[i]
        colours = {c for c, _ in scene["objects"]}
        shown = {rgb for count, rgb in scene["image"].getcolors() if count > 10}
        assert {name for name, rgb in COLOURS.items() if rgb in shown} == colours
        assert scene["caption"] == " and ".join(scene["concepts"])


def test_relations_change_captions_only_and_are_true():
    plain, some, always = (Scenes(200, "train", 1, relations=share) for share in (0.0, 0.4, 1.0))
    links = Counter()
    for i in range(200):
        a, b, c = plain[i], some[i], always[i]
        assert a["image"].tobytes() == b["image"].tobytes() == c["image"].tobytes()
        assert a["concepts"] == b["concepts"] == c["concepts"] and a["caption"] == " and ".join(a["concepts"])
        assert b["caption"] in (a["caption"], c["caption"])
        links["some"] += b["caption"] == c["caption"]
        first, second = c["concepts"]
        link = c["caption"].removeprefix(first).removesuffix(second).strip()
        links[link] += 1
        pixels = np.asarray(c["image"])
        (y0, x0), (y1, x1) = (np.argwhere((pixels == COLOURS[colour]).all(-1)).mean(0) for colour, _ in c["objects"])
        assert {"left of": x0 < x1, "right of": x0 > x1, "above": y0 < y1, "below": y0 > y1}[link]
    assert 50 < links.pop("some") < 110 and set(links) == {"left of", "right of", "above", "below"}


@pytest.mark.parametrize("world", WORLDS)
def test_paraphrases_of_scenes_say_the_same(world):
    opposite = {"and": "and", "left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for i in range(50):
        scene = Scenes(50, relations=0.5, world=world)[i]
        first, second, *rest = scene["concepts"]
        link = scene["caption"].removeprefix(first).split(second)[0].strip()
        assert scene["paraphrase"] == " and ".join([f"{second} {opposite[link]} {first}", *rest])


def test_scenes_of_today_are_those_of_yesterday():
    """What relations and negatives added must not move a pixel: checksums of the first scenes of the first version."""
    import zlib
    found = [zlib.crc32(Scenes(3, split, 5)[i]["image"].tobytes()) for split in ("train", "val") for i in range(3)]
    assert found == [403060592, 291228442, 4101428021, 2887291262, 1053140313, 1953539070]
    assert Scenes(3, "train", 5)[1]["caption"] == "a green cross and a red circle"


@pytest.mark.parametrize("relations", [0.0, 1.0])
def test_negatives_of_scenes_are_false_of_the_image(relations):
    def read(text):     # caption -> link, objects
        link = next(w for w in (" and ", " left of ", " right of ", " above ", " below ") if w in text)
        return link.strip(), [tuple(part.split()[1:]) for part in text.split(link)]
    for i in range(100):
        scene = Scenes(100, relations=relations, negative_images=True)[i]
        link, ((c0, s0), (c1, s1)) = read(scene["caption"])
        colours, colour, shape, places = scene["negatives"]
        assert read(colours) == (link, [(c1, s0), (c0, s1)])
        other, (new, kept) = read(colour)[1][1], read(colour)[1][0]
        assert other == (c1, s1) and kept == s0 and new in COLOURS and new not in (c0, c1)
        other, (kept, new) = read(shape)[1][1], read(shape)[1][0]
        assert other == (c1, s1) and kept == c0 and new in SHAPES and new not in (s0, s1)
        assert places == "" if link == "and" else read(places) == (link, [(c1, s1), (c0, s0)])
        # the image of the first negative: the two colours exchanged, pixel by pixel
        image, negative = np.asarray(scene["image"]), np.asarray(scene["negative_image"])
        is0, is1 = ((image == COLOURS[c]).all(-1) for c in (c0, c1))
        expected = image.copy()
        expected[is0], expected[is1] = COLOURS[c1], COLOURS[c0]
        assert (expected == negative).all() and is0.any() and is1.any()
    assert "negative_image" not in Scenes(1)[0]


def test_one_object_alone():
    for cell in range(4):
        image = np.asarray(Scenes(1).render([("red", "square")], [cell], random.Random(cell)))
        y, x = np.argwhere((image == COLOURS["red"]).all(-1)).mean(0)
        assert (y > 16, x > 16) == (cell // 2 == 1, cell % 2 == 1)


# ------------------------------------------------------------------------------------------------------- tables

@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a.png", "red"), ("b.jpg", "blue"), ("c.png", "green")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / name)
    return tmp_path


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("name, text", [
    ("t.csv", 'image,caption,concepts\na.png,"a red, red wall",a red wall|red\nb.jpg,a blue wall,\n'),
    ("t.tsv", 'image\tcaption\tconcepts\na.png\ta red, red wall\t["a red wall", "red"]\nb.jpg\ta blue wall\t\n'),
    ("t.jsonl", '{"image": "a.png", "caption": "a red, red wall", "concepts": ["a red wall", "red"]}\n\n'
                '{"image": "b.jpg", "caption": "a blue wall"}\n'),
    ("bom.csv", '\ufefffilepath,title,concepts\r\na.png,"a red, red wall",a red wall|red\r\nb.jpg,a blue wall,\r\n'),
])
def test_formats_give_the_same_rows(folder, name, text):
    data = CaptionFile(write(folder, name, text), str(folder))
    assert len(data) == 2 and data.captions == ["a red, red wall", "a blue wall"]
    assert data[0]["concepts"] == ["a red wall", "red"] and "concepts" not in data[1]
    assert data[0]["image"].size == (40, 30) and data[0]["image"].mode == "RGB"


@pytest.mark.parametrize("name, text, says", [
    ("none.csv", None, "no file"),
    ("t.parquet", "x", "expected a .csv, .tsv or .jsonl"),
    ("semicolon.csv", "image;caption\na.png;a wall\n", "columns or keys image;caption .split at commas"),
    ("tab.csv", "image\tcaption\na.png\ta wall\n", "split at commas in .csv, tabs in .tsv"),
    ("columns.csv", "image,words\na.png,a wall\n", "columns or keys image, words .*--caption-key"),
    ("empty.csv", "image,caption\n", "no rows"),
    ("t.jsonl", '{"image": "a.png"\n', "row 1: not an object in json"),
    ("list.jsonl", '[1, 2]\n', "row 1: not an object in json"),
])
def test_unusable_tables_say_what_to_do(folder, name, text, says):
    path = str(folder / name) if text is None else write(folder, name, text)
    with pytest.raises(ValueError, match=says) as error:
        CaptionFile(path, str(folder))
    assert "\n" not in str(error.value)


def test_rows_of_other_types_are_named_too(folder):
    path = write(folder, "t.jsonl", '{"image": "a.png", "caption": "a cat", "concepts": "[broken"}\n'
                 '{"image": "a.png", "caption": 7}\n{"image": null, "caption": "a cat"}\n'
                 '{"image": "a.png", "caption": "a cat", "concepts": ["a cat"]}\n')
    data = CaptionFile(path, str(folder))
    assert ["error" in data[i] for i in range(len(data))] == [True, False]
    assert data.skipped == [("a.png (row 2)", "caption 7: expected a text, or a list of texts"),
                            ("(no image) (row 3)", "no image")]


def test_cells_that_say_nothing_are_as_if_they_were_not_there(folder):
    """Blank ones, and NaN, which json.dumps writes for an empty cell of pandas: the next usual name has the caption."""
    nan = float("nan")
    rows = [{"image": "a.png", "txt": empty, "caption": "a wall", "concepts": empty, "negatives": empty, "units": empty,
             "negative_image": empty, "neighbours": empty} for empty in (nan, " ", "", [], None)]
    rows += [{"image": empty, "caption": "a wall"} for empty in (nan, " ", None)]
    data = CaptionFile(write(folder, "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows)), str(folder))
    assert [row.keys() for row in data] == [{"key", "image", "captions", "caption"}] * 5
    assert [why for _, why in data.skipped] == ["no image"] * 3
    text = CaptionFile(write(folder, "t.csv", "image,txt,caption\na.png,[],a wall\nb.jpg, ,a sea\n"), str(folder))
    assert [row["captions"] for row in text] == [["a wall"], ["a sea"]]


@pytest.mark.parametrize("value", [5, ["a.png"], ["a.png", 0, 9], {"path": "a.png"}])
def test_a_negative_image_is_a_path(folder, value):
    row = {"image": "a.png", "caption": "a wall", "negative_image": value}
    data = CaptionFile(write(folder, "t.jsonl", json.dumps(row)), str(folder))
    assert data[0]["error"] == f"negative_image {value}: expected a path"


def test_missing_column_by_name(folder):
    path = write(folder, "t.csv", "image,caption\na.png,a wall\n")
    with pytest.raises(ValueError, match="columns or keys caption, image .*--caption-key"):
        CaptionFile(path, str(folder), caption_key="text")


def test_annotations_of_coco_and_karpathy(folder):
    coco = {"info": {}, "images": [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.jpg"},
                                   {"id": 5, "file_name": "c.png"}],
            "annotations": [{"image_id": i, "id": n, "caption": f" caption {n}\n"} for n, i in enumerate((3, 7, 3, 7, 7))]}
    data = CaptionFile(write(folder, "captions_val.json", json.dumps(coco)), str(folder))
    assert [data.sample(i)["captions"] for i in range(2)] == [["caption 1", "caption 3", "caption 4"],
                                                              ["caption 0", "caption 2"]]
    assert data[1]["image"].getpixel((5, 5))[2] > 200 and data.lost_rows == 1 and data.skipped[0][0] == "c.png (row 3)"
    karpathy = {"dataset": "x", "images": [
        {"filename": name, "split": split, "sentences": [{"raw": f"{name} {k}", "tokens": []} for k in range(2)], **more}
        for name, split, more in (("a.png", "train", {}), ("b.jpg", "test", {}), ("c.png", "restval", {"filepath": "."}),
                                  ("d.png", "val", {}))]}
    path = write(folder, "dataset_x.json", json.dumps(karpathy))
    for name, captions in (("", ["a.png 0", "a.png 1", "c.png 0", "c.png 1"]), ("#test", ["b.jpg 0", "b.jpg 1"]),
                           ("#val", ["d.png 0", "d.png 1"])):
        assert CaptionFile(path + name, str(folder)).captions == captions
    assert CaptionFile(path, str(folder))[1]["image"].size == (40, 30)
    for text in ("[1]", "{", '{"images": 3}', '{"images": [{"id": 1}]}', "[" * 100_000, '{"annotations": [1]}', "{}"):
        with pytest.raises(ValueError, match="expected captions_.*json of COCO") as error:
            CaptionFile(write(folder, "x.json", text))
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    with pytest.raises(ValueError, match="no images of this split, but restval, test, train, val"):
        CaptionFile(f"{path}#dev")
    with pytest.raises(ValueError, match="captions_val.json has no splits: give it without #val"):
        CaptionFile(str(folder / "captions_val.json#val"))
    with pytest.raises(ValueError, match="no file .*y.json#val"):
        CaptionFile(str(folder / "y.json#val"))


def test_bad_rows_are_named_not_lost(folder):
    (folder / "zero.jpg").write_bytes(b"")
    Image.effect_noise((90, 90), 50).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:1500])
    path = write(folder, "t.csv", "image,caption\na.png,\nnone.png,a cat\nzero.jpg,a cat\ncut.jpg,a cat\n,a cat\n"
                 "a.png,a cat\n")
    data = CaptionFile(path, str(folder))
    rows = [data[i] for i in range(len(data))]
    assert data.skipped == [("a.png (row 1)", "no caption"), ("(no image) (row 5)", "no image")]
    assert ["error" in r for r in rows] == [True] * 3 + [False] and data.sample(3)["image"] == "a.png"
    assert "none.png" in rows[0]["key"] and "row 2" in rows[0]["key"] and "No such file" in rows[0]["error"]
    config = nano()
    rows = [Seeded(data, 0)[(0, i)] for i in range(len(data))]
    batch = Collate(image_transform(config), Tokenizer(config))(rows)
    assert len(batch["bad"]) == 3 and batch["keys"] == ["a.png (row 6)"] and len(batch["images"]) == 1


OLD = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="cannot read the TIFF that it writes itself")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", pytest.param("YCbCr", marks=OLD)])
def test_images_of_every_mode(tmp_path, mode):
    source = Image.new("RGBA", (20, 20), (200, 10, 10, 255)).convert("RGB")
    image = Image.new("I;16", (20, 20)) if mode == "I;16" else (
        Image.new("RGBA", (20, 20), (200, 10, 10, 0)) if mode == "RGBA" else source.convert(mode))
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    image.save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB" and loaded.size == (20, 20)
    if mode == "RGBA":      # nothing was drawn: white, not the hidden red
        assert loaded.getpixel((3, 3)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_and_colours_stay(tmp_path):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for image in (Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32))):
        image.save(tmp_path / "grey.png" if image.mode == "I;16" else tmp_path / "grey.tif")
    for name in ("grey.png", "grey.tif"):
        assert (np.asarray(load_image(tmp_path / name))[..., 1].reshape(-1) == np.arange(256)).all()
    Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK").save(tmp_path / "c.jpg", quality=100)
    Image.new("RGB", (16, 16), (200, 30, 40)).quantize(8).save(tmp_path / "p.png")
    for name in ("c.jpg", "p.png"):
        assert np.abs(np.asarray(load_image(tmp_path / name)).astype(int) - (200, 30, 40)).max() <= 6


# ------------------------------------------------------------------------------------------------------- pixels

def photographs(folder, count=6):
    """Smooth noise of the sizes of photographs, as JPEGs."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
        small.resize((500, 375) if i % 2 else (333, 500), Image.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    return [folder / f"{i}.jpg" for i in range(count)]


def test_bytes_become_the_numbers_of_to_tensor_and_normalize(tmp_path):
    """Pixels travel as uint8: the same numbers, bit by bit, as by RandomResizedCrop, ToTensor and Normalize."""
    for config in (MODELS["nano"], MODELS["ViT-B-32"]):
        usual = transforms.Compose([
            transforms.RandomResizedCrop(config.image_size, (0.9, 1), (3 / 4, 4 / 3), Image.BICUBIC),
            transforms.ToTensor(), transforms.Normalize(config.mean, config.std)])
        for seed, path in enumerate(photographs(tmp_path)):
            image = load_image(path)
            torch.manual_seed(seed)
            expected = usual(image)
            torch.manual_seed(seed)
            pixels = train_transform(config)(image)
            assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
            found = normalize_images(pixels, config)
            assert found.dtype == torch.float32 and torch.equal(found, expected)
            assert torch.equal(normalize_images(pixels[None], config)[0], expected)
            assert normalize_images(expected, config) is expected


def test_fast_decoding_differs_by_less_than_an_eye_sees(tmp_path):
    transform = train_transform(MODELS["ViT-B-32"])
    for seed, path in enumerate(photographs(tmp_path)):
        exact, fast = load_image(path), load_fast(str(path))
        assert isinstance(fast, torch.Tensor) and fast.shape == (3, *exact.size[::-1])
        torch.manual_seed(seed)
        a = transform(exact).float()
        torch.manual_seed(seed)
        b = transform(fast).float()
        assert a.shape == b.shape and (a - b).abs().max() <= 8 and ((a - b) ** 2).mean() < 255 ** 2 / 10 ** 5.5


def test_what_torchvision_cannot_decode_is_left_to_pillow(tmp_path):
    source = Image.effect_noise((40, 30), 90).convert("RGB")
    source.convert("CMYK").save(tmp_path / "cmyk.jpg")
    source.convert("L").save(tmp_path / "grey.jpg")
    source.save(tmp_path / "png.jpg", "PNG")
    source.save(tmp_path / "x.webp")
    source.save(tmp_path / "progressive.jpg", progressive=True)
    for name, kind in (("cmyk.jpg", Image.Image), ("png.jpg", Image.Image), ("x.webp", Image.Image),
                       ("grey.jpg", torch.Tensor), ("progressive.jpg", torch.Tensor)):
        image, expected = load_fast(str(tmp_path / name)), np.asarray(load_image(tmp_path / name))
        assert isinstance(image, kind)
        array = image.permute(1, 2, 0).numpy() if kind is torch.Tensor else np.asarray(image)
        assert np.abs(array.astype(int) - expected).max() <= 1
    content = (tmp_path / "progressive.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[:len(content) // 2])
    for name, says in (("cut.jpg", "truncated"), ("none.jpg", "No such file")):
        with pytest.raises(OSError, match=says):
            load_fast(str(tmp_path / name))
    with pytest.raises(ValueError, match="40 x 30 pixels are more than --max-pixels 100"):
        load_fast(str(tmp_path / "grey.jpg"), 100)
    path = shard(tmp_path / "a.tar", samples(0, 8))
    exact, fast = CaptionFile(path), CaptionFile(path, fast_decode=True)
    config = nano()
    collate = Collate(train_transform(config), Tokenizer(config))
    a, b = (collate([Seeded(data, 0)[(0, i)] for i in range(8)]) for data in (exact, fast))
    assert a["keys"] == b["keys"] and len(a["keys"]) == 8 and not b["bad"]
    assert a["images"].dtype == b["images"].dtype == torch.uint8 and a["images"].shape == b["images"].shape
    assert (a["images"].float() - b["images"].float()).abs().max() <= 8


def test_workers_by_default_are_the_cores_that_are_ours(tmp_path, monkeypatch):
    def group(files):
        for name, text in files.items():
            os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
            (tmp_path / name).write_text(text)
        return data_module.cgroup_cores(str(tmp_path), str(tmp_path / "own"))
    assert group({}) is None
    assert group({"cpu.max": "max 100000\n", "own": "0::/a/b\n"}) is None
    assert group({"a/cpu.max": "250000 100000\n", "a/b/cpu.max": "max 100000\n"}) == 2.5
    assert group({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}) == 2.5
    assert group({"cpu/cpu.cfs_quota_us": "50000\n"}) == 0.5
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12))
    for quota, ranks, expected in ((None, 1, 12), (None, 8, 1), (None, 4, 3), (6.5, 1, 6), (6.5, 2, 3), (0.5, 1, 1)):
        monkeypatch.setattr(data_module, "cgroup_cores", lambda: quota)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert default_workers() == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(500))
    monkeypatch.setattr(data_module, "cgroup_cores", lambda: None)
    assert default_workers() * 2 == 32


# ------------------------------------------------------------------------------------------------------- tar shards

def picture(i, kind="JPEG", size=(24, 20)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (i * 37 % 256, i * 91 % 256, i % 256)).save(buffer, kind)
    return buffer.getvalue()


def shard(path, members, **options):
    """Write a tar of (name, bytes)."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def samples(first, last, folder=""):
    for i in range(first, last):
        kind = ("jpg", "png", "webp", "jpeg")[i % 4]
        yield f"{folder}{i:09d}.{kind}", picture(i, "JPEG" if kind[0] == "j" else kind.upper())
        yield f"{folder}{i:09d}.json", json.dumps({"url": f"http://x/{i}.jpg", "caption": f"json {i}",
                                                   "alt": [f"alt {i}", f"other {i}"]}).encode()
        yield f"{folder}{i:09d}.txt", f"text {i}".encode()


@pytest.fixture
def shards(tmp_path):
    """Three shards of 20, 17 and 4 samples."""
    for number, (first, last) in enumerate(((0, 20), (20, 37), (37, 41))):
        shard(tmp_path / f"{number:05d}.tar", samples(first, last))
    return str(tmp_path / "{00000..00002}.tar")


def test_shards_and_tables_are_one_data_set(shards, folder):
    table = write(folder, "t.csv", "image,caption\na.png,a red wall\nb.jpg,a blue wall\n")
    data = CaptionFile(f"{shards}::{table}", str(folder))
    assert len(data) == 43 and data.skipped == []
    assert data.captions == [f"text {i}" for i in range(41)] + ["a red wall", "a blue wall"]
    for i in range(41):
        expected = load_image(io.BytesIO(picture(i, ("JPEG", "PNG", "WEBP", "JPEG")[i % 4])))
        assert data[i]["caption"] == f"text {i}" and data[i]["image"].tobytes() == expected.tobytes()
        assert data[i]["key"].endswith(f".tar {i:09d}")
    assert data[42]["image"].size == (40, 30) and "(row 2)" in data[42]["key"]
    assert CaptionFile(shards, caption_key="caption").captions[3] == "json 3"
    for part in data.parts:     # no object for each sample
        assert isinstance(part.index.content, np.ndarray) and isinstance(part.index.ends, np.ndarray)


def test_one_of_several_captions_by_seed_epoch_and_index(shards):
    data = CaptionFile(shards, caption_key="caption,alt")
    assert data[4]["captions"] == ["json 4", "alt 4", "other 4"]
    drawn = [[Seeded(data, 7)[(epoch, i)]["caption"] for epoch in range(40)] for i in (4, 5)]
    assert drawn == [[Seeded(data, 7)[(epoch, i)]["caption"] for epoch in range(40)] for i in (4, 5)]
    assert set(drawn[0]) == {"json 4", "alt 4", "other 4"} and [c[:-2] for c in drawn[0]] != [c[:-2] for c in drawn[1]]
    for epoch in range(40):     # a paraphrase is another one, and does not change which is drawn
        row = Seeded(data, 7, paraphrases=True)[(epoch, 4)]
        assert row["caption"] == drawn[0][epoch] and row["paraphrase"] in {*data[4]["captions"]} - {row["caption"]}
    assert all(len(set(data.sample(i)["captions"])) > 1 for i in range(5)) and "paraphrase" not in Seeded(data, 7)[(0, 4)]
    with pytest.raises(ValueError, match="no images with captions.*keys .*caption.*--caption-key"):
        CaptionFile(shards, caption_key="nothing")


def only_indices(rows):
    return [(row["key"], row["caption"], row["seed"]) for row in rows]


@pytest.mark.parametrize("workers", range(4))
def test_no_sample_is_lost_or_doubled(shards, workers):
    """Over 1, 2 and 4 ranks and two epochs, each sample comes once an epoch, in one global order."""
    orders = []
    for world in (1, 2, 4):
        ranks = []
        for rank in range(world):
            data = CaptionFile(shards)
            stream = Epochs(len(data), 8, 3, rank, world)
            stream.stop = 2 * stream.steps_per_epoch
            context = "fork" if workers else None
            ranks.append(list(DataLoader(Seeded(data, 3), batch_sampler=stream, num_workers=workers,
                                         collate_fn=only_indices, multiprocessing_context=context)))
        steps = [sum((rank[step] for rank in ranks), []) for step in range(len(ranks[0]))]
        half = len(steps) // 2
        for epoch in steps[:half], steps[half:]:
            assert Counter(c for step in epoch for _, c, _ in step) == Counter(f"text {i}" for i in range(41))
        orders.append(steps)
    assert orders[0] == orders[1] == orders[2]


def test_index_is_cached_and_follows_the_shard(tmp_path, monkeypatch):
    path = shard(tmp_path / "a.tar", samples(0, 3))
    scans, scan = [], data_module.tar_members
    monkeypatch.setattr(data_module, "tar_members", lambda *args: scans.append(args) or scan(*args))
    assert len(CaptionFile(path)) == 3 == len(CaptionFile(path)) and len(scans) == 1
    assert len(os.listdir(tmp_path)) == 2
    shard(path, samples(5, 10))
    assert CaptionFile(path).captions == [f"text {i}" for i in range(5, 10)] and len(scans) == 2
    stat = os.stat(path)        # same size, other time
    shard(path, [(n, c.replace(b"text", b"TEXT")) for n, c in samples(5, 10)])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert os.path.getsize(path) == stat.st_size and CaptionFile(path).captions[0] == "TEXT 5" and len(scans) == 3
    assert len(os.listdir(tmp_path)) == 2 and len(os.listdir(tmp_path / ".c2lip-index")) == 1     # old ones are removed
    shutil.rmtree(tmp_path / ".c2lip-index")

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "makedirs", refuse)      # a folder that cannot be written
    with pytest.warns(UserWarning, match="kept in memory only"):
        assert len(CaptionFile(path)) == 5
    with pytest.warns(UserWarning):
        assert len(CaptionFile(path)) == 5 and len(scans) == 5


def count(path, results):
    results.put(len(CaptionFile(path)))


def test_processes_index_the_same_shard_at_once(tmp_path):
    path = shard(tmp_path / "a.tar", samples(0, 60))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=count, args=(path, results)) for _ in range(4)]
    [p.start() for p in processes]
    assert [results.get(timeout=60) for _ in processes] == [60] * 4
    [p.join() for p in processes]
    assert len(os.listdir(tmp_path)) == 2


def test_what_is_missing_is_named(tmp_path):
    members = dict(samples(0, 5))
    del members["000000001.png"], members["000000002.json"], members["000000002.txt"], members["000000003.json"]
    path = shard(tmp_path / "a.tar", [*members.items(), ("000000004.txt", b"second 4"), ("notes.pdf", b"x")])
    data = CaptionFile(path)
    assert data.captions == ["text 0", "text 3", "text 4"]
    assert [(name.split()[-1], why) for name, why in data.skipped] == [
        ("000000001", "no image"), ("000000002", "no caption"), ("000000004", "no image")]
    data = CaptionFile(path, caption_key="caption")
    assert data.captions == ["json 0", "json 4"]
    lost = [name.split()[-1] for name, why in data.skipped if why.startswith("no caption")]
    assert lost == ["000000002", "000000003"]


@pytest.mark.parametrize("share", [0.999, 0.95, 0.7, 0.5, 0.2])
def test_truncated_shard(tmp_path, share):
    whole = shard(tmp_path / "whole.tar", samples(0, 20), bufsize=512)
    content = open(whole, "rb").read()
    ends = [m.offset_data + m.size for m in tarfile.open(whole) if m.name.endswith(".txt")]
    used = -(-ends[-1] // 512) * 512
    (tmp_path / "cut.tar").write_bytes(content[:int(used * share)])
    data = CaptionFile(str(tmp_path / "cut.tar"))
    kept = sum(end <= int(used * share) for end in ends)
    assert len(data) in (kept, kept + 1) and data.captions[:kept] == [f"text {i}" for i in range(kept)]
    assert not any("error" in data[i] for i in range(len(data)))
    assert "cut.tar is damaged or cut off from byte" in data.skipped[-1][0]


def test_damaged_header_in_the_middle(tmp_path, monkeypatch):
    path = shard(tmp_path / "a.tar", samples(0, 10))
    content = bytearray(open(path, "rb").read())
    start = next(m.offset for m in tarfile.open(path) if m.name == "000000006.png" or m.name == "000000006.webp")
    for damage in (b"\xff" * 300, bytes(512)):
        content[start:start + len(damage)] = damage
        (tmp_path / "b.tar").write_bytes(content)
        data = CaptionFile(str(tmp_path / "b.tar"))
        assert len(data) == 6 and f"b.tar is damaged or cut off from byte {start:,} on" in data.skipped[-1][0]
    (tmp_path / "c.tar").write_bytes(b"this is no tar file" * 99)
    with pytest.raises(ValueError, match="no images with captions.*c.tar"):
        CaptionFile(str(tmp_path / "c.tar"))
    (tmp_path / "d.tar").write_bytes(b"")
    for _ in range(2):
        data = CaptionFile(f"{tmp_path}/{{a,c,d}}.tar")
        assert len(data) == 10 and len(data.skipped) == 2
        monkeypatch.setattr(data_module, "tar_members", None)       # nor are tars without any row read again


def test_members_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    noise = io.BytesIO()
    Image.effect_noise((60, 60), 50).save(noise, "JPEG")
    members = [("zero.jpg", b""), ("text.jpg", b"not an image at all"), ("cut.jpg", noise.getvalue()[:900]),
               ("bomb.png", picture(0, "PNG", (200, 200))), ("blank.jpg", picture(1)), ("good.jpg", picture(2)),
               ("json.jpg", picture(3))]
    texts = [(name[:-3] + "txt", b" \n" if name == "blank.jpg" else b"a cat") for name, _ in members]
    data = CaptionFile(shard(tmp_path / "a.tar", members + texts + [("json.json", b"{broken")]))
    rows = [data[i] for i in range(len(data))]
    assert [row["key"].split()[-1] for row in rows if "error" in row] == ["zero", "text", "cut", "bomb"]
    assert data.skipped == [(f"{tmp_path}/a.tar blank", "no caption")] and "decompression bomb" in rows[3]["error"]
    assert all("\n" not in row["error"] for row in rows if "error" in row)


def test_a_shard_that_vanishes_during_training(tmp_path):
    path = shard(tmp_path / "a.tar", samples(0, 3))
    data = CaptionFile(path)
    os.remove(path)
    row = Seeded(data, 0)[(0, 1)]
    assert "No such file" in row["error"] and row["key"] == f"{path} 000000001"


def test_names_with_folders_dots_and_great_length(tmp_path):
    for number, format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        names = [f"./{'folder/' * 30}{i}.photo.v2" for i in range(3)] + ["b/1", "a/1"]
        members = [(name + ending, content) for i, name in enumerate(names)
                   for ending, content in ((".JPG", picture(i)), (".txt", name.encode()))]
        data = CaptionFile(shard(tmp_path / f"{number}.tar", members, format=format))
        assert data.captions == names and not any("error" in data[i] for i in range(5)) and data.skipped == []


@pytest.mark.parametrize("source, says", [
    ("{00000..00004}.tar", "no file 00003.tar: expected tables"),
    ("00000.tar::other.csv", "no file other.csv: expected tables"),
    ("{3..1}.tar", "no file"),
    ("00000.zip", "expected a .csv, .tsv or .jsonl file, or .tar"),
])
def test_sources_that_are_not_there(shards, tmp_path, source, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "00000.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=says) as error:
        CaptionFile(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "captions"])
def test_large_tables_are_read_row_by_row(tmp_path, kind):
    """Every process reads them, so no more than what is kept may be in memory: here 200 of 2,200 bytes a row."""
    n, rows = 5000, ({"image": f"{i:09}.jpg", "caption": f"a wall {i} " + "x" * 100, "raw": "y" * 2000}
                     for i in range(5000))
    path, images = tmp_path / ("t.jsonl" if kind == "jsonl" else "t.csv"), tmp_path / "images.csv"
    with open(path, "w", newline="") as f:
        table = csv.DictWriter(f, ("image", "caption", "raw"))
        if kind != "jsonl":
            table.writeheader()
        for row in rows:
            f.write(json.dumps(row) + "\n") if kind == "jsonl" else table.writerow(row)
    images.write_text("image\n" + "".join(f"{i:09}.jpg\n" for i in range(n)))
    tracemalloc.start()
    data = CaptionFile(str(images), captions=str(path)) if kind == "captions" else CaptionFile(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) == n and data.sample(n - 1)["captions"][0].startswith("a wall 4999 ")
    assert peak < 8e6, peak     # all rows at once: 19e6


def test_shards_are_read_sample_by_sample(tmp_path, monkeypatch):
    """As above; only where the members of a sample stand apart, all samples are in memory."""
    members = [(f"{i:09}.{ending}", content) for i in range(3000) for ending, content in (
        ("jpg", b"x"), ("txt", b"a wall %d" % i), ("json", json.dumps({"raw": "y" * 2000}).encode()))]
    near = shard(tmp_path / "near.tar", members)
    apart = shard(tmp_path / "apart.tar", sorted(members, key=lambda member: member[0][-3:]))
    CaptionFile(shard(tmp_path / "first.tar", members[:6]))
    tracemalloc.start()
    data = CaptionFile(near)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6, peak     # all samples at once: 7e6
    passes, scan = [], data_module.tar_members
    monkeypatch.setattr(data_module, "tar_members", lambda *args: passes.append(args) or scan(*args))
    expected = [f"a wall {i}" for i in range(3000)]
    assert data.captions == CaptionFile(apart).captions == expected and data.lost_rows == 0 and len(passes) == 2
    assert CaptionFile(apart).captions == expected and len(passes) == 2


def test_a_tar_that_is_cut_while_it_is_read(tmp_path, monkeypatch):
    path = shard(tmp_path / "a.tar", samples(0, 9))
    content, read = open(path, "rb").read(), data_module.read_at

    def cut(f, position, length):
        if position > 20_000 and os.path.getsize(path) == len(content):
            with open(path, "r+b") as same_file:
                same_file.truncate(15_000)
        return read(f, position, length)
    monkeypatch.setattr(data_module, "read_at", cut)
    data = CaptionFile(path)
    assert 0 < len(data) < 9 and "a.tar is damaged or cut off from byte" in data.skipped[-1][0]
    assert len(CaptionFile(path)) == len(data) and len(os.listdir(tmp_path / ".c2lip-index")) == 1


# ------------------------------------------------------------------------------------------- indices of large files

@pytest.fixture
def large(monkeypatch):
    """Tables of any size have an index."""
    monkeypatch.setattr(data_module, "INDEX_FROM", 0)


def index_of(folder):
    """The one index in a folder."""
    [name] = os.listdir(folder / ".c2lip-index")
    return folder / ".c2lip-index" / name


def table_of(folder, count=50, name="t.csv"):
    return write(folder, name, "image,caption,neighbours\n" + "".join(
        f"{'ab'[i % 2]}.{('png', 'jpg')[i % 2]},caption {i},{i - 1}\n" for i in range(count)))


def rows_of(data):
    return [data.sample(i) for i in range(len(data))]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_an_index_gives_the_rows_that_reading_gives(folder, kind, monkeypatch):
    rows = [{"image": "a.png", "caption": f"a cät {i}" * (i % 7), "concepts": f"x{i}|y", "neighbours": f"{i - 1}|{i + 1}"}
            for i in range(300)]
    path = folder / f"t.{kind}"
    with open(path, "w", newline="", encoding="utf-8") as f:
        if kind == "jsonl":
            f.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = csv.DictWriter(f, rows[0], delimiter="\t" if kind == "tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    plain = CaptionFile(str(path), str(folder))
    assert not os.path.exists(folder / ".c2lip-index")
    monkeypatch.setattr(data_module, "INDEX_FROM", 0)
    for _ in range(2):      # written, then found
        indexed = CaptionFile(str(path), str(folder))
        assert rows_of(indexed) == rows_of(plain) and len(plain) == 257
        assert [indexed[i]["neighbours"] for i in range(9)] == [plain[i]["neighbours"] for i in range(9)]
        assert indexed.skipped == plain.skipped and indexed.lost_rows == plain.lost_rows == 43
        monkeypatch.setattr(data_module, "read_rows", None)
    with pytest.raises(TypeError):      # another column: another index, so the table is read
        CaptionFile(str(path), str(folder), caption_key="concepts")


@pytest.mark.parametrize("harm", ["cut", "short", "zeroed", "zeros inside", "empty", "one bit", "other"])
def test_a_damaged_index_is_made_anew_with_a_word(folder, large, harm):
    path = table_of(folder)
    before = rows_of(CaptionFile(path, str(folder)))
    place = index_of(folder)
    content = bytearray(place.read_bytes())
    if harm == "cut":
        del content[1000:]
    elif harm == "short":
        del content[500:508]
    elif harm == "zeroed":
        content[:] = bytes(len(content))
    elif harm == "zeros inside":
        content[100:300] = bytes(200)
    elif harm == "empty":
        content = b""
    elif harm == "one bit":
        content[700] ^= 1
    else:
        content = b"something else\n" * 40 + data_module.INDEX_MARK
    os.remove(place)        # not in place: an open one stays as it was
    place.write_bytes(content)
    data = CaptionFile(path, str(folder))
    assert rows_of(data) == before and index_of(folder) == place
    assert len(data.remarks) == 1 and data.remarks[0][1].startswith("its index was damaged")
    assert CaptionFile(path, str(folder)).remarks == []


def test_what_a_kill_leaves_of_an_index_is_removed(folder, large):
    path = table_of(folder)
    CaptionFile(path, str(folder))
    place = index_of(folder)
    os.rename(place, f"{place}.0123456789abcdef.partial")
    (folder / ".c2lip-index" / f"{place.name}.lock").write_text("")
    assert len(CaptionFile(path, str(folder))) == 50 and index_of(folder) == place


def killed(path, root, rows, began=None):
    """Index a table, and be killed after some rows; where there is an event, a second after it is set."""
    data_module.INDEX_FROM = 0
    number = data_module.IndexWriter.number

    def kill(self, column, value):
        if column == "numbers" and value == rows:
            if began:
                began.set()
                time.sleep(1)
            os.kill(os.getpid(), 9)
        number(self, column, value)
    data_module.IndexWriter.number = kill
    CaptionFile(path, root)


def test_killed_while_indexing(folder, large):
    path = table_of(folder)
    process = multiprocessing.get_context("fork").Process(target=killed, args=(path, str(folder), 30))
    process.start()
    process.join()
    assert process.exitcode == -9 and len(os.listdir(folder / ".c2lip-index")) == 2     # partial and lock
    assert len(CaptionFile(path, str(folder))) == 50 and index_of(folder).name.endswith(".index")


def count_as(path, caption_key, results):
    data = CaptionFile(path, caption_key=caption_key)
    results.put((len(data), data.sample(len(data) - 1)["captions"], data.remarks))


def test_killed_while_others_wait_for_the_index(folder, large):
    """One of them begins anew, and the rest find what it wrote; another caption key waits for nobody."""
    path = table_of(folder, 3000)
    context = multiprocessing.get_context("fork")
    began, results = context.Event(), context.Queue()
    first = context.Process(target=killed, args=(path, str(folder), 1500, began))
    first.start()
    assert began.wait(60)
    others = [context.Process(target=count_as, args=(path, key, results)) for key in (None, None, None, "caption")]
    [process.start() for process in others]
    assert [results.get(timeout=60) for _ in others] == [(3000, ["caption 2999"], [])] * 4
    [process.join() for process in [first, *others]]
    assert first.exitcode == -9
    names = os.listdir(folder / ".c2lip-index")
    assert len(names) == 2 and all(name.endswith(".index") for name in names)


def test_a_full_disk_while_indexing(folder, large, monkeypatch, tmp_path_factory):
    path, text = table_of(folder), data_module.IndexWriter.text
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def full(self, value):
        if self.path and self.path.startswith(str(folder)) and "40" in str(value):
            raise OSError(28, "No space left on device")
        text(self, value)
    monkeypatch.setattr(data_module.IndexWriter, "text", full)
    assert len(CaptionFile(path, str(folder))) == 50
    assert os.listdir(folder / ".c2lip-index") == []        # nothing is left behind
    assert len(os.listdir(cache / "c2lip" / "index")) == 1  # the next place
    os.remove(cache / "c2lip" / "index" / os.listdir(cache / "c2lip" / "index")[0])
    monkeypatch.setattr(data_module.IndexWriter, "finish", lambda self, about, finish=data_module.IndexWriter.finish: (
        finish(self, about) if self.path is None else (_ for _ in ()).throw(OSError(28, "No space left"))))
    with pytest.warns(UserWarning, match="No space left: indices of its files are kept in memory only.*--index-dir"):
        assert len(CaptionFile(path, str(folder))) == 50
    assert os.listdir(folder / ".c2lip-index") == os.listdir(cache / "c2lip" / "index") == []


def in_a_child(function, *args):
    """What a function returns in a process of its own, whose limits it may change."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=lambda: results.put(function(*args)))
    process.start()
    result = results.get(timeout=100)
    process.join()
    return result


def rows_within(limit, path, root):
    """The rows, and what was said, of a process whose files may have so many bytes."""
    import warnings
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return rows_of(CaptionFile(path, root)), [str(warning.message) for warning in said]


@pytest.mark.parametrize("limit", [0, 1, 3000, 30_000, 300_000, 400_000])
def test_a_disk_that_is_full_anywhere(folder, large, limit, monkeypatch):
    """The system itself refuses to write on, at any place of an index: at a text, a column, the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    path, tar = table_of(folder, 4000), shard(folder / "a.tar", sorted(samples(0, 400), key=lambda member: member[0][-3:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "INDEX_FROM", 10 ** 9)
        expected = rows_of(CaptionFile(path, str(folder)))
    rows, said = in_a_child(rows_within, limit, path, str(folder))
    assert rows == expected and len(said) == 1 and "File too large: indices of its files are kept in memory" in said[0]
    assert os.listdir(folder / ".c2lip-index") == os.listdir(folder / "cache/c2lip/index") == []
    rows, said = in_a_child(rows_within, limit, tar, str(folder))
    assert {row["captions"][0] for row in rows} == {f"text {i}" for i in range(400)} and len(rows) == 400
    assert len(said) == (limit < 40_000)


def open_with_few_files(sources):
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    data = CaptionFile(sources)
    return len(data), "error" in data[len(data) - 1]


def test_more_files_than_a_process_may_open(tmp_path):
    for i in range(60):
        shard(tmp_path / f"{i:03}.tar", samples(i, i + 1))
    for _ in range(2):
        assert in_a_child(open_with_few_files, f"{tmp_path}/*.tar") == (60, False)


def test_a_process_that_reads_files_is_killed(shards, monkeypatch):
    monkeypatch.setattr(data_module, "PARALLEL_FROM", 0)
    monkeypatch.setattr(data_module, "default_workers", lambda: 2)
    parent, written = os.getpid(), data_module.write_index
    monkeypatch.setattr(data_module, "write_index",
                        lambda *args: written(*args) if os.getpid() == parent else os.kill(os.getpid(), 9))
    with pytest.raises(OSError, match="a process that reads --data was killed.*start again"):
        CaptionFile(shards)
    monkeypatch.setattr(data_module, "write_index", written)
    assert len(CaptionFile(shards)) == 41


def index_slowly(sources, started):
    """Read files in several processes, whose ids are told, until they are killed."""
    def wait(*args):
        started.put(os.getpid())
        time.sleep(100)
    data_module.PARALLEL_FROM, data_module.default_workers, data_module.write_index = 0, lambda: 2, wait
    CaptionFile(sources)


def test_processes_that_read_files_end_with_their_parent(shards):
    context = multiprocessing.get_context("fork")
    started = context.Queue()
    process = context.Process(target=index_slowly, args=(shards, started))
    process.start()
    workers = [started.get(timeout=60) for _ in range(2)]
    process.kill()
    process.join()
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{pid}") for pid in workers):
            break
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") and "Z" not in open(f"/proc/{pid}/stat").read().split()[2]
                   for pid in workers)


def test_a_shard_that_cannot_be_read_on(tmp_path, monkeypatch):
    path, read = shard(tmp_path / "a.tar", samples(0, 9)), data_module.read_at

    def broken(f, position, length):
        if position > 10_000:
            raise OSError(5, "Input/output error")
        return read(f, position, length)
    monkeypatch.setattr(data_module, "read_at", broken)
    with pytest.raises(ValueError, match="a.tar cannot be read to its end: .*Input/output error"):
        CaptionFile(path)
    assert os.listdir(tmp_path / ".c2lip-index") == []


def test_two_runs_index_the_same_table_at_once(folder, large):
    path = table_of(folder, 3000)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=count, args=(path, results)) for _ in range(4)]
    [p.start() for p in processes]
    assert [results.get(timeout=60) for _ in processes] == [3000] * 4
    [p.join() for p in processes]
    assert index_of(folder).name.endswith(".index")


def test_without_locks_all_write_and_nobody_removes_what_others_write(folder, large, monkeypatch):
    def refuse(*args):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(data_module.fcntl, "flock", refuse)
    monkeypatch.setattr(data_module.warnings, "warn", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for count_of_rows in (3000, 3100):      # the second time there is an index of a former state
        path = table_of(folder, count_of_rows)
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        processes = [context.Process(target=count, args=(path, results)) for _ in range(4)]
        [p.start() for p in processes]
        assert [results.get(timeout=60) for _ in processes] == [count_of_rows] * 4
        [p.join() for p in processes]
        assert index_of(folder).name.endswith(".index") and not os.path.exists(folder / "cache")


def test_a_source_that_cannot_be_read_on(folder, large, monkeypatch):
    path, read = table_of(folder), data_module.read_rows

    def broken(path):
        yield from list(read(path))[:20]
        raise OSError(5, "Input/output error")
    monkeypatch.setattr(data_module, "read_rows", broken)
    with pytest.raises(ValueError, match="t.csv cannot be read to its end: .*Input/output error"):
        CaptionFile(path, str(folder))
    assert os.listdir(folder / ".c2lip-index") == []


def test_files_that_are_replaced(folder, large, monkeypatch):
    path, read, times = table_of(folder), data_module.read_rows, []

    def replaced(path):
        times.append(1)
        yield from read(path)
        if len(times) == 1:
            table_of(folder, 60)
    monkeypatch.setattr(data_module, "read_rows", replaced)
    assert len(CaptionFile(path, str(folder))) == 60 and len(times) == 2
    tar = shard(folder / "a.tar", samples(0, 4))
    data = CaptionFile(tar)
    assert "error" not in data[1]
    shard(folder / "a.tar", samples(4, 8))
    assert "has changed since" in data[1]["error"]


def test_another_folder_for_indices(folder, large, tmp_path_factory):
    place = tmp_path_factory.mktemp("indices")
    os.makedirs(folder / "other")
    one, two = table_of(folder), table_of(folder, 20, "other/t.csv")
    for _ in range(2):
        assert len(CaptionFile(f"{one}::{two}", str(folder), index_dir=str(place))) == 70
        assert len(os.listdir(place)) == 2 and not os.path.exists(folder / ".c2lip-index")
    assert len(CaptionFile(two, str(folder), index_dir=str(place / "new/folder"))) == 20


def test_many_files_are_indexed_by_several_processes(shards, monkeypatch):
    expected = CaptionFile(shards, caption_key="caption").captions
    monkeypatch.setattr(data_module, "PARALLEL_FROM", 0)
    monkeypatch.setattr(data_module, "default_workers", lambda: 3)
    parent, written = os.getpid(), data_module.write_index
    monkeypatch.setattr(data_module, "write_index", lambda *args: written(*args) if os.getpid() != parent else None)
    data = CaptionFile(shards, caption_key="caption,alt")
    assert [row["captions"][0] for row in rows_of(data)] == expected == [f"json {i}" for i in range(41)]
    folder = os.path.dirname(shards)
    open(f"{folder}/00001.tar", "wb").close()       # what is wrong with one is said as ever
    monkeypatch.setattr(data_module, "write_index", written)
    data = CaptionFile(shards)
    assert len(data) == 24 and data.lost_rows == 12 and "00001.tar is damaged" in data.skipped[0][0]


def test_an_index_moves_with_its_folder(tmp_path, monkeypatch):
    os.makedirs(tmp_path / "old")
    shard(tmp_path / "old" / "a.tar", samples(0, 4))
    assert len(CaptionFile(str(tmp_path / "old" / "a.tar"))) == 4
    os.rename(tmp_path / "old", tmp_path / "new")
    monkeypatch.setattr(data_module, "tar_members", None)
    monkeypatch.chdir(tmp_path)
    data = CaptionFile("new/a.tar")
    assert data[3]["key"] == "new/a.tar 000000003" and data.sample(0)["image"][0] == "new/a.tar"


def test_a_row_of_ten_megabytes(folder, large):
    path = write(folder, "t.jsonl", "".join(json.dumps({"image": "a.png", "caption": c * 10_000_000}) + "\n" for c in "ab"))
    data = CaptionFile(path, str(folder))
    assert [len(text) for text in data.captions] == [10_000_000] * 2


def test_an_index_is_mapped_by_workers_that_are_spawned(folder, large):
    data = CaptionFile(table_of(folder), str(folder))
    copied = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 3000 and rows_of(copied) == rows_of(data)
    assert copied[0]["image"].size == (40, 30)


def test_joined_captions_by_their_index(shards, tmp_path, large):
    table = write(tmp_path, "c.csv", "key,caption\n" + "".join(f"{i:09d},new {i}\n" for i in range(50) if i != 7))
    results = [CaptionFile(shards, captions=table) for _ in range(2)]
    for data in results:
        assert data.captions == [f"new {i}" for i in range(41) if i != 7] and data.lost_rows == 1
        assert data.skipped[0] == (table, "9 key fit no image, the first is '000000041'")
    write(tmp_path, "c.csv", "key,caption\n" + "".join(f"{i:09d},newer {i}\n" for i in range(41)))
    data = CaptionFile(shards, captions=table)
    assert data.captions == [f"newer {i}" for i in range(41)] and data.skipped == []


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\t"), max_size=30).filter(
    lambda text: not text.lstrip().startswith("["))
ONE_LINE = TEXTS.filter(lambda text: not set(text) & set("\n\r"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["csv", "tsv", "jsonl"]), indexed=st.booleans(), seed=st.integers(0, 99), data=st.data())
def test_random_tables_are_read_as_a_naive_reader_reads_them(tmp_path_factory, kind, indexed, seed, data):
    """Any texts, written as they should be: every row with an image and a caption, in order, and the others counted."""
    rows = data.draw(st.lists(st.tuples(ONE_LINE if kind == "tsv" else TEXTS, ONE_LINE if kind == "tsv" else TEXTS),
                              min_size=1, max_size=12))
    folder = tmp_path_factory.mktemp("random")
    path = folder / f"t.{kind}"
    with open(path, "w", newline="", encoding="utf-8") as f:
        if kind == "jsonl":
            f.writelines(json.dumps({"image": image, "caption": text}, ensure_ascii=bool(seed % 2)) + "\n"
                         for image, text in rows)
        elif kind == "tsv":
            f.writelines("\t".join(row) + "\r\n" * (seed % 2) + "\n" * (1 - seed % 2) for row in [("image", "caption"), *rows])
        else:
            # Where lines end in "\n" alone, the writer puts no quotes around "\r".
            end = "\r\n" if seed % 2 or any("\r" in text for row in rows for text in row) else "\n"
            csv.writer(f, lineterminator=end).writerows([("image", "caption"), *rows])
    expected = [(image, text.strip()) for image, text in rows if image.strip() and text.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "INDEX_FROM", 0 if indexed else 10 ** 9)
        if not expected:
            with pytest.raises(ValueError, match="no images with captions"):
                CaptionFile(str(path))
            return
        found = CaptionFile(str(path))
    assert [(row["image"], *row["captions"]) for row in rows_of(found)] == expected
    assert found.lost_rows == len(rows) - len(expected) == len(found.skipped)


@settings(max_examples=40, deadline=None)
@given(members=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["jpg", "txt", "json", "pdf"]), TEXTS),
                        max_size=14), format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_random_tars_are_read_as_a_naive_reader_reads_them(tmp_path_factory, members, format):
    """Any members in any order, against one loop over tarfile's."""
    path = tmp_path_factory.mktemp("random") / "t.tar"
    contents = [(f"{'long/' * 40 * (name == 'd')}{name}.{ending}",
                 json.dumps({"caption": text}).encode() if ending == "json" else text.encode())
                for name, ending, text in members]
    shard(path, contents, format=format)
    expected, latest = [], {}
    with tarfile.open(path) as tar:
        for member in tar:
            name, ending = member.name.rsplit(".", 1)
            if ending == "pdf":
                continue
            if name not in latest or latest[name].get(ending):
                latest[name] = {}
                expected.append(latest[name])
            text = tar.extractfile(member).read().decode()
            latest[name][ending] = (member.offset_data, member.size) if ending == "jpg" else text
    for sample in expected:
        sample["caption"] = (sample.get("txt") or json.loads(sample.get("json") or "{}").get("caption", "")).strip()
    kept = [sample for sample in expected if sample.get("jpg") and sample["caption"]]
    if not kept:
        with pytest.raises(ValueError, match="no images with captions"):
            CaptionFile(str(path))
        return
    found = CaptionFile(str(path))
    assert [(tuple(row["image"][1:]), row["captions"]) for row in rows_of(found)] == [
        (sample["jpg"], [sample["caption"]]) for sample in kept]
    assert found.lost_rows == len(expected) - len(kept)


# ----------------------------------------------------------------------------------- nothing lost, nothing silent

def test_a_tsv_has_no_quotes(folder):
    captions = [f'"caption {i}' if i == 3 else f"caption {i}" for i in range(1000)]
    path = write(folder, "t.tsv", "image\tcaption\n" + "".join(f"a.png\t{text}\n" for text in captions))
    data = CaptionFile(path, str(folder))
    assert data.captions == captions and data.skipped == [] and data.lost_rows == 0


@pytest.mark.parametrize("end", ["", '\nb.jpg,"a dog"', '\nb.jpg,a "dog" runs', "\nb.jpg,a dog" * 1500])
def test_a_quote_that_is_not_closed_costs_one_row(folder, end):
    rows = ["a.png,caption 0", 'a.png,"caption, 1"', 'a.png,"caption 2'] + [f"a.png,caption {i}" for i in range(3, 12)]
    path = write(folder, "t.csv", "image,caption\n" + "\n".join(rows) + end + "\n")
    data = CaptionFile(path, str(folder))
    assert data.captions[:11] == ["caption 0", "caption, 1"] + [f"caption {i}" for i in range(3, 12)]
    assert len(data) == 11 + end.count("\n") and data.lost_rows == 1
    assert data.skipped == [(path, "row 3: a quote that is not closed")]


def test_text_behind_a_quote_is_remarked(folder):
    path = write(folder, "t.csv", 'image,caption\na.png,"STOP" on a sign\na.png,a "big" dog\na.png,"open')
    data = CaptionFile(path, str(folder))
    assert data.captions == ["STOP on a sign", 'a "big" dog', "open"] and data.lost_rows == 0
    assert data.remarks == [(path, "2 rows, the first is row 1: a quote that is not closed, or is followed by text")]


def test_line_breaks_in_a_csv_are_remarked(folder):
    path = write(folder, "t.csv", 'image,caption\na.png,"a cat\non a ""mat"""\na.png,a dog\na.png,"a\n\ncow"\n')
    data = CaptionFile(path, str(folder))
    assert data.captions == ['a cat\non a "mat"', "a dog", "a\n\ncow"] and data.skipped == [] and data.lost_rows == 0
    assert data.remarks == [(path, "2 rows, the first is row 1: a field that holds line breaks")]


def test_a_comma_without_quotes_cuts_no_caption(folder):
    path = write(folder, "t.csv", "image,caption\na.png,a cat, asleep\na.png,a dog\na.png\n")
    data = CaptionFile(path, str(folder))
    assert data.captions == ["a dog"] and data.lost_rows == 2
    assert data.skipped == [(path, "row 1: more fields than columns"), ("a.png (row 3)", "no caption")]


def test_one_bad_line_of_a_jsonl_is_skipped_and_counted(folder):
    lines = [json.dumps({"image": "a.png", "caption": f"caption {i}", "neighbours": [i - 1]}) for i in range(1000)]
    lines[10] = '{"image": "a.png", "capt'
    data = CaptionFile(write(folder, "t.jsonl", "\n".join(lines)), str(folder))
    assert len(data) == 999 and data.lost_rows == 1
    assert data.skipped == [(str(folder / "t.jsonl"), "row 11: not an object in json")]
    assert data[9]["neighbours"] == [8] and data[10]["neighbours"] == [] and data[11]["neighbours"] == [10]


def test_other_encodings_are_remarked(folder):
    (folder / "t.csv").write_bytes("image,caption\na.png,a wall\na.png,a café\na.png,Brötchen\n".encode("latin-1"))
    data = CaptionFile(str(folder / "t.csv"), str(folder))
    assert len(data) == 3 and data.lost_rows == 0 and len(data.remarks) == 1
    assert data.remarks[0][1].startswith("2 lines, the first is line 3: bytes that are no UTF-8")
    texts = [("0.jpg", b"x"), ("0.txt", "a café".encode()), ("1.jpg", b"x"), ("1.txt", "a café".encode("latin-1"))]
    texts += [("2.jpg", b"x"), ("2.json", '{"caption": "Brötchen"}'.encode("latin-1")), ("0.png", b"x"), ("3.jpg", b"x")]
    for members in (texts[:6], texts):      # side by side, and scattered
        [(name, remark)] = CaptionFile(shard(folder / "t.tar", members)).remarks
        assert name.endswith("t.tar") and remark.startswith("2 samples, the first is sample 2: bytes that are no UTF-8")


def test_lost_rows_are_counted_wherever_they_are_lost(folder):
    rows = ["a.png,", "b.jpg,a dog"] * 10 + ["b.jpg,a dog"] * 180
    table = write(folder, "t.csv", "image,caption\n" + "\n".join(rows))
    assert CaptionFile(table, str(folder)).lost_rows == 10
    whole = open(shard(folder / "0.tar", samples(0, 40)), "rb").read()
    shard(folder / "1.tar", samples(40, 80))
    (folder / "2.tar").write_bytes(whole[:len(whole) // 2])
    data = CaptionFile(str(folder / "{0,1,2}.tar"))
    assert data.lost_rows == 40 - (len(data) - 80) > 15         # as many as the whole shards say
    alone = CaptionFile(str(folder / "2.tar"))
    assert alone.lost_rows >= len(alone)
    damaged = bytearray(whole)
    start = next(m.offset for m in tarfile.open(folder / "0.tar") if m.name.startswith("000000010."))
    damaged[start:start + 512] = os.urandom(512)
    (folder / "3.tar").write_bytes(damaged)
    data = CaptionFile(str(folder / "3.tar"))
    assert len(data) == 10 and 20 < data.lost_rows < 60         # by the bytes behind the damage
    table = write(folder, "c.csv", "url,txt\n" + "".join(f"http://x/{i}.jpg,cat\n" for i in range(30)))
    assert CaptionFile(str(folder / "0.tar"), captions=table).lost_rows == 10


def test_tars_behind_one_another_are_both_read(tmp_path):
    parts = [open(shard(tmp_path / f"{i}.tar", samples(5 * i, 5 * i + 5)), "rb").read() for i in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    data = CaptionFile(str(tmp_path / "all.tar"))
    assert data.captions == [f"text {i}" for i in range(15)] and data.skipped == [] and data.lost_rows == 0
    assert not any("error" in data[i] for i in range(15))
    (tmp_path / "odd.tar").write_bytes(parts[0] + b"what is this" * 100)
    data = CaptionFile(str(tmp_path / "odd.tar"))
    assert len(data) == 5 and data.lost_rows > 0


def test_tar_headers_of_all_sorts_are_read_as_tarfile_reads_them(tmp_path):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname, link.size = tarfile.SYMTYPE, "x" * 200, 0
    for number, format in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=format) as tar:
            for name in ("a/", "plain.jpg", "d" * 90 + "/" + "n" * 90 + ".txt", "ünï/ço dé.jpg", "empty.txt"):
                info = tarfile.TarInfo(name)
                info.size = 0 if name in ("a/", "empty.txt") else 700
                info.mtime = 1.5 if format == tarfile.PAX_FORMAT else 1
                info.type = tarfile.DIRTYPE if name == "a/" else tarfile.REGTYPE
                tar.addfile(info, io.BytesIO(bytes(700)))
            if format != tarfile.USTAR_FORMAT:
                tar.addfile(link)
        with tarfile.open(path) as tar, open(path, "rb") as f:
            expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
            assert list(data_module.tar_members(f, os.path.getsize(path))) == expected and len(expected) == 4


def with_size(path, field):
    """Write another size into the fourth header of a tar, with its checksum."""
    content = bytearray(open(path, "rb").read())
    start = [m.offset for m in tarfile.open(path)][3]
    content[start + 124:start + 136] = field
    content[start + 148:start + 156] = b" " * 8
    content[start + 148:start + 156] = b"%06o\0 " % sum(content[start:start + 512])
    path.write_bytes(content)


@pytest.mark.parametrize("field", [b"-0000001000\0", b"\xff" * 10 + b"\xfc\0", b"\x80" + b"\xff" * 11,
                                   b"77777777777\0", b"12 34 56 78\0"])
def test_sizes_that_cannot_be_end_a_tar_with_a_report(tmp_path, field):
    path = tmp_path / "a.tar"
    shard(path, samples(0, 3))
    with_size(path, field)
    data = CaptionFile(str(path))
    assert data.captions == ["text 0"] and data.lost_rows >= 2
    assert data.skipped[0][0] == f"{path} is damaged or cut off from byte 3,584 on"


@pytest.mark.parametrize("member", [{"path": "x.jpg", "size": "-1"}, {"size": "1e9"}, {"comment": "z" * 3000}])
def test_pax_headers_that_cannot_be(tmp_path, member):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in samples(0, 3):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.pax_headers = member if name.startswith("000000002.") and name[-3:] == "txt" else {}
            tar.addfile(info, io.BytesIO(content))
    data = CaptionFile(str(tmp_path / "a.tar"))
    assert data.captions[:2] == ["text 0", "text 1"] and len(data) == 3      # the third by its json
    assert bool(data.lost_rows) == ("size" in member)


def test_patterns_of_shells(folder):
    for name in ("1.csv", "2.csv", "10.tsv", "[x].csv"):
        write(folder, name, "image\tcaption\n".replace("\t", "\t" if name[-3:] == "tsv" else ",")
              + "a.png\tX\n".replace("\t", "\t" if name[-3:] == "tsv" else ",").replace("X", name))
    for pattern, names in (("*.csv", ["1.csv", "2.csv", "[x].csv"]), ("{1,2,10}.?sv", ["1.csv", "2.csv", "10.tsv"]),
                           ("[x].csv", ["[x].csv"]), ("[0-9].csv", ["1.csv", "2.csv"])):
        assert CaptionFile(str(folder / pattern), str(folder)).captions == names
    with pytest.raises(ValueError, match="no file .*3.* in quotes"):
        CaptionFile(str(folder / "3*.csv"))


def test_only_formats_of_photographs_are_opened(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.ppm")
    for name in ("x.eps", "x.ppm"):
        os.rename(tmp_path / name, tmp_path / "x.jpg")
        with pytest.raises(OSError, match="cannot identify image file as one of JPEG, PNG"):
            load_image(tmp_path / "x.jpg")
    for kind in ("jpeg", "png", "webp", "gif", "bmp", "tiff"):
        Image.new("RGB", (8, 8), (250, 250, 250)).save(tmp_path / f"x.{kind}")
        assert min(load_image(tmp_path / f"x.{kind}").getpixel((4, 4))) > 240


def test_images_of_too_many_pixels_are_not_decoded(tmp_path):
    Image.new("1", (13_000, 13_000)).save(tmp_path / "bomb.png")
    path = write(tmp_path, "t.csv", "image,caption\nbomb.png,a cat\n")
    tracemalloc.start()
    with pytest.warns(Image.DecompressionBombWarning):
        row = CaptionFile(path, str(tmp_path))[0]
    assert tracemalloc.get_traced_memory()[1] < 2e6 and os.path.getsize(tmp_path / "bomb.png") < 30_000
    tracemalloc.stop()
    assert row["error"] == "13000 x 13000 pixels are more than --max-pixels 89478485"
    Image.new("RGB", (100, 100)).save(tmp_path / "bomb.png")
    assert "more than --max-pixels 9999" in CaptionFile(path, str(tmp_path), max_pixels=9999)[0]["error"]
    assert CaptionFile(path, str(tmp_path), max_pixels=10_000)[0]["image"].size == (100, 100)


def test_texts_that_no_person_wrote(folder):
    """Brackets without end, lone surrogates, words of 200,000 letters: rows like others, in no more than their time."""
    texts = ["[" * 100_000, "a \ud83d cat", "x" * 200_000, "a dog"]
    rows = [{"image": "a.png", "caption": text, "negatives": ["a \udc80 hat"]} for text in texts]
    rows += [{"image": "\udcff.png", "caption": "a cat", "\ud800": 1}, {"image": "a.png", "caption": "x",
                                                                       "concepts": "[" * 100_000}]
    path = write(folder, "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    data = CaptionFile(path, str(folder))
    assert data.captions[:4] == [texts[0], "a ? cat", texts[2], "a dog"] and data.lost_rows == 0
    read = [Seeded(data, 0)[(0, i)] for i in range(6)]
    assert ["error" in row for row in read] == [False] * 4 + [True] * 2
    text, size, longest = train_tokenizer(data.captions * 3)
    assert size <= 1024
    config = replace(MODELS["nano"], tokenizer=text, vocab_size=size, context_length=16)
    batch = Collate(image_transform(config), Tokenizer(config), negatives="swap")(read[1:2] + read[3:])
    assert batch["tokens"].shape == (2, 16) and len(batch["bad"]) == 2
    json.dumps(batch["bad"], ensure_ascii=False).encode()       # can be printed
    with pytest.raises(ValueError, match="no images") as error:
        CaptionFile(path, caption_key="nothing")
    str(error.value).encode()


def damage(content, rng):
    """Bytes with one to three accidents: cut, flipped, overwritten, repeated, left out, or with quotes thrown in."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        first = rng.randrange(len(content) + 1)
        last = min(len(content), first + rng.choice((1, 7, 100, 512, 2000)))
        kind = rng.choice(("cut", "flip", "zero", "noise", "repeat", "leave out", "quote", "odd"))
        if kind == "cut":
            del content[first:]
        elif kind == "flip" and first < len(content):
            content[first] ^= 1 << rng.randrange(8)
        elif kind == "zero":
            content[first:last] = bytes(last - first)
        elif kind == "noise":
            content[first:last] = rng.randbytes(last - first)
        elif kind == "repeat":
            content[first:first] = content[first:last]
        elif kind == "leave out":
            del content[first:last]
        elif kind == "quote":
            content[first:first] = rng.choice((b'"', b'""', b"\n", b"\r", b",", b"\t", b"{", b"["))
        else:
            content[first:first] = rng.choice((b"\\ud800", b"\xff", b"\0", b"\xc3", b"-1", b"1e999", b"null"))
    return bytes(content)


def physical_rows(path):
    """Lines of a table that are not blank, without the header, counted by other means."""
    lines = [line for line in re.split("\r\n|\r|\n", path.read_bytes().decode("utf-8-sig", "replace")) if line]
    if path.suffix == ".jsonl":
        return sum(line.strip() != "" for line in lines)
    return len(lines) - 1


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "tar"])
def test_damaged_files_end_in_rows_or_one_line(folder, kind):
    """Seeded accidents: a data set whose rows can all be asked for, or a ValueError of one line; and no row of a table
    is lost without being counted."""
    rows = [{"image": "a.png", "caption": f"a cat, {i}", "concepts": '["a cat"]', "neighbours": "1|2"} for i in range(9)]
    path = folder / f"t.{kind}"
    if kind == "tar":
        shard(path, samples(0, 6))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as f:
            table = csv.DictWriter(f, rows[0], delimiter="\t" if kind == "tsv" else ",", lineterminator="\n",
                                   **{"quoting": csv.QUOTE_NONE, "quotechar": None} if kind == "tsv" else {})
            table.writeheader()
            table.writerows(rows)
    content, rng, outcomes = path.read_bytes(), random.Random(kind), Counter()
    for number in range(120):
        damaged = folder / f"{number}.{kind}"
        damaged.write_bytes(damage(content, rng))
        try:
            data = CaptionFile(str(damaged), str(folder))
        except ValueError as error:
            assert "\n" not in str(error).strip() and "\r" not in str(error)
            outcomes["refused"] += 1
            continue
        for i in range(len(data)):
            row = Seeded(data, 0)[(0, i)]
            json.dumps({k: v for k, v in row.items() if k not in ("image", "neighbour")}, ensure_ascii=False).encode()
        outcomes["read"] += 1
        if kind in ("tsv", "jsonl"):
            assert len(data) + data.lost_rows == physical_rows(damaged), number
        if kind == "csv" and not data.remarks:
            assert len(data) + data.lost_rows == physical_rows(damaged), number
    assert outcomes["read"] > 50, outcomes


# ------------------------------------------------------------------------------------------------- joined captions

COLUMNS = ["url", "key", "Image Path"]


@pytest.mark.parametrize("column", COLUMNS)
def test_captions_joined_to_shards(shards, tmp_path, column):
    value = {"url": "http://x/{}.jpg", "key": "{:09d}", "Image Path": "http://x/{}.jpg"}
    order = random.Random(0).sample(range(60), 60)
    with open(tmp_path / "long.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["raw", column, "short", "long", "concepts"])
        for i in order:
            if i not in (5, 38):
                many = json.dumps([f'a "long", {i}', f"another {i}"])
                table.writerow([f"raw {i}", value[column].format(i), f"short\nline {i}", many, f"thing {i}|other"])
    data = CaptionFile(shards, caption_key="short,long", captions=str(tmp_path / "long.csv"))
    assert len(data) == 39
    for row in (data[i] for i in range(39)):
        i = int(row["key"].split()[-1])
        assert row["captions"] == [f"short\nline {i}", f'a "long", {i}', f"another {i}"]
        assert row["concepts"] == [f"thing {i}", "other"]
        assert (np.asarray(row["image"])[0, 0].astype(int) - (i * 37 % 256, i * 91 % 256, i)).__abs__().max() < 90
    lost = dict((name.split()[-1], why) for name, why in data.skipped)
    assert len(data.skipped) == 3 and lost["000000005"] == lost["000000038"] == "no caption"
    assert data.skipped[0][1].startswith(f"19 {column} fit no image, the first is")


def test_rows_of_one_key_are_several_captions_and_tables_join_too(folder):
    pairs = write(folder, "pairs.csv", "image\nx/a.png\nx/b.jpg\n")
    table = write(folder, "captions.jsonl", "".join(json.dumps(row) + "\n" for row in (
        {"file_name": "x/b.jpg", "caption": "1"}, {"file_name": "x/a.png", "caption": "2"},
        {"file_name": "x/b.jpg", "caption": "3"}, {"file_name": "", "caption": "4"})))
    os.makedirs(folder / "x")
    for name in ("a.png", "b.jpg"):
        os.rename(folder / name, folder / "x" / name)
    data = CaptionFile(pairs, str(folder), captions=table)
    assert [row["captions"] for row in (data[0], data[1])] == [["2"], ["1", "3"]]


def test_captions_with_brackets(folder):
    cells = ['[a sign] on a wall', '["broken, a cat', '["one", "two"]', "a | b", "['a dog', \"a cat's\"]",
             "[1] a dog", "[a, b]", "['a' 'b']", [{"raw": "a dog"}], [["a", "b"]], "[{['a']}]", {"en": "a dog"}]
    path = write(folder, "t.jsonl", "".join(json.dumps({"image": "a.png", "caption": c}) + "\n" for c in cells))
    data = CaptionFile(path, str(folder))
    assert data.captions == [cells[0], "one", "two", "a | b", "a dog", "a cat's", "[1] a dog", "[a, b]", "[{['a']}]"]
    assert data.skipped == [(f"a.png (row {row})", f"caption {what}") for row, what in (
        (2, '["broken, a cat is no list in json'), (8, "['a' 'b'] is no list in json"),
        (9, "{'raw': 'a dog'} in a list: expected a text"), (10, "['a', 'b'] in a list: expected a text"),
        (12, "{'en': 'a dog'}: expected a text, or a list of texts"))]
    concepts = write(folder, "c.jsonl", "".join(json.dumps({"image": "a.png", "caption": "x", "concepts": c}) + "\n"
                                                for c in ("['a dog', 'a cat']", "['a' 'b']", [["a"]])))
    rows = CaptionFile(concepts, str(folder))
    assert rows[0]["concepts"] == ["a dog", "a cat"] and "no list" in rows[1]["error"] and "expected a text" in rows[2]["error"]


def test_captions_that_fit_nothing(shards, tmp_path):
    with pytest.raises(ValueError, match="00000.tar: expected a .csv, .tsv or .jsonl"):
        CaptionFile(shards, captions=str(tmp_path / "00000.tar"))
    with pytest.raises(OSError, match="No such file.*none.csv"):
        CaptionFile(shards, captions=str(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match="no images with captions.*2 url fit no image, the first is"):
        CaptionFile(shards, captions=write(tmp_path, "c.csv", "url,caption\nhttp://y/1,a cat\n,a dog\n"))
    with pytest.raises(ValueError, match="no images with captions.* short.*--caption-key"):
        CaptionFile(shards, captions=write(tmp_path, "c.csv", "url,short\nhttp://x/1,a cat\n"))
    with pytest.raises(ValueError, match="its columns or keys caption, id do not say of which image a caption is"):
        CaptionFile(shards, captions=write(tmp_path, "c.csv", "caption,id\na cat,1\n"))


def test_what_belongs_to_one_caption_is_not_used_for_another(folder):
    """Of several joined rows of one image each has concepts of its own; that they go unused is said."""
    table = write(folder, "c.csv", "image,caption,concepts,negatives\na.png,a red dog,a red dog,a blue dog\n"
                  "a.png,a green cat,a green cat,a pink cat\nb.jpg,a wall,a grey wall,a sea\n")
    data = CaptionFile(write(folder, "t.csv", "image\na.png\nb.jpg\n"), str(folder), captions=table)
    assert data[0]["captions"] == ["a red dog", "a green cat"] and not {"concepts", "negatives"} & set(data[0])
    assert data[1]["concepts"] == ["a grey wall"] and data[1]["negatives"] == ["a sea"]
    assert data.remarks == [(table, "several rows are of one image: their concepts, negatives are not used, as each "
                             "belongs to one of its captions")]


def test_a_blank_name_joins_nothing(folder):
    table = write(folder, "c.csv", "url,caption\n,of none\nhttp://x,a cat\n")
    data = CaptionFile(write(folder, "t.csv", "image,url\na.png,\nb.jpg,http://x\n"), str(folder), captions=table)
    assert len(data) == 1 and data[0]["caption"] == "a cat" and data.skipped[-1] == ("a.png (row 1)", "no caption")


def test_pillow_without_a_limit_reads_images(folder, monkeypatch):
    """As scripts set it that read large images; ours is kept."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(str(folder / "a.png")).size == (40, 30)
    with pytest.raises(ValueError, match="40 x 30 pixels are more than --max-pixels 1000"):
        load_image(str(folder / "a.png"), 1000)


def test_rows_and_scenes_end(folder):
    data = CaptionFile(write(folder, "t.csv", "image,caption\na.png,a cat\nb.jpg,a dog\n"), str(folder))
    assert [row["caption"] for row in data] == ["a cat", "a dog"] and len(list(Scenes(3))) == 3
    for rows in (data, Scenes(2)):
        for index in (-1, 2):
            with pytest.raises(IndexError):
                rows[index]


def test_a_tokenizer_reads_captions_of_all_sources(folder, monkeypatch):
    monkeypatch.setattr(data_module, "TOKENIZER_ROWS", 5)
    first = write(folder, "a.csv", "image,caption\n" + "a.png,a cat\n" * 9)
    second = write(folder, "b.csv", "image,caption\n" + "a.png,ein Hund\n" * 3)
    assert CaptionFile(f"{first}::{second}", str(folder)).captions == ["a cat"] * 3 + ["ein Hund"]


def test_a_column_of_images_that_is_not_there_is_named(folder):
    path = write(folder, "t.csv", "image,caption\na.png,a cat\n")
    with pytest.raises(ValueError, match="keys caption, image .*, not pic; name them with --image-key"):
        CaptionFile(path, str(folder), image_key="pic")
    assert CaptionFile(path, str(folder), image_key=" image ")[0]["caption"] == "a cat"


def test_captions_of_an_image_whose_key_is_0(folder):
    table = write(folder, "c.jsonl", '{"key": 0, "caption": "a cat"}\n{"caption": "of none"}\n')
    data = CaptionFile(write(folder, "t.jsonl", '{"key": 0, "image": "a.png"}\n'), str(folder), captions=table)
    assert data[0]["caption"] == "a cat"


def test_names_of_columns_may_have_spaces_around_them_but_not_a_twin(folder):
    data = CaptionFile(write(folder, "t.csv", "image, caption\na.png,a cat\n"), str(folder))
    assert data.captions == ["a cat"]
    with pytest.raises(ValueError, match="u.csv: several columns are called 'caption', of which only one"):
        CaptionFile(write(folder, "u.csv", "image,caption, caption\na.png,a cat,a dog\n"), str(folder))


def test_several_caption_columns_with_spaces_between(folder):
    path = write(folder, "t.csv", "image,short,long\na.png,a cat,a cat on a mat\n")
    assert CaptionFile(path, str(folder), caption_key="short, long").captions == ["a cat", "a cat on a mat"]


# ------------------------------------------------------------------------------------------------------- negatives

def stub_spans(tokenizer):
    """Positions of words in place of the tokenizer's: [first, end) word of each phrase."""
    def spans(text, phrases):
        starts = [len(text[:text.index(phrase)].split()) for phrase in phrases]
        return [(start, start + len(phrase.split())) for start, phrase in zip(starts, phrases)]
    tokenizer.spans = spans
    return tokenizer


def plain_rows():
    captions = ["a red ring sits above a blue cross", "running quickly", "A black dog chases a white cat."]
    return [{"image": Image.new("RGB", (32, 32), (i, i, i)), "caption": c, "key": str(i), "seed": i}
            for i, c in enumerate(captions)]


def test_negatives_made_from_the_caption():
    config = nano()
    tokenizer, transform = Tokenizer(config), image_transform(config)
    rows = plain_rows()
    batch = Collate(transform, tokenizer, negatives="typed")(plain_rows())
    assert batch["negative_tokens"].shape[:2] == (3, 4) and batch["negative_mask"].shape == (3, 4)
    for i, row in enumerate(rows):
        rng = random.Random(row["seed"])
        for k, kind in enumerate(("noun", "adjective", "verb", "phrase")):
            swapped = swap_negatives(row["caption"], rng, (kind,))
            assert batch["negative_mask"][i, k] == bool(swapped)
            if swapped:
                tokens, length = tokenizer(swapped)[0], batch["negative_tokens"].shape[2]
                assert torch.equal(batch["negative_tokens"][i, k], tokens[:length]) and swapped[0] != row["caption"]
    assert batch["negative_mask"].tolist()[1] == [False] * 4 and batch["negative_mask"][2].any()
    batch = Collate(transform, tokenizer, negatives="swap")(plain_rows())
    assert batch["negative_mask"].tolist() == [[True], [False], [True]]
    kinds = {Collate(transform, tokenizer, negatives="swap").negatives_of({**rows[2], "seed": s})[0] for s in range(40)}
    assert len(kinds) > 1 and rows[2]["caption"] not in kinds
    batch = Collate(transform, tokenizer, negatives="negate")(plain_rows())
    texts = [negate(row["caption"], random.Random(row["seed"])) for row in rows]
    assert batch["negative_mask"].all()
    assert torch.equal(batch["negative_tokens"][:, 0], tokenizer(texts, trim=True))


def test_negatives_of_three_sorts_with_their_words():
    config, rows = nano(), plain_rows()
    tokenizer = Tokenizer(config)
    collate = Collate(image_transform(config), tokenizer, negatives="mixed", words=True)
    texts = [[row["caption"], *collate.negatives_of(row)] for row in rows]
    assert texts[0][1] in swap_negatives(rows[0]["caption"], random.Random(0)) and texts[1][1:3] == ["", ""]
    assert sorted(texts[0][3].split()) == sorted(rows[0]["caption"].split())
    batch = collate(plain_rows())
    assert batch["negative_mask"].tolist() == [[text != "" for text in row[1:]] for row in texts]
    tokens = torch.cat([batch["tokens"][:, None], batch["negative_tokens"]], 1)
    flat = sum(texts, [])
    assert torch.equal(tokens.flatten(0, 1), tokenizer(flat, trim=True))
    assert torch.equal(batch["word_mask"].flatten(0, 1), tokenizer.word_mask(flat, tokens.shape[2]))


def test_units_and_foils(folder):
    rows = [{"image": "a.png", "caption": "a dog", "units": [["a dog", "a cat"], ["dog ", " cat"], ["the dog", "the cat"]]},
            {"image": "a.png", "caption": "a black dog on a couch", "units": ""},
            {"image": "a.png", "caption": "running"}, {"image": "a.png", "caption": "x", "units": '[["a dog", ""]]'},
            {"image": "a.png", "caption": "x", "units": ["a dog", "a cat"]}]
    for path in (write(folder, "u.jsonl", "\n".join(map(json.dumps, rows))), ):
        seeded = Seeded(CaptionFile(path, str(folder)), 0)
        read = [seeded[(0, i)] for i in range(5)]
    assert read[0]["units"] == [("a dog", "a cat"), ("dog", "cat"), ("the dog", "the cat")] and "units" not in read[1]
    for row in read[3:]:
        assert "expected a json list of pairs of texts" in row["error"]
    assert data_module.parse_units('[["\\ud800 dog", "a \\udfff"]]') == [("? dog", "a ?")]      # which no tokenizer takes
    assert data_module.parse_units("[['a dog', \"a cat's\"]]") == [("a dog", "a cat's")]        # which pandas writes
    for wrong in ('["ab", "cd"]', '[["a", "b", "c"]]', "[{['a']}]", "[[1, 2]]", "7", 7, {"a": "b"}):
        with pytest.raises(ValueError, match="expected a json list of pairs of texts"):
            data_module.parse_units(wrong)
    config = nano()
    tokenizer = Tokenizer(config)
    batch = Collate(image_transform(config), tokenizer, units=2)(read)
    assert batch["unit_mask"].tolist() == [[True, True], [True, True], [False, False]] and len(batch["bad"]) == 2
    drawn = random.Random(read[0]["seed"]).sample(read[0]["units"], 2)
    assert torch.equal(batch["unit_tokens"][0].flatten(0, 1), tokenizer(sum(map(list, drawn), []), trim=True))


def test_units_of_scenes_are_true_and_foils_false():
    for i in range(50):
        scene = Scenes(50, relations=0.5)[i]
        (relation, swapped), *entities = scene["units"]
        assert relation == scene["caption"] and swapped == scene["negatives"][0]
        assert [unit for unit, _ in entities] == [scene["concepts"][0]] * 2
        for (_, foil), negative in zip(entities, scene["negatives"][1:]):
            assert negative.startswith(foil + " ") and foil not in scene["concepts"]


def test_negatives_of_the_row_come_first():
    config = nano()
    rows = plain_rows()
    rows[0]["negatives"], rows[1]["negatives"] = ["", "a blue ring", "x", "y", "z"], ["a slow walk"]
    texts = {kind: [Collate(None, None, negatives=kind).negatives_of(row) for row in rows]
             for kind in ("swap", "typed", "negate")}
    assert texts["typed"][:2] == [["", "a blue ring", "x", "y"], ["a slow walk", "", "", ""]]
    assert Collate(None, None, negatives="mixed").negatives_of(rows[0]) == ["", "a blue ring", "x"]
    assert texts["swap"][:2] == [["a blue ring"], ["a slow walk"]] and texts["negate"][0][0] not in rows[0]["negatives"]
    batch = Collate(image_transform(config), Tokenizer(config), negatives="typed")(rows)
    assert batch["negative_mask"].tolist()[:2] == [[False, True, True, True], [True, False, False, False]]


def test_negative_images_and_neighbours(folder):
    table = write(folder, "t.jsonl", "".join(json.dumps(row) + "\n" for row in (
        {"image": "a.png", "caption": "a red wall", "neighbours": [1, 2], "negative_image": "c.png",
         "negatives": ["a blue wall", None, "no wall"]},
        {"image": "b.jpg", "caption": "a blue wall", "neighbours": "2"},
        {"image": "c.png", "caption": "a green wall"}, {"image": "none.png", "caption": "x"})))
    other = write(folder, "o.csv", "image,caption,neighbours\na.png,a wall,\nb.jpg,a sea,0|1\n")
    data, config = CaptionFile(f"{table}::{other}", str(folder)), nano()
    joined = CaptionFile(table, str(folder), captions=write(folder, "j.csv", "path,caption\na.png,A\nc.png,C\n"))
    assert joined[0]["neighbours"] == [1] and joined[1]["caption"] == "C"       # the one in between is left out
    assert data[0]["negatives"] == ["a blue wall", "", "no wall"] and data[5]["neighbours"] == [4, 5]
    odd = CaptionFile(write(folder, "odd.csv", "image,caption,neighbours\na.png,a wall,1.0\nb.jpg,a sea,-1|9\nc.png,x,b.jpg\n"
                            "a.png,y,0.5\nb.jpg,z,1e300\n"), str(folder))      # pandas writes 1.0 where a row has none
    numbers = CaptionFile(write(folder, "n.jsonl", '{"image": "a.png", "caption": "x", "neighbours": 1}\n'
                                '{"image": "a.png", "caption": "y", "neighbours": 0}\n'), str(folder))
    assert [row["neighbours"] for row in numbers] == [[1], [0]]
    assert odd[0]["neighbours"] == [1] and odd[1]["neighbours"] == []
    assert all("expected numbers of rows" in odd[row]["error"] for row in (2, 3, 4))
    seeded = Seeded(data, 0)
    assert {seeded[(epoch, 0)]["neighbour"]["caption"] for epoch in range(20)} == {"a blue wall", "a green wall"}
    assert "neighbour" not in Seeded(data, 0, neighbours=False)[(0, 0)]
    transform = image_transform(config)
    batch = Collate(transform, Tokenizer(config), negative_images=True)([seeded[(0, i)] for i in range(4)])
    assert batch["captions"][:3] == ["a red wall", "a blue wall", "a green wall"] and len(batch["bad"]) == 1
    assert batch["captions"][3] in ("a blue wall", "a green wall") and batch["captions"][4:] == ["a green wall"]
    assert len(batch["images"]) == 5 and batch["pairs"][:, 0].max() == 4
    assert batch["negative_image_mask"].tolist() == [True, False, False, False, False]
    assert torch.equal(batch["negative_images"][0], transform(load_image(folder / "c.png")))
    assert not batch["negative_images"][1:].any()
    scene = Collate(transform, Tokenizer(config), negative_images=True)(
        [{**Scenes(5, negative_images=True)[i], "seed": i} for i in range(5)])
    assert scene["negative_image_mask"].all() and not torch.equal(scene["negative_images"], scene["images"])


def test_spans_count_in_rows_times_concepts():
    config = nano()
    tokenizer = stub_spans(Tokenizer(config))
    rows = plain_rows()[:2] + [{**plain_rows()[2], "concepts": ["A black dog"] * 2 + ["a white cat.", "dog"]}]
    batch = Collate(image_transform(config), tokenizer, spans=True)(rows)
    assert "concept_tokens" not in batch and batch["fallback"] == 1
    assert batch["spans"].tolist() == [[[0, 3], [5, 8], [0, 0]], [[0, 2], [0, 0], [0, 0]], [[0, 3], [4, 7], [2, 3]]]
    strings = ("a red ring", "a blue cross", "running quickly", "A black dog", "a white cat.", "dog")
    ids = [string_id(string) for string in strings]
    assert batch["concept_ids"].tolist() == [ids[0], ids[1], -1, ids[2], -1, -1, *ids[3:]]
    assert batch["pairs"].tolist() == [[0, 0], [0, 1], [1, 3], [2, 6], [2, 7], [2, 8]]
    assert batch["spans"].dtype == batch["concept_ids"].dtype == batch["pairs"].dtype == torch.int64


# ------------------------------------------------------------------------------------------------- pairs of rows

def coloured_rows(folder, sizes):
    """A table of images of one colour each, with a caption that is one or two sentences."""
    lines = []
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (20 * i, 10, 250 - 20 * i)).save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "caption": [f"a {'red dog' if i % 2 else 'small cat'}. it is {i}", f"animal {i}"]})
    return write(folder, "t.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def test_a_pair_is_two_images_as_one_with_captions_of_both(folder):
    """CLIC: halves of wide images lie one above the other, those of high ones side by side."""
    data = CaptionFile(coloured_rows(folder, [(40, 30), (41, 30), (30, 40), (30, 40)]), str(folder))
    transform, tokenizer = train_transform(nano()), Tokenizer(nano())
    rows = [{**data[i], "seed": 5 + i, "caption": data[i]["captions"][0], "partner": {**data[j], "caption": data[j]["captions"][0]}}
            for i, j in ((0, 1), (1, 0), (2, 3))]
    pairs = [join_pair(row, 32) for row in rows]
    for pair, (i, j) in zip(pairs, ((0, 1), (1, 0), (2, 3))):
        first, second = (f"a {'red dog' if n % 2 else 'small cat'}." for n in (i, j))
        assert pair["caption"] == f"{first} {second}" and pair["negatives"][0] == f"{second} {first}"
        others = {f"{x} {y}" for a in (f"it is {i}.", f"animal {i}.") for b in (f"it is {j}.", f"animal {j}.")
                  for x, y in ((a, b), (b, a))}
        assert set(pair["negatives"][1:3]) <= others and pair["negatives"][1] != pair["negatives"][2]
        assert pair["negatives"][3] in ("a small dog. a red cat.", "a red cat. a small dog.")
        pixels = pair["pixels"]
        halves = pixels.split(16, dim=1 if i < 2 else 2)
        colours = {tuple(half[:, 0, 0].tolist()) for half in halves}
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
        assert colours == {(20 * n, 10, 250 - 20 * n) for n in (i, j)}
        assert all((half == half[:, :1, :1]).all() for half in halves)
    batch = Collate(transform, tokenizer, negatives="pairs", pair_size=32)(rows)
    assert torch.equal(batch["images"], torch.stack([pair["pixels"] for pair in pairs]))
    assert batch["captions"] == [pair["caption"] for pair in pairs] and batch["negative_mask"].all()
    assert torch.equal(batch["negative_tokens"].flatten(0, 1), tokenizer(sum((p["negatives"] for p in pairs), []), trim=True))
    plain = Collate(transform, tokenizer, negatives="pairs", pair_size=32)([{**row, **{"seed": 0}} for row in plain_rows()])
    assert "negative_tokens" not in plain and len(plain["images"]) == 3
    broken = [{"key": "b", "error": "gone"}, rows[2]]
    batch = Collate(transform, tokenizer, negatives="pairs", pair_size=32)(broken)
    assert batch["bad"] == [("b", "gone")] and batch["captions"] == [pairs[2]["caption"]]


def test_a_pair_has_a_paraphrase_if_both_rows_have_one(folder):
    data = CaptionFile(coloured_rows(folder, [(40, 30)] * 9), str(folder))
    collate = Collate(train_transform(nano()), Tokenizer(nano()), negatives="pairs", pair_size=32, paraphrases=True)
    rows = [Seeded(data, 0, paraphrases=True)[0, i, "partner"] for i in range(9)]
    batch = collate(rows)
    assert batch["paraphrase_mask"].all() and len(batch["paraphrase_mask"]) == 9
    paraphrases = []
    for row in rows:
        texts = [row["paraphrase"], row["partner"]["paraphrase"]]
        assert texts[0] in set(row["captions"]) - {row["caption"]} and texts[1] in row["partner"]["captions"]
        paraphrases.append(" ".join(text.split(". ")[0] + "." for text in texts))
    assert any("animal" in text for text in paraphrases) and any("dog" in text for text in paraphrases)
    assert torch.equal(batch["paraphrase_tokens"], Tokenizer(nano())(paraphrases, trim=True))
    del rows[0]["paraphrase"], rows[1]["partner"]["paraphrase"]
    assert collate(rows)["paraphrase_mask"].tolist() == [False] * 2 + [True] * 7


def test_a_pair_without_words_to_exchange_has_no_negative():
    """Nor one whose exchange makes of each text the other: the same pair in another order is no false caption."""
    for first, second in (("running", "a dog"), ("a dog runs", "a dog runs"), ("it is", "they are"), ("cat", "Dog"),
                          ("a red dog", "a big dog."), ("an old dog runs", "A red dog runs")):
        assert exchange_between(first, second, random.Random(0)) == ""
    found = {exchange_between("a red ring", "an old tree.", random.Random(seed)) for seed in range(20)}
    assert found == {"an old ring. a red tree.", "a red tree. an old ring."}


def test_what_is_drawn_of_a_caption_does_not_depend_on_which_caption_it_is():
    """Of several: each comes with each of its sentences, and each negation, in 80 epochs."""
    captions = ["A dog is here. A cat is there. A bird is here.", "A man is big. A boy is old. A hat is red."]
    data = [{"key": "", "image": Image.new("RGB", (32, 32)), "captions": captions}]
    collate = Collate(None, None, negatives="negate")
    negated, drawn = set(), set()
    for epoch in range(80):
        row = Seeded(data, 0)[epoch, 0]
        negated |= set(collate.negatives_of(row))
        first, rest = split_caption({**row, "captions": []})
        drawn.add((first, random.Random(row["seed"]).choice(rest)))
    assert negated == {caption.replace(sentence, sentence.replace(" is ", " is not "))
                       for caption in captions for sentence in split_sentences(caption)}
    assert len(drawn) == 4


def test_every_other_batch_asks_for_partners_of_the_same_shape(folder):
    data = CaptionFile(coloured_rows(folder, [(40, 30), (30, 40)] * 6), str(folder))
    epochs = Epochs(12, 4, 3, start_step=1, stop_step=7)
    batches = list(EveryOther(epochs))
    assert [len(batch[0]) for batch in batches] == [2, 3, 2, 3, 2, 3] and len(EveryOther(epochs)) == 6
    assert [[item[:2] for item in batch] for batch in batches] == list(epochs)
    seeded = Seeded(data, 0)
    for item in batches[1] + batches[3]:
        row = seeded[item]
        assert row["image"].size == row["partner"]["image"].size
        assert row["partner"]["key"] == seeded[item]["partner"]["key"] and "partner" not in row["partner"]
    assert "partner" not in seeded[(0, 0)]
    others = {seeded[(epoch, 0, "partner")]["partner"]["key"] for epoch in range(40)}
    assert len(others) == 5 and seeded[0, 0]["key"] not in others
    weighed = Seeded(data, 0, sources=[(10, 0), (2, 4)])       # an epoch shows the last two rows alone
    drawn = {weighed[(epoch, 0, "partner")]["partner"]["key"] for epoch in range(20)}
    assert drawn <= {data[10]["key"], data[11]["key"]}


def test_a_row_with_a_partner_brings_no_neighbour(folder):
    """The neighbour would have no partner, and so could not stand in a batch of pairs."""
    lines = "".join(f"{name},a wall,{(i + 1) % 3}\n" for i, name in enumerate(("a.png", "b.jpg", "c.png")))
    data = CaptionFile(write(folder, "t.csv", f"image,caption,neighbours\n{lines}"), str(folder))
    seeded = Seeded(data, 0)
    rows = [seeded[0, i, "partner"] for i in range(3)]
    assert all("neighbour" not in row and "partner" in row for row in rows) and "neighbour" in seeded[0, 0]
    batch = Collate(train_transform(nano()), Tokenizer(nano()), negatives="pairs", pair_size=32)(rows)
    assert len(batch["images"]) == 3


def paired_rows(data, world):
    """All rows with their partners, {key: the rest}, of all processes together, and what was skipped."""
    rows, bad = {}, []
    collate = Collate(train_transform(nano()), Tokenizer(nano()), False, negatives="pairs", pair_size=32, paraphrases=True)
    for rank in range(world):
        seeded = Seeded(data, 0, paraphrases=True)
        [items] = EveryOther(Epochs(len(data), len(data), 3, rank, world))
        batch = collate([seeded[item] for item in items])
        bad += batch["bad"]
        for key, *rest in zip(batch["keys"], batch["captions"], batch["images"].tolist()):
            rows[key] = rest
    return rows, sorted(bad)


def test_no_row_is_lost_by_a_partner_that_cannot_be_read(folder):
    """The next one that can be read is taken, the same at any world size; without one, a row is its own."""
    data = CaptionFile(coloured_rows(folder, [(40, 30), (30, 40)] * 12), str(folder))
    rows, bad = paired_rows(data, 1)
    assert len(rows) == 24 and bad == []
    gone = [data.sample(i)["key"] for i in (3, 4, 8, 9, 15)]
    for i in (3, 4, 8, 9, 15):
        os.remove(folder / f"{i}.png")
    fewer, bad = paired_rows(data, 1)
    assert [key for key, _ in bad] == sorted(gone) and len(fewer) == 19
    assert not any(name in key for key in fewer for name in gone)
    shown = {key.split(" with ")[0] for key in rows} - set(gone)
    assert {key.split(" with ")[0] for key in fewer} == shown
    same = [key for key in rows if key in fewer]
    assert 5 < len(same) < len(shown) and all(rows[key] == fewer[key] for key in same)
    for world in (2, 4):
        assert paired_rows(data, world) == (fewer, bad)
    for i in range(1, 24):
        if os.path.exists(folder / f"{i}.png"):
            os.remove(folder / f"{i}.png")
    alone = Seeded(data, 0, paraphrases=True)[0, 0, "partner"]
    pair = join_pair(alone, 32)
    assert alone["partner"]["key"] == alone["key"] and pair["caption"].split(". ")[0] + "." == pair["caption"].split(". ")[1]
    assert pair["negatives"][-1] == "" and pair["paraphrase"]


def test_noise_and_pixels_of_an_attack():
    config = nano()
    rows = plain_rows()
    noisy = Collate(image_transform(config), Tokenizer(config), noise=True)
    noise = noisy(rows)["noise"]
    assert noise.shape == (3, 3, 32, 32) and noise.dtype == torch.uint8
    assert torch.equal(noisy(rows[1:2])["noise"][0], noise[1]) and not torch.equal(noise[0], noise[1])
    assert noise.min() == 0 and noise.max() == 255 and abs(noise.float().mean() - 127.5) < 2
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    pixels = unnormalize_images(images, config)
    assert torch.equal(pixels, images / 255)
    normalised = normalize_images(images, config)
    torch.testing.assert_close(unnormalize_images(normalised, config), pixels)
    torch.testing.assert_close(normalize_pixels(pixels, config), normalised)


# ------------------------------------------------------------------------------------------------------- batches

def test_collate_encodes_each_concept_once():
    config = nano()
    tokenizer = Tokenizer(config)
    rows = [{"image": Image.new("RGB", (32, 32)), "caption": c, "key": str(i), "seed": i, **extra} for i, (c, extra) in
            enumerate([("a red ring and a blue cross", {"concepts": ["a red ring", "a blue cross", "a red ring"]}),
                       ("a blue cross", {"concepts": ["a blue cross"]}),
                       ("A dog sits on the green sofa.", {})])]
    batch = Collate(image_transform(config), tokenizer, pad_concepts=4)(rows)
    strings = ["a red ring", "a blue cross", "A dog", "the green sofa"]
    assert batch["concept_ids"].tolist() == [string_id(s) for s in strings]
    assert batch["pairs"].tolist() == [[0, 0], [0, 1], [1, 1], [2, 2], [2, 3]]
    assert torch.equal(batch["concept_tokens"], tokenizer(strings))
    assert torch.equal(batch["tokens"], tokenizer(batch["captions"]))
    padded = Collate(image_transform(config), tokenizer, pad_concepts=3)(rows)
    assert padded["concept_ids"].tolist()[4:] == [-1, -1] and len(padded["concept_tokens"]) == 6
    assert string_id("A Dog") == string_id("a dog") != string_id("a cat") and string_id("x") >= 0


def test_sentences_are_cut_behind_their_ends_alone():
    for text, sentences in ((" A dog. It runs! ", ["A dog.", "It runs!"]), ("a dog", ["a dog"]), ("", [""]),
                            ("Dr. Smith holds a 3.5 m pole?  Yes", ["Dr. Smith holds a 3.5 m pole?", "Yes"]),
                            ("the U.S. Navy. a ship...\nwaves", ["the U.S. Navy.", "a ship...", "waves"])):
        assert split_sentences(text) == sentences


def test_collate_draws_sentences_and_knows_who_holds_them():
    """An undrawn sentence, and a caption that is one, belong to the image where another row draws them."""
    tokenizer = Tokenizer(nano())
    captions = ["A dog. A cat. A red cow.", "a dog.", "A dog. A ring."]
    collate = Collate(image_transform(nano()), tokenizer, with_concepts=False, sentences=2)
    drawn = set()
    for seed in range(20):
        rows = [{"image": Image.new("RGB", (32, 32)), "caption": c, "key": "", "seed": seed} for c in captions]
        batch, again = collate(rows), collate(rows)
        assert all(torch.equal(batch[f"sentence_{x}"], again[f"sentence_{x}"]) for x in ("tokens", "ids", "pairs"))
        ids = {string_id(s): s for s in ("A dog.", "A cat.", "A red cow.", "A ring.")}
        columns = [ids[i] for i in batch["sentence_ids"][:len(batch["sentence_tokens"])].tolist()]
        assert torch.equal(batch["sentence_tokens"], tokenizer(columns, trim=True))
        plan = plan_batch(3, batch["sentence_ids"], batch["sentence_pairs"], batch["sentence_tokens"])
        assert plan.labels.tolist() == [[s.lower() in c.lower() for s in columns] for c in captions]
        assert {"A dog.", "A ring."} <= set(columns) and len(columns) == len(set(columns)) in (3, 4)
        drawn |= set(columns)
    assert len(drawn) == 4
    none = collate(rows[1:2])
    assert none["sentence_tokens"].shape[0] == 0 and none["sentence_pairs"].tolist() == [[0, 0]]


def test_caption_without_noun_stands_for_itself():
    config = nano()
    rows = [{"image": Image.new("RGB", (32, 32)), "caption": "running quickly", "key": "x", "seed": 0}]
    batch = Collate(image_transform(config), Tokenizer(config))(rows)
    assert batch["fallback"] == 1 and batch["pairs"].tolist() == [[0, 0]]


def test_augmentation_is_a_function_of_epoch_and_index(folder):
    data = Seeded(CaptionFile(write(folder, "t.csv", "image,caption\na.png,a wall\n"), str(folder)), 0)
    Image.effect_noise((60, 60), 80).save(folder / "a.png")
    collate = Collate(train_transform(nano()), Tokenizer(nano()))
    torch.manual_seed(1)
    first = collate([data[(0, 0)]])["images"]
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert torch.equal(collate([data[(0, 0)]])["images"], first)
    assert not torch.equal(collate([data[(1, 0)]])["images"], first)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("length, batch, world", [(100, 10, 1), (101, 10, 2), (103, 16, 4), (7, 7, 3), (64, 48, 2)])
def test_every_row_once_an_epoch_at_any_world_size(length, batch, world):
    ranks = [Epochs(length, batch, 5, rank, world) for rank in range(world)]
    steps = ranks[0].steps_per_epoch
    for r in ranks:
        r.stop = 2 * steps
    streams = [list(r) for r in ranks]
    assert all(len(s) == len(r) == 2 * steps for s, r in zip(streams, ranks))
    whole = [sum((s[i] for s in streams), []) for i in range(2 * steps)]
    assert whole == list(Epochs(length, batch, 5, stop_step=2 * steps))     # one order, whatever the world size
    sizes = {len(b) for b in whole}
    assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1
    for epoch in (0, 1):
        seen = [index for b in whole[epoch * steps:(epoch + 1) * steps] for e, index in b if e == epoch]
        assert sorted(seen) == list(range(length))
    assert whole[0] != [(0, i) for _, i in whole[steps]]                    # another order in the second epoch
    assert list(Epochs(length, batch, 5, start_step=1, stop_step=2 * steps)) == whole[1:]      # resumed


@pytest.mark.parametrize("length", [1, 2, 3, 7, 15, 16, 17, 255, 256, 257, 1000, 4095, 4097, 65_536, 65_537, 100_003])
def test_the_order_is_a_permutation(length):
    for key in ("0 0", "0 1"):
        rows = permute(np.arange(length), length, key)
        assert rows.dtype == np.int64 and sorted(rows.tolist()) == list(range(length))
        some = np.arange(0, length, 3)
        assert (permute(some, length, key) == rows[some]).all()     # each by itself
    if length > 10:
        assert (permute(np.arange(length), length, "0 0") != rows).any()


def test_the_order_is_random_in_every_place():
    """Over keys, each position takes each row equally often, and neighbours fall apart: chi-square, 5 sigma."""
    length, keys = 23, 4000
    orders = np.stack([permute(np.arange(length), length, f"{key} 0") for key in range(keys)])
    for counts, cells in ((np.stack([np.bincount(column, minlength=length) for column in orders.T]), length - 1),
                          (np.bincount(np.diff(orders) .ravel() % length, minlength=length)[1:][None], length - 2)):
        expected = counts.sum(1, keepdims=True) / counts.shape[1]
        chi = ((counts - expected) ** 2 / expected).sum(1)
        assert (np.abs(chi - cells) < 5 * (2 * cells) ** 0.5).all()
    counts = np.bincount((orders[:, :2] @ [length, 1]), minlength=length ** 2)      # pairs of first and second
    counts = counts[counts > 0]
    assert len(counts) == length * (length - 1)
    cells = len(counts) - 1
    assert abs(((counts - keys / len(counts)) ** 2 / (keys / len(counts))).sum() - cells) < 5 * (2 * cells) ** 0.5
    rows = permute(np.arange(100_000), 100_000, "7 3")          # one long order: runs, halves, correlation
    assert abs(np.corrcoef(np.arange(100_000), rows)[0, 1]) < 5 / 100_000 ** 0.5
    assert abs((np.diff(rows) > 0).mean() - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5
    assert abs((rows[:50_000] < 50_000).sum() - 25_000) < 5 * (100_000 / 16) ** 0.5


def test_the_order_of_huge_data_takes_no_array():
    tracemalloc.start()
    length, stream = 10 ** 12, Epochs(10 ** 12, 768, 1, 1, 2, start_step=10 ** 10, stop_step=10 ** 10 + 3)
    batches = list(stream)
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()
    assert [len(batch) for batch in batches] == [384] * 3
    rows = [index for batch in batches for _, index in batch]
    assert len(set(rows)) == len(rows) and 0 <= min(rows) < length / 100 and 0.99 * length < max(rows) < length
    assert {epoch for batch in batches for epoch, _ in batch} == {10 ** 10 // stream.steps_per_epoch}


def epochs_of(stream, count):
    """The items of each of so many epochs."""
    stream.start, stream.stop = 0, count * stream.steps_per_epoch
    steps = list(stream)
    return [sum(steps[i * stream.steps_per_epoch:(i + 1) * stream.steps_per_epoch], []) for i in range(count)]


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), batch=st.integers(1, 30),
       weights=st.lists(st.sampled_from([0.07, 0.3, 0.5, 1, 1.5, 2, 3]), min_size=4, max_size=4), seed=st.integers(0, 9))
def test_weights_show_rows_as_often_as_they_say(sizes, batch, weights, seed):
    """Against counting: each epoch so many of each source, in the long run all equally often, each turn of a row once;
    the same batches on 1, 2 and 3 processes, and from any step on."""
    weights = weights[:len(sizes)]
    sources = weigh_sources(sizes, ",".join(map(str, weights)))
    starts = np.cumsum([0, *sizes])
    length = sum(shown for _, shown in sources)
    stream = Epochs(sum(sizes), min(batch, length), seed, sources=sources)
    epochs = epochs_of(stream, 4)
    seen = Counter()
    for epoch in epochs:
        assert len(epoch) == length
        for first, last, weight in zip(starts, starts[1:], weights):
            own = Counter(row for _, row in epoch if first <= row < last)
            assert sum(own.values()) == (max(1, round(weight * (last - first))) if last > first else 0)
            if weight in (1, 2, 3):
                assert set(own.values()) <= {weight} and len(own) == last - first
        seen.update(row for _, row in epoch)
        for first, last in zip(starts, starts[1:]):
            counts = [seen[row] for row in range(first, last)]
            assert not counts or max(counts) - min(counts) <= 1
    items = sum(epochs, [])
    # The turns of a row are 0, 1, 2, ...: each showing of it has a seed of its own.
    assert len(set(items)) == len(items) and all(turn < seen[row] for turn, row in items)
    steps = list(stream)
    if length // stream.steps_per_epoch >= 3:
        for world in (2, 3):
            ranks = [list(Epochs(sum(sizes), min(batch, length), seed, rank, world, 0, stream.stop, sources))
                     for rank in range(world)]
            assert [sum(parts, []) for parts in zip(*ranks)] == steps
    half = stream.stop // 2
    assert list(Epochs(sum(sizes), min(batch, length), seed, 0, 1, half, stream.stop, sources)) == steps[half:]


def test_weights_of_one_change_nothing_and_others_shuffle():
    plain = epochs_of(Epochs(50, 8, 3), 3)
    assert epochs_of(Epochs(50, 8, 3, sources=weigh_sources([20, 30], "1,1.0")), 3) == plain
    halves = [{row for _, row in epoch if row < 1000} for epoch in epochs_of(
        Epochs(2000, 100, sources=weigh_sources([1000, 1000], "0.5,1")), 4)]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(1000))
    assert halves[0] not in halves[2:]                  # halves are drawn anew
    assert 200 < len(halves[0] & set(range(500))) < 300
    tracemalloc.start()
    stream = Epochs(2 * 10 ** 12, 768, sources=weigh_sources([10 ** 12, 10 ** 12], "0.3,2.7"), start_step=10 ** 10)
    stream.stop = stream.start + 2
    assert sum(map(len, stream)) in (767 * 2, 767 + 768, 768 * 2) and tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()


@pytest.mark.parametrize("weights, says", [
    ("1", "1 weights for 2 sources"), ("1,2,3", "3 weights for 2 sources"), ("", "1 weights for 2 sources"),
    ("1,x", "'x' is not a number above 0"), ("1,", "'' is not a number"), ("0,1", "'0' is not"), ("1,-2", "'-2' is not"),
    ("nan,1", "'nan' is not"), ("1,inf", "'inf' is not a number above 0 and up to 1,000,000"), ("1,1e400", "'1e400'")])
def test_weights_that_are_none(weights, says):
    with pytest.raises(ValueError, match=f"--data-weights {weights}: .*{says}") as error:
        weigh_sources([5, 6], weights)
    assert "\n" not in str(error.value)


def test_sources_of_several_files_have_one_weight(shards, folder):
    table = write(folder, "t.csv", "image,caption\na.png,a red wall\nb.jpg,a blue wall\n")
    data = CaptionFile(f"{shards}::{table}::{table}", str(folder))
    assert data.source_sizes == [41, 2, 2]
    assert weigh_sources(data.source_sizes, "0.5, 3,1") == [(41, 20), (2, 6), (2, 2)]
    stream = Epochs(len(data), 8, sources=weigh_sources(data.source_sizes, "0.5,3,1"))
    [epoch] = epochs_of(stream, 1)
    captions = Counter(Seeded(data, 0)[item]["caption"] for item in epoch)
    assert captions["a red wall"] == captions["a blue wall"] == 4 and sum(captions.values()) == 28
    assert len({Seeded(data, 0)[item]["seed"] for item in epoch}) == 28


def train(*args):
    """(exit status, what it printed) of train.py."""
    root = os.path.dirname(os.path.abspath(data_module.__file__))
    done = subprocess.run([sys.executable, os.path.join(root, "train.py"), *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_weights_in_training(folder):
    """The plan, the same bits after a resume, other weights refused."""
    one, two = table_of(folder, 30, "one.csv"), table_of(folder, 10, "two.csv")
    run = ["--data", f"{one}::{two}", "--image-root", folder, "--batch-size", 8, "--bench", "none", "--save-every", 3,
           "--keep", 9, "--epochs", 2, "--data-weights"]
    status, said = train(*run, "0.5,2", "--out-dir", folder / "whole")
    assert status == 0 and "one.csv: 30 rows, of which an epoch shows 15\n" in said
    assert "two.csv: 10 rows, of which an epoch shows 20\n" in said
    os.makedirs(folder / "resumed")
    shutil.copy(folder / "whole/step_00000006.pt", folder / "resumed")
    status, said = train(*run, "0.5,1", "--out-dir", folder / "resumed", "--resume", "auto")
    assert status == 1 and "was trained with --data-weights 0.5,2, now it is 0.5,1" in said and "Traceback" not in said
    status, said = train(*run, "0.5,2", "--out-dir", folder / "resumed", "--resume", "auto")
    assert status == 0
    whole, resumed = (torch.load(folder / name / "last.pt", weights_only=True)["model"] for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    status, said = train(*run, "0,1", "--out-dir", folder / "none")
    assert status == 1 and said.splitlines()[-1].startswith("train.py: --data-weights 0,1: '0' is not a number above 0")


def test_batch_larger_than_the_data():
    with pytest.raises(ValueError, match="--batch-size 9 is more than the 8 rows of an epoch"):
        Epochs(8, 9)
    with pytest.raises(ValueError, match="--batch-size 8 is more than the 4 rows of an epoch: give at most 4"):
        Epochs(40, 8, sources=weigh_sources([40], "0.1"))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_each_process_has_a_row_of_each_batch(world):
    """Or one line says what to do: 3 rows in batches of 2 are batches of 2 and 1, of which two processes would share one."""
    for length in range(1, 20):
        for batch in range(1, length + 1):
            smallest = min(map(len, Epochs(length, batch)))
            if smallest < world:
                with pytest.raises(ValueError, match=f"--batch-size {batch}: .* batches of {smallest}, fewer than the {world} pro"):
                    Epochs(length, batch, world_size=world)
            else:
                assert all(items for rank in range(world) for items in Epochs(length, batch, 0, rank, world))


def test_tokenizer_of_a_small_corpus():
    captions = [f"{a} {b}" for a in ("red", "blue", "GREEN") for b in ("cat", "dog")]
    text, size, longest = train_tokenizer(captions)
    config = replace(MODELS["nano"], tokenizer=text, vocab_size=size, context_length=longest + 2)
    ids = Tokenizer(config)(captions + ["", "unseen wörds 🐈 are cut, never lost silently to a crash"])
    assert ids.shape == (8, longest + 2) and ids.max() < size
    assert (ids == size - 1).sum(1).tolist() == [1] * 8 and torch.equal(ids[4], Tokenizer(config)(["green cat!"])[0])
    assert train_tokenizer(captions)[0] == text and json.loads(text)["model"]["type"] == "BPE"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_the_large_world_shows_three_objects_that_differ_in_colour_and_shape():
    world = WORLDS["large"]
    for i in range(20):
        scene = Scenes(50, world="large", image_size=48)[i]
        colours, shapes = zip(*scene["objects"])
        assert len(scene["objects"]) == 3 == len(set(colours)) == len(set(shapes))
        shown = {tuple(rgb) for rgb in np.asarray(scene["image"]).reshape(-1, 3)}
        assert {name for name, rgb in world.colours.items() if rgb in shown} == set(colours)
        assert scene["caption"] == " and ".join(scene["concepts"])
        assert not set(scene["negatives"]) & {scene["caption"]}


def test_the_crowded_world_shows_more_than_it_names():
    data = Scenes(200, world="crowded", negative_images=True)
    for i in range(30):
        scene, (shown, _, _) = data[i], data.objects(i)
        colours, shapes = zip(*shown)
        assert len(shown) == 4 == len(set(colours)) == len(set(shapes))
        pixels = {tuple(rgb) for rgb in np.asarray(scene["image"]).reshape(-1, 3)}
        assert {name for name, rgb in data.world.colours.items() if rgb in pixels} == set(colours)
        assert scene["caption"] == " and ".join(scene["concepts"]) and scene["objects"] == shown[:3]
        pixels = {tuple(rgb) for rgb in np.asarray(scene["negative_image"]).reshape(-1, 3)}
        assert {name for name, rgb in data.world.colours.items() if rgb in pixels} == set(colours)
        true = {f"a {colour} {shape}" for colour, shape in shown}
        for negative in scene["negatives"][:3]:
            assert not set(negative.split(" and ")) <= true
        _, colour, shape, _ = scene["negatives"]
        assert colour.split()[1] not in colours and shape.split(" and ")[0].split()[2] not in shapes
    held_out = {str(sorted(Scenes(200, "val", world="crowded")[i]["objects"])) for i in range(200)}
    assert not held_out & {str(sorted(Scenes(2000, world="crowded")[i]["objects"])) for i in range(2000)}


def test_the_world_of_many_objects_has_a_cell_for_each():
    data = Scenes(200, world="many", image_size=48, relations=1.0)
    used = set()
    for i in range(30):
        scene, (shown, cells, _) = data[i], data.objects(i)
        assert len(shown) == 6 == len(set(cells)) and scene["objects"] == shown[:3]
        assert scene["caption"].count(" and ") == 1
        used |= set(cells)
        pixels = np.asarray(scene["image"])
        found = {}      # colour: the cells in which it is seen
        for name, rgb in data.world.colours.items():
            rows, columns = (pixels == np.array(rgb, dtype=pixels.dtype)).all(2).nonzero()
            found[name] = set((rows // 16 * 3 + columns // 16).tolist())
        for (colour, _), cell in zip(shown, cells):
            assert cell in found.pop(colour)
        assert not set().union(*found.values())
        (row, column), (other_row, other_column) = divmod(cells[0], 3), divmod(cells[1], 3)
        where = "left of" if column < other_column else "right of" if column > other_column else \
            "above" if row < other_row else "below"
        assert f" {where} " in scene["caption"]
    assert used == set(range(9))


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_every_shape_is_drawn_in_its_own_way(world):
    drawn = set()
    for shape in WORLDS[world].shapes:
        scenes = Scenes(1, world=world)
        drawn.add(scenes.render([("red", shape)], [0], random.Random(0)).tobytes())
    assert len(drawn) == len(WORLDS[world].shapes)
