"""The README's tables, made from the tables over seeds. `study.py --tables` brings the README in step."""
from __future__ import annotations

from pathlib import Path

import pandas as pd

from dealkit.study import paired_differences

CONTROL = "contrastive only"
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
BLIND = ("random maps", "centre maps", "uniform maps")
# what the recommended variant was asked for, against contrastive-only: metric -> (in words, is it met by this line of
# `paired_differences` and the control's mean?)
ASKED = {
    "overlap_cosine": ("at most half", lambda d, base: d["mean"] <= -base / 2),
    "mass_in_mask": ("+50 %", lambda d, base: d["mean"] >= base / 2),
    "pointing_game": ("+.10", lambda d, base: d["mean"] >= .10),
    "dead_maps": ("under .01", lambda d, base: base + d["mean"] < .01),
    "accuracy": ("kept (within .01)", lambda d, base: d["mean"] >= -.01),
    "concept_accuracy": ("kept (within .01)", lambda d, base: d["mean"] >= -.01),
    "worst_group_accuracy": ("+.03", lambda d, base: d["mean"] >= .03),
}


def signed(line) -> str:
    """A line of `paired_differences` as a cell: +0.123 [+0.100, +0.146]."""
    return f"{line['mean']:+.3f} [{line['low']:+.3f}, {line['high']:+.3f}]"


def study_table(study: pd.DataFrame) -> str:
    """What DEAL does, paper against ours."""
    differences = paired_differences(study, CONTROL, list(CLAIMS)).set_index(["row", "metric"])
    means = study.groupby("row")[list(CLAIMS)].mean()
    shown = {"DEAL": "DEAL − contrastive only [95 %]", "DEAL, paper's form": "Δ paper's form, λ = 0.01",
             "paper's form, released weights": "Δ paper's form, λ = 0.1 as released", "recommended": "Δ recommended"}
    lines = ["| | paper: CLIP → DEAL | random maps | centre maps | uniform maps | pretrained | contrastive only | DEAL "
             "(preset) | " + " | ".join(shown.values()) + " |", "|---|" + "---|" * (7 + len(shown))]
    for metric, (name, paper) in CLAIMS.items():
        cells = ["" if "accuracy" in metric else f"{means.loc[row, metric]:.3f}" for row in BLIND]     # no map in it
        cells += [f"{means.loc[row, metric]:.3f}" for row in ("pretrained", CONTROL, "DEAL")]
        cells += [signed(differences.loc[(row, metric)]) for row in shown]
        lines.append(f"| {name} | {paper} | {' | '.join(cells)} |")
    return "\n".join(lines)


def methods_table(table: pd.DataFrame) -> str:
    """What DEAL changes, seen through each method."""
    seen = {"pointing_game": "pointing game", "mass_in_mask": "mass in mask", "overlap_cosine": "overlap"}
    means = table.groupby(["method", "row"])["pointing_game"].mean()
    lines = ["| maps by | pretrained | contrastive only | DEAL | Δ " + " | Δ ".join(seen.values()) + " |",
             "|---|" + "---|" * (3 + len(seen))]
    for method in ("relevance", "gradcam", "gradeclip", "legrad", "every_exit"):
        part = paired_differences(table[table["method"] == method], CONTROL, list(seen))
        part = part[part["row"] == "DEAL"].set_index("metric")
        cells = [f"{means[method, row]:.3f}" for row in ("pretrained", CONTROL, "DEAL")]
        cells += [signed(d) for _, d in part.loc[list(seen)].iterrows()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def all_correlations(spurious: pd.DataFrame, study: pd.DataFrame) -> pd.DataFrame:
    """The runs of spurious.csv and, at the preset's correlation of .95, the same rows and seeds of study.csv."""
    same = study[study["row"].isin(spurious["row"]) & study["seed"].isin(spurious["seed"])]
    same = pd.concat([same, pd.Series(.95, same.index, name="correlation")], axis=1)
    return pd.concat([spurious, same], ignore_index=True)


def spurious_table(spurious: pd.DataFrame, study: pd.DataFrame) -> str:
    """Worst group, flips and the category map's background as the training correlation grows."""
    runs = all_correlations(spurious, study)
    levels = sorted(runs["correlation"].unique())
    lines = ["| fine-tuned with | " + " | ".join(f"worst group, {c:g}" for c in levels) + " | Δ worst group, 0.95, six runs "
             "| flipped, 0.95, six runs | Δ flipped, 0.95, six runs | category map on the background, 0.95, six runs |",
             "|---|" + "---|" * (len(levels) + 4)]
    main = study[study["background_mass"].notna()]
    differences = paired_differences(main, CONTROL, ["worst_group_accuracy", "flipped"]).set_index(["row", "metric"])
    means = main.groupby("row")[["worst_group_accuracy", "flipped", "background_mass"]].mean()
    for row in dict.fromkeys(runs["row"]):
        cells = [f"{group['worst_group_accuracy'].mean():.3f}" if len(
            group := runs[(runs["row"] == row) & (runs["correlation"] == c)]) else "" for c in levels]
        d = [signed(differences.loc[(row, m)]) if row != CONTROL else "" for m in ("worst_group_accuracy", "flipped")]
        cells += [d[0], f"{means.loc[row, 'flipped']:.3f}", d[1], f"{means.loc[row, 'background_mass']:.3f}"]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heldout_table(heldout: pd.DataFrame) -> str:
    """The recommended variant on held-out seeds, line by line of what was asked."""
    differences = paired_differences(heldout, CONTROL, list(ASKED)).set_index(["row", "metric"])
    means = heldout.groupby("row")[list(ASKED)].mean()
    rows = [CONTROL, "DEAL", "swap", "recommended", "balanced", "balanced, DEAL"]
    lines = ["| | " + " | ".join(rows) + " | recommended − contrastive only [95 %] | asked | met |",
             "|---|" + "---|" * (len(rows) + 3)]
    for metric, (asked, met) in ASKED.items():
        d = differences.loc[("recommended", metric)]
        cells = [f"{means.loc[row, metric]:.3f}" for row in rows]
        cells += [signed(d), asked, "yes" if met(d, means.loc[CONTROL, metric]) else "**no**"]
        lines.append(f"| {CLAIMS[metric][0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def all_tables(folder: Path) -> dict[str, str]:
    """Every table that stands in the README between `<!-- name: ... -->` and `<!-- end of name -->`."""
    read = {name: pd.read_csv(folder / f"{name}.csv") for name in ("study", "methods", "spurious", "heldout")}
    return {"table": study_table(read["study"]), "methods": methods_table(read["methods"]),
            "spurious": spurious_table(read["spurious"], read["study"]), "heldout": heldout_table(read["heldout"])}


def into_readme(text: str, blocks: dict[str, str]) -> str:
    """The README with these tables in their places; ValueError where one has no place."""
    for name, block in blocks.items():
        start, end = f"<!-- {name}:", f"<!-- end of {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md needs one line {start} ... --> and one line {end}")
        opening = text[text.index(start):].split("\n", 1)[0]
        head, tail = text.split(opening, 1)[0], text.split(end, 1)[1]
        text = f"{head}{opening}\n{block}\n{end}{tail}"
    return text
