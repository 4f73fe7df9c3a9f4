"""Train or fine-tune CLIP and SigLIP with C2LIP's concept losses: one script, to be read from top to bottom.

    python train.py                                     a nano model from scratch on built-in scenes, minutes on a CPU
    python train.py --method siglip                     the same without concepts: the plain contrastive baseline
    torchrun --nproc_per_node=8 train.py --model ViT-B-16-SigLIP --data pairs.csv --image-root DIR    the paper's recipe

The number of processes changes nothing but the time: --batch-size is global, every loss and gradient is that of the
whole batch, and the order of the data is a function of the seed alone.
"""
import argparse
import contextlib
import copy
import glob
import importlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # threads that spin while they wait starve other processes

import timm
import tokenizers
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import evaluate
from data import CaptionFile, Collate, Epochs, Scenes, Seeded, train_tokenizer, train_transform
from losses import (ce_clip_loss, clip_loss, con_clip_loss, concept_columns, degla_loss, first_row, gather_features,
                    negclip_loss, npc_loss, share_concepts, siglip_loss, triplet_clip_loss, xac_loss)
from model import CLIP, MODELS, read_tokenizer, set_tokenizer
from pooling import concept_similarity

# ---- arguments -------------------------------------------------------------
PRESETS = {
    # from scratch on the scenes; a batch of 128 holds a few that differ in their binding alone, for either method
    "nano": dict(model="nano", steps=900, batch_size=128, lr=2e-3, weight_decay=0.1, beta2=0.95, warmup=50,
                 dtype="float32", workers=0, eval_every=150),
    # the paper's recipe for SigLIP ViT-B/16 on CC3M, on 8 GPUs of 96 images
    "c2lip": dict(model="ViT-B-16-SigLIP", epochs=5, batch_size=768, lr=1e-5, weight_decay=0.1, beta2=0.98, warmup=50,
                  dtype="bfloat16", workers=min(8, os.cpu_count() or 1), eval_every=1000),
}
# C2LIP and what it argues against, with their published weights; the optimizer's settings are the preset's for all
METHODS = {
    "c2lip": dict(npc_weight=1.0, xac_weight=0.01),
    "siglip": dict(loss="siglip"),
    "clip": dict(loss="clip"),
    "negclip": dict(negatives="swap"),
    "ce_clip": dict(negatives="typed", cmr_weight=0.2, imc_weight=0.3),
    "degla": dict(negatives="typed", tgc_weight=0.1, igc_weight=0.1, distill_weight=0.005, ema=0.9996),
    "con_clip": dict(negatives="negate", negative_images=True, freeze="visual"),
    "triplet_clip": dict(negatives="swap", negative_images=True),
}
PEAKS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "4090": 165}    # TFLOP/s, dense bfloat16
TERMS = ("npc", "xac", "cmr", "imc", "tgc", "igc", "distill")     # flags --NAME-weight; losses.py says what they are

shown = [f"{name}: {', '.join(f'{k} {x}' for k, x in d.items())}" for d in (PRESETS, METHODS) for name, d in d.items()]
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 epilog="\n  ".join(["defaults of presets and methods:", *shown]))
flag = parser.add_argument
flag("--preset", choices=PRESETS, help="defaults of the flags below; nano for the nano model, else c2lip")
flag("--method", choices=METHODS, default="c2lip", help="which losses, with their published weights (c2lip)")
# model
flag("--model", choices=MODELS, metavar="NAME", help=f"architecture: {', '.join(MODELS)}")
flag("--init", help="initial weights: hub id, folder, file or scratch; default: the model's public ones")
flag("--tokenizer", help="a tokenizer.json; default: that of the weights; from scratch, one trained on the captions")
# data
flag("--data", help=".csv, .tsv, .jsonl files or tar shards 'cc3m/{00000..00331}.tar', joined by ::; default: scenes")
flag("--image-root", default="", help="folder that the image paths of --data are relative to")
flag("--image-key", help="column of image paths; default: image, image_path, filepath, ...")
flag("--caption-key", help="column or json key of captions, several joined by commas; default: caption, title, text")
flag("--captions", metavar="TABLE", help="captions for the images of tar shards, joined by key or url, as DreamLIP's")
flag("--relations", type=float, default=0.0, help="scenes: share of the captions that say where the objects are (0)")
flag("--max-bad", type=float, default=0.01, help="stop when more than this share of the rows cannot be read (0.01)")
flag("--workers", type=int, help="processes that read data, on each rank")
# losses
flag("--loss", choices=("siglip", "clip"), help="sigmoid or softmax; default: what the weights were trained with")
for name in TERMS:
    flag(f"--{name}-weight", type=float, default=0.0, help="weight of this term, 0: off; default: the method's")
flag("--no-dedupe", dest="dedupe", action="store_false", help="a concept is no positive of other captions that hold it")
flag("--concept-features", choices=("phrase", "span"), default="phrase", help="span: of the caption's tokens (phrase)")
flag("--ema", type=float, metavar="DECAY", help="average the weights; evaluated too; degla's and distill's teacher")
# optimization
flag("--steps", type=int, help="train for so many batches ...")
flag("--epochs", type=float, help="... or for so many passes over the data")
flag("--batch-size", type=int, help="global: the sum over all processes")
flag("--accum", type=int, default=1, help="parts of a batch, to save memory; exact, at a second forward pass (1)")
flag("--lr", type=float, help="peak learning rate; cosine decay to 0")
flag("--warmup", type=int, help="steps of linear warm-up")
flag("--weight-decay", type=float, help="of parameters with 2 or more dimensions; the others have none")
flag("--beta2", type=float, help="of AdamW; beta1 is 0.9, eps is 1e-6")
flag("--grad-clip", type=float, default=math.inf, help="largest norm of the gradient (no limit)")
flag("--max-skips", type=int, default=3, help="stop after more steps in a row without a finite loss and gradient (3)")
flag("--freeze", choices=("none", "visual", "text"), help="a tower that is not trained (none)")
flag("--freeze-blocks", type=int, default=0, help="embeddings and first blocks of both towers, not trained (0)")
flag("--layer-decay", type=float, default=1.0, help="factor of the learning rate for each block below the last (1)")
flag("--seed", type=int, default=0, help="of weights, data order and augmentation (0)")
# running
flag("--out-dir", help="where last.pt and log.jsonl go; default: out/MODEL-METHOD, for c2lip out/MODEL")
flag("--resume", metavar="FILE", help="continue from it; auto: from the newest whole checkpoint in --out-dir, if any")
flag("--save-every", type=int, default=1000, help="steps between checkpoints (1000)")
flag("--keep", type=int, default=1, help="how many of the newest checkpoints to keep as step_*.pt; 1: only last.pt (1)")
flag("--val-data", help="held-out pairs, as --data: retrieval is evaluated on them every --eval-every steps")
flag("--bench", help="benches of evaluate.py to run as well, joined by commas (scenes, where those are the data)")
flag("--data-dir", default="data", help="where the benches' files are (data)")
flag("--eval-every", type=int, help="steps between evaluations, of which best.pt keeps the best; 0: only at the end")
flag("--log-every", type=int, default=10, help="steps between lines of log.jsonl (10)")
flag("--tensorboard", action="store_true", help="write these numbers for TensorBoard, too (pip install tensorboard)")
flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
flag("--dtype", choices=("float32", "bfloat16", "float64"), help="of the towers; bfloat16 is autocast")
flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the towers; default: on GPUs")
flag("--grad-checkpointing", action="store_true", help="keep no activations of the blocks: a third slower, less memory")
flag("--dry-run", action="store_true", help="check files, weights and one batch, print the plan and exit")
given = parser.parse_args()
scratch = given.init == "scratch" or given.init is None and given.model in (None, "nano")
defaults = dict(PRESETS[given.preset or ("nano" if scratch and given.model in (None, "nano") else "c2lip")])
if given.init and not scratch:
    defaults["model"] = None                                # the source says what it is
if given.steps is not None or given.epochs is not None:     # either replaces the preset's choice of the two
    defaults.pop("steps", None), defaults.pop("epochs", None)
parser.set_defaults(**{"negatives": None, "negative_images": False} | defaults | METHODS[given.method])
args = parser.parse_args()

for name in ("steps", "epochs", "batch_size", "accum", "lr", "save_every", "log_every", "keep", "layer_decay"):
    if getattr(args, name) is not None and getattr(args, name) <= 0:
        parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected more than 0")
weights = {"contrastive": 1.0, **{name: getattr(args, f"{name}_weight") for name in TERMS}}
with_concepts = weights["npc"] > 0 or weights["xac"] > 0
if weights["distill"] and args.ema is None:
    args.ema = 1.0      # an average that never moves: the initial weights
args.out_dir = args.out_dir or os.path.join("out", (args.model or re.sub(r"\W+", "-", args.init).strip("-")) + (
    f"-{args.method}" if args.method != "c2lip" else "" if with_concepts else "-baseline"))

# ---- setup: processes, device, randomness ----------------------------------
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world_size > 1:
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # torchrun's store keeps dead workers' addresses over --max-restarts: own keys for each attempt; nodes count apart
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") if os.environ.get("GROUP_WORLD_SIZE") == "1" else ""
    store = dist.PrefixStore(f"attempt {attempt}", next(dist.rendezvous("env://"))[0])
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", store=store, rank=rank, world_size=world_size)
torch.manual_seed(args.seed)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
gpu = args.device == "cuda"
use_compile = gpu if args.compile is None else args.compile
print0 = tqdm.write if rank == 0 else lambda text: None
sys.stdout.reconfigure(line_buffering=True)     # a log file has each line at once, also if os._exit follows

def stop(message, status=1):
    """End at once, with one line for the user; torchrun ends the other processes with this one."""
    print(f"train.py: {message}", file=sys.stderr, flush=True)
    os._exit(status)

def guard(function, *arguments, **keywords):
    """Call it; a ValueError is a mistake that the user can mend, and its text says how (an OSError, which file)."""
    try:
        return function(*arguments, **keywords)
    except (ValueError, OSError, ImportError) as error:
        stop(error)

interrupted = []    # the second signal ends at once
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os._exit(130) if interrupted else interrupted.append(number))

# ---- data ------------------------------------------------------------------
if args.data:
    dataset = guard(CaptionFile, args.data, args.image_root, args.image_key, args.caption_key, args.captions)
else:
    dataset = Scenes(args.steps * args.batch_size if args.steps else 100_000, "train", args.seed,
                     relations=args.relations, negative_images=args.negative_images)

# ---- model -----------------------------------------------------------------
last, log_path = os.path.join(args.out_dir, "last.pt"), os.path.join(args.out_dir, "log.jsonl")
if args.resume == "auto":       # the newest checkpoint that is whole
    args.resume = None
    for path in sorted(glob.glob(os.path.join(args.out_dir, "step_*.pt"))) + [last] * os.path.exists(last):
        try:
            torch.load(path, mmap=True, weights_only=True)
            args.resume = path
        except Exception as error:
            print0(f"--resume auto passes over {path}, which is damaged ({type(error).__name__})")
if args.resume:
    model = guard(CLIP.load, args.resume)
    if args.model and model.config.name != args.model:
        stop(f"--resume {args.resume} holds a {model.config.name}, but --model is {args.model}: give that model")
elif scratch:
    config = replace(MODELS[args.model])
    if args.tokenizer:
        config.tokenizer = guard(read_tokenizer, args.tokenizer)
    else:   # trained on every rank alike; the captions set the context length, since SigLIP attends to its padding
        captions = dataset.captions if args.data else [dataset[i]["caption"] for i in range(2000)]
        config.tokenizer, config.vocab_size, longest = train_tokenizer(captions)
        config.context_length = min(config.context_length, -(-longest // 4) * 4)
        config.text_clean, config.pad_id = "canonicalize", 0
    model = guard(CLIP, config)
else:
    model = guard(CLIP.from_pretrained, args.init, args.model)
    if args.tokenizer:
        model = guard(set_tokenizer, model, args.tokenizer)
if args.loss == "clip":
    model.logit_bias = model.config.logit_bias = None       # an unused parameter would be an error under DDP
elif args.loss == "siglip" and model.logit_bias is None:
    model.config.logit_bias = -10.0
    model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
model.to(args.device, torch.float64 if args.dtype == "float64" else torch.float32).train()
initial_scale = model.logit_scale.item()
teacher = copy.deepcopy(model).requires_grad_(False).eval() if args.ema is not None else None
model.visual.set_grad_checkpointing(args.grad_checkpointing)
model.text.grad_checkpointing = args.grad_checkpointing

for tower, frozen in ((model.visual, args.freeze == "visual"), (model.text, args.freeze == "text")):
    for name, p in tower.named_parameters():    # layer 0: embeddings, then the blocks, then what follows them
        block, after = re.match(r"blocks\.(\d+)", name), 1 + len(tower.blocks)
        early = re.match("patch_embed|pos_embed|cls_token|norm_pre|token_embedding", name)
        layer = 1 + int(block[1]) if block else 0 if early else after
        p.requires_grad = not frozen and layer > (args.freeze_blocks or -1)
        p.learning_rate = args.layer_decay ** (after - layer)

network = copy.copy(model)      # shares the parameters; the model itself stays uncompiled, for evaluation and saving
if use_compile:
    network.encode_image = torch.compile(model.encode_image)
    network.encode_text = torch.compile(model.encode_text, dynamic=True)    # captions and concepts, of varying number
if world_size > 1:
    network = DistributedDataParallel(network)      # on the device that set_device chose

# ---- optimizer -------------------------------------------------------------
trained = [p for p in model.parameters() if p.requires_grad]
groups = {}     # no weight decay for biases, norms, logit_scale, logit_bias
for p in trained:
    groups.setdefault((args.weight_decay * (p.ndim >= 2), getattr(p, "learning_rate", 1.0)), []).append(p)
optimizer = torch.optim.AdamW([{"params": ps, "weight_decay": decay, "scale": scale}
                               for (decay, scale), ps in groups.items()],
                              lr=args.lr, betas=(0.9, args.beta2), eps=1e-6, fused=gpu)

# ---- resume, and the stream of batches from there --------------------------
first_step, best, thresholds = 0, 0.0, torch.zeros(4, device=args.device)     # thresholds: of ce_clip
if args.resume:
    saved = torch.load(args.resume, map_location=args.device, weights_only=True)
    if "optimizer" not in saved:
        stop(f"--resume {args.resume} holds weights but no optimizer: to start from them, give --init {args.resume}")
    model.load_state_dict(saved["model"])       # once more, in this run's dtype
    optimizer.load_state_dict(saved["optimizer"])
    first_step, best, thresholds, initial_scale = (saved[k] for k in ("step", "best", "thresholds", "initial_scale"))
    if teacher is not None:
        teacher.load_state_dict(saved["teacher"])

stream = guard(Epochs, len(dataset), args.batch_size, args.seed, rank, world_size)
if args.batch_size < world_size * args.accum:
    stop(f"--batch-size {args.batch_size} is less than {world_size} processes x --accum {args.accum}", 2)
args.steps = stream.stop = args.steps or max(1, round(args.epochs * stream.steps_per_epoch))
stream.start = min(first_step, args.steps)
collate = Collate(train_transform(model.config) if args.data else model.transform, model.tokenize, with_concepts,
                  pad_concepts=64 if use_compile else 1, negatives=args.negatives,
                  negative_images=args.negative_images, spans=args.concept_features == "span")
loader = DataLoader(
    Seeded(dataset, args.seed, args.method == "negclip"), batch_sampler=stream, collate_fn=collate,
    num_workers=args.workers, persistent_workers=args.workers > 0, pin_memory=gpu,
    multiprocessing_context="fork" if args.workers else None,       # Ctrl-C reaches them too; the main process decides:
    worker_init_fn=lambda worker: signal.signal(signal.SIGINT, signal.SIG_IGN))
batches = ({k: x.to(args.device, non_blocking=True) if torch.is_tensor(x) else x for k, x in batch.items()}
           for batch in loader)

# ---- the loss of a batch, and its gradient ---------------------------------
HARD_LOSSES = {"negclip": negclip_loss, "con_clip": con_clip_loss, "triplet_clip": triplet_clip_loss}
INPUTS = ("images", "tokens", "concept_tokens", "spans", "negative_tokens", "negative_images")

def losses(out, batch, taught):
    """This process's share of each loss term: its own images against the captions and concepts of all processes."""
    global thresholds
    image_features, scale, bias = (out[name] for name in ("image_features", "logit_scale", "logit_bias"))
    texts, offset = gather_features(out["text_features"]), first_row(len(image_features), image_features.device)
    if args.negatives:
        hard = [image_features, texts, gather_features(out["negative_features"]),       # negatives (global B, K, D)
                gather_features(batch["negative_mask"])]                                # mask (global B, K) bool
    if args.negative_images:
        hard += [out["negative_image_features"], batch["negative_image_mask"]]          # of this process
    if args.method in HARD_LOSSES:
        terms = {"contrastive": HARD_LOSSES[args.method](*hard, scale, bias, offset)}
    elif args.method == "ce_clip":
        terms = ce_clip_loss(*hard, thresholds, scale, bias, offset)
        thresholds = terms.pop("thresholds")
    elif args.method == "degla":
        with torch.no_grad():
            known = {k: x if k == "image_features" else gather_features(x) for k, x in taught.items()}
        terms = degla_loss(*hard, known, scale, bias, offset)
    else:
        terms = {"contrastive": clip_loss(image_features, texts, scale, offset) if bias is None
                 else siglip_loss(image_features, texts, scale, bias, offset)}
    if weights["distill"] and args.method != "degla":
        terms["distill"] = sum((out[name] - x).square().sum() for name, x in taught.items())
    if with_concepts:
        concepts, labels = concept_columns(
            out["concept_features"], batch["concept_ids"], batch["pairs"], len(image_features), args.dedupe,
            merge=args.concept_features == "phrase", feature_ids=batch.get("feature_ids"))
        if weights["npc"]:
            terms["npc"] = npc_loss(image_features, concepts, labels, scale, bias)
        if weights["xac"]:
            terms["xac"] = xac_loss(concept_similarity(out["patch_tokens"], concepts), labels, scale, bias)
    terms = {name: term for name, term in terms.items() if weights[name]}
    return {**terms, "loss": sum(weights[name] * term for name, term in terms.items())}

def forward(network, inputs):
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        return network(**inputs, return_tokens=weights["xac"] > 0)

@torch.no_grad()
def teach(parts):
    """{name: the teacher's features of a whole batch}, if a loss asks for them."""
    known = ("image_features", "text_features", "negative_features") if weights["distill"] or weights["tgc"] else ()
    outs = [forward(teacher, part) for part in parts if known]
    return {name: torch.cat([out[name] for out in outs]) for name in known if name in outs[0]}

def backward(batch):
    """Leaves the gradient of the whole batch in the parameters and returns this process's loss terms.

    DDP averages gradients over processes, the losses are shares of a sum: hence world_size. --accum is GradCache (Gao
    et al. 2021), exact: the features of all parts without a graph, the loss of the whole batch and its gradient with
    respect to them, then each part once more with its piece of that gradient.
    """
    if "concept_tokens" in batch and args.dedupe and world_size > 1:    # each phrase is encoded by one process
        batch["concept_tokens"], batch["feature_ids"] = share_concepts(batch["concept_tokens"], batch["concept_ids"],
                                                                       model.config.pad_id)
    inputs = {name: batch[name].to(model.logit_scale.dtype) if "images" in name else batch[name]
              for name in INPUTS if name in batch}
    pieces = {name: x.tensor_split(args.accum) for name, x in inputs.items()}
    parts = [{name: piece[i] for name, piece in pieces.items()} for i in range(args.accum)]
    taught = teach(parts)
    if args.accum == 1:
        terms = losses(forward(network, inputs), batch, taught)
        (terms["loss"] * world_size).backward()
        return terms
    with torch.no_grad():
        outs = [forward(network, part) for part in parts]
    shared = {"logit_scale", "logit_bias"}      # scalars, the same in every part
    leaves = {name: x if name in shared else torch.cat([out[name] for out in outs]) for name, x in outs[0].items()}
    leaves = {name: x if x is None else x.detach().requires_grad_() for name, x in leaves.items()}
    sizes = {name: [len(out[name]) for out in outs] for name in leaves.keys() - shared}
    del outs
    terms = losses(leaves, batch, taught)
    (terms["loss"] * world_size).backward()
    grads = {name: x.grad if name in shared else x.grad.split(sizes[name])
             for name, x in leaves.items() if x is not None}
    for i, part in enumerate(parts):
        is_last = i == args.accum - 1
        with contextlib.nullcontext() if is_last or world_size == 1 else network.no_sync():
            out = forward(network, part)
            sum((out[name] * (grad if name in shared else grad[i])).sum() for name, grad in grads.items()
                if is_last or name not in shared).backward()
    return terms

def peak_mib():     # of this process
    kib = torch.cuda.max_memory_allocated() / 2**10 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**10

def summed(x):
    if world_size > 1:
        dist.all_reduce(x)
    return x

# ---- evaluation, checkpoints, log ------------------------------------------
benches = args.bench.split(",") if args.bench else [] if args.data else ["scenes"]
benches += ["retrieval"] if args.val_data and "retrieval" not in benches else []
if unknown := set(benches) - set(evaluate.BENCHES):
    stop(f"--bench {','.join(unknown)}: expected some of {', '.join(evaluate.BENCHES)}, joined by commas", 2)
eval_args = evaluate.parser().parse_args([])
eval_args.__dict__.update(device=args.device, data=args.val_data, data_dir=args.data_dir, image_root=args.image_root,
                          image_key=args.image_key, caption_key=args.caption_key, allow_missing=True)

def evaluation(step):
    """One line now, the table at the end; best.pt if the mean of all figures is the best so far."""
    global best
    results = {}
    for kind, network in (("", model), ("ema ", teacher)):
        if not kind or args.ema not in (None, 1.0):
            found = guard(evaluate.run, benches, network.eval(), eval_args, quiet=True)
            results |= {kind + bench: subsets for bench, subsets in found.items()}
    model.train()
    for bench, subsets in results.items():
        print0(f"step {step}: {bench} " + "  ".join(f"{name} {100 * r['accuracy']:.1f}" for name, r in subsets.items()))
    log({"step": step, "eval": {bench: {name: {k: r[k] for k in ("accuracy", "low", "high", "n", "chance")}
                                        for name, r in subsets.items()} for bench, subsets in results.items()}})
    figures = [r["accuracy"] for bench in benches for r in results[bench].values()]
    mean = sum(figures) / len(figures)
    if mean > best and rank == 0:
        write({**model.checkpoint(), "step": step, "args": vars(args)}, "best.pt")
    best = max(best, mean)
    return results

def write(state, name):
    """Under another name first, and through to the disk: what has the name is a whole checkpoint, always."""
    path = os.path.join(args.out_dir, name)
    try:
        with open(path + ".tmp", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:
        stop(f"cannot write {path}: {error}. What was there is untouched: make room, and give --resume auto")

def save(step):
    state = {**model.checkpoint(), "optimizer": optimizer.state_dict(), "step": step, "best": best,
             "thresholds": thresholds, "initial_scale": initial_scale, "args": vars(args)}
    if rank == 0:
        write(state | ({"teacher": teacher.state_dict()} if teacher else {}), "last.pt")
        if args.keep > 1:
            os.link(last, last + ".tmp")    # a second name, which stays when the next takes the first
            os.replace(last + ".tmp", os.path.join(args.out_dir, f"step_{step:08d}.pt"))
            for old in sorted(glob.glob(os.path.join(args.out_dir, "step_*.pt")))[:-args.keep]:
                os.remove(old)

def log(row):
    if rank == 0:
        with open(log_path, "a") as f:
            f.write(json.dumps(row) + "\n")
        subsets = [(f"{bench}/{name}", r["accuracy"]) for bench, results in row.get("eval", {}).items()
                   for name, r in results.items()]
        for name, x in (*row.items(), *subsets) if board and "step" in row else ():
            board.add_scalar(name, x, row["step"]) if isinstance(x, float) else None

guard(os.makedirs, args.out_dir, exist_ok=True)
board = args.tensorboard and rank == 0 and not args.dry_run and guard(
    importlib.import_module, "torch.utils.tensorboard").SummaryWriter(
        args.out_dir, purge_step=first_step + 1, flush_secs=5)
if rank == 0 and not args.dry_run:
    lines = open(log_path).readlines() if args.resume and os.path.exists(log_path) else []
    with guard(open, log_path, "w") as f:       # without what is younger than the checkpoint, or was torn by a kill
        f.writelines(x for x in lines if x.endswith("\n") and json.loads(x).get("step", 0) <= first_step)
millions = sum(p.numel() for p in model.parameters()) / 1e6
shown = ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight)
print0(f"{model.config.name}, {millions:.1f} M parameters; {args.method}: {shown}, "
       f"{'sigmoid' if model.logit_bias is not None else 'softmax'}; {len(dataset):,} rows, {args.steps:,} steps of "
       f"{args.batch_size}, {world_size} x {args.device} in {args.dtype}{', compiled' if use_compile else ''}")
slow_gpu = gpu and not (use_compile and args.dtype == "bfloat16")
for slow, applies in ((f"a {model.config.name} on a CPU takes seconds an image", not gpu and millions > 10),
                      ("--dtype float32 or --no-compile on a GPU", slow_gpu),
                      ("--workers 0 reads data in turn with training", gpu and args.data and not args.workers)):
    print0(f"SLOW: {slow}") if applies else None
skipped = getattr(dataset, "skipped", [])
for name, why in skipped[:5]:
    print0(f"skipped {name}: {why} ({len(skipped):,} in all)")
if args.dry_run:
    batch, began = next(batches), time.time()
    loss, seconds = summed(backward(batch)["loss"].detach()).item(), time.time() - began
    images = args.steps * len(dataset) // stream.steps_per_epoch
    print0(f"dry run: {len(batch['keys'])} rows read, {len(batch['bad'])} bad; loss {loss:.3f}; {images:,} images, "
           f"{images / len(dataset):.2f} epochs; {seconds:.2f} s for the first step, at most "
           f"{args.steps * seconds / 3600:.2f} hours; peak memory {peak_mib():.0f} MiB. Nothing was trained")
    sys.exit()
commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=sys.path[0], capture_output=True, text=True).stdout.strip()
log({"args": vars(args), "config": {**asdict(model.config), "tokenizer": len(model.config.tokenizer)}, "commit": commit,
     "world_size": world_size, "versions": {m.__name__: m.__version__ for m in (torch, timm, tokenizers)}})

# ---- the loop --------------------------------------------------------------
seen, bad, fallback, skips, waited, worked, computed, results = 0, 0, 0, 0, 0.0, 0.0, 0.0, {}
# weights of the blocks that each number of the input meets, 6 operations each; attention's own products are left out
dense = {"spans": 0, "tokens": sum(p.numel() for p in model.text.blocks.parameters()),
         "images": sum(p.numel() for p in model.visual.blocks.parameters()) / (3 * model.config.patch_size ** 2)}
bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=rank != 0, dynamic_ncols=True)
started = idle = time.time()
for step, batch in enumerate(batches, first_step):
    waited += time.time() - idle
    # rows that could not be read are reported, and few enough or the end
    seen, bad, fallback = seen + len(batch["keys"]), bad + len(batch["bad"]), fallback + batch["fallback"]
    for key, why in batch["bad"]:
        tqdm.write(f"skipped {key}: {why}")
        log({"step": step + 1, "skipped": key, "error": why})
    if batch["bad"] and (bad > args.max_bad * max(seen + bad, min(len(dataset), 1000)) or not batch["keys"]):
        stop(f"{bad} of {seen + bad} rows could not be read, more than --max-bad {args.max_bad:g}; the last is "
             f"{batch['bad'][-1][0]}: {batch['bad'][-1][1]}. Check --image-root, or raise --max-bad")
    progress = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    lr = args.lr * ((step + 1) / args.warmup if step < args.warmup else 0.5 * (1 + math.cos(math.pi * progress)))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    if step % stream.steps_per_epoch == 0:
        thresholds = torch.zeros_like(thresholds)
    terms = backward(batch)
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.grad_clip).item()
    state = summed(torch.tensor([float(not terms["loss"].isfinite()), len(interrupted)], device=args.device))
    if state[0] or not math.isfinite(grad_norm):    # all processes see the same
        skips += 1
        why = f"loss {terms['loss'].item():.4g}, gradient norm {grad_norm:.4g} at step {step + 1}: left out"
        log({"step": step + 1, "left_out": skips, "why": why})
        tqdm.write(f"{why}; its first rows: {', '.join(batch['keys'][:4])}")
        if skips > args.max_skips:
            stop(f"{why}, as {skips} steps in a row (--max-skips {args.max_skips}). Try a smaller --lr, or "
                 f"--grad-clip 1; last good checkpoint: {last if os.path.exists(last) else 'none was written yet'}")
    else:
        skips = 0
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():   # CLIP stops at 100; SigLIP ships 117, so its ceiling must not move it
        ceiling = max(math.log(100 if model.logit_bias is None else 1000), initial_scale)
        model.logit_scale.clamp_(0, ceiling)
        if args.ema not in (None, 1.0):
            torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 1 - args.ema)
    done, worked = step + 1, worked + time.time() - idle
    computed += 6 * sum(batch[name].numel() * dense[name.split("_")[-1]] for name in INPUTS if name in batch)
    if done % args.log_every == 0 or done == args.steps:
        values = dict(zip(terms, summed(torch.stack([t.detach() for t in terms.values()])).tolist()))
        rate = seen * world_size / worked
        bar.set_postfix_str(" ".join(f"{k} {v:.2f}" for k, v in values.items()) + f" {rate:.0f} img/s", refresh=False)
        row = {"step": done, **values, "grad_norm": grad_norm, "lr": lr,
               "logit_scale": model.logit_scale.exp().item(),
               "logit_bias": None if model.logit_bias is None else model.logit_bias.item(),
               "images_per_second": rate, "waiting": waited / worked, "peak_mib": peak_mib(),
               "tflops": computed / worked / 1e12, "skipped": bad, "own_concept": fallback}
        row |= {"mfu": row["tflops"] / x for name, x in PEAKS.items() if gpu and name in torch.cuda.get_device_name()}
        if use_compile:
            compiled = torch._dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", [])
            row.update(compiles=len(compiled), compile_seconds=round(sum(compiled), 1))
        log(row)
    bar.update()
    if state[1]:
        save(done)
        bar.close()
        print0(f"interrupted: saved step {done} to {last}; continue with --resume {last}")
        break
    if benches and (done == args.steps or args.eval_every and done % args.eval_every == 0):
        results = evaluation(done)
    if done % args.save_every == 0 or done == args.steps:
        save(done)
    idle = time.time()
else:
    bar.close()
    if rank == 0 and args.ema not in (None, 1.0):
        write({**teacher.checkpoint(), "step": args.steps, "args": vars(args)}, "ema.pt")
    for bench in results if rank == 0 else ():
        evaluate.print_table(bench, results[bench])
    bad, fallback = summed(torch.tensor([bad, fallback], device=args.device)).tolist()
    minutes = (time.time() - started) / 60
    print0(f"\n{args.steps - first_step:,} steps in {minutes:.1f} minutes; wrote {last} and log.jsonl" +
           (f"; {bad} rows were skipped" if bad else "") +
           (f"; {fallback} captions, without another noun phrase in them, were their own concept" if fallback else ""))
    print0("next: python train.py --method siglip     # the baseline, to compare" if with_concepts else
           f"next: python evaluate.py --checkpoint {last} --bench {','.join(benches) or 'scenes'}")
board and board.close()
if world_size > 1:
    dist.destroy_process_group()
    os._exit(0)     # the interpreter's own end aborts now and then, with gloo's threads
