"""evaluate.py against the official protocols, read plainly: one item at a time, with the peer's own model."""
import hashlib
import http.server
import json
import math
import os
import random
import threading

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import evaluate
from bench_tokenizer import openai_tokenizer
from evaluate import BENCHES, choose, encode_texts, fetch, proportion, recall_at_1
from model import CLIP, set_tokenizer


def arguments(**kwargs):
    args = evaluate.parser().parse_args([])
    args.__dict__.update(device="cpu", batch_size=7, **kwargs)
    return args


# ------------------------------------------------------------------------------------------------- SugarCrepe

@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """A random open_clip ViT-B/32, and the same weights in ours."""
    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-32").eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim < 2:
                p.add_(0.05 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("peer")
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(openai_tokenizer(str(folder))[0])
    ours = CLIP.from_pretrained(str(folder / "model.safetensors"), "ViT-B-32").eval()
    return theirs, set_tokenizer(ours, str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def crepe(tmp_path_factory):
    """The seven files in the true format, and random images of several sizes under the file names in them."""
    folder, rng = tmp_path_factory.mktemp("crepe"), random.Random(0)
    words = "a the red blue dog cat sits runs on under table chair two small near man woman".split()
    os.makedirs(folder / "sugarcrepe")
    os.makedirs(folder / "val2017")
    names = [f"{i:012d}.jpg" for i in range(9)]
    for name in names:
        size = (rng.randint(200, 400), rng.randint(200, 400))
        Image.effect_noise(size, 90).convert("RGB").resize((8, 8)).resize(size).save(folder / "val2017" / name)
    for subset in evaluate.SUGARCREPE:
        items = {}
        for i in range(0, 40, 2):       # ids with gaps, as in swap_obj
            caption = " ".join(rng.choices(words, k=rng.randint(3, 12)))
            shuffled = " ".join(rng.sample(caption.split(), len(caption.split())))
            negative = caption.upper() + " " if i % 10 == 0 else shuffled
            items[str(i)] = {"filename": rng.choice(names), "caption": caption, "negative_caption": negative}
        (folder / "sugarcrepe" / f"{subset}.json").write_text(json.dumps(items))
    return folder


@pytest.fixture
def unofficial(crepe, monkeypatch):
    """The checksums of the generated files in place of the official ones."""
    monkeypatch.setattr(evaluate, "SUGARCREPE", {name: hashlib.sha256(
        (crepe / "sugarcrepe" / f"{name}.json").read_bytes()).hexdigest() for name in evaluate.SUGARCREPE})


@torch.no_grad()
def official(model, folder, subset):
    """The official protocol, item by item, each text by itself: correct if the positive's cosine is strictly higher."""
    transform = open_clip.image_transform(224, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    correct = []
    for item in json.loads((folder / "sugarcrepe" / f"{subset}.json").read_text()).values():
        image = transform(Image.open(folder / "val2017" / item["filename"]))[None]
        features = model.encode_image(image, normalize=True)
        positive, negative = ((features @ model.encode_text(tokenizer([item[key]]), normalize=True).T).item()
                              for key in ("caption", "negative_caption"))
        correct.append(int(positive > negative))
    return correct


def test_sugarcrepe_equals_the_official_protocol_item_by_item(peer, crepe, unofficial, capsys):
    theirs, ours = peer
    results = evaluate.run(["sugarcrepe"], ours, arguments(data_dir=str(crepe), image_root=str(crepe / "val2017")))
    assert set(results["sugarcrepe"]) == set(evaluate.SUGARCREPE)
    for subset, r in results["sugarcrepe"].items():
        assert r["correct"] == official(theirs, crepe, subset)
        assert r["correct"][::5] == [0] * 4         # the negative differs in capitals only: a tie is wrong
        assert 0 < r["accuracy"] < 1 and r["n"] == 20 and r["chance"] == 0.5
    means = evaluate.sugarcrepe_means(results["sugarcrepe"])
    a = {k: v["accuracy"] for k, v in results["sugarcrepe"].items()}
    groups = [[v for k, v in a.items() if k.startswith(g)] for g in ("replace", "swap", "add")]
    assert means["macro_7"] == pytest.approx(sum(a.values()) / 7) == pytest.approx(means["micro"])  # equal sizes here
    assert means["macro_3"] == pytest.approx(sum(sum(g) / len(g) for g in groups) / 3)
    assert "macro_7" in capsys.readouterr().out


def test_sugarcrepe_missing_images(peer, crepe, unofficial, tmp_path, capsys):
    with pytest.raises(ValueError, match="of 9 images are missing.*val2017.zip.*--image-root"):
        BENCHES["sugarcrepe"](peer[1], arguments(data_dir=str(crepe), image_root=str(tmp_path)))
    for name in sorted(os.listdir(crepe / "val2017"))[:5]:
        os.symlink(crepe / "val2017" / name, tmp_path / name)
    with pytest.raises(ValueError, match="4 of 9 images are missing.*or skip what is missing with --allow-missing"):
        BENCHES["sugarcrepe"](peer[1], arguments(data_dir=str(crepe), image_root=str(tmp_path)))
    args = arguments(data_dir=str(crepe), image_root=str(tmp_path), allow_missing=True)
    results = BENCHES["sugarcrepe"](peer[1], args)
    assert 0 < sum(r["n"] for r in results.values()) < 140
    assert "items skipped, without their image" in capsys.readouterr().out


def test_sugarcrepe_of_a_wrong_file(peer, crepe):
    with pytest.raises(ValueError, match="is not the official file.*delete it and try again"):
        BENCHES["sugarcrepe"](peer[1], arguments(data_dir=str(crepe), image_root=str(crepe / "val2017")))


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
    fetch(url, str(path), good)
    assert path.read_bytes() == content and asked == [123_456]
    fetch(url, str(path), good)
    assert asked == [123_456]       # there already
    with pytest.raises(ValueError, match="not the official file"):
        fetch(url, str(path), "0" * 64)
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="cannot download .* by hand and put it at"):
        fetch(url, str(tmp_path / "y"), good)


# ------------------------------------------------------------------------------------------------- the scorer

def test_choose_counts_ties_wrong():
    images = torch.eye(3)
    a, b = torch.eye(3), torch.tensor([[0.5, 0, 0], [0, 1.0, 0], [0, 0, 2.0]])
    assert choose(images, torch.stack([a, b], 1)).tolist() == [True, False, False]
    assert choose(images, torch.stack([a, b * 0, b], 1)).tolist() == [True, False, False]


def test_recall_at_1_plainly():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(40, 30, generator=generator).mul(4).round() / 8       # with many ties
    positive = torch.rand(40, 30, generator=generator) < 0.1
    positive[torch.arange(40), torch.randint(30, (40,), generator=generator)] = True
    plain = [all(any(similarity[i, j] > similarity[i, k] for j in range(30) if positive[i, j])
                 for k in range(30) if not positive[i, k]) for i in range(40)]
    assert recall_at_1(similarity, positive).tolist() == plain and 0 < sum(plain) < 40


@pytest.mark.parametrize("k, n", [(0, 10), (10, 10), (7, 10), (520, 1000)])
def test_wilson_interval(k, n):
    r = proportion(torch.arange(n) < k, 0.5)
    for bound in (r["low"], r["high"]):     # its ends are the p for which k is 1.96 deviations away
        assert abs(k / n - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), abs=1e-7)
    assert r["low"] <= r["accuracy"] == k / n <= r["high"]


def test_texts_encoded_once_and_in_place(peer):
    texts = ["a dog", "a cat on a mat in the house", "A  DOG", "a dog", "the end"]
    features = encode_texts(peer[1], texts, arguments())
    assert torch.equal(features[0], features[3]) and torch.equal(features[0], features[2])
    one_by_one = torch.cat([encode_texts(peer[1], [t], arguments()) for t in texts])
    torch.testing.assert_close(features, one_by_one, atol=1e-6, rtol=0)
