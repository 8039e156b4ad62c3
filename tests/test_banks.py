"""The shipped concept banks, and how a data set's class names find their categories."""
from __future__ import annotations

import re
import unicodedata
from collections import Counter
from datetime import date

import pandas as pd
import pytest
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from dealkit.concepts import ConceptBank, MissingCategory, category_name, check_concepts, concept_prompt, load_concepts
from dealkit.paths import data_path

SHIPPED = {"birdworld": 16, "cub": 200, "eurosat": 10, "food101": 101, "imagenet": 1000, "oxford_pets": 37,
           "photographs": 4, "waterbirds": 2}
each_bank = pytest.mark.parametrize("name", SHIPPED)


# A data set's own names

@pytest.mark.parametrize("class_name, category", [
    ("001.Black_footed_Albatross", "Black footed Albatross"),
    ("200.Common_Yellowthroat", "Common Yellowthroat"),
    ("apple_pie", "apple pie"),
    ("AnnualCrop", "Annual Crop"),
    ("HerbaceousVegetation", "Herbaceous Vegetation"),
    ("River", "River"),
    ("040.MacGillivray_Warbler", "MacGillivray Warbler"),      # underscores part its words, so capitals do not
    ("pug", "pug"),
    ("great white shark", "great white shark"),
    ("American Pit Bull Terrier", "American Pit Bull Terrier"),
    ("St. Bernard", "St. Bernard"),      # a dot alone is no number
    ("3D printer", "3D printer"),
    ("missile (projectile)", "missile (projectile)"),
    (7, 7),
    (None, None),
])
def test_category_name(class_name, category):
    assert category_name(class_name) == category == category_name(category)


def test_class_names_find_their_category():
    bank = ConceptBank("mixed", {"Black footed Albatross": ["dark eye"], "apple pie": ["crust"], "Annual Crop": ["row"],
                                 "iPod": ["wheel"], "sea_lake": ["shore"], "sea lake": ["wave"]})
    assert bank["001.Black_footed_Albatross"] == ["dark eye"] and bank["apple_pie"] == ["crust"]
    assert bank["AnnualCrop"] == ["row"] and bank.get("AnnualCrop") == ["row"]
    assert "001.Black_footed_Albatross" in bank and "apple_pie" in bank and "AnnualCrop" in bank
    assert bank["iPod"] == ["wheel"] and bank["sea_lake"] == ["shore"], "the name as it stands comes first"
    assert list(bank) == list(bank.concepts), "and the bank lists its own names only"
    for stranger in ("002.Laysan_Albatross", "AnnualCrops", "Annualcrop", 1, None):
        assert stranger not in bank and bank.get(stranger) is None
    with pytest.raises(MissingCategory, match="no category '001.Black_footed_Albatros' .did you mean 'Black footed"):
        bank["001.Black_footed_Albatros"]


@pytest.mark.parametrize("name, class_name", [
    ("cub", lambda i, category: f"{i + 1:03d}.{category.replace(' ', '_')}"),
    ("food101", lambda i, category: category.replace(" ", "_")),
    ("eurosat", lambda i, category: category.replace(" ", "")),
    ("oxford_pets", lambda i, category: category.replace(" ", "_")),
    ("imagenet", lambda i, category: category),
])
def test_every_class_name_of_a_data_set_is_found_in_its_bank(name, class_name):
    bank = load_concepts(name)
    for i, category in enumerate(bank.categories):
        assert class_name(i, category) in bank and bank[class_name(i, category)] == bank.concepts[category]


# What is shipped

def test_these_banks_are_shipped_and_no_other_file():
    assert sorted(path.name for path in data_path("concepts").iterdir()) == [f"{name}.json" for name in SHIPPED]


@each_bank
def test_a_shipped_bank_is_complete_and_breaks_no_rule(name):
    bank = load_concepts(name)
    count = 5 if name == "birdworld" else 6
    assert bank.name == name and len(bank) == SHIPPED[name]
    assert {len(concepts) for concepts in bank.values()} == {count} == {bank.provenance["count"]}
    assert check_concepts(bank).to_dict("records") == []


@each_bank
def test_a_shipped_bank_says_how_it_was_made(name):
    record = load_concepts(name).provenance
    assert date.fromisoformat(record["date"]) and len(record["note"]) > 50 and record["model"]
    if name == "birdworld":
        assert record["model"].startswith("none") and record["prompt"] == ""
    else:
        domain = re.match("In (.+?), which 6 visible features", record["prompt"])[1]
        assert record["prompt"] == concept_prompt("CATEGORY", 6, domain) and record["classes"]


@each_bank
def test_loading_and_saving_gives_the_same_bytes(name, tmp_path):
    load_concepts(name).save(tmp_path / "bank.json")
    assert (tmp_path / "bank.json").read_bytes() == data_path("concepts", f"{name}.json").read_bytes()


@each_bank
def test_no_two_categories_of_a_shipped_bank_have_the_same_concepts(name):
    sets = Counter(frozenset(concepts) for concepts in load_concepts(name).values())
    assert not [set(concepts) for concepts, times in sets.items() if times > 1]


def well_written(concept):
    """Latin letters, no blank too many, a small letter first, or a word in capitals such as the V of "V-shaped"."""
    latin = all(letter.isascii() or unicodedata.name(letter).startswith("LATIN") for letter in concept)
    first = re.split("[ -]", concept)[0]
    return latin and concept == " ".join(concept.split()) and (concept[0].islower() or first.isupper())


@each_bank
def test_the_concepts_of_a_shipped_bank_are_well_written(name):
    assert well_written("V-shaped tail") and well_written("crème crown")
    assert not [bad for bad in ("Red crown", " red crown", "red  crown", "красный", "9 spots") if well_written(bad)]
    assert not [c for concepts in load_concepts(name).values() for c in concepts if not well_written(c)]


# The order of the labels

@pytest.mark.parametrize("name, class_name", [
    ("food101", lambda category: category.replace(" ", "_")),
    ("eurosat", lambda category: category.replace(" ", "")),
    ("oxford_pets", lambda category: category.casefold().replace(" ", "_")),
])
def test_categories_are_sorted_by_class_name(name, class_name):
    categories = load_concepts(name).categories
    assert categories == sorted(categories, key=class_name)


def test_known_classes_are_there():
    food, pets = load_concepts("food101").categories, load_concepts("oxford_pets").categories
    assert (food[0], food[1], food[50], food[100]) == ("apple pie", "baby back ribs", "grilled salmon", "waffles")
    assert (pets[0], pets[18], pets[36]) == ("Abyssinian", "Keeshond", "Yorkshire Terrier")
    assert load_concepts("eurosat").categories == [
        "Annual Crop", "Forest", "Herbaceous Vegetation", "Highway", "Industrial", "Pasture", "Permanent Crop",
        "Residential", "River", "Sea Lake"]


def test_imagenet_has_the_class_names_of_open_clip_where_they_are_unique():
    bank = load_concepts("imagenet")
    differing = {i: category for i, category in enumerate(bank.categories) if category != IMAGENET_CLASSNAMES[i]}
    assert differing == {744: "missile (projectile)", 836: "sunglasses (sunglass)"}
    twice = {name for name, times in Counter(IMAGENET_CLASSNAMES).items() if times > 1}
    assert twice == {IMAGENET_CLASSNAMES[i] for i in differing}, "a bank cannot have a category twice"
    assert all(f"index {i} ({IMAGENET_CLASSNAMES[i]} there)" in bank.provenance["classes"] for i in differing)


@pytest.mark.parametrize("number, category", [
    (1, "Black footed Albatross"), (2, "Laysan Albatross"), (14, "Indigo Bunting"), (17, "Cardinal"),
    (70, "Green Violetear"), (110, "Geococcyx"), (134, "Cape Glossy Starling"), (141, "Artic Tern"),
    (200, "Common Yellowthroat")])
def test_cub_is_in_the_order_of_its_numbers(number, category):
    assert load_concepts("cub").categories[number - 1] == category


def test_the_guessing_game_has_fair_questions_and_the_figures_that_are_quoted():
    game = pd.read_csv(data_path("guessing_game.csv"))
    right = (game["answer"] == game["category"]).groupby(game["others"]).sum()
    assert right.to_dict() == {"look-alikes": 49, "random": 50}
    assert game.groupby(["others", "bank"]).size().unstack().values.tolist() == [[20, 20, 10]] * 2
    for row in game.itertuples():
        options = row.options.split(" | ")
        assert len(set(options)) == 10 and row.category in options and row.answer in options
        assert set(options) <= set(load_concepts(row.bank).categories) and len(row.concepts.split("; ")) == 6
