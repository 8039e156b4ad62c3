"""data/towers.csv, the support table, is what the code says of every configuration of open_clip."""

from __future__ import annotations

import logging
import re

import open_clip
import pandas as pd
import pytest
from tower_table import KEEP, NOT_WALKED, PATH, STRUCTURE, config_names, readme_counts, readme_table, structure


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_csv(PATH)


@pytest.mark.skipif(not open_clip.__version__.startswith("3.3"), reason="the table is of open_clip 3.3")
def test_table_is_what_the_code_says(table):
    """All of them, built on the meta device: family, explained variable, grid, methods and size, without weights."""
    logging.disable(logging.INFO)  # open_clip has a word to say about each timm tower
    try:
        rows = pd.DataFrame([structure(name) for name in config_names()])
    finally:
        logging.disable(logging.NOTSET)
    pd.testing.assert_frame_equal(rows, table[STRUCTURE])


def test_towers_were_walked_and_what_was_not_is_marked(table):
    """The figures are of a walk and not made up: they differ. Every family was walked, whole in at least one case."""
    walked = table[table["checked"] != NOT_WALKED]
    assert walked["checked"].isin(["all blocks", f"{KEEP} blocks"]).all() and (walked["difference"] < 1e-5).all()
    assert walked["difference"].nunique() > 10 and len(walked) > 0.6 * len(table)
    assert set(walked.loc[walked["checked"] == "all blocks", "family"]) == set(table["family"])
    assert (table.loc[table["checked"] != "all blocks", "parameters_m"] > 300).all()  # only what takes hours
    assert table.loc[table["checked"] == NOT_WALKED, "difference"].isna().all()


def test_readme_has_the_table_and_it_counts_every_configuration_once(table):
    readme = (PATH.parents[1] / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- towers:.*?-->\n(.*?)\n<!-- end of towers -->", readme, re.DOTALL).group(1)
    assert block == readme_table(table) and readme_counts(table) in " ".join(readme.split())
    lines = block.splitlines()
    counts = [int(line.split("|")[2]) for line in lines[2:]]
    assert sum(counts) == len(table) and counts == sorted(counts, reverse=True)
    assert len(counts) == table["family"].nunique()
    for line in lines[2:]:
        example = re.search(r"`(.+?)`", line).group(1)
        assert line.split("|")[1].strip() == table.set_index("config").loc[example, "family"]


def test_families_have_one_variable_and_the_same_methods_throughout(table):
    assert (table.groupby("family")[["variable", "methods"]].nunique() == 1).all(axis=None)
