"""Train or fine-tune CLIP and SigLIP with C2LIP's concept losses. One script, to be read downwards.

    python train.py                      a nano model from scratch on built-in scenes, in minutes
    python train.py --method siglip      the same without concepts: the plain contrastive baseline
    torchrun --nproc_per_node=8 train.py --model ViT-B-16-SigLIP --data pairs.csv --image-root DIR
                                         the paper's recipe

The number of processes changes nothing but the time: --batch-size is global, every loss and every
gradient is that of the whole batch, and the order of the data is a function of the seed alone.
"""
import argparse
import ast
import contextlib
import copy
import fcntl
import functools
import glob
import hashlib
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from dataclasses import asdict, replace
from datetime import timedelta

# In this order: arguments, processes and how they end, data, the checkpoint to go on from, model,
# optimizer and loader; one training step, evaluation, checkpoints, the log; and last the loop.
#
# To change something: a loss is a function and a row of METHODS in losses.py, and a term that any
# method may add a row of TERMS; what they read comes by INPUTS, OWN_OUTPUTS and OWN_ROWS below,
# into losses.Features. Another optimizer: "optimizer", and its size in check_folder. Another
# logger: log.

# ---- arguments -------------------------------------------------------------
# They are parsed before torch and timm are imported, which takes seconds: --help and a flag that
# does not exist answer at once.
PRESETS = {
    # from scratch on the scenes
    "nano": {
        "model": "nano", "steps": 900, "batch_size": 128, "lr": 2e-3, "weight_decay": 0.1,
        "beta2": 0.95, "warmup": 50, "dtype": "float32", "workers": 0, "eval_every": 150,
    },
    # the paper's recipe for SigLIP ViT-B/16 on CC3M, on 8 GPUs of 96 images
    "c2lip": {
        "model": "ViT-B-16-SigLIP", "epochs": 5, "batch_size": 768, "lr": 1e-5, "weight_decay": 0.1,
        "beta2": 0.98, "warmup": 50, "dtype": "bfloat16", "eval_every": 1000,
    },
}


def read_dict(file, name):
    """The keys, and the values that are plain texts, of the dict `name` in one of our files.

    The file is read and not imported, since it imports torch. So a method that is added to
    losses.py is known here.
    """
    folder = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(folder, file), encoding="utf-8") as f:
        statements = ast.parse(f.read()).body
    for statement in statements:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            table = statement.value
            return {key.value: getattr(value, "value", None)
                    for key, value in zip(table.keys, table.values)}
    raise ValueError(f"{file} has no dict {name}")


def flag_of(name):
    """The flag of an argument: --val-data of val_data."""
    return "--" + name.replace("_", "-")


def describe_preset(name):
    """For --help: "nano: model nano, steps 900, ..." """
    values = [f"{key.replace('_', '-')} {value}" for key, value in PRESETS[name].items()]
    return f"{name}: {', '.join(values)}."


TERMS = read_dict("losses.py", "TERMS")     # {term: what it does}
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    usage="python train.py [--method NAME] [--model NAME] [--data FILE] [more: see --help]")

group = parser.add_argument_group("what to train")
group.add_argument("--method", choices=read_dict("losses.py", "METHODS"), default="c2lip",
                   help="The losses; their terms are weighted as published. Default: c2lip.")
group.add_argument("--preset", choices=PRESETS,
                   help="Where the defaults of steps, batch size, rates and so on come from: nano "
                        "is for small models on the built-in scenes, c2lip is the paper's recipe "
                        "for fine-tuning. Default: nano for the nano models from scratch, else "
                        f"c2lip. {' '.join(map(describe_preset, PRESETS))}")
group.add_argument("--model", metavar="NAME",
                   help="The architecture, a name in MODELS of model.py, such as ViT-B-16-SigLIP. "
                        "Default: that of --init; nano without any.")
group.add_argument("--init", metavar="SOURCE",
                   help="The initial weights: a hub id, a folder, a file, or the word scratch for "
                        "random ones. Default: the model's public weights; random ones for the "
                        "nano models.")
group.add_argument("--tokenizer", metavar="FILE",
                   help="A tokenizer.json. Default: the one that comes with the weights; from "
                        "scratch, one is trained on the captions.")
group.add_argument("--freeze", choices=("none", "visual", "text"),
                   help="A tower whose weights stay as they are. Default: none (visual for "
                        "con_clip and clic, text for tecoa).")

group = parser.add_argument_group("data")
group.add_argument("--data", metavar="FILES",
                   help="Image-caption pairs: .csv, .tsv or .jsonl tables, .json of COCO or "
                        "Karpathy, or tar shards such as 'cc3m/{00000..00331}.tar'; several joined "
                        "by '::'. Default: the built-in scenes.")
group.add_argument("--data-weights", metavar="W,W",
                   help="How often an epoch shows the rows of each source in --data: with 1,2 "
                        "those of the second twice, with 1,0.5 one half of them, and in the next "
                        "epoch the other half. Default: each row once.")
group.add_argument("--image-root", default="", metavar="DIR",
                   help="The folder that the image paths of --data are relative to.")
group.add_argument("--image-key", metavar="COLUMN",
                   help="The column of image paths. Default: image, image_path, filepath, and "
                        "other usual names.")
group.add_argument("--caption-key", metavar="COLUMN",
                   help="The column or json key of captions; of several, joined by commas, each "
                        "epoch draws one. Default: caption, title, text, and other usual names.")
group.add_argument("--captions", metavar="TABLE",
                   help="A table of other captions for the images of tar shards, joined by key or "
                        "url.")
group.add_argument("--replay", metavar="FILES",
                   help="For gift: pairs of what the model knows and is to keep, in the formats of "
                        "--data, whose other flags but --captions hold for them, too. Default: "
                        "scenes of another seed, where scenes are the data.")
group.add_argument("--index-dir", metavar="DIR",
                   help="The folder of the indices of --data, which are made once for each set of "
                        "keys and captions. One is about 1.4 times as large as its table, and may "
                        "be deleted when no run uses it. Default: beside each file, or your cache "
                        "folder where that cannot be written.")
group.add_argument("--world", choices=("small", "large", "crowded", "many"), default="small",
                   help="Scenes only: small shows two objects of 8 colours and 6 shapes, large "
                        "three of 12 and 12, so that near misses are rare, crowded four of those, "
                        "of which captions name three, many six smaller ones, of which captions "
                        "name three, for --model nano-48. Default: small.")
group.add_argument("--relations", type=float, default=0.0, metavar="SHARE",
                   help="Scenes only: the share of captions that say where the objects are. "
                        "Default: 0.")
group.add_argument("--max-bad", type=float, default=0.01, metavar="SHARE",
                   help="Training stops when more than this share of the rows cannot be read. "
                        "Default: 0.01.")
group.add_argument("--max-pixels", type=int, metavar="N",
                   help="Images with more pixels are bad rows, and are not decoded. Default: 89 "
                        "million, at which pillow warns.")
group.add_argument("--exact-decode", action="store_true",
                   help="Decode JPEGs with pillow, as evaluation does. Default: with torchvision, "
                        "about twice as fast, and off by a few levels in 255 at most.")
group.add_argument("--workers", type=int, metavar="N",
                   help="Processes that read and prepare data, for each process that trains. "
                        "Default: one for each core that it has, 16 at most; 0 for the nano "
                        "preset.")

group = parser.add_argument_group("losses")
group.add_argument("--loss", choices=("siglip", "clip"),
                   help="Sigmoid (siglip) or softmax (clip). Default: the one that the weights "
                        "were trained with.")
for term, text in TERMS.items():
    group.add_argument(flag_of(f"{term}_weight"), type=float, metavar="W",
                       help=f"{text} Default: what --method gives it, and 0 for other methods.")
group.add_argument("--caption-xac-sentences", type=int, default=0, metavar="N",
                   help="For --caption-xac-weight: a caption of several sentences also gives so "
                        "many of them, drawn anew in each epoch, each as a text of its own, which "
                        "is a positive for all images whose captions hold it. Default: 0.")
group.add_argument("--no-dedupe", dest="dedupe", action="store_false",
                   help="A phrase is a positive only for the caption it was found in, and a "
                        "negative for others that hold the same phrase, as in the code that the "
                        "paper's authors released.")
group.add_argument("--concept-count", choices=("different", "all"), default="different",
                   help="What the sigmoid form of the concept losses is divided by: the number of "
                        "different phrases in the batch, or of all (image, phrase) pairs. A large "
                        "batch repeats more phrases, so that with the first each pair weighs more. "
                        "Default: different.")
group.add_argument("--concept-features", choices=("phrase", "span"), default="phrase",
                   help="phrase: each phrase is encoded by itself. span: its feature is the mean "
                        "over its tokens within the caption. Default: phrase.")
group.add_argument("--attack-steps", type=int, metavar="N",
                   help="Train on images that an attack of so many steps (projected gradient "
                        "descent on the pixels, each step 1 of 255) has turned away from their "
                        "captions. Default: no attack; 2 for tecoa.")
group.add_argument("--attack-epsilon", type=float, default=1.0, metavar="E",
                   help="How far the attack may change a pixel, of 255. Default: 1.")
group.add_argument("--ema", type=float, metavar="DECAY",
                   help="Keep an average of the weights over the steps, evaluate it as well, and "
                        "take it as the teacher of degla, gift and --distill-weight. "
                        "Default: no average, and the initial weights teach; 0.9996 for degla.")

group = parser.add_argument_group("optimization")
group.add_argument("--steps", type=int, metavar="N", help="Train for so many batches ...")
group.add_argument("--epochs", type=float, metavar="N",
                   help="... or for so many passes over the data.")
group.add_argument("--batch-size", type=int, metavar="N",
                   help="Images in a batch, summed over all processes: at most, as an epoch is cut "
                        "into equal batches.")
group.add_argument("--accum", type=int, default=1, metavar="N",
                   help="Compute a batch in so many parts, one after the other, to save memory. "
                        "The result is the same; it costs a second forward pass. Default: 1.")
group.add_argument("--lr", type=float, metavar="RATE",
                   help="The highest learning rate, after the warm-up; from there it decays to 0 "
                        "as a cosine.")
group.add_argument("--warmup", type=int, metavar="N",
                   help="Steps in which the learning rate rises from 0 to --lr.")
group.add_argument("--weight-decay", type=float, metavar="W",
                   help="Of all matrices and position embeddings; biases, norms, scalars and the "
                        "class token have none.")
group.add_argument("--beta2", type=float, metavar="B",
                   help="Decay of AdamW's second moments. Its first decay is 0.9, its epsilon "
                        "1e-6.")
group.add_argument("--grad-clip", type=float, default=math.inf, metavar="NORM",
                   help="Scale the gradient down to this norm where it is larger. Default: never.")
group.add_argument("--max-skips", type=int, default=3, metavar="N",
                   help="A step whose loss or gradient is not finite is left out; training stops "
                        "after more than so many in a row. Default: 3.")
group.add_argument("--seed", type=int, default=0, metavar="N",
                   help="Of the initial weights, the order of the data and its augmentation. "
                        "Default: 0.")

group = parser.add_argument_group("evaluation")
group.add_argument("--val-data", metavar="FILES",
                   help="Held-out pairs, in the formats of --data: retrieval is evaluated on them.")
group.add_argument("--val-image-root", metavar="DIR",
                   help="The folder that its image paths are relative to. Default: --image-root.")
group.add_argument("--val-image-key", metavar="COLUMN",
                   help="Its column of image paths. Default: --image-key.")
group.add_argument("--val-caption-key", metavar="COLUMN",
                   help="Its column of captions. Default: --caption-key.")
group.add_argument("--bench", metavar="NAMES",
                   help="Benchmarks of evaluate.py to run, joined by commas, or the word none. "
                        "Default: scenes, where those are the training data.")
group.add_argument("--data-dir", default="data", metavar="DIR",
                   help="The folder of the benchmarks' files. Default: data.")
group.add_argument("--eval-every", type=int, metavar="N",
                   help="Steps between evaluations, the best of which is kept in best.pt; 0: only "
                        "at the end.")

group = parser.add_argument_group("checkpoints and the log")
group.add_argument("--out-dir", metavar="DIR",
                   help="The folder of last.pt, best.pt and log.jsonl. Default: out/MODEL-METHOD, "
                        "for c2lip out/MODEL.")
group.add_argument("--resume", metavar="FILE",
                   help="Go on from this checkpoint. The word auto: from the newest in --out-dir "
                        "that is whole, if there is one.")
group.add_argument("--overwrite", action="store_true",
                   help="Discard the run that --out-dir holds; without this flag, training does "
                        "not begin in the folder of another run.")
group.add_argument("--save-every", type=int, default=1000, metavar="N",
                   help="Steps between checkpoints. Default: 1000.")
group.add_argument("--keep", type=int, default=1, metavar="N",
                   help="How many of the newest checkpoints stay as step_*.pt; 1: only last.pt. "
                        "Default: 1.")
group.add_argument("--log-every", type=int, default=10, metavar="N",
                   help="Steps between lines of log.jsonl. Default: 10.")
group.add_argument("--tensorboard", action="store_true",
                   help="Write the numbers of log.jsonl for TensorBoard, too (pip install "
                        "tensorboard).")

group = parser.add_argument_group("the machine")
group.add_argument("--device", metavar="NAME",
                   help="cpu, cuda or cuda:1. Default: cuda, if there is one.")
group.add_argument("--timeout", type=float, default=5, metavar="MINUTES",
                   help="How long a process waits for the others in a step. Then one of them hangs "
                        "or has died: process 0 saves if it can (under NCCL it may not), and all "
                        "end. Default: 5.")
group.add_argument("--dtype", choices=("float32", "bfloat16", "float64", "pure-bfloat16"),
                   help="What the towers compute in; the weights stay float32 under bfloat16. "
                        "With pure-bfloat16 they are bfloat16 too, as in C2LIP's released code: "
                        "an update of less than half a step of bfloat16 is lost. "
                        "Default: float32 on a CPU, the preset's on a GPU.")
group.add_argument("--compile", action=argparse.BooleanOptionalAction,
                   help="torch.compile the towers. Default: on GPUs.")
group.add_argument("--grad-checkpointing", action="store_true",
                   help="Compute the activations of each block again in the backward pass instead "
                        "of keeping them: a third slower, in less memory.")
group.add_argument("--dry-run", action="store_true",
                   help="Check files, weights and one batch, print the plan, and train nothing.")
args = parser.parse_args()
if args.steps is not None and args.epochs is not None:
    parser.error("--steps and --epochs are two ways to say how long: give one of them")
for name, value in vars(args).items():
    if value == "" and name not in ("image_root", "val_image_root"):    # the folder of this command
        parser.error(f"{flag_of(name)} is empty, as where a variable of the shell is not set: give "
                     "it a value, or leave the flag out")
if args.data_weights is not None and not args.data:
    parser.error("--data-weights weighs the sources of --data: give both, or none of them")

# ---- what takes long to import ---------------------------------------------
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # spinning threads starve other processes

import timm
import tokenizers
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import evaluate
from concepts import string_id
from data import (ORDER, CaptionFile, Collate, Epochs, EveryOther, Scenes, Seeded,
                  default_workers, normalize_images, normalize_pixels, train_tokenizer,
                  train_transform, unnormalize_images, weigh_sources)
from losses import (EXTRA_TERMS, METHODS, Features, awc_loss, extra_terms, fisher_weights,
                    gather_features, gather_together, pgd_attack, plan_batch, tecoa_loss)
from model import CLIP, MODELS, no_decay, read_tokenizer, set_tokenizer
from pooling import concept_similarity, token_similarity

# ---- what was not given ----------------------------------------------------
if args.device is None:
    args.device = "cuda" if torch.cuda.is_available() else "cpu"


def choose_device(name):
    """Its torch.device. A GPU becomes the current one: under torchrun each process has its own."""
    device = torch.device(name)
    if device.type == "cuda":
        own = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(own if device.index is None else device.index)
    torch.empty(1, device=device)
    return device


try:
    gpu = choose_device(args.device).type == "cuda"
except (RuntimeError, AssertionError) as error:
    reason = str(error).splitlines()[0]
    parser.exit(1, f"train.py: --device {args.device} cannot be used here ({reason}): give cpu\n")

is_nano = args.model in (None, "nano", "nano-48")
from_scratch = args.init == "scratch" or (args.init is None and is_nano)
if args.preset is None:
    args.preset = "nano" if from_scratch and is_nano else "c2lip"
preset = dict(PRESETS[args.preset])
if args.init and not from_scratch:
    del preset["model"]     # the weights say what they are
if args.steps is not None or args.epochs is not None:
    preset.pop("steps", None)   # either of them replaces the preset's choice of the two
    preset.pop("epochs", None)
if not gpu:
    preset["dtype"] = "float32"     # several times as fast as bfloat16 on most CPUs

method = METHODS[args.method]
for name, value in {"freeze": "none", **preset, **method.defaults}.items():
    if getattr(args, name) is None:
        setattr(args, name, value)
term_weights = {"contrastive": 1.0, **dict.fromkeys(TERMS, 0.0), **method.weights}
allowed_terms = {*method.weights, *EXTRA_TERMS}
for term in TERMS:
    name = f"{term}_weight"
    if getattr(args, name) is None:
        setattr(args, name, term_weights[term])
    term_weights[term] = getattr(args, name)
    if not 0 <= term_weights[term] < math.inf:
        parser.error(f"{flag_of(name)} {term_weights[term]:g}: expected a number of at least 0")
    if term_weights[term] and term not in allowed_terms:
        parser.error(f"{flag_of(name)} {term_weights[term]:g}: --method {args.method} has no such "
                     f"term. It takes {', '.join(sorted(allowed_terms))}")
args.negatives = method.negatives       # for the log

with_concepts = term_weights["npc"] > 0 or term_weights["xac"] > 0
with_paraphrases = term_weights["paraphrase"] > 0
with_words = method.words and term_weights["lhn"] > 0
with_patches = term_weights["xac"] > 0 or term_weights["caption_xac"] > 0 or with_words
with_teacher = method.teacher or term_weights["distill"] > 0
with_pairs = method.negatives == "pairs"        # in every other batch
if with_teacher and args.ema is None:
    args.ema = 1.0      # an average that never moves: the initial weights
averages = args.ema is not None and args.ema < 1
if args.compile is None:
    args.compile = gpu
if args.workers is None:
    args.workers = default_workers()

if args.out_dir is None:
    folder = args.model or re.sub(r"\W+", "-", args.init).strip("-")
    if args.method != "c2lip":
        folder += f"-{args.method}"
    elif not with_concepts:
        folder += "-baseline"
    args.out_dir = os.path.join("out", folder)
last_path = os.path.join(args.out_dir, "last.pt")
best_path = os.path.join(args.out_dir, "best.pt")
ema_path = os.path.join(args.out_dir, "ema.pt")
log_path = os.path.join(args.out_dir, "log.jsonl")

# ---- what cannot be done ---------------------------------------------------
if args.init in MODELS and not os.path.exists(args.init):
    parser.error(f"--init {args.init} is the name of a model: give --model {args.init}, whose "
                 "public weights are the default")
if args.model is not None and args.model not in MODELS:
    parser.error(f"argument --model: invalid choice: {args.model!r} (choose from "
                 f"{', '.join(MODELS)})")
POSITIVE = ("steps", "epochs", "batch_size", "accum", "lr", "save_every", "log_every", "keep",
            "timeout", "attack_steps", "attack_epsilon", "max_pixels", "grad_clip")
# Those that may be 0, and the largest value of each.
FROM_ZERO = {"weight_decay": math.inf, "warmup": math.inf, "workers": math.inf,
             "max_skips": math.inf, "eval_every": math.inf, "caption_xac_sentences": math.inf,
             "max_bad": 1, "relations": 1, "ema": 1, "beta2": 0.99999, "seed": 2**32 - 1}
for name in POSITIVE:
    value = getattr(args, name)
    is_default = value == parser.get_default(name)      # --grad-clip has infinity
    if not is_default and not 0 < value < math.inf:
        parser.error(f"{flag_of(name)} {value}: expected a number above 0")
for name, largest in FROM_ZERO.items():
    value = getattr(args, name)
    if value is not None and not 0 <= value <= largest:
        limits = "of at least 0" if largest == math.inf else f"from 0 to {largest}"
        parser.error(f"{flag_of(name)} {value}: expected a number {limits}")
for name, value in vars(args).items():
    if isinstance(value, float) and math.isnan(value):
        parser.error(f"{flag_of(name)} nan: expected a number")

if args.caption_xac_sentences > 0 and not term_weights["caption_xac"]:
    parser.error(f"--caption-xac-sentences {args.caption_xac_sentences}: sentences are for the "
                 "term that --caption-xac-weight adds: give it a weight above 0")
if args.replay and not method.replay:
    parser.error(f"--replay {args.replay}: --method {args.method} has no use for it, gift has")
if args.captions and not args.data:
    parser.error(f"--captions {args.captions} is for the images of --data: give both")
for name in ("image_root", "image_key", "caption_key"):
    if getattr(args, name) and not (args.data or args.replay or args.val_data):
        parser.error(f"{flag_of(name)} {getattr(args, name)} is for files, and scenes are drawn: "
                     "give --data")
for name in ("world", "relations"):
    if args.data and getattr(args, name) != parser.get_default(name):
        parser.error(f"{flag_of(name)} {getattr(args, name)} is for scenes, not for --data")
if args.bench == "none" and args.val_data:
    parser.error("--bench none evaluates nothing, and --val-data is for evaluation: give one of "
                 "them")
benches = []
if args.bench is None and not args.data:
    benches = ["scenes" if args.world == "small" else f"scenes_{args.world}"]
elif args.bench and args.bench != "none":
    benches = args.bench.split(",")
if args.val_data and "retrieval" not in benches:
    benches.append("retrieval")
unknown = [name for name in benches if name not in evaluate.BENCHES]
if unknown:
    parser.error(f"--bench {','.join(unknown)}: expected some of {', '.join(evaluate.BENCHES)}, "
                 "joined by commas")
if method.replay and not (term_weights["cd"] > 0 or term_weights["ita"] > 0):
    parser.error(f"--method {args.method} without --cd-weight and --ita-weight learns nothing from "
                 "--replay: give one of them a weight above 0")

# ---- processes and randomness ----------------------------------------------
missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
           if name not in os.environ]
if int(os.environ.get("WORLD_SIZE", 1)) > 1 and missing:
    parser.exit(1, f"train.py: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} "
                "is not set: start processes with torchrun, or unset WORLD_SIZE for one\n")
PATIENT = 120       # minutes that a process waits for others that index data, compile or evaluate
rank = int(os.environ.get("RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))
if world_size > 1:
    # torchrun's store keeps the addresses of dead workers over --max-restarts, so each attempt gets
    # keys of its own. Several nodes count their attempts apart, and cannot.
    attempt = ""
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    store, _, _ = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=world_size,
        timeout=timedelta(minutes=PATIENT))
torch.manual_seed(args.seed)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
sys.stdout.reconfigure(line_buffering=True)     # a log file has each line at once


def print0(text):
    if rank == 0:
        tqdm.write(text)


def summed(x):
    """The sum of a tensor over all processes."""
    if world_size > 1:
        dist.all_reduce(x)
    return x


def from_process_0(function):
    """What the function returns there, on all processes; its error ends all, with one line."""
    answer, error = None, None
    if rank == 0:
        try:
            answer = function()
        except (ValueError, OSError) as problem:
            error = str(problem)
    if world_size > 1:
        shared = [answer, error]
        dist.broadcast_object_list(shared)
        answer, error = shared
    if error is not None:
        stop_all(error)
    return answer


def wait_for_others(minutes):
    """How long this process waits for the others from now on, before it takes one as hung."""
    if world_size > 1:
        # PyTorch before 2.9 has it under the second name alone
        set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
        set_timeout(timedelta(minutes=minutes))


def torchrun_set_threads():
    """Whether torchrun set OMP_NUM_THREADS to 1, as it does where the user has not set it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("OMP_NUM_THREADS") != "1":
        return False
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as f:      # what torchrun itself was given
            given = f.read().split(b"\0")
    except OSError:
        return True
    return not any(variable.startswith(b"OMP_NUM_THREADS=") for variable in given)


if torchrun_set_threads():
    cores = default_workers()
    torch.set_num_threads(cores)
    if cores > 1:
        print0(f"{cores} threads a process, as many as it has cores, instead of the one that "
               "torchrun sets; OMP_NUM_THREADS in the environment is kept")


# ---- how it ends -----------------------------------------------------------
bar = None      # of progress, once training has begun


def stop(message, status=1):
    """End at once, with one line for the user; torchrun ends the other processes with this one."""
    if bar is not None:
        bar.close()     # else the message would be glued to it
    print(f"train.py: {message}", file=sys.stderr, flush=True)
    os._exit(status)


def stop_all(message, status=1):
    """The same, where all processes call it at once: process 0 says it."""
    if rank == 0:
        stop(message, status)
    time.sleep(3)
    os._exit(status)


def guard(function, *arguments, **keywords):
    """Call it; an error that the user can mend, which its text says, becomes that one line."""
    try:
        return function(*arguments, **keywords)
    except (ValueError, OSError, ImportError) as error:
        stop(error)


WORKER_DIED = ("a process that reads data was killed, most often for want of memory: give fewer "
               "--workers")


@contextlib.contextmanager
def errors_in_a_line():
    """Around a step or an evaluation: what a user can understand of an error becomes one line, once
    the last whole step is saved."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        why = explanation(error)
        if why is None:
            raise
        saved_words = save_what_is_done()
        if interrupted and why == WORKER_DIED:      # in an evaluation: the signal came to all
            stop(f"interrupted. {saved_words}", 0)
        stop(f"{why}. {saved_words}")


def explanation(error):
    """What a user can understand of an error, or None."""
    # a worker that died while it sent a batch only leaves a connection that is broken
    if isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker (pid" in str(error):
        return WORKER_DIED
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return ("the GPU has too little memory for this batch: give --accum 2 or more, or "
                "--grad-checkpointing, which change no figure, or a smaller --batch-size")
    # the exchange with a process that hangs or has died
    if isinstance(error, dist.DistError) or (world_size > 1 and "gloo" in str(error)):
        reason = " ".join(str(error).split())[-100:]
        return (f"process {rank} waited in vain for another one, which has died or did not answer "
                f"within --timeout {args.timeout:g} minutes ({reason})")
    return None


def end():
    """Ends the process, with status 0.

    The interpreter's own end would wait for ever for the loader's workers, which ignore SIGTERM, by
    which it ends them. With gloo's threads it aborts now and then.
    """
    if world_size > 1:
        dist.destroy_process_group()
    if world_size > 1 or args.workers:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)     # the workers see within five seconds that they are alone, and end
    sys.exit()


# ---- signals ---------------------------------------------------------------
start_step = 0          # of this run: that of the checkpoint it goes on from
done = 0                # the last whole step
interrupted = []        # signals that came
noticed = threading.Event()     # set when the loop has reached the end of a step, and saves
DEADLINE = 30           # seconds


def interrupt(number, frame):
    # print() could meet itself here
    if done == start_step:
        os.write(2, b"\ntrain.py: ended before its first step: there is nothing to save\n")
    elif rank == 0 and not interrupted:
        os.write(2, b"\nsaving after this step; again to quit now\n")
    if interrupted or done == start_step:
        os._exit(128 + number)
    interrupted.append(number)


def watch_for_signals(reader):
    """Ends this process if a signal came, and the step does not end: it waits for one that hangs.

    A process that waits for others runs no Python, hence no handler; but this thread runs.
    """
    while reader.recv(1)[0] not in (signal.SIGTERM, signal.SIGINT):
        pass
    if not noticed.wait(DEADLINE):
        print(f"\ntrain.py: process {rank} was told to end, but its step did not end within "
              f"{DEADLINE} s; last checkpoint: {last_good()}", file=sys.stderr, flush=True)
        os._exit(1)


def last_good():
    return last_path if os.path.exists(last_path) else "none was written yet"


signal.signal(signal.SIGTERM, interrupt)
signal.signal(signal.SIGINT, interrupt)
if world_size > 1:
    signal_reader, signal_writer = socket.socketpair()
    signal_writer.setblocking(False)
    signal.set_wakeup_fd(signal_writer.fileno())
    threading.Thread(target=watch_for_signals, args=(signal_reader,), daemon=True).start()


# ---- data ------------------------------------------------------------------
def check_lost(dataset):
    """Stops where a file has too many rows that are of no use."""
    lost = getattr(dataset, "lost_rows", 0)
    row_count = len(dataset) + lost
    if lost > args.max_bad * row_count:
        name, why = dataset.skipped[0]
        stop(f"{lost:,} of {row_count:,} rows could not be read, more than --max-bad "
             f"{args.max_bad:g}; the first is {name}: {why}. Mend the file, or raise --max-bad")


def open_pairs(files, captions=None):
    return CaptionFile(files, args.image_root, args.image_key, args.caption_key, captions,
                       max_pixels=args.max_pixels, fast_decode=not args.exact_decode,
                       index_dir=args.index_dir)


content = None      # of --data: the number of rows, and a digest of the first captions
if args.data:
    dataset = guard(open_pairs, args.data, args.captions)
    check_lost(dataset)
    first_rows = [dataset.sample(index) for index in range(min(len(dataset), 1000))]
    first_captions = json.dumps([row["captions"] for row in first_rows])
    content = [len(dataset), hashlib.sha256(first_captions.encode()).hexdigest()[:16]]
else:
    scene_count = args.steps * args.batch_size if args.steps else 100_000
    dataset = Scenes(scene_count, "train", args.seed, relations=args.relations,
                     negative_images=method.negative_images, world=args.world)
if with_paraphrases and args.data:
    with_several = sum(len(set(row["captions"])) > 1 for row in first_rows)
    if not with_several and len(first_rows) == len(dataset):
        stop(f"--paraphrase-weight {args.paraphrase_weight:g}: none of the "
             f"{len(first_rows):,} rows of {args.data} has two captions (rows of one image are not "
             "joined): name several columns, --caption-key A,B, or put json lists into one")
    print0(f"{with_several:,} of the first {len(first_rows):,} rows have a second caption")
if method.negative_images and args.data:
    with_image = sum("negative_image" in row for row in first_rows)
    print0(f"{with_image:,} of the first {len(first_rows):,} rows have a negative_image, a path")
    if not with_image:
        print0(f"{args.method} trains without any negative image")


def open_replay():
    """The pairs of which each step has a second batch, if the method has one."""
    if not method.replay:
        return None
    if args.replay:
        return open_pairs(args.replay)
    if args.data:
        raise ValueError(f"--method {args.method} needs --replay FILES, pairs of what the model "
                         "knows and is to keep: real ones, or captions with generated images")
    return Scenes(len(dataset), "train", args.seed + 1, world=args.world)


replay = guard(open_replay)
if replay is not None:
    check_lost(replay)
    if len(replay) < world_size * args.accum:
        stop(f"--replay {args.replay} has {len(replay)} rows, fewer than {world_size} processes x "
             f"--accum {args.accum}", 2)
weighed = None      # rows of each source, and how many of them an epoch shows
if args.data_weights is not None:
    weighed = guard(weigh_sources, dataset.source_sizes, args.data_weights)
sampler = guard(Epochs, len(dataset), args.batch_size, args.seed, rank, world_size,
                sources=weighed)
if args.batch_size < world_size * args.accum:
    stop(f"--batch-size {args.batch_size} is less than {world_size} processes x --accum "
         f"{args.accum}", 2)
if args.steps is None:
    args.steps = max(1, round(args.epochs * sampler.steps_per_epoch))

# ---- which checkpoint to resume --------------------------------------------
def kept_checkpoints():
    """The step_*.pt in the folder, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(args.out_dir), "step_*.pt")))


def checkpoints():
    """All that a run can go on from, the newest last."""
    found = kept_checkpoints()
    if os.path.exists(last_path):
        found.append(last_path)
    return found


def damage(path):
    """What is wrong with a checkpoint, or None. Each part of the file has a checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
    except Exception as error:      # damaged headers raise nearly anything
        return f"{type(error).__name__}: {error}"
    return f"its part {changed} has changed" if changed else None


held_folder = None      # --out-dir, open, while this run holds it


def hold_folder():
    """Keeps other runs out of --out-dir, if it is there, until this process ends, be it by a kill.

    Two runs in one folder would mix their logs, and each overwrite what the other has saved.
    """
    global held_folder
    if held_folder is not None or args.dry_run or not os.path.isdir(args.out_dir):
        return
    held_folder = os.open(args.out_dir, os.O_RDONLY)
    # Else a worker that outlives this process by some seconds would hold it on.
    os.register_at_fork(after_in_child=functools.partial(os.close, held_folder))
    try:
        fcntl.flock(held_folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is training in {args.out_dir}: wait for its end, or choose "
                         "another --out-dir") from None
    except OSError:
        pass        # not every file system has locks of folders: NFS has none


def choose_checkpoint():
    """The path of the checkpoint to go on from; None: a new run. ValueError for neither."""
    found = checkpoints()
    products = [path for path in (best_path, ema_path) if os.path.exists(path)]
    if products and not found and not args.overwrite and not args.dry_run:
        raise ValueError(
            f"{args.out_dir} holds {os.path.basename(products[0])} of a run, without a checkpoint "
            "to go on from: choose another --out-dir, or discard it (--overwrite)")
    if args.resume is None:
        if found and not args.overwrite and not args.dry_run:
            raise ValueError(
                f"{args.out_dir} holds a run already, the newest checkpoint is {found[-1]}: go on "
                "with it (--resume auto), choose another --out-dir, or discard it (--overwrite)")
        return None
    if args.resume != "auto":
        check_choice(args.resume, found)
        return args.resume
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            return path
        print0(f"--resume auto passes over {path}, which is damaged ({problem})")
    if found and not args.overwrite:
        raise ValueError(f"--resume auto: no checkpoint in {args.out_dir} is whole; to begin anew "
                         "there, discard them (--overwrite)")
    return None


def check_choice(path, found):
    """Of a checkpoint that the user named; ValueError if going on from it would lose another."""
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint at {path}")
    problem = damage(path)
    if problem is not None and zipfile.is_zipfile(path):
        raise ValueError(f"--resume {path}: the file is damaged ({problem})")
    if not found or args.overwrite or os.path.samefile(path, found[-1]):
        return
    raise ValueError(
        f"--resume {path} is not the newest checkpoint in {args.out_dir}, which is {found[-1]}: "
        "choose another --out-dir, or discard what is newer (--overwrite)")


# A run that goes on with other arguments would be neither the old run nor a new one. So a new flag
# needs no entry here, unless it may differ.
MAY_CHANGE = {      # these may differ,
    "lr", "warmup", "steps", "epochs", "grad_clip", "max_skips", "max_bad", "eval_every",
    "save_every", "log_every", "keep", "bench", "val_data", "data_dir", "tensorboard",
    "image_root", "workers", "accum", "device", "dtype", "compile", "grad_checkpointing", "timeout",
    "max_pixels", "index_dir", "val_image_root", "val_image_key", "val_caption_key"}
SILENT = {          # and these say where weights came from, or what else this command does
    "model", "init", "preset", "tokenizer", "resume", "out_dir", "overwrite", "dry_run"}


def read_header(path):
    """Step, arguments and config of a checkpoint, without its tensors."""
    try:
        header = torch.load(path, mmap=True, weights_only=True)
        name, step, saved_args = header["config"]["name"], header["step"], header["args"]
    except Exception:       # of torch, nearly any
        stop_all(f"no checkpoint at {path} that train.py wrote (--init reads weights of others)")
    if "optimizer" not in header:
        stop_all(f"--resume {path} holds weights but no optimizer: to start from them, give "
                 f"--init {path}")
    if header.get("order") != ORDER and step > 0:
        stop_all(f"--resume {path}: an earlier version made it, whose order of rows this version "
                 f"cannot continue: give it as --init {path}, or train on with that version")
    check_content(path, header)
    return name, step, saved_args


def check_content(path, header):
    """Stops where --data has other rows than a checkpoint was trained on."""
    was = header.get("content", content)    # older checkpoints do not say
    if was == content or args.data != header["args"].get("data"):
        return      # other files are reported as such
    rows = f"{was[0]:,} rows, now {content[0]:,}"
    if was[0] == content[0]:
        rows = "the same number of rows, with other captions"
    stop_all(f"--resume {path}: {args.data} has changed, it had {rows}: go on with what it was, or "
             f"begin a new run from its weights, --init {path}")


def compare_arguments(saved_args):
    """Stops where an argument is not the checkpoint's. Returns those that may differ, and do."""
    allowed = []
    for name, value in vars(args).items():
        # An older checkpoint knows fewer, and was trained without what it does not know.
        without = 0.0 if name.endswith("_weight") else parser.get_default(name)
        was = saved_args.get(name, without)
        if was == value or name in SILENT:
            continue
        if name not in MAY_CHANGE:
            stop_all(f"--resume {args.resume} was trained with {flag_of(name)} {was}, now it is "
                     f"{value}: go on with what it had, or begin a new run from its weights, "
                     f"--init {args.resume}")
        allowed.append(f"{flag_of(name)} {value} instead of {was}")
    return allowed


def digest(path):
    """Of a checkpoint, by the checksums of its parts; of a new run None."""
    if path is None:
        return None
    if not os.path.exists(path):
        return f"no file {path}"
    with zipfile.ZipFile(path) as archive:
        parts = [(part.filename, part.CRC) for part in archive.infolist()]
    return f"{path} with digest {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


# what each process or node may have of its own
OWN = {"device", "workers", "out_dir", "data_dir", "image_root", "val_image_root", "index_dir"}


def check_agreement():
    """Each node has its own command line and disk: stops where one differs from process 0."""
    mine = {flag_of(name): value for name, value in vars(args).items() if name not in OWN}
    mine["the number of rows"] = len(dataset)
    mine["captions with digest"] = content and content[1]
    mine["--resume"] = digest(args.resume)
    theirs = [None] * world_size
    dist.all_gather_object(theirs, mine)
    for name, value in theirs[0].items():
        if mine[name] != value:
            print(f"train.py: process {rank} has {name} {mine[name]}, process 0 has {value}: they "
                  "must be the same", file=sys.stderr, flush=True)
            break
    if any(other != theirs[0] for other in theirs):
        time.sleep(1)       # for the others to say theirs
        os._exit(1)


from_process_0(hold_folder)
args.resume = from_process_0(choose_checkpoint)
if world_size > 1:
    check_agreement()
if args.resume:
    saved_name, start_step, saved_args = read_header(args.resume)
    done = start_step
    if args.model and args.model != saved_name:
        stop_all(f"--resume {args.resume} holds a {saved_name}, but --model is {args.model}: give "
                 "that model")
    changed = compare_arguments(saved_args)
    if args.steps < start_step:
        stop_all(f"--steps {args.steps}: {args.resume} is at step {start_step:,} already")
    print0(f"resuming {args.resume} at step {start_step:,} of {args.steps:,}")
    for difference in changed:
        print0(f"with {difference}")
sampler.start = start_step
sampler.stop = args.steps

# ---- model -----------------------------------------------------------------
def model_from_scratch():
    config = replace(MODELS[args.model])
    if args.tokenizer:
        config.tokenizer = read_tokenizer(args.tokenizer)
        return CLIP(config)
    # Every process trains the same tokenizer. The captions set the context length, since SigLIP
    # attends to its padding.
    if args.data:
        captions = dataset.captions
    else:
        scenes = Scenes(2000, "train", args.seed, relations=args.relations, world=args.world)
        captions = [scene["caption"] for scene in scenes]
    config.tokenizer, config.vocab_size, longest = train_tokenizer(captions)
    together = 2 if with_pairs else 1       # so many captions in one text
    config.context_length = min(together * config.context_length,
                                4 * math.ceil(together * longest / 4))
    config.text_clean = "canonicalize"
    config.pad_id = 0
    return CLIP(config)


if args.resume:
    model = guard(CLIP.load, args.resume)
elif from_scratch:
    model = guard(model_from_scratch)
else:
    model = guard(CLIP.from_pretrained, args.init, args.model)
    if args.tokenizer:
        model = guard(set_tokenizer, model, args.tokenizer)
for drawn in (dataset, replay):
    if isinstance(drawn, Scenes):
        drawn.image_size = model.config.image_size      # as evaluate.py draws them
if args.loss == "clip":
    model.logit_bias = model.config.logit_bias = None   # unused, it would be an error under DDP
elif args.loss == "siglip" and model.logit_bias is None:
    model.config.logit_bias = -10.0
    model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
weights_dtype = {"float64": torch.float64, "pure-bfloat16": torch.bfloat16}
model.to(args.device, weights_dtype.get(args.dtype, torch.float32)).train()
initial_scale = model.logit_scale.item()

teacher = None      # an average of the weights
if args.ema is not None:
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    if averages and args.dtype == "pure-bfloat16":
        teacher.float()     # in bfloat16 nearly all of its steps would be lost

model.visual.set_grad_checkpointing(args.grad_checkpointing)
model.text.grad_checkpointing = args.grad_checkpointing
model.visual.requires_grad_(args.freeze != "visual")
model.text.requires_grad_(args.freeze != "text")

# `network` is what trains: compiled, and with gradients averaged over processes. It shares its
# parameters with `model`, which stays as it is, for evaluation and saving.
network = copy.copy(model)
if args.compile:
    # For any number of rows at once: captions and concepts come in varying numbers, and images do
    # where a row cannot be read. Compiled for a number, the towers would be compiled again at the
    # next one, at another step on each process.
    network.encode_image = torch.compile(model.encode_image, dynamic=True)
    network.encode_text = torch.compile(model.encode_text, dynamic=True)
    # Under DDP dynamo would cut the towers at the buckets of gradients, each part for one size.
    torch._dynamo.config.optimize_ddp = False
if world_size > 1:
    # on the device that choose_device chose; gradients live in the buffers that are exchanged
    network = DistributedDataParallel(network, gradient_as_bucket_view=True)

# ---- optimizer -------------------------------------------------------------
trained = [p for p in model.parameters() if p.requires_grad]
undecayed = [p for name, p in model.named_parameters() if p.requires_grad and no_decay(name, p)]
decayed = [p for name, p in model.named_parameters() if p.requires_grad and not no_decay(name, p)]
optimizer = torch.optim.AdamW(
    [{"params": decayed, "weight_decay": args.weight_decay},
     {"params": undecayed, "weight_decay": 0.0}],
    lr=args.lr, betas=(0.9, args.beta2), eps=1e-6, fused=gpu)


def learning_rate(step):
    """Of step 1, 2, ...: a linear warm-up, then a cosine down to 0."""
    if step <= args.warmup:
        return args.lr * step / args.warmup
    progress = (step - 1 - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


# ---- the rest of the checkpoint --------------------------------------------
def resumes_here():
    """Whether the checkpoint to go on from is one of --out-dir, so that what is older there is of
    the same run."""
    return bool(args.resume) and os.path.samefile(os.path.dirname(args.resume) or ".", args.out_dir)


def best_before():
    """The mean in best.pt, which an evaluation after the last checkpoint may have raised."""
    if not os.path.exists(best_path) or damage(best_path) is not None or not resumes_here():
        return 0.0
    found = torch.load(best_path, mmap=True, weights_only=True)
    return found.get("mean", 0.0) if found["step"] <= start_step else 0.0


best = 0.0      # the best mean of all figures so far, of best.pt
thresholds = torch.zeros(4, device=args.device)     # of ce_clip, from the last whole step
next_thresholds = thresholds                        # and from the one that is under way
if args.resume:
    saved = torch.load(args.resume, map_location=args.device, weights_only=True)
    model.load_state_dict(saved["model"])       # once more: CLIP.load has rounded float64
    guard(optimizer.load_state_dict, saved["optimizer"])
    if teacher is not None:
        teacher.load_state_dict(saved["teacher"])
    best = max(saved["best"], best_before())
    if any(saved_args.get(name) != getattr(args, name) for name in ("bench", "val_data")):
        best = 0.0      # it was the mean of other figures
    thresholds = saved["thresholds"]
    initial_scale = saved["initial_scale"]
    del saved       # as large as the model and the optimizer

# ---- the loader ------------------------------------------------------------
def ignore_signals(worker):
    """Signals often reach the whole process group; the main process decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# Phrases are filled up to a multiple of this, because code that is compiled for any number of rows
# is compiled again for 0 and for 1. So each part of a batch has more.
rows_multiple = 8 * args.accum if args.compile else 1
collate = Collate(
    train_transform(model.config) if args.data else model.transform,
    model.tokenize,
    with_concepts,
    pad_concepts=rows_multiple,
    spans=args.concept_features == "span",
    negatives=method.negatives,
    pair_size=model.config.image_size,
    words=with_words,
    negative_images=method.negative_images,
    paraphrases=with_paraphrases,
    units=method.units if term_weights["units"] else 0,
    sentences=args.caption_xac_sentences,
    noise=args.attack_steps is not None)
loading = {
    "num_workers": args.workers,
    "persistent_workers": args.workers > 0,
    "pin_memory": gpu,
    "multiprocessing_context": "fork" if args.workers else None,
    "worker_init_fn": ignore_signals}
loader = DataLoader(
    Seeded(dataset, args.seed, method.neighbours, with_paraphrases, weighed),
    batch_sampler=EveryOther(sampler) if with_pairs else sampler,
    collate_fn=collate,
    **loading)
replay_loader = None
if replay is not None:      # files are cropped and read as those of --data are, scenes are not
    replay_transform = train_transform(model.config) if args.replay else model.transform
    replay_sampler = guard(Epochs, len(replay), min(args.batch_size, len(replay)), args.seed, rank,
                           world_size, start_step, args.steps)
    replay_loader = DataLoader(
        Seeded(replay, args.seed, neighbours=False),
        batch_sampler=replay_sampler,
        collate_fn=Collate(replay_transform, model.tokenize, with_concepts=False),
        **loading)

seen = 0        # rows of this process that were read, and that could not be
bad = 0
fallback = 0    # captions that are their own concept, for want of a noun phrase in them
left_out = 0    # steps in a row that were not finite


def check_rows(rows, step):
    """Rows that could not be read are reported; training stops when they are too many."""
    global seen, bad, fallback
    seen += len(rows["keys"])
    bad += len(rows["bad"])
    fallback += rows["fallback"]
    for key, why in rows["bad"]:
        tqdm.write(f"skipped {key}: {why}")
        log({"step": step, "skipped": key, "error": why})
    allowed = args.max_bad * max(seen + bad, min(len(dataset), 1000))
    if not rows["bad"] or (bad <= allowed and rows["keys"]):
        return
    problem = (f"{bad} of {seen + bad} rows could not be read, more than --max-bad "
               f"{args.max_bad:g}")
    if bad <= allowed:
        problem = (f"no row could be read of the {len(rows['bad'])} of a batch that process {rank} "
                   "has")
    key, why = rows["bad"][-1]
    stop(f"{problem}; the last is {key}: {why}. Check --image-root and --image-key, or raise "
         f"--max-bad. {save_what_is_done()}")


INPUTS = ("images", "tokens", "concept_tokens", "spans", "negative_tokens", "negative_images",
          "paraphrase_tokens", "unit_tokens")


def batches():
    """Yields this process's rows of each batch, what the network reads of them, and the plan.

    The loader's rows stay on the CPU, where the processes agree on the plan (see losses.Plan):
    which of them encodes which phrase, and which phrase belongs to which image. No GPU is waited
    for. Where the method has replay, that batch is rows["replay"], with its own inputs and plan.
    """
    iterator = iter(loader)
    replay_iterator = None if replay_loader is None else iter(replay_loader)
    # The loader's own handler would raise an error as soon as a worker dies, also in the midst of a
    # step. Without it the death is noticed here, when the next batch is due.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for step in range(start_step + 1, args.steps + 1):
        rows, inputs, plan = next_batch(iterator, step)
        if replay_iterator is not None:
            rows["replay"] = next_batch(replay_iterator, step)
            rows["replay"][0]["replayed"] = True
        yield rows, inputs, plan


@errors_in_a_line()
def next_batch(iterator, step):
    """Rows, inputs and plan of one batch, see batches."""
    rows = next(iterator)
    if not rows["keys"]:
        check_rows(rows, step)      # which ends training
    plan = agree(
        len(rows["tokens"]),
        rows.get("concept_ids"),
        rows.get("pairs"),
        rows.get("concept_tokens") if args.dedupe else None,
        dedupe=args.dedupe,
        merge=args.concept_features == "phrase",
        negative_mask=rows.get("negative_mask"),
        unit_mask=rows.get("unit_mask"))
    if method.same_captions or args.attack_steps:
        rows["caption_labels"] = same_captions(rows, plan)
    inputs = pick(rows, INPUTS)
    if plan.tokens is not None:
        inputs["concept_tokens"] = plan.tokens      # of phrases that it encodes for all
    if "sentence_ids" in rows:
        rows["sentence_plan"] = agree(len(rows["tokens"]), rows["sentence_ids"],
                                      rows["sentence_pairs"], rows["sentence_tokens"])
        inputs["sentence_tokens"] = rows["sentence_plan"].tokens
    for name, value in inputs.items():
        # Always a copy: a view of another tensor would be compiled apart.
        inputs[name] = value.to(args.device, non_blocking=True, copy=True)
    return rows, inputs, plan


def agree(*arguments, **keywords):
    """The plan of a batch, or of its sentences, after an exchange with the other processes."""
    plan = plan_batch(*arguments, pad_id=model.config.pad_id, multiple=rows_multiple, **keywords)
    return plan.to(args.device)


def same_captions(rows, plan):
    """Which captions of the batch are those of this process's rows, or equal: (b, B) bool."""
    ids = torch.tensor([string_id(caption) for caption in rows["captions"]])
    everyone = gather_features(ids, plan.rows)      # (B,), still on the CPU
    return (ids[:, None] == everyone).to(args.device, non_blocking=True)


# ---- one training step -----------------------------------------------------
SCALARS = ("logit_scale", "logit_bias")     # outputs that are the same in every part of a batch
# The fields of Features that this process has under their own names, in outputs and in rows.
OWN_OUTPUTS = (*SCALARS, "image_features", "negative_image_features", "paraphrase_features")
OWN_ROWS = ("caption_labels", "negative_image_mask", "paraphrase_mask", "word_mask", "replayed")


def train_step(rows, inputs, plan):
    """Leaves the gradient of the whole batch in the parameters; returns this process's terms."""
    inputs = attack(inputs, rows, plan)
    taught = teach([inputs], rows)
    out = forward(network, inputs)
    terms = loss_terms(out, rows, plan, taught)
    backward(terms["loss"])
    return terms


def forward(clip, inputs):
    """What CLIP.forward returns, of `network` or of the teacher."""
    inputs = dict(inputs)
    for name in ("images", "negative_images"):      # which come as bytes
        if name in inputs:
            pixels = normalize_images(inputs[name], model.config)
            inputs[name] = pixels.to(next(clip.parameters()).dtype)     # that of the weights
    with precision():
        return clip(**inputs, return_patches=with_patches, return_words=with_words)


def precision():
    """What the towers compute in, as a context."""
    device = torch.device(args.device).type
    return torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def loss_terms(out, rows, plan, taught):
    """This process's share of each loss term, and of their weighted sum, "loss".

    Its own images are compared with the captions and concepts of all processes. Summed over the
    processes, the shares are the loss of the whole batch.
    """
    global next_thresholds
    features = features_of(out, rows, plan, taught)
    terms = method.loss(features)
    next_thresholds = terms.pop("thresholds", thresholds)
    if not features.replayed:       # a batch of replay has the method's own terms alone
        added = {name: weight for name, weight in term_weights.items() if name not in terms}
        terms = {**terms, **extra_terms(features, added)}
    terms = {name: term for name, term in terms.items() if term_weights[name]}
    terms["loss"] = sum(term_weights[name] * term for name, term in terms.items())
    for name in SCALARS:    # each gets a gradient, of 0 if need be, which DDP and --accum ask for
        if out[name] is not None:
            terms["loss"] = terms["loss"] + 0 * out[name]
    return terms


def features_of(out, rows, plan, taught):
    """What the losses read. Outputs and rows hold only what the method wants, so they decide."""
    features = Features(
        **pick(out, OWN_OUTPUTS),
        **pick(rows, OWN_ROWS),
        **gather_texts(out, rows, plan),
        offset=plan.offset,
        concept_labels=plan.labels,
        negative_mask=plan.negative_mask,
        unit_mask=plan.unit_mask,
        thresholds=thresholds)
    if args.concept_count == "all":
        features.concept_count = plan.pairs
    if "unit_features" in out:
        features.foil_features = out["unit_features"][:, :, 1]                  # (b, K, D)
    if taught is not None:
        features.teacher = gather_taught(taught, plan)
    if "sentence_plan" in rows:
        features.sentence_labels = rows["sentence_plan"].labels                 # (b, S)
    if not features.replayed:
        add_similarities(features, out)
    return features


def gather_texts(out, rows, plan):
    """Texts of all processes, of each kind that there is, in one exchange: {name: features}."""
    texts = {"text_features": out["text_features"]}
    counts = [plan.rows]
    if "concept_features" in out:
        texts["concept_features"] = out["concept_features"].index_select(0, plan.given)
        counts.append(plan.given_counts)
    if "negative_features" in out:
        texts["negative_features"] = out["negative_features"]
        counts.append(plan.rows)
    if "unit_features" in out:
        texts["unit_features"] = out["unit_features"][:, :, 0]
        counts.append(plan.rows)
    if "sentence_features" in out:
        given = rows["sentence_plan"].given
        texts["sentence_features"] = out["sentence_features"].index_select(0, given)
        counts.append(rows["sentence_plan"].given_counts)
    return dict(zip(texts, gather_together(list(texts.values()), counts)))


def add_similarities(features, out):
    """Adds how near this process's images are to texts, once they are pooled by them.

    By the words of an image's own texts; and, in one pass, by all concepts, captions and sentences.
    """
    if with_words:
        words = out["word_features"]                                            # (b, 1 + K, L, D)
        similarity = token_similarity(out["patch_tokens"], words.flatten(1, 2))
        features.word_similarity = similarity.view(words.shape[:3])             # (b, 1 + K, L)
    queries = {}
    if term_weights["xac"]:
        queries["concept_similarity"] = features.concept_features               # (N, D)
    if term_weights["caption_xac"]:
        queries["caption_similarity"] = features.text_features                  # (B, D)
    if features.sentence_features is not None:
        texts = torch.cat([features.text_features, features.sentence_features])
        queries["caption_similarity"] = texts                                   # (B + S, D)
    if not queries:
        return
    similarity = concept_similarity(out["patch_tokens"], torch.cat(list(queries.values())))
    parts = similarity.split([len(query) for query in queries.values()], dim=1)
    for name, part in zip(queries, parts):
        setattr(features, name, part)                                           # (b, N), (b, B + S)


def pick(table, names):
    """The entries of a table that have one of these names."""
    return {name: table[name] for name in names if name in table}


def backward(loss):
    """DDP averages gradients over the processes, but the losses are shares of a sum."""
    (loss * world_size).backward()


# ---- what some steps have besides: an attack, a teacher ---------------------
def attack(inputs, rows, plan):
    """The inputs with images that an attack has turned away from their captions, if so wanted.

    An image is attacked against the captions of all processes, and by itself: the parts of --accum
    change nothing. These captions need no gradient, so they are encoded once more for it.
    """
    if "noise" not in rows:
        return inputs
    with torch.no_grad(), precision():
        tokens = inputs["tokens"].tensor_split(args.accum)
        texts = torch.cat([model.encode_text(part, normalize=True) for part in tokens])
        texts = gather_features(texts, plan.rows)                               # (B, D)
    dtype = model.logit_scale.dtype
    parts = [unnormalize_images(inputs["images"], model.config).to(dtype),
             rows["noise"].to(args.device, non_blocking=True), rows["caption_labels"]]
    attacked = []
    for pixels, noise, labels in zip(*[x.tensor_split(args.accum) for x in parts]):
        loss = functools.partial(loss_of_pixels, texts=texts, labels=labels)
        attacked.append(pgd_attack(pixels, noise, loss, args.attack_epsilon / 255,
                                   args.attack_steps))
    return {**inputs, "images": normalize_pixels(torch.cat(attacked), model.config)}


def loss_of_pixels(pixels, texts, labels):
    """What an attack raises; pixels (b, 3, S, S) from 0 to 1, texts (B, D), labels (b, B)."""
    with precision():
        features = model.encode_image(normalize_pixels(pixels, model.config), normalize=True)
    return tecoa_loss(features, texts, labels, model.logit_scale.exp(), model.logit_bias)


@torch.no_grad()
def teach(parts, rows):
    """The teacher's features of a batch that comes in parts, if a loss asks for them."""
    if not with_teacher:
        return None
    if method.replay and "replayed" not in rows and not term_weights["distill"]:
        return None     # it is asked about the batch of replay alone
    outs = [forward(teacher, pick(part, ("images", "tokens", "negative_tokens"))) for part in parts]
    names = pick(outs[0], ("image_features", "text_features", "negative_features"))
    return {name: torch.cat([out[name] for out in outs]) for name in names}


@torch.no_grad()
def gather_taught(taught, plan):
    """The teacher's captions and negatives of all processes, and its images of this one."""
    gathered = {"image_features": taught["image_features"]}
    for name in ("text_features", "negative_features"):
        if name in taught:
            gathered[name] = gather_features(taught[name], plan.rows)
    return gathered


# ---- one training step in parts, to save memory: --accum above 1 ------------
def train_step_in_parts(rows, inputs, plan):
    """As train_step, but with the activations of one part of the batch at a time.

    This is GradCache (Gao et al. 2021). It is exact: the features of all parts come first, without
    a graph, then the loss of the whole batch and its gradient with respect to the features, then
    each part again, with its piece of that gradient.
    """
    inputs = attack(inputs, rows, plan)
    parts = in_parts({name: x.tensor_split(args.accum) for name, x in inputs.items()})
    taught = teach(parts, rows)
    with torch.no_grad():
        outs = [forward(network, part) for part in parts]
    leaves = join_parts(outs)
    sizes = {name: [len(out[name]) for out in outs] for name in leaves if name not in SCALARS}
    del outs

    terms = loss_terms(leaves, rows, plan, taught)
    backward(terms["loss"])

    *others, (last_part, last_gradients) = zip(parts, gradients_of_parts(leaves, sizes))
    # processes exchange gradients once, after the last part
    with network.no_sync() if world_size > 1 else contextlib.nullcontext():
        for part, gradients in others:
            send_back(part, gradients)
    send_back(last_part, last_gradients)
    return terms


def in_parts(pieces):
    """{name: its pieces} -> for each part {name: its piece}."""
    return [dict(zip(pieces, part)) for part in zip(*pieces.values())]


def join_parts(outs):
    """The outputs of all parts as one, each a leaf that takes a gradient."""
    leaves = {}
    for name, value in outs[0].items():
        if name not in SCALARS:
            value = torch.cat([out[name] for out in outs])
        if value is not None:
            value = value.detach().requires_grad_()
        leaves[name] = value
    return leaves


def gradients_of_parts(leaves, sizes):
    """For each part the gradients of its outputs, {name: gradient}."""
    pieces = {}
    for name in sizes:
        if leaves[name].grad is not None:   # the loss of a batch of replay reads no patch tokens
            pieces[name] = leaves[name].grad.split(sizes[name])
    gradients = in_parts(pieces)
    for name in SCALARS:    # the same in all parts, so that the last one has their whole gradient
        if leaves[name] is not None:
            gradients[-1][name] = leaves[name].grad
    return gradients


def send_back(part, gradients):
    """A part once more, with a graph, and the gradients of its outputs back through it."""
    out = forward(network, part)
    names = [name for name in gradients if out[name].requires_grad]     # a frozen tower's do not
    torch.autograd.backward([out[name] for name in names], [gradients[name] for name in names])


train_step_on_batch = train_step if args.accum == 1 else train_step_in_parts


# ---- one training step with replay -------------------------------------------
def train_step_with_replay(rows, inputs, plan):
    """GIFT's step: first the batch of replay, whose gradient tells which weights it needs.

    DistributedDataParallel averages what has gathered in the gradients after each backward. The
    gradient of the first is the mean then, equal on all processes, which the second average leaves
    as it is.
    """
    replayed = train_step_on_batch(*rows["replay"])
    towers = [(p, anchor) for p, anchor in zip(model.parameters(), teacher.parameters())
              if p.grad is not None and p.ndim > 0]     # without logit_scale and logit_bias
    needs = fisher_weights([p.grad for p, _ in towers])
    terms = train_step_on_batch(rows, inputs, plan)
    loss = terms["loss"] + replayed["loss"]
    terms = {**terms, **replayed}
    if term_weights["awc"]:
        parameters, anchors = zip(*towers)
        penalty = awc_loss(parameters, anchors, needs)
        for p, gradient in zip(parameters, torch.autograd.grad(penalty, parameters)):
            p.grad.add_(gradient, alpha=term_weights["awc"])
        terms["awc"] = penalty.detach() / world_size    # terms are shares
        loss = loss + term_weights["awc"] * terms["awc"]
    return {**terms, "loss": loss}


step_function = train_step_with_replay if method.replay else train_step_on_batch

# ---- evaluation ------------------------------------------------------------
def is_evaluated(step):
    """Whether an evaluation follows this step."""
    if not benches:
        return False
    return step == args.steps or (args.eval_every > 0 and step % args.eval_every == 0)


def evaluation_options():
    """Where the data of the benchmarks is, for evaluate.py."""
    options = {"data_dir": args.data_dir, "data": args.val_data, "allow_missing": True,
               "workers": args.workers}
    for name in ("image_root", "image_key", "caption_key"):
        own = getattr(args, f"val_{name}")
        options[name] = getattr(args, name) if own is None else own
    return options


@errors_in_a_line()
def score(clip):
    """{benchmark: {subset: figures}}, of `model` or of the teacher."""
    return guard(evaluate.run, clip.eval(), benches, quiet=True, **evaluation_options())


def evaluation(step):
    """One line for each benchmark; best.pt, if the mean of all figures is the best so far."""
    global best
    results = score(model)
    model.train()
    mean = mean_figure(results)
    if averages:
        for bench, subsets in score(teacher).items():
            results[f"ema {bench}"] = subsets
    if mean > best and rank == 0:
        best_model = {**model.checkpoint(), "step": step, "mean": mean, "args": vars(args)}
        write_checkpoint(best_model, "best.pt")
    best = max(best, mean)
    for bench, subsets in results.items():
        shown = "  ".join(f"{name} {100 * r['accuracy']:.1f}" for name, r in subsets.items())
        print0(f"step {step}: {bench} {shown}")
    log({"step": step, "eval": results_for_log(results)})
    return results


def mean_figure(results):
    """Of the figures of all benchmarks, without those that are means of others."""
    figures = []
    for subsets in results.values():
        figures += [r["accuracy"] for r in subsets.values() if "parts" not in r]
    return sum(figures) / len(figures)


def results_for_log(results):
    """Without the long lists of single items."""
    short = {}
    for bench, subsets in results.items():
        short[bench] = {}
        for name, r in subsets.items():
            short[bench][name] = {key: r[key] for key in ("accuracy", "low", "high", "n", "chance")}
    return short


# ---- checkpoints -----------------------------------------------------------
def remove(path):
    if os.path.exists(path):
        os.remove(path)


def write_checkpoint(checkpoint, name):
    """What has this name is a whole checkpoint, always.

    It is written under another name, through to the disk, and then renamed. A kill may leave that
    other name behind, and it may even be a second name of a checkpoint: it is removed, never
    written into.
    """
    path = os.path.join(args.out_dir, name)
    unfinished = path + ".tmp"
    try:
        remove(unfinished)
        with open(unfinished, "xb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        remove(unfinished)      # a full disk has better uses for the space
        stop(f"cannot write {path}: {error}. What was there is untouched: make room, and give "
             "--resume auto")


def save(step):
    """last.pt, and with --keep the newest ones as step_*.pt."""
    if rank != 0:
        return
    checkpoint = {
        **model.checkpoint(), "optimizer": optimizer.state_dict(), "step": step, "order": ORDER,
        "content": content, "best": best, "thresholds": thresholds, "initial_scale": initial_scale,
        "args": vars(args)}
    if teacher is not None:
        checkpoint["teacher"] = teacher.state_dict()
    write_checkpoint(checkpoint, "last.pt")
    if args.keep > 1:
        keep_copy(os.path.join(args.out_dir, f"step_{step:08d}.pt"))
        for old in kept_checkpoints()[:-args.keep]:
            os.remove(old)


def save_what_is_done():
    """Before an end that nobody wanted: saves the last whole step, and says so."""
    if rank == 0 and done > start_step:
        save(done)
        return f"Saved step {done:,}: go on with --resume auto"
    return f"Last checkpoint: {last_good()}"


def keep_copy(path):
    """A second name of last.pt, which stays when the next checkpoint takes the first."""
    try:
        remove(path)
        os.link(last_path, path)
        return
    except OSError:
        pass    # not every file system has second names
    try:
        shutil.copyfile(last_path, path + ".tmp")
        os.replace(path + ".tmp", path)
    except OSError as error:
        remove(path + ".tmp")
        print0(f"cannot keep {path} ({error.strerror}); {last_path} is whole")


# ---- the log ---------------------------------------------------------------
board = None        # TensorBoard's writer, if it is wanted
torn_line = ""      # a line break, after a line of the log that was not written to its end


def log(row):
    """A line of log.jsonl, and for TensorBoard its numbers."""
    if rank != 0 or args.dry_run:
        return
    add_line(json.dumps(row) + "\n")
    if board is None or "step" not in row:
        return
    numbers = {name: x for name, x in row.items() if isinstance(x, (int, float)) and name != "step"}
    for bench, subsets in row.get("eval", {}).items():
        for name, r in subsets.items():
            numbers[f"{bench}/{name}"] = r["accuracy"]
    for name, x in numbers.items():
        board.add_scalar(name, x, row["step"])


def add_line(text):
    """A disk may be full. That is said once and training goes on, as the log is not what counts."""
    global torn_line
    try:
        with open(log_path, "a") as f:
            f.write(torn_line + text)
        torn_line = ""
    except OSError as error:
        if not torn_line:
            print0(f"cannot write {log_path} ({error.strerror}): training goes on without it")
        torn_line = "\n"


def peak_mib():
    """The most memory that this process has held, in MiB: of the GPU, if it has one."""
    if gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def operations_for_each_number(model):
    """Floating-point operations, forward and backward, for each number of the input: {kind: count}.

    A pixel or token meets the weights of all blocks, and each weight costs 6. Attention's own
    products, embeddings and heads are left out.
    """
    text = sum(p.numel() for p in model.text.blocks.parameters())
    image = sum(p.numel() for p in model.visual.blocks.parameters())
    numbers_in_a_patch = 3 * model.config.patch_size ** 2
    return {"tokens": 6 * text, "images": 6 * image / numbers_in_a_patch, "spans": 0}


operations = operations_for_each_number(model)


def operations_in(inputs):
    """Of one batch of this process; those of a teacher and of an attack are not counted."""
    # By the last word of an input's name: negative_images count as images.
    return sum(x.numel() * operations[name.split("_")[-1]] for name, x in inputs.items())


class Window:
    """What happened since the last line of the log, on this process."""
    def __init__(self):
        self.images = 0
        self.operations = 0
        self.seconds = 0.0      # of all
        self.waiting = 0.0      # of these, for data


# TFLOP/s in bfloat16, without sparsity
PEAKS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "4090": 165}


def log_row(step, values, grad_norm, window):
    """Losses of the whole batch at this step, and speed since the last row."""
    row = {"step": step, **values}
    row["grad_norm"] = grad_norm
    row["lr"] = learning_rate(step)
    scalars = [model.logit_scale.detach().exp()]
    if model.logit_bias is not None:
        scalars.append(model.logit_bias.detach())
    row["logit_scale"], *bias = torch.stack(scalars).tolist()       # a GPU is waited for once
    row["logit_bias"] = bias[0] if bias else None
    row["images_per_second"] = window.images * world_size / window.seconds
    row["waiting"] = window.waiting / window.seconds
    row["peak_mib"] = peak_mib()
    row["tflops"] = window.operations / window.seconds / 1e12
    row["skipped"] = bad
    row["own_concept"] = fallback
    for name, peak in PEAKS.items():
        if gpu and name in torch.cuda.get_device_name():
            row["mfu"] = row["tflops"] / peak
    return row


# ---- is there all that this run will need? ---------------------------------
def check_folder():
    """That --out-dir can be written, is no other run's, and has room for this run's checkpoints."""
    try:
        os.makedirs(args.out_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out_dir) as f:
            f.write(b"x")
    except OSError as error:
        raise ValueError(f"--out-dir {args.out_dir} cannot be written ({error.strerror}): give a "
                         "folder of yours") from None
    hold_folder()
    needed = room_needed() / 2**30
    free = shutil.disk_usage(args.out_dir).free / 2**30
    if free < needed:
        raise ValueError(f"--out-dir {args.out_dir} has {free:.2f} GiB free; the checkpoints need "
                         f"{needed:.2f} GiB: make room, or give another folder, or less to --keep")


def room_needed():
    """The bytes that the checkpoints of this run need beside those that they replace."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    averaged = weights if teacher is not None else 0
    moments = sum(2 * p.numel() * p.element_size() for p in trained)        # AdamW's
    checkpoint = weights + averaged + moments
    saves = math.ceil(args.steps / args.save_every)
    if benches and args.eval_every:
        saves += args.steps // args.eval_every
    # The newest is written beside those that are kept.
    most = 1 + min(args.keep, saves)
    products = (weights if benches else 0) + (weights if averages else 0)   # best.pt and ema.pt
    total = most * checkpoint + products - bytes_of_former_run()
    return max(total, checkpoint)


def bytes_of_former_run():
    """Of all its checkpoints in --out-dir, some of which may be second names of others."""
    sizes = {}
    for path in (*checkpoints(), best_path, ema_path):
        if os.path.exists(path):
            about = os.stat(path)
            sizes[about.st_ino] = about.st_size
    return sum(sizes.values())


SHARED_MEMORY = "/dev/shm"


def check_shared_memory():
    """That the batches that wait for training fit into the memory in which workers leave them.

    A worker that has no room for a batch only prints so, and training waits for it for ever.
    """
    if not args.workers or not os.path.isdir(SHARED_MEMORY):
        return
    rows = math.ceil(args.batch_size / world_size)
    images = 1 + method.neighbours + method.negative_images + (args.attack_steps is not None)
    bytes_of_image = 3 * model.config.image_size ** 2 * (1 if args.data else 4)     # scenes: floats
    batch = rows * images * bytes_of_image
    if replay is not None:
        batch *= 2
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))      # of this host
    free = shutil.disk_usage(SHARED_MEMORY).free
    room = free // (ranks * batch)      # in batches of each process
    # Two of each worker, this step's and the next one's.
    if 2 * args.workers + 2 > room:
        needed = (2 * args.workers + 2) * ranks * batch
        raise ValueError(
            f"--workers {args.workers} need {needed / 2**20:,.0f} MiB for batches in "
            f"{SHARED_MEMORY}, which has {free / 2**20:,.0f} MiB free: give --workers "
            f"{max(0, room // 2 - 1)}, or more shared memory (docker run --shm-size 1g)")


def check_evaluation():
    """That benchmarks and --val-data can be read, which are needed only later."""
    if not benches:
        return
    try:
        evaluate.check(benches, **evaluation_options())
    except (ValueError, OSError) as error:
        flag = "--val-data" if benches == ["retrieval"] and args.val_data else "--bench"
        message = str(error)
        for name in ("image-root", "image-key", "caption-key"):
            message = message.replace(f"--{name}", f"--val-{name}")
        if "--data is missing" in message:
            message += ". What evaluate.py calls --data is --val-data here"
        raise ValueError(f"{flag}: {message}") from None


from_process_0(check_folder)
from_process_0(check_shared_memory)
from_process_0(check_evaluation)

# ---- what a former run left in the folder ----------------------------------
def prepare_folder():
    """Makes room in --out-dir; returns whether the step to go on from was evaluated."""
    if args.overwrite:
        discard_former_run()
    remove_unfinished()
    return open_log()


def discard_former_run():
    """What --overwrite allows to lose: all that is younger than the checkpoint to go on from, and
    all of another run."""
    is_same_run = resumes_here()
    for path in (*checkpoints(), best_path, ema_path):
        if is_same_run and os.path.exists(path):
            if os.path.samefile(path, args.resume) or step_of_checkpoint(path) <= start_step:
                continue
        remove(path)


def step_of_checkpoint(path):
    """The step of a checkpoint; a damaged one is younger than any."""
    if damage(path) is not None:
        return math.inf
    return torch.load(path, mmap=True, weights_only=True)["step"]


def remove_unfinished():
    """What an earlier kill left."""
    for path in glob.glob(os.path.join(glob.escape(args.out_dir), "*.pt.tmp")):
        os.remove(path)


def open_log():
    """Begins log.jsonl. At a resume it keeps the lines that are no younger than the checkpoint.

    Returns whether the evaluation of the checkpoint's step is among them.
    """
    kept = []
    evaluated = False
    unreadable = 0
    if resumes_here() and os.path.exists(log_path):
        with open(log_path, encoding="utf-8", errors="replace") as f:
            for line in f:
                step = step_of_line(line)
                if step is None:
                    unreadable += 1
                elif step <= start_step:
                    kept.append(line)
                    evaluated = evaluated or (step == start_step and '"eval"' in line)
    if unreadable:      # such as the last one, torn by a kill
        print0(f"{log_path}: {unreadable} lines cannot be read and are left out")
    with open(log_path + ".tmp", "w") as f:
        f.writelines(kept)
        f.flush()
        os.fsync(f.fileno())
    os.replace(log_path + ".tmp", log_path)     # a kill leaves the old log or the new one
    return evaluated


def step_of_line(line):
    """The step of a line of the log, 0 for the first lines, None for one that is not whole."""
    try:
        step = json.loads(line).get("step", 0)
    except (ValueError, AttributeError, RecursionError):
        return None
    return step if line.endswith("\n") and isinstance(step, int) else None


def open_board():
    from torch.utils.tensorboard import SummaryWriter   # a package of its own
    return SummaryWriter(args.out_dir, purge_step=start_step + 1, flush_secs=5)


was_evaluated = False
if not args.dry_run:
    was_evaluated = from_process_0(prepare_folder)
    if args.tensorboard and rank == 0:
        board = guard(open_board)

# ---- what is going to happen -----------------------------------------------
millions = sum(p.numel() for p in model.parameters()) / 1e6
shown_weights = ", ".join(f"{name} {weight:g}" for name, weight in term_weights.items() if weight)
print0(f"{model.config.name}, {millions:.1f} M parameters; {args.method}: {shown_weights}, "
       f"{'softmax' if model.logit_bias is None else 'sigmoid'}; {len(dataset):,} rows, "
       f"{args.steps:,} steps of {args.batch_size}, {world_size} x {args.device} in {args.dtype}"
       f"{', compiled' if args.compile else ''}")
rows_of_step = math.ceil(sampler.length / sampler.steps_per_epoch)
if rows_of_step < args.batch_size:
    print0(f"an epoch of {sampler.length:,} rows is cut into {sampler.steps_per_epoch:,} equal "
           f"batches, of {rows_of_step} rows, not {args.batch_size} (--batch-size)")
if args.warmup > args.steps:
    print0(f"--warmup {args.warmup} is longer than the {args.steps:,} steps: the learning rate "
           f"ends at {learning_rate(args.steps):g} and never comes to --lr {args.lr:g}")
if weighed:
    for source, (size, in_epoch) in zip(args.data.split("::"), weighed):
        print0(f"{source}: {size:,} rows, of which an epoch shows {in_epoch:,}")
if args.data and model.config.tokenizer:
    encoded = []
    for row in first_rows:
        encoded += guard(model.tokenize.encode, row["captions"])
    cut_captions = sum(bool(text.overflowing) for text in encoded)
    if cut_captions:
        print0(f"{cut_captions:,} of the first {len(encoded):,} captions are cut at the model's "
               f"{model.config.context_length} tokens")
if not gpu and millions > 10:
    print0(f"SLOW: a {model.config.name} on a CPU takes seconds an image")
if gpu and not (args.compile and "bfloat16" in args.dtype):
    print0("SLOW: --dtype float32 or --no-compile on a GPU")
if gpu and args.data and not args.workers:
    print0("SLOW: --workers 0 reads data in turn with training")
skipped_rows = getattr(dataset, "skipped", []) + getattr(replay, "skipped", [])
for name, why in skipped_rows[:5]:
    print0(f"skipped {name}: {why} ({len(skipped_rows):,} in all)")
for name, what in getattr(dataset, "remarks", []) + getattr(replay, "remarks", []):
    print0(f"{name}: {what}")


@errors_in_a_line()
def dry_run():
    """Two steps of which nothing is kept; says what was read and how long all would take."""
    stream = batches()
    rows, inputs, plan = next(stream)
    check_rows(rows, start_step + 1)
    for _ in range(2):      # the first compiles, the second is timed
        began = time.time()
        loss = summed(step_function(rows, inputs, plan)["loss"].detach()).item()
        seconds = time.time() - began
    images = args.steps * sampler.length // sampler.steps_per_epoch
    read, unread = len(rows["keys"]), len(rows["bad"])
    if "replay" in rows:
        read += len(rows["replay"][0]["keys"])
        unread += len(rows["replay"][0]["bad"])
    print0(f"dry run: {read} rows read, {unread} bad; loss {loss:.3f}; "
           f"{images:,} images, {images / sampler.length:.2f} epochs; {seconds:.2f} s a step, "
           f"{args.steps * seconds / 3600:.2f} hours and the time to read data; peak memory "
           f"{peak_mib():.0f} MiB without AdamW's moments. Nothing was trained")


if args.dry_run and start_step >= args.steps:
    stop_all(f"--dry-run: {args.resume} is at step {start_step:,} of {args.steps:,}: nothing is "
             "left to train", 0)
if args.dry_run:
    dry_run()
    end()


def commit():
    """Of the code, "" without git or a repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, cwd=sys.path[0], capture_output=True, text=True)
    except OSError:
        return ""
    return git.stdout.strip()


log({"args": vars(args),
     "config": {**asdict(model.config), "tokenizer": len(model.config.tokenizer)},
     "commit": commit(),
     "world_size": world_size,
     "versions": {module.__name__: module.__version__ for module in (torch, timm, tokenizers)}})

# ---- the loop --------------------------------------------------------------
def leave_out(step, rows, loss, grad_norm):
    """A step whose loss or gradient is not finite is left out; too many in a row end training."""
    global left_out
    left_out += 1
    why = f"loss {loss:.4g}, gradient norm {grad_norm:.4g} at step {step}: left out"
    log({"step": step, "left_out": left_out, "why": why})
    tqdm.write(f"{why}; its first rows: {', '.join(rows['keys'][:4])}")
    if left_out > args.max_skips:
        stop(f"{why}, as {left_out} steps in a row (--max-skips {args.max_skips}). Try a smaller "
             f"--lr, or --grad-clip 1; last good checkpoint: {last_good()}")


def ask_all(terms, grad_norm):
    """All numbers of a step, in one exchange: the CPU waits for the GPU here, and only here.

    Returns the terms of the whole batch as floats, the gradient's norm, whether a loss or gradient
    of any process is not finite, and whether any process is to end.
    """
    loss = terms["loss"].detach()
    not_finite = ~(loss.isfinite() & grad_norm.isfinite())
    to_end = torch.full_like(loss, len(interrupted))
    shares = torch.stack([*terms.values(), not_finite.to(loss.dtype), to_end]).detach()
    numbers = torch.cat([summed(shares), grad_norm.view(1)])
    *values, any_not_finite, any_interrupted, norm = numbers.tolist()
    return dict(zip(terms, values)), norm, any_not_finite, any_interrupted


def report(step, values, grad_norm, window):
    """A line of the log, and what of it is shown."""
    row = log_row(step, values, grad_norm, window)
    log(row)
    shown = " ".join(f"{name} {row[name]:.2f}" for name in values)
    shown += f" {row['images_per_second']:.0f} img/s"
    bar.set_postfix_str(shown, refresh=False)
    if not on_terminal:
        print0(f"step {step:,}/{args.steps:,}: {shown}")


def update_weights():
    """The optimizer's step, of which the first allocates its moments. If it fails nothing is saved:
    some weights may have moved."""
    try:
        optimizer.step()
    except torch.cuda.OutOfMemoryError:
        stop("the GPU has too little memory for AdamW's two moments of each weight: train fewer "
             "weights (--freeze, a smaller --model), or in half of the memory (--dtype "
             f"pure-bfloat16). Last checkpoint: {last_good()}")


@torch.no_grad()
def after_step():
    """What follows the optimizer: a limit for the scale, and the average of the weights."""
    highest = math.log(100 if model.logit_bias is None else 1000)   # CLIP's own limit is 100
    model.logit_scale.clamp_(0, max(highest, initial_scale))        # SigLIP's weights come with 117
    if averages:
        own = [p.to(t.dtype) for p, t in zip(model.parameters(), teacher.parameters())]
        torch._foreach_lerp_(list(teacher.parameters()), own, 1 - args.ema)


results = {}    # of the last evaluation
if args.resume and is_evaluated(start_step) and not was_evaluated:
    results = evaluation(start_step)    # what a kill between the two prevented
latest = {}     # terms of the loss
window = Window()
was_interrupted = False
on_terminal = sys.stderr.isatty()       # elsewhere a line for each row of the log, and no bar
bar = tqdm(total=args.steps, initial=start_step, unit="step", dynamic_ncols=True,
           disable=rank != 0 or not on_terminal)
stream = batches()
started = before = time.time()
upcoming = next(stream, None)
for step in range(start_step + 1, args.steps + 1):
    rows, inputs, plan = upcoming
    check_rows(rows, step)
    if "replay" in rows:
        check_rows(rows["replay"][0], step)
    for param_group in optimizer.param_groups:
        param_group["lr"] = learning_rate(step)
    if (step - 1) % sampler.steps_per_epoch == 0:
        thresholds = torch.zeros_like(thresholds)

    with errors_in_a_line():
        terms = step_function(rows, inputs, plan)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.grad_clip)
        asked = time.time()
        upcoming = next(stream, None)   # the next batch, read while a GPU is at work on this one
        window.waiting += time.time() - asked
        values, grad_norm, any_not_finite, any_interrupted = ask_all(terms, norm)
    if any_not_finite:
        leave_out(step, rows, values["loss"], grad_norm)
    else:
        left_out = 0
        thresholds = next_thresholds    # only now: a step that is left out must not move them
        update_weights()
    optimizer.zero_grad(set_to_none=True)
    after_step()
    done = step

    latest |= values        # with clic, steps of two sorts take turns
    window.images += len(rows["keys"])
    window.operations += operations_in(inputs)
    if "replay" in rows:
        replay_rows, replay_inputs, _ = rows["replay"]
        window.images += len(replay_rows["keys"])
        window.operations += operations_in(replay_inputs)
    window.seconds += time.time() - before
    if step % args.log_every == 0 or step == args.steps:
        report(step, latest, grad_norm, window)
        window = Window()
    if args.compile and step <= start_step + 2:
        window = Window()       # of compilation, not of training
    bar.update()

    if step == start_step + 1:      # which compiles
        wait_for_others(args.timeout)
    if any_interrupted:
        noticed.set()
        was_interrupted = True
        save(step)
        bar.close()
        print0(f"interrupted: saved step {step} to {last_path}; continue with --resume {last_path}")
        break
    if step == args.steps or step % args.save_every == 0 or is_evaluated(step):
        save(step)      # before the evaluation, which may fail
    if is_evaluated(step):
        wait_for_others(PATIENT)
        results = evaluation(step)
        wait_for_others(args.timeout)
    before = time.time()
bar.close()

# ---- the end ---------------------------------------------------------------
def own_arguments(without):
    """The user's own command line, without these flags and their values."""
    kept = []
    is_kept = True
    for word in sys.argv[1:]:
        if word.startswith("--"):
            is_kept = word.split("=")[0] not in without
        if is_kept:
            kept.append(word)
    return kept


def baseline_command():
    """The same run with the plain contrastive loss alone."""
    launcher = ["python"]
    if world_size > 1:
        here = os.environ.get("LOCAL_WORLD_SIZE", world_size)
        launcher = ["torchrun", f"--nproc_per_node={here}"]
    plain = "clip" if model.logit_bias is None else "siglip"
    command = [*launcher, "train.py", "--method", plain]
    of_terms = [flag_of(f"{term}_weight") for term in TERMS]
    command += own_arguments(without=(
        "--method", "--out-dir", "--resume", "--overwrite", "--replay", "--caption-xac-sentences",
        *of_terms))
    if "--out-dir" in " ".join(sys.argv):
        command += ["--out-dir", f"{args.out_dir}-plain"]
    return shlex.join(command)


def next_commands():
    """What to do with what was made."""
    checkpoint = shlex.quote(last_path)
    names = ",".join(benches) or ("retrieval --data HELD_OUT.csv" if args.data else "scenes")
    score_it = f"python evaluate.py --checkpoint {checkpoint} --bench {names}"
    show_it = f"python evaluate.py show --checkpoint {checkpoint}"
    if args.data:
        show_it += " --image FILE --caption TEXT"
    for name in ("data_dir", "image_root", "image_key", "caption_key", "data"):
        value = evaluation_options()[name]
        if benches and value not in (None, "", parser.get_default(name)):
            score_it += f" {flag_of(name)} {shlex.quote(value)}"
    lines = [
        f"{score_it}     # its figures, with intervals",
        f"python evaluate.py plot {shlex.quote(log_path)}     # its curves",
        f"{show_it}     # where it sees a phrase",
        f"python model.py export --checkpoint {checkpoint} --format open_clip --output "
        f"{shlex.quote(os.path.join(args.out_dir, 'open_clip'))}"]
    if with_concepts:
        lines.insert(0, f"{baseline_command()}     # the baseline, to compare")
    return "next: " + "\n      ".join(lines)


if not was_interrupted:
    if rank == 0 and averages:
        write_checkpoint({**teacher.checkpoint(), "step": args.steps, "args": vars(args)}, "ema.pt")
    if rank == 0:
        for bench, subsets in results.items():
            evaluate.print_table(bench, subsets)
    bad, fallback = summed(torch.tensor([bad, fallback], device=args.device)).tolist()
    minutes = (time.time() - started) / 60
    if start_step == args.steps:
        print0(f"{args.resume} is at step {start_step:,} already: nothing was left to train")
    else:
        print0(f"\n{args.steps - start_step:,} steps in {minutes:.1f} minutes; wrote {last_path} "
               "and log.jsonl")
    bad += getattr(dataset, "lost_rows", 0) + getattr(replay, "lost_rows", 0)
    if bad:
        print0(f"{bad} rows were skipped")
    if fallback:
        print0(f"{fallback} captions, without another noun phrase in them, were their own concept")
    if os.path.exists(last_path):
        print0(next_commands())
if board is not None:
    board.close()
end()
