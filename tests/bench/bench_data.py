"""Images a second from tar shards: our loader and webdataset's, in one run on the same files.

    pip install webdataset && python tests/bench/bench_data.py [--workers 0 1 2] [--images FOLDER]

"fast" is what train.py does: torchvision decodes JPEGs, and pixels travel as bytes, which the GPU normalises; where
there is none, --normalize lets the main process do it within the time. "exact" is --exact-decode: pillow decodes and
resizes. webdataset's usual pipeline decodes with pillow and gives normalised float32. The crop and the batch size are the same; none tokenizes. Ours reads in a global
random order (`Epochs`), webdataset in the order of the tar, without a shuffle buffer: its fastest way. Repeats
alternate; the median is shown.
"""
import argparse
import glob
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from data import CaptionFile, Collate, Epochs, Seeded, expand, normalize_images, train_transform
from model import MODELS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shards", help="tar files, with a brace pattern; default: made for the occasion")
parser.add_argument("--images", help="a folder of JPEGs to make the shards of; default: smooth noise of 256 x 256")
parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--samples", type=int, default=1024, help="of the made shards")
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--normalize", action="store_true", help="bytes are normalised on the CPU, in the main process")
parser.add_argument("--repeats", type=int, default=3)
args = parser.parse_args()
torch.set_num_threads(1)
config = MODELS["ViT-B-16-SigLIP"]
usual = transforms.Compose([
    transforms.RandomResizedCrop(config.image_size, (0.9, 1), (3 / 4, 4 / 3), Image.BICUBIC),
    transforms.ToTensor(),
    transforms.Normalize(config.mean, config.std),
])


def pictures():
    """Encoded JPEGs, args.samples of them."""
    if args.images:
        paths = sorted(glob.glob(os.path.join(args.images, "**", "*.jpg"), recursive=True))
        for i in range(args.samples):
            with open(paths[i % len(paths)], "rb") as f:
                yield f.read()
        return
    rng = np.random.default_rng(0)
    for _ in range(args.samples):
        small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize((256, 256), Image.BICUBIC).save(buffer, "JPEG", quality=95)
        yield buffer.getvalue()


def make(folder):
    """Four shards; returns their pattern."""
    tars = [tarfile.open(f"{folder}/{number:05d}.tar", "w") for number in range(4)]
    for i, picture in enumerate(pictures()):
        members = {"jpg": picture, "json": b'{"url": "http://x"}', "txt": b"a cat"}
        for ending, content in members.items():
            info = tarfile.TarInfo(f"{i:09d}.{ending}")
            info.size = len(content)
            tars[i % 4].addfile(info, io.BytesIO(content))
    for tar in tars:
        tar.close()
    return f"{folder}/{{00000..00003}}.tar"


def no_tokens(texts, trim=True):
    return torch.zeros(len(texts), 1, dtype=torch.int64)


def ours(workers, fast):
    data = CaptionFile(shards, fast_decode=fast)
    stream = Epochs(len(data), args.batch_size)
    collate = Collate(train_transform(config), no_tokens, with_concepts=False)
    return DataLoader(Seeded(data, 0), batch_sampler=stream, num_workers=workers, collate_fn=collate)


def theirs(workers):
    data = webdataset.WebDataset(expand(shards), shardshuffle=False, nodesplitter=None).decode("pilrgb")
    data = data.to_tuple("jpg;png;webp;jpeg", "txt").map_tuple(usual, str).batched(args.batch_size)
    return webdataset.WebLoader(data, num_workers=workers, batch_size=None)


def rate(loader):
    """Images a second from the first batch on (starting the workers is not counted), and a CPU second."""
    count, start, used = 0, None, sum(os.times()[:4])       # of this process and of the workers that have ended
    for batch in loader:
        images = batch["images"] if isinstance(batch, dict) else batch[0]
        if args.normalize:
            images = normalize_images(images, config)
        first = len(images) if start is None else first
        start = start or time.perf_counter()
        count += len(images)
    seconds = time.perf_counter() - start
    return (count - first) / seconds, count / (sum(os.times()[:4]) - used)


with tempfile.TemporaryDirectory() as folder:
    shards = args.shards or make(folder)
    print(f"{len(CaptionFile(shards)):,} samples, batch {args.batch_size}, median of {args.repeats} runs of each")
    print(f"{'workers':>8}{'':8}{'fast':>8}{'exact':>8}{'webdataset':>12}{'fast / webdataset':>20}")
    for workers in args.workers:
        runs = [(rate(ours(workers, True)), rate(ours(workers, False)), rate(theirs(workers)))
                for _ in range(args.repeats)]
        for unit in (0, 1):
            fast, exact, their = (statistics.median(result[unit] for result in results) for results in zip(*runs))
            name = ("img/s", "img/CPUs")[unit]
            print(f"{workers:8d}{name:>9}{fast:7.0f}{exact:8.0f}{their:12.0f}{fast / their:20.2f}", flush=True)
