"""Data sets from a folder that somebody has: one's own pictures, ImageNet, Waterbirds."""
from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.transforms as v1
from timm.data import ImageNetInfo
from tiny_photos import save, write
from torchvision.transforms.functional import pil_to_tensor

import dealkit
from dealkit.concepts import ConceptBank
from dealkit.datasets import photos

TENSOR = v1.ToTensor()
RNG = np.random.default_rng(0)
SYNSETS = ImageNetInfo().label_names()


def pictures(root, *names):
    for name in names:
        save(root / name, RNG)
    return root


# One's own

def test_a_folder_of_folders(tmp_path):
    root = pictures(tmp_path, "wren/b.jpg", "wren/a.JPEG", "apple_pie/x.jpg", "apple_pie/deeper/a.jpg", "Zebra/1.jpg")
    mine = photos.folder(root, TENSOR)
    assert mine.categories == ["Zebra", "apple pie", "wren"] and mine.parts == []
    assert mine.files == ["Zebra/1.jpg", "apple_pie/x.jpg", "apple_pie/deeper/a.jpg", "wren/a.JPEG", "wren/b.jpg"]
    assert mine.labels == [0, 1, 1, 2, 2] == [item["label"] for item in mine]
    assert torch.equal(mine[3]["image"], pil_to_tensor(PIL.Image.open(root / "wren" / "a.JPEG")) / 255)
    bank = ConceptBank("mine", {"zebra": ["stripes"], "apple pie": ["crust"], "wren": ["cocked tail"]})
    assert [bank[name] for name in mine.categories] == [["stripes"], ["crust"], ["cocked tail"]]


def test_folders_are_written_as_the_banks_write_them(tmp_path):
    root = pictures(tmp_path / "right", "001.Black_footed_Albatross/a.jpg", "AnnualCrop/a.jpg", "pug/a.jpg")
    categories = photos.folder(root, TENSOR).categories
    assert categories == ["Black footed Albatross", "Annual Crop", "pug"]
    assert categories == [dealkit.concepts.category_name(path.name) for path in sorted(root.iterdir())]
    root = pictures(tmp_path / "wrong", "apple_pie/a.jpg", "apple pie/a.jpg", "pug/a.jpg")
    with pytest.raises(ValueError, match="apple pie, apple_pie name the same category"):
        photos.folder(root, TENSOR)


def test_training_and_evaluation_take_a_folder(tmp_path, vlm):
    """`vlm`: the tiny CLIP of the tests, which knows Birdworld's words."""
    root = pictures(tmp_path, *(f"{name}/{i}.jpg" for name in ("zorvit", "pelmar") for i in range(6)))
    mine, bank = photos.folder(root, vlm.preprocess), dealkit.load_concepts("birdworld")
    train, held = photos.hold_out(mine, 0.3)
    config = dealkit.DealConfig(lambda_disentangle=0.1, gamma_localize=0.1, lr=1e-4, epochs=1, batch_size=4)
    assert len(dealkit.finetune(vlm, train, bank, config)) == 2
    row = dealkit.evaluate(vlm, held, bank, insertion_images=0)
    assert row["n"] == 4 and 0 <= row["accuracy"] <= 1 and np.isnan(row["pointing_game"])


def test_what_is_left_out_is_said_and_hidden_files_are_not(tmp_path):
    root = pictures(tmp_path, "wren/a.jpg", "wren/._a.jpg", "crow/a.jpg", ".trash/a.jpg", "wren/.cache/x.jpg")
    for name in (".DS_Store", "wren/.DS_Store", "wren/Thumbs.db", "crow/desktop.ini"):
        write(root / name, ["x"])
    assert photos.folder(root, TENSOR).files == ["crow/a.jpg", "wren/a.jpg"]
    write(root / "crow" / "notes.txt", ["x"])
    pictures(root, "stray.jpg")
    (root / "wren" / "more").symlink_to(root / "crow", target_is_directory=True)
    with pytest.warns(UserWarning, match=r"3 files .*left out, such as stray.jpg, crow/notes.txt, wren/more\."):
        assert photos.folder(root, TENSOR).files == ["crow/a.jpg", "wren/a.jpg"]


def test_folders_that_are_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*gone"):
        photos.folder(tmp_path / "gone", TENSOR)
    with pytest.raises(ValueError, match="no sub-folders; put the pictures of each category"):
        photos.folder(pictures(tmp_path / "flat", "a.jpg", "b.jpg"), TENSOR)
    root = pictures(tmp_path / "birds", "wren/a.jpg")
    (root / "crow").mkdir()
    with pytest.raises(ValueError, match="crow holds no picture"):
        photos.folder(root, TENSOR)
    with pytest.raises(TypeError, match="transform is 'fast'"):
        photos.folder(pictures(tmp_path / "birds", "crow/a.jpg"), "fast")


def test_pictures_as_people_bring_them(tmp_path):
    """Upright, transparent on white, grey and palettes as RGB; more than 8 bits and damage refused by name."""
    wide = PIL.Image.fromarray(RNG.integers(0, 255, (20, 40, 3), dtype=np.uint8))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    wide.save(tmp_path / "a" / "1.png", exif=exif)
    PIL.Image.new("RGBA", (30, 30), (255, 0, 0, 0)).save(tmp_path / "a" / "2.png")
    wide.convert("L").save(tmp_path / "a" / "3.gif")
    PIL.Image.new("I;16", (30, 30)).save(tmp_path / "a" / "4.png")
    (tmp_path / "a" / "5.webp").write_bytes(b"RIFF")
    mine = photos.folder(tmp_path, TENSOR)
    turned = wide.transpose(PIL.Image.Transpose.ROTATE_270)
    assert torch.equal(mine[0]["image"], pil_to_tensor(turned) / 255)
    assert mine[1]["image"].min() == 1 and mine[2]["image"].shape == (3, 20, 40)
    for index, name in ((3, "4.png"), (4, "5.webp")):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a picture"):
            mine[index]


@pytest.mark.parametrize("transform, said", [
    (v1.Resize(8), "made Image"), (v1.Compose([v1.Grayscale(), TENSOR]), r"made \(1, ")])
def test_a_transform_that_makes_no_image_is_said(tmp_path, transform, said):
    mine = photos.folder(pictures(tmp_path, "wren/a.jpg"), transform)
    with pytest.raises(TypeError, match=f"transform {said}.*of wren/a.jpg; expected a tensor"):
        mine[0]


# ImageNet

def imagenet_folder(root, synsets=SYNSETS):
    for i, synset in enumerate(synsets):
        path = root / synset / f"ILSVRC2012_{i}.JPEG"
        path.parent.mkdir(parents=True)
        path.touch()                                                  # nobody opens these
    return root


def test_imagenet_in_folders_of_synsets(tmp_path):
    root = imagenet_folder(tmp_path / "val").parent
    save(root / "val" / SYNSETS[7] / "ILSVRC2012_7.JPEG", RNG)
    write(root / "val" / SYNSETS[7] / "notes.xml", ["<a/>"])
    val = photos.imagenet("val", TENSOR, root)
    assert val.categories == dealkit.load_concepts("imagenet").categories and len(val) == 1000
    assert val[7]["label"] == 7 and val.labels == list(range(1000))
    assert val.files == photos.imagenet("test", TENSOR, str(root)).files
    assert (val.categories[0], val.categories[999]) == ("tench", "toilet paper")
    with pytest.raises(FileNotFoundError, match="no folder 'train'"):
        photos.imagenet("train", TENSOR, root)
    with pytest.raises(ValueError, match="unknown split 'validation' of imagenet; choose one of train, val"):
        photos.imagenet("validation", TENSOR, root)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        photos.imagenet("val", TENSOR, tmp_path / "gone")
    with pytest.raises(ValueError, match="not downloaded: pass root"):
        photos.imagenet("val", TENSOR, None)


def test_imagenets_labels_are_those_of_the_names():
    """The synsets' own words, by timm, and open_clip's names: nearly all share a word, shifted ones do not."""
    theirs, ours = ImageNetInfo().label_descriptions(), dealkit.load_concepts("imagenet").categories

    def share(shift):
        return np.mean([bool(words(one) & words(theirs[(i + shift) % 1000])) for i, one in enumerate(ours)])

    def words(text):
        return set(text.lower().replace(",", " ").replace("-", " ").replace("(", " ").split())

    assert share(0) > 0.95 and max(share(1), share(-1)) < 0.2 and sorted(SYNSETS) == SYNSETS


def test_imagenet_that_is_another_or_not_whole_is_refused(tmp_path):
    imagenet_folder(tmp_path / "a" / "train", [*SYNSETS[:998], "n99999999"])
    with pytest.raises(ValueError, match=r"2 are missing \['n13133613', 'n15075141'\], 1 are others \['n99999999'\]"):
        photos.imagenet("train", TENSOR, tmp_path / "a")
    root = imagenet_folder(tmp_path / "b" / "train").parent
    (root / "train" / SYNSETS[3] / "ILSVRC2012_3.JPEG").unlink()
    with pytest.raises(ValueError, match=f"1 synsets .* are empty, {SYNSETS[3]}"):
        photos.imagenet("train", TENSOR, root)
    (root / "train" / "n99999999").mkdir()
    with pytest.raises(ValueError, match="0 are missing .*1 are others"):
        photos.imagenet("train", TENSOR, root)


def test_imagenet_as_kaggle_packs_it(tmp_path):
    names = [f"ILSVRC2012_val_0000000{i}" for i in (1, 2)]
    flat = pictures(tmp_path / "ILSVRC/Data/CLS-LOC/val", *(f"{name}.JPEG" for name in reversed(names)))
    with pytest.raises(FileNotFoundError, match=r"no folders of synsets, and there is no .*LOC_val_solution.csv"):
        photos.imagenet("val", TENSOR, tmp_path)
    write(tmp_path / "LOC_val_solution.csv", ["ImageId,PredictionString", f"{names[1]},{SYNSETS[9]} 1 2 3 4",
                                              f"{names[0]},{SYNSETS[5]} 1 2 3 4 {SYNSETS[5]} 1 1 5 5 "])
    val = photos.imagenet("val", TENSOR, tmp_path)
    assert val.root == flat and val.labels == [5, 9] and val[1]["image"].ndim == 3
    (flat / f"{names[0]}.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match="ILSVRC2012_val_00000001.JPEG is missing"):
        val[0]


# Waterbirds

def test_waterbirds(tmp_path):
    folder = tmp_path / "waterbird_complete95_forest2water2"
    rows = [(f"{k:03d}.Bird/{y}{place}{split}.jpg", y, split, place) for k, (y, place, split) in enumerate(
        (y, place, split) for split in (0, 1, 2) for y in (0, 1) for place in (0, 1))]
    write(folder / "metadata.csv", ["img_id,img_filename,y,split,place,place_filename"] + [
        f'{i},{name},{y},{split},{place},"/o/ocean,x.jpg"' for i, (name, y, split, place) in enumerate(rows)])
    pictures(folder, *(name for name, *_ in rows))
    for root in (tmp_path, folder):
        for number, split in enumerate(("train", "validation", "test")):
            birds = photos.waterbirds(split, TENSOR, root)
            assert birds.files == [name for name, _, part, _ in rows if part == number]
            assert [(item["label"], item["background"], item["group"]) for item in birds] == [
                (0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)]
    assert birds.categories == dealkit.load_concepts("waterbirds").categories == ["landbird", "waterbird"]
    assert birds.group_names == ["landbird on land", "landbird on water", "waterbird on land", "waterbird on water"]
    with pytest.raises(FileNotFoundError, match="metadata.csv is missing"):
        photos.waterbirds("test", TENSOR, folder / "000.Bird")
    write(folder / "metadata.csv", ["img_id,img_filename,y,split", "0,a.jpg,0,2"])
    with pytest.raises(ValueError, match="not whole or do not agree .KeyError: 'place'"):
        photos.waterbirds("test", TENSOR, folder)
    with pytest.raises(ValueError, match="unknown split 'val' of waterbirds; choose one of train, validation, test"):
        photos.waterbirds("val", TENSOR, tmp_path)
