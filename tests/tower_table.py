"""Make data/towers.csv, which image towers of open_clip can be explained: python tests/tower_table.py

Every configuration is built without its text tower, and so without the hub: on the meta device for family, grid and
methods, then with random weights for the values, as in tower_check.py. Configurations with the same image tower are
checked once; of a ViT above a limit, that is of more than 10 GB or as `--limit` says, only the first and last blocks.
Finished towers are kept in build/towers/, so a killed run goes on where it was (all of them take hours). `--finish`
writes the table as far as the walk has come; the others are marked. `--structure` keeps the checks that are in the
table, and writes the rest anew.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import logging
import time
from pathlib import Path

import open_clip
import pandas as pd
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from torch import nn
from tower_check import measure, problems, sample, wake

from dealkit.models import find_tower

ROOT = Path(__file__).resolve().parents[1]
PATH, CACHE = ROOT / "data" / "towers.csv", ROOT / "build" / "towers"
LIMIT = 2.5e9      # parameters, of 4 bytes each
LIGHT = 1e8        # below this, gradients of all methods are checked; above, those of the first, with checkpointing
KEEP = 4           # blocks of a ViT above the limit that are checked
CLS, QUERY = "CLS row of the last attention", "row of the pooling attention"
VARIABLES = {      # family -> what its first method explains, in words
    "CLS-pooled ViT": CLS, "CLS-pooled timm ViT": CLS,
    "attention-pooled ViT": QUERY, "attention-pooled timm ViT": QUERY,
    "average-pooled ViT": "last tokens", "average-pooled timm ViT": "last tokens", "ModifiedResNet": "last feature map",
    "ConvNeXt": "last feature map", "FastViT": "last feature map", "Swin transformer": "last feature map"}
NOT_WALKED = "not walked"
ANATOMY: dict[str, dict] = {}  # fingerprint -> what is the same for all configurations with that tower
STRUCTURE = ["config", "family", "variable", "grid", "methods", "parameters_m"]


def config_names() -> list[str]:
    """open_clip's own configurations, without those that this process has registered."""
    return [name for name in open_clip.list_models() if not name.startswith("birdworld")]


def vision_config(name: str) -> tuple[int, dict, bool]:
    """What an image tower is made of: its embedding's length, its configuration, and whether it has QuickGELU, which
    open_clip gives to its own ViTs only."""
    config = open_clip.get_model_config(name)
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}  # no weights from a hub
    plain_vit = "timm_model_name" not in vision and isinstance(vision.get("layers", 12), int)
    return config["embed_dim"], vision, bool(config.get("quick_gelu", False)) and plain_vit


def fingerprint(name: str) -> str:
    """The same for configurations with the same image tower."""
    return hashlib.sha256(json.dumps(vision_config(name), sort_keys=True).encode()).hexdigest()[:12]


def build(name: str, device: str = "cpu") -> nn.Module:
    """The image tower of a configuration, in eval mode, as open_clip builds it."""
    embed_dim, vision, quick_gelu = vision_config(name)
    with torch.device(device):
        return _build_vision_tower(embed_dim, CLIPVisionCfg(**vision), quick_gelu).eval()


def build_short(name: str, keep: int = KEEP) -> nn.Module:
    """A ViT with its first and last blocks only, for one that is too big for the memory or the time."""
    huge = count_parameters(name) > LIMIT
    visual = build(name, "meta" if huge else "cpu")
    owner, attribute = (visual.trunk, "blocks") if hasattr(visual, "trunk") else (visual.transformer, "resblocks")
    blocks = list(getattr(owner, attribute))
    setattr(owner, attribute, nn.Sequential(*blocks[:keep - 1], *blocks[-1:]))
    if huge:  # never built whole: what is not a weight must be set here
        visual.to_empty(device="cpu")
        for buffer_name, buffer in visual.named_buffers():
            if not buffer_name.endswith("k_bias"):
                raise NotImplementedError(f"{name} has a buffer, {buffer_name}, that is not known here.")
            buffer.zero_()
    return visual


def count_parameters(name: str) -> int:
    """Of the image tower alone."""
    return round(structure(name)["parameters_m"] * 1e6)


def structure(name: str) -> dict:
    """A row of the table, without the check of values."""
    if fingerprint(name) not in ANATOMY:
        visual = build(name, "meta")
        tower = find_tower(visual)
        ANATOMY[fingerprint(name)] = {
            "family": tower.family, "variable": VARIABLES[tower.family], "grid": "x".join(map(str, tower.grid)),
            "methods": " ".join(tower.methods),
            "parameters_m": round(sum(weight.numel() for weight in visual.parameters()) / 1e6, 1)}
    return {"config": name, **ANATOMY[fingerprint(name)]}


def can_be_short(name: str) -> bool:
    """Whether a tower is a ViT, of equal blocks that can be left out."""
    return "ViT" in structure(name)["family"] and structure(name)["family"] != "FastViT"


def check(name: str, short: bool = False, every_gradient: bool = True) -> dict[str, float]:
    """Build a tower, wake it up and measure it; `short`: with its first and last blocks only."""
    visual = build_short(name) if short else build(name)
    wake(visual, sample(visual, count=8, seed=3))
    if count_parameters(name) > LIGHT:
        visual.set_grad_checkpointing(True)
    return measure(visual, every_gradient)


def readme_table(table: pd.DataFrame) -> str:
    """The README's table, one row a family; a test keeps the two in step."""
    lines = ["| image tower | configurations | for example | explained variable | methods |", "|---|---|---|---|---|"]
    families = table.groupby("family", sort=False)
    for family, rows in sorted(families, key=lambda item: -len(item[1])):
        example = rows.loc[rows["parameters_m"].idxmin(), "config"]
        methods = ", ".join(rows["methods"].iloc[0].split())
        lines.append(f"| {family} | {len(rows)} | `{example}` | {rows['variable'].iloc[0]} | {methods} |")
    return "\n".join(lines)


def readme_counts(table: pd.DataFrame) -> str:
    """What the README says of the walk; a test keeps the two in step."""
    whole, short, left = ((table["checked"] == text).sum() for text in ("all blocks", f"{KEEP} blocks", NOT_WALKED))
    return (f"These are all {len(table)} configurations of open_clip 3.3. {whole} were built whole and {short} with "
            f"{KEEP} of their blocks, with random weights; of the {left} largest only the structure was looked at.")


def checked(name: str, limit: float, finish: bool = False) -> dict[str, float]:
    """The check of a tower, kept in a file; of the whole tower if it was ever made. finish: none that is not there."""
    whole, short = (CACHE / f"{fingerprint(name)}{ending}.json" for ending in ("", "-short"))
    path = short if count_parameters(name) > limit and can_be_short(name) and not whole.exists() else whole
    if not path.exists() and finish:
        return {"checked": NOT_WALKED, "difference": float("nan")}
    if not path.exists():
        start = time.time()
        result = check(name, short=path == short, every_gradient=count_parameters(name) < LIGHT)
        result["checked"] = f"{KEEP} blocks" if path == short else "all blocks"
        path.write_text(json.dumps(result))
        gc.collect()
        print(f"{name:36} {time.time() - start:6.0f} s  {result} {problems(result)}", flush=True)
    return json.loads(path.read_text())


def main() -> None:
    """Walk all configurations, smallest first, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--structure", action="store_true", help="take the checks of values from the table as it is")
    parser.add_argument("--finish", action="store_true", help="walk no further, and write what there is")
    parser.add_argument("--limit", type=float, default=LIMIT, help="parameters of the largest ViT checked as a whole")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    table = pd.DataFrame([structure(name) for name in config_names()])
    old = pd.read_csv(PATH, dtype=str).set_index("config") if args.structure else None
    CACHE.mkdir(parents=True, exist_ok=True)
    for index in table["parameters_m"].sort_values().index:
        name = table.loc[index, "config"]
        if args.structure:
            table.loc[index, "checked"], table.loc[index, "difference"] = old.loc[name, ["checked", "difference"]]
            continue
        result = checked(name, args.limit, args.finish)
        walked = result["checked"] != NOT_WALKED
        table.loc[index, "checked"] = walked and "; ".join(problems(result)) or result["checked"]
        table.loc[index, "difference"] = f"{result['difference']:.1e}" if walked else ""
    table.to_csv(PATH, index=False, lineterminator="\n")
    print(readme_table(table), readme_counts(table), sep="\n\n")


if __name__ == "__main__":
    main()
