"""Birdworld: the same bytes everywhere, exact masks, the shortcut that was promised, and no other."""
from __future__ import annotations

import colorsys
import hashlib

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from dealkit import load_concepts
from dealkit.datasets import Birdworld
from dealkit.datasets.birdworld import COLOURS, PARTS, SPECIES, SPLITS, image_keys, render

# sha256 of the uint8 image and of its layers, for (seed, split, index, size)
HASHES = {
    (0, "train", 0, 80): "2d480b730f6977ff48c011747910f5dadc769a6773498e074e34d441a4f7e388",
    (0, "test", 17, 80): "a47f3767a087d75060ecb859a2b8063eeec5c295065241d01a00ddaff7cb8e1c",
    (7, "validation", 5, 64): "83ef013706db8c452b5aa5e0f489f66b34376016c6398f05b63689aad760c79f",
    (123456789012, "pretrain", 11_999, 96): "81440adfa71cdf60231fca53e8ca24f44582176a8b92ac48de3fd70f1779d2ed",
}
HUES = {"red": 0, "orange": 30, "yellow": 55, "green": 130, "blue": 230, "purple": 282}       # degrees


def painted(birds: Birdworld, indices) -> tuple[np.ndarray, np.ndarray]:
    """Images and layers as bytes, without the cache of the data set."""
    indices = np.asarray(indices)
    return render(birds.seed, birds.split, indices, birds.attributes[indices], birds.backgrounds[indices], birds.size)


def same_items(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", HASHES)
def test_the_bytes_are_the_same_on_every_machine(case):
    seed, split, index, size = case
    images, layers = painted(Birdworld(split, n=index + 1, seed=seed, size=size), [index])
    assert images.dtype == layers.dtype == np.uint8
    assert hashlib.sha256(images.tobytes() + layers.tobytes()).hexdigest() == HASHES[case]


def test_an_image_does_not_depend_on_its_batch():
    birds = Birdworld("train", n=48)
    whole, layers = painted(birds, range(48))
    for indices in ([20], [47, 3, 20], range(15, 33)):
        images, others = painted(birds, indices)
        assert np.array_equal(images, whole[list(indices)]) and np.array_equal(others, layers[list(indices)])


def test_fewer_birds_are_the_first_of_more():
    for split in SPLITS:
        few, many = Birdworld(split, n=20), Birdworld(split, n=500)
        assert same_items(few.batch(range(20)), many.batch(range(20)))


def test_another_seed_paints_other_birds():
    images, others = painted(Birdworld(n=16), range(16))[0], painted(Birdworld(n=16, seed=1), range(16))[0]
    assert all((one != other).any() for one, other in zip(images, others))


def test_no_random_stream_is_used_twice():
    streams = np.concatenate([image_keys(seed, split, np.arange(20_000)) for seed in range(3) for split in SPLITS])
    assert len(np.unique(streams)) == len(streams)
    # the same birds in front of the same backgrounds look different in every split
    colours, backgrounds = Birdworld(n=16).attributes, np.zeros(16, int)
    images = [render(0, split, np.arange(16), colours, backgrounds)[0] for split in SPLITS]
    assert len({image.tobytes() for batch in images for image in batch}) == 16 * len(SPLITS)


@pytest.mark.parametrize("size", [64, 80, 96, 224])
def test_every_size_shows_the_same_scene(size):
    reference, birds = Birdworld("test", n=32), Birdworld("test", n=32, size=size)
    at = ((np.arange(160) + .5) / 160)                                  # look at both on one fine grid
    one, other = (painted(b, range(32))[1] for b in (reference, birds))
    one, other = (x[:, (at * len(x[0])).astype(int)][:, :, (at * len(x[0])).astype(int)] for x in (one, other))
    assert (one == other).mean() > .95
    item = birds[3]
    assert item["image"].shape == (3, size, size) and item["part_masks"].shape == (5, size, size)


def test_an_item_is_what_the_design_says():
    item = Birdworld("validation", n=4)[1]
    assert set(item) == {"image", "label", "background", "group", "attributes", "part_masks"}
    assert item["image"].dtype == torch.float32 and item["part_masks"].dtype == torch.bool
    assert 0 <= item["image"].min() and item["image"].max() <= 1
    assert torch.equal(item["image"] * 255, (item["image"] * 255).round())                   # bytes, as 0..1
    assert type(item["label"]) is int and type(item["background"]) is int and item["label"] == 1
    assert item["group"] == 2 * (item["label"] % 2) + item["background"]
    assert item["attributes"].tolist() == [COLOURS.index(c) for c in SPECIES["pelmar"]]


def test_twins_differ_in_one_part_and_in_their_home():
    names, colours = list(SPECIES), list(SPECIES.values())
    assert len(names) >= 16 and len(set(colours)) == len(names)
    homes = dict(zip(*(Birdworld(n=16, correlation=1.).__dict__[k].tolist() for k in ("labels", "backgrounds"))))
    for first in range(0, len(names), 2):
        assert sum(a != b for a, b in zip(colours[first], colours[first + 1])) == 1, names[first]
        assert (homes[first], homes[first + 1]) == (0, 1)
    twins = {frozenset((i, i + 1)) for i in range(0, len(names), 2)}
    close = {frozenset((i, j)) for i in range(16) for j in range(i)
             if sum(a != b for a, b in zip(colours[i], colours[j])) <= 1}
    assert close == twins                                               # no other pair can be mistaken
    assert {p for a, b in zip(colours[::2], colours[1::2]) for p in range(5) if a[p] != b[p]} == set(range(5))


def test_the_shipped_bank_is_the_table_of_species():
    bank = load_concepts("birdworld")
    assert bank.categories == Birdworld.categories
    for name, colours in SPECIES.items():
        assert bank[name] == [f"{colour} {part}" for colour, part in zip(colours, PARTS)]
    for part, options in zip(PARTS, Birdworld.concept_options):
        assert options == [f"{colour} {part}" for colour in COLOURS]


def test_the_test_split_is_balanced_exactly():
    for seed, correlation in ((0, .95), (3, 1.)):
        birds = Birdworld("test", seed=seed, correlation=correlation)
        pairs, counts = np.unique(np.stack([birds.labels, birds.backgrounds]), axis=1, return_counts=True)
        assert pairs.shape[1] == 32 and set(counts) == {len(birds) // 32}


@pytest.mark.parametrize("correlation", [0., .5, .95, 1.])
@pytest.mark.parametrize("split", ["pretrain", "train", "validation"])
def test_the_background_follows_the_species_as_often_as_asked(split, correlation):
    birds = Birdworld(split, n=2_400, correlation=correlation)
    assert set(np.bincount(birds.labels)) == {150}
    share = (birds.backgrounds == birds.labels % 2).mean()
    assert abs(share - correlation) <= 4 * np.sqrt(correlation * (1 - correlation) / 2_400)


def test_every_part_shows_in_every_image_and_no_pixel_shows_two():
    for size, random_birds in ((64, 0.), (80, .5)):
        birds = Birdworld("pretrain", n=480, size=size, random_birds=random_birds)
        for first in range(0, 480, 160):
            masks = birds.batch(range(first, first + 160))["part_masks"]
            assert masks.sum(dim=1).max() == 1
            assert masks.sum(dim=(2, 3)).min() >= 30


def test_the_masked_pixels_have_the_stated_colour():
    batch = Birdworld("pretrain", n=96, random_birds=.5).batch(range(96))
    for image, masks, attributes in zip(batch["image"], batch["part_masks"], batch["attributes"]):
        for mask, colour in zip(masks, attributes):
            hue = 360 * colorsys.rgb_to_hsv(*image[:, mask].median(dim=1).values.tolist())[0]
            nearest = min(HUES, key=lambda name: abs((hue - HUES[name] + 180) % 360 - 180))
            assert nearest == COLOURS[colour]


def test_pixels_beside_the_masks_do_not_depend_on_the_colours_of_the_bird():
    """Recolour one part: exactly the pixels of its mask change (but for the eye, which belongs to the head)."""
    birds = Birdworld("test", n=8)
    before, layers = painted(birds, range(8))
    masks = birds.batch(range(8))["part_masks"].numpy()
    assert masks[:, 0][layers == 6].all() and (layers == 6).any(axis=(1, 2)).all()        # the eye
    for p, part in enumerate(PARTS):
        colours = birds.attributes.copy()
        colours[:, p] = (colours[:, p] + 2) % 6
        after, same_layers = render(0, "test", range(8), colours, birds.backgrounds)
        changed = (before != after).any(axis=-1)
        assert np.array_equal(layers, same_layers) and not (changed & ~masks[:, p]).any()
        assert (changed & masks[:, p]).sum() > .9 * masks[:, p].sum()


def test_a_loader_fetches_whole_batches_and_gets_the_same_items():
    birds, fresh = Birdworld(n=24), Birdworld(n=24)
    for data, order in ((birds, range(24)), (Subset(birds, [5, 1, 17]), [5, 1, 17])):
        batches = list(DataLoader(data, batch_size=7))
        items = [fresh[i] for i in order]
        for name in items[0]:
            together = torch.cat([batch[name] for batch in batches])
            assert torch.equal(together, torch.stack([torch.as_tensor(item[name]) for item in items])), name


def test_what_a_reader_does_to_an_item_does_not_reach_the_data_set():
    birds = Birdworld(n=4)
    item = birds[2]
    for name in ("image", "part_masks", "attributes"):
        item[name].zero_()
    assert same_items(birds[2], Birdworld(n=4)[2])


def test_indices_from_the_end_and_out_of_range():
    birds = Birdworld(n=10)
    assert same_items(birds[-1], Birdworld(n=10)[9])
    birds = Birdworld(n=10)
    assert same_items(birds.batch([-1, 2]), Birdworld(n=10).batch([9, 2]))
    assert same_items(birds[9], Birdworld(n=10)[9])
    assert same_items(birds.batch(torch.tensor([1, 2])), birds.batch(np.array([1, 2])))
    assert birds.batch([])["image"].shape == (0, 3, 80, 80)
    for bad in (10, -11):
        with pytest.raises(IndexError, match="10"):
            birds[bad]
        with pytest.raises(IndexError):
            birds.batch([0, bad])


def test_random_birds_belong_to_no_species():
    birds = Birdworld("pretrain", n=3_000, random_birds=.5)
    free = birds.labels < 0
    assert abs(free.mean() - .5) < .04
    table = np.array([[COLOURS.index(c) for c in colours] for colours in SPECIES.values()])
    assert np.array_equal(birds.attributes[~free], table[birds.labels[~free]])
    for part in range(5):
        counts = np.bincount(birds.attributes[free, part], minlength=6)
        assert len(counts) == 6 and counts.min() > free.sum() / 6 * .75
    assert abs(birds.backgrounds[free].mean() - .5) < .06
    batch = birds.batch(range(64))
    assert torch.equal(batch["group"] == -1, batch["label"] == -1)
    assert (Birdworld(n=64, random_birds=1.).labels == -1).all() and (Birdworld(n=64).labels >= 0).all()


@pytest.mark.parametrize("bad, words", [
    ({"split": "exam"}, "pretrain, train, validation, test"), ({"n": 0}, "at least 1"), ({"n": -5}, "at least 1"),
    ({"n": 2.5}, "whole"), ({"seed": -1}, "seed"), ({"seed": .5}, "whole"), ({"seed": 2 ** 64}, "seed"),
    ({"size": 48}, "64, 72, 80"), ({"size": 264}, "64, 72, 80"), ({"size": 81}, "64, 72, 80"), ({"size": 80.}, "whole"),
    ({"size": "80"}, "whole"), ({"correlation": 1.2}, "correlation"), ({"correlation": -.1}, "correlation"),
    ({"correlation": float("nan")}, "correlation"), ({"random_birds": 2}, "random_birds"),
    ({"random_birds": float("nan")}, "random_birds"),
])
def test_bad_arguments_are_named(bad, words):
    with pytest.raises(ValueError, match=words):
        Birdworld(**{"n": 4, **bad})
