"""Plausible wrong answers to the exercises of notebook 03, and the hint that each must get."""

HAT = '''\
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    h = ((maps - low) / (high - low).clamp(min=1e-12)).flatten(2)
'''

WHERE = "torch.where(high > low, (maps - low) / (high - low), 0)"

HATS = '''\
    def stretch(maps):
        low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
        return (maps - low) / (high - low).clamp(min=1e-12)

'''


def step(maps="vlm, batch['image'], texts, create_graph=True", labels=', batch["label"]', before="", after="",
         concepts="explained[:, :-1]", clip="clip + ", weights=("weight_disentangle", "weight_localize")) -> str:
    """The loss of a step with something else in one place."""
    return f'''\
    names = [categories[label] for label in batch["label"]]
    prompts = [f"a photo of a {{name}}" for name in names]
    texts = [bank[name] + [prompt] for name, prompt in zip(names, prompts)]
{before}\
    image_emb, text_emb = vlm.encode_image(batch["image"]), vlm.encode_text(prompts)
    clip = dealkit.contrastive_loss(image_emb, text_emb, vlm.logit_scale{labels})
    explained = dealkit.explain({maps})
{after}\
    concepts, category = {concepts}, explained[:, -1]
    return ({clip}{weights[0]} * dealkit.disentangle_loss(concepts)
            + {weights[1]} * dealkit.localize_loss(concepts, category))
'''


def trial(choose='"validation"', masked="False", score='row["accuracy"] - row["overlap"]', pairs="report_pairs",
          control='mass(0, *pair)', half="stats.t.ppf(0.975, n - 1) * d.std(ddof=1) / np.sqrt(n)",
          choosers="choose_pairs", result="chosen") -> str:
    """The experiment with something else in one place."""
    return f'''\
    import numpy as np
    from scipy import stats

    def score(weight):
        rows = [run(weight, *pair, {choose}, masks={masked}) for pair in {choosers}]
        return np.mean([{score} for row in rows])

    def mass(weight, pretrained, seed):
        return run(weight, pretrained, seed, "test", masks=True)["mass_in_mask"]

    chosen = max(weights, key=score)
    deal = np.array([mass(chosen, *pair) for pair in {pairs}])
    control = np.array([{control} for pair in {pairs}])
    d, n = deal - control, len(deal)
    half = {half}
    return {result}, d.mean(), d.mean() - half, d.mean() + half
'''


WRONG = {
    "ex_03_1": [
        ("last_layer", 'answer = {"a", "b", "d"}\n'),
        ("raises", 'answer = {"c"}\n'),
        ("larger_weight", 'answer = {"a", "d", "e"}\n'),
        ("first_order", 'answer = {"a", "f"}\n'),
        ("no_control", 'answer = {"a", "d", "g"}\n'),
        ("frozen_values", 'answer = {"d"}\n'),
        ("same_weights", 'answer = ["a"]\n'),
        ("not_a_letter", 'answer = {"a, d"}\n'),
    ],
    "ex_03_2": [
        ("detached", "    maps = maps.detach()\n" + HAT + "    return (h @ h.mT).triu(1).sum(dim=(1, 2)).mean()\n"),
        ("half_detached", HAT.replace("= maps.amin", "= maps.detach().amin")
         + "    return (h @ h.mT).triu(1).sum(dim=(1, 2)).mean()\n"),
        ("mean_over_pairs", HAT + '''\
    i, j = torch.triu_indices(h.shape[1], h.shape[1], offset=1)
    return (h[:, i] * h[:, j]).sum(dim=-1).mean()
'''),
        ("both_orders", HAT + '''\
    total, concepts = 0, range(h.shape[1])
    for i in concepts:
        total = total + sum((h[:, i] * h[:, j]).sum(dim=1) for j in concepts if i != j)
    return total.mean()
'''),
        ("diagonal", HAT + "    return torch.einsum('bip,bjp->b', h, h).mean()\n"),
        ("pairs_missing", HAT + '''\
    total = 0
    for i in range(h.shape[1] - 1):
        total = total + (h[:, i] * h[:, i + 1]).sum(dim=1)
    return total.mean()
'''),
        ("not_normalised", '''\
    h = maps.flatten(2)
    return (h @ h.mT).triu(1).sum(dim=(1, 2)).mean()
'''),
        ("normalised_over_batch", '''\
    h = ((maps - maps.min()) / (maps.max() - maps.min())).flatten(2)
    return (h @ h.mT).triu(1).sum(dim=(1, 2)).mean()
'''),
        ("not_averaged", HAT + "    return (h @ h.mT).triu(1).sum()\n"),
        ("mean_over_pixels", HAT + "    return (h @ h.mT).triu(1).sum(dim=(1, 2)).mean() / h.shape[2]\n"),
        ("constant_map", HAT.replace(".clamp(min=1e-12)", "")
         + "    return (h @ h.mT).triu(1).sum(dim=(1, 2)).mean()\n"),
        ("nan_gradient", HAT.replace("((maps - low) / (high - low).clamp(min=1e-12))", WHERE)
         + "    return (h @ h.mT).triu(1).sum(dim=(1, 2)).mean()\n"),
        ("shape", HAT + "    return (h @ h.mT).triu(1).sum(dim=(1, 2)).mean(dim=0, keepdim=True)\n"),
    ],
    "ex_03_3": [
        ("mean_of_concepts", HATS + '''\
    return (stretch(concept_maps).mean(dim=1) - stretch(category_maps)).square().sum(dim=(1, 2)).mean()
'''),
        ("max_of_concepts", HATS + '''\
    return (stretch(concept_maps).amax(dim=1) - stretch(category_maps)).square().sum(dim=(1, 2)).mean()
'''),
        ("stretched_again", HATS + '''\
    return (stretch(concept_maps.sum(dim=1)) - stretch(category_maps)).square().sum(dim=(1, 2)).mean()
'''),
        ("each_alone", HATS + '''\
    return (stretch(concept_maps) - stretch(category_maps)[:, None]).square().sum(dim=(1, 2, 3)).mean()
'''),
        ("not_normalised", HATS + '''\
    return (stretch(concept_maps).sum(dim=1) - category_maps).square().sum(dim=(1, 2)).mean()
'''),
        ("normalised_over_batch", '''\
    def stretch(maps):
        return (maps - maps.min()) / (maps.max() - maps.min())

    return (stretch(concept_maps).sum(dim=1) - stretch(category_maps)).square().sum(dim=(1, 2)).mean()
'''),
        ("not_averaged", HATS + '''\
    return (stretch(concept_maps).sum(dim=1) - stretch(category_maps)).square().sum()
'''),
        ("mean_over_pixels", HATS + '''\
    return (stretch(concept_maps).sum(dim=1) - stretch(category_maps)).square().mean()
'''),
        ("detached", HATS + '''\
    with torch.no_grad():
        rest = stretch(concept_maps).sum(dim=1) - stretch(category_maps)
    return rest.square().sum(dim=(1, 2)).mean()
'''),
        ("one_side_constant", HATS + '''\
    target = stretch(category_maps).detach()
    return (stretch(concept_maps).sum(dim=1) - target).square().sum(dim=(1, 2)).mean()
'''),
        ("constant_map", HATS.replace(".clamp(min=1e-12)", "") + '''\
    return (stretch(concept_maps).sum(dim=1) - stretch(category_maps)).square().sum(dim=(1, 2)).mean()
'''),
        ("nan_gradient", HATS.replace("(maps - low) / (high - low).clamp(min=1e-12)", WHERE) + '''\
    return (stretch(concept_maps).sum(dim=1) - stretch(category_maps)).square().sum(dim=(1, 2)).mean()
'''),
        ("shape", HATS + '''\
    rest = stretch(concept_maps).sum(dim=1) - stretch(category_maps)
    return rest.square().flatten(1).sum(dim=1, keepdim=True).mean(dim=0)
'''),
    ],
    "ex_03_4": [
        ("maps_constant", step("vlm, batch['image'], texts")),
        ("partly_constant", step(after='''\
    with torch.no_grad():
        image_emb = vlm.encode_image(batch["image"])
    clip = dealkit.contrastive_loss(image_emb, text_emb, vlm.logit_scale, batch["label"])
''')),
        ("no_graph", '''\
    with torch.no_grad():
''' + "".join("    " + line + "\n" for line in step("vlm, batch['image'], texts").splitlines())),
        ("masks_in_training", step(after='''\
    inside = torch.nn.functional.interpolate(batch["part_masks"].float(), explained.shape[2:], mode="area")
    explained = torch.cat([explained[:, :-1] * inside, explained[:, -1:]], dim=1)
''')),
        ("contrastive_missing", step(clip="")),
        ("false_negatives", step(labels="")),
        ("weights_mixed_up", step(weights=("weight_localize", "weight_disentangle"))),
        ("category_among_concepts", step(concepts="explained")),
    ],
    "ex_03_5": [
        ("masks_in_choosing", trial(masked="True", score='row["mass_in_mask"]')),
        ("chosen_on_test", trial(choose='"test"')),
        ("not_a_weight", trial(result="weights.index(chosen)")),
        ("chosen_on_report_pairs", trial(choosers="report_pairs")),
        ("pairs_left_out", trial(choosers="choose_pairs[:1]")),
        ("rule_changed", trial(score='-row["overlap"]')),
        ("no_control", trial(control='mass(chosen, *report_pairs[0])')),
        ("seeds_reused", trial(pairs="choose_pairs + report_pairs")),
        ("other_seeds", trial(control="mass(0, *report_pairs[0])")),
        ("unpaired", trial(half="stats.t.ppf(0.975, n - 1) * np.sqrt((deal.var(ddof=1) + control.var(ddof=1)) / n)")),
        ("normal_quantile", trial(half="1.96 * d.std(ddof=1) / np.sqrt(n)")),
        ("population_deviation", trial(half="stats.t.ppf(0.975, n - 1) * d.std() / np.sqrt(n)")),
        ("spread_of_runs", trial(half="stats.t.ppf(0.975, n - 1) * d.std(ddof=1)")),
    ],
}
