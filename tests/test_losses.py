"""Losses against hand-computed tensors, plain loops written differently, and finite differences."""

import doctest
import math

import numpy as np
import open_clip
import pytest
import torch

import dealkit.losses
from dealkit.losses import contrastive_loss, disentangle_loss, guard_loss, localize_loss
from dealkit.normalize import normalize_maps


def random_maps(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit_rows(rows, columns, seed):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values / values.norm(dim=1, keepdim=True)


def stretch(values):
    """Min-max of one map in plain Python: the oracle's own."""
    values = np.asarray(values, dtype=float)
    low, high = min(values.flat), max(values.flat)
    return np.array([(v - low) / (high - low) if high > low else 0.0 for v in values.flat]).reshape(values.shape)


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(dealkit.losses)
    assert result.attempted > 0 and result.failed == 0


def test_contrastive_by_hand():
    # Cosines [[1, 0], [0, 1]], scale log 3: each row is softmax(log 3, 0) = (3/4, 1/4), so -log(3/4).
    loss = contrastive_loss(torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), math.log(3))
    assert loss.item() == pytest.approx(math.log(4 / 3), abs=1e-12)


def test_contrastive_without_labels_is_clips_loss():
    images, texts, scale = unit_rows(7, 5, 0), unit_rows(7, 5, 1), torch.tensor(20.0, dtype=torch.float64)
    expected = open_clip.ClipLoss()(images, texts, scale)
    assert contrastive_loss(images, texts, scale).item() == pytest.approx(expected.item(), abs=1e-12)
    distinct = contrastive_loss(images, texts, scale, labels=torch.arange(7))
    assert distinct.item() == pytest.approx(expected.item(), abs=1e-12)


def contrastive_by_loops(images, texts, scale, negative):
    """-log softmax over the positive and the negatives only, both ways; negative(i, j): text j is false of image i."""
    cosines, size, total = (images @ texts.T).tolist(), len(images), 0.0
    for i in range(size):
        over_texts = [scale * cosines[i][j] for j in range(size) if j == i or negative(i, j)]
        over_images = [scale * cosines[j][i] for j in range(size) if j == i or negative(j, i)]
        for logits in (over_texts, over_images):
            total += math.log(sum(math.exp(logit) for logit in logits)) - scale * cosines[i][i]
    return total / (2 * size)


def test_contrastive_leaves_true_pairs_out_of_both_denominators():
    images, texts, scale, labels = unit_rows(6, 4, 2), unit_rows(6, 4, 3), 5.0, [0, 1, 0, 2, 1, 0]
    expected = contrastive_by_loops(images, texts, scale, lambda i, j: labels[i] != labels[j])
    loss = contrastive_loss(images, texts, scale, labels=torch.tensor(labels))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert loss.item() != pytest.approx(contrastive_loss(images, texts, scale).item(), abs=1e-3)


def test_contrastive_with_a_matrix_of_true_pairs_that_is_not_symmetric():
    images, texts = unit_rows(5, 4, 4), unit_rows(5, 4, 5)
    true = torch.rand(5, 5, generator=torch.Generator().manual_seed(6)) > 0.6
    assert not torch.equal(true, true.T)
    expected = contrastive_by_loops(images, texts, 3.0, lambda i, j: not true[i, j])
    assert contrastive_loss(images, texts, 3.0, labels=true).item() == pytest.approx(expected, abs=1e-12)


def test_contrastive_of_one_class_only_is_zero_with_a_finite_gradient():
    images = unit_rows(4, 3, 7).requires_grad_()
    loss = contrastive_loss(images, unit_rows(4, 3, 8), 100.0, labels=torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and torch.equal(images.grad, torch.zeros_like(images))


def test_contrastive_gradient_by_finite_differences():
    arguments = unit_rows(4, 3, 9).requires_grad_(), unit_rows(4, 3, 10).requires_grad_(), torch.tensor(
        4.0, dtype=torch.float64, requires_grad=True)
    for labels in (None, torch.tensor([0, 1, 1, 2])):
        assert torch.autograd.gradcheck(lambda i, t, s: contrastive_loss(i, t, s, labels), arguments)


def test_disentangle_by_hand():
    a, b, c = [[0.0, 1.0], [0.5, 0.0]], [[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 0.0]]  # c is [[0, 0], [1, 0]]
    maps = torch.tensor([[a, b, c], [c, c, a]], dtype=torch.float64)
    # products: image 0: ab 1, ac .5, bc 0 -> 1.5; image 1: cc 1, ca .5, ca .5 -> 2; mean over the batch 1.75
    assert disentangle_loss(maps).item() == pytest.approx(1.75, abs=1e-12)
    # norms: a sqrt 1.25, b sqrt 2, c 1; mean over the three pairs, then over the batch
    first = (1 / math.sqrt(2.5) + 0.5 / math.sqrt(1.25)) / 3
    second = (1 + 2 * 0.5 / math.sqrt(1.25)) / 3
    assert disentangle_loss(maps, "cosine").item() == pytest.approx((first + second) / 2, abs=1e-12)
    # min over max: ab 1 / 2.5, ac .5 / 2, bc 0; cc 1, ca twice .5 / 2
    assert disentangle_loss(maps, "soft_iou").item() == pytest.approx((.65 / 3 + 1.5 / 3) / 2, abs=1e-12)


@pytest.mark.parametrize("overlap", ["product", "cosine", "soft_iou"])
def test_disentangle_equals_plain_loops(overlap):
    maps = random_maps(3, 4, 3, 5, seed=1) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1) - 0.2
    per_image = []
    for image in maps.numpy():
        pairs = []
        for j in range(4):
            for i in range(j):
                p, q = stretch(image[i]), stretch(image[j])
                if overlap == "soft_iou":
                    pairs.append(sum(map(min, p.flat, q.flat)) / sum(map(max, p.flat, q.flat)))
                    continue
                scale = 1 if overlap == "product" else np.linalg.norm(p) * np.linalg.norm(q)
                pairs.append((p * q).sum() / scale)
        per_image.append(sum(pairs) if overlap == "product" else sum(pairs) / len(pairs))
    assert disentangle_loss(maps, overlap).item() == pytest.approx(sum(per_image) / 3, rel=1e-12)


def test_disentangle_bounds():
    same, disjoint = random_maps(1, 1, 4, 4).expand(2, 3, 4, 4), torch.eye(4).view(1, 4, 2, 2)
    assert disentangle_loss(same, "cosine").item() == pytest.approx(1, abs=1e-12)
    assert disentangle_loss(disjoint, "cosine").item() == disentangle_loss(disjoint).item() == 0
    assert disentangle_loss(same, "soft_iou").item() == 1 and disentangle_loss(disjoint, "soft_iou").item() == 0


def test_localize_by_hand():
    concepts = torch.tensor([[[[2.0, 0.0], [1.0, 0.0]], [[3.0, 3.0], [0.0, 0.0]]]], dtype=torch.float64)
    category = torch.tensor([[[4.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)  # [[1, 0], [0, .5]]
    # sum [[2, 1], [.5, 0]] -> 1 + 1 + .25 + .25; max [[1, 1], [.5, 0]] -> 0 + 1 + .25 + .25
    assert localize_loss(concepts, category).item() == pytest.approx(2.5, abs=1e-12)
    assert localize_loss(concepts, category, "max").item() == pytest.approx(1.5, abs=1e-12)
    twice = localize_loss(torch.cat([concepts, concepts]), torch.cat([category, concepts[:, 0]]))
    # image 1: [[2, 1], [.5, 0]] - [[1, 0], [.5, 0]] -> 2; mean of 2.5 and 2
    assert twice.item() == pytest.approx(2.25, abs=1e-12)


@pytest.mark.parametrize("aggregate", ["sum", "max"])
def test_localize_equals_plain_loops(aggregate):
    concepts, category = 7 * random_maps(3, 4, 3, 5, seed=2), random_maps(3, 3, 5, seed=3) - 0.5
    total, join = 0.0, sum if aggregate == "sum" else max
    for b in range(3):
        stretched, wanted = [stretch(m) for m in concepts[b].numpy()], stretch(category[b].numpy())
        for y in range(3):
            for x in range(5):
                total += (join([m[y, x] for m in stretched]) - wanted[y, x]) ** 2
    assert localize_loss(concepts, category, aggregate).item() == pytest.approx(total / 3, rel=1e-12)


@pytest.mark.parametrize("option", ["product", "cosine", "soft_iou", "sum", "max"])
def test_maps_that_are_normalised_already_give_the_same(option):
    concepts, category = 7 * random_maps(2, 3, 4, 4) - 1, random_maps(2, 4, 4, seed=1)
    normal = normalize_maps(concepts), normalize_maps(category)
    if option not in ("sum", "max"):
        assert disentangle_loss(concepts, option) == disentangle_loss(normal[0], option)
    else:
        assert localize_loss(concepts, category, option) == localize_loss(*normal, option)


def test_localize_takes_one_concept_and_vanishes_on_the_category_itself():
    maps = random_maps(2, 1, 4, 4)
    assert localize_loss(5 * maps, maps[:, 0]).item() == pytest.approx(0, abs=1e-20)


def test_guard_by_hand():
    maps = torch.tensor([[[[1.0, -3.0]], [[5.0, 0.0]]], [[[-1.0, -1.0]], [[0.0, 0.0]]]])
    # positive shares 1/4, 1, 0 and, for the map that is zero, 0: hinges .05, 0, .3, .3; the third map's highest pixel
    # lies its mean absolute value below zero: 1 more
    assert guard_loss(maps).item() == pytest.approx((0.65 + 1) / 4)
    assert guard_loss(maps, share=1.0).item() == pytest.approx((0.75 + 0 + 1 + 1 + 1) / 4)
    assert guard_loss(maps[:1], share=0).item() == 0


@pytest.mark.parametrize("highest", [1e-3, -0.05])  # hardly alive, and dead: the ReLU leaves no pixel
def test_guard_revives_a_map_that_the_relu_kills(highest):
    signed = -random_maps(1, 1, 3, 3) - 0.1
    signed[0, 0, 1, 1] = highest
    first, = torch.autograd.grad(guard_loss(signed.requires_grad_()), signed)
    assert first[0, 0, 1, 1] < 0 and (first <= 0).all()  # a step lifts the highest pixel and pushes none down
    for _ in range(200):
        gradient, = torch.autograd.grad(guard_loss(signed), signed)
        signed = (signed - 0.1 * gradient).detach().requires_grad_()
    assert guard_loss(signed) < 0.05 and signed.max() > 0.1


# --- gradients of all terms on maps ---------------------------------------------------------------

TERMS = {
    "product": lambda maps: disentangle_loss(maps, "product"),
    "cosine": lambda maps: disentangle_loss(maps, "cosine"),
    "soft_iou": lambda maps: disentangle_loss(maps, "soft_iou"),
    "localize sum": lambda maps: localize_loss(maps, maps[:, 0] * maps[:, 1]),
    "localize max": lambda maps: localize_loss(maps, maps[:, 0] * maps[:, 1], "max"),
    "guard": lambda maps: guard_loss(maps - 0.5, share=0.9),
}


@pytest.mark.parametrize("term", TERMS)
def test_gradient_by_finite_differences(term):
    maps = random_maps(2, 3, 3, 3, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(TERMS[term], maps)
    assert all(image.abs().sum() > 0 for image in torch.autograd.grad(TERMS[term](maps), maps)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("term", TERMS)
def test_dead_maps_have_finite_gradients(term, dtype):
    maps = random_maps(2, 3, 3, 3, seed=5).to(dtype)
    maps[0], maps[1, 1] = 0.0, 0.9  # an image of dead maps, and a constant map beside live ones
    maps.requires_grad_()
    loss = TERMS[term](maps)
    loss.backward()
    assert loss.isfinite() and maps.grad.isfinite().all()


@pytest.mark.parametrize("term", TERMS)
def test_nan_is_not_swallowed(term):
    maps = random_maps(2, 3, 3, 3).index_fill_(3, torch.tensor([2]), float("nan"))
    assert TERMS[term](maps).isnan()


# --- bad input ------------------------------------------------------------------------------------

M4, M3, E = torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4), torch.eye(3)


@pytest.mark.parametrize("call, error, match", [
    (lambda: contrastive_loss(E.tolist(), E, 1.0), TypeError, r"image_emb is a list; expected a torch tensor"),
    (lambda: contrastive_loss(E, E.long(), 1.0), TypeError, r"text_emb has dtype torch.int64"),
    (lambda: contrastive_loss(E[0], E, 1.0), ValueError, r"image_emb has shape \(3,\); expected 2 axes"),
    (lambda: contrastive_loss(E, E[:2], 1.0), ValueError, r"one text per image"),
    (lambda: contrastive_loss(E[:0], E[:0], 1.0), ValueError, r"image_emb has shape \(0, 3\).*an axis is empty"),
    (lambda: contrastive_loss(E, E, 1.0, torch.zeros(2, dtype=torch.long)), ValueError, r"labels have shape \(2,\)"),
    (lambda: contrastive_loss(E, E, 1.0, torch.zeros(3)), TypeError, r"labels have dtype torch.float32"),
    (lambda: contrastive_loss(E, E, 1.0, torch.ones(3, dtype=torch.bool)), ValueError, r"bools of shape \(3, 3\)"),
    (lambda: disentangle_loss(M3), ValueError, r"concept_maps has shape \(2, 4, 4\); expected 4 axes, \[B, K, h, w\]"),
    (lambda: disentangle_loss(M4[:, :1]), ValueError, r"at least two concepts; the maps have K = 1"),
    (lambda: disentangle_loss(M4[:0]), ValueError, r"an axis is empty"),
    (lambda: disentangle_loss(M4[:, :0]), ValueError, r"an axis is empty"),
    (lambda: disentangle_loss(M4.int()), TypeError, r"concept_maps has dtype torch.int32"),
    (lambda: disentangle_loss(M4, "dot"), ValueError, r"unknown overlap kind 'dot'.*'product', 'cosine', 'soft_iou'"),
    (lambda: localize_loss(M3, M3), ValueError, r"concept_maps has shape \(2, 4, 4\)"),
    (lambda: localize_loss(M4, M4), ValueError, r"category_maps has shape \(2, 3, 4, 4\); expected 3 axes"),
    (lambda: localize_loss(M4, M3[:1]), ValueError, r"hold 2 images, category_maps 1"),
    (lambda: localize_loss(M4, M3[:, :2]), ValueError, r"\(4, 4\) grid, category maps on \(2, 4\)"),
    (lambda: localize_loss(M4[:, :0], M3), ValueError, r"an axis is empty"),
    (lambda: localize_loss(M4, M3 > 0.5), TypeError, r"category_maps has dtype torch.bool"),
    (lambda: localize_loss(M4, M3, "mean"), ValueError, r"unknown aggregate 'mean'.*'sum', 'max'"),
    (lambda: guard_loss(M3), ValueError, r"signed_maps has shape"),
    (lambda: guard_loss(M4, share=1.5), ValueError, r"share is 1.5; expected a number from 0 to 1"),
])
def test_bad_input_names_the_remedy(call, error, match):
    with pytest.raises(error, match=match):
        call()
