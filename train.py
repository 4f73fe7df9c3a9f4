"""Train or fine-tune CLIP and SigLIP with C2LIP's concept losses: one script, to be read from top to bottom.

    python train.py                                     a nano model from scratch on built-in scenes, minutes on a CPU
    python train.py --npc-weight 0 --xac-weight 0       the same without concepts: the plain contrastive baseline
    torchrun --nproc_per_node=8 train.py --model ViT-B-16-SigLIP --data pairs.csv --image-root DIR    the paper's recipe

The number of processes changes nothing but the time: --batch-size is global, every loss and gradient is that of the
whole batch, and the order of the data is a function of the seed alone.
"""
import argparse
import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, replace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # threads that spin while they wait starve other processes

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import evaluate
from data import CaptionFile, Collate, Epochs, Scenes, Seeded, train_tokenizer, train_transform
from losses import clip_loss, concept_columns, first_row, gather_features, npc_loss, siglip_loss, xac_loss
from model import CLIP, MODELS, read_tokenizer, set_tokenizer
from pooling import concept_similarity

# -----------------------------------------------------------------------------
# arguments

PRESETS = {
    # from scratch on the scenes: with the concept losses binding comes early. The plain loss may learn it later: a
    # batch of 128 holds some pairs of scenes that differ in their binding alone, which serve as hard negatives
    "nano": dict(model="nano", steps=900, batch_size=128, lr=3e-3, weight_decay=0.1, beta2=0.95, warmup=50,
                 dtype="float32", workers=0, eval_every=150, log_every=10),
    # the paper's recipe for SigLIP ViT-B/16 on CC3M, on 8 GPUs of 96 images
    "c2lip": dict(model="ViT-B-16-SigLIP", epochs=5, batch_size=768, lr=1e-5, weight_decay=0.1, beta2=0.98, warmup=50,
                  dtype="bfloat16", workers=min(8, os.cpu_count() or 1), eval_every=1000, log_every=10),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 epilog="\n".join(["presets:"] + [
                                     f"  {name}: {', '.join(f'{key} {value}' for key, value in values.items())}"
                                     for name, values in PRESETS.items()]))
flag = parser.add_argument
flag("--preset", choices=PRESETS, help="defaults of the flags below; nano for the nano model, else c2lip")
# model
flag("--model", help=f"architecture: {', '.join(MODELS)}")
flag("--init", help="initial weights: a hub id, a folder, a file, or scratch for random ones; default: the model's "
     "public weights, scratch for nano")
flag("--tokenizer", help="a tokenizer.json; default: that of the weights; from scratch, one trained on the captions")
# data
flag("--data", help="a .csv, .tsv or .jsonl file of image-caption pairs; default: the built-in scenes")
flag("--image-root", default="", help="folder that the image paths of --data are relative to")
flag("--image-key", help="column of image paths; default: image, image_path, filepath, ...")
flag("--caption-key", help="column of captions; default: caption, title, text")
flag("--val-data", help="such a file of held-out pairs: retrieval is evaluated on it every --eval-every steps")
flag("--max-bad", type=float, default=0.01, help="stop when more than this share of the rows cannot be read (0.01)")
flag("--workers", type=int, help="processes that read data, on each rank")
# losses
flag("--loss", choices=("siglip", "clip"), help="sigmoid or softmax; default: what the weights were trained with")
flag("--npc-weight", type=float, default=1.0, help="weight of the noun-phrase contrast, 0 turns it off (1)")
flag("--xac-weight", type=float, default=0.01, help="weight of the cross-attention concept contrast, 0: off (0.01)")
flag("--dedupe", action=argparse.BooleanOptionalAction, default=True, help="a concept that several captions hold is "
     "positive for all their images; --no-dedupe: for its own only, as in the paper's released code (dedupe)")
# optimization
flag("--steps", type=int, help="train for so many batches ...")
flag("--epochs", type=float, help="... or for so many passes over the data")
flag("--batch-size", type=int, help="global: the sum over all processes")
flag("--accum", type=int, default=1, help="split each process's batch into so many parts to save memory; exact: same "
     "loss, same gradient, at the price of a second forward pass (1)")
flag("--lr", type=float, help="peak learning rate; cosine decay to 0")
flag("--warmup", type=int, help="steps of linear warm-up")
flag("--weight-decay", type=float, help="of parameters with 2 or more dimensions; the others have none")
flag("--beta2", type=float, help="of AdamW; beta1 is 0.9, eps is 1e-6")
flag("--seed", type=int, default=0, help="of weights, data order and augmentation (0)")
# running
flag("--out-dir", help="where last.pt and log.jsonl go; default: out/MODEL, or out/MODEL-baseline without concepts")
flag("--resume", metavar="FILE", help="continue from a checkpoint; auto: from --out-dir's last.pt, if there is one")
flag("--save-every", type=int, default=1000, help="steps between checkpoints (1000)")
flag("--eval-every", type=int, help="steps between evaluations; 0: only at the end")
flag("--log-every", type=int, help="steps between lines of log.jsonl")
flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
flag("--dtype", choices=("float32", "bfloat16", "float64"), help="of the towers' arithmetic; with bfloat16 weights and "
     "losses stay float32, float64 is for tests of exactness")
flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the towers; default: on GPUs")
given = parser.parse_args()
scratch = given.init == "scratch" or given.init is None and given.model in (None, "nano")
defaults = dict(PRESETS[given.preset or ("nano" if scratch and given.model in (None, "nano") else "c2lip")])
if given.init and not scratch:
    defaults["model"] = None                                # the source says what it is
if given.steps is not None or given.epochs is not None:     # either replaces the preset's choice of the two
    defaults.pop("steps", None), defaults.pop("epochs", None)
parser.set_defaults(**defaults)
args = parser.parse_args()

if args.model not in MODELS and args.model is not None:
    parser.error(f"no model {args.model!r}: expected one of {', '.join(MODELS)}")
for name in ("steps", "epochs", "batch_size", "accum", "lr"):
    if getattr(args, name) is not None and getattr(args, name) <= 0:
        parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected more than 0")
with_concepts = args.npc_weight > 0 or args.xac_weight > 0
args.out_dir = args.out_dir or os.path.join(
    "out", (args.model or os.path.basename(args.init.rstrip("/"))) + ("" if with_concepts else "-baseline"))

# -----------------------------------------------------------------------------
# setup: processes, device, randomness

rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world_size > 1:
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
torch.manual_seed(args.seed)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
use_compile = args.device == "cuda" if args.compile is None else args.compile


def print0(*text):
    if rank == 0:
        tqdm.write(" ".join(map(str, text)))


def stop(message, status=1):
    """End with one line for the user; under torchrun the other processes are ended with this one."""
    print(f"train.py: {message}", file=sys.stderr, flush=True)
    os._exit(status) if world_size > 1 else sys.exit(status)


def guard(function, *arguments, **keywords):
    """Call it; a ValueError is a mistake that the user can mend, and its text says how (an OSError, which file)."""
    try:
        return function(*arguments, **keywords)
    except (ValueError, OSError) as error:
        stop(error)


interrupted = False


def on_signal(signum, frame):
    global interrupted
    if interrupted:     # the second time: at once
        os._exit(130)
    interrupted = True


def ignore_interrupts(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C reaches workers too; the main process decides


signal.signal(signal.SIGTERM, on_signal)
signal.signal(signal.SIGINT, on_signal)

# -----------------------------------------------------------------------------
# data

if args.data:
    dataset = guard(CaptionFile, args.data, args.image_root, args.image_key, args.caption_key)
    captions = dataset.captions
else:
    dataset = Scenes(args.steps * args.batch_size if args.steps else 100_000, "train", args.seed)
    captions = [dataset[i]["caption"] for i in range(2000)]

# -----------------------------------------------------------------------------
# model

last = os.path.join(args.out_dir, "last.pt")
if args.resume == "auto":
    args.resume = last if os.path.exists(last) else None
if args.resume:
    model = guard(CLIP.load, args.resume)
    if args.model and model.config.name != args.model:
        stop(f"--resume {args.resume} holds a {model.config.name}, but --model is {args.model}: give that model")
elif scratch:
    config = replace(MODELS[args.model])
    if args.tokenizer:
        config.tokenizer = guard(read_tokenizer, args.tokenizer)
    else:   # trained on every rank alike; the captions set the context length, since SigLIP attends to its padding
        config.tokenizer, config.vocab_size, longest = train_tokenizer(captions[:200_000])
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

network = copy.copy(model)      # shares the parameters; the model itself stays uncompiled, for evaluation and saving
if use_compile:
    network.encode_image = torch.compile(model.encode_image)
    network.encode_text = torch.compile(model.encode_text, dynamic=True)    # captions and concepts, of varying number
if world_size > 1:
    network = DistributedDataParallel(network)      # on the device that set_device chose

# -----------------------------------------------------------------------------
# optimizer

decayed = [p for p in model.parameters() if p.ndim >= 2]
others = [p for p in model.parameters() if p.ndim < 2]      # biases, norms, logit_scale, logit_bias
optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": args.weight_decay},
                               {"params": others, "weight_decay": 0.0}],
                              lr=args.lr, betas=(0.9, args.beta2), eps=1e-6, fused=args.device == "cuda")


def learning_rate(step):
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


# -----------------------------------------------------------------------------
# resume, and the stream of batches from there

first_step = 0
if args.resume:
    saved = torch.load(args.resume, map_location=args.device, weights_only=True)
    if "optimizer" not in saved:
        stop(f"--resume {args.resume} holds weights but no optimizer: to start from them, give --init {args.resume}")
    optimizer.load_state_dict(saved["optimizer"])
    first_step = saved["step"]

stream = guard(Epochs, len(dataset), args.batch_size, args.seed, rank, world_size)
if args.batch_size < world_size * args.accum:
    stop(f"--batch-size {args.batch_size} is less than {world_size} processes x --accum {args.accum}", 2)
args.steps = stream.stop = args.steps or max(1, round(args.epochs * stream.steps_per_epoch))
stream.start = min(first_step, args.steps)
collate = Collate(train_transform(model.config) if args.data else model.transform, model.tokenize, with_concepts,
                  pad_concepts=64 if use_compile else 1)
loader = DataLoader(Seeded(dataset, args.seed), batch_sampler=stream, collate_fn=collate, num_workers=args.workers,
                    pin_memory=args.device == "cuda", persistent_workers=args.workers > 0,
                    worker_init_fn=ignore_interrupts, multiprocessing_context="fork" if args.workers else None)

# -----------------------------------------------------------------------------
# the loss of a batch, and its gradient

def losses(out, batch):
    """This process's share of each loss term: its own images against the captions and concepts of all processes."""
    image_features, scale, bias = out["image_features"], out["logit_scale"], out["logit_bias"]
    texts, offset = gather_features(out["text_features"]), first_row(len(image_features), image_features.device)
    terms = {"contrastive": clip_loss(image_features, texts, scale, offset) if bias is None
             else siglip_loss(image_features, texts, scale, bias, offset)}
    if with_concepts:
        concepts, labels = concept_columns(out["concept_features"], batch["concept_ids"], batch["pairs"],
                                           len(image_features), args.dedupe)
        if args.npc_weight:
            terms["npc"] = npc_loss(image_features, concepts, labels, scale, bias)
        if args.xac_weight:
            terms["xac"] = xac_loss(concept_similarity(out["patch_tokens"], concepts), labels, scale, bias)
    weights = {"contrastive": 1.0, "npc": args.npc_weight, "xac": args.xac_weight}
    return {**terms, "loss": sum(weights[name] * term for name, term in terms.items())}


def forward(images, tokens, concept_tokens):
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        return network(images.to(model.logit_scale.dtype), tokens, concept_tokens, return_tokens=args.xac_weight > 0)


def backward(batch):
    """Leaves the gradient of the whole batch in the parameters and returns this process's loss terms.

    DDP averages gradients over processes, the losses are shares of a sum: hence world_size. With --accum the features
    of all parts come first, without a graph; then the loss of the whole batch and its gradient with respect to those
    features; then each part once more, with its piece of that gradient (GradCache, Gao et al. 2021). Exact.
    """
    inputs = [batch["images"], batch["tokens"], batch.get("concept_tokens")]
    if args.accum == 1:
        terms = losses(forward(*inputs), batch)
        (terms["loss"] * world_size).backward()
        return terms
    parts = list(zip(*([None] * args.accum if x is None else x.tensor_split(args.accum) for x in inputs)))
    with torch.no_grad():
        outs = [forward(*part) for part in parts]
    shared = ("logit_scale", "logit_bias")      # scalars, the same in every part
    leaves = {name: x if name in shared else torch.cat([out[name] for out in outs]) for name, x in outs[0].items()}
    leaves = {name: x if x is None else x.detach().requires_grad_() for name, x in leaves.items()}
    del outs
    terms = losses(leaves, batch)
    (terms["loss"] * world_size).backward()
    grads = {name: x.grad if name in shared else x.grad.tensor_split(args.accum)
             for name, x in leaves.items() if x is not None}
    for i, part in enumerate(parts):
        is_last = i == args.accum - 1
        with contextlib.nullcontext() if is_last or world_size == 1 else network.no_sync():
            out = forward(*part)
            sum((out[name] * (grad if name in shared else grad[i])).sum() for name, grad in grads.items()
                if is_last or name not in shared).backward()
    return terms


def summed(x):
    if world_size > 1:
        dist.all_reduce(x)
    return x


# -----------------------------------------------------------------------------
# evaluation, checkpoints, log

eval_args = evaluate.parser().parse_args([])
eval_args.__dict__.update(device=args.device, data=args.val_data, image_root=args.image_root, image_key=args.image_key,
                          caption_key=args.caption_key, allow_missing=True)
benches = ["retrieval"] if args.val_data else [] if args.data else ["scenes"]


def evaluation(step):
    """All ranks evaluate alike, so that none waits for another; one line now, the table at the end."""
    model.eval()
    results = guard(evaluate.run, benches, model, eval_args, quiet=True)
    model.train()
    for bench, subsets in results.items():
        print0(f"step {step}: {bench} " + "  ".join(f"{name} {100 * r['accuracy']:.1f}" for name, r in subsets.items()))
    log({"step": step, "eval": {bench: {name: {k: v for k, v in r.items() if k != "correct"}
                                         for name, r in subsets.items()} for bench, subsets in results.items()}})
    return results


def save(step):
    """Written under another name first: last.pt is always a whole checkpoint."""
    if rank == 0:
        torch.save({**model.checkpoint(), "optimizer": optimizer.state_dict(), "step": step, "args": vars(args)},
                   last + ".tmp")
        os.replace(last + ".tmp", last)


def log(row):
    if rank == 0:
        with open(os.path.join(args.out_dir, "log.jsonl"), "a") as f:
            f.write(json.dumps(row) + "\n")


try:
    os.makedirs(args.out_dir, exist_ok=True)
except OSError as error:
    stop(f"cannot write to --out-dir {args.out_dir}: {error.strerror}")
if rank == 0 and not args.resume:
    open(os.path.join(args.out_dir, "log.jsonl"), "w").close()
log({"args": vars(args), "config": {**asdict(model.config), "tokenizer": len(model.config.tokenizer)},
     "world_size": world_size, "torch": torch.__version__})
millions = sum(p.numel() for p in model.parameters()) / 1e6
print0(f"{model.config.name}, {millions:.1f} M parameters, {'sigmoid' if model.logit_bias is not None else 'softmax'} "
       f"loss, npc {args.npc_weight:g}, xac {args.xac_weight:g}; {len(dataset):,} rows, {args.steps:,} steps of "
       f"{args.batch_size}, {world_size} x {args.device} in {args.dtype}{', compiled' if use_compile else ''}")
if args.device == "cpu" and model.config.name != "nano":
    print0(f"SLOW: a {model.config.name} on a CPU takes seconds an image; use a GPU for more than a try")

# -----------------------------------------------------------------------------
# the loop

seen, bad, fallback, started, results = 0, 0, 0, time.time(), {}
bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=rank != 0, dynamic_ncols=True)
for step, batch in enumerate(loader, first_step):
    # rows that could not be read are reported, and few enough or the end
    seen, bad, fallback = seen + len(batch["keys"]), bad + len(batch["bad"]), fallback + batch["fallback"]
    for key, why in batch["bad"]:
        tqdm.write(f"skipped {key}: {why}")
        log({"step": step, "skipped": key, "error": why})
    if batch["bad"] and (bad > args.max_bad * max(seen + bad, min(len(dataset), 1000)) or not batch["keys"]):
        stop(f"{bad} of {seen + bad} rows could not be read, more than --max-bad {args.max_bad:g}; the last is "
             f"{batch['bad'][-1][0]}: {batch['bad'][-1][1]}. Check --image-root, or raise --max-bad")

    batch = {k: v.to(args.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    terms = backward(batch)
    state = summed(torch.tensor([float(not torch.isfinite(terms["loss"])), float(interrupted)], device=args.device))
    if state[0]:
        good = last if os.path.exists(last) else "none was written yet"
        if not torch.isfinite(terms["loss"]):
            stop(f"the loss is {terms['loss'].item()} at step {step}; the batch's first rows: "
                 f"{', '.join(batch['keys'][:8])}; last good checkpoint: {good}. Try a smaller --lr")
        time.sleep(5), sys.exit(1)      # another process has it, and says so
    done = step + 1
    log_now = done % args.log_every == 0 or done == args.steps
    if log_now:
        grad_norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():   # CLIP stops at 100; SigLIP ships 117, so its ceiling must not move it
        ceiling = max(math.log(100 if model.logit_bias is None else 1000), initial_scale)
        model.logit_scale.clamp_(0, ceiling)

    if log_now:
        values = dict(zip(terms, summed(torch.stack([t.detach() for t in terms.values()])).tolist()))
        rate = seen * world_size / (time.time() - started)
        bar.set_postfix_str(" ".join(f"{k} {v:.2f}" for k, v in values.items()) + f" {rate:.0f} img/s", refresh=False)
        row = {"step": done, **values, "grad_norm": grad_norm, "lr": learning_rate(step),
               "logit_scale": model.logit_scale.exp().item(),
               "logit_bias": None if model.logit_bias is None else model.logit_bias.item(),
               "images_per_second": rate, "skipped": bad, "own_concept": fallback}
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
    if done % args.save_every == 0 or done == args.steps:
        save(done)
    if benches and (done == args.steps or args.eval_every and done % args.eval_every == 0):
        results = evaluation(done)
else:
    bar.close()
    for bench in results if rank == 0 else ():
        evaluate.print_table(bench, results[bench])
    minutes = (time.time() - started) / 60
    bad, fallback = summed(torch.tensor([bad, fallback], device=args.device)).tolist()
    print0(f"\n{args.steps - first_step:,} steps in {minutes:.1f} minutes; wrote {last} and log.jsonl" +
           (f"; {bad} rows were skipped" if bad else "") +
           (f"; {fallback} captions, without another noun phrase in them, were their own concept" if fallback else ""))
    following = ("python train.py --npc-weight 0 --xac-weight 0     # the baseline, to compare" if with_concepts else
                 f"python evaluate.py --checkpoint {last} --bench {','.join(benches) or 'scenes'}")
    print0(f"next: {following}")
if world_size > 1:
    dist.destroy_process_group()
