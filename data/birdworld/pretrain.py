"""Pretrain the tiny CLIP of Birdworld from scratch: python data/birdworld/pretrain.py --seed 0

Makes data/birdworld/seed<seed>.safetensors from nothing but the seed, on a CPU; with `--model birdworld-rn` a ResNet,
rn-seed<seed>.safetensors. With `--model birdworld-vit-224 --device cuda` the same recipe makes a larger model of larger
images, into build/ (not shipped). The recipe is CLIP's
(symmetric InfoNCE over a batch of images and captions) with one change that a world of 16 species needs: a caption
that is true of another image of the batch does not count as that image's negative.
"""
from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import dealkit
from dealkit.datasets.birdworld import COLOURS, PARTS, Birdworld
from dealkit.models.weights import BIRDWORLD, BIRDWORLDS, SHIPPED

STEPS, BATCH, LR = 1_200, 64, 2e-3


def draw_caption(rng, species: str | None, colours) -> tuple[str, bool, tuple[int, ...]]:
    """One true caption of a bird -> (text, does it name the species, the parts it mentions)."""
    kind = rng.random() if species else 1.0
    if kind < .3:
        return f"a photo of a {species}", True, ()
    parts = rng.permutation(5)[:rng.integers(1, 5 if kind < .5 else 6)]
    phrase = " ".join(f"{COLOURS[colours[p]]} {PARTS[p]}" for p in parts)
    if kind < .5:
        return f"a photo of a {species} with {phrase}", True, tuple(parts)
    return phrase if rng.random() < .5 else f"a bird with {phrase}", False, tuple(parts)


def truth(labels, attributes, captions) -> torch.Tensor:
    """[B, B] bool: is caption j true of image i?"""
    true = np.ones((len(labels), len(labels)), bool)
    for j, (_, named, parts) in enumerate(captions):
        if named:
            true[:, j] &= labels == labels[j]
        for p in parts:
            true[:, j] &= attributes[:, p] == attributes[j, p]
    return torch.from_numpy(true)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--model", choices=BIRDWORLDS, default=BIRDWORLD)
    parser.add_argument("--device", default="cpu", help="the committed weights were made on a CPU")
    parser.add_argument("--out", type=Path, default=None, help="default: seed<seed>.safetensors beside this script, or "
                                                               "in build/<model>/ for another model")
    args = parser.parse_args()
    here = Path(__file__).parent
    folder = here if args.model in SHIPPED else here.parents[1] / "build" / args.model
    out = args.out or folder / f"{SHIPPED.get(args.model, 'seed')}{args.seed}.safetensors"

    torch.set_num_threads(1)                    # part of the recipe; run both seeds side by side on two cores
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    vlm = dealkit.load_model(args.model, pretrained=None, device=args.device)
    birds = Birdworld("pretrain", seed=args.seed, random_birds=.5, correlation=.99, size=vlm.image_size[0])
    vlm.model.train()
    decayed = [p for p in vlm.model.parameters() if p.ndim > 1]
    others = [p for p in vlm.model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.}],
                                  lr=LR, weight_decay=.05, betas=(.9, .98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=args.steps, pct_start=.1)
    bar = tqdm(range(args.steps), desc=f"pretraining seed {args.seed}")
    for step in bar:
        indices = rng.integers(len(birds), size=BATCH)
        batch, labels, attributes = birds.batch(indices), birds.labels[indices], birds.attributes[indices]
        captions = [draw_caption(rng, birds.categories[y] if y >= 0 else None, a) for y, a in zip(labels, attributes)]
        image_emb = vlm.encode_image(batch["image"])
        text_emb = vlm.encode_text([text for text, _, _ in captions])
        loss = dealkit.contrastive_loss(image_emb, text_emb, vlm.logit_scale, truth(labels, attributes, captions))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            vlm.model.logit_scale.clamp_(max=np.log(100))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    vlm.model.eval()
    vlm.save(out)
    print(f"wrote {out.name}: {os.path.getsize(out) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
