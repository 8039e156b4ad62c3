"""Embeddings of a data set: made once, found again only for the same model and images."""
from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_birds import bird_resnet, bird_vlm

from dealkit.datasets import Birdworld
from dealkit.evaluation import embed, embeddings, labels_of
from dealkit.evaluation.identity import identity, weights_hash


class Files(torch.utils.data.Dataset):
    """Pictures in files, as `PhotoSet`: names below a root."""

    def __init__(self, root: Path, files: list[str], brighter: float = 0.):
        self.root, self.files, self.categories, self.brighter, self.reads = root, files, ["a", "b"], brighter, 0

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        self.reads += 1
        pixels = np.array(PIL.Image.open(self.root / self.files[index]))
        return {"image": torch.from_numpy(pixels).permute(2, 0, 1) / 255 + self.brighter, "label": index % 2}


@pytest.fixture
def pictures(tmp_path) -> Files:
    rng = np.random.default_rng(0)
    for i in range(20):
        PIL.Image.fromarray(rng.integers(0, 256, (80, 80, 3), np.uint8)).save(tmp_path / f"{i:02}.png")
    return Files(tmp_path, [f"{i:02}.png" for i in range(20)])


@pytest.fixture
def passes(monkeypatch):
    """Counts the images that any VLM encodes."""
    from dealkit.models import VLM
    counted, encode = [], VLM.encode_image
    monkeypatch.setattr(VLM, "encode_image", lambda vlm, images: (counted.append(len(images)), encode(vlm, images))[1])
    return counted


# ------------------------------------------------------------------------------------------------------ what they are


def test_they_are_the_models_own_in_the_order_of_the_data(vlm, birds):
    expected = torch.cat([torch.nn.functional.normalize(vlm.model.encode_image(bird["image"][None]), dim=1)
                          for bird in birds]).detach()
    for options in ({}, {"batch_size": 5}, {"batch_size": 9, "workers": 2}):
        emb = embed(vlm, birds, **options)
        assert emb.dtype == torch.float32 and emb.device.type == "cpu" and not emb.requires_grad
        torch.testing.assert_close(emb, expected)
    half = embed(bird_vlm(dtype=torch.bfloat16), birds)
    assert half.dtype == torch.float32 and torch.cosine_similarity(half, expected).min() > .99


def test_labels_come_from_a_list_of_the_data_set_or_from_its_items(birds):
    part = torch.utils.data.Subset(birds, [5, 3, 30])
    for data, expected in ((birds, list(range(16)) * 2), (part, [5, 3, 14])):
        assert labels_of(data).tolist() == expected
        assert labels_of(data, "group").tolist() == [item["group"] for item in data]
    assert labels_of(torch.utils.data.Subset(part, [2, 0])).tolist() == [14, 5]
    items = [{"image": bird["image"], "label": bird["label"]} for bird in part]
    assert labels_of(items).tolist() == [5, 3, 14]
    with pytest.raises(KeyError, match="group"):
        labels_of(items, "group")


def test_what_cannot_be_embedded_is_named(vlm, birds):
    with pytest.raises(ValueError, match="data set is empty"):
        embed(vlm, [])
    broken = bird_vlm()
    with torch.no_grad():
        broken.model.visual.proj.fill_(math.nan)
    with pytest.raises(ValueError, match="embeddings of 32 of 32 images are not finite, image 0"):
        embed(broken, birds)


# --------------------------------------------------------------------------------------------------- kept and found


def test_they_are_made_once(tmp_path, birds, passes):
    first = embed(bird_vlm(), birds, cache=tmp_path / "new" / "folder")
    assert sum(passes) == 32
    again = embed(bird_vlm(), Birdworld("test", n=32), cache=tmp_path / "new" / "folder", batch_size=7)
    assert sum(passes) == 32 and torch.equal(first, again)
    assert [path.suffix for path in (tmp_path / "new" / "folder").iterdir()] == [".safetensors"]


def nudged():
    vlm = bird_vlm()
    with torch.no_grad():
        vlm.model.visual.class_embedding[0] += 1e-6
    return vlm


def other_activation():
    vlm = bird_vlm()
    for block in vlm.model.visual.transformer.resblocks:
        block.mlp.gelu = torch.nn.ReLU()
    return vlm


def renamed():
    vlm = bird_vlm()
    vlm.name = "other"
    return vlm


def other_preprocessing():
    vlm = bird_vlm()
    vlm.model.visual.preprocess_cfg = {**getattr(vlm.model.visual, "preprocess_cfg", {}), "mean": (0., 0., .1)}
    return vlm


def other_statistics():
    vlm = bird_resnet()
    vlm.model.visual.bn1.running_mean[0] += 1e-3                         # a buffer, not a weight
    return vlm


@pytest.mark.parametrize("make, other", [(bird_vlm, nudged), (bird_vlm, other_activation), (bird_vlm, renamed),
                                         (bird_vlm, other_preprocessing), (bird_resnet, other_statistics),
                                         (bird_vlm, lambda: bird_vlm(dtype=torch.bfloat16)),
                                         (bird_vlm, lambda: bird_vlm(1)), (bird_vlm, bird_resnet)])
def test_another_model_is_another_file(make, other):
    assert weights_hash(make()) == weights_hash(make()) != weights_hash(other())


def batches(dataset, size: int = 8):
    return torch.utils.data.DataLoader(dataset, size)


def changed(birds, i: int):
    """The birds, one pixel of bird i different."""
    items = [dict(bird) for bird in birds]
    items[i]["image"] = items[i]["image"].clone()
    items[i]["image"][1, 40, 40] += 1 / 255
    return named(items)


class named(list):
    """A data set that is a list, with Birdworld's categories."""
    categories = Birdworld.categories


def test_other_images_are_another_file_where_all_pixels_are_read(birds):
    own = identity(birds, batches(birds))
    assert own == identity(Birdworld("test", n=32), batches(birds, 5)) == identity(named(birds), batches(named(birds)))
    others = [Birdworld("test", n=32, seed=1), Birdworld("test", n=31), changed(birds, 0), changed(birds, 17),
              torch.utils.data.Subset(birds, range(31, -1, -1)), Birdworld("validation", n=32)]
    keys = [identity(other, batches(other)) for other in others]
    assert len({own, *keys}) == len(others) + 1
    renamed = named(birds)
    renamed.categories = [*birds.categories[:-1], "dodo"]
    assert identity(renamed, batches(renamed)) != own


def test_files_are_told_by_name_size_and_date_and_eight_pictures(pictures):
    forbidden = iter(())                                                 # a pass through the data would find nothing
    own = identity(pictures, forbidden)
    assert pictures.reads == 8 and identity(Files(pictures.root, pictures.files), forbidden) == own
    keys = [identity(Files(pictures.root, pictures.files, brighter=.1), forbidden),          # another transform
            identity(Files(pictures.root, pictures.files[:-1]), forbidden),
            identity(torch.utils.data.Subset(pictures, range(19, -1, -1)), forbidden),
            identity(Files(pictures.root, [*pictures.files[:1], *pictures.files[2:], "01.png"]), forbidden)]
    status = (pictures.root / "01.png").stat()
    os.utime(pictures.root / "01.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    keys.append(identity(pictures, forbidden))                           # 01 is none of the eight
    PIL.Image.open(pictures.root / "02.png").save(pictures.root / "01.png")
    keys.append(identity(pictures, forbidden))
    assert len({own, *keys}) == 7
    whole = torch.utils.data.Subset(pictures, range(20))
    assert identity(whole, forbidden) != identity(torch.utils.data.Subset(pictures, range(10)), forbidden)
    (pictures.root / "03.png").unlink()
    with pytest.raises(FileNotFoundError):                               # no list of files any more: reads all
        identity(pictures, batches(pictures))


def test_a_data_set_of_files_is_found_again_without_reading_it(pictures, tmp_path, passes):
    cache, vlm = tmp_path / "cache", bird_vlm()
    first = embed(vlm, pictures, cache=cache)
    reads = pictures.reads
    assert reads == 8 + 20 and torch.equal(embed(vlm, pictures, cache=cache), first)
    assert pictures.reads == reads + 8 and sum(passes) == 20


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-9]),
                                    lambda path: path.write_bytes(b""),
                                    lambda path: embeddings.save_file({"embeddings": torch.ones(31, 24)}, path),
                                    lambda path: embeddings.save_file({"embeddings": torch.ones(32)}, path),
                                    lambda path: embeddings.save_file({"other": torch.ones(32, 24)}, path),
                                    lambda path: embeddings.save_file({"embeddings": torch.ones(32, 24) / 0}, path)])
def test_a_damaged_file_is_made_anew_and_said(tmp_path, vlm, birds, damage):
    first = embed(vlm, birds, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    with pytest.warns(UserWarning, match=f"{path.name} is damaged .*embedded anew"):
        assert torch.equal(embed(vlm, birds, cache=tmp_path), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(embed(vlm, birds, cache=tmp_path), first)


def test_a_full_disk_costs_the_file_and_not_the_embeddings(tmp_path, vlm, birds, monkeypatch):
    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embeddings, "save_file", full)
    with pytest.warns(UserWarning, match="cannot keep the embeddings in .*No space left"):
        emb = embed(vlm, birds, cache=tmp_path)
    assert len(emb) == 32 and list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot make the folder .*file.* Choose another cache"):
        embed(vlm, birds, cache=tmp_path / "file")


def test_the_checksums_are_the_same_in_another_process(birds):
    code = ("from tiny_birds import bird_vlm; from dealkit.datasets import Birdworld; from torch.utils.data import "
            "DataLoader; from dealkit.evaluation.identity import identity, weights_hash; b = Birdworld('test', n=32); "
            "print(weights_hash(bird_vlm()), identity(b, DataLoader(b, 8)))")
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "7"})
    assert told.stdout.split() == [weights_hash(bird_vlm()), identity(birds, batches(birds))]
