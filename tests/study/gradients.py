"""How hard each loss of C2LIP pulls: norms of their gradients, at weight 1, on a batch of scenes.

    python train.py --steps 1 --out-dir out/start       weights that are random still
    python tests/study/gradients.py out/start/last.pt out/nano/last.pt

For each checkpoint: the norm over the towers' weights of the gradient of the contrastive loss, of NPC and
of XAC, the cosine between those of NPC and XAC, and the weight at which XAC would pull as hard as
NPC does at weight 1 (the quotient of the norms).
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import Collate, Scenes, Seeded  # noqa: E402
from losses import clip_loss, concept_columns, npc_loss, siglip_loss, xac_loss  # noqa: E402
from model import CLIP  # noqa: E402
from pooling import concept_similarity  # noqa: E402


def losses_of(model, batch):
    """{"contrastive": ..., "npc": ..., "xac": ...}, each a scalar with its graph."""
    size = len(batch["images"])
    images, patch_tokens = model.encode_image(batch["images"], normalize=True, return_tokens=True)
    texts = model.encode_text(batch["tokens"], normalize=True)
    phrases = model.encode_text(batch["concept_tokens"], normalize=True)
    concepts, labels = concept_columns(phrases, batch["concept_ids"], batch["pairs"], size)
    scale = model.logit_scale.exp()
    bias = model.logit_bias
    if bias is None:
        contrastive = clip_loss(images, texts, scale)
    else:
        contrastive = siglip_loss(images, texts, scale, bias)
    similarity = concept_similarity(patch_tokens, concepts)             # (B, N)
    return {"contrastive": contrastive,
            "npc": npc_loss(images, concepts, labels, scale, bias),
            "xac": xac_loss(similarity, labels, scale, bias)}


def gradient_of(loss, parameters):
    """The gradient over all parameters as one vector."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    flat = []
    for gradient, parameter in zip(gradients, parameters):
        flat.append(torch.zeros_like(parameter) if gradient is None else gradient)
    return torch.cat([gradient.flatten() for gradient in flat])


parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoints", nargs="+", metavar="FILE", help="Of train.py.")
parser.add_argument("--world", choices=("small", "large"), default="small")
parser.add_argument("--batch-size", type=int, default=128, help="Scenes. Default: 128.")
args = parser.parse_args()

print("| checkpoint | contrastive | NPC | XAC | cosine of NPC and XAC | weight of XAC to equal NPC |")
print("|---|---|---|---|---|---|")
for path in args.checkpoints:
    model = CLIP.load(path)
    scenes = Scenes(args.batch_size, "train", 7, model.config.image_size, 0.1, world=args.world)
    rows = Seeded(scenes, 0)
    collate = Collate(model.transform, model.tokenize)
    batch = collate([rows[0, i] for i in range(args.batch_size)])
    towers = [weight for name, weight in model.named_parameters() if "logit" not in name]
    gradients = {}
    for name, loss in losses_of(model, batch).items():
        gradients[name] = gradient_of(loss, towers)
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    cosine = torch.cosine_similarity(gradients["npc"], gradients["xac"], dim=0).item()
    print(f"| {path} | {norms['contrastive']:.3g} | {norms['npc']:.3g} | "
          f"{norms['xac']:.3g} | {cosine:.2f} | {norms['npc'] / norms['xac']:.2g} |", flush=True)
