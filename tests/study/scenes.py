"""The methods side by side on drawn scenes, over seeds.

    python tests/study/scenes.py --output out/study                     all but wide and many
    python tests/study/scenes.py --parts large --arms "SigLIP, plain" C2LIP --seeds 5

Parts:
    scratch  every method and ablation from nothing on the small world: the same scenes in the same
             order, the same optimizer, the same steps
    large    the main arms from nothing on the large world, in which a bag of words tells the scenes
             of a batch apart, as it does natural captions
    crowded  the weights of XAC on the crowded world, whose captions name three of four objects
    wide     the same in images of 48 pixels
    many     fine-tuning to more and smaller objects: captions name three of six. What is tuned
             ("before") is the arm "CLIP, plain" of wide with the same seed
    tuned    fine-tuning, which should add binding and lose nothing. What is tuned ("before") is
             the arm "CLIP, plain" of scratch with the same seed: it retrieves, and does not bind
             phrases

The unit is the seed. table.md in the output folder has the mean over seeds with half of Student's
95 % interval, each seed's value, and the differences from the first arm, seed by seed, with an
exact permutation test: the share of the 2**seeds ways to exchange the two arms in some seeds whose
mean difference is at least as large. Started again, the study goes on where it was: runs that are
complete are not repeated. Give another --output for another version of the code.
"""
import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
METHODS = {     # arm: flags of train.py
    "SigLIP, plain": ["--method", "siglip"],
    "CLIP, plain": ["--method", "clip"],
    "C2LIP": [],
    "NegCLIP": ["--method", "negclip"],
    "CE-CLIP": ["--method", "ce_clip"],
    "DeGLA": ["--method", "degla"],
    "CoN-CLIP": ["--method", "con_clip"],
    "TripletCLIP": ["--method", "triplet_clip"],
    "FSC-CLIP": ["--method", "fsc_clip"],
    "CS-CLIP": ["--method", "cs_clip"],
    "CLIC": ["--method", "clic"],
}
ABLATIONS = {
    "NPC alone": ["--xac-weight", "0"],
    "XAC 0.01 alone": ["--npc-weight", "0"],
    "C2LIP, XAC 0.1": ["--xac-weight", "0.1"],
    "C2LIP, XAC 1": ["--xac-weight", "1"],
    "C2LIP, caption XAC 1": ["--caption-xac-weight", "1"],
    "C2LIP, all concepts counted": ["--concept-count", "all"],
    "C2LIP, --no-dedupe": ["--no-dedupe"],
    "C2LIP, span features": ["--concept-features", "span"],
}
SCRATCH = METHODS | ABLATIONS | {   # there is nothing yet to freeze
    "CoN-CLIP": ["--method", "con_clip", "--freeze", "none"],
    "CLIC": ["--method", "clic", "--freeze", "none"],
}
TUNED = METHODS | {     # the last two need a model before
    "C2LIP, XAC 1": ["--xac-weight", "1"],
    "TeCoA": ["--method", "tecoa"],
    "GIFT": ["--method", "gift"],
}
TUNED.pop("SigLIP, plain")      # what is tuned has a softmax
LARGE = {
    "SigLIP, plain": ["--method", "siglip"],
    "CLIP, plain": ["--method", "clip"],
    "C2LIP": [],
    "C2LIP, XAC 0.1": ["--xac-weight", "0.1"],
    "C2LIP, XAC 1": ["--xac-weight", "1"],
    "NPC alone": ["--xac-weight", "0"],
    "C2LIP, softmax": ["--loss", "clip"],
}
CROWDED = {     # with a softmax, which leaves the plateau of the first steps sooner
    "CLIP, plain": ["--method", "clip"],
    "NPC alone": ["--loss", "clip", "--xac-weight", "0"],
    "C2LIP": ["--loss", "clip"],
    "C2LIP, XAC 0.1": ["--loss", "clip", "--xac-weight", "0.1"],
    "C2LIP, XAC 0.3": ["--loss", "clip", "--xac-weight", "0.3"],
    "C2LIP, XAC 1": ["--loss", "clip", "--xac-weight", "1"],
}
WIDE = {arm: CROWDED[arm] for arm in ("CLIP, plain", "NPC alone", "C2LIP", "C2LIP, XAC 1")}
PARTS = ("scratch", "large", "crowded", "wide", "many", "tuned")
# Student's t, by the number of seeds; from 10 on as of 10, which is too wide rather than too narrow
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", default="out/study",
                    help="Folder of the runs and of table.md. Default: out/study.")
parser.add_argument("--parts", nargs="+", choices=PARTS,
                    default=["scratch", "large", "crowded", "tuned"],
                    help="Default: all but wide and many.")
parser.add_argument("--arms", nargs="+", metavar="ARM",
                    help="Only these arms of each part, by their names in the tables.")
parser.add_argument("--seeds", type=int, default=3, help="Runs an arm: seeds 0, 1, ... Default: 3.")
parser.add_argument("--steps", type=int, default=600,
                    help="Of the part scratch, in batches of 128. Default: 600.")
parser.add_argument("--large-steps", type=int, default=1200,
                    help="Of the part large, in batches of 128. Default: 1200.")
parser.add_argument("--crowded-steps", type=int, default=1200,
                    help="Of the part crowded, in batches of 128. Default: 1200.")
parser.add_argument("--wide-steps", type=int, default=1200,
                    help="Of the part wide, in batches of 128. Default: 1200.")
parser.add_argument("--many-steps", type=int, default=600,
                    help="Of the part many, in batches of 128. Default: 600.")
parser.add_argument("--tune-steps", type=int, default=900,
                    help="Of fine-tuning, in batches of 128. Default: 900.")
parser.add_argument("--tune-lr", type=float, default=1e-3, help="Of fine-tuning. Default: 1e-3.")
parser.add_argument("--device", help="As in train.py. Default: a GPU if there is one.")
parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1,
                    help="Runs at once, of one thread each. Default: the number of cores.")
parser.add_argument("--quick", action="store_true",
                    help="Four steps of everything: whether it runs.")
args = parser.parse_args()
if args.quick:
    args.steps = args.large_steps = args.crowded_steps = args.wide_steps = 4
    args.many_steps = args.tune_steps = 4

SMALL_WORLD = ["--lr", "3e-3", "--relations", "0.1"]
LARGE_WORLD = ["--world", "large", "--lr", "2e-3"]
CROWDED_WORLD = ["--world", "crowded", "--lr", "2e-3"]
WIDE_WORLD = [*CROWDED_WORLD, "--model", "nano-48", "--bench", "scenes_crowded,scenes_many"]
MANY_WORLD = ["--world", "many", "--lr", str(args.tune_lr)]
TUNING = ["--relations", "0.1", "--lr", str(args.tune_lr)]


class Run:
    """One training run: a part, an arm, a seed.

    flags are those of train.py, and start is the run whose weights this one begins with. bench is
    the benchmark whose figures count, by default the first.
    """

    def __init__(self, part, arm, seed, steps, flags, start=None, bench=None):
        self.name = f"{part} {arm}, seed {seed}"
        arm_name = "".join(letter if letter.isalnum() else "-" for letter in arm.lower())
        self.folder = os.path.join(args.output, part, f"{arm_name}-{seed}")
        self.steps = steps
        self.flags = [*flags, "--seed", str(seed), "--steps", str(steps)]
        self.start = start
        self.bench = bench

    def figures(self):
        """{subset: accuracy} at the last step, None before the run is complete."""
        path = os.path.join(self.folder, "log.jsonl")
        if not os.path.exists(path):
            return None
        with open(path, encoding="utf-8") as f:
            for line in f:
                row = json.loads(line) if line.endswith("\n") else {}
                if row.get("step") == self.steps and "eval" in row:
                    results = row["eval"][self.bench or next(iter(row["eval"]))]
                    return {name: r["accuracy"] for name, r in results.items()}
        return None

    def train(self):
        """Train in a process of its own, whose output goes to output.txt in its folder."""
        if self.figures() is not None:
            return
        os.makedirs(self.folder, exist_ok=True)
        weights = ["--model", "nano"]
        if self.start:
            weights = ["--init", os.path.join(self.start.folder, "last.pt")]
        command = [sys.executable, os.path.join(ROOT, "train.py"), "--preset", "nano", *weights,
                   *self.flags, "--save-every", "300", "--eval-every", "300", "--resume", "auto",
                   "--out-dir", self.folder]
        if args.device:
            command += ["--device", args.device]
        with open(os.path.join(self.folder, "output.txt"), "w", encoding="utf-8") as f:
            subprocess.run(command, stdout=f, stderr=subprocess.STDOUT,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
        if self.figures() is None:
            raise RuntimeError(f"{self.name} failed: see {f.name}")


def chosen(arms):
    return {arm: flags for arm, flags in arms.items() if not args.arms or arm in args.arms}


def part_runs(part, arms, steps, flags):
    """{arm: its runs, seed by seed}."""
    runs = {}
    for arm, own_flags in chosen(arms).items():
        runs[arm] = [Run(part, arm, seed, steps, [*flags, *own_flags])
                     for seed in range(args.seeds)]
    return runs


def tuned_runs(part, arms, steps, flags, before):
    """The same for fine-tuning what before holds, seed by seed, which is among the arms."""
    runs = {"before": before}
    for arm, own_flags in chosen(arms).items():
        runs[arm] = [Run(part, arm, seed, steps, [*flags, *own_flags], start)
                     for seed, start in enumerate(before)]
    return runs


def train_all(parts):
    """All runs, as many at once as --jobs says; what fine-tuning starts from before it."""
    runs = {}       # by their folders, since a run may belong to two parts
    for arms in parts.values():
        for of_arm in arms.values():
            runs.update({run.folder: run for run in of_arm})
    bar = tqdm(total=len(runs), unit="run")

    def train(run):
        run.train()
        bar.set_postfix_str(run.name)
        bar.update()

    starts = [run for run in runs.values() if run.start is None]
    tuned = [run for run in runs.values() if run.start is not None]
    with ThreadPoolExecutor(args.jobs) as pool:
        for stage in (starts, tuned):
            futures = [pool.submit(train, run) for run in stage]
            for future in futures:
                future.result()
    bar.close()


def mean_and_interval(values, sign=""):
    """Mean and half of Student's 95 % interval over seeds, in percent."""
    mean = 100 * statistics.mean(values)
    if len(values) < 2:
        return f"{mean:{sign}.1f}"
    half = T_975[min(len(values), 10)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:{sign}.1f} ± {100 * half:.1f}"


def each_seed(values, sign=""):
    return " / ".join(f"{100 * value:{sign}.1f}" for value in values)


def changes(found, before):
    """What each run changed in the one that it tuned, seed by seed."""
    rows = []
    for figures, start in zip(found, before):
        rows.append({subset: figures[subset] - start[subset] for subset in start})
    return rows


def header(subsets):
    """The first two lines of a table in markdown."""
    names = [name.replace("_", " ") for name in subsets]
    return ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]


def table(runs, write):
    """Markdown: arms in rows, subsets in columns, cells as write(values over seeds, sign)."""
    found = {arm: [run.figures() for run in of_arm] for arm, of_arm in runs.items()}
    subsets = list(next(iter(found.values()))[0])
    lines = header(subsets)
    for arm, of_arm in found.items():
        sign = ""
        if "before" in found and arm != "before":
            of_arm = changes(of_arm, found["before"])
            sign = "+"
        cells = [write([figures[subset] for figures in of_arm], sign) for subset in subsets]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def permutation_p(differences):
    """The exact p of a paired test: how often the signs of the differences could do as much."""
    observed = abs(sum(differences))
    sums = [abs(sum(sign * value for sign, value in zip(signs, differences)))
            for signs in itertools.product((1, -1), repeat=len(differences))]
    as_large = [value >= observed - 1e-12 for value in sums]
    return sum(as_large) / len(sums)


def difference_table(runs):
    """Markdown: what each arm has over the first, in points: mean, interval, p."""
    first, *others = runs
    reference = [run.figures() for run in runs[first]]
    lines = header(reference[0])
    for arm in others:
        gained = changes([run.figures() for run in runs[arm]], reference)
        cells = []
        for subset in reference[0]:
            values = [figures[subset] for figures in gained]
            cells.append(f"{mean_and_interval(values, '+')} (p {permutation_p(values):.2g})")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def commit():
    """Of this code, for the head of the tables."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                          capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


parts = {}
if "scratch" in args.parts:
    parts["scratch"] = part_runs("scratch", SCRATCH, args.steps, SMALL_WORLD)
if "large" in args.parts:
    parts["large"] = part_runs("large", LARGE, args.large_steps, LARGE_WORLD)
if "crowded" in args.parts:
    parts["crowded"] = part_runs("crowded", CROWDED, args.crowded_steps, CROWDED_WORLD)
if "wide" in args.parts:
    parts["wide"] = part_runs("wide", WIDE, args.wide_steps, WIDE_WORLD)
if "many" in args.parts:
    flags = [*WIDE_WORLD, *WIDE["CLIP, plain"]]
    before = [Run("wide", "CLIP, plain", seed, args.wide_steps, flags, bench="scenes_many")
              for seed in range(args.seeds)]
    parts["many"] = tuned_runs("many", WIDE, args.many_steps, MANY_WORLD, before)
if "tuned" in args.parts:
    flags = [*SMALL_WORLD, *SCRATCH["CLIP, plain"]]
    before = [Run("scratch", "CLIP, plain", seed, args.steps, flags) for seed in range(args.seeds)]
    parts["tuned"] = tuned_runs("tuned", TUNED, args.tune_steps, TUNING, before)
train_all(parts)

TITLES = {
    "scratch": f"From scratch, small world, {args.steps} steps of 128",
    "large": f"From scratch, large world, {args.large_steps} steps of 128",
    "crowded": f"From scratch, crowded world, {args.crowded_steps} steps of 128",
    "wide": f"From scratch, crowded world in 48 pixels, {args.wide_steps} steps of 128",
    "many": f"A plain CLIP ('before'), and what {args.many_steps} steps of 128 at a rate of "
            f"{args.tune_lr:g} in the world of many objects change in it, in points",
    "tuned": f"A plain CLIP ('before'), and what {args.tune_steps} steps of 128 at a rate of "
             f"{args.tune_lr:g} change in it, in points",
}
sections = [f"Commit {commit()}: `python tests/study/scenes.py {shlex.join(sys.argv[1:])}`"]
for part, runs in parts.items():
    sections += [f"## {TITLES[part]}", table(runs, mean_and_interval),
                 f"Each seed, 0 to {args.seeds - 1}:", table(runs, each_seed)]
    compared = [arm for arm in runs if arm != "before"]
    if len(compared) > 1 and args.seeds > 1:
        sections += [f"Differences from {compared[0]}, in points:",
                     difference_table({arm: runs[arm] for arm in compared})]
path = os.path.join(args.output, "table.md")
with open(path, "w", encoding="utf-8") as f:
    f.write("\n\n".join(sections) + "\n")
print("\n\n".join(sections))
print(f"\nwrote {path}")
