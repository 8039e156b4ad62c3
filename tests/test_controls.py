"""Controls: wrong concepts, and models that have forgotten what they learnt."""
from __future__ import annotations

import doctest

import pytest
import torch
from conftest import random_embeddings, random_images, tiny_resnet, tiny_vit
from tiny_birds import BANK, bird_vlm, same, weights

from dealkit import evaluate, explain, load_model, metrics
from dealkit.controls import evaluate_wrong_concepts, randomisation_table, randomised, tower_layers, wrong_concepts
from dealkit.datasets import Birdworld
from dealkit.datasets.birdworld import PARTS, SPECIES
from dealkit.evaluation import random_maps


@pytest.fixture(scope="module")
def trained():
    return load_model("birdworld-vit", device="cpu")


def test_the_example_of_wrong_concepts_runs():
    example, = doctest.DocTestFinder().find(wrong_concepts, globs={"wrong_concepts": wrong_concepts})
    result = doctest.DocTestRunner().run(example)
    assert (result.attempted, result.failed) == (2, 0)


# ------------------------------------------------------------------------------------------------------ wrong concepts


def test_wrong_concepts_share_as_little_as_possible():
    bank = {"a": ["1", "2", "3"], "b": ["1", "2", "4"], "c": ["1", "5", "6"], "d": ["4", "5", "6"]}
    assert wrong_concepts(bank, list(bank)) == {"a": bank["d"], "b": bank["c"], "c": bank["a"], "d": bank["a"]}
    equals = {"a": ["1"], "b": ["2"], "c": ["3"]}                    # the next in the list, and round its end
    assert wrong_concepts(equals, list(equals)) == {"a": ["2"], "b": ["3"], "c": ["1"]}
    assert wrong_concepts(bank, ["a", "b"]) == {"a": bank["b"], "b": bank["a"]}
    assert wrong_concepts(bank, ["a", "d"], shift=2)["a"] == ["6", "4", "5"]


def test_in_birdworld_they_are_the_same_parts_in_other_colours():
    for shift in range(5):
        wrong = wrong_concepts(BANK, Birdworld.categories, shift)
        assert list(wrong) == list(SPECIES)
        for name, concepts in wrong.items():
            assert [c.split()[1] for c in concepts] == [PARTS[(i + shift) % 5] for i in range(5)]
            assert not set(concepts) & set(BANK[name])


def test_the_row_is_that_of_the_wrong_maps_on_the_right_masks(trained):
    birds = Birdworld("test", n=64)
    own = evaluate(trained, birds, BANK, insertion_images=0)
    for shift in (0, 2):
        row = evaluate_wrong_concepts(trained, birds, BANK, shift, insertion_images=0)
        assert row["accuracy"] == own["accuracy"] and row["concept_accuracy"] == own["concept_accuracy"]
        for name in ("pointing_game", "mass_in_mask", "best_iou"):
            assert row[name] < .7 * own[name], name          # the trained model knows its concepts
    wrong, hits = wrong_concepts(BANK, birds.categories, 2), []
    for item in birds:
        texts = wrong[birds.categories[item["label"]]]
        hits.append(metrics.pointing_game(explain(trained, item["image"][None], texts), item["part_masks"][None]))
    assert row["pointing_game"] == pytest.approx(sum(hits) / 64, abs=1e-3)


def test_concepts_that_are_left_out_are_told_once():
    uneven = {name: concepts[:3] if name == "fendal" else concepts for name, concepts in BANK.items()}
    with pytest.warns(UserWarning, match="15 of 16 categories") as caught:
        evaluate_wrong_concepts(bird_vlm(), Birdworld("test", n=8), uneven, insertion_images=0)
    assert len([w for w in caught if "concepts" in str(w.message)]) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize("bank", [{"a": ["x"]}, {"a": ["x", "y"], "b": ["y", "x"]}])
def test_without_another_concept_there_is_no_wrong_one(bank):
    with pytest.raises(ValueError, match="no category has other concepts than 'a'"):
        wrong_concepts(bank, list(bank))


# -------------------------------------------------------------------------------------------------------- randomisation


@pytest.mark.parametrize("make, layers", [
    (tiny_vit, ["head", *(f"transformer.resblocks.{i}" for i in (2, 1, 0)), "stem"]),
    (tiny_resnet, ["head", "layer4", "layer3", "layer2", "layer1", "stem"])])
def test_the_layers_run_from_the_top_down_and_hold_every_weight(make, layers):
    vlm = make()
    found = tower_layers(vlm)
    assert list(found) == layers
    names = [name for layer in found.values() for name in layer]
    assert sorted(names) == sorted(name for name, _ in vlm.model.visual.named_parameters())
    assert {"proj", "ln_post.weight"} <= set(found["head"]) or "attnpool.c_proj.weight" in found["head"]
    assert "conv1.weight" in found["stem"]


@pytest.mark.parametrize("paths, layers", [
    (["trunk.pos_embed", "trunk.patch_embed.proj", "trunk.blocks.0.attn.qkv", "trunk.blocks.1.mlp.fc1",
      "trunk.attn_pool.mlp.fc1", "trunk.head"], ["head", "trunk.blocks.1", "trunk.blocks.0", "stem"]),
    (["trunk.stem.0", "trunk.stages.0.blocks.0.conv", "trunk.stages.1.blocks.0.conv", "trunk.final_conv", "head.proj"],
     ["head", "trunk.stages.1", "trunk.stages.0", "stem"]),
    (["trunk.patch_embed.stages.0.conv", "trunk.patch_embed.pool", "trunk.blocks.0.attn"],
     ["trunk.blocks.0", "trunk.patch_embed.stages.0"]),
    (["image_model.embeddings.cls_token", "image_model.encoder.layer.0.attention", "image_projection"],
     ["head", "image_model.encoder.layer.0", "stem"]),
    (["features", "classifier"], ["stem"])])
def test_the_names_of_every_library_are_understood(paths, layers):
    """As timm's ViT (SigLIP), ConvNeXt and MobileCLIP, ViTamin, and transformers' FLAVA name their weights."""
    class Stub:
        class model:  # noqa: N801
            class visual:  # noqa: N801
                named_parameters = staticmethod(lambda: [(path, None) for path in paths])

    found = tower_layers(Stub)
    assert list(found) == layers and sorted(sum(found.values(), [])) == sorted(paths)


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_a_copy_forgets_the_top_layers_only_and_the_original_nothing(make):
    vlm = make()
    before, images = weights(vlm), random_images(vlm, 8)
    layers = tower_layers(vlm)
    for depth in (0, 1, 3, None):
        copied = randomised(vlm, seed=0, depth=depth)
        after = copied.model.visual.state_dict()
        replaced = {name for layer in list(layers.values())[:depth] for name in layer}
        for name, old in vlm.model.visual.state_dict().items():
            if "running" in name or "num_batches" in name:
                normed = name.rpartition(".")[0] + ".weight"
                assert normed in replaced or torch.equal(old, after[name])
            else:       # a constant tensor (an untrained scale) has only itself to be drawn from
                assert torch.equal(old, after[name]) == (name not in replaced or old.unique().numel() == 1), name
        assert copied.tower.visual is copied.model.visual is not vlm.model.visual and not copied.model.training
        text = {name for name in before if not name.startswith("visual.")}
        assert all(torch.equal(before[name], copied.model.state_dict()[name]) for name in text)
        size = copied.model.encode_image(images).std() / vlm.model.encode_image(images).std()
        assert .05 < size < 20                               # signals neither die nor explode
        assert not copied.model.encode_image(images).isnan().any()
    assert same(before, weights(vlm)) and not vlm.model.training


def test_new_weights_have_the_mean_and_spread_of_the_old(trained):
    copied = randomised(trained, seed=0)
    for old, new in zip(trained.model.visual.parameters(), copied.model.visual.parameters()):
        error = 4 * old.std(correction=0) / old.numel() ** .5
        assert abs(new.mean() - old.mean()) <= error and abs(new.std() - old.std(correction=0)) <= 1.5 * error
        if old.numel() > 1000:
            assert torch.corrcoef(torch.stack([old.flatten(), new.flatten()]))[0, 1].abs() < .15


def test_a_seed_gives_one_cascade():
    vlm = tiny_vit()
    state = lambda *args: weights(randomised(vlm, *args))  # noqa: E731
    assert same(state(0, 2), state(0, 2)) and not same(state(0, 2), state(1, 2))
    deep, shallow = state(0, None), state(0, 2)
    top = [f"visual.{name}" for layer in list(tower_layers(vlm).values())[:2] for name in layer]
    assert all(torch.equal(deep[name], shallow[name]) for name in top)


def test_the_maps_of_a_trained_model_do_not_survive(trained):
    """And those of an explainer that looks only at the picture do: the check can tell the two apart."""
    batch = Birdworld("test", n=24).batch(range(24))
    texts = [BANK[Birdworld.categories[label]] for label in batch["label"]]
    table = randomisation_table(trained, batch["image"], texts, seeds=(0, 1))
    assert table["seed"].tolist() == [0] * 7 + [1] * 7 and table["depth"].tolist() == [*range(7)] * 2
    assert table["layer"].tolist()[:7] == ["none", *tower_layers(trained)]
    assert table["rank_correlation"][[0, 7]].tolist() == pytest.approx([1, 1])
    assert table["rank_correlation"][[6, 13]].abs().max() < .15
    expected = metrics.rank_correlation(explain(trained, batch["image"], texts),
                                        explain(randomised(trained, 1, 2), batch["image"], texts))
    assert table["rank_correlation"][9] == pytest.approx(expected, abs=1e-4)
    blind = randomisation_table(trained, batch["image"], texts, explainer=random_maps)
    assert blind["rank_correlation"].tolist() == pytest.approx([1] * 7) and (blind["dead_maps"] == 0).all()


def test_maps_that_die_with_the_weights_are_counted_and_left_out():
    vlm = tiny_vit()

    def explainer(model, images, text_emb):
        alive = torch.tensor([1.0, float(model is vlm)]).view(2, 1, 1)          # the second concept's maps die
        return torch.arange(12.0).view(4, 3).expand(len(images), 2, 4, 3) * alive

    table = randomisation_table(vlm, random_images(vlm, 3), random_embeddings(vlm, 2), explainer=explainer)
    assert table["dead_maps"].tolist() == [.5] * 6 and table["rank_correlation"].tolist() == pytest.approx([1] * 6)


def test_a_resnet_is_randomised_too():
    vlm = tiny_resnet()
    table = randomisation_table(vlm, random_images(vlm, 4), random_embeddings(vlm, 3))
    assert table["rank_correlation"][0] == pytest.approx(1) and table["rank_correlation"][6] < .9
    assert (table["dead_maps"] < 1).all()


def test_a_depth_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="depth is 6; this tower has 5 layers to replace: head, transformer"):
        randomised(bird_vlm(), seed=0, depth=6)
    with pytest.raises(ValueError, match="depth is -1"):
        randomised(bird_vlm(), seed=0, depth=-1)
