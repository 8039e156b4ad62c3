"""Concept banks as mappings and as files."""
import json
import os
from pathlib import Path

import pytest

from dealkit.concepts import ConceptBank, MissingCategory, check_concepts, load_concepts

GOOD = {   # not in alphabetical order, with a letter outside ASCII
    "Laysan Albatross": ["dark back", "white head", "yellow beak"],
    "Böhm's Bee-eater": ["green wing", "rufous crown", "long tail"],
    "American Crow": ["black wing", "thick beak", "dark eye"],
    "Winter Wren": ["cocked tail", "pale brow", "barred flank"],
}


def bank_of(concepts=GOOD, **provenance):
    return ConceptBank("test birds", concepts, provenance)


def write(path, **changes):
    """A bank file with something changed in it."""
    path.write_text(json.dumps({"name": "birds", "concepts": {"wren": ["cocked tail"]}, "provenance": {}} | changes))
    return path


# The bank as a mapping

def test_bank_is_a_mapping_in_the_order_of_the_data_set():
    bank = bank_of()
    assert bank.categories == list(bank) == list(GOOD) and len(bank) == 4
    assert bank["Winter Wren"] == GOOD["Winter Wren"] and dict(bank.items()) == GOOD == bank.concepts
    assert "Winter Wren" in bank and "Sparrow" not in bank and bank.get("Sparrow") is None
    bank["Winter Wren"].append("changed")
    assert bank == bank_of(), "an edit of what the bank returned must not reach the bank"


def test_banks_are_equal_when_everything_is():
    assert bank_of() == bank_of() and bank_of() != GOOD
    assert bank_of() != bank_of(dict(reversed(GOOD.items()))), "the order of the categories is part of the bank"
    assert bank_of(model="a") != bank_of(model="b")


def test_missing_category_is_a_readable_key_error():
    with pytest.raises(KeyError) as caught:
        bank_of()["laysan_albatros"]
    message = str(caught.value)
    assert isinstance(caught.value, MissingCategory)
    assert message.startswith("concept bank 'test birds' has no category 'laysan_albatros'"), "no quotes around it"
    assert "did you mean 'Laysan Albatross'" in message and "bank.categories" in message and "\\" not in message
    with pytest.raises(KeyError, match="has no category 7"):
        bank_of()[7]


@pytest.mark.parametrize("concepts, message", [
    ({}, "an empty bank"),
    (["red head"], "rule 'concepts'.*got list"),
    ({"wren": "cocked tail"}, "category 'wren': rule 'list'.*got 'cocked tail'"),
    ({"wren": ["cocked tail", 3]}, "category 'wren': rule 'string': 3"),
    ({" ": ["cocked tail"]}, "category ' ': rule 'category'"),
])
def test_a_bank_of_the_wrong_shape_is_refused(concepts, message):
    with pytest.raises(ValueError, match=message):
        ConceptBank("birds", concepts)


def test_bad_name_and_provenance_are_refused():
    with pytest.raises(ValueError, match="rule 'name'"):
        ConceptBank("", GOOD)
    with pytest.raises(ValueError, match="rule 'provenance': expected a mapping"):
        ConceptBank("birds", GOOD, ["gpt"])
    with pytest.raises(ValueError, match="rule 'provenance'.*use strings"):
        bank_of(date={1, 2})


# Files

def test_round_trip_is_equal_and_byte_stable(tmp_path):
    bank = bank_of(prompt="p", model="m", hand_edits=("one", "two"), count=3)
    bank.save(tmp_path / "new" / "a.json")
    again = ConceptBank.load(tmp_path / "new" / "a.json")
    assert again == bank and again.categories == list(GOOD)
    again.save(tmp_path / "b.json")
    content = (tmp_path / "new" / "a.json").read_bytes()
    assert content == (tmp_path / "b.json").read_bytes()
    assert "Böhm's Bee-eater".encode() in content and content.endswith(b"}\n") and b"\r" not in content
    other_order = bank_of(count=3, hand_edits=["one", "two"], model="m", prompt="p")
    other_order.save(tmp_path / "b.json")
    assert content == (tmp_path / "b.json").read_bytes(), "the order of the provenance has no meaning"


def test_a_file_saved_by_a_windows_editor_is_read(tmp_path):
    bank_of().save(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert ConceptBank.load(tmp_path / "a.json") == bank_of()


@pytest.mark.parametrize("function", ["write_bytes", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, function):
    def fail(target, *args):
        if function == "write_bytes":
            with open(target, "wb") as file:
                file.write(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.json"
    bank_of().save(path)
    old = path.read_bytes()
    monkeypatch.setattr(Path if function == "write_bytes" else os, function, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        bank_of(model="new").save(path)
    assert "left as it was" in caught.value.__notes__[0]
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.json"], "no debris either"


@pytest.mark.parametrize("concepts, message", [({"wren": []}, "'wren': rule 'count'"),
                                               ({"wren": ["tail", " "]}, "'wren': rule 'empty'")])
def test_what_load_would_refuse_is_not_saved(tmp_path, concepts, message):
    with pytest.raises(ValueError, match=message):
        bank_of(concepts).save(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes, message", [
    ({"concepts": {}}, "rule 'concepts'.*an empty bank"),
    ({"concepts": [["wren", "tail"]]}, "rule 'concepts'.*got list"),
    ({"concepts": {"wren": "cocked tail"}}, "category 'wren': rule 'list'"),
    ({"concepts": {"wren": [None]}}, "category 'wren': rule 'string'"),
    ({"concepts": {"wren": ["cocked tail", ""]}}, "category 'wren': rule 'empty'"),
    ({"concepts": {"wren": []}}, "category 'wren': rule 'count'"),
    ({"concepts": {"": ["cocked tail"]}}, "category '': rule 'category'"),
    ({"name": 3}, "rule 'name'"),
    ({"provenance": None}, "rule 'provenance'"),
    ({"provenance": {"share": float("nan")}}, "rule 'provenance'"),
    ({"extra": 1}, "rule 'format': expected an object with the keys .* found .*'extra'"),
])
def test_load_names_file_category_and_rule(tmp_path, changes, message):
    path = write(tmp_path / "broken.json", **changes)
    with pytest.raises(ValueError, match=f"broken.json: {message}"):
        ConceptBank.load(path)


@pytest.mark.parametrize("content, message", [
    (b'["wren"]', "rule 'format'.*found a list"),
    (b'{"name": "birds"', "rule 'format'.*line 1 column"),
    (b"\xff\xfe", "rule 'format'.*decode"),
    (b'{"name": "b", "provenance": {}, "concepts": {"wren": ["a"], "wren": ["b"]}}', "'wren' stands in the file twice"),
])
def test_load_refuses_other_files(tmp_path, content, message):
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"broken.json: .*{message}"):
        ConceptBank.load(tmp_path / "broken.json")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no concept bank at .*nowhere.json; .*load_concepts"):
        ConceptBank.load(tmp_path / "nowhere.json")


def test_unknown_shipped_bank_lists_the_known(tmp_path, monkeypatch):
    bank_of().save(tmp_path / "concepts" / "albatrosses.json")
    monkeypatch.setattr("dealkit.concepts.bank.data_path", tmp_path.joinpath)
    assert load_concepts("albatrosses") == bank_of()
    with pytest.raises(ValueError, match=r"called 'albatros' \(did you mean 'albatrosses'\?\); shipped: albatrosses\. "
                                         r"A file of your own.*ConceptBank\.load"):
        load_concepts("albatros")


def test_shipped_birdworld_bank_breaks_no_rule():
    bank = load_concepts("birdworld")
    assert len(bank) == 16 and {len(concepts) for concepts in bank.values()} == {5}
    assert check_concepts(bank, count=5).empty and check_concepts(bank).empty
