"""The paper's experiment on one data set: python data/reproduce.py cub

For every seed, fine-tunes with contrastive-only and with DEAL, evaluates both, the model before, and maps that look at
nothing, and writes build/results/<preset>.json: every metric with its 95 % interval, the paired differences, settings,
versions, device, seconds and peak memory (of the first process). Killed half-way, it goes on where it was: each run has
its checkpoint in build/runs/, under a checksum of its first weights; evaluations are made again. The cost of an
interrupted run is null.

    python data/reproduce.py cub                              OpenAI's ViT-B/32 on the GPU; downloads 1.1 GB of images
    python data/reproduce.py imagenet --data /path/to/ILSVRC  a data set that you have
    python data/reproduce.py cub --form paper                 the paper's losses and weights instead of the preset's
    accelerate launch data/reproduce.py cub                   on several GPUs or nodes
    python data/reproduce.py birdworld                        the first of its two pretraining seeds (study.py has both)
    python data/reproduce.py --claims                         data/results/*.json -> data/claims.csv, prints the table

The presets have the paper's batch size, rate and epochs, and the form and weights of DEAL that were chosen on Birdworld
(cosine, maximum, guard, no gradient into the text); nobody has tuned these on photographs. Evaluation costs more than
training: some 300 passes for each of the images with insertion. To try, --seeds 1 --insertion-images 16.

A figure goes into data/claims.csv only from a file in data/results/ that was made with the preset as it stands: the
published weights, all images, 512 with insertion, a clean commit. (Half precision is no change of that kind.)
"""
from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import shlex
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from datetime import date, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

import accelerate
import pandas as pd
import torch

import dealkit
from dealkit.evaluation import centre_maps, random_maps, uniform_maps
from dealkit.evaluation.identity import weights_hash
from dealkit.presets import PRESETS
from dealkit.study import paired_differences
from dealkit.training import checkpoint

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"
CLAIMS = HERE / "claims.csv"
IMAGES = {"cub": (5994, 5794), "oxford_pets": (3680, 3669), "food101": (75750, 25250), "eurosat": (24000, 3000),
          "imagenet": (1281167, 50000)}                              # to train and to test, whole
INSERTED = 512
CONTROLS = {"random maps": random_maps, "centre maps": centre_maps, "uniform maps": uniform_maps}
SHOWN = {"disentanglability": "disentanglability", "insertion_fidelity": "localizability (insertion fidelity)",
         "accuracy": "accuracy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", choices=[name for name in PRESETS if name != "clip"])
    parser.add_argument("--claims", action="store_true", help="bring data/claims.csv in step with data/results/")
    parser.add_argument("--seeds", type=int, default=2, help="fine-tuning seeds (default: 2)")
    parser.add_argument("--form", choices=["preset", "paper"], default="preset",
                        help="DEAL as it was chosen on Birdworld, or the paper's losses and weights (default: preset)")
    parser.add_argument("--data", help="folder of the data set, or the one above it; default: that of DEALKIT_DATA")
    parser.add_argument("--no-download", dest="download", action="store_false", help="fetch no data set")
    parser.add_argument("--model", help="another model of open_clip")
    parser.add_argument("--weights", default="default", help="another tag, a .safetensors file, or 'none' for random")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--batch-size", type=int, help="default: the paper's")
    parser.add_argument("--lr", type=float, help="default: the paper's")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--freeze-text", action="store_true")
    parser.add_argument("--checkpoint-activations", action="store_true", help="less memory, a third more time")
    parser.add_argument("--workers", type=int, default=4, help="processes that load images")
    parser.add_argument("--insertion-images", type=int, default=INSERTED, help="images with insertion metrics")
    parser.add_argument("--out", type=Path, default=BUILD, help="default: build/")
    args = parser.parse_args()
    if args.claims:
        claims = claimed(pd.read_csv(CLAIMS, dtype={"commit": str, "figure": str}), HERE / "results")
        claims.to_csv(CLAIMS, index=False, float_format="%.6g", lineterminator="\n")
        print(claims_table(claims))
    elif args.preset is None:
        parser.error("name a preset, or --claims")
    else:
        reproduce(args)


def reproduce(args: argparse.Namespace) -> None:
    """Every run of one preset, and its results as a file."""
    # the others wait for the main process while it evaluates: on ImageNet longer than the ten minutes of the default
    state = accelerate.PartialState(cpu=args.device == "cpu", timeout=timedelta(hours=6))
    device = args.device or str(state.device)
    with state.main_process_first():             # one process fetches images and weights, the others find them
        setup = dealkit.preset(args.preset, None if args.weights == "none" else args.weights, device, args.model,
                               args.data, args.download)
    base = setup.config if args.form == "preset" else dealkit.DealConfig(
        **{name: getattr(setup.config, name) for name in ("lr", "batch_size", "epochs", "category_prompt")})
    changes = {"precision": args.precision, "freeze_text": args.freeze_text,
               "checkpoint_activations": args.checkpoint_activations,
               "batch_size": args.batch_size or setup.config.batch_size, "lr": args.lr or setup.config.lr}
    config = replace(base, **changes)
    about = machine(device, state.num_processes)                  # now, for the commit that runs is that of now
    name = args.preset if args.form == "preset" else f"{args.preset}-paper"
    runs = args.out / "runs" / name / weights_hash(setup.vlm)[:12]         # other weights are another run
    cost = {"seconds": {}, "peak_memory_mib": {}}
    rows = []
    for row, explainer in {**CONTROLS, "pretrained": None}.items():               # maps that look at nothing, first
        found = timed(cost, f"evaluate {row}", device, partial(measured, setup.vlm, setup, args, state, explainer))
        rows.append(found | {"row": row, "seed": 0})
    for seed in range(args.seeds):
        for row, settings in (("contrastive only", config.contrastive_only), ("DEAL", config)):
            vlm, run, chosen = setup.fresh(), f"{row}, seed {seed}", replace(settings, seed=seed)
            folder = runs / run.replace(", ", " ").replace(" ", "-").lower()
            begun = (folder / checkpoint.NAME).exists()
            timed(cost, run, device, partial(tuned, vlm, setup, chosen, folder, args))
            if state.is_main_process:
                keep_cost(cost, run, folder / "cost.json", begun)
            found = timed(cost, f"evaluate {run}", device, partial(measured, vlm, setup, args, state))
            rows.append(found | {"row": row, "seed": seed})
    if state.is_main_process:
        results = {
            "preset": args.preset, "model": setup.vlm.name, "weights": args.weights,
            "command": shlex.join(["python", "data/reproduce.py", *sys.argv[1:]]), "date": date.today().isoformat(),
            "images": {"train": len(setup.train), "test": len(setup.test)}, "categories": len(setup.test.categories),
            "insertion_images": min(args.insertion_images, len(setup.test)),
            "config": asdict(config), "changed": sorted([key for key in ("batch_size", "lr", "freeze_text")
                                                         if changes[key] != getattr(setup.config, key)]
                                                        + ["form"] * (args.form == "paper")),
            **summary(pd.DataFrame(rows)), **cost, **about}
        path = args.out / "results" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path, json.dumps(finite(results), indent=1) + "\n")
        print(pd.DataFrame(rows).groupby("row", sort=False)[list(SHOWN)].mean().round(3).to_string())
        print(f"wrote {path}; the table in README says how a figure gets into it")


def tuned(vlm, setup, config, folder: Path, args) -> pd.DataFrame:
    """Fine-tune, or go on with it. All processes ask to resume: not each of them may see the folder of the first."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "there is no run in")
        return dealkit.finetune(vlm, setup.train, setup.bank, config, out_dir=folder, resume=True, workers=args.workers)


def measured(vlm, setup, args, state, explainer=None) -> dict:
    """The row of `evaluate`, on the main process; the others wait at the next step for it."""
    if not state.is_main_process:
        return {}
    return dealkit.evaluate(vlm, setup.test, setup.bank, explainer=explainer, workers=args.workers, progress=True,
                            category_prompt=setup.config.category_prompt,
                            insertion_images=args.insertion_images).to_dict()


def timed(cost: dict, name: str, device: str, call):
    """The call's result; its seconds and peak memory go into `cost`. The peak of a CPU is that of the whole process."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) / 2 ** 20 if cuda else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10))
    cost["seconds"][name], cost["peak_memory_mib"][name] = round(time.perf_counter() - start, 1), round(peak)
    return result


def keep_cost(cost: dict, name: str, path: Path, begun: bool) -> None:
    """The cost of a whole run, beside it: a run that is found finished still cost what it did; of a rest it is None."""
    if not path.exists():
        kept = {key: None if begun else values[name] for key, values in cost.items()}
        checkpoint.write_text(path, json.dumps(kept))
    kept = json.loads(path.read_text(encoding="utf-8"))
    for key, values in cost.items():
        values[name] = kept[key]


def summary(table: pd.DataFrame) -> dict:
    """Rows -> every run, the mean of each row, and DEAL minus contrastive-only, pair by pair."""
    ends = ("_low", "_high")
    metrics = [c for c in table.columns if c not in ("row", "seed", "n") and not c.endswith(ends)]
    means = {row: {metric: {end: runs[metric + end].mean() for end in ("", *ends)} for metric in metrics}
             for row, runs in table.groupby("row", sort=False)}
    rows = {row: {metric: {"mean": value[""], "low": value["_low"], "high": value["_high"]}
                  for metric, value in columns.items()} for row, columns in means.items()}
    differences = paired_differences(table.assign(pretrained=""), "contrastive only", metrics)
    deal = differences[differences["row"] == "DEAL"].set_index("metric")[["mean", "low", "high", "pairs"]]
    return {"rows": rows, "interval": "95 %, bootstrap over test images, ends averaged over seeds",
            "deal_minus_contrastive_only": deal.to_dict("index"), "runs": table.to_dict("records")}


def machine(device: str, processes: int) -> dict:
    git, commit = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"], ""
    try:
        commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:                                                  # no git here
        pass
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.machine()
    packages = ("torch", "open_clip_torch", "accelerate", "numpy")
    return {"commit": commit or "unknown", "device": name, "processes": processes,
            "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}}}


def finite(value):
    """NaN and infinity are no JSON: they become null."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def claimed(claims: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The claims with our columns taken from the results in `folder`; empty where there is none."""
    claims, paper = claims.copy(), claims["source"] != "Birdworld"       # those are of data/birdworld/claims.py
    claims.loc[paper, ["ours", "low", "high"]] = float("nan")
    claims["commit"] = claims["commit"].astype(object).where(~paper, None)
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if why_not := _other_than_preset(results):
            sys.exit(f"{path}: not the preset as it stands ({', '.join(why_not)}). Keep it somewhere else.")
        for i in claims.index[paper & (claims["preset"] == results["preset"])]:
            found = results["rows"].get(claims.loc[i, "our_row"], {}).get(claims.loc[i, "metric"])
            if found and found["mean"] is not None:
                claims.loc[i, ["ours", "low", "high"]] = [found[key] for key in ("mean", "low", "high")]
                claims.loc[i, "commit"] = results["commit"]
    single = claims[paper & (claims["preset"] != "average")]
    for i in claims.index[claims["preset"] == "average"]:           # only where all five were run
        same = single[(single["model"] == claims.loc[i, "model"]) & (single["metric"] == claims.loc[i, "metric"])]
        claims.loc[i, "ours"] = same["ours"].mean(skipna=False)
    return claims


def _other_than_preset(results: dict) -> list[str]:
    """What of these results is not as the paper's table needs it."""
    right = {"model": ["ViT-B-32-quickgelu"], "weights": ["default", "openai"], "changed": [[]]}
    why_not = [f"{key} is {results[key]!r}" for key, values in right.items() if results[key] not in values]
    if tuple(results["images"].values()) != IMAGES.get(results["preset"]):
        why_not.append(f"the images are {results['images']}")
    if results["insertion_images"] < INSERTED:
        why_not.append(f"insertion with {results['insertion_images']} images")
    if results["commit"].endswith(("unknown", "-dirty")):
        why_not.append(f"the commit is {results['commit']}")
    return why_not


def claims_table(claims: pd.DataFrame) -> str:
    """The README's table, paper → ours; a test keeps the two in step."""
    shown = claims[(claims["source"] != "Birdworld") & claims["our_row"].notna()]
    presets = list(dict.fromkeys(shown["preset"]))
    lines = ["| | | " + " | ".join(presets) + " |", "|---|---|" + "---|" * len(presets)]
    for metric, name in SHOWN.items():
        for model in dict.fromkeys(shown["model"]):
            part = shown[(shown["metric"] == metric) & (shown["model"] == model)].set_index("preset")
            both = [[f"{part.loc[p, key]:.3f}" if pd.notna(part.loc[p, key]) else "–" for key in ("paper", "ours")]
                    for p in presets]
            cells = [" → ".join(pair) if pair != ["–", "–"] else "–" for pair in both]
            lines.append(f"| {name} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
