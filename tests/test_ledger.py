"""The ledger of what cannot be trusted (data/ledger.csv): every figure is computed anew, and README and notebook follow it.

The figures are computed here in another way than in notebook 06, with the module's own functions where it has them.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import dealkit
from dealkit import metrics
from dealkit.paths import data_path
from dealkit.study import paired_differences

ROOT = Path(__file__).resolve().parents[1]
LEDGER = pd.read_csv(data_path("ledger.csv"), keep_default_na=False).set_index("id", drop=False)
NOTEBOOK = ROOT / "notebooks" / "06_what_cannot_be_trusted.ipynb"
COLUMNS = ["id", "topic", "paper", "released_code", "dealkit", "figure", "as_released", "as_described", "tolerance",
           "status", "notebook_section"]
STATUSES = {"ran", "read", "arithmetic", "ours"}     # the last: found with our code alone, or about ourselves
WITH_FIGURE = LEDGER.index[LEDGER["figure"] != ""]
OPEN, CLOSE = ("<!-- ledger: from data/ledger.csv, checked by tests/test_ledger.py -->", "<!-- end of ledger -->")


def ledger_table(ledger: pd.DataFrame) -> str:
    """The README's table of the ledger, one line a row."""
    lines = ["| what | paper | released code | here | figure: as released → as described |", "|---|---|---|---|---|"]
    for row in ledger.itertuples():
        figure = f"{row.figure}: **{float(row.as_released):g} → {float(row.as_described):g}**" if row.figure else ""
        cells = [f"{row.topic} ({row.status})", row.paper, row.released_code, row.dealkit, figure]
        assert not any("|" in cell for cell in cells)
        lines.append("| " + " | ".join("" if cell == "-" else cell for cell in cells) + " |")
    return "\n".join(lines)


# --- the file, and who follows it -------------------------------------------------------------------------------------

def test_the_file_is_in_order():
    assert list(LEDGER.columns) == COLUMNS and LEDGER["id"].is_unique
    assert LEDGER["id"].str.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*").all() and set(LEDGER["status"]) == STATUSES
    for row in LEDGER.itertuples():
        assert all([row.topic, row.paper, row.released_code, row.dealkit, row.notebook_section]), row.id
        figures = [row.as_released, row.as_described, row.tolerance]
        assert all(map(bool, figures)) if row.figure else not any(figures), f"{row.id}: all of the figure, or nothing"
    assert list(LEDGER.index[LEDGER["figure"] == ""]) == ["dataset-flag"], "a row without a figure has to be justified"


def test_a_tolerance_tells_the_two_values_apart():
    """Else one number could pass for both behaviours."""
    gap = (LEDGER.loc[WITH_FIGURE, "as_released"].astype(float) - LEDGER.loc[WITH_FIGURE, "as_described"].astype(float))
    assert (gap.abs() > 2 * LEDGER.loc[WITH_FIGURE, "tolerance"].astype(float)).all()


def test_the_notebook_has_every_row():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    source = "\n".join(cell.source for cell in cells)
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    for row in LEDGER.itertuples():
        assert f'"{row.id}"' in code or row.notebook_section.startswith("13."), f"{row.id} is not in {NOTEBOOK.name}"
        assert f"\n## {row.notebook_section}\n" in f"\n{source}\n", f"no section {row.notebook_section!r}"
    for name in WITH_FIGURE:
        assert re.search(rf'settle\("{name}"|\("{name}", "', code), f"{name} is not settled in {NOTEBOOK.name}"


def test_the_readme_has_the_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(re.escape(OPEN) + r"\n(.*?)\n" + re.escape(CLOSE), readme, re.DOTALL)
    assert found == [ledger_table(LEDGER)]


# --- the figures ------------------------------------------------------------------------------------------------------

@cache
def material() -> dict:
    """The shipped model, 64 test birds, the texts of each (five concepts and the category) and their maps."""
    setup = dealkit.preset("birdworld")
    batch = setup.test.batch(range(64))
    texts = [setup.bank[name] + [f"a photo of a {name}"]
             for name in (setup.test.categories[label] for label in batch["label"])]
    with torch.no_grad():
        text_emb = torch.stack([setup.vlm.encode_text(row) for row in texts])
    maps = dealkit.explain(setup.vlm, batch["image"], text_emb)
    return {"setup": setup, "vlm": setup.vlm, "images": batch["image"], "masks": batch["part_masks"], "texts": texts,
            "text_emb": text_emb, "maps": maps, "concept_maps": maps[:, :5]}


@cache
def study() -> pd.DataFrame:
    return pd.read_csv(data_path("birdworld", "study.csv"))


def effect(row: str, metric: str) -> float:
    """Mean difference of a row of the study to contrastive-only, pair by pair."""
    return paired_differences(study(), "contrastive only", [metric]).set_index("row").loc[row, "mean"]


def regularisers(maps: torch.Tensor) -> torch.Tensor:
    return 0.1 * dealkit.disentangle_loss(maps[:, :5]) + 0.01 * dealkit.localize_loss(maps[:, :5], maps[:, 5])


def detached_maps():
    m, reached = material(), []
    for detach in (True, False):
        maps = dealkit.explain(m["vlm"], m["images"][:4], m["texts"][:4], create_graph=True)
        loss = regularisers(maps.detach() if detach else maps) + 0 * m["vlm"].model.logit_scale     # as in a sum
        m["vlm"].model.zero_grad(set_to_none=True)
        loss.backward()
        reached.append(sum(p.grad is not None and bool(p.grad.any()) for p in m["vlm"].model.visual.parameters()))
    m["vlm"].model.zero_grad(set_to_none=True)
    return reached


def l1_term():
    maps = material()["maps"][:48]
    stretched = dealkit.normalize_maps(maps[:, :5].flatten(1, 2))       # five maps as one tall one: a common range
    term = 0.0005 * stretched.sum()
    return (term / (term + regularisers(maps))).item(), 0


def false_negatives():
    m = material()
    batch = m["setup"].train.batch(range(48))
    with torch.no_grad():
        image_emb = m["vlm"].encode_image(batch["image"])
        text_emb = m["vlm"].encode_text([f"a photo of a {m['setup'].test.categories[y]}" for y in batch["label"]])
    logits = m["vlm"].logit_scale.detach() * image_emb @ text_emb.T
    target = torch.arange(48)
    plain = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return plain.item(), dealkit.contrastive_loss(image_emb, text_emb, m["vlm"].logit_scale, batch["label"]).item()


def fp16_update():
    weights = torch.cat([p.detach().flatten() for p in material()["vlm"].model.parameters()])
    weights = weights[(weights.abs() >= 0.005) & (weights.abs() <= 0.1)]
    shares = []
    for dtype in (torch.float16, torch.float32):
        before = weights.to(dtype)
        shares.append((before.sub(5e-7) != before).float().mean().item())
    return shares


def dead_maps():
    m = material()
    signed = dealkit.explain(m["vlm"], m["images"], m["text_emb"][:, :5], method="gradcam", signed=True)
    dead = signed.flatten(0, 1)[signed.flatten(0, 1).amax(dim=(1, 2)) <= 0]
    assert len(dead) >= 2
    values = dead[None].clone().requires_grad_()
    maps = values.relu()
    loss = (maps / (maps.amax(dim=(2, 3), keepdim=True) + 1e-8)).sum()
    shares = []
    for loss in (loss, dealkit.guard_loss(values)):
        gradient, = torch.autograd.grad(loss, values)
        shares.append(gradient.flatten(2).ne(0).any(-1).float().mean().item())
    return shares


def train_text():
    setup = material()["setup"]
    birds = setup.test.batch(range(320))
    with torch.no_grad():
        image_emb = setup.vlm.encode_image(birds["image"])
        prompts = {False: [f"a photo of a {c}" for c in setup.test.categories],
                   True: [f"a photo of a {c} with {', '.join(setup.bank[c])}" for c in setup.test.categories]}
        return [(image_emb @ setup.vlm.encode_text(prompts[rich]).T).argmax(1).eq(birds["label"]).float().mean().item()
                for rich in (False, True)]


def curve_fidelity(images, maps, text_emb, mix=lambda inserted, blurred: inserted, blur=metrics.blur) -> float:
    """The mean of the paper's equation from `replacement_curve`; `mix` decides what of an insertion is kept."""
    vlm, blurred = material()["vlm"], blur(images)

    def score(x, k):
        return (vlm.encode_image(mix(x, blurred)) * text_emb).sum(1)

    curve = metrics.replacement_curve(score, blurred, images, maps[:, None], 5)[..., 0]
    with torch.no_grad():
        whole = (vlm.encode_image(images) * text_emb).sum(1) - curve[0]
    return ((curve[1:] - curve[0]) / whole).abs().clamp(0, 1).mean().item()


@cache
def described_fidelity() -> float:
    m = material()
    return metrics.insertion_fidelity(lambda x, k: (m["vlm"].encode_image(x) * m["text_emb"][:, k]).sum(1),
                                      m["images"], m["concept_maps"])


def pairs(order: torch.Tensor):
    m = material()
    return m["images"][order], m["concept_maps"].flatten(0, 1), m["text_emb"][:, :5].flatten(0, 1)


def red_channel():
    def red(inserted, blurred):
        return torch.cat([inserted[:, :1], blurred[:, 1:]], dim=1)

    return curve_fidelity(*pairs(torch.arange(320) // 5), mix=red), described_fidelity()


def misaligned_pairs():
    images, seen = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 8, 8), set()      # image b is b everywhere

    def score(x, k):
        seen.update((b, k) for b in range(8) if round(x[b].mean().item()) == b)
        return x.mean(dim=(1, 2, 3))

    metrics.insertion_fidelity(score, images, torch.rand(8, 5, 4, 4))
    return sum(n % 8 == n // 5 for n in range(40)), len(seen)


def misaligned_fidelity():
    row = torch.arange(320)
    return curve_fidelity(*pairs(row // 40 * 8 + row % 40 % 8)), described_fidelity()


def nan_batches():
    m = material()
    images = m["images"][:16].clone()
    images[12] = 0                                   # in the other batch than in the notebook
    fidelity = metrics.insertion_fidelity(lambda x, k: (m["vlm"].encode_image(x) * m["text_emb"][:16, k]).sum(1),
                                          images, m["concept_maps"][:16], steps=1, reduction="none")
    batch_means = fidelity.view(2, 40).mean(1)
    return 40 * int(batch_means.isnan().sum()), int(fidelity.isnan().sum())


def pixel_sum():
    maps = material()["concept_maps"]
    finer = F.interpolate(maps, scale_factor=2, mode="nearest")
    return [metrics.overlap(finer, kind) / metrics.overlap(maps, kind) for kind in ("product", "cosine")]


def one_pixel_maps():
    maps = torch.zeros(64, 5, 10, 10)
    for k, (y, x) in enumerate([(0, 0), (0, 9), (9, 0), (9, 9), (0, 5)]):
        maps[:, k, y, x] = 7.0
    return metrics.disentanglability(maps), metrics.pointing_game(maps, material()["masks"])


def sigmoid_constants():
    overlap = study().set_index(["row", "pretrained", "seed"])["overlap_product"]

    def gain(threshold):
        score = overlap.map(lambda value: 1 / (1 + math.exp(-10 * (threshold - value / 100))))
        return (score["DEAL"] - score["contrastive only"]).mean()

    assert gain(0.2) == pytest.approx(effect("DEAL", "disentanglability"), abs=1e-4)
    return gain(0.05), gain(0.2)


def centre_maps():
    return [study().groupby("row")["insertion_fidelity"].mean()[row] for row in ("centre maps", "pretrained")]


def zero_shot_rows():
    accuracy = study().groupby("row")["accuracy"].mean()
    return accuracy["DEAL"] - accuracy["pretrained"], effect("DEAL", "accuracy")


def claim(model: str, preset: str, column: str = "paper") -> float:
    claims = pd.read_csv(data_path("claims.csv"))
    return claims[claims["metric"] == "accuracy"].set_index(["model", "preset"]).loc[(model, preset), column]


def ours_world():
    millions = sum(p.numel() for p in material()["vlm"].model.parameters()) / 1e6
    return millions, claim("DEAL", "average", "million_parameters")


def ours_blur():
    def halve(images):
        small = F.avg_pool2d(images, 2)              # what bilinear halving does
        return F.interpolate(small, size=images.shape[-2:], mode="bilinear")

    return described_fidelity(), curve_fidelity(*pairs(torch.arange(320) // 5), blur=halve)


def ours_one_view():
    methods = pd.read_csv(data_path("birdworld", "methods.csv"))
    gain = {method: paired_differences(part, "contrastive only", ["pointing_game"]).set_index("row").loc["DEAL", "mean"]
            for method, part in methods.groupby("method")}
    return gain["relevance"], gain["every_exit"]


RELEASED = "paper's form, released weights"
CHECKS = {
    "detached-maps": detached_maps, "l1-term": l1_term, "false-negatives": false_negatives, "fp16-update": fp16_update,
    "dead-maps": dead_maps, "train-text": train_text, "red-channel": red_channel, "misaligned-pairs": misaligned_pairs,
    "misaligned-fidelity": misaligned_fidelity, "nan-batches": nan_batches, "pixel-sum": pixel_sum,
    "one-pixel-maps": one_pixel_maps, "sigmoid-constants": sigmoid_constants, "centre-maps": centre_maps,
    "zero-shot-rows": zero_shot_rows, "ours-world": ours_world, "ours-blur": ours_blur, "ours-one-view": ours_one_view,
    "released-training": lambda: (effect("detached", "overlap_cosine"), effect(RELEASED, "overlap_cosine")),
    "eurosat-baseline": lambda: (claim("DEAL", "eurosat") - claim("CLIP", "eurosat"), claim("DEAL", "eurosat") - 0.494),
    "imagenet-control": lambda: (claim("DEAL", "imagenet") - claim("CLIP", "imagenet"),
                                 0.733 - claim("CLIP", "imagenet")),
    "ours-form": lambda: (effect("DEAL", "concept_accuracy"), effect(RELEASED, "concept_accuracy")),
    "ours-weights": lambda: (effect("DEAL, paper's form", "overlap_cosine"), effect(RELEASED, "overlap_cosine")),
    "ours-localizability": lambda: (effect("DEAL", "insertion_fidelity"), effect(RELEASED, "insertion_fidelity")),
    "ours-worst-group": lambda: (effect("DEAL", "worst_group_accuracy"), effect(RELEASED, "worst_group_accuracy")),
}
SLOW = {"red-channel", "misaligned-fidelity", "ours-blur"}


def test_every_figure_has_a_check():
    assert set(CHECKS) == set(WITH_FIGURE)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
                                  for name in WITH_FIGURE])
def test_a_figure_comes_out_again(name):
    row = LEDGER.loc[name]
    values = CHECKS[name]()
    for value, column in zip(values, ("as_released", "as_described"), strict=True):
        assert value == pytest.approx(float(row[column]), abs=float(row["tolerance"]) + 1e-9), (column, values)


def test_the_detached_rows_are_contrastive_only_bit_for_bit():
    runs = study().set_index(["row", "pretrained", "seed"]).drop(columns=["commit", "versions"])
    detached = runs.loc["detached"].dropna(axis=1)                # without insertion, which most rows do without
    assert len(detached.columns) > 30 and len(detached) == 6
    pd.testing.assert_frame_equal(detached, runs.loc["contrastive only", detached.columns], check_exact=True)
