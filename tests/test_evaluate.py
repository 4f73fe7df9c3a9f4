"""evaluate.py against the official protocols, read plainly: one item at a time.

SugarCrepe and SugarCrepe++ with the peer's own model; the others with a random nano model of ours.
"""
import copy
import csv
import hashlib
import http.server
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import types
import zipfile
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import evaluate
from bench_tokenizer import openai_tokenizer
from data import COLOURS, SHAPES, load_image, train_tokenizer
from evaluate import TABLE, Options, Outcome, fetch, first_text_wins, orders, print_table, ranking_margins, run, summarize
from model import CLIP, MODELS, set_tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORDS = "a the red blue dog cat sits runs on under table chair two small near man woman".split()


def arguments(**kwargs):
    return dict(device="cpu", batch_size=7, **kwargs)


def read(benches, model, args):
    return evaluate.read(benches, Options(**args), 32)[0]


def caption(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))


def picture(path, rng):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    size = (rng.randint(60, 90), rng.randint(60, 90))
    noise = Image.frombytes("RGB", (5, 5), rng.randbytes(75))
    noise.resize(size).save(path)


@pytest.fixture
def official(monkeypatch):
    """Lets the readers take generated files: write(bench, subset, rows) puts them where they belong."""
    table = copy.deepcopy(TABLE)
    monkeypatch.setattr(evaluate, "TABLE", table)

    def write(folder, bench, subset, rows):
        spec = table[bench]["files"][subset]
        spec.update(n=len(rows), sha256=None)
        path = os.path.join(folder, spec["path"])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as f:
            f.write("\n".join(map(json.dumps, rows)) if path.endswith("jsonl") else json.dumps(rows))
        return path

    write.table = table
    return write


@pytest.fixture(scope="module")
def nano():
    """A random nano model with a tokenizer."""
    torch.manual_seed(0)
    rng = random.Random(0)
    captions = [caption(rng) for _ in range(300)] + ["above below behind front of left right"]
    text, size, _ = train_tokenizer(captions, 500)
    model = CLIP(replace(MODELS["nano"], tokenizer=text, vocab_size=size, context_length=32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        # features of a random model all point one way, so that few items would be correct: their mean is taken away
        noise = torch.randn(100, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        tokens = model.tokenize([caption(rng) for _ in range(100)])
        for name, inputs in ("encode_image", noise), ("encode_text", tokens):
            encoder = getattr(model, name)
            setattr(model, name, centred(encoder, encoder(inputs, True).mean(0)))
    return model


def centred(encoder, mean):
    def encode(x, normalize=False):
        features = encoder(x, True) - mean.to(x.device)
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features
    return encode


class Plain:
    """Cosines of one image and one text at a time, in float64 from features made by themselves.

    Each once: the same text encoded again may differ in its last bit, by where its memory lies, and would not tie.
    """

    def __init__(self, model):
        self.model, self.known = model, {}

    @torch.no_grad()
    def image(self, path, box=None):
        image = load_image(path)
        image = image.crop(box) if box else image
        return self.model.encode_image(self.model.transform(image)[None], True)[0].double()

    @torch.no_grad()
    def text(self, text):
        tokens = self.model.tokenize([text])
        if tuple(tokens[0].tolist()) not in self.known:
            self.known[tuple(tokens[0].tolist())] = self.model.encode_text(tokens, True)[0].double()
        return self.known[tuple(tokens[0].tolist())]

    def cos(self, path, text, box=None):
        return (self.image(path, box) @ self.text(text)).item()


# ------------------------------------------------------------------------------------------------- SugarCrepe

@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """A random open_clip model, a ViT-B/32 of two layers, and the same weights in ours."""
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(512, {"layers": 2, "width": 768, "patch_size": 32, "image_size": 224},
                                  {"layers": 2, "width": 512, "heads": 8}).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim < 2:
                p.add_(0.05 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("peer")
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(openai_tokenizer(str(folder))[0])
    MODELS["small"] = replace(MODELS["ViT-B-32"], vision=(768, 2, 12, 3072), text=(512, 2, 8, 2048))
    ours = CLIP.from_pretrained(str(folder / "model.safetensors"), "small").eval()
    del MODELS["small"]
    return theirs, set_tokenizer(ours, str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def crepe(tmp_path_factory):
    """The seven files in the true format, and random images of several sizes under the file names in them."""
    folder, rng = tmp_path_factory.mktemp("crepe"), random.Random(0)
    os.makedirs(folder / "sugarcrepe")
    os.makedirs(folder / "val2017")
    names = [f"{i:012d}.jpg" for i in range(9)]
    for name in names:
        size = (rng.randint(200, 400), rng.randint(200, 400))
        Image.effect_noise(size, 90).convert("RGB").resize((8, 8)).resize(size).save(folder / "val2017" / name)
    for subset in TABLE["sugarcrepe"]["files"]:
        items = {}
        for i in range(0, 40, 2):       # ids with gaps, as in swap_obj
            caption = " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))
            shuffled = " ".join(rng.sample(caption.split(), len(caption.split())))
            negative = caption.upper() + " " if i % 10 == 0 else shuffled
            items[str(i)] = {"filename": rng.choice(names), "caption": caption, "negative_caption": negative}
        (folder / "sugarcrepe" / f"{subset}.json").write_text(json.dumps(items))
        os.makedirs(folder / "sugarcrepe_pp", exist_ok=True)
        for number, item in enumerate(items.values()):     # every fifth negative equals its caption
            words = item["caption"].split()
            item.update(id=number, caption2=" ".join(rng.sample(words, len(words))))
        (folder / "sugarcrepe_pp" / f"{subset}.json").write_text(json.dumps(list(items.values())))
    return folder


@pytest.fixture
def unofficial(official):
    """The generated files in place of the official ones."""
    for bench in ("sugarcrepe", "sugarcrepe_pp"):
        for spec in official.table[bench]["files"].values():
            spec.update(n=20, sha256=None)


@torch.no_grad()
def item_by_item(model, folder, bench, subset):
    """The official protocol, each image and text by itself: (SugarCrepe or ITT, TOT), correct if strictly higher."""
    transform = open_clip.image_transform(224, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    itt, tot, known = [], [], {}

    def encode(text):       # equal texts once, see Plain
        tokens = tokenizer([text])
        if tuple(tokens[0].tolist()) not in known:
            known[tuple(tokens[0].tolist())] = model.encode_text(tokens, normalize=True)
        return known[tuple(tokens[0].tolist())]

    rows = json.loads((folder / bench / f"{subset}.json").read_text())
    for item in rows.values() if isinstance(rows, dict) else rows:
        image = model.encode_image(transform(Image.open(folder / "val2017" / item["filename"]))[None], normalize=True)
        text = {key: encode(item[key])
                for key in ("caption", "caption2", "negative_caption") if key in item}
        negative = (image @ text["negative_caption"].T).item()
        itt.append(int(all((image @ t.T).item() > negative for key, t in text.items() if key != "negative_caption")))
        if "caption2" in text:
            one, two, wrong = text["caption"], text["caption2"], text["negative_caption"]
            tot.append(int((one @ two.T).item() > (one @ wrong.T).item() and
                           (one @ two.T).item() > (two @ wrong.T).item()))
    return itt, tot


def test_sugarcrepe_equals_the_official_protocol_item_by_item(peer, crepe, unofficial, capsys):
    theirs, ours = peer
    results = run(ours, ["sugarcrepe", "sugarcrepe_pp"], **arguments(
        data_dir=str(crepe), image_root=str(crepe / "val2017")))
    for subset in TABLE["sugarcrepe"]["files"]:
        r = results["sugarcrepe"][subset]
        assert r["correct"] == item_by_item(theirs, crepe, "sugarcrepe", subset)[0]
        assert r["correct"][::5] == [0] * 4 and r["ties"] >= 4     # these negatives differ in capitals only
        assert 0 < r["accuracy"] < 1 and r["n"] == 20 and r["chance"] == 0.5
    for subset in TABLE["sugarcrepe_pp"]["files"]:
        itt, tot = item_by_item(theirs, crepe, "sugarcrepe_pp", subset)
        assert results["sugarcrepe_pp"][f"{subset}_itt"]["correct"] == itt and 0 < sum(itt) < 20
        assert results["sugarcrepe_pp"][f"{subset}_tot"]["correct"] == tot and 0 < sum(tot) < 20
    a = {k: v["accuracy"] for k, v in results["sugarcrepe"].items()}
    groups = [[a[k] for k in TABLE["sugarcrepe"]["files"] if k.startswith(g)] for g in ("replace", "swap", "add")]
    assert a["macro_7"] == pytest.approx(sum(sum(groups, [])) / 7) == pytest.approx(a["micro"])     # equal sizes here
    assert a["macro_3"] == pytest.approx(sum(sum(g) / len(g) for g in groups) / 3)
    print_table("sugarcrepe", results["sugarcrepe"], reference=True)
    shown = capsys.readouterr().out
    assert "macro_7" in shown and "SigLIP B/16 (published)" in shown and "95.3" in shown


def test_missing_images(peer, crepe, unofficial, tmp_path, capsys):
    args = arguments(data_dir=str(crepe), image_root=str(tmp_path))
    # counted over all subsets, and each once: one subset shows a single image here
    rows = json.loads((crepe / "sugarcrepe" / "replace_obj.json").read_text())
    one = {key: {**row, "filename": "000000000000.jpg"} for key, row in rows.items()}
    shutil.copytree(crepe / "sugarcrepe", tmp_path / "sugarcrepe")
    (tmp_path / "sugarcrepe" / "replace_obj.json").write_text(json.dumps(one))
    with pytest.raises(ValueError, match="^sugarcrepe: 9 of 9 images are missing, the first is .*--image-root DIR") as wrong:
        read(["sugarcrepe"], peer[1], {**args, "data_dir": str(tmp_path)})
    assert str(wrong.value).count("missing, ") == 1 and "\n" not in str(wrong.value)
    for name in sorted(os.listdir(crepe / "val2017"))[:5]:
        os.symlink(crepe / "val2017" / name, tmp_path / name)
    with pytest.raises(ValueError, match="4 of 9 images are missing.*--allow-missing skips some"):
        read(["sugarcrepe"], peer[1], args)
    args["allow_missing"] = True
    results = run(peer[1], ["sugarcrepe"], **args)["sugarcrepe"]
    assert 0 < sum(results[subset]["n"] for subset in TABLE["sugarcrepe"]["files"]) < 140
    assert "items skipped, without their image" in capsys.readouterr().out


def test_wrong_files(nano, crepe, official, tmp_path):
    args = arguments(data_dir=str(crepe))
    with pytest.raises(ValueError, match="replace_obj.json is not the official file of 1652 rows .20 rows.*download sugarcrepe"):
        read(["sugarcrepe"], nano, args)
    args["data_dir"] = str(tmp_path)
    with pytest.raises(ValueError, match="no .*replace_obj.json; get it: python evaluate.py download sugarcrepe"):
        read(["sugarcrepe"], nano, args)
    good = {"image_0": "a", "image_1": "b", "caption_0": "c", "caption_1": "d"}
    path = official(tmp_path, "winoground", "winoground", [good] * 3)
    official.table["winoground"]["files"]["winoground"]["n"] = 400
    with pytest.raises(ValueError, match="examples.jsonl is not the official file of 400 rows .3 rows"):
        read(["winoground"], nano, args)
    official.table["winoground"]["files"]["winoground"] |= {"n": 3, "sha256": "0" * 64}
    with pytest.raises(ValueError, match="examples.jsonl is not the official file of 3 rows .its sha256 is another"):
        read(["winoground"], nano, args)
    del official.table["winoground"]["files"]["winoground"]["sha256"]
    official(tmp_path, "winoground", "winoground", [good, {**good, "caption_2": "x"}, {"image_0": "a"}])
    with pytest.raises(ValueError, match="3 rows, not all with .*caption_1"):
        read(["winoground"], nano, args)
    with open(path, "a") as f:
        f.write("\n{")
    with pytest.raises(ValueError, match="is not the official file of . rows .Expecting"):
        read(["winoground"], nano, args)


def test_rows_that_a_protocol_cannot_mean(nano, official, tmp_path):
    """Files of the right number of rows and the right keys."""
    for folder in ("coco/val2017", "vg/VG_100K", "flickr8k/Flicker8k_Dataset"):
        picture(f"{tmp_path}/{folder}/1.jpg", random.Random(0))
    args = arguments(data_dir=str(tmp_path))
    foil = {"image_file": "1.jpg", "caption": "a dog", "foil": "a cat", "mturk": {"caption": 1}}
    doubted = "valse: no item of existence is left to score"
    test = {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "a dog"}]}
    for bench, part, rows, says in (
            ("valse", "existence", {"0": foil}, doubted),
            ("valse", "existence", {"0": {**foil, "mturk": {}}}, doubted),
            ("vl_checklist", "attribute_vg_color", [["VG_100K/1.jpg", {"POS": ["a dog"], "NEG": []}]],
             "vl_checklist attribute_vg_color: a row has no texts under POS and NEG"),
            ("whatsup", "A", [{"image_path": "val2017/1.jpg", "caption_options": ["a", "b", "c", "d"]}],
             "whatsup A: an image is called 1.jpg: expected OBJECT_PREPOSITION_OBJECT; get the file again"),
            ("flickr8k", "flickr8k", [{**test, "split": "train"}], "flickr8k: no item of flickr8k is left to score"),
            ("flickr8k", "flickr8k", [{**test, "sentences": [{"tokens": []}]}], r"has no text \(raw\)$")):
        official.table[bench]["files"] = {part: official.table[bench]["files"].get(part) or {"path": f"{part}.json"}}
        official(tmp_path, bench, part, rows)
        with pytest.raises(ValueError, match=says):
            read([bench], nano, args)
    official.table["mmvp"]["files"]["mmvp"]["n"] = None
    os.makedirs(tmp_path / "mmvp")
    for rows in ("1,Texts,a dog", "1,Texts,a dog\n2,Texts,", "1,Texts\n2,Texts"):
        (tmp_path / "mmvp" / "Questions.csv").write_text("Question ID,Type,Statement\n" + rows)
        with pytest.raises(ValueError, match="^mmvp: expected pairs of rows of three values: ID, type, statement$"):
            read(["mmvp"], nano, args)
    (tmp_path / "mmvp" / "Questions.csv").write_text('Question ID,Type,Statement\n1,Texts,"' + "no end " * 20_000)
    csv.field_size_limit(131_072)       # the default, which reading a table of pairs raises in this process
    with pytest.raises(ValueError, match="Questions.csv is not the official file of unknown rows .field larger than"):
        read(["mmvp"], nano, args)
    os.makedirs(tmp_path / "negbench")
    for answer in ("4", "-1", "1.5", ""):
        content = f"image_path,caption_0,caption_1,caption_2,caption_3,correct_answer,correct_answer_template\n1.jpg,a,b,c,d,{answer},hybrid"
        (tmp_path / "negbench" / "COCO_val_mcq_llama3.1_rephrased.csv").write_text(content)
        with pytest.raises(ValueError, match=f"^negbench: correct_answer '{answer}': expected 0 to 3$"):
            read(["negbench"], nano, {**args, "allow_missing": True})


def test_images_that_cannot_be_read_are_counted(nano, official, tmp_path, capsys):
    """Of one subset a half, of the other all: the first is scored, the second is told and left out."""
    picture(f"{tmp_path}/coco/val2017/1.jpg", random.Random(0))
    (tmp_path / "coco" / "val2017" / "torn.jpg").write_bytes(b"torn")
    row = {"filename": "1.jpg", "caption": "a dog", "negative_caption": "a cat"}
    official.table["sugarcrepe"]["files"] = {name: dict(official.table["sugarcrepe"]["files"][name])
                                             for name in ("swap_obj", "swap_att")}
    args = arguments(data_dir=str(tmp_path), allow_missing=True, quiet=True)
    official(tmp_path, "sugarcrepe", "swap_obj", [row, {**row, "filename": "torn.jpg"}])
    official(tmp_path, "sugarcrepe", "swap_att", [row])
    found = run(nano, ["sugarcrepe"], **args)["sugarcrepe"]
    assert {name: r["n"] for name, r in found.items()} == {"swap_obj": 1, "swap_att": 1, "swap": 2}
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("skipped 1 of 2 images, which cannot be read; the first: ") and out[0].endswith("torn.jpg")
    assert out[1:] == ["swap_obj: 1 of 2 items skipped, without their image"]
    with pytest.raises(ValueError, match="cannot read .*torn.jpg .*: check --image-root, or --allow-missing"):
        run(nano, ["sugarcrepe"], **{**args, "allow_missing": False})
    official(tmp_path, "sugarcrepe", "swap_att", [{**row, "filename": "torn.jpg"}])
    found = run(nano, ["sugarcrepe"], **args)["sugarcrepe"]         # and no mean without it
    assert list(found) == ["swap_obj"] and "swap_att: 1 of 1 items skipped" in capsys.readouterr().out
    unread = Outcome("x", torch.tensor([float("nan")]), 0.5, ["a"], ["a"])
    with pytest.raises(ValueError, match="^none of the items of x, y has an image that can be read: check --image-root$"):
        summarize([unread, replace(unread, subset="y")], {})


# ------------------------------------------------------------------------------------------------- other benches

def test_aro(nano, official, tmp_path):
    rng, plain = random.Random(1), Plain(nano)
    for i in range(6):
        picture(f"{tmp_path}/aro/images/{i}.jpg", rng)
    rows = []
    for i in range(70):
        x, y, w, h = rng.randint(0, 20), rng.randint(0, 20), rng.randint(10, 30), rng.randint(10, 30)
        true = caption(rng)
        rows.append({"image_path": f"{i % 6}.jpg", "bbox_x": x, "bbox_y": y, "bbox_w": w, "bbox_h": h,
                     "true_caption": true, "false_caption": true.upper() if i % 10 == 0 else caption(rng)})
    relations = ["riding", "behind", "near", "with", "to the left of"]      # near and with are symmetric
    relation = [{**r, "relation_name": rng.choice(relations)} for r in rows]
    attribution = [{**r, "attributes": ["red", "big"] if i < 30 else ["old", "wet"] if i < 55 else ["hot", "dry"]}
                   for i, r in enumerate(rows)]
    official(tmp_path, "aro", "vg_relation", relation)
    official(tmp_path, "aro", "vg_attribution", attribution)
    for name, ending in ("coco", "coco_order"), ("flickr30k", "flickr30k_order"):
        picture(f"{tmp_path}/{name}/{name}/1.jpg", rng)
        captions = [caption(rng) for _ in range(9)] + ["dog"]
        official(tmp_path, "aro", ending, [{"image": f"{name}/1.jpg", "caption": captions}])
    results = run(nano, ["aro"], **arguments(data_dir=str(tmp_path)))["aro"]

    correct = []
    for r in rows:
        box = (r["bbox_x"], r["bbox_y"], r["bbox_x"] + r["bbox_w"], r["bbox_y"] + r["bbox_h"])
        path = f"{tmp_path}/aro/images/{r['image_path']}"
        correct.append(int(plain.cos(path, r["true_caption"], box) > plain.cos(path, r["false_caption"], box)))
    assert results["vg_relation"]["correct"] == results["vg_attribution"]["correct"] == correct
    assert 0 < sum(correct) < 63 and results["vg_relation"]["ties"] >= 7
    names = [r["relation_name"] for r in relation]
    shares = [np.mean([c for c, n in zip(correct, names) if n == x]) for x in ("riding", "behind", "to the left of")]
    assert results["vg_relation_macro"]["accuracy"] == pytest.approx(np.mean(shares))
    assert results["vg_attribution_macro"]["accuracy"] == pytest.approx(
        np.mean([np.mean(correct[:30]), np.mean(correct[30:55])]))      # the third pair has 15 items
    assert results["vg_attribution_macro"]["n"] == 55
    for name in ("coco", "flickr30k"):
        captions = json.load(open(tmp_path / official.table["aro"]["files"][f"{name}_order"]["path"]))[0]["caption"]
        scores = [[plain.cos(f"{tmp_path}/{name}/{name}/1.jpg", t) for t in orders(c)] for c in captions]
        r = results[f"{name}_order"]
        assert r["correct"] == [int(all(s[0] > other for other in s[1:])) for s in scores] and r["chance"] == 0.2
        assert r["correct"][-1] == 0 and r["ties"] >= 1     # one word has one order


def test_orders_are_the_right_shuffles():
    text = "A small red dog is running over the green grass, behind two old wooden chairs."
    true, nouns, others, within, threes = (t.split() for t in orders(text))
    assert " ".join(true) == "a small red dog is running over the green grass, behind two old wooden chairs"
    words = "a small red dog is running over the green grass , behind two old wooden chairs".split()
    assert sorted(nouns) == sorted(others) == sorted(within) == sorted(threes) == sorted(words)
    noun, adjective = {"dog", "grass", "chairs"}, {"small", "red", "green", "old", "wooden"}
    for new, old in zip(nouns, words):      # each kind stays in its places
        assert (new in noun) == (old in noun) and (new in adjective) == (old in adjective)
        assert new == old or old in noun | adjective
    assert [w for w in others if w in noun | adjective] == [w for w in words if w in noun | adjective]
    assert nouns != words and others != words and within != words and threes != words
    for i in range(0, 15, 3):
        assert sorted(within[i:i + 3]) == sorted(words[i:i + 3])
    pieces = [words[i:i + 3] for i in range(0, 15, 3)] + [["chairs"]]
    assert any(sum(order, []) == threes for order in itertools.permutations(pieces))
    assert orders(text) == orders(text) and len(orders("dog " * 50)[1].split()) == 30


def test_valse(nano, official, tmp_path):
    rng, plain, expected = random.Random(2), Plain(nano), {}
    for i in range(4):
        picture(f"{tmp_path}/{['valse/images', 'coco/val2017', 'coco/val2014', 'coco/train2014'][i]}/{i}.jpg", rng)
    folders = ["valse/images", "coco/val2017", "coco/val2014", "coco/train2014"]
    for subset in TABLE["valse"]["files"]:
        rows = {f"x{i}": {"image_file": f"{i % 4}.jpg", "caption": (c := caption(rng)),
                          "foil": c if i == 3 else caption(rng), "mturk": {"caption": i % 4, "foil": 0, "other": 0}}
                for i in range(20)}
        official(tmp_path, "valse", subset, rows)
        expected[subset] = [int(plain.cos(path, r["caption"]) > plain.cos(path, r["foil"])) for r in rows.values()
                            if r["mturk"]["caption"] >= 2
                            for path in [f"{tmp_path}/{folders[int(r['image_file'][0])]}/{r['image_file']}"]]
    results = run(nano, ["valse"], **arguments(data_dir=str(tmp_path)))["valse"]
    assert {s: results[s]["correct"] for s in expected} == expected and sum(map(sum, expected.values())) > 0
    a = {s: np.mean(c) for s, c in expected.items()}
    assert results["macro_11"]["accuracy"] == pytest.approx(np.mean(list(a.values())))
    phenomena = [["existence"], ["plurals"], ["counting-small-quant", "counting-hard", "counting-adversarial"],
                 ["relations"], ["action-replacement", "actant-swap"], ["coreference-standard", "coreference-hard"],
                 ["foil-it"]]
    assert results["macro_7"]["accuracy"] == pytest.approx(np.mean([np.mean([a[s] for s in p]) for p in phenomena]))
    for count in ("3", None, True):         # read by --allow-missing, which takes parts of files
        rows["x0"]["mturk"]["caption"] = count
        official(tmp_path, "valse", "existence", rows)
        with pytest.raises(ValueError, match=f"valse existence: mturk's caption is {count!r}: expected a number; get .*"):
            read(["valse"], nano, arguments(data_dir=str(tmp_path)))


def test_winoground_colorswap_cola(nano, official, tmp_path):
    rng, plain = random.Random(3), Plain(nano)
    pairs = [(f"a{rng.randrange(6)}", f"b{rng.randrange(6)}", caption(rng), caption(rng)) for _ in range(60)]
    pairs[:3] = [("a0", "b0", "a dog", "A dog!"), ("a1", "a1", "a red cat", "the man"), ("a2", "a2", "a dog", "a dog")]
    for name in {name for pair in pairs for name in pair[:2]}:
        for folder in ("winoground/data/images", "colorswap/images", "cola/images"):
            picture(f"{tmp_path}/{folder}/{name}.png", random.Random(name))
    official(tmp_path, "winoground", "winoground", [
        dict(zip(("image_0", "image_1", "caption_0", "caption_1"), pair)) for pair in pairs])
    official(tmp_path, "colorswap", "colorswap", [
        {"image_1": f"images/{a}.png", "image_2": f"images/{b}.png", "caption_1": s, "caption_2": t}
        for a, b, s, t in pairs])
    official(tmp_path, "cola", "multi_objects", [
        [f"https://x.org/{a}.png", s, f"https://x.org/{b}.png", t] for a, b, s, t in pairs])
    results = run(nano, ["winoground", "colorswap", "cola"], **arguments(data_dir=str(tmp_path)))
    expected = {"text": [], "image": [], "group": []}
    for a, b, s, t in pairs:
        c0_i0, c1_i0, c0_i1, c1_i1 = (plain.cos(f"{tmp_path}/cola/images/{i}.png", c) for i in (a, b) for c in (s, t))
        expected["text"].append(int(c0_i0 > c1_i0 and c1_i1 > c0_i1))
        expected["image"].append(int(c0_i0 > c0_i1 and c1_i1 > c1_i0))
        expected["group"].append(expected["text"][-1] * expected["image"][-1])
    for bench in ("winoground", "colorswap"):
        assert {s: results[bench][s]["correct"] for s in expected} == expected
        assert [results[bench][s]["chance"] for s in expected] == [1 / 4, 1 / 4, 1 / 6]
    assert results["cola"]["multi_objects"]["correct"] == expected["image"]
    assert all(0 < sum(x) < 57 and x[2] == 0 for x in expected.values())
    assert results["cola"]["multi_objects"]["ties"] >= 2


def test_whatsup(nano, official, tmp_path, capsys):
    rng, plain = random.Random(4), Plain(nano)
    expected, last = {}, {"A": ("on", "under"), "B": ("in-front_of", "behind")}
    for subset, folder in ("A", "controlled_images"), ("B", "controlled_clevr"):
        rows, correct = [], []
        for number, objects in enumerate([("dog", "red-table"), ("cat", "chair"), ("man", "table"), ("two", "woman")]):
            sides = ("left_of", "right_of") + last[subset]
            for side in sides:
                name = f"data/{folder}/{objects[0]}_{side}_{objects[1]}.jpeg"
                picture(f"{tmp_path}/whatsup/data/{folder}/{os.path.basename(name)}", rng)
                options = [f"A {objects[0]} {s.replace('_', ' ')} a {objects[1]}" for s in sides]
                path = f"{tmp_path}/whatsup/data/{folder}/{os.path.basename(name)}"
                # some sets whole, some halves: what this model likes best comes first
                liked = number == 0 or number == 1 and side in sides[:2]
                options.sort(key=lambda o: -plain.cos(path, o) if liked else side.replace("_", " ") not in o)
                if number == 3 and side == "right_of":
                    options[2] = options[0]     # a tie
                rows.append({"image_path": name, "caption_options": options})
                scores = [plain.cos(path, o) for o in options]
                correct.append(int(all(scores[0] > s for s in scores[1:])))
        official(tmp_path, "whatsup", subset, rows)
        expected[subset] = correct
    for subset in ("coco_one", "coco_two", "vg_one", "vg_two"):
        rows = [[i % 3 + 100, caption(rng), caption(rng)] for i in range(12)]
        rows[0][2] = rows[0][1]
        folder = "coco/val2017/{:012d}.jpg" if "coco" in subset else "whatsup/data/vg_images/{}.jpg"
        for i in (100, 101, 102):
            picture(f"{tmp_path}/" + folder.format(i), random.Random(i))
        official(tmp_path, "whatsup", subset, rows)
        expected[subset] = [int(plain.cos(f"{tmp_path}/" + folder.format(i), a) > plain.cos(
            f"{tmp_path}/" + folder.format(i), b)) for i, a, b in rows]
    results = run(nano, ["whatsup"], **arguments(data_dir=str(tmp_path)))["whatsup"]
    assert {s: results[s]["correct"] for s in expected} == expected
    assert results["A"]["chance"] == 1 / 4 and results["coco_one"]["chance"] == 1 / 2
    for subset in "AB":         # four items a set: left, right and the other two
        halves = [min(expected[subset][i:i + 2]) for i in range(0, 16, 2)]
        assert results[f"{subset}_pair"]["correct"] == halves and results[f"{subset}_pair"]["chance"] == 1 / 16
        fours = [min(expected[subset][i:i + 4]) for i in range(0, 16, 4)]
        assert results[f"{subset}_set"]["correct"] == fours and results[f"{subset}_set"]["chance"] == 1 / 256
        assert 0 < sum(fours) < 4 and sum(halves) > 2 * sum(fours)
    means = [np.mean(expected[s]) for s in TABLE["whatsup"]["files"]]
    assert results["macro_6"]["accuracy"] == pytest.approx(np.mean(means))
    path = tmp_path / official.table["whatsup"]["files"]["B"]["path"]
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))      # the first set lacks an image, and its first pair
    capsys.readouterr()
    part = run(nano, ["whatsup"], **arguments(data_dir=str(tmp_path), allow_missing=True, quiet=True))["whatsup"]
    assert (part["B"]["n"], part["B_pair"]["n"], part["B_set"]["n"]) == (15, 7, 3) and part["A_set"]["n"] == 4
    assert capsys.readouterr().out.splitlines() == ["B_pair: 1 of 8 skipped, which lack some of their 2 images",
                                                    "B_set: 1 of 4 skipped, which lack some of their 4 images"]


def scores_of(plain, images, texts):
    """Cosines of two images and two texts: (text, image, group) of Winoground."""
    (a, b), (c, d) = [[plain.cos(path, text) for text in texts] for path in images]
    text, image = a > b and d > c, a > c and d > b
    return int(text), int(image), int(text and image)


def test_bivlc_and_vismin(nano, official, tmp_path):
    rng, plain, expected = random.Random(11), Plain(nano), {"bivlc": [], "vismin": []}
    rows = {"bivlc": [], "vismin": []}
    for i in range(40):
        for bench, columns in ("bivlc", ("image", "negative_image")), ("vismin", ("image_0", "image_1")):
            names = [f"{i}_{column}.jpg" for column in columns]
            for name in names:
                picture(f"{tmp_path}/{bench}/{name}", random.Random(f"{i % 9} {name}"))
            texts = [caption(rng), caption(rng)]
            expected[bench].append(scores_of(plain, [f"{tmp_path}/{bench}/{name}" for name in names], texts))
            row = dict(zip(columns, names))
            row |= dict(zip(("caption", "negative_caption") if bench == "bivlc" else ("text_0", "text_1"), texts))
            rows[bench].append({**row, "category": "count" if i % 4 else "object", "type": "add"})
    for bench in rows:
        official(tmp_path, bench, "test", rows[bench])
    results = run(nano, ["bivlc", "vismin"], **arguments(data_dir=str(tmp_path)))
    for place, rule in enumerate(("text", "image", "group")):
        right = [x[place] for x in expected["bivlc"]]
        assert results["bivlc"][rule]["correct"] == right and results["bivlc"][rule]["chance"] == (1 / 4, 1 / 4, 1 / 6)[place]
        kinds = {"object": expected["vismin"][::4], "count": [x for i, x in enumerate(expected["vismin"]) if i % 4]}
        for kind, some in kinds.items():
            assert results["vismin"][f"{kind}_{rule}"]["correct"] == [x[place] for x in some]
        mean = np.mean([np.mean([x[place] for x in some]) for some in kinds.values()])
        assert results["vismin"][rule]["accuracy"] == pytest.approx(mean)
    assert 0 < sum(x[2] for x in expected["bivlc"]) < 40


def test_hub_data_sets_are_written_byte_for_byte(tmp_path, monkeypatch):
    """With a stand-in of the package datasets: images are its dicts of bytes where they are not decoded."""
    class Rows(list):
        def cast_column(self, name, kind):
            assert kind == "encoded"
            return Rows({**row, name: {"bytes": row[name], "path": None}} for row in self)

    fake = types.ModuleType("datasets")
    fake.Image = lambda decode: "encoded" if not decode else None
    given = [{"image": b"one", "negative_image": b"two", "caption": "a \u00e9", "negative_caption": "b", "type": "add"}]
    fake.load_dataset = lambda name, split: Rows(given) if (name, split) == ("imirandam/BiVLC", "test") else None
    monkeypatch.setitem(sys.modules, "datasets", fake)
    evaluate.main(["download", "bivlc", "--data-dir", str(tmp_path)])
    assert (tmp_path / "bivlc" / "0_image.jpg").read_bytes() == b"one"
    assert (tmp_path / "bivlc" / "0_negative_image.jpg").read_bytes() == b"two"
    row = json.loads((tmp_path / "bivlc" / "test.jsonl").read_text())
    assert row == {**given[0], "image": "0_image.jpg", "negative_image": "0_negative_image.jpg"}
    monkeypatch.setitem(sys.modules, "datasets", None)
    evaluate.main(["download", "bivlc", "--data-dir", str(tmp_path)])       # is there
    with pytest.raises(SystemExit, match="pip install datasets"):
        evaluate.main(["download", "vismin", "--data-dir", str(tmp_path)])


def test_mmvp(nano, official, tmp_path):
    rng, plain, rows, expected = random.Random(12), Plain(nano), [], {"Quantity and Count": [], "Texts": []}
    for i in range(24):
        pattern = "Quantity and Count" if i < 14 else "Texts"
        texts, paths = [caption(rng), caption(rng)], []
        for number in (2 * i + 1, 2 * i + 2):
            paths.append(f"{tmp_path}/mmvp/MLLM_VLM Images/{pattern}/{number}.jpg")
            picture(paths[-1], rng)
            rows.append([number, pattern, texts[(number + 1) % 2]])
        expected[pattern].append(scores_of(plain, paths, [f"a photo of {text}" for text in texts])[1])
    official.table["mmvp"]["files"]["mmvp"]["n"] = 48
    with open(tmp_path / "mmvp" / "Questions.csv", "w", newline="") as f:
        csv.writer(f).writerows([["Question ID", "Type", "Statement"], *rows])
    results = run(nano, ["mmvp"], **arguments(data_dir=str(tmp_path)))["mmvp"]
    assert {name: results[name]["correct"] for name in expected} == expected and sum(map(sum, expected.values())) > 0
    assert results["macro"]["accuracy"] == pytest.approx(np.mean([np.mean(x) for x in expected.values()]))
    assert results["micro"]["accuracy"] == pytest.approx(np.mean(sum(expected.values(), [])))


def test_negbench(nano, tmp_path):
    rng, plain, rows, expected = random.Random(13), Plain(nano), [], {"coco": []}
    for i in range(6):
        picture(f"{tmp_path}/coco/val2017/{i}.jpg", rng)
    for i in range(30):
        texts, true, kind = [caption(rng) for _ in range(4)], rng.randrange(4), ("positive", "negative", "hybrid")[i % 3]
        rows.append([f"data/coco/images/val2017/{i % 6}.jpg", *texts, true if i % 2 else f"{true}.0", kind])
        scores = [plain.cos(f"{tmp_path}/coco/val2017/{i % 6}.jpg", text) for text in texts]
        right = int(all(scores[true] > x for j, x in enumerate(scores) if j != true))
        expected["coco"].append(right)
        expected.setdefault(f"coco_{kind}", []).append(right)
    os.makedirs(tmp_path / "negbench")
    with open(tmp_path / "negbench" / "COCO_val_mcq_llama3.1_rephrased.csv", "w", newline="") as f:
        head = ["image_path", *(f"caption_{i}" for i in range(4)), "correct_answer", "correct_answer_template"]
        csv.writer(f).writerows([head, *rows])
    results = run(nano, ["negbench"], **arguments(data_dir=str(tmp_path), allow_missing=True))["negbench"]
    assert {name: r["correct"] for name, r in results.items()} == expected and 0 < sum(expected["coco"]) < 30
    assert all(r["chance"] == 1 / 4 for r in results.values())


def test_hard_positives_and_vl_checklist(nano, official, tmp_path):
    rng, plain, expected = random.Random(14), Plain(nano), {}
    for i in range(5):
        picture(f"{tmp_path}/vg/VG_100K/{i}.jpg", rng)
        picture(f"{tmp_path}/aro/images/{i}.jpg", rng)
    for part in ("swap", "replace_att", "replace_rel"):
        rows, others, expected[part] = [], [], []
        for i in range(30):
            x, y, z = caption(rng), caption(rng), caption(rng)
            row = {"image_id": str(i % 5), "image_path": f"data/VG_100K/{i % 5}.jpg", "true_caption": x, "false_caption": z}
            path, box = f"{tmp_path}/vg/VG_100K/{i % 5}.jpg", None
            if part == "swap":
                row |= {"image_path": f"{i % 5}.jpg", "bbox_x": 3, "bbox_y": i, "bbox_w": 20, "bbox_h": 12}
                path, box = f"{tmp_path}/aro/images/{i % 5}.jpg", (3, i, 23, i + 12)
            rows.append(row)
            others.append({**row, "true_caption": y})
            scores = [plain.cos(path, text, box) for text in (x, y, z)]
            expected[part].append(int(min(scores[:2]) > scores[2]))
        official(tmp_path, "hard_positives", part, rows)
        official(tmp_path, "hard_positives", f"{part}_positive", others)
    results = run(nano, ["hard_positives"], **arguments(data_dir=str(tmp_path)))["hard_positives"]
    assert {name: results[name]["correct"] for name in expected} == expected and results["swap"]["chance"] == 1 / 3
    assert list(results) == [*expected, "macro_3"] and 0 < sum(expected["swap"]) < 30
    official(tmp_path, "hard_positives", "swap_positive", others[:-1])
    with pytest.raises(ValueError, match="swap: 30 captions and 29 hard positives|not the official"):
        run(nano, ["hard_positives"], **arguments(data_dir=str(tmp_path)))

    expected = {}
    for part in TABLE["vl_checklist"]["files"]:
        rows, expected[part] = [], []
        for i in range(4):
            row = {"POS": [caption(rng), "not this"], "NEG": [caption(rng), "nor this"]}
            rows.append([f"VG_100K/{i}.jpg", row])
            path = f"{tmp_path}/vg/VG_100K/{i}.jpg"
            expected[part].append(int(plain.cos(path, row["POS"][0]) > plain.cos(path, row["NEG"][0])))
        official(tmp_path, "vl_checklist", part, rows)
    results = run(nano, ["vl_checklist"], **arguments(data_dir=str(tmp_path)))["vl_checklist"]
    assert {name: results[name]["correct"] for name in expected} == expected
    means = {kind: np.mean([np.mean(x) for name, x in expected.items() if name.startswith(kind)])
             for kind in ("attribute", "object", "relation")}
    assert {name: results[name]["accuracy"] for name in means} == pytest.approx(means)
    assert results["macro_3"]["accuracy"] == pytest.approx(np.mean(list(means.values())))


def test_flickr8k(nano, official, tmp_path):
    rng, plain, images = random.Random(15), Plain(nano), []
    for i in range(12):
        picture(f"{tmp_path}/flickr8k/Flicker8k_Dataset/{i}.jpg", rng)
        sentences = [{"raw": caption(rng), "tokens": []} for _ in range(rng.randint(1, 3))]
        images.append({"filename": f"{i}.jpg", "split": "test" if i < 9 else "train", "sentences": sentences})
    official(tmp_path, "flickr8k", "flickr8k", {"dataset": "flickr8k", "images": images})
    official.table["flickr8k"]["files"]["flickr8k"]["n"] = 12
    results = run(nano, ["flickr8k"], **arguments(data_dir=str(tmp_path)))["flickr8k"]
    texts = [(i, s["raw"]) for i, row in enumerate(images[:9]) for s in row["sentences"]]
    scores = [[plain.cos(f"{tmp_path}/flickr8k/Flicker8k_Dataset/{i}.jpg", c) for _, c in texts] for i in range(9)]
    for k in (1, 5):
        of = [{j for j, (i, _) in enumerate(texts) if i == n} for n in range(9)]
        assert results[f"i2t_r{k}"]["correct"] == recall(scores, of, k)
        assert results[f"t2i_r{k}"]["correct"] == recall(np.array(scores).T.tolist(), [{i} for i, _ in texts], k)
    assert results["mean_r5"]["accuracy"] == (results["i2t_r5"]["accuracy"] + results["t2i_r5"]["accuracy"]) / 2


def test_long_retrieval(nano, official, tmp_path):
    rng, plain, whole = random.Random(17), Plain(nano), {}
    folders = {"docci": "docci/images", "iiw": "docci/images_aar", "dci": "dci/densely_captioned_images/photos",
               "urban1k": "urban1k/Urban1k/image"}
    for part, folder in folders.items():
        whole[part] = []
        for i in range(12):
            text = ". ".join(caption(rng) for _ in range(rng.randint(1, 3))) + "."
            prefix = {"docci": "test_", "iiw": "aar_test_", "dci": "sa_", "urban1k": ""}[part]
            whole[part].append((f"{tmp_path}/{folder}/{prefix}{i + 1}.jpg", text))
            picture(whole[part][-1][0], rng)
    official(tmp_path, "long_retrieval", "docci", [
        {"split": "test", "image_file": os.path.basename(path), "description": text} for path, text in whole["docci"]] + [
        {"split": "train", "image_file": "x.jpg", "description": "a dog"}])
    with open(tmp_path / official.table["long_retrieval"]["files"]["docci"]["path"], "r+") as f:    # a row a line
        rows = json.load(f)
        f.seek(0)
        f.write("\n".join(map(json.dumps, rows)))
        f.truncate()
    official(tmp_path, "long_retrieval", "iiw", [
        {"image/key": os.path.basename(path)[:-4], "IIW": text} for path, text in whole["iiw"]])
    for part in ("urban1k/Urban1k/caption", "dci/densely_captioned_images/complete"):
        os.makedirs(tmp_path / part)
    for i, (path, text) in enumerate(whole["dci"]):     # the first sentence and the rest
        first, _, rest = text.partition(" ")
        row = {"image": os.path.basename(path), "short_caption": first, "extra_caption": rest, "mask_data": {}}
        (tmp_path / f"dci/densely_captioned_images/complete/{i}.json").write_text(json.dumps(row))
    for i, (_, text) in enumerate(whole["urban1k"]):
        (tmp_path / f"urban1k/Urban1k/caption/{i + 1}.txt").write_text(text)
    official.table["long_retrieval"]["files"]["urban1k"]["n"] = 12
    official.table["long_retrieval"]["files"]["dci"]["n"] = 12
    results = run(nano, ["long_retrieval"], **arguments(data_dir=str(tmp_path)))["long_retrieval"]
    assert len(results) == 12
    for part, pairs in whole.items():
        scores = [[plain.cos(path, text) for _, text in pairs] for path, _ in pairs]
        assert results[f"{part}_i2t_r1"]["correct"] == recall(scores, [{i} for i in range(12)], 1)
        assert results[f"{part}_t2i_r1"]["correct"] == recall(np.array(scores).T.tolist(), [{i} for i in range(12)], 1)
        fine = [(i, sentence.rstrip(".")) for i, (_, text) in enumerate(pairs) for sentence in text.split(". ")]
        scores = [[plain.cos(path, text) for path, _ in pairs] for _, text in fine]
        assert results[f"{part}_fine_t2i_r1"]["correct"] == recall(scores, [{i} for i, _ in fine], 1)
    os.remove(tmp_path / "urban1k/Urban1k/caption/3.txt")
    with pytest.raises(ValueError, match="caption is not the official file of 12 rows .11 rows"):
        run(nano, ["long_retrieval"], **arguments(data_dir=str(tmp_path)))


@pytest.mark.parametrize("bench", ["flowers", "cars", "eurosat", "gtsrb", "country211", "mnist", "svhn"])
def test_sets_with_names_and_prompts_of_clip_benchmark(nano, tmp_path, monkeypatch, bench):
    known = json.loads((evaluate.ASSETS / "classes.json").read_text())[bench]
    names = known.get("classes") or [f"car {i}" for i in range(196)]
    rng, labels = random.Random(18), [0, 1, 1, len(names) - 1]
    for i in range(4):
        picture(f"{tmp_path}/{i}.png", rng)

    class Fake:
        def __init__(self, root, download, **split):
            assert root == str(tmp_path / bench) and split == evaluate.TORCHVISION[bench]["split"]
            if bench == "cars":
                self.classes = names
            if bench in ("cars", "gtsrb"):
                self._samples = [(f"{tmp_path}/{i}.png", label) for i, label in enumerate(labels)]
            else:
                self.targets = labels

        def __len__(self):
            return 4

        def __getitem__(self, i):
            return load_image(f"{tmp_path}/{i}.png"), labels[i]

    monkeypatch.setattr(evaluate.torchvision.datasets, evaluate.TORCHVISION[bench]["class"], Fake)
    results = run(nano, [bench], **arguments(data_dir=str(tmp_path)))[bench]
    plain, means = Plain(nano), []
    for name in names:
        texts = [template.replace("{}", name.replace("_", " ")) for template in known["templates"]]
        means.append(torch.stack([plain.text(text) for text in texts]).mean(0))
    scores = [[(plain.image(f"{tmp_path}/{i}.png") @ m / m.norm()).item() for m in means] for i in range(4)]
    right = recall(scores, [{label} for label in labels], 1)
    assert results["top1"]["correct"] == right
    assert results["top1_macro"]["accuracy"] == pytest.approx((right[0] + (right[1] + right[2]) / 2 + right[3]) / 3)


def test_caltech101_as_it_is_unpacked(nano, tmp_path):
    """All images of 101 kinds of objects and of the background, by CLIP_benchmark's names and 34 prompts."""
    known, rng = json.loads((evaluate.ASSETS / "classes.json").read_text())["caltech101"], random.Random(19)
    kinds = ["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "Motorbikes", "accordion", "airplanes"]
    kinds += [f"b{i:03d}" for i in range(94)] + ["yin_yang"]        # the first and the last, as they are sorted
    assert len(known["classes"]) == len(kinds) == 102 and kinds == sorted(kinds)
    names = [*known["classes"][:7], known["classes"][-1]]
    assert names == ["background", "off-center face", "centered face", "leopard", "motorbike", "accordion", "airplane",
                     "yin and yang symbol"]
    files = []
    for number, kind in enumerate(kinds):
        for i in range(1 + number % 2):
            files.append((f"{tmp_path}/caltech101/caltech101/101_ObjectCategories/{kind}/image_{i + 1:04d}.jpg", number))
            picture(files[-1][0], rng)
    results = run(nano, ["caltech101"], **arguments(data_dir=str(tmp_path)))["caltech101"]
    plain, means = Plain(nano), []
    for name in known["classes"]:
        means.append(torch.stack([plain.text(text.replace("{}", name)) for text in known["templates"]]).mean(0))
    means = torch.nn.functional.normalize(torch.stack(means), dim=-1)
    scores = [(means @ plain.image(path)).tolist() for path, _ in files]
    right = recall(scores, [{label} for _, label in files], 5)
    assert results["top5"]["correct"] == right and 0 < sum(right)
    first = recall(scores, [{label} for _, label in files], 1)
    by_kind = [np.mean([x for x, (_, label) in zip(first, files) if label == number]) for number in range(102)]
    assert results["top1_macro"]["accuracy"] == pytest.approx(np.mean(by_kind)) and len(known["templates"]) == 34


def test_attacked_images_are_scored_beside_the_others(nano, tmp_path):
    """--attack: each image by itself, with its random start, whatever the batch; no pixel moves by more than E of 255."""
    rng = random.Random(0)
    for i in range(12):
        os.makedirs(tmp_path / "data" / str(i % 3), exist_ok=True)
        picture(f"{tmp_path}/data/{i % 3}/{i}.png", rng)
    (tmp_path / "names.txt").write_text("red dog\nblue cat\ntable\n")
    where = {"data": str(tmp_path / "data"), "classes": str(tmp_path / "names.txt"), "quiet": True}
    clean = evaluate.run(nano, ["folder"], **where)["folder"]
    found = evaluate.run(nano, ["folder"], attack=8, attack_steps=9, **where)["folder"]
    assert {k: v for k, v in found.items() if not k.startswith("attacked")} == clean
    assert found.keys() - clean.keys() == {"attacked_top1", "attacked_top1_macro", "attacked_top5"}
    assert found["attacked_top1"]["right"] < found["top1"]["right"] and found["attacked_top5"]["accuracy"] == 1
    in_threes = evaluate.run(nano, ["folder"], attack=8, attack_steps=9, batch_size=3, **where)["folder"]
    assert in_threes["attacked_top1"]["correct"] == found["attacked_top1"]["correct"]
    weaker = evaluate.run(nano, ["folder"], attack=1, attack_steps=9, **where)["folder"]
    assert weaker["attacked_top1"]["attack"] == [1, 9]
    evaluate.paired_differences("folder", {"top1": found["top1"]}, weaker)
    with pytest.raises(ValueError, match="folder attacked_top1: .* differ in items, data, attack or protocol version"):
        evaluate.paired_differences("folder", found, weaker)        # no model is the better one by that
    names = sorted(tmp_path.glob("data/*/*.png"))
    texts = torch.nn.functional.normalize(nano.encode_text(nano.tokenize(
        [f"a photo of a {name}." for name in ("red dog", "blue cat", "table")])), dim=-1).detach()
    right = []
    for i, path in enumerate(names):        # image by image, in pixels
        pixels = nano.transform(Image.open(path))[None] / 2 + 0.5
        own = torch.tensor([int(path.parent.name)])
        generator = torch.Generator().manual_seed(i)
        noise = torch.randint(256, pixels.shape[1:], dtype=torch.uint8, generator=generator)[None]
        changed = (pixels + 8 / 255 * (noise / 127.5 - 1)).clamp(0, 1)
        for _ in range(9):
            changed = changed.detach().requires_grad_()
            logits = nano.logit_scale.exp() * nano.encode_image(2 * changed - 1, normalize=True) @ texts.T
            torch.nn.functional.cross_entropy(logits, own).backward()
            changed = changed.detach() + changed.grad.sign() / 255
            changed = torch.min(torch.max(changed, pixels - 8 / 255), pixels + 8 / 255).clamp(0, 1)
        assert (changed - pixels).abs().max() <= 8 / 255 + 1e-6
        right.append(int((nano.encode_image(2 * changed - 1, normalize=True) @ texts.T).argmax() == own))
    assert found["attacked_top1"]["correct"] == right
    nano.zero_grad()
    for options, says in (({"attack": 1, "attack_steps": 0}, "at least 1 step"), ({"attack": -1}, "at least 0")):
        with pytest.raises(ValueError, match=says):
            evaluate.run(nano, ["folder"], **where, **options)
    with pytest.raises(ValueError, match="zero-shot classification"):
        evaluate.run(nano, ["retrieval"], attack=1, quiet=True, data=captioned(tmp_path), image_root=str(tmp_path))


def test_an_attack_on_unknown_pixels_is_told_before_anything_is_encoded(nano):
    """Without Normalize at the end of the transform nobody knows what a pixel is."""
    class Steps:
        def __init__(self, *steps):
            self.transforms = steps

        def __call__(self, image):
            return nano.transform(image)

    def encode(inputs):
        raise AssertionError("encoded")

    model = types.SimpleNamespace(encode_image=encode, encode_text=encode, tokenize=nano.tokenize)
    normalize = nano.transform.transforms[-1]
    for transform, name in ((lambda image: nano.transform(image), "function"), (Steps(), "Steps"),
                            (Steps(normalize, torch.nn.Identity()), "Identity")):
        model.transform = transform
        with pytest.raises(ValueError, match=f"--attack: the model's transform ends with {name}: expected .*Normalize.*; "
                                             "give .*, or leave --attack out$"):
            evaluate.run(model, ["scenes"], attack=1, quiet=True)
    model.transform = Steps(normalize)
    with pytest.raises(AssertionError, match="encoded"):
        evaluate.run(model, ["scenes"], attack=1, quiet=True)


def frozen(encode):
    """As an encoder of a library may be written."""
    return torch.no_grad()(encode)


@pytest.mark.parametrize("cut", [frozen, torch.inference_mode(), lambda encode: lambda pixels: encode(pixels.detach())])
def test_an_attack_without_a_gradient_is_told_before_anything_is_encoded(nano, cut):
    encoded = []
    model = types.SimpleNamespace(encode_image=cut(nano.encode_image), encode_text=encoded.append, tokenize=nano.tokenize,
                                  transform=nano.transform)
    with pytest.raises(ValueError, match="--attack: the model's encode_image gives no gradient to pixels: expected .*; "
                                         "give the model such a one, or leave --attack out$"):
        evaluate.run(model, ["scenes"], attack=1, quiet=True)
    assert encoded == []


def captioned(folder):
    (folder / "pairs.csv").write_text("image,caption\n" + "".join(f"data/{i}/{i}.png,picture {i}\n" for i in range(3)))
    return str(folder / "pairs.csv")


@pytest.mark.parametrize("bench, folders", [
    ("imagenet_v2", {"0": 0, "10": 10, "2": 2}), ("imagenet_a", {"n01498041": 6, "n01531178": 11}),
    ("imagenet_r", {"n01443537": 1, "n01484850": 2, "n01498041": 6}), ("imagenet_sketch", {"n01440764": 0, "n15075141": 999})])
def test_imagenet_variants(nano, official, tmp_path, bench, folders):
    """Only the classes with a folder compete, under their names of imagenet's 1,000."""
    rng, plain, files = random.Random(16), Plain(nano), []
    known = json.loads((evaluate.ASSETS / "imagenet.json").read_text())
    spec = official.table[bench]
    for label, name in enumerate(sorted(folders)):
        for i in range(2):
            files.append((f"{tmp_path}/{spec['folder']}/{name}/{i}.png", label))
            picture(files[-1][0], rng)
    spec["n"] = len(files)
    results = run(nano, [bench], **arguments(data_dir=str(tmp_path)))[bench]
    means = []
    for name in sorted(folders):
        text = known["classes"][folders[name]]
        means.append(torch.stack([plain.text(t.replace("{}", text)) for t in known["templates"]]).mean(0))
    scores = [[(plain.image(path) @ m / m.norm()).item() for m in means] for path, _ in files]
    assert results["top1"]["correct"] == recall(scores, [{label} for _, label in files], 1)
    spec["n"] = 50_000      # with a part of the images, and of the classes, it is another benchmark
    results = run(nano, [bench], **arguments(data_dir=str(tmp_path), allow_missing=True))[bench]
    assert results["top1"]["partial"] == f"partial: {len(files)} of the official 50,000 images, of {len(folders)} classes"
    os.rename(f"{tmp_path}/{spec['folder']}/{sorted(folders)[0]}", f"{tmp_path}/{spec['folder']}/n99999999")
    with pytest.raises(ValueError, match=f"{bench}: a folder is no class of ImageNet"):
        read([bench], nano, arguments(data_dir=str(tmp_path)))


def recall(scores, positives, k):
    """Share of nothing but the definition: (Q lists of scores, Q sets of positives) -> whether R@k, ties wrong."""
    return [int(any(sum(s[j] >= s[p] for j in range(len(s)) if j not in good) < k for p in good))
            for s, good in zip(scores, positives)]


def test_retrieval_that_takes_too_much_memory(monkeypatch):
    """A matrix says which text is of which image."""
    monkeypatch.setattr(evaluate, "MOST_PAIRS", 5)
    with pytest.raises(ValueError, match="retrieval among 3 images and 2 texts takes too much memory: .* at most 5 pairs"):
        evaluate.pairs_to_ranking([("a",), ("b",), ("c",)], ["x", "y", "y"], keys=["x", "y", "y"])


def test_data_digests_hold_what_is_true():
    """The same images and texts with other boxes, or other labels, are other data."""
    image, text = [(evaluate.Picture("a.png"),)], [("a dog",)]

    def digest(task):
        return evaluate.data_digests({"bench": [task]})["bench"]
    boxes = [evaluate.Pointing("coco", image, text, [[(0, 0, width, 5)]]) for width in (5, 6)]
    classes = [evaluate.Ranking(image, text, torch.ones(1, 1).bool(), {}, labels=[label]) for label in (0, 1)]
    assert len({digest(task) for task in boxes + classes}) == 4


def test_retrieval(nano, official, tmp_path):
    rng, plain = random.Random(5), Plain(nano)
    for name in ("coco", "flickr30k"):
        rows = [{"image": f"{name}/{i}.jpg", "caption": [caption(rng) for _ in range(rng.randint(1, 3))]}
                for i in range(15)]
        rows[3]["caption"][0] = rows[4]["caption"][0]       # another image's caption as well: a tie, which is wrong
        for row in rows:
            picture(f"{tmp_path}/{name}/{row['image']}", rng)
        official(tmp_path, "retrieval", name, rows)
    results = run(nano, ["retrieval"], **arguments(data_dir=str(tmp_path)))["retrieval"]
    captions = [(i, c) for i, row in enumerate(rows) for c in row["caption"]]
    scores = [[plain.cos(f"{tmp_path}/flickr30k/{row['image']}", c) for _, c in captions] for row in rows]
    for k in (1, 5, 10):
        right = recall(scores, [{j for j, (i, _) in enumerate(captions) if i == n} for n in range(15)], k)
        assert results[f"flickr30k_i2t_r{k}"]["correct"] == right and (k == 1 or 0 < sum(right))
        right = recall(np.array(scores).T.tolist(), [{i} for i, _ in captions], k)
        assert results[f"flickr30k_t2i_r{k}"]["correct"] == right and (k == 1 or 0 < sum(right))
        assert results[f"flickr30k_t2i_r{k}"]["chance"] == pytest.approx(k / 15)


def test_retrieval_on_a_table(nano, tmp_path, capsys):
    rng, plain = random.Random(6), Plain(nano)
    for i in range(8):
        picture(f"{tmp_path}/{i}.png", rng)
    rows = [(f"{i % 8}.png", caption(rng)) for i in range(14)]
    rows += [("0.png", "a dog"), ("1.png", "a dog"), ("2.png", " ")]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *map(",".join, rows), "none.png,x y"]))
    args = arguments(data=str(tmp_path / "pairs.csv"), image_root=str(tmp_path))
    with pytest.raises(ValueError, match="cannot read .*none.png.*--allow-missing"):
        run(nano, ["retrieval"], **args)
    args["allow_missing"] = True
    capsys.readouterr()
    results = run(nano, ["retrieval"], **args)["retrieval"]
    assert f"{args['data']}: 1 rows or files skipped, the first is 2.png (row " in capsys.readouterr().out
    names, texts = [f"{i}.png" for i in range(8)], list(dict.fromkeys(c for _, c in rows if c.strip()))
    scores = [[plain.cos(f"{tmp_path}/{n}", t) for t in texts + ["x y"]] for n in names]     # x y is a candidate
    for k in (1, 5, 10):
        of = [{texts.index(c) for m, c in rows if m == n and c.strip()} for n in names]
        assert results[f"i2t_r{k}"]["correct"] == recall(scores, of, k)
        of = [{names.index(m) for m, c in rows if c == t} for t in texts]
        assert results[f"t2i_r{k}"]["correct"] == recall(np.array(scores).T.tolist(), of, k)


def test_retrieval_uses_all_captions_of_a_row(nano, tmp_path):
    rng, plain = random.Random(6), Plain(nano)
    for i in range(8):
        picture(f"{tmp_path}/{i}.png", rng)
    rows = [{"image": f"{i}.png", "caption": [caption(rng) for _ in range(rng.randint(1, 3))]} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = run(nano, ["retrieval"], **arguments(data=str(tmp_path / "pairs.jsonl"), image_root=str(tmp_path)))
    results = results["retrieval"]
    texts = [(i, c) for i, row in enumerate(rows) for c in row["caption"]]
    scores = [[plain.cos(f"{tmp_path}/{row['image']}", c) for _, c in texts] for row in rows]
    assert results["t2i_r1"]["n"] == len(texts) > 8
    for k in (1, 5):
        of = [{j for j, (i, _) in enumerate(texts) if i == n} for n in range(8)]
        assert results[f"i2t_r{k}"]["correct"] == recall(scores, of, k)
        assert results[f"t2i_r{k}"]["correct"] == recall(np.array(scores).T.tolist(), [{i} for i, _ in texts], k)
        both = (results[f"i2t_r{k}"]["accuracy"] + results[f"t2i_r{k}"]["accuracy"]) / 2
        assert results[f"mean_r{k}"]["accuracy"] == pytest.approx(both)


def test_texts_that_are_cut_are_counted(nano, tmp_path, capsys):
    picture(f"{tmp_path}/0.png", random.Random(0))
    words = "dog " * 31                                     # 31 words and the end fill the model's 32 places
    assert not (nano.tokenize([words])[0] == 0).any()
    texts = [words, words + "cat", words + "man and dog", "a dog"]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *(f"0.png,{text}" for text in texts)]))
    run(nano, ["retrieval"], **arguments(data=str(tmp_path / "pairs.csv"), image_root=str(tmp_path)))
    assert "2 of 4 texts are cut at the model's 32 tokens" in capsys.readouterr().out
    (tmp_path / "pairs.csv").write_text(f"image,caption\n0.png,{words}\n0.png,a dog")
    run(nano, ["retrieval"], **arguments(data=str(tmp_path / "pairs.csv"), image_root=str(tmp_path)))
    assert "are cut" not in capsys.readouterr().out


def test_retrieval_on_tar_shards(nano, tmp_path):
    """The figures of a table with the same pairs."""
    rng, rows = random.Random(8), []
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(6):
                name = f"{shard}{i}.png"
                picture(f"{tmp_path}/{name}", rng)
                rows.append((name, caption(rng)))
                (tmp_path / "x.txt").write_text(rows[-1][1])
                tar.add(tmp_path / name, name)
                tar.add(tmp_path / "x.txt", name.replace("png", "txt"))
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *map(",".join, rows)]))
    whole = run(nano, ["retrieval"], **arguments(data=f"{tmp_path}/pairs.csv", image_root=str(tmp_path)))["retrieval"]
    for _ in range(2):      # the second time from the index
        shards = run(nano, ["retrieval"], **arguments(data=f"{tmp_path}/{{0..1}}.tar"))["retrieval"]
        assert {k: {**r, "items": 0} for k, r in shards.items()} == {k: {**r, "items": 0} for k, r in whole.items()}
    assert 0 < sum(whole["i2t_r5"]["correct"]) < 12


def test_zero_shot(nano, official, tmp_path, monkeypatch):
    rng, plain = random.Random(7), Plain(nano)
    classes = ["red dog", "blue cat", "man", "woman", "chair", "table", "two"]
    templates = ["a {}.", "the small {}", "{} on a table"]
    files = [(f"{tmp_path}/imagenet/val/n{label}/{i}.png", label) for label in range(7) for i in range(2 + label % 3)]
    for path, _ in files:
        picture(path, rng)
    (tmp_path / "names.txt").write_text("\n".join(classes) + "\n")
    (tmp_path / "imagenet.json").write_text(json.dumps({"source": "x", "classes": classes, "templates": templates}))
    monkeypatch.setattr(evaluate, "ASSETS", tmp_path)
    official.table["imagenet"]["n"] = len(files)

    class FakeCIFAR:
        classes = [c.replace(" ", "_") for c in ["red dog", "blue cat", "man", "woman", "chair", "table", "two"]]
        targets = [label for _, label in files]

        def __init__(self, root, train, download):
            assert root == str(tmp_path / "cifar10") and not train

        def __len__(self):
            return len(files)

        def __getitem__(self, i):
            return load_image(files[i][0]), files[i][1]

    class FakePets(FakeCIFAR):
        _labels = FakeCIFAR.targets
        targets = property()    # has none

        def __init__(self, root, split, download):
            assert root == str(tmp_path / "pets") and split == "test"

    monkeypatch.setattr(evaluate.torchvision.datasets, "CIFAR10", FakeCIFAR)
    monkeypatch.setattr(evaluate.torchvision.datasets, "OxfordIIITPet", FakePets)
    args = arguments(data_dir=str(tmp_path), data=f"{tmp_path}/imagenet/val", classes=str(tmp_path / "names.txt"))
    results = run(nano, ["imagenet", "folder", "cifar10", "pets"], **args)
    for bench, prompts in ("imagenet", templates), ("folder", ["a photo of a {}."]), ("cifar10", ["a photo of a {}."]), (
            "pets", ["a photo of a {}, a type of pet."]):
        means = [torch.stack([plain.text(p.format(c)) for p in prompts]).mean(0) for c in classes]
        scores = [[(plain.image(path) @ m / m.norm()).item() for m in means] for path, _ in files]
        for k in (1, 5):
            assert results[bench][f"top{k}"]["correct"] == recall(scores, [{label} for _, label in files], k)
            assert results[bench][f"top{k}"]["chance"] == pytest.approx(k / 7)
        assert 0 < results[bench]["top1"]["accuracy"] < 1
    official.table["imagenet"]["n"] = 50000
    with pytest.raises(ValueError, match=f"7 classes, {len(files)} images instead of 7, 50000"):
        read(["imagenet"], nano, args)
    for path, name in ((None, "no --classes"), ("none.txt", "none.txt")):
        with pytest.raises(ValueError, match=f"^folder: {name}: give --classes FILE, with a name for each of the 7 folders"):
            read(["folder"], nano, {**args, "classes": path})
    for text, says in (("one\ntwo", "names.txt: 2 lines, .* expected a name for each of the 7 folders"),
                       ("a\n\nb\nc\nd\ne\nf", "names.txt: 7 lines, of which 1 are empty")):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(ValueError, match=says):
            read(["folder"], nano, args)
    (tmp_path / "names.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="names.txt: expected a name on each line, in UTF-8"):
        read(["folder"], nano, args)
    (tmp_path / "names.txt").write_text("\ufeff" + "\n".join(classes), encoding="utf-8")    # as Windows writes it
    found = read(["folder"], nano, args)
    [task] = found["folder"] if isinstance(found, dict) else found[0]["folder"]
    assert task.texts[0] == (f"a photo of a {classes[0]}.",)


@pytest.mark.parametrize("bench, name, mode, labels", [
    ("stl10", "STL10", "RGB", np.array([0, 1, 2, 1], np.uint8)), ("mnist", "MNIST", "L", torch.tensor([0, 1, 2, 1]))])
def test_labels_of_bytes_and_grey_images(nano, monkeypatch, bench, name, mode, labels):
    """As torchvision gives STL10's labels, and MNIST's images, of which a transform expects RGB."""
    class Fake:
        classes = ["red dog", "blue cat", "table"]

        def __init__(self, root, download, **split):
            setattr(self, "targets" if bench == "mnist" else "labels", labels)

        def __len__(self):
            return len(labels)

        def __getitem__(self, i):
            return Image.new(mode, (32, 32), 40 * i if mode == "L" else (40 * i, 90, 9)), int(labels[i])

    def transform(image):
        assert image.mode == "RGB"
        return nano.transform(image)

    model = types.SimpleNamespace(encode_image=nano.encode_image, encode_text=nano.encode_text,
                                  tokenize=nano.tokenize, transform=transform)
    monkeypatch.setattr(evaluate.torchvision.datasets, name, Fake)
    monkeypatch.setitem(evaluate.PROMPTS, bench, {"templates": ["a {}."], "classes": Fake.classes})
    found = run(model, [bench], quiet=True)[bench]
    assert found["top1"]["n"] == 4 and found["top1_macro"]["chance"] == pytest.approx(1 / 3)
    assert found["top5"]["accuracy"] == 1


@pytest.mark.parametrize("tower", ["encode_image", "encode_text"])
def test_features_that_are_no_numbers_are_an_error(nano, tower):
    """And no missing image: the items would be left out, and the others counted."""
    parts = ("encode_image", "encode_text", "tokenize", "transform")
    model = types.SimpleNamespace(**{name: getattr(nano, name) for name in parts})

    def encode(inputs):
        features = getattr(nano, tower)(inputs).clone()
        features[0] = float("nan")
        return features

    setattr(model, tower, encode)
    with pytest.raises(ValueError, match=r"the model gives features that are no numbers \(NaN\): expected .*; check "):
        evaluate.run(model, ["scenes"], quiet=True)


@pytest.mark.parametrize("bench", list(evaluate.TORCHVISION))
def test_torchvision_has_it(bench, tmp_path):
    """Its class takes our arguments, and says itself that the data is not there."""
    with pytest.raises(ValueError, match=f"{bench}: .*not found.*evaluate.py download {bench}"):
        read([bench], None, arguments(data_dir=str(tmp_path)))


def test_imagenet_names_and_prompts_equal_the_peers():
    from open_clip import zero_shot_metadata as peer
    ours = json.load(open(os.path.join(ROOT, "assets", "imagenet.json")))
    assert ours["classes"] == list(peer.IMAGENET_CLASSNAMES)
    assert [t.replace("{}", "x y") for t in ours["templates"]] == [t("x y") for t in peer.OPENAI_IMAGENET_TEMPLATES]


@pytest.mark.parametrize("bench, world", [("scenes_crowded", "crowded"), ("scenes_many", "many")])
def test_crowded_scenes_count_what_is_true_of_others(bench, world):
    """A caption fits each image that shows all of its objects, whichever are named there."""
    [ranking] = [task for task in evaluate.READERS[bench](evaluate.Source("s", "s", Options(), 32), n=200, seed=5)
                 if "i2t_r1" in getattr(task, "recalls", {})]
    data = evaluate.Scenes(200, "val", 5, 32, world=world)
    for i in range(200):
        shown = [f"a {colour} {shape}" for colour, shape in data.objects(i)[0]]
        for j, (caption,) in enumerate(ranking.texts):
            assert ranking.positive[i, j] == all(phrase in shown for phrase in caption.split(" and "))
    assert ranking.positive.diagonal().all()


def test_an_object_that_is_not_named_may_be_what_another_caption_names(monkeypatch):
    data = evaluate.Scenes(2, "val", 5, 32, world="crowded")
    scenes = [list(zip(("red", "green", "blue", "white"), ("ring", "cross", "square", "circle")))]
    scenes.append(scenes[0][1:] + [("pink", "bar")])        # names what the first shows
    monkeypatch.setattr(evaluate.Scenes, "objects", lambda self, i: (scenes[i], None, None))
    assert evaluate.scene_retrieval(data, [0, 1], ["a", "b"]).positive.tolist() == [[True, True], [False, True]]


def test_scenes_compare_what_they_say(nano):
    """The captions against the objects in the scene, one by one; scores by the plain way."""
    tasks = list(evaluate.scenes(evaluate.Source("scenes", "scenes", Options(), 32), n=40, seed=5))
    choices = {t.subset: t for t in tasks if hasattr(t, "subset")}
    assert list(choices) == ["np_binding", "swap_att", "replace_att", "replace_obj", "swap_obj", "add",
                             "seen_np_binding"]
    for split, subset in ("val", "swap_obj"), ("val", "add"), ("val", "np_binding"), ("train", "seen_np_binding"):
        data = evaluate.Scenes(40, split, 5 if split == "val" else 1005, 32)
        for i, (true, false) in enumerate(choices[subset].texts):
            ((c1, s1), (c2, s2)), cells, _ = data.objects(i)
            one, two = f"a {c1} {s1}", f"a {c2} {s2}"
            if subset == "swap_obj":
                relation = true.removeprefix(one + " ").removesuffix(" " + two)
                (x1, y1), (x2, y2) = ((cell % 2, cell // 2) for cell in cells)
                assert {"left of": x1 < x2, "right of": x1 > x2, "above": x1 == x2 and y1 < y2,
                        "below": x1 == x2 and y1 > y2}[relation] and false == f"{two} {relation} {one}"
            elif subset == "add":
                (_, colour, shape) = false.removeprefix(one + " and ").split()
                assert true == one and colour not in (c1, c2) and shape not in (s1, s2)
            else:
                assert (true, false) == (one, f"a {c1} {s2}")
    results = evaluate.score(nano, {"scenes": tasks}, Options())["scenes"]
    colours, shapes = list(COLOURS), SHAPES
    texts = [f"a {c} {s}" for c in colours for s in shapes]
    single = next(t for t in tasks if "single" in getattr(t, "recalls", {}))
    text = torch.stack([Plain(nano).text(t) for t in texts])
    for i, (picture,) in enumerate(single.images):
        with torch.no_grad():
            image = nano.encode_image(nano.transform(picture.open())[None], True)[0].double()
        best = texts[int((text @ image).argmax())].split()
        colour, shape = colours[i % 48 // 6], shapes[i % 6]
        assert results["single_colour"]["correct"][i] == (best[1] == colour)
        assert results["single_shape"]["correct"][i] == (best[2] == shape)
        assert results["single"]["correct"][i] == (best[1:] == [colour, shape])


# ------------------------------------------------------------------------------------------------- the scorer

def test_rules_count_ties_wrong():
    scores = torch.tensor([[1, 0, 0.5], [1, 0, 1], [1, 0, 2]])[:, None]      # of an image and three texts
    assert (first_text_wins(scores[..., ::2]) > 0).tolist() == [True, False, False]
    assert first_text_wins(scores).tolist() == [0.5, 0, -1]
    two = torch.tensor([[[3.0, 2, 9, 9], [9, 9, 3, 1]], [[3, 2, 9, 9], [9, 9, 3, 3]]])       # two texts for each of two
    assert first_text_wins(two).tolist() == [1, 0]


def test_ranking_margins_plainly():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-2, 3, (40, 4), generator=generator).float() / 4        # with many ties
    targets = torch.randint(-2, 3, (30, 4), generator=generator).float() / 4
    positive = torch.rand(40, 30, generator=generator) < 0.1
    positive[torch.arange(40), torch.randint(30, (40,), generator=generator)] = True
    margins = torch.stack([
        ranking_margins(evaluate.cosines(queries, targets), positive, k) for k in (1, 5, 100)], 1)
    scores, of = (queries @ targets.T).tolist(), [set(p.nonzero()[:, 0].tolist()) for p in positive]
    for column, k in zip(margins.T, (1, 5, 100)):
        assert (column > 0).int().tolist() == recall(scores, of, k)
    assert 0 < (margins[:, 0] > 0).sum() < 40 and (margins[:, 0] == 0).any()


def test_intervals_are_the_bootstrap_over_images():
    rng = np.random.default_rng(0)
    names = [f"i{n}" for n in rng.integers(60, size=300)]
    easy = {n: rng.random() for n in sorted(set(names))}                # items of an image agree often
    correct = [rng.random() < easy[n] ** 3 for n in names]
    other = [rng.random() < 0.3 for n in names]
    outcomes = [Outcome("a", torch.tensor(correct).float() - 0.5, 0.5, names, names),
                Outcome("b", torch.tensor(other).float() - 0.5, 0.25, names[::-1], names)]
    results = summarize(outcomes, {
        "mean": ["a", "b"], "nested": ["a", "mean"], "micro": ["a", "b"], "gone": ["a", "c"]}, 4000)
    assert results.keys() == {"a", "b", "mean", "nested", "micro"}
    draws = {"a": [], "mean": []}
    images = sorted(set(names))
    for _ in range(1500):       # plainly
        drawn = [images[i] for i in rng.integers(len(images), size=len(images))]
        a = [c for image in drawn for n, c in zip(names, correct) if n == image]
        b = [c for image in drawn for n, c in zip(names[::-1], other) if n == image]
        draws["a"].append(np.mean(a))
        draws["mean"].append((np.mean(a) + np.mean(b)) / 2)
    for name, x in draws.items():
        low, high = np.quantile(x, (0.025, 0.975))
        assert results[name]["low"] == pytest.approx(low, abs=0.012)
        assert results[name]["high"] == pytest.approx(high, abs=0.012)
    alone = summarize([replace(outcomes[0], images=[str(i) for i in range(300)])], {})["a"]
    assert results["a"]["high"] - results["a"]["low"] > 1.2 * (alone["high"] - alone["low"])
    assert results["mean"]["accuracy"] == pytest.approx((np.mean(correct) + np.mean(other)) / 2)
    assert results["mean"]["chance"] == pytest.approx(0.375)
    assert results["nested"]["accuracy"] == pytest.approx((3 * np.mean(correct) + np.mean(other)) / 4)
    assert results["micro"]["accuracy"] == pytest.approx(np.mean(correct + other))


def test_interval_where_all_agree():
    names = ["an item"] * 40
    r = summarize([Outcome("a", torch.ones(40), 0.5, [str(i // 2) for i in range(40)], names)], {})["a"]
    assert r["high"] == 1 and r["low"] == pytest.approx(20 / 23.84)        # Wilson's, of 20 images
    r = summarize([Outcome("a", -torch.ones(40), 0.5, [str(i) for i in range(40)], names)], {})["a"]
    assert r["low"] == 0 and r["high"] == pytest.approx(3.84 / 43.84)


def test_the_interval_of_a_macro_where_all_agree_is_of_images_that_count():
    """Wilson's, of the 10 images that have a label."""
    images = [str(i) for i in range(40)]
    labels = ["a"] * 5 + ["b"] * 5 + [None] * 30
    r = summarize([Outcome("x", torch.ones(40), 0.5, images, images, labels)], {"mean": ["x_macro"]})
    assert r["x_macro"]["low"] == r["mean"]["low"] == pytest.approx(10 / 13.84)
    assert r["x"]["low"] == pytest.approx(40 / 43.84)


def test_an_interval_where_all_draws_agree_is_no_point():
    """A mean of a subset that is all right and one that is all wrong; images of which half the items are right."""
    images = [str(i) for i in range(10)]
    right, wrong = Outcome("a", torch.ones(5), 0.5, images[:5], images), Outcome("b", -torch.ones(5), 0.5, images[5:], images)
    halves = Outcome("c", torch.tensor([1.0, -1] * 5), 0.5, [str(i // 2) for i in range(10)], images)
    results = summarize([right, wrong, halves], {"macro": ["a", "b"]})
    for name, edge in ("macro", 3.84 / 13.84), ("c", 3.84 / 8.84):
        r = results[name]
        assert (r["low"], r["accuracy"], r["high"]) == pytest.approx((0.5 - edge, 0.5, 0.5 + edge))


def test_the_chance_of_a_mean_is_made_as_its_accuracy():
    """Where each item is right by its chance, accuracies are chances: of unread items, too, that do not count."""
    def outcome(subset, right, chance, labels=None):
        margins, images = torch.tensor(right) - 0.5, [f"{subset}{i}" for i in range(len(right))]
        return Outcome(subset, margins, chance, images, images, labels)

    unread = float("nan")
    outcomes = [outcome("many", [1.0, 0] * 50, 0.5), outcome("few", [1.0] + [0] * 9, 0.1),
                outcome("each", [1.0, 0, 1, unread, 1, 0], [1.0, 0, 1, 0.7, 1, 0], ["a", "a", "b", "b", "a", None])]
    both = ["many", "few"]
    results = summarize(outcomes, {"micro": both, "macro": both, "nested": ["each", "each_macro"]})
    assert results["micro"]["chance"] == pytest.approx(51 / 110) and results["macro"]["chance"] == pytest.approx(0.3)
    assert results["each"]["chance"] == pytest.approx(3 / 5) and results["each_macro"]["chance"] == pytest.approx(5 / 6)
    for name, r in results.items():
        assert r["chance"] == pytest.approx(r["accuracy"]), name


@pytest.fixture
def table(nano, tmp_path):
    """A checkpoint, and pairs with images of their own."""
    rng = random.Random(8)
    for i in range(20):
        picture(f"{tmp_path}/{i}.png", rng)
    rows = [f"{i % 20}.png,{caption(rng)}" for i in range(30)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    torch.save(nano.checkpoint(), tmp_path / "nano.pt")
    return tmp_path


def test_each_image_and_text_once_over_all_benches(nano, table, monkeypatch):
    counted = {"images": 0, "texts": 0}
    for name, key in ("encode_image", "images"), ("encode_text", "texts"):
        def counting(x, *rest, function=getattr(nano, name), key=key):
            counted[key] += len(x)
            return function(x, *rest)
        monkeypatch.setattr(nano, name, counting)
    args = arguments(data=str(table / "pairs.csv"), image_root=str(table))
    tasks = read(["retrieval"], nano, args)
    evaluate.score(nano, {"retrieval": tasks["retrieval"], "again": tasks["retrieval"]}, Options(quiet=True))
    assert counted["images"] == 20 and counted["texts"] <= 30


def command(*args, processes=1, check=True):
    launcher = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run([*launcher, "evaluate.py", *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("more", [(), ("--pooled",)])
def test_processes_share_the_work_and_count_nothing_twice(table, more):
    common = [*more, "--checkpoint", table / "nano.pt", "--bench", "retrieval", "--data", table / "pairs.csv",
              "--image-root", table, "--batch-size", "8"]
    one = command(*common, "--json", table / "one.json")
    two = command(*common, "--json", table / "two.json", processes=2)
    a, b = (json.load(open(table / f"{name}.json")) for name in ("one", "two"))
    assert a["results"] == b["results"] and a["sha256"] == b["sha256"] and b["settings"]["processes"] == 2
    lines = [line for line in two.stdout.splitlines() if ".." in line]
    assert lines == [line for line in one.stdout.splitlines() if ".." in line] and len(lines) == 8
    assert len(a["sha256"]) == len(a["data_sha256"]["retrieval"]) == 64 and a["protocol"] == evaluate.PROTOCOL
    assert a["results"]["retrieval"]["t2i_r1"]["n"] == 30 == len(a["results"]["retrieval"]["t2i_r1"]["correct"])


def test_all_runs_what_is_there_and_lists_the_rest(table):
    rng = random.Random(9)
    for i in range(3):
        picture(f"{table}/data/pets/{i}/x.png", rng)
    (table / "names.txt").write_text("dog\ncat\nman\n")
    done = command("--checkpoint", table / "nano.pt", "--bench", "all", "--data-dir", table / "data", "--data",
                   table / "data" / "pets", "--classes", table / "names.txt", "--json", table / "r.json")
    r = json.load(open(table / "r.json"))
    built_in = ["scenes", "scenes_large", "scenes_crowded", "scenes_many", "scenes_pointing",
                "scenes_crowded_pointing", "scenes_many_pointing"]
    assert list(r["results"]) == [*built_in, "folder"] and r["results"]["folder"]["top1"]["n"] == 3
    assert "np_binding" in done.stdout
    for text in ("not there: sugarcrepe: no ", "download sugarcrepe", "not there: winoground: no ",
                 "not there: imagenet", "not there: cifar10"):
        assert text in done.stdout, done.stdout


@pytest.mark.parametrize("args, says", [
    (["--bench", "sugarcrape"], "no bench 'sugarcrape': expected some of scenes, "),
    (["--bench", "sugarcrepe"], "download sugarcrepe"), 
    (["--bench", "folder"], "folder: --data is missing, for example --data photos --classes names.txt"),
    (["--bench", "choices"], "choices: --data is missing, for example --data mine.csv --image-root images"),
    (["--bench", "retrieval"], "retrieval: --data is missing, for example --data pairs.csv --image-root images, "
     "or the official files; retrieval: no "), (["--bench", "retrieval"], "download retrieval (and 1 more)"),
    (["--bench", "winoground"], "examples.jsonl"), (["--batch-size", "0"], "argument --batch-size: 0: expected a whole number, 1 or more"),
    (["--batch-size", "2.5"], "argument --batch-size: 2.5: expected a whole number, 1 or more"),
    (["--workers", "-1"], "argument --workers: -1: expected a whole number, 0 or more"),
    (["--interpolate", "0.5"], "--interpolate takes one --checkpoint and one --init (or --model)"),
    (["--checkpoint", ""], "give what to evaluate: --checkpoint FILE, or --init SOURCE"),
    (["--bench", "retrieval", "--data", "none.csv"], "no file none.csv"),
    (["--data", "none.csv"], "no file none.csv"), (["--checkpoint", "gone.pt"], "no checkpoint at gone.pt"),
    (["--device", "cuda"], "--device cuda: torch finds no GPU")])
def test_mistakes_get_one_line(table, capsys, monkeypatch, args, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--checkpoint", str(table / "nano.pt"), "--data-dir", str(table), *args])
    message = str(stopped.value) + capsys.readouterr().err
    assert says in message and (stopped.value.code == 2 or "\n" not in message)


def test_published_figures_stand_under_the_table(capsys, monkeypatch):
    r = {"accuracy": 0.5, "right": 5, "n": 10, "ties": 1, "chance": 0.5, "low": 0.2, "high": 0.8}
    published = {"CLIP": {"source": "a paper", "x": 12.3}, "B": {"source": "z", "gone": 1.0}}
    monkeypatch.setattr(evaluate, "TABLE", {"b": {"published": published}})
    print_table("b", {"x": r, "y": r}, reference=True)
    out = capsys.readouterr().out.splitlines()
    assert out[5].split() == ["b", "x"] and out[6].split() == ["ours", "50.0", "20.0-80.0"]
    assert out[7].split() == ["CLIP", "(published)", "12.3"]
    assert out[-2:] == ["CLIP (published): a paper", "B (published): z"]


def test_published_figures_are_of_what_is_scored_and_fit_a_terminal(capsys):
    r = {"accuracy": 0.5, "right": 5, "n": 10, "ties": 1, "chance": 0.5, "low": 0.2, "high": 0.8}
    for bench, spec in TABLE.items():
        names = {name for figures in spec.get("published", {}).values() for name in figures} - {"source"}
        for figures in spec.get("published", {}).values():
            assert all(0 < value < 100 for name, value in figures.items() if name != "source") and figures["source"]
        print_table(bench, dict.fromkeys(names or ["x"], r), reference=True)
        known = set(spec.get("means", {})) | {"top1", "vg_relation_macro", "vg_attribution_macro"}
        for subset in spec.get("files", {}):
            known |= {subset, *(f"{subset}_{way}_r1" for way in ("i2t", "t2i"))}
        assert names <= known, names - known
    out = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in out if "(published): " not in line) <= 100
    assert "macro_7" in "".join(out) and sum("C2LIP B/16 (published)" in line for line in out) > 3


def test_data_alone_says_which_bench_is_meant(table, capsys):
    common = ["--checkpoint", str(table / "nano.pt"), "--image-root", str(table), "--data"]
    evaluate.main([*common, str(table / "pairs.csv")])
    assert "t2i_r10" in capsys.readouterr().out
    picture(f"{table}/classes/dog/x.png", random.Random(1))
    (table / "names.txt").write_text("dog\n")
    evaluate.main([*common, str(table / "classes"), "--classes", str(table / "names.txt")])
    assert "top1" in capsys.readouterr().out


BAD = [None, 3, -1, 10**30, float("inf"), True, "", "\ud800", "x" * 3000, "\0", "../..", [], {}, [None], [[]], {"a": 1}]


def damage(content, rng):
    """One of many ways in which a json file can be wrong."""
    kind = rng.randrange(5)
    rows = json.loads(content)
    if kind == 0:
        return content[:rng.randrange(len(content))]
    if kind == 1:
        place = rng.randrange(len(content))
        return content[:place] + bytes([rng.randrange(256)]) + content[place + 1:]
    if kind == 2:
        return rng.choice([b"", b"3", b"null", b'"text"', b"[" * 100_000, b"\xff\xfe", json.dumps(rows[:1]).encode()])
    if kind == 3:
        rows[rng.randrange(len(rows))] = rng.choice(BAD)
    else:
        row = rng.choice(rows)
        key = rng.choice(list(row) if isinstance(row, dict) else range(len(row)))
        row[key] = rng.choice(BAD)
    return json.dumps(rows).encode()


def test_damaged_files_give_one_line_each(nano, official, tmp_path):
    """180 of those files whose sha256 is not known."""
    rng = random.Random(0)
    for folder in ("aro/images", "coco", "flickr30k", "whatsup/val2017", "whatsup/data/vg_images", "colorswap",
                   "winoground/data/images"):
        picture(f"{tmp_path}/{folder}/{7:012d}.jpg", random.Random(0))
        for name in ("7.jpg", "7.png"):
            picture(f"{tmp_path}/{folder}/{name}", random.Random(0))
    vg = {"image_path": "7.jpg", "bbox_x": 1, "bbox_y": 2, "bbox_w": 30, "bbox_h": 20, "true_caption": "a red dog",
          "false_caption": "a blue dog", "relation_name": "on", "attributes": ["red", "big"]}
    paired = {"image_0": "7", "image_1": "7.png", "image_2": "7.jpg", "caption_0": "a dog", "caption_1": "a cat",
              "caption_2": "the dog"}
    parts = [("aro", name, vg) for name in ("vg_relation", "vg_attribution")]
    for name in ("coco", "flickr30k"):
        row = {"image": "7.jpg", "caption": ["a dog sits", "the cat runs under the table"]}
        parts += [("aro", f"{name}_order", row), ("retrieval", name, row)]
    parts += [("whatsup", f"{name}_{n}", [7, "a dog", "a cat"]) for name in ("coco", "vg") for n in ("one", "two")]
    parts += [("winoground", "winoground", paired), ("colorswap", "colorswap", {**paired, "image_1": "7.png"})]
    counted = {"scored": 0, "one line": 0}
    for bench, part, row in parts:
        path = official(tmp_path, bench, part, [row] * 6)
        content = open(path, "rb").read()
        files = official.table[bench]["files"]
        official.table[bench]["files"] = {part: files[part]}
        jsonl = path.endswith("jsonl")
        for number in range(15):
            as_list = json.dumps([json.loads(line) for line in content.splitlines()]).encode() if jsonl else content
            damaged = damage(as_list, rng)
            with open(path, "wb") as f:
                f.write(damaged)
            try:
                run(nano, [bench], **arguments(data_dir=str(tmp_path), quiet=True))
                counted["scored"] += 1
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 600, str(error)
                counted["one line"] += 1
        official.table[bench]["files"] = files
    assert sum(counted.values()) == 180 and counted["one line"] > 90, counted


# ------------------------------------------------------------------------------------------------- downloads

def test_fetch_resumes_and_checks(tmp_path):
    content = random.Random(0).randbytes(300_000)
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            asked.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            self.wfile.write(content[start:])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, path = f"http://127.0.0.1:{server.server_port}/x", tmp_path / "new" / "x"
    good = hashlib.sha256(content).hexdigest()
    os.makedirs(tmp_path / "new")
    (tmp_path / "new" / "x.part").write_bytes(content[:123_456])        # broken off by an earlier call
    (tmp_path / "new" / "x.part.json").write_text(json.dumps({"size": len(content), "etag": None}))
    fetch(url, str(path), good, tmp_path)
    assert path.read_bytes() == content and asked == [123_456]
    fetch(url, str(path), good, tmp_path)
    assert asked == [123_456]       # there already
    with pytest.raises(ValueError, match="not the official file"):
        fetch(url, str(path), "0" * 64, tmp_path)
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="cannot download .* by hand and put it at"):
        fetch(url, str(tmp_path / "y"), good, tmp_path)


def test_download_fetches_unpacks_and_says_what_is_by_hand(official, tmp_path, monkeypatch, capsys):
    web, fetched = tmp_path / "web", []
    os.makedirs(web)
    (web / "x.json").write_text("[]")
    with zipfile.ZipFile(web / "images.zip", "w") as z:
        z.writestr("pictures/1.jpg", "not really")
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {
        "log_message": lambda self, *text: fetched.append(self.path)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(web)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    official.table["sugarcrepe"].update(
        files={"x": {"url": f"{url}/x.json", "path": "sugarcrepe/x.json", "sha256": hashlib.sha256(b"[]").hexdigest()}},
        archives=["pictures"])
    monkeypatch.setitem(evaluate.ARCHIVES, "pictures", {
        "url": f"{url}/images.zip", "path": "coco/images.zip", "makes": "coco/pictures"})
    for _ in range(2):      # the second time everything is there
        evaluate.main(["download", "sugarcrepe", "winoground", "--data-dir", str(tmp_path / "data")])
    server.shutdown()
    server.server_close()
    assert (tmp_path / "data/coco/pictures/1.jpg").read_text() == "not really" and len(fetched) == 2
    assert (tmp_path / "data/sugarcrepe/x.json").read_text() == "[]"
    out = capsys.readouterr().out
    assert "winoground, by hand: " in out and f"--local-dir {tmp_path}/data/winoground" in out
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["download", "sugarcrape"])
    assert "no bench 'sugarcrape': expected some of " in str(stopped.value)


class Server:
    """Serves content from memory; ranges and etag as told; asked holds the first byte of each request."""

    def __init__(self, content, etag=None, ranges=True, kind="application/zip", stop_after=None):
        self.content, self.etag, self.ranges, self.kind, self.stop_after = content, etag, ranges, kind, stop_after
        self.asked = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range") if outer.ranges else None
                start = int((asked or "bytes=0-").removeprefix("bytes=").rstrip("-"))
                outer.asked.append(start)
                if start > len(outer.content):
                    self.send_error(416)
                    return
                self.send_response(206 if asked else 200)
                self.send_header("Content-Type", outer.kind)
                self.send_header("Content-Length", str(len(outer.content) - start))
                if outer.etag:
                    self.send_header("ETag", outer.etag)
                if asked:
                    self.send_header("Content-Range",
                                     f"bytes {start}-{len(outer.content) - 1}/{len(outer.content)}")
                self.end_headers()
                self.wfile.write(outer.content[start:][:outer.stop_after])

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/x"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(*args, **options):
        servers.append(Server(*args, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_a_part_is_continued_only_if_the_file_is_the_same(serve, tmp_path, capsys):
    old, new = random.Random(0).randbytes(300_000), random.Random(1).randbytes(300_000)
    server, path = serve(old, etag='"1"', stop_after=100_000), tmp_path / "x"
    with pytest.raises(ValueError, match="broke off after 100,000 of 300,000 bytes; a new call continues.*by hand"):
        fetch(server.url, str(path), None, tmp_path)
    server.stop_after = None
    fetch(server.url, str(path), None, tmp_path)
    assert path.read_bytes() == old and server.asked == [0, 100_000] and not (tmp_path / "x.part.json").exists()
    digest = hashlib.sha256(old).hexdigest()
    assert f"its true sha256 is not known; from now on it is that of this first download, {digest}" in (
        capsys.readouterr().out)
    path.unlink()

    for change in (dict(content=new, etag='"2"'), dict(content=new[:200_000], etag='"1"'), dict(ranges=False)):
        server.stop_after = 100_000
        with pytest.raises(ValueError, match="broke off"):
            fetch(server.url, str(path), None, tmp_path)
        server.__dict__.update({"stop_after": None, "asked": [], **change})     # the server's file changes
        expected = hashlib.sha256(server.content).hexdigest()
        fetch(server.url, str(path), expected, tmp_path)
        assert path.read_bytes() == server.content and server.asked[-1] == 0
        path.unlink()
    with pytest.raises(ValueError, match=f"not the official file, of sha256 {digest[:12]}"):    # of the first download
        fetch(server.url, str(path), None, tmp_path)


def test_a_part_without_a_record_and_a_page_instead_of_a_file(serve, tmp_path):
    server, path = serve(b"content", etag='"1"'), tmp_path / "x"
    (tmp_path / "x.part").write_bytes(b"what is this")
    fetch(server.url, str(path), None, tmp_path)
    assert path.read_bytes() == b"content" and server.asked == [0]
    path.unlink()
    (tmp_path / "x.part").write_bytes(b"cont")
    (tmp_path / "x.part.json").write_text('{"size": 7')         # cut off
    fetch(server.url, str(path), None, tmp_path)
    assert path.read_bytes() == b"content" and server.asked == [0, 0]
    for text in ("", "3"):
        (tmp_path / "sha256.json").write_text(text)
        with pytest.raises(ValueError, match="sha256.json: expected {file: sha256} .*: delete it$"):
            fetch(server.url, str(path), None, tmp_path)
    server = serve(b"<html>too many downloads</html>", kind="text/html; charset=utf-8")
    with pytest.raises(ValueError, match="a web page came instead"):
        fetch(server.url, str(tmp_path / "y"), None, tmp_path)
    assert not (tmp_path / "y").exists()


def tar_with(path, **changes):
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("pictures/1.jpg")
        info.size = 3
        for key, value in changes.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(b"abc"))


@pytest.mark.parametrize("changes, says", [
    ({"name": "../outside.jpg"}, "lies outside"), ({"name": "/tmp/outside.jpg"}, "lies outside"),
    ({"name": "a/../../outside.jpg"}, "lies outside"), ({"type": tarfile.SYMTYPE, "linkname": "/etc"}, "neither a file"),
    ({"type": tarfile.LNKTYPE, "linkname": "../x"}, "neither a file"), ({"type": tarfile.FIFOTYPE}, "neither a file")])
def test_crafted_tars_write_nothing_outside(tmp_path, changes, says):
    folder = tmp_path / "data" / "inside"
    folder.mkdir(parents=True)
    tar_with(tmp_path / "a.tar.gz", **changes)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"a.tar.gz is damaged or not what it should be: .*{says}"):
        evaluate.unpack(str(tmp_path / "a.tar.gz"), str(folder))
    assert sorted(tmp_path.rglob("*")) == before and not os.path.exists("/tmp/outside.jpg")


def test_other_crafted_archives(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    tar_with(tmp_path / "good.tar.gz", mode=0o6777)     # a setuid bit, and everyone may write
    evaluate.unpack(str(tmp_path / "good.tar.gz"), str(folder))
    assert (folder / "pictures" / "1.jpg").read_bytes() == b"abc"
    assert (folder / "pictures" / "1.jpg").stat().st_mode & 0o7022 == 0
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("../outside.jpg", "x")
    with pytest.raises(ValueError, match="lies outside"):
        evaluate.unpack(str(tmp_path / "a.zip"), str(folder))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        with z.open("pictures/bomb", "w", force_zip64=True) as f:
            for _ in range(40):
                f.write(bytes(2**25))
    assert os.path.getsize(tmp_path / "bomb.zip") < 2**21
    with pytest.raises(ValueError, match="it would unpack to 1 files of 1,342,177,280 bytes"):
        evaluate.unpack(str(tmp_path / "bomb.zip"), str(folder))
    monkeypatch.setattr(evaluate, "MAX_MEMBERS", 0)
    with pytest.raises(ValueError, match="it would unpack to 1 files"):
        evaluate.unpack(str(tmp_path / "good.tar.gz"), str(folder))
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "good.tar.gz").read_bytes()[:60])
    with pytest.raises(ValueError, match="cut.tar.gz is damaged"):
        evaluate.unpack(str(tmp_path / "cut.tar.gz"), str(folder))
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "1.jpg", "a.zip", "bomb.zip", "cut.tar.gz", "good.tar.gz"]


def test_every_url_is_https():
    every = [f for spec in TABLE.values() for f in spec.get("files", {}).values()] + list(evaluate.ARCHIVES.values())
    assert all(f.get("url", "https://").startswith("https://") for f in every)
    assert "http://" not in (evaluate.ASSETS / "benchmarks.json").read_text()


def test_the_table_is_whole():
    """Counts of the official files, and urls where the bench does not say how to get it by hand."""
    assert sum(f["n"] for f in TABLE["sugarcrepe"]["files"].values()) == 7511
    assert sum(f["n"] for f in TABLE["sugarcrepe_pp"]["files"].values()) == 4757
    assert len(TABLE["valse"]["files"]) == 11 and TABLE["cola"]["files"]["multi_objects"]["n"] == 210
    for bench, spec in TABLE.items():
        for subset, f in spec.get("files", {}).items():
            assert "url" in f or {"by_hand", "hub", "archives"} & set(spec), (bench, subset)
            # counts that could not be looked up: of files that no mirror holds
            assert f.get("n") or bench in ("vl_checklist", "negbench", "hard_positives"), (bench, subset)
            assert "raw.githubusercontent" not in f.get("url", "") or not f.get("n") or len(f["sha256"]) == 64
