"""Kill training again and again, and see whether anything is lost: python tests/bench/kills.py --kills 50

Chains of short runs, each with --resume auto, end by SIGKILL: at random moments, or at a random
operation on files (in the middle of a checkpoint, before it is flushed, renamed, gets its second name,
or an old one is removed). When a chain has reached its end, its losses and weights must be those, bit
for bit, of a run that nobody killed. Prints how many kills there were of each kind and what came of
them, and ends with 1 if anything was lost, damaged, or answered by a trace.
"""
import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import torch

import test_train
from test_train import SMALL, DieAt, Forked, curve, weights

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--kills", type=int, default=50, help="how many (50)")
parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")


def one_run(folder, out, prepare=None):
    return Forked("train.py", *SMALL, "--save-every", 1, "--keep", 2, "--resume", "auto", "--out-dir", out,
                  folder=folder, prepare=prepare)


def kill_one(folder, out, rng, kind):
    """One run of a chain, killed; returns it."""
    if kind == "operation":
        process = one_run(folder, out, DieAt(rng.randint(1, 25)))
        process.wait()
        return process
    steps = len(curve(out)) if (out / "log.jsonl").exists() else 0
    process = one_run(folder, out)
    deadline = time.time() + rng.uniform(0, 3)      # also before its first step
    while process.poll() is None and time.time() < deadline:
        time.sleep(0.001)
    if rng.random() < 0.5:      # soon after a step
        while process.poll() is None and len(curve(out) if (out / "log.jsonl").exists() else []) <= steps:
            time.sleep(0.001)
    if process.poll() is None:
        process.kill()
    process.wait()
    return process


def main(args):
    rng = random.Random(args.seed)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    test_train.OUTPUTS = folder
    whole = folder / "whole"
    assert one_run(folder, whole).wait() == 0
    count = collections.Counter()
    lost = []
    while sum(count[kind] for kind in ("operation", "moment")) < args.kills:
        out = folder / f"chain {count['chains']}"
        count["chains"] += 1
        for _ in range(rng.randint(1, 8)):
            kind = rng.choice(("operation", "moment"))
            process = kill_one(folder, out, rng, kind)
            count[kind] += process.returncode == -signal.SIGKILL
            if "Traceback" in process.stderr or "damaged" in process.stdout:
                lost.append(f"{out}: {process.stderr}{process.stdout}")
        last = one_run(folder, out)
        if last.wait() != 0:
            lost.append(f"{out}: {last.stderr}")
            continue
        a, b = weights(whole), weights(out)
        same = curve(out) == curve(whole) and all(torch.equal(a[name], b[name]) for name in a)
        count["equal" if same else "different"] += 1
        if not same:
            lost.append(f"{out}: not equal to the run that nobody killed")
        print(f"{dict(count)}", flush=True)
    print("\n".join(lost) or "nothing was lost")
    return bool(lost)


if __name__ == "__main__":
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main(arguments))
