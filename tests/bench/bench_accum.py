"""Peak memory and time of train.py --accum K at one global batch: the exact big batch in the memory of a small one.

    python tests/bench/bench_accum.py [--model ViT-B-32] [--batch-size 32] [--accum 1 2 4 8]

Runs train.py itself, from random weights on random images for three steps, and prints a markdown table. MiB: the peak
resident memory of the process, which holds weights, gradients and AdamW's two moments (16 bytes a parameter) besides.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NOUNS = "cat dog man woman car tree house ball boat bird".split()

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--model", default="ViT-B-32")
p.add_argument("--batch-size", type=int, default=32)
p.add_argument("--accum", type=int, nargs="+", default=[1, 2, 4, 8])
args = p.parse_args()

with tempfile.TemporaryDirectory() as folder:
    with open(os.path.join(folder, "pairs.csv"), "w") as f:
        f.write("image,caption\n")
        for i in range(args.batch_size):
            Image.effect_noise((256, 256), 80).convert("RGB").save(os.path.join(folder, f"{i}.jpg"))
            f.write(f"{i}.jpg,a {NOUNS[i % 10]} near the {NOUNS[i * 7 % 10]} and a small {NOUNS[i * 3 % 10]}\n")
    print("| --accum | peak MiB | seconds a step | loss of step 3 |\n|---|---|---|---|")
    for accum in args.accum:
        command = [sys.executable, "train.py", "--model", args.model, "--init", "scratch",
                   "--data", f"{folder}/pairs.csv", "--image-root", folder, "--batch-size", args.batch_size,
                   "--steps", 3, "--accum", accum, "--dtype", "float32", "--log-every", 1, "--workers", 0,
                   "--save-every", 10**9, "--out-dir", folder]
        # a process of its own, whose children are only this run: ru_maxrss is then that of train.py
        run = subprocess.run([sys.executable, "-c", "import resource, subprocess, sys\n"
                              "subprocess.run(sys.argv[1:], check=True, stdout=2, stderr=subprocess.DEVNULL)\n"
                              "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)",
                              *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        rows = [r for r in map(json.loads, open(os.path.join(folder, "log.jsonl"))) if "images_per_second" in r]
        print(f"| {accum} | {run.stdout.split()[-1]} | {args.batch_size / rows[-1]['images_per_second']:.1f} "
              f"| {rows[-1]['loss']:.5f} |", flush=True)
