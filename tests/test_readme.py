"""What the README says about results is what the committed study says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return pd.read_csv(ROOT / "data" / "birdworld" / "study.csv")


def test_table_is_the_one_of_the_study(study):
    script = runpy.run_path(str(ROOT / "data" / "birdworld" / "study.py"))
    block = re.search(r"<!-- table:.*?-->\n(.*?)\n<!-- end of table -->", README, re.DOTALL).group(1)
    assert block == script["readme_table"](study)


def test_study_has_every_row_on_every_seed(study):
    script = runpy.run_path(str(ROOT / "data" / "birdworld" / "study.py"))
    trained = {name for name, config in script["ROWS"].items() if config is not None}
    counts = study.groupby("row")[["pretrained", "seed"]].apply(lambda rows: len(rows.drop_duplicates()))
    assert (counts[list(trained)] >= 4).all()
    assert {"pretrained", *script["CONTROLS"]} <= set(study["row"])
    assert study["commit"].str.fullmatch(r"[0-9a-f]{7,40}").all()


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?://)([^)#]+)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
