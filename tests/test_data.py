"""Scenes, tables of pairs, images of every kind, batches and their order."""
import json
import os
from dataclasses import replace

import pytest
import torch
from PIL import Image

from data import (COLOURS, CaptionFile, Collate, Epochs, Scenes, Seeded, load_image, string_id, train_tokenizer,
                  train_transform)
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
    ("semicolon.csv", "image;caption\na.png;a wall\n", "wrong separator"),
    ("tab.csv", "image\tcaption\na.png\ta wall\n", "wrong separator"),
    ("columns.csv", "image,words\na.png,a wall\n", "its columns are image, words"),
    ("empty.csv", "image,caption\n", "no rows"),
    ("t.jsonl", '{"image": "a.png"\n', "line 1: not json"),
    ("list.jsonl", '[1, 2]\n', "line 1: expected an object"),
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
    rows = [CaptionFile(path, str(folder))[i] for i in range(4)]
    assert ["error" in r for r in rows] == [True, True, True, False]


def test_missing_column_by_name(folder):
    path = write(folder, "t.csv", "image,caption\na.png,a wall\n")
    with pytest.raises(ValueError, match="no column 'text'; its columns are image, caption: name one with --capt"):
        CaptionFile(path, str(folder), caption_key="text")


def test_bad_rows_are_named_not_lost(folder):
    (folder / "zero.jpg").write_bytes(b"")
    Image.effect_noise((90, 90), 50).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:1500])
    path = write(folder, "t.csv", "image,caption\na.png,\nnone.png,a cat\nzero.jpg,a cat\ncut.jpg,a cat\n,a cat\n"
                 "a.png,a cat\n")
    data = CaptionFile(path, str(folder))
    rows = [data[i] for i in range(len(data))]
    assert ["error" in r for r in rows] == [True] * 5 + [False]
    assert rows[0]["error"] == "empty caption" and "none.png" in rows[1]["key"] and "row 2" in rows[1]["key"]
    config = nano()
    rows = [Seeded(data, 0)[(0, i)] for i in range(len(data))]
    batch = Collate(image_transform(config), Tokenizer(config))(rows)
    assert len(batch["bad"]) == 5 and batch["keys"] == ["a.png (row 6)"] and len(batch["images"]) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "YCbCr"])
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


def test_batch_larger_than_the_data():
    with pytest.raises(ValueError, match="--batch-size 9 is more than the 8 rows"):
        Epochs(8, 9)


def test_tokenizer_of_a_small_corpus():
    captions = [f"{a} {b}" for a in ("red", "blue", "GREEN") for b in ("cat", "dog")]
    text, size, longest = train_tokenizer(captions)
    config = replace(MODELS["nano"], tokenizer=text, vocab_size=size, context_length=longest + 2)
    ids = Tokenizer(config)(captions + ["", "unseen wörds 🐈 are cut, never lost silently to a crash"])
    assert ids.shape == (8, longest + 2) and ids.max() < size
    assert (ids == size - 1).sum(1).tolist() == [1] * 8 and torch.equal(ids[4], Tokenizer(config)(["green cat!"])[0])
    assert train_tokenizer(captions)[0] == text and json.loads(text)["model"]["type"] == "BPE"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
