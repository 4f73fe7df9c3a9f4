"""Everything that only a GPU can show, in one run of a few minutes on one card, without a network.

    python tests/bench/gpu.py --output out/gpu             all parts, on the GPU
    python tests/bench/gpu.py --smoke --output out/smoke   every part, small, on a CPU, in a minute

The parts, of which --parts chooses some:

    parity   towers, losses and gradients against float64 on the CPU, in float32 without TF32 and in
             bfloat16; concept_similarity against its definition, eager and compiled
    compile  how often train.py --compile compiles while the number of concepts varies; graph breaks
    train    train.py itself: the nano run from start to end, its host syncs, a kill and a resume
    step     a training step, plain and with concepts, eager and compiled, at two batch sizes: how
             long each part of it takes, images a second, MFU, memory, host syncs; open_clip's own
             step on the same shapes, where open_clip is installed

What is measured is printed at once, and written to gpu.json and gpu.md in --output after every row,
so that a run which is cut off leaves what it had. A part that fails is reported, and the others go
on. What does not fit into the card's memory, or into --minutes, is left out, and its row says so.
On one H200 and 16 cores parity took 57 s, compile 55, train 117; all steps of one model without
torch.compile took 45, and torch.compile 84 to start one kind of step of ViT-B-16-SigLIP.

Weights, pixels and captions are random: speed and parity depend on shapes, not on what is learnt.
"""
import argparse
import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import Collate, normalize_images, train_tokenizer  # noqa: E402
from losses import clip_loss, npc_loss, plan_batch, siglip_loss, xac_loss  # noqa: E402
from model import CLIP, MODELS  # noqa: E402
from pooling import concept_pool, concept_similarity  # noqa: E402

# dense bfloat16 products, TFLOP/s, from the data sheets
PEAKS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "4090": 165}

# the largest relative errors that parity allows, ||found - expected|| / ||expected||
BOUNDS = {
    torch.float32: {"features": 1e-4, "losses": 1e-4, "gradient": 1e-4},
    # 8 bits of mantissa through 12 blocks, and through them again on the way back
    torch.bfloat16: {"features": 3e-2, "losses": 1e-2, "gradient": 1e-1},
}

LOSS_WEIGHTS = {"contrastive": 1.0, "npc": 1.0, "xac": 0.01}  # C2LIP's
COMPILED = ", compiled"
STEP_PARTS = ("to device", "plan", "both towers", "image tower", "captions", "concepts", "losses",
              "backward", "optimizer")

# columns of the tables; what else a row holds is in gpu.json, or stands below its table
COLUMNS = {
    "parity": ("what", "on", "features", "losses", "gradient", "worst parameter", "its name",
               "bounds", "ok"),
    "compile": ("run", "exit", "graphs after each step", "after step 3", "breaks", "seconds"),
    "train": ("run", "seconds", "exit", "step", "loss", "images/s", "killed at", "saved at",
              "compared steps", "largest difference", "whole log", "syncs"),
    "step": ("model", "batch", "step", "images/s", "MFU %", "step ms", *STEP_PARTS, "peak GiB",
             "syncs", "TFLOP", "first step s", "note"),
}


# ---- captions and batches --------------------------------------------------
ADJECTIVES = """white black red small large young old wooden green brown blue tall yellow empty wet
    bright long round broken striped dirty quiet plastic golden narrow fresh dusty heavy""".split()
NOUNS = """man woman dog table street tree beach car horse plate field boy girl cat bench bus train
    kitchen wall window bike snow water sign umbrella pizza elephant bear couch bottle fence clock
    boat bridge road building child bird sheep phone laptop lamp towel rock river mirror""".split()
LINKS = ["sits on", "stands near", "looks at", "is next to", "in front of", "behind", "with", "and"]
# one caption in sixteen is long without more concepts, as captions from the web are
TAIL = "as it was seen from far away just before it got dark and then again a little later"


def make_row(rng, image):
    """A row as the data sets give it, with 2 to 4 concepts; 3, the mean, is what captions hold.

    Of the concepts of 256 captions four in five are different ones, as in captions of COCO.
    """
    concepts = []
    for _ in range(rng.choice([2, 3, 3, 4])):
        noun = rng.choice(NOUNS)
        adjective = rng.choice(ADJECTIVES)
        concepts.append(f"a {adjective} {noun}" if rng.random() < 0.85 else f"the {noun}")
    caption = concepts[0]
    for concept in concepts[1:]:
        caption = f"{caption} {rng.choice(LINKS)} {concept}"
    if rng.random() < 1 / 16:
        caption = f"{caption} {TAIL}"
    seed = rng.getrandbits(31)
    return {"image": image, "caption": caption, "concepts": concepts, "key": caption, "seed": seed}


def random_image(size):
    """What stands for a photograph that was decoded and cropped: (3, S, S) uint8."""
    return torch.randint(256, (3, size, size), dtype=torch.uint8)


def make_model(config, seed):
    """A model with random weights, and a tokenizer trained on such captions: none is downloaded."""
    rng = random.Random(seed)
    captions = [make_row(rng, None)["caption"] for _ in range(2000)]
    text, _, _ = train_tokenizer(captions, min(config.vocab_size, 4096))
    torch.manual_seed(seed)
    return CLIP(replace(config, tokenizer=text)).train()


def make_batch(model, rng, batch_size):
    """A batch as train.py's loader gives it, its texts padded or trimmed as the family wants."""
    collate = Collate(random_image, model.tokenize)
    rows = [make_row(rng, model.config.image_size) for _ in range(batch_size)]
    return collate(rows)


def plan_concepts(batch, model, device):
    """Which concepts to encode, and which images hold them, made on the CPU; see losses.plan_batch.

    The number of concepts is filled up to a multiple of 64, as train.py does to compile.
    """
    plan = plan_batch(len(batch["tokens"]), batch["concept_ids"], batch["pairs"],
                      batch["concept_tokens"], pad_id=model.config.pad_id, multiple=64)
    return plan.to(device)


def loss_terms(out, plan):
    """{term: scalar}: CLIP's loss, or SigLIP's where there is a bias; with a plan C2LIP's, too.

    out: what CLIP.forward returns.
    """
    images, scale, bias = out["image_features"], out["logit_scale"], out["logit_bias"]
    if bias is None:
        terms = {"contrastive": clip_loss(images, out["text_features"], scale)}
    else:
        terms = {"contrastive": siglip_loss(images, out["text_features"], scale, bias)}
    if plan is not None:
        concepts = out["concept_features"].index_select(0, plan.given)  # (N, D)
        similarity = concept_similarity(out["patch_tokens"], concepts)
        terms["npc"] = npc_loss(images, concepts, plan.labels, scale, bias)
        terms["xac"] = xac_loss(similarity, plan.labels, scale, bias)
    return terms


def weighted_sum(terms):
    return sum(LOSS_WEIGHTS[name] * term for name, term in terms.items())


# ---- the report ------------------------------------------------------------
class Report:
    """Rows of measurements by part; each is printed and written as soon as it is there."""

    def __init__(self, args):
        self.directory = Path(args.output)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        self.deadline = self.began + 60 * args.minutes
        self.data = {"about": about(args), "seconds": {}, "errors": {}}
        self.say(in_words(self.data["about"]))

    def say(self, line):
        print(f"[{time.monotonic() - self.began:5.0f} s] {line}", flush=True)

    def add(self, part, row):
        self.data.setdefault(part, []).append(row)
        shown = {name: row[name] for name in COLUMNS[part] if name in row}
        self.say(f"{part}: {in_words(shown)}")
        self.write()

    def out_of_time(self):
        return time.monotonic() > self.deadline

    def write(self):
        """Both files, whole at any moment: they are written under another name first."""
        texts = {"gpu.json": json.dumps(self.data, indent=1), "gpu.md": markdown(self.data)}
        for name, text in texts.items():
            temporary = self.directory / f"{name}.tmp"
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.directory / name)


def about(args):
    """What the numbers belong to: card, versions, commit, arguments."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    card = "none"
    if args.device == "cuda":
        card = torch.cuda.get_device_name()
    commit = args.commit or git.stdout.strip() or "unknown"
    return {"card": card, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__,
            "commit": commit, "seed": args.seed, "smoke": args.smoke}


def cell(value):
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def in_words(row):
    return ", ".join(f"{name} {cell(value)}" for name, value in row.items())


def table(names, rows):
    """Markdown of rows, which are dicts, with some of their keys as columns."""
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [cell(row.get(name)) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(data):
    """The whole report as one text."""
    sections = ["# " + in_words(data["about"])]
    for part in PARTS:
        rows = data.get(part, [])
        if rows:
            present = set().union(*rows)
            names = [name for name in COLUMNS[part] if name in present]
            sections.append(f"## {part}, {cell(data['seconds'].get(part))} s")
            sections.append(table(names, rows))
        if part == "step":
            sections += step_summary(rows)
        for row in rows:
            if row.get("where"):
                sections.append(f"Host syncs of {row['run']}: {row['where']}")
            if row.get("output"):
                sections.append(f"{row['run']}:\n\n```\n{row['output']}\n```")
        if part in data["errors"]:
            sections.append(f"{part} FAILED\n\n```\n{data['errors'][part]}\n```")
    return "\n\n".join(sections) + "\n"


# ---- parity ----------------------------------------------------------------
def set_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def precision(dtype):
    return str(dtype).removeprefix("torch.")


def distance(found, expected):
    """||found - expected|| / ||expected||; nan where anything is not finite."""
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def largest_distance(found, expected):
    """The largest of the distances of equal keys."""
    return max(distance(found[name], x) for name, x in expected.items())


def within(errors, bounds):
    """Whether each error is at most its bound, which nan is not."""
    return all(error <= bounds[name] for name, error in errors.items())


def forward_and_backward(model, batch, device, dtype):
    """Outputs, losses and gradients of a batch: three dicts of tensors, in float64 on the CPU.

    dtype: float64, float32, or bfloat16, which is autocast over float32 weights.
    """
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    model.to(device, weights_dtype)
    model.zero_grad()
    plan = plan_concepts(batch, model, device)
    images = normalize_images(batch["images"].to(device), model.config).to(weights_dtype)
    context = nullcontext()
    if dtype == torch.bfloat16:
        context = torch.autocast(device, torch.bfloat16)
    with context:
        out = model(images, batch["tokens"].to(device), return_patches=True,
                    concept_tokens=plan.tokens)
    losses = loss_terms(out, plan)
    weighted_sum(losses).backward()

    outputs = {}
    for name in ("image_features", "text_features", "concept_features", "patch_tokens"):
        outputs[name] = out[name].detach().double().cpu()
    losses = {name: term.detach().double().cpu() for name, term in losses.items()}
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters()}
    return outputs, losses, gradients


def compare_gradients(found, expected):
    """The relative error of the whole gradient, that of the worst parameter, and its name.

    A parameter with less than a thousandth of the gradient's norm cannot be the worst: the gradient
    of the attention's key bias, for one, is zero but for rounding, whatever the precision.
    """
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    differences = [(found[name] - g).norm() for name, g in expected.items()]
    errors = {}
    for name, gradient in expected.items():
        if gradient.norm() > norm / 1000:
            errors[name] = distance(found[name], gradient)
    worst = max(errors, key=errors.get)
    return (torch.stack(differences).norm() / norm).item(), errors[worst], worst


def parity_of_model(report, args, name, config):
    """A row for each device and precision, all of the same weights and batch."""
    model = make_model(config, args.seed)
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    batch = make_batch(model, random.Random(args.seed), args.parity_batch)
    outputs, losses, gradients = forward_and_backward(model, batch, "cpu", torch.float64)
    runs = [("cpu", torch.float32), (args.device, torch.float32), (args.device, torch.bfloat16)]
    for device, dtype in dict.fromkeys(runs):
        model.float().load_state_dict(weights)
        found = forward_and_backward(model, batch, device, dtype)
        gradient, worst, where = compare_gradients(found[2], gradients)
        errors = {"features": largest_distance(found[0], outputs),
                  "losses": largest_distance(found[1], losses), "gradient": gradient}
        bounds = BOUNDS[dtype]
        report.add("parity", {
            "what": name, "on": f"{device} {precision(dtype)}", **errors, "worst parameter": worst,
            "its name": where, "bounds": in_words(bounds), "ok": within(errors, bounds)})


def defined_similarity(tokens, concepts):
    """concept_similarity by its definition, with pooled vectors, for autograd to differentiate."""
    pooled = F.normalize(concept_pool(tokens, concepts), dim=-1)  # (B, N, D)
    return (pooled * concepts).sum(-1)


def in_little_memory(tokens, concepts):
    """concept_similarity with chunks of images and of concepts, and what is not kept recomputed."""
    return concept_similarity(tokens, concepts, memory_budget=2**20)


def values_and_gradients(function, tokens, concepts, weight):
    """What function(tokens, concepts) gives, and the gradients of its weighted sum."""
    tokens = tokens.detach().requires_grad_()
    concepts = concepts.detach().requires_grad_()
    similarity = function(tokens, concepts)
    (similarity * weight).sum().backward()
    found = {"values": similarity.detach(), "tokens": tokens.grad, "concepts": concepts.grad}
    return {name: x.double().cpu() for name, x in found.items()}


def parity_of_similarity(report, args):
    """concept_similarity and its own backward against autograd on the definition, in float64."""
    images, patches, concepts, width = args.similarity_shape
    torch.manual_seed(args.seed)
    v = F.normalize(torch.randn(images, patches, width), dim=-1)
    q = F.normalize(torch.randn(concepts, width), dim=-1)
    weight = torch.randn(images, concepts)
    expected = values_and_gradients(defined_similarity, v.double(), q.double(), weight.double())
    # the backend "eager" would not reach the custom operator's backward
    backend = "aot_eager" if args.smoke else args.backend
    functions = {"eager": concept_similarity, "in little memory": in_little_memory,
                 "compiled": torch.compile(concept_similarity, backend=backend)}
    for kind, function in functions.items():
        for dtype in (torch.float32, torch.bfloat16):
            inputs = v.to(args.device, dtype), q.to(args.device, dtype)
            found = values_and_gradients(function, *inputs, weight.to(args.device))
            errors = {"features": distance(found["values"], expected["values"]),
                      "gradient": largest_distance(found, expected)}
            bounds = BOUNDS[dtype]
            report.add("parity", {
                "what": f"concept_similarity, {kind}", "on": f"{args.device} {precision(dtype)}",
                **errors, "bounds": in_words(bounds), "ok": within(errors, bounds)})


def measure_parity(report, args):
    """concept_similarity alone, then whole models."""
    set_tf32(False)
    parity_of_similarity(report, args)
    for name, config in args.parity_models.items():
        parity_of_model(report, args, name, config)
    outside = [row for row in report.data["parity"] if not row["ok"]]
    if outside:
        raise ValueError(f"{len(outside)} rows are not within their bounds")


# ---- train.py in processes of its own --------------------------------------
def read_log(directory):
    """{step: row} of a run's log.jsonl, without a last line that is still being written."""
    path = directory / "log.jsonl"
    rows = {}
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            row = json.loads(line) if line.endswith("\n") else {}
            if "step" in row and "loss" in row:
                rows[row["step"]] = row
    return rows


def run_train(args, directory, flags, program=("train.py",), kill_after=None):
    """train.py in a process of its own -> (exit status, seconds, its stdout, its stderr).

    What an earlier call left in the directory goes, unless the flags say to resume from it.
    kill_after: end it by SIGKILL as soon as its log shows this step. program: what stands in place
    of train.py on the command line.
    """
    if "--resume" not in flags:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    where = ["--out-dir", str(directory), "--device", args.device]
    command = [sys.executable, *program, *where, *flags]
    environment = {**os.environ, "COMPILE_BACKEND": args.backend}
    paths = directory / "output.txt", directory / "errors.txt"
    began = time.monotonic()
    with open(paths[0], "w") as stdout, open(paths[1], "w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr)
        while process.poll() is None:
            time.sleep(0.05)
            is_late = time.monotonic() - began > args.train_timeout
            is_there = kill_after is not None and max(read_log(directory), default=0) >= kill_after
            if is_late or is_there:
                process.kill()
                process.wait()
    seconds = time.monotonic() - began
    output, errors = (path.read_text().strip() for path in paths)
    return process.returncode, seconds, output, errors


# train.py that says after each step how many graphs were compiled until then, and what broke them
COUNT_GRAPHS = """
import functools, json, os, runpy, sys, torch
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_post_hook

def report(*_):
    row = {"graphs": counters["stats"]["unique_graphs"], "breaks": counters["graph_break"]}
    print("GRAPHS", json.dumps(row), file=sys.stderr, flush=True)

register_optimizer_step_post_hook(report)
torch.compile = functools.partial(torch.compile, backend=os.environ["COMPILE_BACKEND"])
sys.path[0], sys.argv[0] = ".", "train.py"
runpy.run_path("train.py", run_name="__main__")
"""

# train.py under the debug mode in which each host sync becomes a line on stderr
COUNT_SYNCS = """
import runpy, sys, torch
torch.cuda.set_sync_debug_mode("warn")
sys.path[0], sys.argv[0] = ".", "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def write_pairs(directory, rng, count):
    """A table of noise pictures, and of captions with varied numbers of concepts -> its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "pairs.jsonl"
    with open(path, "w") as file:
        for number in range(count):
            name = f"{number}.png"
            pixels = rng.randbytes(3 * 64 * 64)
            Image.frombytes("RGB", (64, 64), pixels).save(directory / name)
            row = make_row(rng, name)
            wanted = {key: row[key] for key in ("image", "caption", "concepts")}
            file.write(json.dumps(wanted) + "\n")
    return path


def count_compilations(report, args):
    """train.py --compile for eight steps, whose batches differ in concepts and by a row in size.

    What it compiles after the third step, a user waits for in the middle of a run.
    """
    size = args.compile_batch
    count = 4 * size - 2  # two of the four batches of an epoch are one row shorter
    pairs = write_pairs(report.directory / "pairs", random.Random(args.seed), count)
    for name in args.compile_models:
        flags = ["--model", name, "--init", "scratch", "--compile", "--steps", "8", "--lr", "1e-4",
                 "--batch-size", str(size), "--data", str(pairs), "--image-root", str(pairs.parent),
                 "--workers", "0", "--eval-every", "0"]
        directory = report.directory / f"compile-{name}"
        code, seconds, output, errors = run_train(args, directory, flags, ("-c", COUNT_GRAPHS))
        counts = [json.loads(found) for found in re.findall("GRAPHS (.*)", errors)]
        graphs = [count["graphs"] for count in counts]
        row = {"run": f"{name} --compile", "exit": code, "seconds": seconds,
               "graphs after each step": str(graphs)}
        if counts:
            breaks = counts[-1]["breaks"]
            row["after step 3"] = graphs[-1] - graphs[:3][-1]
            row["breaks"] = sum(breaks.values())
            row["output"] = "\n".join(breaks)
        if code != 0:
            row["output"] = errors[-3000:]
        report.add("compile", row)
    raise_for_exits(report, "compile")


def nano_run(report, args):
    """The default command from start to end, with the table that it prints."""
    directory = report.directory / "nano"
    code, seconds, output, errors = run_train(args, directory, args.train_flags)
    row = {"run": "nano", "seconds": seconds, "exit": code, "output": output}
    log = read_log(directory)
    if log:
        last = log[max(log)]
        row |= {"step": last["step"], "loss": last["loss"], "images/s": last["images_per_second"]}
    if code != 0:
        row["output"] = errors[-3000:]
    report.add("train", row)


def killed_run(report, args):
    """SIGKILL in the middle, then --resume auto; steps that both runs made should lose the same."""
    directory = report.directory / "killed"
    flags = [*args.train_flags, "--no-compile", "--log-every", "1", "--save-every",
             str(args.save_every)]
    run_train(args, directory, flags, kill_after=args.kill_after)
    before = read_log(directory)
    reached = max(before, default=0)
    saved = reached // args.save_every * args.save_every
    code, seconds, output, errors = run_train(args, directory, [*flags, "--resume", "auto"])
    after = read_log(directory)
    differences = []
    for step in range(saved + 1, reached + 1):
        if step in after:
            expected = before[step]["loss"]
            differences.append(abs(after[step]["loss"] - expected) / abs(expected))
    row = {"run": "killed and resumed", "seconds": seconds, "exit": code, "killed at": reached,
           "saved at": saved, "step": max(after, default=0), "compared steps": len(differences),
           "largest difference": max(differences, default=None),
           "whole log": list(after) == list(range(1, args.train_steps + 1))}
    if code != 0:
        row["output"] = errors[-3000:]
    report.add("train", row)


def train_syncs(report, args):
    """Host syncs of one step of train.py: a longer run's minus a shorter one's."""
    counts = []
    for steps in (20, 40):
        flags = [*args.train_flags, "--no-compile", "--steps", str(steps)]
        directory = report.directory / f"syncs-{steps}"
        *_, errors = run_train(args, directory, flags, ("-W", "always", "-c", COUNT_SYNCS))
        counts.append(Counter(re.findall(r"([\w.-]+:\d+): UserWarning: called a sync", errors)))
    more = counts[1] - counts[0]
    places = [f"{place} {count / 20:g}" for place, count in more.most_common()]
    report.add("train", {"run": "a step of train.py, log lines included",
                         "syncs": more.total() / 20, "where": ", ".join(places)})


def run_training(report, args):
    """The nano run, its host syncs, and a run that is killed."""
    nano_run(report, args)
    killed_run(report, args)
    if args.device == "cuda":
        train_syncs(report, args)
    raise_for_exits(report, "train")


def raise_for_exits(report, part):
    failed = [row["run"] for row in report.data[part] if row.get("exit")]
    if failed:
        raise ValueError(f"{', '.join(failed)}: train.py ended with an error")


# ---- a step, part by part --------------------------------------------------
class Watch:
    """When the parts of a step end: by events in the GPU's own queue, or by the clock on a CPU."""

    def __init__(self, device):
        self.on_gpu = device == "cuda"
        self.marks = []

    def start(self):
        self.marks = []
        self.lap("start")

    def lap(self, part):
        if self.on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append((part, mark))


def durations(marks):
    """{part: milliseconds} of a step that is over."""
    times = {}
    for (_, before), (part, after) in zip(marks, marks[1:]):
        if isinstance(after, float):
            times[part] = 1000 * (after - before)
        else:
            times[part] = before.elapsed_time(after)
    return times


class Step:
    """A step of ours: what CLIP.forward and train.py do, with a mark after each part.

    Plain, it compares images with captions; with_concepts, it is C2LIP's. The towers run under
    autocast to bfloat16. backend: torch.compile's, None for no compilation.
    """

    def __init__(self, model, device, with_concepts, backend):
        self.model, self.device, self.with_concepts = model, device, with_concepts
        self.encode_image, self.encode_text = model.encode_image, model.encode_text
        self.is_compiled = backend is not None
        if self.is_compiled:
            self.encode_image = torch.compile(model.encode_image, backend=backend)
            self.encode_text = torch.compile(model.encode_text, backend=backend, dynamic=True)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1,
            fused=device == "cuda")
        self.watch = Watch(device)

    def forward(self, images, tokens, concept_tokens):
        """The dict of CLIP.forward, one tower after the other."""
        model = self.model
        out = {"logit_scale": model.logit_scale.exp(), "logit_bias": model.logit_bias}
        if self.with_concepts:
            features, patch_tokens = self.encode_image(images, True, True)
            out["image_features"], out["patch_tokens"] = features, patch_tokens
        else:
            out["image_features"] = self.encode_image(images, True)
        self.watch.lap("image tower")
        out["text_features"] = self.encode_text(tokens, True)
        self.watch.lap("captions")
        if self.with_concepts:
            out["concept_features"] = self.encode_text(concept_tokens, True)
            self.watch.lap("concepts")
        return out

    def __call__(self, batch):
        self.watch.start()
        images = batch["images"].to(self.device, non_blocking=True)
        tokens = batch["tokens"].to(self.device, non_blocking=True)
        images = normalize_images(images, self.model.config)
        self.watch.lap("to device")
        plan, concept_tokens = None, None
        if self.with_concepts:
            plan = plan_concepts(batch, self.model, self.device)
            concept_tokens = plan.tokens
            self.watch.lap("plan")
        if self.is_compiled:  # once for all batch sizes
            torch._dynamo.maybe_mark_dynamic(images, 0)
        with torch.autocast(self.device, torch.bfloat16):
            out = self.forward(images, tokens, concept_tokens)
        loss = weighted_sum(loss_terms(out, plan))
        self.watch.lap("losses")
        loss.backward()
        self.watch.lap("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.watch.lap("optimizer")


class OpenClipStep:
    """open_clip's step as its training loop makes it: its model, its loss, AdamW as it sets it."""

    def __init__(self, name, config, device):
        import open_clip
        from open_clip.loss import ClipLoss, SigLipLoss

        self.device, self.config = device, config
        if name in open_clip.list_models():
            self.model = open_clip.create_model(name, device=device)
        else:
            self.model = small_open_clip(open_clip, config)
        self.model.train()
        self.model.output_dict = True
        self.loss = ClipLoss() if config.logit_bias is None else SigLipLoss()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
        self.watch = Watch(device)

    def __call__(self, batch):
        self.watch.start()
        images = batch["images"].to(self.device, non_blocking=True)  # it would send float32
        tokens = batch["tokens"].to(self.device, non_blocking=True)
        images = normalize_images(images, self.config)
        length = self.config.context_length
        tokens = F.pad(tokens, (0, length - tokens.shape[1]))  # it always pads
        self.watch.lap("to device")
        with torch.autocast(self.device, torch.bfloat16):
            out = self.model(images, tokens)
            self.watch.lap("both towers")
            losses = self.loss(**out, output_dict=True)
        self.watch.lap("losses")
        sum(losses.values()).backward()
        self.watch.lap("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.watch.lap("optimizer")


def small_open_clip(open_clip, config):
    """open_clip's model in the sizes of a config that it has no name for."""
    width, layers, heads, _ = config.vision
    vision = {"image_size": config.image_size, "patch_size": config.patch_size, "width": width,
              "layers": layers, "head_width": width // heads}
    width, layers, heads, _ = config.text
    text = {"context_length": config.context_length, "vocab_size": config.vocab_size,
            "width": width, "layers": layers, "heads": heads}
    return open_clip.CLIP(config.embed_dim, vision, text, init_logit_bias=config.logit_bias)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def time_steps(step, batches, device, repeats):
    """Seconds of the first step, mean milliseconds of a step, and the median of each part's."""
    began = time.perf_counter()
    step(batches[0])
    synchronize(device)
    times = {"first step s": time.perf_counter() - began}
    for batch in batches:
        step(batch)
    synchronize(device)

    marks = []
    began = time.perf_counter()
    for number in range(repeats):
        step(batches[number % len(batches)])
        marks.append(step.watch.marks)
    synchronize(device)
    times["step ms"] = 1000 * (time.perf_counter() - began) / repeats
    laps = [durations(some) for some in marks]
    for part in laps[0]:
        values = sorted(lap[part] for lap in laps)
        times[part] = values[repeats // 2]
    return times


def count_syncs(step, batch):
    """How often a step waits for the GPU, and in which lines."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter()
    for warning in caught:
        if "called a sync" in str(warning.message):
            places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
    return places.total(), ", ".join(f"{place} {n}" for place, n in places.most_common())


def count_operations(step, batch):
    """TFLOP of a step's matrix products, attention and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step(batch)
    return counter.get_total_flops() / 1e12


def peak_of_card():
    """TFLOP/s that the card could do; nan for a card that PEAKS does not know."""
    for name, peak in PEAKS.items():
        if name in torch.cuda.get_device_name():
            return peak
    return float("nan")


def measure_step(row, args, step, batches):
    """Completes a row {"model", "batch", "step"} with time, memory, syncs, operations."""
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row |= time_steps(step, batches, args.device, args.repeats)
    seconds = row["step ms"] / 1000
    row["images/s"] = row["batch"] / seconds
    if args.device == "cuda":
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        row["syncs"], row["where"] = count_syncs(step, batches[0])
    case = row["model"], row["batch"], row["step"].removesuffix(COMPILED)
    if not row["step"].endswith(COMPILED):  # the counter does not see into compiled code
        args.operations[case] = count_operations(step, batches[0])
    if case in args.operations:
        row["TFLOP"] = args.operations[case]
        if args.device == "cuda":
            row["MFU %"] = 100 * row["TFLOP"] / seconds / peak_of_card()


def measure_sizes(report, args, name, kind, step, batches):
    """One kind of step at every batch size, as far as memory and time allow."""
    for batch_size in args.batch_sizes:
        run = f"{name}, batch {batch_size}, {kind}"
        row = {"model": name, "batch": batch_size, "step": kind, "run": run}
        if report.out_of_time():
            row["note"] = "no time left"
        else:
            try:
                measure_step(row, args, step, batches[batch_size])
            except torch.OutOfMemoryError:
                row["note"] = "does not fit into memory"
                step.optimizer.zero_grad()
        report.add("step", row)
        gc.collect()


def our_steps(report, args, name, model, batches, backend):
    """C2LIP, then plain."""
    for kind in ("C2LIP", "plain"):
        step = Step(model, args.device, kind == "C2LIP", backend)
        if backend is not None:
            kind += COMPILED
        measure_sizes(report, args, name, kind, step, batches)
        del step  # and its optimizer's moments


def open_clip_steps(report, args, name, model, batches):
    """The same images and captions through open_clip, which knows no concepts."""
    try:
        step = OpenClipStep(name, model.config, args.device)
    except ImportError as error:
        report.say(f"step: open_clip's own is left out: {error}")
        return
    model.to("cpu")  # our weights are no part of its memory
    measure_sizes(report, args, name, "open_clip", step, batches)
    model.to(args.device)


def step_batches(report, args, model):
    """{batch size: batches}, for all kinds of step."""
    batches = {}
    rng = random.Random(args.seed)
    for batch_size in args.batch_sizes:
        some = [make_batch(model, rng, batch_size) for _ in range(args.batches)]
        if args.device == "cuda":  # as the loader gives them: the GPU can copy from there by itself
            for batch in some:
                batch["images"] = batch["images"].pin_memory()
                batch["tokens"] = batch["tokens"].pin_memory()
        batches[batch_size] = some
        tokens, concept_tokens = some[0]["tokens"], some[0]["concept_tokens"]
        report.say(f"step: {len(some[0]['pairs'])} concepts in {len(tokens)} captions, "
                   f"{tuple(concept_tokens.shape)} tokens to encode beside {tuple(tokens.shape)}")
    return batches


def measure_steps(report, args):
    """Every model eager, with open_clip beside it, then all compiled, which is slow to start."""
    set_tf32(True)  # as in train.py
    args.operations = {}  # TFLOP of a step, by (model, batch size, kind)
    for backend in (None, args.backend):
        for name, config in args.step_models.items():
            torch._dynamo.reset()
            model = make_model(config, args.seed).to(args.device)
            batches = step_batches(report, args, model)
            our_steps(report, args, name, model, batches, backend)
            if backend is None:
                open_clip_steps(report, args, name, model, batches)
            del model, batches
            gc.collect()
    for line in step_summary(report.data["step"]):
        report.say(f"step: {line}")


def step_summary(rows):
    """What concepts cost on top of plain, and ours beside open_clip's, for each model and batch."""
    times = {}
    for row in rows:
        if "step ms" in row:
            case = times.setdefault((row["model"], row["batch"]), {})
            case[row["step"]] = row["step ms"]
    lines = []
    for (model, batch), case in times.items():
        for kind in ("", COMPILED):
            plain = case.get("plain" + kind)
            concepts = case.get("C2LIP" + kind)
            if plain and concepts:
                more = 100 * (concepts / plain - 1)
                lines.append(f"{model}, batch {batch}{kind}: concepts cost {more:.0f} % more time.")
            if plain and "open_clip" in case:
                ratio = case["open_clip"] / plain
                lines.append(f"{model}, batch {batch}{kind}: plain is {ratio:.2f} times as fast as "
                             "open_clip, eager.")
    return lines


# ---- settings --------------------------------------------------------------
PARTS = {
    "parity": measure_parity,
    "compile": count_compilations,
    "train": run_training,
    "step": measure_steps,  # last: the longest, which gives up what no time is left for
}


def full_settings(args):
    """What a GPU measures."""
    siglip = MODELS["ViT-B-16-SigLIP"]
    clip = MODELS["ViT-B-32"]
    args.backend = "inductor"
    args.parity_models = {"ViT-B-32": clip, "SigLIP, B/32": replace(siglip, patch_size=32)}
    args.parity_batch = 12
    args.similarity_shape = (24, 196, 200, 512)  # images, patches, concepts, width
    args.compile_models, args.compile_batch = ["nano"], 96
    args.step_models = {"ViT-B-16-SigLIP": siglip, "ViT-B-32": clip}
    args.batch_sizes, args.batches, args.repeats = (256, 96), 3, 12
    args.train_steps, args.save_every, args.kill_after, args.train_timeout = 150, 50, 65, 120
    args.train_flags = ["--steps", str(args.train_steps), "--eval-every", "0"]


def smoke_settings(args):
    """Every line of it, small: models of two blocks, and of the compiler its front end only."""
    sizes = {"embed_dim": 48, "vision": (48, 2, 3, 96), "text": (48, 2, 3, 96)}
    siglip = replace(MODELS["nano"], **sizes)
    clip = replace(siglip, family="clip", logit_bias=None)
    args.backend = "eager"
    args.minutes = 60  # a slow machine takes its time, but leaves nothing out
    args.parity_models = {"small SigLIP": siglip, "small CLIP": clip}
    args.parity_batch = 8
    args.similarity_shape = (6, 20, 30, 32)
    args.compile_models, args.compile_batch = ["nano"], 8
    args.step_models = {"small SigLIP": siglip, "small CLIP": clip}
    args.batch_sizes, args.batches, args.repeats = (8,), 2, 2
    args.train_steps, args.save_every, args.kill_after, args.train_timeout = 14, 6, 7, 300
    args.train_flags = ["--steps", str(args.train_steps), "--eval-every", "0", "--batch-size", "32"]


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="out/gpu", help="folder of gpu.json and gpu.md")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, joined by commas")
    parser.add_argument("--smoke", action="store_true", help="small models, also for a CPU")
    parser.add_argument("--minutes", type=float, default=6, help="no row is begun after these (6)")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10_000,
                        help="of weights and inputs; by default another in each run")
    parser.add_argument("--commit", help="what the table names where there is no git")
    args = parser.parse_args()
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts {','.join(unknown)}: expected some of {', '.join(PARTS)}")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and not args.smoke:
        parser.error("torch sees no GPU here: give --smoke to try every part small on the CPU")
    return args


def main():
    args = parse_arguments()
    if args.smoke:
        smoke_settings(args)
    else:
        full_settings(args)
    report = Report(args)
    for name in args.parts.split(","):
        began = time.monotonic()
        try:
            PARTS[name](report, args)
        except Exception:  # the other parts may still work
            report.data["errors"][name] = traceback.format_exc()
            report.say(f"{name} FAILED\n{traceback.format_exc()}")
        report.data["seconds"][name] = time.monotonic() - began
        report.write()
        gc.collect()
    print("\n" + markdown(report.data))
    report.say(f"wrote {report.directory}/gpu.json and gpu.md")
    if report.data["errors"]:
        sys.exit(f"gpu.py: {', '.join(report.data['errors'])} failed")


if __name__ == "__main__":
    main()
