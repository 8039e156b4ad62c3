"""Plausible wrong answers to the exercises of notebook 06, and the hint that each must get."""

# An insertion fidelity in which one line is wrong; the lines of `FIDELITY` that a mistake changes are replaced below.
FIDELITY = '''\
    batch, concepts, height, width = maps.shape
    shown = images.repeat_interleave(concepts, dim=0)
    text, blurred = texts.flatten(0, 1), metrics.blur(shown)
    rank = maps.flatten(2).argsort(-1, descending=True).argsort(-1).view(-1, 1, height, width)
    start, whole = score(blurred, text), score(shown, text)
    fractions = []
    for step in range(1, steps + 1):
        inserted = rank < step * height * width // steps
        now = torch.where(inserted, shown, blurred)
        fractions.append(((score(now, text) - start).abs() / (whole - start).abs()).clamp(0, 1))
    return torch.stack(fractions).mean(0).view(batch, concepts)
'''


def with_line(old: str, new: str) -> str:
    assert FIDELITY.count(old) == 1, old
    return FIDELITY.replace(old, new)


# A test of a metric, likewise.
TEST = '''\
    torch.manual_seed(0)
    images, maps, texts = torch.rand(4, 3, 6, 6), torch.rand(4, 3, 6, 6), torch.rand(4, 3, 108)
    images[2] = 0
    value = fidelity(lambda x, text: (x.flatten(1) * text).sum(1), images, maps, texts, steps=1)
    defined = torch.tensor([0, 1, 3])
    assert value[2].isnan().all()
    assert torch.allclose(value[defined], torch.ones(3, 3))
'''
ONE_IMAGE = '''\
    torch.manual_seed(0)
    images, maps, texts = torch.rand(1, 3, 6, 6), torch.rand(1, 2, 6, 6), torch.rand(1, 2, 108)
    texts[0, 1] = 0
    value = fidelity(lambda x, text: (x.flatten(1) * text).sum(1), images, maps, texts, steps=1)
    assert torch.allclose(value[0, 0], torch.tensor(1.0)) and value[0, 1].isnan()
'''
FULL_INSERTION = '''\
    torch.manual_seed(0)
    images, maps, texts = torch.rand(4, 3, 6, 6), torch.rand(4, 3, 6, 6), torch.rand(4, 3, 108)
    for b in range(4):
        images[b] += b
        texts[b] = torch.rand(3, 108) + b
    def score(x, text):
        assert torch.equal(x.mean((1, 2, 3)).floor(), text.mean(1).floor())
        return (x.flatten(1) * text).sum(1)
    value = fidelity(score, images, maps, texts, steps=1)
    assert torch.allclose(value, torch.ones(4, 3))
'''

WRONG = {
    "ex_06_1": [
        ("chose_a", 'answer = {"a", "b", "e"}\n'),
        ("chose_c", 'answer = {"b", "c"}\n'),
        ("chose_d", 'answer = ["b", "d"]\n'),
        ("chose_f", 'answer = {"b", "e", "f"}\n'),
        ("missed_e", 'answer = {"b"}\n'),
        ("missed_b", 'answer = {"e"}\n'),
    ],
    "ex_06_2": [
        ("always_b", "answer = [8, 6, 4, 16]\n"),
        ("all_rows", "answer = [b * k for b, k in [(8, 5), (6, 3), (4, 6), (16, 5)]]\n"),
        ("counted_from_one", "answer = [7, 3, 5, 7]\n"),
        ("other_layout", "answer = [8, 6, 6, 20]\n"),
        ("two_cycles", '''\
cases = [(8, 5), (6, 3), (4, 6), (16, 5)]
answer = [sum(row % b == row % k for row in range(b * k)) for b, k in cases]
'''),
        ("distinct_images", "answer = [8, 4, 4, 8]\n"),
    ],
    "ex_06_3": [
        ("diagonal", "    return batch_size ** 2 * (frequency ** 2).sum()\n"),
        ("half", '''\
    pairs = batch_size * (batch_size - 1) / 2
    return pairs * frequency.square().sum()
'''),
        ("per_image", "    return (batch_size - 1) * frequency.square().sum()\n"),
        ("equal_classes", "    return batch_size * (batch_size - 1) / len(frequency)\n"),
        ("share", "    return (frequency * frequency).sum()\n"),
    ],
    "ex_06_4": [
        ("red_only", with_line("        now = torch.where(inserted, shown, blurred)\n", '''\
        now = blurred.clone()
        now[:, 0] = torch.where(inserted[:, 0], shown[:, 0], blurred[:, 0])
''')),
        ("misaligned", with_line("images.repeat_interleave(concepts, dim=0)", "images.repeat(concepts, 1, 1, 1)")),
        ("all_undefined", with_line("mean(0).view(batch, concepts)", "mean(0).mean().expand(batch, concepts)")),
        ("undefined_as_number", with_line("(whole - start).abs())", "((whole - start).abs() + 1e-8))")),
        ("lowest_first", with_line("descending=True", "descending=False")),
        ("step_zero", with_line("range(1, steps + 1)", "range(steps + 1)")),
        ("not_clamped", with_line(".clamp(0, 1))", ")")),
        ("one_direction", with_line("((score(now, text) - start).abs() / (whole - start).abs())",
                                    "((score(now, text) - start) / (whole - start))")),
        ("divided_by_score", with_line("(whole - start).abs())", "whole.abs())")),
        ("shape", with_line(".mean(0).view(batch, concepts)", ".mean(0).nanmean()")),
    ],
    "ex_06_5": [
        ("dead", "    return torch.zeros(batch, concepts, height, width)\n"),
        ("same_place", '''\
    maps = torch.zeros(batch, concepts, height, width)
    maps[:, :, height // 2] = 1
    return maps
'''),
        ("overlap", "    return torch.rand(batch, concepts, height, width).softmax(dim=1)\n"),
        ("one_pixel", '''\
    maps = torch.zeros(batch, concepts, height * width)
    for k in range(concepts):
        maps[:, k, k] = 1
    return maps.view(batch, concepts, height, width)
'''),
        ("left_over", '''\
    size = height * width // concepts
    maps = torch.zeros(batch, concepts, height * width)
    for k in range(concepts):
        maps[:, k, k * size:(k + 1) * size] = 1
    return maps.view(batch, concepts, height, width)
'''),
        ("some_dead", '''\
    maps = torch.zeros(batch, concepts, height, width)
    rows = -(-height // concepts)
    for k in range(concepts):
        maps[:, k, k * rows:(k + 1) * rows] = 1
    return maps
'''),
        ("shape", '''\
    owner = torch.arange(height * width) % concepts
    return torch.stack([(owner == k).float().view(height, width) for k in range(concepts)])
'''),
    ],
    "ex_06_6": [
        ("rejects_right", TEST.replace("steps=1", "steps=5")),
        ("inconsistent", '''\
    check_metric.calls = getattr(check_metric, "calls", 0) + 1
    fidelity(lambda x, text: x.sum((1, 2, 3)), torch.rand(2, 3, 6, 6), torch.rand(2, 2, 6, 6), torch.rand(2, 2, 5))
    assert check_metric.calls <= 2
'''),
        ("blur", '''\
    torch.manual_seed(0)
    images, maps, texts = torch.rand(4, 3, 6, 6), torch.rand(4, 3, 6, 6), torch.rand(4, 3, 108)
    score = lambda x, text: (x.flatten(1) * text).sum(1)
    expected = metrics.insertion_fidelity(lambda x, k: score(x, texts[:, k]), images, maps, reduction="none")
    assert torch.allclose(fidelity(score, images, maps, texts), expected, atol=1e-3)
'''),
        ("red", TEST.replace("(x.flatten(1) * text).sum(1)", "(x[:, 0].flatten(1) * text[:, :36]).sum(1)")),
        ("other_channel", TEST.replace("(x.flatten(1) * text).sum(1)", "(x[:, 2].flatten(1) * text[:, :36]).sum(1)")),
        ("misaligned", ONE_IMAGE),
        ("shifted", TEST.replace("value[2].isnan().all()", "value.isnan().sum(1).tolist().count(3) == 1")
                        .replace("value[defined], torch.ones(3, 3)", "value[~value.isnan()], torch.ones(9)")),
        ("vanishing", FULL_INSERTION),
        ("asserts_nothing", TEST.replace("    assert value[2].isnan().all()\n", "")
                                .replace("assert torch.allclose", "return torch.allclose")),
    ],
}
