"""The methods side by side, on scenes: python tests/study/scenes.py --output out/study

Part 1 trains every method and ablation from scratch: same scenes in the same order, same optimizer, same steps. Part 2
is fine-tuning, which should add binding and must not lose what was there: single is zero-shot classification of one
object, i2t and t2i retrieval. What each method fine-tunes ("before") is a plain SigLIP, a bag of words that retrieves:
trained with batches of 32, which hold few scenes that differ in their binding alone, and then with 128 at a lower rate.
Tables give the mean over seeds with the 95 % interval of Student's t. Started again, the study goes on where it was;
runs that are complete are not repeated.
"""
import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
METHODS = {     # name: flags of train.py
    "SigLIP, plain": ["--method", "siglip"],
    "C2LIP": [],
    "CLIP, plain": ["--method", "clip"],
    "NegCLIP": ["--method", "negclip"],
    "CE-CLIP": ["--method", "ce_clip"],
    "DeGLA": ["--method", "degla"],
    "CoN-CLIP": ["--method", "con_clip"],
    "TripletCLIP": ["--method", "triplet_clip"],
}
SCRATCH = METHODS | {
    "CoN-CLIP": ["--method", "con_clip", "--freeze", "none"],      # there is nothing yet to freeze
    "NPC alone": ["--xac-weight", "0"],
    "XAC 0.01 alone": ["--npc-weight", "0"],
    "C2LIP, XAC 0.1": ["--xac-weight", "0.1"],
    "C2LIP, XAC 1": ["--xac-weight", "1"],
    "C2LIP, --no-dedupe": ["--no-dedupe"],
    "C2LIP, span features": ["--concept-features", "span"],
}
T_975 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}     # by the number of seeds

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", default="out/study", help="folder of the runs and of table.md (out/study)")
parser.add_argument("--seeds", type=int, default=3, help="runs an arm, with seeds 0, 1, ... (3)")
parser.add_argument("--steps", type=int, default=600, help="from scratch (600)")
parser.add_argument("--base-steps", type=int, default=2400, help="of \"before\", with batches of 32, then 128 (2400)")
parser.add_argument("--tune-steps", type=int, default=1800, help="of fine-tuning (1800)")
parser.add_argument("--tune-lr", type=float, default=1e-3, help="of fine-tuning, and of batches of 128 before (1e-3)")
parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once, a thread each (cores)")
args = parser.parse_args()
SHARED = ["--preset", "nano", "--lr", "3e-3", "--relations", "0.1", "--save-every", "150", "--eval-every", "150",
          "--resume", "auto"]
PARTS = {   # arms, steps, the part with the weights they start from
    "scratch": (SCRATCH, args.steps, None),
    "base": ({"before": ["--method", "siglip", "--batch-size", "32", "--lr", "2e-3"]}, args.base_steps, None),
    "settled": ({"before": ["--method", "siglip"]}, args.base_steps, "base"),
    "tuned": (METHODS, args.tune_steps, "settled")}


def folder(part, arm, seed):
    name = "".join(c if c.isalnum() else "-" for c in arm.lower())
    return os.path.join(args.output, part, f"{name}-{seed}")


def figures(part, arm, seed):
    """{subset: accuracy} at the last step of a run; None before."""
    path = os.path.join(folder(part, arm, seed), "log.jsonl")
    for line in open(path) if os.path.exists(path) else ():
        row = json.loads(line) if line.endswith("\n") else {}
        if "eval" in row and row["step"] == PARTS[part][1]:
            return {name: r["accuracy"] for name, r in row["eval"]["scenes"].items()}


def train(part, arm, seed):
    """One run in a process of its own; what it says goes to output.txt in its folder."""
    out = folder(part, arm, seed)
    if figures(part, arm, seed) is None:
        os.makedirs(out, exist_ok=True)
        arms, steps, start = PARTS[part]
        flags = ["--model", "nano"] if start is None else [
            "--init", os.path.join(folder(start, "before", seed), "last.pt"), "--lr", str(args.tune_lr)]
        command = [sys.executable, os.path.join(ROOT, "train.py"), *SHARED, *flags, *arms[arm],
                   "--steps", str(steps), "--seed", str(seed), "--out-dir", out]
        with open(os.path.join(out, "output.txt"), "w") as f:
            subprocess.run(command, stdout=f, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if figures(part, arm, seed) is None:
            raise SystemExit(f"{part} {arm}, seed {seed} failed: see {f.name}")
    return f"{part} {arm}, seed {seed}"


def cell(values, sign=""):
    """Mean and half width of the 95 % interval, in percent; of one or two seeds each value."""
    n, mean = len(values), sum(values) / len(values)
    if n < 3:
        return " / ".join(f"{100 * x:{sign}.1f}" for x in values)
    deviation = (sum((x - mean) ** 2 for x in values) / (n - 1)) ** 0.5
    return f"{100 * mean:{sign}.1f} ± {100 * T_975.get(n, 1.96) * deviation / n ** 0.5:.1f}"


def table(rows, before=None):
    """Markdown of {row: (part, arm)}, the mean over the seeds that are complete; with before, a row, what changed from
    it on, seed by seed."""
    found = {row: [r for seed in range(args.seeds) if (r := figures(*run, seed))] for row, run in rows.items()}
    start = found.get(before)
    changed = {row: [{name: x - old[name] for name, x in run.items()} for run, old in zip(runs, start)]
               for row, runs in found.items() if start and row != before}
    subsets = list(next(runs[0] for runs in found.values() if runs))
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in subsets) + " |", "|---" * (len(subsets) + 1) + "|"]
    return "\n".join(lines + [f"| {row} | " + " | ".join(cell([run[name] for run in runs], "+" * (row in changed))
                                                         for name in subsets) + " |"
                              for row, runs in (found | changed).items() if runs])


runs = args.seeds * sum(len(arms) for arms, *_ in PARTS.values())
with tqdm(total=runs, unit="run") as bar, ThreadPoolExecutor(args.jobs) as pool:
    for seed, (part, (arms, *_)) in itertools.product(range(args.seeds), PARTS.items()):     # seed by seed
        for run in as_completed([pool.submit(train, part, arm, seed) for arm in arms]):
            bar.set_postfix_str(run.result())
            bar.update()

tuned = f"and what {args.tune_steps} steps at lr {args.tune_lr:g} change, in points"
text = f"""From scratch, {args.steps} steps:

{table({arm: ("scratch", arm) for arm in SCRATCH})}

A plain SigLIP ("before", {args.base_steps} steps of 32 and of 128), {tuned}:

{table({"before": ("settled", "before"), **{arm: ("tuned", arm) for arm in METHODS}}, "before")}

Mean over {args.seeds} seeds ± half of the 95 % interval, in percent; of one or two seeds each value.
"""
with open(os.path.join(args.output, "table.md"), "w") as f:
    f.write(text)
print(f"{text}\nwrote {f.name}")
