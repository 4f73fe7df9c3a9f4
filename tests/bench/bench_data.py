"""Images a second from tar shards: our loader and webdataset's, in one run on the same files.

    pip install webdataset && python tests/bench/bench_data.py [--workers 0 1 2] [--shards 'cc3m/{00000..00003}.tar']

Both decode with pillow and apply the same training transform and the same batch size; neither tokenizes. Ours reads in
a global random order (`Epochs`), webdataset in the order of the tar, without a shuffle buffer: its fastest way. Without
--shards, four are made of smooth noise: JPEGs of 256 x 256 (img2dataset's default size). Repeats alternate; the median.
"""
import argparse
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

from data import Collate, Epochs, Seeded, expand, CaptionFile, train_transform
from model import MODELS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shards", help="tar files, with a brace pattern; default: made for the occasion")
parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--samples", type=int, default=1024, help="of the made shards")
parser.add_argument("--size", type=int, default=256, help="side of the made images")
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--repeats", type=int, default=3)
args = parser.parse_args()
torch.set_num_threads(1)
config = MODELS["ViT-B-16-SigLIP"]
transform = train_transform(config)


def make(folder):
    rng = np.random.default_rng(0)
    for number in range(4):
        with tarfile.open(f"{folder}/{number:05d}.tar", "w") as tar:
            for i in range(args.samples // 4):
                small = rng.integers(0, 256, (32, 32, 3), np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(small).resize((args.size, args.size), Image.BICUBIC).save(buffer, "JPEG", quality=95)
                members = {"jpg": buffer.getvalue(), "json": b'{"url": "http://x"}', "txt": b"a cat"}
                for ending, content in members.items():
                    info = tarfile.TarInfo(f"{number:05d}{i:04d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{folder}/{{00000..00003}}.tar"


def no_tokens(texts, trim=True):
    return torch.zeros(len(texts), 1, dtype=torch.int64)


def ours(workers):
    data = CaptionFile(shards)
    stream = Epochs(len(data), args.batch_size)
    return DataLoader(Seeded(data, 0), batch_sampler=stream, num_workers=workers,
                      collate_fn=Collate(transform, no_tokens, with_concepts=False))


def theirs(workers):
    data = webdataset.WebDataset(expand(shards), shardshuffle=False, nodesplitter=None).decode("pilrgb")
    data = data.to_tuple("jpg;png;webp;jpeg", "txt").map_tuple(transform, str).batched(args.batch_size)
    return webdataset.WebLoader(data, num_workers=workers, batch_size=None)


def rate(loader):
    """Images a second from the first batch on (starting the workers is not counted, for either), and a CPU second."""
    count, start, used = 0, None, sum(os.times()[:4])       # of this process and of the workers that have ended
    for batch in loader:
        images = batch["images"] if isinstance(batch, dict) else batch[0]
        first = len(images) if start is None else first
        start = start or time.perf_counter()
        count += len(images)
    seconds = time.perf_counter() - start
    return (count - first) / seconds, count / (sum(os.times()[:4]) - used)


with tempfile.TemporaryDirectory() as folder:
    shards = args.shards or make(folder)
    print(f"{len(CaptionFile(shards)):,} samples, batch {args.batch_size}, median of {args.repeats} pairs of runs")
    print(f"{'workers':>8}{'':8}{'ours':>8}{'webdataset':>12}{'ratio':>8}")
    for workers in args.workers:
        pairs = [(rate(ours(workers)), rate(theirs(workers))) for _ in range(args.repeats)]
        for unit in (0, 1):
            our, their = (statistics.median(result[unit] for result in results) for results in zip(*pairs))
            print(f"{workers:8d}{('img/s', 'img/CPUs')[unit]:>9}{our:7.0f}{their:12.0f}{our / their:8.2f}", flush=True)
