"""Checks of the exercises to notebook 02, entanglement diagnosis."""
from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, interpolate

from dealkit import explain, load_model, metrics, normalize_maps
from dealkit.check.result import Hint, call, exercise, other, recognise, same
from dealkit.datasets import Birdworld

__all__ = ["ex_02_1", "ex_02_2", "ex_02_3", "ex_02_4", "ex_02_5", "ex_02_6"]

# The rows of the table of 2.1: what each would show if it came out as high as the row of the concept maps.
ROWS = {"other part": "that the maps of one bird may be dealt out to its parts in any way",
        "absent colour": "that a text with another colour marks the same place",
        "centre": "that a map needs to know neither the picture nor the text",
        "random weights": "that the model need not have learned anything",
        "random": "that noise is good enough", "true masks": "that maps are as good as this grid allows"}
DOUBTS = {"A": ("interchangeable", "other part", "It compares the five maps of one picture with each other"),
          "B": ("colour", "absent colour", "It keeps the part and asks about the adjective in the text"),
          "C": ("middle", "centre", "It is about a map that always looks the same, whatever the picture"),
          "D": ("learned", "random weights", "It is about the weights: picture, text and method stay as they are")}


def _recognise(value, wrong: dict, atol: float = 1e-4) -> Hint | None:
    """The hint of the first mistake whose value this is: `wrong` maps its name to (value, text)."""
    return recognise(value, {name: (text, expected) for name, (expected, text) in wrong.items()}, atol)


@exercise(start="Take doubt A first, suppose that it is true, and ask which row would then score as high as the maps.",
          right="A control is chosen for a doubt: it changes the one thing in question and keeps the others.")
def ex_02_1(answer):
    """A dict from "A", "B", "C", "D" to the name of a row of the table."""
    answer = {str(key): str(row) for key, row in dict(answer).items()}
    if set(answer) != set(DOUBTS) or not set(answer.values()) <= set(ROWS):
        return Hint("names", f"Give one row for each of A, B, C and D; the rows are called {', '.join(ROWS)}.")
    if "true masks" in answer.values():
        return Hint("ceiling", "The true masks are a ceiling, the best that maps on this grid can do. A high score of "
                               "theirs supports no sceptic.")
    for key, (mistake, right, about) in DOUBTS.items():
        if answer[key] != right:
            return Hint(mistake, f"Think again about doubt {key}. {about}. If '{answer[key]}' scored as high as the "
                                 f"concept maps, it would show {ROWS[answer[key]]}.")
    return None


@exercise(start="Write down the mean of h(p) g(p) over the pixels, then that of h(p) squared: two short integrals.",
          right="Noise overlaps this much only because it is nowhere negative. Read every overlap beside this number.")
def ex_02_2(answer):
    """A number: the cosine of two maps of uniform noise on a very fine grid."""
    if same(float(answer), 0.75, atol=2e-3):
        return None
    return _recognise(float(answer), {
        "correlation": (0.0, "The maps are not correlated, but a correlation takes the means away first, and equation "
                             "(5) does not. What is the product of two numbers that are never negative?"),
        "no_length": (1 / 4, "That is the mean of the products. A cosine also divides by two lengths, with roots."),
        "no_root": (9 / 4, "A cosine is at most 1. Each length is the root of a sum of squares: take the roots."),
        "variance": (3.0, "A cosine is at most 1. A variance takes the mean away first, and a length does not."),
        "read_off": (0.74, "That is what one sample on a grid of 10 by 10 shows. Compute the limit of a fine grid.")},
        atol=8e-3) or other("Draw two maps of 1000 by 1000 with torch.rand, compute equation (5), find the formula.")


@lru_cache(maxsize=1)
def _cut():
    """Four birds that the student has not seen: the logits of attention, the score after the cut, and the maps."""
    vlm = load_model("birdworld-vit", device="cpu")
    images = Birdworld("test", n=4, seed=31).batch(range(4))["image"]
    with torch.no_grad():
        text, split = vlm.encode_text(["red head", "blue wing", "blue belly", "purple tail"]), vlm.tower.split(images)
        shift = torch.randn(4, split.variable.shape[1], 1, generator=torch.Generator().manual_seed(2))
        logits = split.variable.clamp(min=1e-30).log() + shift              # a right softmax does not see the shift
    return logits, lambda row: cosine_similarity(split.head(row), text), explain(vlm, images, text[:, None])[:, 0]


@exercise(start="Turn the logits into attention with a softmax over the tokens, and let the result require a gradient.",
          right="These are the maps of dealkit.explain: gradient times attention, ReLU head by head, mean over heads.")
def ex_02_3(answer):
    """A function of logits [B, M, 1 + h*w], score and grid that returns maps [B, h, w]."""
    logits, score, expected = _cut()
    value, factors = torch.as_tensor(call(answer, logits.clone(), score, tuple(expected.shape[1:]))), {}
    if same(value, expected, atol=1e-6):
        return None
    for axis in (-1, 1):
        attention = logits.softmax(axis).requires_grad_()
        factors[axis] = attention.detach(), *torch.autograd.grad(score(attention).sum(), attention)
    (attention, gradient), across = factors[-1], torch.mul(*factors[1])
    product, cls = attention * gradient, "Drop CLS, and only CLS: it is the first token and has no place in the image."
    if value.shape != expected.shape:
        return Hint("cls_kept", cls) if value.shape[-1:] == logits.shape[-1:] else Hint("shape", (
            f"Your result is {tuple(value.shape)}. Each of the 4 images has one map {tuple(expected.shape[1:])}."))
    return _recognise(value.flatten(1), {
        "cls_kept": (product[:, :, :-1].relu().mean(1), cls),
        "softmax_axis": (across[:, :, 1:].relu().mean(1), "Your softmax runs over the heads. One head shares out its "
                         "attention among the tokens: check which sum over your attention is 1."),
        "attention_only": (attention[:, :, 1:].mean(1), "This is the attention alone, the same for every text: no "
                           "gradient of the score enters your result."),
        "gradient_only": (gradient[:, :, 1:].relu().mean(1), "This is the gradient alone. A patch that CLS does not "
                          "read at all can be high in it; equation (2) has a second factor."),
        "mean_of_scores": ((expected / 4).flatten(1), "All values are too small by one factor: what, for 4 images?"),
        "no_relu": (product[:, :, 1:].mean(1), "Your map has negative values: evidence against the concept was set off "
                    "against evidence for it. Equation (3) keeps only what is positive."),
        "relu_after_mean": (product[:, :, 1:].mean(1).relu(), "Your ReLU comes after the mean, so a head that argues "
                            "against the text silences one that argues for it."),
        "heads_first": ((attention.mean(1) * gradient.mean(1))[:, 1:].relu(), "You averaged over the heads before you "
                        "multiplied. The mean of products is not the product of means.")}, atol=1e-6) or other(
        "split = vlm.tower.split(images) has the attention (.variable; its log can be the logits) and leads on to the "
        "embedding (.head), whose cosine with a text is the score: compare with dealkit.explain, step by step.")


@exercise(start="Find the smallest and the largest value of each map on its own; keepdim=True lets you subtract it.",
          right="Each map has its own range 0 to 1, a dead map is all zero, and a loss on the result can train.")
def ex_02_4(answer):
    """A function of maps [B, K, h, w] that returns the stretched maps, in the same shape."""
    generator = torch.Generator().manual_seed(24)
    scale = 10 ** (-4 * torch.rand(3, 4, 1, 1, generator=generator))        # as different in height as real maps
    maps = scale * (0.3 + torch.rand(3, 4, 5, 6, generator=generator))
    maps[0, 0], maps[1, 1] = 0.5, 1e-4 * torch.rand(5, 6, generator=generator)      # a constant map, and a faint one
    value, m = torch.as_tensor(call(answer, maps.requires_grad_())), maps.detach()
    expected, low, high = normalize_maps(maps), m.amin((-2, -1), True), m.amax((-2, -1), True)
    wrong = {
        "batch": ((m - m.min()) / (m.max() - m.min()), "You used one minimum and one maximum for the whole batch, so a "
                  "map depends on its neighbours: stretch one alone, then beside others, and compare."),
        "per_image": ((m - low.amin(1, True)) / (high.amax(1, True) - low.amin(1, True)), "The concepts of an image "
                      "share one range in your result: a faint map beside a strong one stays faint."),
        "no_minimum": (m / high, "The largest value is 1 now, but the smallest is not 0: equation (4) takes it away."),
        "epsilon": (expected.detach() * value.detach().amax((-2, -1), True), "The largest value of a faint map stays "
                    "below 1. Relevance is often 0.0001: what you add to the range must be far smaller.")}
    if not same(value[1:] - expected[1:], 0 * expected[1:], atol=2e-4):        # finer than the gradient is looked at
        return _recognise(value[1:], {name: (maps[1:], text) for name, (maps, text) in wrong.items()}) or other(
            "Test by hand: the map [[1, 2], [3, 5]] becomes [[0, 0.25], [0.5, 1]], whatever lies beside it.")
    if not same(value, expected):
        return Hint("constant", "A constant map has the range 0, and must become zero everywhere: neither NaN nor one.")
    if not value.requires_grad:
        return Hint("detached", "The values are right, but no gradient reaches the maps, so that a loss on them would "
                                "train nothing. Look for detach, no_grad, numpy or item.")
    weights = torch.rand(value.shape, generator=generator)
    found, wanted = (torch.autograd.grad((weights * stretched).sum(), maps)[0] for stretched in (value, expected))
    if not found.isfinite().all():
        return Hint("nan_gradient", "The values are right, but the gradient at a constant map is NaN: 0 / 0 is "
                                    "computed before torch.where drops it. One step would ruin all weights.")
    if not same(found[1:], wanted[1:], atol=1e-3 * wanted.abs().max()):
        return Hint("range_detached", "The values are right, the gradient is not: minimum and maximum depend on the "
                                      "map, too, and your result takes them for constants.")
    return None


def _birds():
    """Six images and four parts; some are hidden, one map has a plateau, one is constant, and two have a near-tie."""
    generator = torch.Generator().manual_seed(25)
    maps = 0.9 * torch.rand(6, 4, 5, 6, generator=generator)
    masks = interpolate(torch.rand(6, 4, 5, 6, generator=generator), size=(20, 24), mode="bilinear") > 0.5
    maps[0, 0, 1:3, 2:4], masks[0, 0], masks[0, 0, :9, :12] = 1, False, True        # part of the plateau is on the part
    maps[1, 1], masks[1, 1, :3, :3] = 0.5, True
    masks[2, 0], masks[3:5, 1], masks[5, 3] = False, False, False
    for image, part, scale in ((3, 2, 1), (4, 3, 1e-3)):               # the second is as faint as relevance
        maps[image, part, :2, :2], maps[image, part, 3:, 4:] = 1, 1 - 5e-6
        maps[image, part], masks[image, part] = scale * maps[image, part], torch.arange(20)[:, None] < 8
    return maps, masks


@exercise(start="Enlarge the maps to the size of the masks first, then mark the highest pixels of each of them.",
          right="One score a part, over the images that show it. Rules for ties and hidden parts move it: state them.")
def ex_02_5(answer):
    """A function of maps [B, K, h, w] and masks [B, K, H, W] that returns K scores."""
    maps, masks = _birds()
    hits, seen = metrics.pointing_game(maps, masks, reduction="none"), masks.flatten(2).any(-1)
    value = torch.as_tensor(call(answer, maps.clone(), masks.clone()))
    if value.shape != (4,):
        return Hint("shape", f"Your result is {tuple(value.shape)}. Each part has one score, a mean over images alone.")
    if same(value, right := hits.nanmean(0)):
        return None
    if value.isnan().any():
        return Hint("nan", "A hidden part made the mean of its concept NaN. Leave such an image out of that mean.")

    def mean(hits):
        return hits.float().where(seen, torch.nan).nanmean(0)
    fine, share = interpolate(maps, size=(20, 24), mode="bilinear"), adaptive_avg_pool2d(masks.float(), (5, 6))
    loose, coarse = (x >= x.amax((-2, -1), True) * (1 - 1e-5) for x in (fine, maps))         # near-ties are ties here
    loose = mean((loose & masks).sum((-2, -1)) / loose.sum((-2, -1)))
    first = masks.flatten(2).gather(2, fine.flatten(2).argmax(-1, True))[..., 0]
    single = {"dead": "A constant map has the area of the part as its score. It points nowhere: count a miss.",
              "near_tie": "You take pixels for equally high that are 5 millionths of the map's range apart, not one.",
              "absolute": "Your millionth is not one of the map's range: a faint map has ties with you that are none."}
    return _recognise(value, {
        "hidden": (hits.nan_to_num(0).mean(0), "Hidden parts count as misses in your score. No map can find what is "
                   "not in the picture: leave these images out for that part."),
        "plateau": (mean(first), "Of several pixels that are equally high, you took one. Each counts for its share, "
                    "and a constant map, where all are equal, misses."),
        "plateau_any": (mean(hits > 0), "A peak that only touches the part counts as a full hit in your score. Count "
                        "the share of the equally high pixels that lie on it."),
        "coarse": (mean((coarse & (share > 0.5)).flatten(2).any(-1)), "You brought the masks down to the grid of the "
                   "maps, so that a patch on the border is all part or none. Enlarge the maps.")}) or next((
            Hint(name, text) for part, (name, text) in enumerate(single.items(), 1)
            if same(value[part], loose[part]) and not same(value[part], right[part])), None) or other(
        "Compare with metrics.pointing_game(maps, masks, reduction='none'): one value for each image and part.")


def _shares(drops, mass, control):
    """(model, method, control) as 2.6 defines them, of losses and masses [B, K, K]."""
    off, elsewhere, other_map = (x.argmax(2) != torch.arange(4) for x in (drops, mass, control))
    return off.float().mean(), elsewhere[~off].float().mean(), other_map[~off].float().mean()


@exercise(start="Score the images as they are, then once for each repainted part: all else follows from these scores.",
          right="The repainted image judges the model, and only where the model is right can a map be blamed.")
def ex_02_6(answer):
    """A function of score, repaint, images and mass that returns three shares: model, method, control."""
    generator, repainted = torch.Generator().manual_seed(26), set()
    images = torch.rand(40, 3, 4, 4, generator=generator)             # a toy: the scores are the first four pixels
    drops = 0.1 * (torch.randn(40, 4, 4, generator=generator) + 1.5 * torch.eye(4))
    mass = torch.rand(40, 4, 4, generator=generator) + 0.3 * torch.eye(4)

    def repaint(part):
        changed = images.clone()
        changed[:, 0, 0] -= drops[:, :, range(4)[part]]
        repainted.add(int(part))
        return changed
    value = call(answer, lambda pixels: pixels[:, 0, 0].clone(), repaint, images.clone(), mass.clone())
    if len(repainted) < 4:
        return Hint("no_experiment", f"Of the parts 0 to 3, these were repainted: {sorted(repainted) or 'none'}. The "
                                     "others cannot turn out to matter, and maps do not say what a score depends on.")
    if len(value) == 2:
        return Hint("no_control", "The third share is missing: what maps score that belong to another concept. Without "
                                  "it nobody can say whether the second is high.")
    off, elsewhere = (x.argmax(2) != torch.arange(4) for x in (drops, mass))
    wrong = [{
        "sign": (_shares(-drops, mass, mass)[0], "You looked for the part whose repainting raises the score most. What "
                 "counts is the loss: the score before, less the score after."),
        "absolute": (_shares(drops.abs(), mass, mass)[0], "A part whose repainting raises the score counts as one that "
                     "it depends on in your result. Only losses count: leave the sign in."),
        "axis": (_shares(drops.mT, mass, mass)[0], "You compared the concepts that one part moves. Keep the concept, "
                 "and compare the parts: which repainting costs it most?"),
        "averaged": (_shares(drops.mean(0, True), mass[:1], mass[:1])[0], "You took the mean over the images before "
                     "you looked for the largest loss, which hides single images: decide image by image.")}, {
        "unconditioned": (elsewhere.float().mean(), "Your second share holds all maps that miss. Where the model "
                          "itself goes by another part, such a map may be honest: leave those pairs out."),
        "denominator": ((elsewhere & ~off).float().mean(), "The method is judged on the pairs in which the model is "
                        "right. You count among these, but divide by the number of all pairs.")}, {
        "previous": (_shares(drops, mass, mass.roll(1, 1))[2], "Each concept got the map of the concept before it. The "
                     "control asks for the next one: shift the other way."),
        "other_axis": (_shares(drops, mass, mass.roll(-1, 2))[2], "You shifted the columns, which are the parts, and "
                       "the map stayed. The concepts of an image change their maps: shift the rows.")}]
    right = _shares(drops, mass, mass.roll(-1, 1))
    for place, share, expected, mistakes in zip(("first", "second", "third"), value, right, wrong):
        if not same(float(share), expected):
            return _recognise(float(share), mistakes) or other(
                f"The {place} share is off. Count it by hand on one image with two concepts, and compare.")
    return None
