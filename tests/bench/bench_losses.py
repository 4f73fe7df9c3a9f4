"""Time and peak memory of the XAC loss, forward and backward, against two plainer ways to compute it:

  loop     one concept at a time, each with its own attention over the expanded tokens (as the released code)
  batched  all concepts at once: scores (B, N, T), pooled vectors (B, N, D) in memory
  ours     pooling.concept_similarity

and the cost of all three losses on one process when a global batch is split over 1, 2, 4, 8 processes (each
simulated alone, so without communication) against the whole matrix on every process. Every case runs in a
fresh process on random unit tokens. Seconds are those of the fastest repeat, of the wall clock or, with
--threads 1, of the process, which on a busy machine are the only ones to trust, and then the ratios. MiB are
the peak resident memory above that before the first call: with the tokens' gradient, without the tokens, in
a run of its own in which freed memory goes back at once (glibc would keep and scatter the loop's).

    python tests/bench/bench_losses.py --threads 2
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from losses import npc_loss, siglip_loss, xac_loss  # noqa: E402
from pooling import concept_pool, concept_similarity  # noqa: E402

SHAPES = [(32, 96, 196, 768), (96, 288, 196, 768), (256, 768, 196, 768), (256, 768, 49, 512)]  # B, N, T, D
BARS = {(96, 288, 196, 768): "40x, 100 MiB", (256, 768, 196, 768): "256 MiB", (256, 768, 49, 512): "40x"}


def loop(tokens, concepts):
    """The definition, one concept after the other: (B, T, D), (N, D) -> (B, N)."""
    columns = []
    for concept in concepts:
        query = concept.expand(len(tokens), 1, -1)  # (B, 1, D)
        attention = (tokens * query).sum(-1).softmax(dim=-1)  # (B, T)
        pooled = F.normalize((attention[..., None] * tokens).sum(1), dim=-1)  # (B, D)
        columns.append((pooled * query[:, 0]).sum(-1))
    return torch.stack(columns, dim=1)


def batched(tokens, concepts):
    return (F.normalize(concept_pool(tokens, concepts), dim=-1) * concepts).sum(-1)


def rss():
    """Peak resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def unit(*shape):
    x = torch.randn(*shape)
    return x.div_(x.norm(dim=-1, keepdim=True)).requires_grad_()  # in place: the peak so far is what is held


def run_case(way, B, N, T, D, threads, repeats, memory_budget=None):
    """In the fresh process: -> seconds and MiB. With way "all" the three losses on ours."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    similarity = {"loop": loop, "batched": batched}.get(
        way, lambda V, P: concept_similarity(V, P, memory_budget=memory_budget))

    def step(tokens, concepts, images=None, texts=None):
        labels = torch.zeros(len(tokens), len(concepts), dtype=torch.bool)
        labels[torch.arange(len(concepts)) % len(tokens), torch.arange(len(concepts))] = True
        loss = xac_loss(similarity(tokens, concepts), labels, 10.0, -10.0)
        if images is not None:
            loss = loss + npc_loss(images, concepts, labels, 10.0, -10.0)
            loss = loss + siglip_loss(images, texts, 10.0, -10.0)
        loss.backward()

    step(unit(2, 3, D), unit(2, D))  # libraries load their parts at the first call
    inputs = [unit(B, T, D), unit(N, D)] + ([unit(B, D), unit(768, D)] if way == "all" else [])
    clock = time.process_time if threads == 1 else time.perf_counter
    before, seconds = rss(), []
    for _ in range(repeats):
        for x in inputs:
            x.grad = None
        start = clock()
        step(*inputs)
        seconds.append(clock() - start)
    return {"seconds": min(seconds), "mib": rss() - before}


def measure(way, B, N, T, D, threads, repeats=3, memory_budget=None):
    case = dict(way=way, B=B, N=N, T=T, D=D, threads=threads, repeats=repeats, memory_budget=memory_budget)
    result = {}
    for key, environment in [("seconds", {}), ("mib", {"MALLOC_MMAP_THRESHOLD_": str(2**20)})]:
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        if out.returncode:
            sys.exit(f"{way} at {(B, N, T, D)} failed: {out.stderr.strip() or out.returncode}")
        result[key] = json.loads(out.stdout.splitlines()[-1])[key]
        case["repeats"] = 1
    return result


def measure_loop(B, N, T, D, threads, full):
    """The loop whole or, at N > 300, as a straight line through two runs with fewer concepts."""
    if full or N <= 300:
        return measure("loop", B, N, T, D, threads, repeats=1), ""
    few, more = (measure("loop", B, n, T, D, threads, repeats=1) for n in (12, 36))
    return {k: more[k] + (more[k] - few[k]) / 24 * (N - 36) for k in few}, "~"


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every case")
    parser.add_argument("--quick", action="store_true", help="the smallest shape and a global batch of 96")
    parser.add_argument("--full", action="store_true", help="run the loop whole, never extrapolated")
    parser.add_argument("--batch", type=int, default=768, help="global batch of the second table")
    parser.add_argument("--concepts", type=int, default=768, help="unique concepts in that batch")
    parser.add_argument("--memory-budget", type=int, metavar="MIB", help="for ours (default: its own)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        return print(json.dumps(run_case(**json.loads(args.case))))

    budget = args.memory_budget and args.memory_budget * 2**20
    shapes = SHAPES[:1] if args.quick else SHAPES
    print(f"torch {torch.__version__}, {args.threads} threads, float32. XAC, forward + backward:\n")
    print("| B, N, T, D | loop, s | batched, s | ours, s | ours: loop / ours | batched / ours "
          "| loop, MiB | batched, MiB | ours, MiB | tokens, MiB | bar |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    approximate = False
    for shape in shapes:
        B, N, T, D = shape
        slow, mark = measure_loop(*shape, args.threads, args.full)
        plain = measure("batched", *shape, args.threads)
        ours = measure("ours", *shape, args.threads, repeats=5, memory_budget=budget)
        approximate |= bool(mark)
        a, b, c = (x["seconds"] for x in (slow, plain, ours))
        print(f"| {B}, {N}, {T}, {D} | {mark}{a:.1f} | {b:.2f} | {c:.2f} | {mark}{a / c:.0f}x | {b / c:.1f}x "
              f"| {mark}{slow['mib']:.0f} | {plain['mib']:.0f} | {ours['mib']:.0f} | {B * T * D / 2**18:.0f} "
              f"| {BARS.get(shape, '')} |", flush=True)
    if approximate:
        print("\n~ extrapolated: a straight line through 12 and 36 concepts; --full runs the loop whole.")

    batch, concepts = (96, 96) if args.quick else (args.batch, args.concepts)
    print(f"\nOne process's share of contrastive + NPC + XAC, global batch {batch}, {concepts} concepts, "
          "T 196, D 768, no communication:\n")
    print("| processes | images of its own | s | MiB | share of the whole matrix |")
    print("|---|---|---|---|---|")
    for world in (1, 2, 4, 8):
        r = measure("all", batch // world, concepts, 196, 768, args.threads, memory_budget=budget)
        whole = r["seconds"] if world == 1 else whole
        print(f"| {world} | {batch // world} | {r['seconds']:.2f} | {r['mib']:.0f} "
              f"| 1/{whole / r['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
