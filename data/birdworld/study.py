"""Make the tables over seeds that README and notebooks read: python data/birdworld/study.py

All of them (`make study` does the same), or those that are named, into data/birdworld/<name>.csv:

    choice      candidates for the recommended variant, on the validation split, without masks
    study       ablations: every row x 2 pretraining seeds x 3 fine-tuning seeds, and maps that look at nothing
    spurious    the same models as the training correlation of species and background goes from .5 to 1
    heldout     the recommended variant on pretraining seeds, fine-tuning seeds and birds that nothing was chosen on
    banks       good, bad and shorter concept banks
    methods     the same models, seen through every method of explanation

Finished cells are kept in build/study/, so a killed run goes on where it was; delete that folder to begin with nothing.
At the end the tables of README.md are written anew; `--tables` does only that, and `--picture` draws its picture. The
test split is read once, at the end.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import dealkit
from dealkit import plots
from dealkit.datasets import Birdworld
from dealkit.evaluation import centre_maps, image_table, random_maps, uniform_maps
from dealkit.maps import cosines
from dealkit.presets import BIRDWORLD as DEAL
from dealkit.presets import BIRDWORLD_PAPER as PAPER
from dealkit.presets import BIRDWORLD_RECOMMENDED as RECOMMENDED
from dealkit.study import run_cell, run_study
from dealkit.training.checkpoint import write_text

HERE = Path(__file__).parent
METHOD_METRICS = ("overlap_cosine", "pointing_game", "mass_in_mask", "best_iou", "dead_maps")
CONTROLS = {"random maps": random_maps, "centre maps": centre_maps, "uniform maps": uniform_maps}
SEEDS = (0, 1, 2)
FEW = {"insertion_images": 0}                                   # most rows do without insertion, which takes longest
MORE = {"insertion_images": 32, "perturbed_images": 0}

CONTRASTIVE = DEAL.contrastive_only
RELEASED = replace(PAPER, lambda_disentangle=.1)
SWAP = replace(CONTRASTIVE, swap=RECOMMENDED.swap, swap_keep=RECOMMENDED.swap_keep)
GRID = (10 * 10) / (5 * 5)                                      # patches of the ViT to places of the ResNet

HEADLINE = {                                                    # the rows of the README's table
    "pretrained": None,
    "contrastive only": CONTRASTIVE,
    "DEAL": DEAL,
    "DEAL, paper's form": PAPER,
    "paper's form, released weights": RELEASED,
    "recommended": RECOMMENDED,
}
# lambda x gamma, each at 0, 1 and 3 times the preset. Four of the nine are rows of their own.
SURFACE = {(0, 0): "contrastive only", (1, 0): "disentangle only", (0, 1): "localize only", (1, 1): "DEAL"} | {
    (a, b): f"lambda x {a}, gamma x {b}" for a, b in ((3, 0), (0, 3), (3, 1), (1, 3), (3, 3))}
ABLATIONS = {
    "detached": replace(DEAL, detach_maps=True),
    "disentangle only": replace(DEAL, gamma_localize=0.),
    "localize only": replace(DEAL, lambda_disentangle=0.),
} | {
    name: replace(DEAL, lambda_disentangle=DEAL.lambda_disentangle * a, gamma_localize=DEAL.gamma_localize * b)
    for (a, b), name in SURFACE.items() if name.startswith("lambda")
} | {
    "product overlap": replace(DEAL, overlap="product", lambda_disentangle=PAPER.lambda_disentangle),
    "soft-IoU overlap": replace(DEAL, overlap="soft_iou"),
    "sum aggregate": replace(DEAL, aggregate="sum", gamma_localize=PAPER.gamma_localize),
    "concepts led by the category": replace(DEAL, localize_moves="concepts"),
    "category led by the concepts": replace(DEAL, localize_moves="category"),
    "maps by Grad-CAM": replace(DEAL, method="gradcam"),
    "maps of every exit": replace(DEAL, method="every_exit"),
    "K = 2": replace(DEAL, n_concepts=2),
    "K = 3": replace(DEAL, n_concepts=3),
    "K = 4": replace(DEAL, n_concepts=4),
    "frozen text, contrastive only": replace(CONTRASTIVE, freeze_text=True),
    "frozen text": replace(DEAL, freeze_text=True),
    "constrained": replace(DEAL, limit_disentangle=.1, limit_localize=4.),
    "gradient into text": replace(DEAL, stop_text_gradient=False),
    "no guard": replace(DEAL, guard=0.),
    "no guard, 10 x lambda, 2 x lr": replace(DEAL, guard=0., lambda_disentangle=DEAL.lambda_disentangle * 10,
                                             lr=2 * DEAL.lr),
}
SWAPS = {"swap": SWAP, "swap, centre kept": replace(SWAP, swap_method="centre")}
BALANCED = {"balanced": (CONTRASTIVE, {"balanced": True}), "balanced, DEAL": (DEAL, {"balanced": True})}
RESNETS = {
    "ResNet, contrastive only": CONTRASTIVE,
    "ResNet, DEAL": replace(DEAL, gamma_localize=DEAL.gamma_localize * GRID),
}
ON_BACKGROUNDS = FEW | {"background": True}
ROWS = {**{name: (config, MORE | {"background": True}) for name, config in HEADLINE.items()},
        **{name: (config, ON_BACKGROUNDS) for name, config in SWAPS.items()},
        **{name: (config, ON_BACKGROUNDS | options) for name, (config, options) in BALANCED.items()},
        **{name: (config, FEW) for name, config in ABLATIONS.items()}}

CORRELATIONS = (.5, .8, .95, 1.)                                # .95 is the preset's, and in study.csv
SPURIOUS = {name: (HEADLINE | SWAPS)[name] for name in ("contrastive only", "DEAL", "swap", "recommended")}

BANKS = ("true", "concepts of other species", "random words")

# What the recommended variant was chosen from: on validation birds with balanced backgrounds, without masks. The rule,
# against contrastive-only: at most half the overlap, no dead maps (under .01), accuracy not lower, concept accuracy
# within half a point, the worst group higher by three points; and among those the best agreement with occlusion, which
# stands in for the masks.
CANDIDATES = {"contrastive only": CONTRASTIVE, "swap": replace(CONTRASTIVE, swap=.5),
              "DEAL": replace(DEAL, gamma_localize=.02)} | {
    f"swap {s:g}, lambda {a:g}, gamma {g:g}": replace(DEAL, swap=s, lambda_disentangle=a, gamma_localize=g)
    for s, a, g in ((.5, 3., .02), (.5, 3., .04), (.5, 6., .06))} | {
    "swap 0.5, lambda 3, gamma 0.02, sum": replace(DEAL, swap=.5, aggregate="sum", gamma_localize=.02)}
VALIDATION = {"split": "validation", "masks": False, "insertion_images": 0, "test": {"n": 1280, "correlation": .5}}


def cache(name: str, checkpoints: str = "seed*") -> Path:
    """The folder of a table's finished cells: named after the checkpoints, for cells of others are no cells of these."""
    content = b"".join(path.read_bytes() for path in sorted(HERE.glob(f"{checkpoints}.safetensors")))
    return HERE.parents[1] / "build" / "study" / hashlib.sha256(content).hexdigest()[:8] / name


def make_bank(kind: str) -> dealkit.ConceptBank:
    """A bank to fine-tune with: the true one, or one in which nothing is true but by chance."""
    true, rng = dealkit.load_concepts("birdworld"), random.Random(0)
    names, vocabulary = true.categories, json.loads((HERE / "vocab.json").read_text(encoding="utf-8"))
    if kind == "concepts of other species":       # a derangement by rotation: no species keeps its own list, nor its
        order = names[::2] + names[1::2]            # twin's, which differs in one part only
        others = order[3:] + order[:3]
        concepts = {name: true[other] for name, other in zip(order, others)}
    elif kind == "random words":                    # two words of the model's 32, five times: "photo jarnip"
        concepts = {name: [" ".join(rng.sample(vocabulary, 2)) for _ in true[name]] for name in names}
    else:
        concepts = dict(true)
    return dealkit.ConceptBank(f"birdworld, {kind}", {name: concepts[name] for name in names})


def bank_cell(row: str, config, pretrained: str, seed: int, **options) -> dict:
    """A cell of the study of banks; its row is called "<bank> | <fine-tuning>"."""
    bank, method = row.split(" | ")
    return run_cell(row, config, pretrained, seed, bank=make_bank(bank), **options) | {"bank": bank, "method": method}


def choice_cell(row: str, config, pretrained: str, seed: int) -> dict:
    """A candidate on the validation birds: what `evaluate` says without masks, and whether the maps lie where covering
    a place lowers the score: the share of their mass on the six places that matter most (six of 100 is chance)."""
    setup, birds = dealkit.preset("birdworld", pretrained=pretrained), Birdworld("validation", **VALIDATION["test"])
    dealkit.finetune(setup.vlm, setup.train, setup.bank, replace(config, seed=seed), progress=False)
    options = {name: value for name, value in VALIDATION.items() if name not in ("split", "test")}
    result = dealkit.evaluate(setup.vlm, birds, setup.bank, **options).to_dict()
    batch = birds.batch(range(48))
    emb = torch.stack([setup.vlm.encode_text(setup.bank[birds.categories[y]]) for y in batch["label"]]).detach()
    drops = covered(setup.vlm, batch["image"], emb)
    maps = dealkit.explain(setup.vlm, batch["image"], emb).flatten(2)
    on_top = maps.gather(2, drops.topk(6).indices).sum(2) / maps.sum(2).clamp_min(1e-12)
    return {"row": row, "pretrained": pretrained, "seed": seed, **result, "occlusion_agreement": on_top.mean().item()}


@torch.no_grad()
def covered(vlm, images, text_emb):
    """The drop of each score where a place is covered with the image's mean colour: [B, K, h * w]. One pass a place
    serves all texts; `dealkit.attribution` with "occlusion", which covers with black, takes ten times as long."""
    side, drops = images.shape[-1] // vlm.grid[1], []
    for place in range(vlm.grid[0] * vlm.grid[1]):
        y, x = (side * i for i in divmod(place, vlm.grid[1]))
        seen = images.clone()
        seen[:, :, y:y + side, x:x + side] = images.mean(dim=(2, 3))[:, :, None, None]
        drops.append(-cosines(vlm.encode_image(seen), text_emb))
    return torch.stack(drops, dim=2)


def choice(processes: int | None) -> pd.DataFrame:
    """The candidates, on seeds of their own."""
    return run_study(CANDIDATES, cache=cache("choice"), processes=processes, seeds=(100,), run=choice_cell)


def study(processes: int | None) -> pd.DataFrame:
    """The ablations, and above them maps that look at nothing."""
    table = run_study(ROWS, cache=cache("study"), processes=processes, seeds=SEEDS)
    resnets = run_study(RESNETS, cache=cache("study", "rn-seed*"), processes=processes, seeds=SEEDS,
                        model="birdworld-rn", **FEW)
    return pd.concat([control_rows(), table, resnets], ignore_index=True)


def spurious(processes: int | None) -> pd.DataFrame:
    """The other correlations of the training images; a row is called "<row> @ <correlation>". Where every bird stands
    before its home there is nothing to balance."""
    rows = {f"{name} @ {c}": (config, {"train": {"correlation": c}} | options) for c in CORRELATIONS if c != .95
            for name, (config, options) in ({name: (config, {}) for name, config in SPURIOUS.items()}
                                            | ({"balanced": BALANCED["balanced"]} if c < 1 else {})).items()}
    table = run_study(rows, cache=cache("spurious"), processes=processes, seeds=SEEDS[:2], **ON_BACKGROUNDS)
    table[["row", "correlation"]] = table["row"].str.split(" @ ", expand=True)
    return table


def heldout(processes: int | None) -> pd.DataFrame:
    """The claim of the recommended variant, where nothing was chosen: other pretraining seeds, fine-tuning seeds,
    training birds and test birds."""
    rows = {name: (config, {}) for name, config in SPURIOUS.items()} | {"pretrained": (None, {})} | BALANCED
    return run_study(rows, pretrained=("seed2", "seed3"), seeds=(10, 11, 12), cache=cache("heldout"),
                     processes=processes, train={"seed": 1}, test={"seed": 1}, **ON_BACKGROUNDS)


def banks(processes: int | None) -> pd.DataFrame:
    """Each bank with DEAL and, as its control, with the same captions and no regulariser. Scored with the true bank."""
    rows = {f"{bank} | {method}": config for bank in BANKS
            for method, config in (("contrastive only", CONTRASTIVE), ("DEAL", DEAL))}
    content = json.dumps([make_bank(bank).concepts for bank in BANKS])      # cells of other banks are no cells of these
    return run_study(rows, cache=cache(f"banks-{hashlib.sha256(content.encode()).hexdigest()[:8]}"),
                     processes=processes, run=bank_cell, seeds=SEEDS[:2], **FEW)


def method_cell(row: str, config, pretrained: str, seed: int, n: int | None = None) -> dict:
    """One model, its maps by every method against the masks: columns "<method> <metric>". n: that many test birds."""
    setup = dealkit.preset("birdworld", pretrained=pretrained)
    if config is not None:
        dealkit.finetune(setup.vlm, setup.train, setup.bank, replace(config, seed=seed), progress=False)
    result = {"row": row, "pretrained": pretrained, "seed": seed}
    birds = setup.test if n is None else Birdworld("test", n=n)
    for method in setup.vlm.tower.methods:
        table = image_table(setup.vlm, birds, setup.bank, partial(dealkit.explain, method=method), insertion_images=0)
        result |= {f"{method} {metric}": table[metric].mean() for metric in METHOD_METRICS}
    return result


def methods(processes: int | None) -> pd.DataFrame:
    """DEAL trains through one method; do the others see the change? One line a model and method."""
    rows = {"pretrained": None, "contrastive only": CONTRASTIVE, "DEAL": DEAL}
    wide = run_study(rows, cache=cache("methods"), processes=processes, run=method_cell)
    long = wide.melt(["row", "pretrained", "seed"])
    long[["method", "metric"]] = long["variable"].str.split(" ", expand=True)
    return long.pivot(index=["method", "row", "pretrained", "seed"], columns="metric", values="value").reset_index()


def control_rows(tags=("seed0", "seed1")) -> pd.DataFrame:
    """Maps that look at nothing, scored like the others on the models before fine-tuning."""
    rows = []
    for name, explainer in CONTROLS.items():
        for tag in tags:
            setup = dealkit.preset("birdworld", pretrained=tag)
            result = dealkit.evaluate(setup.vlm, setup.test, setup.bank, explainer=explainer, **MORE)
            rows.append({"row": name, "pretrained": tag, "seed": 0, **result.to_dict()})
    return pd.DataFrame(rows)


def picture() -> None:
    """The README's picture: three models of the first seeds on the bird whose gain (mass in mask, DEAL minus
    contrastive-only) is the median of the test split, so that it is neither the best nor the worst case."""
    setup = dealkit.preset("birdworld")
    models, mass = {"before": setup.vlm}, {}
    for name in ("contrastive only", "DEAL"):
        models[name] = dealkit.preset("birdworld").vlm
        dealkit.finetune(models[name], setup.train, setup.bank, HEADLINE[name])
        mass[name] = image_table(models[name], setup.test, setup.bank, insertion_images=0)["mass_in_mask"]
    gain = (mass["DEAL"] - mass["contrastive only"]).sort_values()
    bird = gain.index[len(gain) // 2]
    print(f"test bird {bird}: mass in mask {mass['contrastive only'][bird]:.2f} -> {mass['DEAL'][bird]:.2f}")
    batch = setup.test.batch([bird])
    concepts = [setup.bank[setup.test.categories[y]] for y in batch["label"]]
    maps = torch.cat([dealkit.explain(vlm, batch["image"], concepts) for vlm in models.values()])
    repeat = {k: batch[k].repeat_interleave(len(models), 0) for k in ("image", "part_masks")}
    figure = plots.map_grid(repeat["image"], maps, concepts * len(models), repeat["part_masks"], rows=list(models))
    figure.savefig(HERE / "before_after.png", dpi=90, bbox_inches="tight", facecolor="white",
                   metadata={"Software": None})


TABLES = {"choice": choice, "study": study, "spurious": spurious, "heldout": heldout, "banks": banks,
          "methods": methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES], help="default: all")
    parser.add_argument("--picture", action="store_true", help="only the README's picture, before_after.png")
    parser.add_argument("--tables", dest="show", action="store_true", help="only bring the README's tables in step")
    parser.add_argument("--processes", type=int, default=None, help="default: one a core; 0: one for all, on a GPU")
    args = parser.parse_args()
    if args.picture:
        return picture()
    for name in [] if args.show else args.tables or TABLES:
        start = time.perf_counter()
        save(TABLES[name](args.processes), name)
        print(f"{name}.csv: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    if args.tables:                                  # a part: the README waits for the whole
        return
    import tables                                    # the file beside this one

    readme = HERE.parents[1] / "README.md"
    write_text(readme, tables.into_readme(readme.read_text(encoding="utf-8"), tables.all_tables(HERE)))


def save(table: pd.DataFrame, name: str) -> None:
    """Write a table with the commit and the versions that made it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    table["commit"] = commit.stdout.strip() or "unknown"
    table["versions"] = f"torch {torch.__version__}, Python {platform.python_version()}"
    table.to_csv(HERE / f"{name}.csv", index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
