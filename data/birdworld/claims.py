"""Recompute what README and notebooks quote about Birdworld: python data/birdworld/claims.py

The rows of data/claims.csv whose source is "Birdworld" say for every figure in the prose where it stands (`place`,
`quote`, the figure itself), and what it is of: `table` (data/birdworld/<table>.csv), `where` (a pandas query that picks
runs; empty for all), `our_row`, `metric`, and `statistic`:

    mean         over the runs of the row
    difference   to the row `baseline`, pair by pair; low, high: an end of its 95 % interval
    relative     that difference over the baseline's mean
    ratio        the row's mean over the mean of the row `baseline`

This script writes `ours`, `low` and `high`, and the commit of the table; a figure may differ from `ours` (times
`scale`) by `tolerance`, which is half a unit of its last digit. tests/test_claims.py fails where prose and tables drift apart.
"""
from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd

from dealkit.study import paired_differences

HERE = Path(__file__).resolve().parent
CLAIMS = HERE.parent / "claims.csv"


@cache
def read(table: str) -> pd.DataFrame:
    return pd.read_csv(HERE / f"{table}.csv")


def recomputed(claim: pd.Series) -> dict[str, float]:
    """ours, low and high of one row of claims.csv, from the table over seeds."""
    runs = read(claim["table"])
    if isinstance(claim["where"], str) and claim["where"]:
        runs = runs.query(claim["where"])
    means = runs.groupby("row")[claim["metric"]].mean()
    if claim["statistic"] == "mean":
        return {"ours": means[claim["our_row"]], "low": float("nan"), "high": float("nan")}
    if claim["statistic"] == "ratio":
        return {"ours": means[claim["our_row"]] / means[claim["baseline"]], "low": float("nan"), "high": float("nan")}
    lines = paired_differences(runs, claim["baseline"], [claim["metric"]]).set_index("row")
    line = lines.loc[claim["our_row"], ["mean", "low", "high"]] / (
        means[claim["baseline"]] if claim["statistic"] == "relative" else 1)
    found = dict(zip(("ours", "low", "high"), line))
    return found | {"ours": found[claim["statistic"]]} if claim["statistic"] in ("low", "high") else found


def commit_of(table: str) -> str:
    (commit,) = read(table)["commit"].unique()
    return commit


def main() -> None:
    claims = pd.read_csv(CLAIMS, dtype={"commit": str, "figure": str})
    for i in claims.index[claims["source"] == "Birdworld"]:
        for name, value in recomputed(claims.loc[i]).items():
            claims.loc[i, name] = value
        claims.loc[i, "commit"] = commit_of(claims.loc[i, "table"])
    claims.to_csv(CLAIMS, index=False, float_format="%.6g", lineterminator="\n")


if __name__ == "__main__":
    main()
