"""model.py against its peers: open_clip, transformers, timm. All weights are random; nothing is downloaded."""
import copy
import http.server
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]
import model as M  # noqa: E402
from bench_tokenizer import openai_tokenizer  # noqa: E402
from model import CLIP, CLIPConfig, MODELS, clean_text, export, image_transform  # noqa: E402

transformers.logging.set_verbosity_error()
CAPTIONS = open(os.path.join(HERE, "fixtures", "captions.txt"), encoding="utf-8").read().splitlines()
TEXTS = ["a red circle", "A blue square, and a GREEN_star!", "it's 12 o'clock &amp; all is well", ""]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def perturb(module):
    """Random biases, norms and scales: a wrong mapping of them must show."""
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim < 2:
                p.add_(torch.randn(p.shape) * 0.1)
    return module.eval()


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def layers(config, **towers):
    """The config with other numbers of layers."""
    return replace(config, **{t: (getattr(config, t)[0], n, *getattr(config, t)[2:]) for t, n in towers.items()})


def difference(a, b):
    return (a - b).abs().max().item()


# -----------------------------------------------------------------------------
# tokenizers as real files

@pytest.fixture(scope="session")
def clip_tokenizer(tmp_path_factory):
    """(the text of CLIP's tokenizer.json, open_clip's tokenizer)."""
    return openai_tokenizer(str(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="session")
def siglip_tokenizer():
    """A small unigram tokenizer.json built as SigLIP's is: pad and end are both </s>, id 1."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    t = Tokenizer(models.Unigram())
    t.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.train_from_iterator([clean_text(c, "canonicalize") for c in CAPTIONS], trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return t.to_str()


SIGLIP_PAD = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "</s>", "eos_token": "</s>"}


# -----------------------------------------------------------------------------
# peers, written to disk in their real layouts

def open_clip_config(name, layers=None, vocab=None, width=None):
    """open_clip's own config of a name, made smaller. SigLIP's image tower is timm's and keeps its shape."""
    cfg = copy.deepcopy(open_clip.get_model_config(name))
    if layers:
        cfg["text_cfg"]["layers"] = layers
        if "timm_model_name" not in cfg["vision_cfg"]:
            cfg["vision_cfg"]["layers"] = layers
    if vocab:
        cfg["text_cfg"]["vocab_size"] = vocab
    return cfg


def write_open_clip(folder, name, tokenizer, bin=False, **reduce):
    """An open_clip repo as on the hub. Returns (folder, the peer)."""
    cfg = open_clip_config(name, **reduce)
    kwargs = copy.deepcopy(cfg)
    kind = open_clip.model.CustomTextCLIP if kwargs.pop("custom_text", False) else open_clip.model.CLIP
    peer = perturb(kind(**kwargs))
    os.makedirs(folder, exist_ok=True)
    siglip = "SigLIP" in name
    pre = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"} if siglip else {
        "mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    write_json(folder, "open_clip_config.json", {"model_cfg": cfg, "preprocess_cfg": pre})
    if bin:
        torch.save(peer.state_dict(), os.path.join(folder, "open_clip_pytorch_model.bin"))
    else:
        save_file({k: v.contiguous() for k, v in peer.state_dict().items()},
                  os.path.join(folder, "open_clip_model.safetensors"))
    write_text(folder, "tokenizer.json", tokenizer)
    if siglip:
        write_json(folder, "tokenizer_config.json", {**SIGLIP_PAD, "pad_token": "<pad>" if "2" in name else "</s>"})
    return str(folder), peer


def write_json(folder, name, content):
    with open(os.path.join(folder, name), "w") as f:
        json.dump(content, f)


def write_text(folder, name, content):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        f.write(content)


def hf_peer(kind, tiny=True, **both):
    size = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4) if tiny else {}
    if kind == "clip":
        config = transformers.CLIPConfig(
            text_config={**size, "vocab_size": 49408, **both, **({} if tiny else {"num_hidden_layers": 3})},
            vision_config={**size, **both, **({"image_size": 48, "patch_size": 16} if tiny else {})},
            projection_dim=48 if tiny else 512)
        return perturb(transformers.CLIPModel(config))
    config = transformers.SiglipConfig(
        text_config={**size, "vocab_size": 600, "bos_token_id": None, "eos_token_id": 1, **both},
        vision_config={**size, **both, **({"image_size": 48, "patch_size": 16} if tiny else {})})
    return perturb(transformers.SiglipModel(config))


def write_hf(folder, kind, tokenizer, tiny=True, bin=False, **both):
    peer = hf_peer(kind, tiny, **both)
    peer.save_pretrained(folder)
    size = peer.config.vision_config.image_size
    if kind == "clip":
        transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}
                                        ).save_pretrained(folder)
    else:
        transformers.SiglipImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
        write_json(folder, "tokenizer_config.json", SIGLIP_PAD)
    write_text(folder, "tokenizer.json", tokenizer)
    if bin:
        os.remove(os.path.join(folder, "model.safetensors"))
        torch.save(peer.state_dict(), os.path.join(folder, "pytorch_model.bin"))
    return str(folder), peer


def inputs(model, texts=TEXTS, batch=2):
    return torch.randn(batch, 3, model.config.image_size, model.config.image_size), model.tokenize(texts)


@torch.no_grad()
def assert_parity(model, peer, fp64=True):
    """Image and text embeddings and logits of both, in fp32 to 1e-5 and in fp64 to 1e-10."""
    model.eval()
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-10))[:1 + fp64]:
        model, peer = model.to(dtype), peer.to(dtype)
        images, tokens = inputs(model)
        images = images.to(dtype)
        out = model(images, tokens)
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        logits = logits if out["logit_bias"] is None else logits + out["logit_bias"]
        if hasattr(peer, "encode_image"):
            pairs = [(peer.encode_image(images), model.encode_image(images)),
                     (peer.encode_text(tokens), model.encode_text(tokens)),
                     (peer.get_logits(images, tokens)[0], logits)]
        else:
            theirs = peer.get_image_features(pixel_values=images), peer.get_text_features(input_ids=tokens)
            theirs = [getattr(x, "pooler_output", x) for x in theirs]       # transformers 5 wraps them
            pairs = [(theirs[0], model.encode_image(images)), (theirs[1], model.encode_text(tokens)),
                     (peer(pixel_values=images, input_ids=tokens).logits_per_image, logits)]
        found = [difference(a, b) for a, b in pairs]
        print(f"{model.config.name} {dtype}: image {found[0]:.1e} text {found[1]:.1e} logits {found[2]:.1e}")
        scale = max(1, peer.logit_scale.exp().item())       # logits are cosines times this
        assert max(found[:2]) <= limit and found[2] <= limit * scale, (dtype, found)
    model.float(), peer.float()


# -----------------------------------------------------------------------------
# in: parity

@pytest.mark.parametrize("name, reduce", [
    ("ViT-B-32", dict(layers=3)), ("ViT-B-32-quickgelu", dict(layers=3)), ("ViT-B-16", dict(layers=3)),
    ("ViT-L-14", dict(layers=2)), ("ViT-L-14-336-quickgelu", dict(layers=1))])
def test_open_clip_clip(name, reduce, tmp_path, clip_tokenizer):
    folder, peer = write_open_clip(tmp_path, name, clip_tokenizer[0], bin="quickgelu" in name, **reduce)
    model = CLIP.from_pretrained(folder)
    assert model.config.vision_act == model.config.text_act == ("quick_gelu" if "quickgelu" in name else "gelu")
    assert_parity(model, peer)
    assert torch.equal(model.tokenize(CAPTIONS), clip_tokenizer[1](CAPTIONS))


@pytest.mark.slow
def test_open_clip_real_shape_and_memory(tmp_path, clip_tokenizer):
    """A whole ViT-B/32 (605 MB). Loading it must not need three copies: peak below 2.4 times its size, of which one is
    the file's mapped pages."""
    folder, peer = write_open_clip(tmp_path, "ViT-B-32", clip_tokenizer[0])
    model = CLIP.from_pretrained(folder, "ViT-B-32")
    assert model.config.name == "ViT-B-32"
    assert_parity(model, peer, fp64=False)
    code = ("import re, torch; from model import CLIP; "
            "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024; "
            "base = peak(); "
            f"m = CLIP.from_pretrained({folder!r}); print((peak() - base) / sum(p.nbytes for p in m.parameters()))")
    if os.path.exists("/proc/self/status"):
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        print("peak memory / size of the weights:", out)
        assert 0.9 < float(out) < 2.4, out


@pytest.fixture
def shallow(monkeypatch):
    """timm's image towers with 2 blocks, for open_clip and for us alike."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **{"depth": 2, **kwargs}))
    for models in (MODELS, M.TOWERS):
        for name, config in models.items():
            if config.family == "siglip":
                monkeypatch.setitem(models, name, layers(config, vision=2))


@pytest.mark.parametrize("name, acts", [
    ("ViT-B-16-SigLIP", ("gelu", "gelu")), ("ViT-B-32-SigLIP2-256", ("gelu_tanh", "gelu_tanh")),
    ("ViT-B-16-SigLIP2", ("gelu", "gelu_tanh"))])
def test_open_clip_siglip(name, acts, tmp_path, siglip_tokenizer, shallow):
    folder, peer = write_open_clip(tmp_path, name, siglip_tokenizer, layers=2, vocab=600)
    model = CLIP.from_pretrained(folder)
    assert (model.config.vision_act, model.config.text_act) == acts
    assert model.config.pad_id == (0 if "2" in name else 1)
    assert_parity(model, peer)
    theirs = open_clip.get_tokenizer("local-dir:" + folder)
    assert torch.equal(model.tokenize(CAPTIONS + TEXTS), theirs(CAPTIONS + TEXTS))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_transformers_tiny(kind, act, tmp_path, clip_tokenizer, siglip_tokenizer):
    tokenizer = clip_tokenizer[0] if kind == "clip" else siglip_tokenizer
    folder, peer = write_hf(tmp_path, kind, tokenizer, hidden_act=act, bin=act == "gelu")
    model = CLIP.from_pretrained(folder)
    assert model.config.vision_act == {"gelu_pytorch_tanh": "gelu_tanh"}.get(act, act)
    assert_parity(model, peer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_real_shape(kind, tmp_path, clip_tokenizer, siglip_tokenizer):
    """The image towers of openai/clip-vit-base-patch32 and google/siglip-base-patch16-224, whole."""
    tokenizer = clip_tokenizer[0] if kind == "clip" else siglip_tokenizer
    folder, peer = write_hf(tmp_path, kind, tokenizer, tiny=False)
    # as on the hub: google's config.json leaves out all that is transformers' default
    cfg = json.load(open(tmp_path / "config.json"))
    if kind == "siglip":
        cfg = {"model_type": "siglip", "text_config": {"vocab_size": 600}, "vision_config": {"model_type": "x"}}
        write_json(tmp_path, "config.json", cfg)
    assert_parity(CLIP.from_pretrained(folder), peer, fp64=kind == "clip")


def test_every_name_agrees_with_open_clip_and_is_accepted():
    """Structure and activation of each named model are those that open_clip's config of the same name says."""
    for name, ours in MODELS.items():
        if name not in M.SOURCES:
            continue
        cfg = open_clip.get_model_config(name)
        config = M.read_open_clip({"model_cfg": cfg})
        for key in M.STRUCTURE + ("image_size", "vision_act", "text_act", "logit_bias", "text_clean"):
            assert getattr(config, key) == getattr(ours, key), (name, key)
        assert M.SOURCES[name].startswith("timm/")
        if ours.family == "siglip":     # a name stands for the numbers that timm gives it
            with torch.device("meta"):
                tower = timm.create_model(cfg["vision_cfg"]["timm_model_name"], num_classes=0)
                mine = CLIP(layers(replace(ours, vocab_size=8), text=1)).visual
            assert ({k: v.shape for k, v in tower.state_dict().items()}
                    == {k: v.shape for k, v in mine.state_dict().items()}), name
            x = torch.linspace(-4, 4, 99)
            assert difference(tower.blocks[0].mlp.act(x), mine.blocks[0].mlp.act(x)) < 1e-6, name
            assert tower.blocks[0].attn.num_heads == ours.vision[2]


# -----------------------------------------------------------------------------
# in: every source

def test_single_files(tmp_path, clip_tokenizer, monkeypatch):
    """One file of each kind, told apart by its keys; the architecture comes from the name."""
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        monkeypatch.setitem(MODELS, name, layers(MODELS[name], vision=2, text=2))
    folder, peer = write_open_clip(tmp_path / "oc", "ViT-B-32", clip_tokenizer[0], layers=2)
    whole = CLIP.from_pretrained(folder)
    state = peer.state_dict()
    safe = os.path.join(folder, "open_clip_model.safetensors")
    with pytest.warns(UserWarning, match="ViT-B-32-quickgelu"):     # a bare file does not say its activation
        bare = CLIP.from_pretrained(safe, "ViT-B-32")
    assert same_state(bare, whole) and bare.config.tokenizer == "" and bare.config.vision_act == "gelu"
    with pytest.raises(ValueError, match="no tokenizer"):
        bare.tokenize(["a"])
    M.set_tokenizer(bare, os.path.join(folder, "tokenizer.json"))
    assert torch.equal(bare.tokenize(TEXTS), whole.tokenize(TEXTS))

    # OpenAI's names and dtype, with what only its archives hold: quick_gelu, whatever the name
    half = {k: v.half() for k, v in state.items()}
    torch.save({**half, "input_resolution": torch.tensor(224), "context_length": torch.tensor(77),
                "vocab_size": torch.tensor(49408)}, tmp_path / "openai.pt")
    openai = CLIP.from_pretrained(str(tmp_path / "openai.pt"), "ViT-B-32")
    assert openai.config.vision_act == openai.config.text_act == "quick_gelu"
    assert all(p.dtype == torch.float32 for p in openai.parameters())
    assert torch.equal(openai.visual.cls_token.flatten(), half["visual.class_embedding"].float())

    # a training checkpoint of open_clip; the old tar format of torch
    parallel = {"module." + k: v for k, v in state.items()}
    torch.save({"epoch": 1, "state_dict": parallel, "optimizer": {}}, tmp_path / "e.pt")
    assert same_state(CLIP.from_pretrained(str(tmp_path / "e.pt"), "ViT-B-32-quickgelu"), whole)
    torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    assert same_state(CLIP.from_pretrained(str(tmp_path / "c.pth"), "ViT-B-32-quickgelu"), whole)

    # this project: with its config, and bare
    torch.save(whole.checkpoint(), tmp_path / "last.pt")
    again = CLIP.from_pretrained(str(tmp_path / "last.pt"))
    assert same_state(again, whole) and again.config == whole.config
    save_file(whole.state_dict(), tmp_path / "ours.safetensors")
    assert same_state(CLIP.from_pretrained(str(tmp_path / "ours.safetensors"), "ViT-B-32-quickgelu"), whole)


def test_single_files_of_transformers_and_siglip(tmp_path, siglip_tokenizer, monkeypatch):
    """The small peers stand in for the named models."""
    for kind in ("clip", "siglip"):
        folder, _ = write_hf(tmp_path / kind, kind, siglip_tokenizer)
        whole = CLIP.from_pretrained(folder)
        monkeypatch.setitem(MODELS, "small-quickgelu", replace(whole.config, tokenizer=""))
        for name in ("model.safetensors", "pytorch_model.bin"):
            if name.endswith(".bin"):
                torch.save(load_file(tmp_path / kind / "model.safetensors"), tmp_path / kind / name)
            assert same_state(CLIP.from_pretrained(os.path.join(folder, name), "small-quickgelu"), whole)


def test_custom_text_and_processor_config(tmp_path, clip_tokenizer, siglip_tokenizer):
    """A CLIP with the names of open_clip's CustomTextCLIP; transformers' newer file of the preprocessing."""
    folder, peer = write_open_clip(tmp_path / "a", "ViT-B-32", clip_tokenizer[0], layers=1)
    cfg = json.load(open(folder + "/open_clip_config.json"))
    cfg["model_cfg"]["custom_text"] = True
    write_json(folder, "open_clip_config.json", cfg)
    custom = open_clip.model.CustomTextCLIP(**{k: v for k, v in cfg["model_cfg"].items() if k != "custom_text"})
    names = custom.state_dict().keys()
    state = {(k if k in names else "text." + k): v.contiguous() for k, v in peer.state_dict().items()}
    custom.load_state_dict(state)
    save_file(state, folder + "/open_clip_model.safetensors")
    assert_parity(CLIP.from_pretrained(folder), custom.eval())

    folder, _ = write_hf(tmp_path / "b", "siglip", siglip_tokenizer)
    pre = json.load(open(folder + "/preprocessor_config.json"))
    os.remove(folder + "/preprocessor_config.json")
    write_json(folder, "processor_config.json", {"image_processor": {**pre, "image_mean": [0.1, 0.2, 0.3]},
                                                 "processor_class": "SiglipProcessor"})
    c = CLIP.from_pretrained(folder).config
    assert (c.mean, c.std, c.resize) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "squash")


def test_bf16_weights_and_no_tokenizer(tmp_path, clip_tokenizer):
    folder, peer = write_hf(tmp_path, "clip", clip_tokenizer[0])
    state = {k: v.bfloat16() for k, v in peer.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    model = CLIP.from_pretrained(folder)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.tokenize(CAPTIONS), clip_tokenizer[1](CAPTIONS))
    os.remove(tmp_path / "tokenizer.json")
    with pytest.warns(UserWarning, match="no tokenizer.json"):
        assert CLIP.from_pretrained(folder).config.tokenizer == ""


def test_preprocessing_and_activation_come_from_the_config(tmp_path, clip_tokenizer, siglip_tokenizer):
    folder, _ = write_hf(tmp_path / "a", "siglip", siglip_tokenizer)
    pre = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2,
           "size": {"height": 48, "width": 48}}
    write_json(folder, "preprocessor_config.json", pre)
    c = CLIP.from_pretrained(folder).config
    assert (c.mean, c.std, c.interpolation, c.resize) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "squash")
    folder, _ = write_hf(tmp_path / "b", "clip", clip_tokenizer[0])
    write_json(folder, "preprocessor_config.json", {"size": 48, "crop_size": 48, "resample": 3})    # the older way
    c = CLIP.from_pretrained(folder).config
    assert (c.resize, c.interpolation, c.image_size, c.mean) == ("shortest", "bicubic", 48, MODELS["ViT-B-32"].mean)


def test_image_size_is_resampled_and_said(tmp_path, siglip_tokenizer, clip_tokenizer):
    from timm.layers import resample_abs_pos_embed
    for kind, tokenizer in (("clip", clip_tokenizer[0]), ("siglip", siglip_tokenizer)):
        folder, _ = write_hf(tmp_path / kind, kind, tokenizer)
        small = CLIP.from_pretrained(folder)
        with pytest.warns(UserWarning, match="resampled from 3 x 3 to 5 x 5"):
            large = CLIP.from_pretrained(folder, image_size=80)
        expected = resample_abs_pos_embed(small.visual.pos_embed, [5, 5], num_prefix_tokens=int(kind == "clip"))
        assert torch.equal(large.visual.pos_embed, expected) and large.config.image_size == 80
        assert large.encode_image(torch.randn(1, 3, 80, 80)).shape == (1, large.config.embed_dim)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            CLIP.from_pretrained(folder, image_size=48)     # nothing to say


# -----------------------------------------------------------------------------
# in: the hub, played by a local server and by the cache

class Hub(http.server.BaseHTTPRequestHandler):
    root, sent = None, []

    def do_HEAD(self, body=False):
        if self.path.startswith("/api/models/"):
            return self.list_repo(self.path.removeprefix("/api/models/").split("?")[0])
        owner, name, _, _, file = (self.path.split("?")[0].strip("/").split("/", 4) + [""] * 4)[:5]
        path = os.path.join(self.root, owner, name, file)
        exists = os.path.isfile(path)
        content = open(path, "rb").read() if exists else b""
        self.send_response(200 if exists else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{len(content)}-{file}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.sent.append((self.path, len(content) * body))
        if body:
            self.wfile.write(content)

    def list_repo(self, repo):
        folder = os.path.join(self.root, repo)
        exists = os.path.isdir(folder)
        files = [{"rfilename": name} for name in os.listdir(folder)] if exists else []
        content = json.dumps({"_id": "0", "id": repo, "siblings": files}).encode()
        self.send_response(200 if exists else 401)      # as the hub answers for what it hides
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.do_HEAD(body=True)

    def log_message(self, *args):
        pass


def point_to(url, monkeypatch):
    from huggingface_hub import HfApi, constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=url))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with an empty cache; returns the folder of its repos."""
    from huggingface_hub import constants
    Hub.root, Hub.sent = str(tmp_path / "hub"), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    for key, value in dict(HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE=False).items():
        monkeypatch.setattr(constants, key, value)
    point_to(url, monkeypatch)
    yield tmp_path / "hub"
    server.shutdown()


def test_hub(hub, clip_tokenizer, siglip_tokenizer, monkeypatch):
    _, peer = write_hf(hub / "google" / "siglip", "siglip", siglip_tokenizer)
    model = CLIP.from_pretrained("google/siglip")
    assert_parity(model, peer, fp64=False)
    assert model.config.name == "siglip" and model.config.pad_id == 1 and model.config.image_size == 48
    asked = len(Hub.sent)
    CLIP.from_pretrained("hf-hub:google/siglip")
    assert not any(path.endswith("model.safetensors") and size for path, size in Hub.sent[asked:])     # now cached
    with pytest.raises(ValueError, match="gated/x is not here.*refuses .HfHubHTTPError"):
        CLIP.from_pretrained("gated/x")
    os.makedirs(hub / "no" / "weights"), write_json(hub / "no" / "weights", "config.json", {"model_type": "clip"})
    with pytest.raises(ValueError, match="lacks open_clip_config.json and .* or config.json and model.safetensors .or"):
        CLIP.from_pretrained("no/weights")
    # now the network goes: what is cached still loads, and the rest fails at once with what to fetch
    point_to("http://127.0.0.1:9", monkeypatch)
    assert same_state(CLIP.from_pretrained("google/siglip"), model)


def test_a_bare_file_gets_the_tokenizer_of_its_name(hub, tmp_path, clip_tokenizer, monkeypatch):
    """A state dict says nothing of texts: the tokenizer comes from the hub, or an error says where it is to be had."""
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        monkeypatch.setitem(MODELS, name, layers(MODELS[name], vision=1, text=1))
    folder, _ = write_open_clip(tmp_path / "oc", "ViT-B-32", clip_tokenizer[0], layers=1)
    weights = os.path.join(folder, "open_clip_model.safetensors")
    os.makedirs(hub / M.SOURCES["ViT-B-32"])
    with pytest.warns(UserWarning, match="openai has no tokenizer.json: set_tokenizer"):
        assert CLIP.from_pretrained(weights, "ViT-B-32").config.tokenizer == ""
    write_text(hub / M.SOURCES["ViT-B-32"], "tokenizer.json", clip_tokenizer[0])
    model = CLIP.from_pretrained(weights, "ViT-B-32-quickgelu")
    assert torch.equal(model.tokenize(TEXTS), clip_tokenizer[1](TEXTS))
    shutil.rmtree(tmp_path / "cache")
    point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.warns(UserWarning, match="ViT-B-32 has no tokenizer yet, as the hub cannot be reached.*--tokenizer"):
        model = CLIP.from_pretrained(weights, "ViT-B-32")
    with pytest.raises(ValueError, match="no tokenizer.*--tokenizer, gives it one, that of https://huggingface.co/"
                                         "timm/vit_base_patch32_clip_224.openai/blob/main/tokenizer.json"):
        model.tokenize(["a"])


@pytest.mark.parametrize("how", ["refused", "unresolved", "flag"])
def test_offline_fails_at_once(how, hub, monkeypatch):
    from huggingface_hub import constants
    if how == "flag":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        point_to({"refused": "http://127.0.0.1:9", "unresolved": "http://nowhere.invalid"}[how], monkeypatch)
    for source, model in (("timm/ViT-B-16-SigLIP", None), (None, "ViT-B-16-SigLIP"), (None, "ViT-B-32")):
        start = time.time()
        with pytest.raises(ValueError) as error:
            CLIP.from_pretrained(source, model)
        assert time.time() - start < 3
        for word in ("cannot be reached", "open_clip_model.safetensors", "tokenizer.json", "model.safetensors",
                     source or M.SOURCES[model]):
            assert word in str(error.value)


# -----------------------------------------------------------------------------
# in: mistakes

def test_mistakes_say_what_to_do(tmp_path, clip_tokenizer, siglip_tokenizer):
    folder, peer = write_hf(tmp_path / "a", "clip", clip_tokenizer[0])
    weights = os.path.join(folder, "model.safetensors")
    state = load_file(weights)

    def fails(match, *args, **kwargs):
        with pytest.raises(ValueError, match=match) as error:
            CLIP.from_pretrained(*args, **kwargs)
        assert "\n" not in str(error.value)

    fails("no model 'ViT-X'.*ViT-B-32", folder, "ViT-X")
    fails("no model 'ViT-X'", None, "ViT-X")
    fails("no released weights.*nano", None, "nano")
    fails("no released weights", None, None)
    fails("does not tell its architecture: name it .--model.", weights)
    fails("no such file or folder", "missing/folder/x")
    fails("no such file or folder", "missing.safetensors")
    fails("no such file or folder", "./a/b")
    fails("ViT-B-32 is the name of a model, not of weights: give it as --model, which loads timm/vit_base", "ViT-B-32")
    fails("nano is the name of a model, not of weights: give it as --model$", "nano")
    fails("is no ViT-B-32: it has embed_dim 48, not 512", folder, "ViT-B-32")
    fails("lacks open_clip_config.json and .* or config.json and", str(tmp_path))
    (tmp_path / "last.pt").touch()
    fails("is the folder of a run: give .*last.pt", str(tmp_path))
    (tmp_path / "last.pt").unlink()
    fails("in the format of transformers clip, but ViT-B-16-SigLIP is a siglip", weights, "ViT-B-16-SigLIP")
    fails("of another shape.*likely weights of another model or size", weights, "ViT-B-32-quickgelu")

    def broken(change, match, name="model.safetensors"):
        new = {k: v.clone() for k, v in state.items()}
        change(new)
        save_file(new, weights)
        fails(match, folder)

    broken(lambda s: s.pop("text_model.encoder.layers.1.mlp.fc2.bias"),
           "1 missing .text_model.encoder.layers.1.mlp.fc2.bias.*read as transformers clip")
    broken(lambda s: [s.pop(k) for k in list(s) if "layers.1." in k], "32 missing .*, ....*likely half a file")
    broken(lambda s: s.update({"vision_model.extra.weight": torch.ones(2)}), "1 unexpected .vision_model.extra.weight")
    broken(lambda s: s.update(logit_scale=torch.ones(3)), "1 of another shape .logit_scale")
    broken(lambda s: [s.pop(k) for k in list(s) if k.startswith("vision")], "none of the formats")

    with open(weights, "r+b") as f:
        f.truncate(1000)
    fails("model.safetensors holds no readable weights", folder)
    write_text(folder, "config.json", "{")
    fails("this code cannot build config.json .JSONDecodeError", folder)
    write_json(folder, "config.json", {"model_type": "bert"})
    fails("model_type is 'bert', but this code can only do 'clip'", folder)
    cfg = peer.config.to_dict()
    cfg["vision_config"]["hidden_act"] = "relu"
    write_json(folder, "config.json", cfg)
    fails("vision_act is 'relu', expected one of gelu", folder)
    cfg["vision_config"].update(hidden_act="gelu", layer_norm_eps=1e-3)
    write_json(folder, "config.json", cfg)
    fails("vision_config/layer_norm_eps is 0.001", folder)

    torch.save({"a": object}, tmp_path / "code.pt")
    fails("holds no readable weights", str(tmp_path / "code.pt"), "ViT-B-32")
    torch.save([1], tmp_path / "list.pt")
    fails("holds no readable weights", str(tmp_path / "list.pt"), "ViT-B-32")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "jit.pt"))
    fails("TorchScript archive.*timm/vit_base_patch32_clip_224.openai", str(tmp_path / "jit.pt"), "ViT-B-32")
    with pytest.raises(ValueError, match="no checkpoint at .* that train.py wrote"):
        CLIP.load(save(tmp_path / "s.pt", state))
    with pytest.raises(ValueError, match="no checkpoint at .*none.pt that train.py wrote"):
        CLIP.load(str(tmp_path / "none.pt"))
    with pytest.raises(ValueError, match="is not a tokenizer"):
        M.read_tokenizer(os.path.join(folder, "config.json"))


def save(path, what):
    torch.save(what, path)
    return str(path)


def test_open_clip_configs_that_cannot_be_built(tmp_path, clip_tokenizer):
    folder, _ = write_open_clip(tmp_path, "ViT-B-32", clip_tokenizer[0], layers=1)
    good = json.load(open(tmp_path / "open_clip_config.json"))
    for section, key, value, match in (
            ("text_cfg", "pool_type", "eos", "text_cfg/pool_type is 'eos'"),
            ("text_cfg", "no_causal_mask", True, "no_causal_mask is True"),
            ("vision_cfg", "pool_type", "avg", "vision_cfg/pool_type is 'avg'"),
            ("vision_cfg", "layers", 2, "12 missing .visual.transformer.resblocks.1"),
            ("vision_cfg", "timm_model_name", "vit_nonsense", "this code cannot build .*vit_nonsense")):
        cfg = copy.deepcopy(good)
        cfg["model_cfg"][section][key] = value
        write_json(tmp_path, "open_clip_config.json", cfg)
        with pytest.raises(ValueError, match=match):
            CLIP.from_pretrained(folder)
    good["preprocess_cfg"]["resize_mode"] = "longest"
    write_json(tmp_path, "open_clip_config.json", good)
    with pytest.raises(ValueError, match="resize is 'longest'"):
        CLIP.from_pretrained(folder)


@torch.no_grad()
def test_every_config_of_open_clip_is_built_or_refused(tmp_path):
    """One line that says which tower, what is supported, and how it can be evaluated all the same."""
    refused = {}
    write_text(tmp_path, "open_clip_model.safetensors", "")
    for name in open_clip.list_models():
        cfg = open_clip.get_model_config(name)
        write_json(tmp_path, "open_clip_config.json", {"model_cfg": cfg})
        try:
            config, _ = M.read_folder(str(tmp_path))
        except ValueError as error:
            refused[name] = str(error)
            assert "open_clip_config.json: " in refused[name] and "\n" not in refused[name], refused[name]
            assert "evaluate.py --init open_clip:NAME/PRETRAINED" in refused[name]
            continue
        if name in M.SOURCES:
            continue        # another test's
        cfg["text_cfg"]["layers"] = 1           # the shapes of what is left are those of open_clip
        if config.family == "clip":
            cfg["vision_cfg"]["layers"] = 1
        kwargs = {k: v for k, v in cfg.items() if k != "custom_text"}
        with torch.device("meta"):
            peer = (open_clip.model.CustomTextCLIP if "custom_text" in cfg else open_clip.model.CLIP)(**kwargs)
            model = CLIP(layers(config, text=1, **{"vision": 1} if config.family == "clip" else {}))
        parts = M.named_as(model, f"open_clip {config.family}")
        ours = {k: tuple(torch.cat(x).shape) if len(x) > 1 else tuple(x[0].shape) for k, x in parts.items()}
        theirs = {k: tuple(x.shape) for k, x in peer.state_dict().items() if k.split(".")[-1] not in M.NO_WEIGHTS}
        assert ours == theirs, name
    for name, why in (("RN50", "a ResNet"), ("EVA02-B-16", "eva02_base_patch16_clip_224"), ("convnext_base", "timm's"),
                      ("ViTamin-L", "vitamin_large_224"), ("PE-Core-B-16", "vit_pe_core"), ("MobileCLIP-S1", "fastvit"),
                      ("ViT-gopt-16-SigLIP2-256", "vit_giantopt_patch16_siglip_256"), ("coca_ViT-B-32", "CoCa"),
                      ("roberta-ViT-B-32", "roberta-base"), ("ViT-L-14-CLIPA", "pool_type is 'avg'"),
                      ("ViT-M-16-alt", "ls_init_value is 0.0001")):
        assert why in refused[name], (name, refused[name])
    assert len(refused) < len(open_clip.list_models()) - len(M.SOURCES)


def test_quickgelu_name_contradicts_a_gelu_config(tmp_path, clip_tokenizer, monkeypatch):
    folder, _ = write_hf(tmp_path, "clip", clip_tokenizer[0], hidden_act="gelu")
    config = CLIP.from_pretrained(folder).config
    monkeypatch.setitem(MODELS, "small", config)
    monkeypatch.setitem(MODELS, "small-quickgelu", replace(config, vision_act="quick_gelu", text_act="quick_gelu"))
    assert CLIP.from_pretrained(folder, "small").config.name == "small"
    with pytest.raises(ValueError, match="vision_act gelu, not quick_gelu"):
        CLIP.from_pretrained(folder, "small-quickgelu")


# -----------------------------------------------------------------------------
# in: damage

NONSENSE = [None, "x", "", -1, 0, 1, 3, 1.5, 1e300, float("nan"), True, [], [1], {}, {"a": 1}, 10 ** 12, "\ud800"]


def damage_json(content, rng):
    """One value anywhere in nested dicts and lists is removed or replaced; long lists are not walked through."""
    keys = list(content) if isinstance(content, dict) else list(range(min(len(content), 20)))
    key = keys[rng.randint(len(keys))]
    inner = content[key]
    if isinstance(inner, (dict, list)) and inner and rng.rand() < 0.75:
        damage_json(inner, rng)
    elif rng.rand() < 0.4:
        del content[key]
    else:
        content[key] = NONSENSE[rng.randint(len(NONSENSE))]


def damage_bytes(path, rng):
    with open(path, "rb") as f:
        content = bytearray(f.read())
    kind = rng.randint(4)
    if kind == 0:
        content = content[:rng.randint(len(content))]
    elif kind == 1:         # the head, where the structure is
        content[rng.randint(min(len(content), 2000))] = rng.randint(256)
    elif kind == 2:
        for _ in range(8):
            content[rng.randint(len(content))] ^= 1 << rng.randint(8)
    else:
        start = rng.randint(len(content))
        content[start:start + 100] = b"\0" * 100
    with open(path, "wb") as f:
        f.write(content)


def damage(folder, rng):
    """Damages one file of the folder; returns what happened to it."""
    name = sorted(os.listdir(folder))[rng.randint(len(os.listdir(folder)))]
    path = os.path.join(folder, name)
    if name.endswith(".json") and rng.rand() < 0.8:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        damage_json(content, rng)
        write_json(folder, name, content)
    elif name.endswith(".pt") and rng.rand() < 0.6:
        saved = torch.load(path, weights_only=True)
        saved.pop("digest", None)
        if rng.rand() < 0.5:
            damage_json(saved["config"], rng)
        else:
            key = list(saved["model"])[rng.randint(len(saved["model"]))]
            x = saved["model"][key]
            saved["model"][key] = [x * float("nan"), x.flatten(), x[None], x.long(), x.bool(), x.to_sparse(), "x", None,
                                   x.to(torch.complex64), torch.empty(0), x.half()][rng.randint(11)]
        torch.save(saved, path)
    else:
        damage_bytes(path, rng)
    return name


def fuzz(originals, folder, seeds):
    """Opens damaged copies; yields (seed, name of the file, None or the one-line error). Anything else is raised."""
    originals = sorted(originals)
    for seed in seeds:
        rng = np.random.RandomState(seed)
        original = originals[seed % len(originals)]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        name = damage(folder, rng)
        source = os.path.join(folder, "last.pt") if os.path.exists(os.path.join(folder, "last.pt")) else folder
        try:
            model = CLIP.from_pretrained(source)
            tokens = model.tokenize(["a red circle", ""])
            side = model.config.image_size
            model.encode_text(tokens), model.encode_image(torch.zeros(1, 3, side, side))
            model.transform(picture((9, 7)))
        except ValueError as error:
            assert "\n" not in str(error), (seed, name, str(error))
            yield seed, name, str(error)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {name} of {os.path.basename(original)}: {error!r}") from error
        else:
            yield seed, name, None


@torch.no_grad()
def test_damaged_files_give_one_line(tmp_path, siglip_tokenizer):
    """Checkpoints, weights, configs and tokenizers, damaged by a seed: a ValueError of one line, or a model that works."""
    folders = make_originals(tmp_path, siglip_tokenizer)
    found = list(fuzz(folders, str(tmp_path / "damaged"), range(70)))
    assert 30 < sum(error is not None for _, _, error in found)


def test_a_panic_of_the_tokenizers_library_is_one_line(tmp_path, siglip_tokenizer):
    """Its Rust code raises a BaseException where the template names a token that it does not list."""
    broken = json.loads(siglip_tokenizer)
    broken["post_processor"]["special_tokens"] = {}
    write_json(tmp_path, "tokenizer.json", broken)
    for call in (lambda: M.read_tokenizer(str(tmp_path / "tokenizer.json")),
                 lambda: CLIP(replace(MODELS["nano"], vocab_size=600, tokenizer=json.dumps(broken)))):
        with pytest.raises(ValueError, match="is not a tokenizer .*no entry found for key"):
            call()
    with pytest.raises(KeyboardInterrupt):
        with M.tokenizer_errors("a signal is none of them"):
            raise KeyboardInterrupt


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path, siglip_tokenizer):
    folder, _ = write_hf(tmp_path, "siglip", siglip_tokenizer)
    state = load_file(tmp_path / "model.safetensors")
    state["text_model.encoder.layers.1.mlp.fc1.weight"][3, 4] = value
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.mlp.fc1.weight has 1 of \d+ values that are NaN or infinite"):
        CLIP.from_pretrained(folder)
    state["text_model.encoder.layers.1.mlp.fc1.weight"][:] = 3e38       # finite, though their sum is not
    save_file(state, tmp_path / "model.safetensors")
    CLIP.from_pretrained(folder)


def test_a_checkpoint_tells_that_it_was_altered(tmp_path, siglip_tokenizer):
    model = nano(siglip_tokenizer)
    saved = model.checkpoint()
    for name, change in (("weight", lambda s: s["model"]["text.head.weight"][3, 4].mul_(1.001)),
                         ("tokenizer", lambda s: s["config"].update(tokenizer=s["config"]["tokenizer"] + " ")),
                         ("swapped", lambda s: s["model"].update({"text.norm.bias": s["model"]["text.norm.weight"],
                                                                  "text.norm.weight": s["model"]["text.norm.bias"]}))):
        bad = copy.deepcopy(saved)
        change(bad)
        for call in (CLIP.load, CLIP.from_pretrained):
            with pytest.raises(ValueError, match=f"{name}.pt is damaged: .* sha256 differs.. Take another"):
                call(save(tmp_path / f"{name}.pt", bad))
    good = save(tmp_path / "good.pt", saved)
    assert same_state(CLIP.load(good), model) and same_state(CLIP.from_pretrained(good), model)
    # half precision; names of torch.compile and DistributedDataParallel; earlier versions, without a digest
    half = save(tmp_path / "half.pt", CLIP(model.config).bfloat16().checkpoint())
    assert CLIP.load(half).logit_scale.dtype == torch.float32
    saved["model"] = {f"module._orig_mod.{k}": v for k, v in saved["model"].items()}
    assert same_state(CLIP.load(save(tmp_path / "names.pt", saved)), model)
    del saved["digest"]
    saved["model"]["module._orig_mod.logit_scale"] = torch.tensor(1.0)
    assert CLIP.load(save(tmp_path / "old.pt", saved)).logit_scale == 1


def make_originals(tmp_path, siglip_tokenizer):
    """Small folders of each kind."""
    size = dict(image_size=16, vision=(32, 1, 2, 64), text=(32, 1, 2, 64), embed_dim=32)
    siglip = nano(siglip_tokenizer, **size)
    clip = nano(siglip_tokenizer, family="clip", logit_bias=None, **size)
    folders = []
    for name, model in (("siglip", siglip), ("clip", clip)):
        for format in ("open_clip", "transformers"):
            folders.append(str(tmp_path / f"{name}-{format}"))
            export(model, format, folders[-1])
        folders.append(str(tmp_path / f"{name}-own"))
        os.makedirs(folders[-1])
        save(os.path.join(folders[-1], "last.pt"), model.checkpoint())
    return folders


# -----------------------------------------------------------------------------
# out

def nano(siglip_tokenizer, **kwargs):
    return perturb(CLIP(replace(MODELS["nano"], tokenizer=siglip_tokenizer, vocab_size=600, pad_id=1, **kwargs)))


def small_clip(clip_tokenizer, **kwargs):
    return perturb(CLIP(replace(layers(MODELS["ViT-B-32-quickgelu"], vision=2, text=2), tokenizer=clip_tokenizer[0],
                                **kwargs)))


@pytest.fixture(params=["nano", "clip", pytest.param("siglip", marks=pytest.mark.slow), "nano-tanh"])
def any_model(request, clip_tokenizer, siglip_tokenizer):
    if request.param == "clip":
        return small_clip(clip_tokenizer)
    if request.param == "siglip":       # a real image tower, which open_clip and timm know by name
        return perturb(CLIP(replace(layers(MODELS["ViT-B-32-SigLIP2-256"], text=2), vocab_size=600,
                                    tokenizer=siglip_tokenizer)))
    return nano(siglip_tokenizer, **({"vision_act": "gelu_tanh", "text_act": "gelu_tanh", "image_size": 40,
                                      "interpolation": "bilinear"} if "tanh" in request.param else {}))


def picture(size):
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def assert_round_trip(model, folder):
    back = CLIP.from_pretrained(folder)
    assert same_state(back, model)
    a, b = asdict(back.config), asdict(model.config)
    assert {k for k in a if a[k] != b[k]} <= {"name", "tokenizer", "logit_scale", "logit_bias"}
    assert torch.equal(back.tokenize(CAPTIONS + TEXTS), model.tokenize(CAPTIONS + TEXTS))
    return back


@torch.no_grad()
def test_export_open_clip(any_model, tmp_path):
    model, folder = any_model, str(tmp_path / "out")
    how = export(model, "open_clip", folder)
    assert how == f'open_clip.create_model_from_pretrained("local-dir:{folder}")'
    peer, transform = open_clip.create_model_from_pretrained("local-dir:" + folder)
    assert_parity(model, peer.eval(), fp64=False)
    theirs = open_clip.get_tokenizer("local-dir:" + folder)
    assert torch.equal(theirs(CAPTIONS + TEXTS), model.tokenize(CAPTIONS + TEXTS))
    assert torch.equal(transform(picture((70, 50))), model.transform(picture((70, 50))))
    back = assert_round_trip(model, folder)
    assert back.config.tokenizer == model.config.tokenizer
    export(back, "open_clip", folder + "2")
    for name in os.listdir(folder):     # the second time, byte by byte
        if name.endswith((".safetensors", "tokenizer.json")):
            assert open(os.path.join(folder, name), "rb").read() == open(os.path.join(folder + "2", name), "rb").read()
    if "timm_model_name" in json.load(open(folder + "/open_clip_config.json"))["model_cfg"]["vision_cfg"]:
        os.rename(folder, folder + "moved")     # our own reader does not mind
        assert same_state(CLIP.from_pretrained(folder + "moved"), model)


@torch.no_grad()
def test_export_transformers(any_model, tmp_path):
    model, folder = any_model, str(tmp_path / "out")
    export(model, "transformers", folder)
    kind = transformers.SiglipModel if model.config.family == "siglip" else transformers.CLIPModel
    peer, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_parity(model, peer.eval(), fp64=False)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    image = picture((70, 50))
    given = processor(text=CAPTIONS + TEXTS, images=image, padding="max_length", truncation=True, return_tensors="pt")
    assert sorted(given) == ["input_ids", "pixel_values"]
    ours = model.tokenize(CAPTIONS + TEXTS)
    if model.config.family == "siglip":
        plain = [i for i, t in enumerate(CAPTIONS + TEXTS) if "&amp;" not in t]     # transformers does not unescape
        assert torch.equal(given["input_ids"][plain], ours[plain])
    else:   # transformers pads with the end-of-text token
        upto = torch.arange(ours.shape[1]) <= ours.argmax(-1, keepdim=True)
        plain = [i for i, t in enumerate(CAPTIONS + TEXTS) if "&amp;" not in t]
        assert torch.equal((given["input_ids"] * upto)[plain], (ours * upto)[plain])
    # transformers resizes tensors, PIL rounds to bytes: at most two of 255 steps of the pixel values
    assert difference(given["pixel_values"][0], model.transform(image)) < 2.5 / 255 / min(model.config.std)
    text = peer(input_ids=given["input_ids"], pixel_values=given["pixel_values"]).text_embeds
    assert difference(text[plain], model.encode_text(ours[plain], normalize=True)) < 1e-5
    back = assert_round_trip(model, folder)
    export(back, "transformers", folder + "2")
    assert_round_trip(back, folder + "2")


def test_transparent_images(tmp_path, siglip_tokenizer):
    """load_image puts white beneath them, as transformers' processor does; open_clip's transform needs load_image."""
    from data import load_image
    model = nano(siglip_tokenizer, image_size=48)
    export(model, "transformers", str(tmp_path / "a"))
    export(model, "open_clip", str(tmp_path / "b"))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "a")
    transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'b'}")[1]
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 4), dtype=np.uint8)
    pixels[:20] = 0         # wholly transparent, and black underneath
    Image.fromarray(pixels, "RGBA").save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        theirs = processor(images=image, text=["a"], return_tensors="pt")["pixel_values"][0]
    ours = model.transform(load_image(str(tmp_path / "x.png")))
    assert difference(theirs, ours) < 2.5 / 255 / 0.5 and (ours[:, :12] == 1).all()
    assert torch.equal(transform(load_image(str(tmp_path / "x.png"))), ours)


@torch.no_grad()
def test_export_timm(any_model, tmp_path):
    model, folder = any_model, str(tmp_path / "out")
    how = export(model, "timm", folder)
    cfg = json.load(open(folder + "/config.json"))
    images = inputs(model)[0]
    for peer in (eval(how), timm.create_model(cfg["architecture"], checkpoint_path=folder + "/model.safetensors",
                                              **cfg["model_args"])):
        assert difference(peer.eval()(images), model.encode_image(images)) < 1e-5
    from timm.data import create_transform, resolve_data_config
    transform = create_transform(**resolve_data_config({}, model=timm.create_model("local-dir:" + folder)))
    assert difference(transform(picture((70, 50))), model.transform(picture((70, 50)))) < 1e-6


@torch.no_grad()
def test_peer_in_and_out_again_is_bit_equal(tmp_path, clip_tokenizer, siglip_tokenizer, shallow):
    """in -> out gives the peer's own tensors back, bit by bit, under its own names."""
    for kind, tokenizer in (("clip", clip_tokenizer[0]), ("siglip", siglip_tokenizer)):
        folder, _ = write_hf(tmp_path / kind, kind, tokenizer)
        export(CLIP.from_pretrained(folder), "transformers", folder + "-out")
        a, b = load_file(folder + "/model.safetensors"), load_file(folder + "-out/model.safetensors")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].shape == b[k].shape for k in a)
    for name, tokenizer in (("ViT-B-32", clip_tokenizer[0]), ("ViT-B-32-SigLIP2-256", siglip_tokenizer)):
        folder, _ = write_open_clip(tmp_path / name, name, tokenizer, layers=2, vocab=600 if "Sig" in name else None)
        export(CLIP.from_pretrained(folder), "open_clip", folder + "-out")
        a, b = (load_file(f + "/open_clip_model.safetensors") for f in (folder, folder + "-out"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].shape == b[k].shape for k in a)


@torch.no_grad()
def test_a_pad_may_be_a_token_as_others_are(tmp_path, siglip_tokenizer):
    """A SigLIP attends to its pads, and another pad than in training would change all features without a word."""
    model = perturb(CLIP(replace(MODELS["nano"], tokenizer=siglip_tokenizer, vocab_size=600, pad_id=5)))
    for format in ("open_clip", "transformers"):
        export(model, format, str(tmp_path / format))
        found = CLIP.from_pretrained(tmp_path / format)
        assert found.config.pad_id == 5
        assert torch.equal(found.tokenize(["a cat", ""]), model.tokenize(["a cat", ""]))


@torch.no_grad()
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_hidden_units_are_those_of_the_config(family, tmp_path, siglip_tokenizer, tower=(88, 1, 2, 120)):
    """Also where 88 * (120 / 88) is a little below 120: timm and open_clip build from the ratio."""
    config = replace(MODELS["nano"], family=family, embed_dim=88, vision=tower, text=tower,
                     tokenizer=siglip_tokenizer)
    model = CLIP(config).eval()
    mlps = [model.visual.blocks[0].mlp, model.text.blocks[0].mlp]
    if family == "siglip":
        mlps.append(model.visual.attn_pool.mlp)
    assert [mlp.fc1.out_features for mlp in mlps] == [120] * len(mlps)
    export(model, "open_clip", tmp_path / "exported")
    assert CLIP.from_pretrained(tmp_path / "exported").config.text == tower
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'exported'}")
    image = torch.randn(1, 3, 32, 32)
    assert difference(theirs.eval().encode_image(image), model.encode_image(image)) < 1e-5


@torch.no_grad()
def test_export_with_other_losses(tmp_path, siglip_tokenizer, clip_tokenizer):
    """A SigLIP trained with the softmax loss, a CLIP trained with the sigmoid loss."""
    softmax = nano(siglip_tokenizer, logit_bias=None)
    export(softmax, "transformers", str(tmp_path / "a"))
    assert_parity(softmax, transformers.SiglipModel.from_pretrained(tmp_path / "a").eval(), fp64=False)
    export(softmax, "open_clip", str(tmp_path / "b"))
    assert_round_trip(softmax, str(tmp_path / "b"))
    sigmoid = small_clip(clip_tokenizer, logit_bias=-10.0)
    export(sigmoid, "open_clip", str(tmp_path / "c"))
    assert_parity(sigmoid, open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'c'}")[0].eval(), fp64=False)
    assert_round_trip(sigmoid, str(tmp_path / "c"))
    with pytest.raises(ValueError, match="no logit_bias"):
        export(sigmoid, "transformers", str(tmp_path / "d"))
    with pytest.raises(ValueError, match="quick_gelu"):
        export(nano(siglip_tokenizer, text_act="quick_gelu"), "open_clip", str(tmp_path / "e"))
    assert not os.path.exists(tmp_path / "e")


def test_command_line(tmp_path, siglip_tokenizer, monkeypatch, capsys):
    checkpoint = save(tmp_path / "last.pt", nano(siglip_tokenizer).checkpoint())

    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["model.py", *args])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(os.path.join(ROOT, "model.py"), run_name="__main__")
        message = exit.value.code if isinstance(exit.value.code, str) else ""     # python prints it, with status 1
        out = capsys.readouterr()
        return (1 if message else exit.value.code), message or out.out + out.err

    done = subprocess.run([sys.executable, os.path.join(ROOT, "model.py"), "export", "--checkpoint", checkpoint,
                           "--format", "transformers", "--output", "out"], capture_output=True, text=True)
    assert done.returncode == 0 and "SiglipModel.from_pretrained" in done.stdout, done.stderr
    assert same_state(CLIP.from_pretrained(str(tmp_path / "out")), CLIP.load(checkpoint))
    for status, word, args in (
            (0, "--format", ["export", "--help"]), (0, "export", ["--help"]), (2, "required", ["export"]), (2, "", []),
            (2, "invalid choice", ["export", "--checkpoint", checkpoint, "--format", "onnx", "--output", "o"]),
            (1, "exists: give a new folder", ["export", "--checkpoint", checkpoint, "--format", "timm", "--output", "."]),
            (1, "no such file", ["export", "--checkpoint", "none.pt", "--format", "timm", "--output", "o"])):
        found, text = run(*args)
        assert found == status and word in text and (status != 1 or "\n" not in text), (args, found, text)


def test_help_takes_no_imports(tmp_path):
    """It must not load torch: less than two seconds, whatever else the machine does."""
    for args in (["--help"], ["export", "--format", "onnx"]):
        done = subprocess.run([sys.executable, "-X", "importtime", os.path.join(ROOT, "model.py"), *args],
                              capture_output=True, text=True)
        assert "--checkpoint" in done.stdout + done.stderr
        assert not [line for line in done.stderr.splitlines() if line.endswith((" torch", " timm", " torchvision"))]


def test_works_alone(tmp_path, siglip_tokenizer):
    """model.py copied into an empty folder loads a checkpoint, knows all named models, and writes other formats."""
    shutil.copy(os.path.join(ROOT, "model.py"), tmp_path)
    save(tmp_path / "last.pt", nano(siglip_tokenizer).checkpoint())
    code = """
from model import CLIP, MODELS, export
export(CLIP.load('last.pt'), 'transformers', 'out')
CLIP.from_pretrained('out').tokenize(['a'])
print(*MODELS)
try:
    CLIP.from_pretrained('x/y')
except ValueError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True,
                         env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}).stdout
    names, error = out.splitlines()
    assert names.split() == list(MODELS) and "x/y is not here, the hub cannot be reached" in error


# -----------------------------------------------------------------------------
# preprocessing, tokenizer, cleaning

@pytest.mark.parametrize("size", [(640, 480), (333, 500), (224, 224), (97, 61), (30, 400)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_preprocessing_equals_open_clip(size, mode):
    image = picture(size).convert(mode)
    clip_pre = open_clip.transform.PreprocessCfg(size=224)
    siglip_pre = open_clip.transform.PreprocessCfg(size=224, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash")
    for name, pre in (("ViT-B-32", clip_pre), ("ViT-B-16-SigLIP", siglip_pre)):
        theirs = open_clip.transform.image_transform_v2(pre, is_train=False)(image)
        assert torch.equal(image_transform(MODELS[name])(image), theirs)
    pre = replace(siglip_pre, interpolation="bilinear")
    theirs = open_clip.transform.image_transform_v2(pre, is_train=False)(image)
    assert torch.equal(image_transform(replace(MODELS["ViT-B-16-SigLIP"], interpolation="bilinear"))(image), theirs)


HARD = ["“Curly” ‘quotes’ &amp; &quot;html&quot;", "snake_case, and-dashes; (brackets)!", "  many \n spaces\t",
        "Ünïcödé ÉÀ", "cafe\u0301", "it's they're I'd we'll", "1234 56.7%", "🙂 emoji 中文", "", "x" * 500, "word " * 100,
        "a<b>c", "ﬁne ﬂow"]


def test_clip_tokenizer_equals_open_clip(clip_tokenizer):
    ours = M.Tokenizer(replace(MODELS["ViT-B-32"], tokenizer=clip_tokenizer[0]))
    texts = CAPTIONS + HARD
    assert torch.equal(ours(texts), clip_tokenizer[1](texts))
    trimmed = ours(CAPTIONS, trim=True)
    length = trimmed.shape[1]
    assert length < 77 and length % 8 == 0 and torch.equal(trimmed, ours(CAPTIONS)[:, :length])


def test_siglip_tokenizer_equals_open_clip(tmp_path, siglip_tokenizer):
    write_text(tmp_path, "tokenizer.json", siglip_tokenizer), write_json(tmp_path, "tokenizer_config.json", SIGLIP_PAD)
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=64, clean="canonicalize")
    ours = M.Tokenizer(replace(MODELS["ViT-B-16-SigLIP"], tokenizer=siglip_tokenizer))
    assert torch.equal(ours(CAPTIONS + HARD), theirs(CAPTIONS + HARD))
    assert ours(["a"], trim=True).shape == (1, 64)      # SigLIP attends to its padding
    assert ours([]).shape == (0, 64)


WORDS = st.sampled_from(["A dog's", "&amp;", "&quot;x&quot;", "“it”", "’s", "_", "é", "e\u0301", "ﬁ", "\t", "<b>", "5%"])


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS | st.text(st.characters(codec="ascii", exclude_categories=("Cc",), exclude_characters="&"),
                                max_size=6), max_size=8))
def test_cleaning_equals_open_clip(words):
    """Without mojibake, which ftfy repairs and clean_text does not."""
    text = " ".join(words)
    assert clean_text(text, "canonicalize") == open_clip.tokenizer.get_clean_fn("canonicalize")(text)
    assert clean_text(text, "lower") == open_clip.tokenizer.get_clean_fn("lower")(text)


@pytest.mark.parametrize("text", CAPTIONS[::10] + HARD)
def test_cleaning_of_captions(text):
    for how in ("canonicalize", "lower"):
        assert clean_text(text, how) == open_clip.tokenizer.get_clean_fn(how)(text)


def test_cleaning_of_any_sign():
    """Full-width letters, ligatures, quotation marks and what nobody sees, but for U+0080 to U+009F: mojibake."""
    codes = [*range(0x80), *range(0xA0, 0x2200), *range(0x3000, 0x3100), *range(0xE000, 0x10000)]
    for how in ("canonicalize", "lower"):
        theirs = open_clip.tokenizer.get_clean_fn(how)
        other = [hex(code) for code in codes if clean_text(f"a{chr(code)}b", how) != theirs(f"a{chr(code)}b")]
        assert other == []


def test_texts_may_come_from_a_generator(siglip_tokenizer):
    model = CLIP(replace(MODELS["nano"], tokenizer=siglip_tokenizer))
    assert torch.equal(model.tokenize(text for text in CAPTIONS[:3]), model.tokenize(CAPTIONS[:3]))


def test_tokenizer_that_does_not_belong(clip_tokenizer):
    with pytest.raises(ValueError, match="49408 tokens, the model embeds 1024"):
        CLIP(replace(MODELS["nano"], tokenizer=clip_tokenizer[0]))


# -----------------------------------------------------------------------------
# value tokens and towers

def test_siglip_value_tokens_golden():
    """The published wrapper's patch tokens, recorded in float64."""
    z = np.load(os.path.join(HERE, "fixtures", "siglip_tokens.npz"))
    config = CLIPConfig(image_size=32, patch_size=8)
    width = {k[3:]: torch.from_numpy(z[k]) for k in z.files if k.startswith("sd.")}
    for heads in (1, 2, 4, 8):      # the file does not say
        model = CLIP(replace(config, embed_dim=64, vision=(64, 2, heads, 256))).double().eval()
        model.visual.load_state_dict(width)
        with torch.no_grad():
            pooled, tokens = model.encode_image(torch.from_numpy(z["image"]).double(), return_tokens=True)
        found = [difference(pooled, torch.from_numpy(z["pooled"])),
                 difference(tokens, torch.from_numpy(z["x_spatial"]))]
        if max(found) < 1e-10:
            return
    raise AssertionError(found)


@torch.no_grad()
def test_siglip_value_token_is_the_pool_on_one_patch(siglip_tokenizer):
    model = nano(siglip_tokenizer).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    pooled, tokens = model.encode_image(images, return_tokens=True)
    assert difference(pooled, model.visual(images)) < 1e-12
    x = model.visual.forward_features(images)
    for i in range(x.shape[1]):
        assert difference(model.visual.attn_pool(x[:, i:i + 1]), tokens[:, i]) < 1e-12
    unit = model.encode_image(images, normalize=True, return_tokens=True)
    assert torch.equal(unit[0], F.normalize(pooled, dim=-1)) and torch.equal(unit[1], F.normalize(tokens, dim=-1))


@torch.no_grad()
def test_clip_value_tokens(clip_tokenizer):
    """Against the pooled output's definition: head(norm(the class token's output of the last block)), where the class
    token is replaced by patch i, attends to patch i alone, and drops residual and MLP."""
    model = small_clip(clip_tokenizer, image_size=96).double()
    vit, images = model.visual, torch.randn(2, 3, 96, 96, dtype=torch.float64)
    pooled, tokens = model.encode_image(images, return_tokens=True)
    assert tokens.shape == (2, 9, model.config.embed_dim)
    assert difference(pooled, vit(images)) < 1e-12                   # timm's own forward
    assert difference(pooled, model.encode_image(images)) < 1e-12
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for block in vit.blocks[:-1]:
        x = block(x)
    block = vit.blocks[-1]
    for i in range(1, x.shape[1]):
        alone = x[:, i:i + 1]
        p = block.attn(block.norm1(alone))      # softmax over one position is 1: the value, projected
        assert_close(tokens[:, i - 1:i], vit.head(vit.norm(p)))


def assert_close(a, b):
    assert difference(a, b) < 1e-12, difference(a, b)


@torch.no_grad()
def test_trimming_is_exact_for_clip_and_refused_for_siglip(clip_tokenizer, siglip_tokenizer):
    model = small_clip(clip_tokenizer).double()
    full, short = model.tokenize(CAPTIONS[:8]), model.tokenize(CAPTIONS[:8], trim=True)
    assert difference(model.encode_text(full), model.encode_text(short)) < 1e-12
    with pytest.raises(ValueError, match="must be padded to 16 tokens, got 8"):
        nano(siglip_tokenizer).encode_text(torch.zeros(1, 8, dtype=torch.long))


def test_words_are_all_tokens_but_padding_and_start(clip_tokenizer, siglip_tokenizer):
    """And forward's outputs of them are those of encode_text; with spans as well."""
    for model in (small_clip(clip_tokenizer).double(), nano(siglip_tokenizer).double()):
        texts = ["a red dog", "", "a dog"]
        tokens = model.tokenize(texts, trim=True)
        lengths = [len(encoding.ids) for encoding in model.tokenize.encode(texts)]
        expected = torch.zeros_like(tokens, dtype=torch.bool)
        for row, length in enumerate(lengths):
            expected[row, model.config.family == "clip":length] = True
        assert torch.equal(model.tokenize.word_mask(texts, tokens.shape[1]), expected) and expected.any(1).all()
        images, spans = inputs(model)[0][:1].double(), torch.tensor([[[1, 3]]])
        out = model(images, tokens[:1], spans=spans, negative_tokens=tokens[None, 1:], return_words=True)
        features, outputs = model.encode_text(tokens, normalize=True, return_tokens=True)
        torch.testing.assert_close(out["word_features"][0], F.normalize(outputs, dim=-1))
        torch.testing.assert_close(torch.cat([out["text_features"], out["negative_features"][0]]), features)
        torch.testing.assert_close(out["concept_features"][0], F.normalize(outputs[0, 1:3].mean(0), dim=-1))


def test_forward_and_checkpoint(tmp_path, siglip_tokenizer):
    model = nano(siglip_tokenizer, context_length=24)
    images, tokens = inputs(model)
    out = model(images, tokens, return_patches=True, concept_tokens=tokens[:3])
    assert out["image_features"].shape == (2, 96) and out["patch_tokens"].shape == (2, 16, 96)
    assert out["concept_features"].shape == (3, 96) and out["logit_bias"] is model.logit_bias
    sum(v.sum() for v in out.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    again = CLIP.load(save(tmp_path / "last.pt", model.checkpoint()))
    assert same_state(again, model) and again.config == model.config
    assert CLIP.from_pretrained(str(tmp_path / "last.pt"), "nano").config == model.config
    with pytest.raises(ValueError, match="is no ViT-B-16-SigLIP: it has embed_dim 96, not 768"):
        CLIP.from_pretrained(str(tmp_path / "last.pt"), "ViT-B-16-SigLIP")
    assert torch.equal(again.tokenize(TEXTS), model.tokenize(TEXTS))
    assert all(p.requires_grad for p in again.parameters())


def test_checkpoints_of_earlier_versions(tmp_path, siglip_tokenizer):
    """Their config names one of three kinds of patch tokens; only one is left."""
    model = nano(siglip_tokenizer)
    saved = model.checkpoint()
    saved["config"]["value_tokens"] = "A"
    assert same_state(CLIP.load(save(tmp_path / "a.pt", saved)), model)
    saved["config"]["value_tokens"] = "B"
    with pytest.raises(ValueError, match="b.pt: value_tokens is 'B', .* only do 'A'"):
        CLIP.load(save(tmp_path / "b.pt", saved))
    del saved["config"]["value_tokens"]
    saved["config"]["colour"] = "red"
    with pytest.raises(ValueError, match="c.pt: its config has colour, .* newer"):
        CLIP.load(save(tmp_path / "c.pt", saved))


def test_a_source_may_be_a_path(tmp_path, siglip_tokenizer):
    model = nano(siglip_tokenizer)
    file = tmp_path / "a.pt"
    save(file, model.checkpoint())
    export(model, "transformers", str(tmp_path / "folder"))
    for source in (file, tmp_path / "folder"):
        assert same_state(CLIP.from_pretrained(source), model)


def test_what_is_no_text(siglip_tokenizer):
    with pytest.raises(TypeError, match="None among them"):
        nano(siglip_tokenizer).tokenize(["a", None])


def test_images_of_more_than_8_bits_are_refused(siglip_tokenizer):
    """They would be white."""
    transform = nano(siglip_tokenizer).transform
    for dtype in (np.uint16, np.int32, np.float32):
        with pytest.raises(ValueError, match="8 bits"):
            transform(Image.fromarray(np.full((40, 50), 300, dtype)))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        assert transform(Image.new(mode, (50, 40))).shape == (3, 32, 32)


@torch.no_grad()
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_features_are_float32_under_autocast(family, siglip_tokenizer):
    """On a CPU too, where autocast runs the norm in bfloat16; and float64 stays float64."""
    model = nano_of(family, siglip_tokenizer)
    tokens, images = captions_with_an_end(model), torch.randn(4, 3, 32, 32)
    spans, negatives = torch.tensor([[[0, 3], [1, 2]]] * 4), torch.stack([tokens, tokens], 1)
    given = dict(spans=spans, negative_tokens=negatives, return_patches=True)
    assert {x.dtype for x in model(images.double(), tokens, negative_images=images.double(), **given).values()
            if x is not None} == {torch.float64}
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, tokens, negative_images=images, **given)
        out["concepts"] = model(images, tokens, concept_tokens=tokens)["concept_features"]
        assert model.encode_image(images).dtype == torch.bfloat16
    for key, x in out.items():
        if "logit" not in key:
            assert x.dtype == torch.float32 and difference(x.norm(dim=-1), torch.ones(1)) < 1e-6, key


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_no_decay_is_that_of_open_clip(family):
    """open_clip_train/main.py leaves these out, by its own names and shapes."""
    model = CLIP(replace(MODELS["nano"], family=family))
    theirs = {parts[0].data_ptr(): (name, parts[0]) for name, parts in
              M.named_as(model, f"open_clip {family}").items()}
    for ours, parameter in model.named_parameters():
        name, p = theirs[parameter.data_ptr()]
        excluded = p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name
        assert M.no_decay(ours, parameter) == excluded, (ours, name)


# -----------------------------------------------------------------------------
# concepts as spans of the caption, negatives

def nano_of(family, siglip_tokenizer, **kwargs):
    """A small model of either family, in float64, with a tokenizer whose last token has the highest id."""
    model = perturb(CLIP(replace(MODELS["nano"], family=family, tokenizer=siglip_tokenizer, vocab_size=600, **kwargs)))
    return model.double()


def captions_with_an_end(model):
    """Random tokens, all different in length, with the highest id at their end."""
    tokens = torch.randint(2, 500, (4, 16))
    for row, end in enumerate((15, 9, 5, 12)):
        tokens[row, end:] = 0
        tokens[row, end] = 599
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_token_features_against_a_loop(family, siglip_tokenizer):
    model = nano_of(family, siglip_tokenizer)
    tokens = captions_with_an_end(model)
    features, outputs = model.encode_text(tokens, return_tokens=True)
    assert outputs.shape == (4, 16, 96)
    row = [15] * 4 if family == "siglip" else [15, 9, 5, 12]
    assert_close(outputs[range(4), row], features)
    assert_close(features, model.encode_text(tokens))
    assert_close(model.encode_text(tokens, True, True)[0], F.normalize(features, dim=-1))
    for i in range(4):      # a row at a time, through timm's own blocks
        x = model.text.token_embedding(tokens[i:i + 1]) + model.text.pos_embed
        mask = None if family == "siglip" else torch.full((16, 16), -torch.inf, dtype=torch.float64).triu(1)
        for block in model.text.blocks:
            x = block(x, mask)
        assert_close(outputs[i:i + 1], model.text.head(model.text.norm(x)))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_spans_against_a_loop(family, siglip_tokenizer):
    model = nano_of(family, siglip_tokenizer)
    tokens, images = captions_with_an_end(model), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    spans = torch.tensor([[[0, 3], [2, 9], [4, 5]], [[1, 2], [0, 0], [0, 0]], [[0, 0]] * 3, [[3, 7], [0, 12], [0, 0]]])
    passes, encode = [], model.encode_text
    model.encode_text = lambda *args, **kwargs: passes.append(args) or encode(*args, **kwargs)
    out = model(images, tokens, spans=spans)
    assert len(passes) == 1         # captions and concepts in one
    plain = model(images, tokens)
    assert_close(out["text_features"], plain["text_features"])
    assert "concept_features" not in plain and out["concept_features"].shape == (12, 96)
    outputs = encode(tokens, return_tokens=True)[1]
    for i in range(4):
        for j in range(3):
            first, end = spans[i, j].tolist()
            found = out["concept_features"][3 * i + j]
            if end:
                expected = sum(outputs[i, k] for k in range(first, end)) / (end - first)
                assert_close(found, expected / expected.norm())
            else:
                assert found.isfinite().all()
    # gradients: those of padding are zero, not nan
    padding = (spans[..., 1] == 0).flatten()
    out["concept_features"][padding].sum().backward(retain_graph=True)
    grads = [p.grad for p in model.text.parameters() if p.grad is not None]
    assert grads and all((g == 0).all() for g in grads)
    (out["concept_features"].sin().sum() + out["text_features"].cos().sum()).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.text.blocks.parameters())


@torch.no_grad()
def test_negatives(siglip_tokenizer):
    model = nano_of("clip", siglip_tokenizer)
    tokens, images = captions_with_an_end(model), torch.randn(8, 3, 32, 32, dtype=torch.float64)
    negatives = torch.stack([tokens.flip(0), tokens.roll(1, 0)], 1)[:, :, :]         # (B, 2, L)
    out = model(images[:4], tokens, negative_tokens=negatives, negative_images=images[4:])
    assert out["negative_features"].shape == (4, 2, 96)
    for i in range(4):
        for k in range(2):
            assert_close(out["negative_features"][i, k], model.encode_text(negatives[i, k][None], True)[0])
    assert_close(out["negative_image_features"], model.encode_image(images[4:], True))
    assert not {"concept_features", "patch_tokens"} & out.keys()


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_spans_compile_without_a_break(family, siglip_tokenizer):
    model = nano_of(family, siglip_tokenizer)
    tokens, images = captions_with_an_end(model), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    spans = torch.tensor([[[0, 3], [0, 0]]] * 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images, tokens, spans=spans)
    for key, value in model(images, tokens, spans=spans).items():
        assert value is None or difference(compiled[key], value) < 1e-12, key


def test_token_positions_of_phrases(clip_tokenizer, siglip_tokenizer):
    """The tokens of a span, decoded, are the phrase; also beside a word that holds it, and for byte-level BPE."""
    from data import train_tokenizer
    text = "A woman, a red-haired MAN and the man's  dogs near an Ünïcödé 🙂 sign &amp; it"
    phrases = ["A woman", "MAN", "the man's  dogs", "Ünïcödé", "🙂 sign", "a red-haired MAN", "it", "near an"]
    own, size, _ = train_tokenizer(CAPTIONS)
    for config in (replace(MODELS["ViT-B-32"], tokenizer=clip_tokenizer[0]),
                   replace(MODELS["nano"], tokenizer=own, vocab_size=size, context_length=77),
                   replace(MODELS["ViT-B-16-SigLIP"], tokenizer=siglip_tokenizer)):
        tokenize = M.Tokenizer(config)
        ids = tokenize([text])[0].tolist()
        for phrase, (first, end) in zip(phrases, tokenize.spans(text, phrases)):
            alone = [i for e in tokenize.encode([phrase]) for i, s in zip(e.ids, e.special_tokens_mask) if not s]
            if config.name == "ViT-B-16-SigLIP":    # unigram may cut a phrase otherwise, and knows no emoji
                alone, cleaned = None, clean_text(phrase, config.text_clean)
                found = "".join(tokenize.encode([text])[0].tokens[first:end]).replace("\u2581", "")
                assert found == cleaned.replace(" ", ""), (phrase, found)
            elif alone[0] == tokenize.backend.token_to_id("Ġ"):     # a lone space is no character of the phrase
                alone = alone[1:]
            assert alone is None or ids[first:end] == alone, (config.name, phrase, first, end)
        specials = tokenize.encode([text])[0].special_tokens_mask
        whole = (specials.index(0), len(specials) - specials[::-1].index(0))
        for phrase in ("a cat", "oman", "", "!?"):      # not there, at least not as words
            assert tokenize.spans(text, [phrase]) == [whole], phrase
        assert all(0 <= first < end for first, end in tokenize.spans("", ["a cat"]))
        assert tokenize.spans(text, []) == []


def test_the_owner_of_a_thing_has_its_tokens(siglip_tokenizer):
    """canonicalize makes "mans" of "man's": the phrase "a man" was not found, and got the whole caption."""
    tokenize = M.Tokenizer(replace(MODELS["ViT-B-16-SigLIP"], tokenizer=siglip_tokenizer))
    text = "Two dogs on a man's back near a dog's bed, two mans."
    tokens = tokenize.encode([text])[0].tokens
    for phrase, words in (("a man", "amans"), ("a dog", "adogs"), ("Two dogs", "twodogs"), ("dog", "dogs")):
        [(first, end)] = tokenize.spans(text, [phrase])
        assert "".join(tokens[first:end]).replace("\u2581", "") == words


def test_phrases_behind_the_context_length(clip_tokenizer):
    tokenize = M.Tokenizer(replace(MODELS["ViT-B-32"], tokenizer=clip_tokenizer[0], context_length=6))
    text = "a red ring and a blue cross"        # start a red ring and end
    assert tokenize.spans(text, ["a red ring", "a blue cross", "ring and a", "and"]) == [(1, 4), (1, 5), (1, 5), (4, 5)]


def test_gradient_checkpointing_changes_nothing(siglip_tokenizer):
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        model = CLIP(replace(MODELS["nano"], tokenizer=siglip_tokenizer, vocab_size=600)).double().train()
        model.visual.grad_checkpointing = model.text.grad_checkpointing = on
        images, tokens = inputs(model)
        out = model(images.double(), tokens, return_patches=True, concept_tokens=tokens)
        (out["image_features"].sum() + out["patch_tokens"].sin().sum() + out["concept_features"].cos().sum()).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) and all(difference(a, b) < 1e-12 for a, b in zip(*grads))


def test_config_says_what_is_wrong():
    with pytest.raises(ValueError, match="family is 'blip', expected one of clip, siglip"):
        CLIPConfig(family="blip")
    with pytest.raises(ValueError, match="embed_dim is 64, expected 96, the width of the image tower"):
        CLIPConfig(embed_dim=64)
