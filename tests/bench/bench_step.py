"""A whole training step, ours against the plain way: towers, captions, concepts, losses, optimizer, in one run.

    python tests/bench/bench_step.py --captions DIR_OF_SUGARCREPE_JSON [--model ViT-B-32 ViT-B-16-SigLIP] [--batch-size 16]

Plain: every concept of every caption padded to the full context and encoded, equal or not; captions padded too; a
loop over the concepts for the cross-attention term. Ours: train.py's way, and span: with --concept-features span, which
needs no pass for the concepts. All: random weights, random images, float32, AdamW, the same captions (SugarCrepe's, so
that phrases repeat as they do in real captions), process CPU time.
"""
import argparse
import glob
import json
import os
import random
import sys
import time
import zlib

import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), HERE]
from concepts import extract_batch, string_id  # noqa: E402
from losses import clip_loss, concept_columns, npc_loss, siglip_loss, xac_loss  # noqa: E402
from model import CLIP, MODELS  # noqa: E402
from pooling import concept_similarity  # noqa: E402

CLOCK = time.process_time


def encode_words(words, config, trim):
    """Token ids of the right lengths (a word a token), for towers whose tokenizers cannot be downloaded here."""
    vocabulary = config.vocab_size - 1      # end of text: the highest id, as in CLIP
    rows = [[2 + zlib.crc32(w.encode()) % 20000 for w in text.split()][:config.context_length - 2] + [vocabulary]
            for text in words]
    length = config.context_length
    if trim and config.family == "clip":
        length = min(length, -(-max(map(len, rows)) // 8) * 8)
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--captions", required=True, help="folder with SugarCrepe's json files")
    p.add_argument("--model", nargs="+", default=["ViT-B-32", "ViT-B-16-SigLIP"])
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--rounds", type=int, default=3, help="steps of each kind, in turn, after one of each to warm up")
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    captions = [item["caption"] for path in sorted(glob.glob(os.path.join(args.captions, "*.json")))
                for item in json.load(open(path, encoding="utf-8")).values()]
    every = sorted(set(captions))
    for processes, size in ((2, 96), (8, 96), (16, 96)):    # train.py shares the different ones out equally
        found = extract_batch(random.Random(0).sample(every, processes * size))
        own = [{c.lower() for some in found[i * size:][:size] for c in some} for i in range(processes)]
        shared = -(-len(set().union(*own)) // processes)
        print(f"{processes} x {size} captions: a process has {sum(map(len, found)) / processes:.0f} concepts, up to "
              f"{max(map(len, own))} different ones, and encodes {shared}")
    captions = random.Random(0).sample(every, args.batch_size)
    concepts = extract_batch(captions)
    phrases = [phrase for found in concepts for phrase in found]
    unique = list(dict.fromkeys(phrase.lower() for phrase in phrases))
    print(f"{args.batch_size} captions, {len(phrases)} concepts, {len(unique)} different ones\n")

    for name in args.model:
        torch.manual_seed(0)
        model = CLIP(MODELS[name])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        images = torch.randn(args.batch_size, 3, model.config.image_size, model.config.image_size)
        ids = torch.tensor([string_id(phrase) for phrase in unique])
        pairs = torch.tensor([(i, unique.index(c.lower())) for i, found in enumerate(concepts) for c in found])

        # spans: words are tokens here
        width, places = max(map(len, concepts)), []
        for caption, found in zip(captions, concepts):
            starts = [len(caption[:caption.lower().index(c.lower())].split()) for c in found]
            some = [(min(s, 50), min(s + len(c.split()), 51)) for s, c in zip(starts, found)]
            places.append(some + [(0, 0)] * (width - len(some)))
        spans = torch.tensor(places)                                                    # (B, M, 2)
        strings = [c for found in concepts for c in found + [None] * (width - len(found))]
        span_ids = torch.tensor([-1 if c is None else string_id(c) for c in strings])   # (B M,)
        span_pairs = torch.tensor([(n // width, n) for n, c in enumerate(strings) if c is not None])

        def step(kind):
            times, mark, ours, span = {}, CLOCK(), kind != "plain", kind == "span"

            def lap(part):
                nonlocal mark
                times[part], mark = times.get(part, 0) + CLOCK() - mark, CLOCK()

            image_features, patch_tokens = model.encode_image(images, normalize=True, return_tokens=True)
            lap("image tower")
            tokens = encode_words(captions, model.config, ours)
            text_features = model.encode_text(tokens, normalize=True, return_tokens=span)
            if span:    # as in CLIP.forward
                text_features, x = text_features
                where = torch.arange(x.shape[1])
                inside = (spans[..., :1] <= where) & (where < spans[..., 1:])
                concept_features = F.normalize((inside.to(x.dtype) @ x).flatten(0, 1), dim=-1)
            lap("captions")
            if not span:
                texts = unique if ours else phrases
                concept_features = model.encode_text(encode_words(texts, model.config, ours), normalize=True)
            lap("concepts")
            scale, bias = model.logit_scale.exp(), model.logit_bias
            outputs = (image_features, patch_tokens, text_features, concept_features)
            leaves = i, v, t, c = [x.detach().requires_grad_() for x in outputs]
            loss = clip_loss(i, t, scale) if bias is None else siglip_loss(i, t, scale, bias)
            if ours:
                columns, labels = concept_columns(c, *((span_ids, span_pairs) if span else (ids, pairs)), len(i),
                                                  merge=not span)
                similarity = concept_similarity(v, columns)
            else:
                columns, labels = concept_columns(c, torch.arange(len(c)), torch.stack([pairs[:, 0], torch.arange(
                    len(c))], 1), len(i), dedupe=False)
                pooled = [[((v[m] @ q).softmax(0)[:, None] * v[m]).sum(0) for m in range(len(v))] for q in columns]
                similarity = torch.stack([torch.stack([F.normalize(x, dim=0) @ q for x in row])
                                          for row, q in zip(pooled, columns)], 1)
            loss = loss + npc_loss(i, columns, labels, scale, bias) + 0.01 * xac_loss(similarity, labels, scale, bias)
            loss.backward()
            lap("losses")
            torch.autograd.backward([image_features, patch_tokens], [leaves[0].grad, leaves[1].grad])
            lap("image tower")
            if span:
                torch.autograd.backward([text_features, concept_features], [leaves[2].grad, leaves[3].grad])
            else:
                text_features.backward(leaves[2].grad)
            lap("captions")
            if not span:
                concept_features.backward(leaves[3].grad)
            lap("concepts")
            optimizer.step()
            optimizer.zero_grad()
            lap("optimizer")
            return times

        kinds = ("ours", "span", "plain")
        runs = [{kind: step(kind) for kind in kinds} for _ in range(args.rounds + 1)][1:]
        middle = {kind: {part: sorted(run[kind][part] for run in runs)[args.rounds // 2] for part in runs[0][kind]}
                  for kind in kinds}
        total = {kind: sum(m.values()) for kind, m in middle.items()}
        print(f"{name}: CPU seconds a step, median of {args.rounds}\n\n"
              "| part | ours | span | plain | plain / ours | plain / span |\n|---|---|---|---|---|---|")
        for part in middle["ours"]:
            cells = [f"{middle[kind][part]:.2f} ({middle[kind][part] / total[kind]:.0%})" for kind in kinds]
            ratios = [f"{middle['plain'][part] / max(middle[kind][part], 1e-2):.1f}" for kind in kinds[:2]]
            print(f"| {' | '.join([part, *cells, *ratios])} |")
        cells = [f"{total[kind]:.2f}" for kind in kinds] + [f"{total['plain'] / total[kind]:.2f}" for kind in kinds[:2]]
        print(f"| {' | '.join(['**step**', *cells])} |\n")


if __name__ == "__main__":
    main()
