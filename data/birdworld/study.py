"""Make data/birdworld/study.csv, the table over seeds that the notebooks read: python data/birdworld/study.py

Every row of the table x 2 pretraining seeds x 2 fine-tuning seeds, evaluated once on the test split. Finished cells are
kept in build/study/, so a killed run goes on where it was. `--choose` runs the candidates that the preset was chosen
from on the validation split instead, without masks, and prints the table. `--banks` makes data/birdworld/banks.csv: the
same fine-tuning with good, bad and shorter concept banks. `--methods` makes data/birdworld/methods.csv: the same
models, seen through every method of explanation.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import dealkit
from dealkit import plots
from dealkit.datasets import Birdworld
from dealkit.evaluation import centre_maps, image_table, random_maps, uniform_maps
from dealkit.maps import contributions, to_maps
from dealkit.presets import BIRDWORLD as DEAL
from dealkit.presets import BIRDWORLD_PAPER as PAPER
from dealkit.study import paired_differences, run_cell, run_study

HERE = Path(__file__).parent
# Cells of other checkpoints are no cells of these: the folder's name is theirs.
CACHE = HERE.parents[1] / "build" / "study" / hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(HERE.glob("seed*.safetensors")))).hexdigest()[:8]
METHOD_METRICS = ("overlap_cosine", "pointing_game", "mass_in_mask", "best_iou", "dead_maps")
CONTROLS = {"random maps": random_maps, "centre maps": centre_maps, "uniform maps": uniform_maps}

ROWS = {
    "pretrained": None,
    "contrastive only": DEAL.contrastive_only,
    "detached": replace(DEAL, detach_maps=True),
    "DEAL": DEAL,
    "DEAL, paper's form": PAPER,
    "paper's form, released weights": replace(PAPER, lambda_disentangle=.1),
    "disentangle only": replace(DEAL, gamma_localize=0.),
    "localize only": replace(DEAL, lambda_disentangle=0.),
    "localize only, sum": replace(DEAL, lambda_disentangle=0., aggregate="sum", gamma_localize=PAPER.gamma_localize),
    "no guard": replace(DEAL, guard=0.),
    "gradient into text": replace(DEAL, stop_text_gradient=False),
    "lambda x 0.3": replace(DEAL, lambda_disentangle=DEAL.lambda_disentangle * .3),
    "lambda x 3": replace(DEAL, lambda_disentangle=DEAL.lambda_disentangle * 3),
    "gamma x 0.3": replace(DEAL, gamma_localize=DEAL.gamma_localize * .3),
    "gamma x 3": replace(DEAL, gamma_localize=DEAL.gamma_localize * 3),
    "product overlap": replace(DEAL, overlap="product", lambda_disentangle=PAPER.lambda_disentangle),
    "sum aggregate": replace(DEAL, aggregate="sum", gamma_localize=PAPER.gamma_localize),
    "no guard, 10 x lambda, 2 x lr": replace(DEAL, guard=0., lambda_disentangle=DEAL.lambda_disentangle * 10,
                                             lr=2 * DEAL.lr),
}

# What the preset was chosen from, on the validation split, without masks: accuracy and concept accuracy within half a
# point of contrastive-only, no dead maps, an insertion AUC that is not lower (against maps that are distinct but look
# anywhere), and then the least overlap.
CANDIDATES = {"contrastive only": DEAL.contrastive_only} | {
    f"lambda {weight:g}, gamma {gamma:g}": replace(DEAL, lambda_disentangle=weight, gamma_localize=gamma)
    for weight, gamma in ((1., .02), (3., .02), (3., .06), (6., .02), (6., .06))}

BANKS = ("true", "k = 4", "k = 3", "k = 2", "concepts of other species", "random words")


def make_bank(kind: str) -> dealkit.ConceptBank:
    """A bank to fine-tune with: the true one, its first k concepts, or one in which nothing is true but by chance."""
    true, rng = dealkit.load_concepts("birdworld"), random.Random(0)
    names, vocabulary = true.categories, json.loads((HERE / "vocab.json").read_text(encoding="utf-8"))
    if kind.startswith("k = "):
        concepts = {name: true[name][:int(kind[4:])] for name in names}
    elif kind == "concepts of other species":       # a derangement by rotation: no species keeps its own list, nor its
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


def study_of_banks(processes: int | None) -> pd.DataFrame:
    """Each bank with DEAL and, as its control, with the same captions and no regulariser. Scored with the true bank."""
    rows = {f"{bank} | {method}": config for bank in BANKS
            for method, config in (("contrastive only", DEAL.contrastive_only), ("DEAL", DEAL))}
    content = json.dumps([make_bank(bank).concepts for bank in BANKS])      # cells of other banks are no cells of these
    return run_study(rows, cache=CACHE / f"banks-{hashlib.sha256(content.encode()).hexdigest()[:8]}",
                     processes=processes, run=bank_cell)


def every_exit(vlm, images, text_emb):
    """Relevance not only in the last block but in every one, each with an exit from the tower right after it: a map by
    the rules of "relevance" that sees what "legrad" sees."""
    exits = vlm.tower.split(images, kind="exits").exits
    return to_maps(torch.cat([contributions(stop, text_emb, vlm.grid) for stop in exits], dim=2))


def method_cell(row: str, config, pretrained: str, seed: int, n: int | None = None) -> dict:
    """One model, its maps by every method against the masks: columns "<method> <metric>". n: that many test birds."""
    setup = dealkit.preset("birdworld", pretrained=pretrained)
    if config is not None:
        dealkit.finetune(setup.vlm, setup.train, setup.bank, replace(config, seed=seed), progress=False)
    result = {"row": row, "pretrained": pretrained, "seed": seed}
    birds = setup.test if n is None else Birdworld("test", n=n)
    makers = {method: partial(dealkit.explain, method=method) for method in setup.vlm.tower.methods}
    for method, maker in (makers | {"every_exit": every_exit}).items():
        table = image_table(setup.vlm, birds, setup.bank, maker, insertion_images=0)
        result |= {f"{method} {metric}": table[metric].mean() for metric in METHOD_METRICS}
    return result


def study_of_methods(processes: int | None) -> pd.DataFrame:
    """DEAL trains through one method; do the others see the change? One line a model and method."""
    rows = {"pretrained": None, "contrastive only": DEAL.contrastive_only, "DEAL": DEAL}
    wide = run_study(rows, cache=CACHE / "methods", processes=processes, run=method_cell)
    long = wide.melt(["row", "pretrained", "seed"])
    long[["method", "metric"]] = long["variable"].str.split(" ", expand=True)
    return long.pivot(index=["method", "row", "pretrained", "seed"], columns="metric", values="value").reset_index()


def methods_table(table: pd.DataFrame) -> str:
    """The README's table of what DEAL changes, seen through each method; a test keeps the two in step."""
    seen = {"pointing_game": "pointing game", "mass_in_mask": "mass in mask", "overlap_cosine": "overlap"}
    means = table.groupby(["method", "row"])["pointing_game"].mean()
    lines = ["| maps by | pretrained | contrastive only | DEAL | Δ " + " | Δ ".join(seen.values()) + " |",
             "|---|" + "---|" * (3 + len(seen))]
    for method in ("relevance", "gradcam", "gradeclip", "legrad", "every_exit"):
        part = paired_differences(table[table["method"] == method], "contrastive only", list(seen))
        part = part[part["row"] == "DEAL"].set_index("metric")
        cells = [f"{means[method, row]:.3f}" for row in ("pretrained", "contrastive only", "DEAL")]
        cells += [f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for _, d in part.loc[list(seen)].iterrows()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


# column of the table -> its name for a reader, and the paper's Table 1 (ViT-B/32, mean of five data sets, CLIP -> DEAL)
CLAIMS = {
    "disentanglability": ("disentanglability, the paper's score", ".400 → .435"),
    "insertion_fidelity": ("insertion fidelity, the paper's localizability", ".593 → .661"),
    "accuracy": ("accuracy", ".657 → .788"),
    "concept_accuracy": ("concept accuracy (colour of a part)", ""),
    "worst_group_accuracy": ("worst-group accuracy", ""),
    "overlap_cosine": ("overlap of concept maps, cosine (less is better)", ""),
    "mass_in_mask": ("mass in the true mask", ""),
    "pointing_game": ("pointing game", ""),
    "iou": ("IoU with the true mask", ""),
    "dead_maps": ("dead maps (less is better)", ""),
}


def control_rows(tags=("seed0", "seed1")) -> pd.DataFrame:
    """Maps that look at nothing, scored like the others on the models before fine-tuning."""
    rows = []
    for name, explainer in CONTROLS.items():
        for tag in tags:
            setup = dealkit.preset("birdworld", pretrained=tag)
            result = dealkit.evaluate(setup.vlm, setup.test, setup.bank, explainer=explainer, progress=True)
            rows.append({"row": name, "pretrained": tag, "seed": 0, **result.to_dict()})
    return pd.DataFrame(rows)


def readme_table(study: pd.DataFrame) -> str:
    """The README's table, paper against ours; a test keeps the two in step."""
    differences = paired_differences(study, "contrastive only", list(CLAIMS)).set_index(["row", "metric"])
    means = study.groupby("row")[list(CLAIMS)].mean()
    lines = ["| | paper: CLIP → DEAL | random maps | centre maps | uniform maps | pretrained | contrastive only | DEAL "
             "(preset) | DEAL − contrastive only [95 %] | paper's form, λ = 0.01 | paper's form, λ = 0.1 as released |",
             "|---|" + "---|" * 10]
    for metric, (name, paper) in CLAIMS.items():
        blind = ["" if "accuracy" in metric else f"{means.loc[row, metric]:.3f}" for row in CONTROLS]     # no map in it
        cells = blind + [f"{means.loc[row, metric]:.3f}" for row in ("pretrained", "contrastive only", "DEAL")]
        for row in ("DEAL", "DEAL, paper's form", "paper's form, released weights"):
            d = differences.loc[(row, metric)]
            cells.append(f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]")
        lines.append(f"| {name} | {paper} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture() -> None:
    """The README's picture: three models of the first seeds on the bird whose gain (mass in mask, DEAL minus
    contrastive-only) is the median of the test split, so that it is neither the best nor the worst case."""
    setup = dealkit.preset("birdworld")
    models, mass = {"before": setup.vlm}, {}
    for name in ("contrastive only", "DEAL"):
        models[name] = dealkit.preset("birdworld").vlm
        dealkit.finetune(models[name], setup.train, setup.bank, ROWS[name])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="the candidates on the validation split, without masks")
    parser.add_argument("--banks", action="store_true", help="only banks.csv: good, bad and shorter banks")
    parser.add_argument("--methods", action="store_true", help="only methods.csv: every method of explanation")
    parser.add_argument("--picture", action="store_true", help="only the README's picture, before_after.png")
    parser.add_argument("--processes", type=int, default=None, help="default: one a core")
    args = parser.parse_args()
    pd.set_option("display.width", 250)
    if args.choose:
        table = run_study(CANDIDATES, cache=CACHE, processes=args.processes, split="validation", masks=False,
                          insertion_images=48, seeds=(0,))
        columns = ["accuracy", "concept_accuracy", "overlap_cosine", "dead_maps", "insertion_auc", "deletion_auc"]
        print(table.groupby("row", sort=False)[columns].mean().round(3).to_string())
        return
    if args.picture:
        return picture()
    if args.methods:
        table = study_of_methods(args.processes)
        save(table, "methods.csv")
        return print(methods_table(table))
    if args.banks:
        return save(study_of_banks(args.processes), "banks.csv")
    table = pd.concat([control_rows(), run_study(ROWS, cache=CACHE, processes=args.processes)], ignore_index=True)
    save(table, "study.csv")
    print(readme_table(table))


def save(table: pd.DataFrame, name: str) -> None:
    """Write a table with the commit and the versions that made it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    table["commit"] = commit.stdout.strip() or "unknown"
    table["versions"] = f"torch {torch.__version__}, Python {platform.python_version()}"
    table.to_csv(HERE / name, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
