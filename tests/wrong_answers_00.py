"""Plausible wrong answers to the exercises of notebook 00, and the hint that each must get."""

WRONG = {
    "ex_00_1": [
        ("equal_maps", '''\
answer = {"overlap_cosine": 1.0, "pointing_game": 0.0, "mass_in_mask": 0.0, "dead_maps": 1.0}
'''),
        ("chance", '''\
answer = {"overlap_cosine": 0.0, "pointing_game": 0.03, "mass_in_mask": 0.03, "dead_maps": 1.0}
'''),
        ("no_dead_map", '''\
answer = {"overlap_cosine": 0.0, "pointing_game": 0.0, "mass_in_mask": 0.0, "dead_maps": 0.0}
'''),
        ("undefined", '''\
answer = {"overlap_cosine": float("nan"), "pointing_game": 0.0, "mass_in_mask": float("nan"), "dead_maps": 1.0}
'''),
    ],
    "ex_00_2": [
        ("no_control", '''\
answer = {"overlap_cosine", "pointing_game", "mass_in_mask", "concept_accuracy"}
'''),
        ("interval_holds_zero", '''\
answer = {"overlap_cosine", "pointing_game", "mass_in_mask", "accuracy"}
'''),
        ("nothing_moved", '''\
answer = {"overlap_cosine", "pointing_game", "mass_in_mask", "dead_maps"}
'''),
        ("fall_left_out", '''\
answer = {"pointing_game", "mass_in_mask"}
'''),
        ("left_out", '''\
answer = ["overlap_cosine", "pointing_game"]
'''),
    ],
    "ex_00_3": [
        ("none_is_no_head", '''\
    side = masks.shape[-1] // maps.shape[-1]
    peak = maps.flatten(2).argmax(dim=2)
    row, column = peak // maps.shape[-1], peak % maps.shape[-1]
    image = torch.arange(len(maps))[:, None]
    under = masks[image, :, row * side + side // 2, column * side + side // 2]
    return under.int().argmax(dim=2)
'''),
        ("pixel_mean", '''\
    side = masks.shape[-1] // maps.shape[-1]
    peak = maps.mean(dim=1, keepdim=True).flatten(2).argmax(dim=2)
    row, column = peak // maps.shape[-1], peak % maps.shape[-1]
    image = torch.arange(len(maps))[:, None]
    under = masks[image, :, row * side + side // 2, column * side + side // 2]
    under = torch.where(under.any(dim=2), under.int().argmax(dim=2), -1)
    return under.expand(-1, maps.shape[1])
'''),
        ("corner", '''\
    side = masks.shape[-1] // maps.shape[-1]
    result = torch.full(maps.shape[:2], -1)
    for b, one in enumerate(maps):
        for k, this in enumerate(one):
            row, column = divmod(int(this.argmax()), maps.shape[-1])
            for part in range(masks.shape[1]):
                if masks[b, part, row * side, column * side]:
                    result[b, k] = part
    return result
'''),
        ("off_by_one", '''\
    side = masks.shape[-1] // maps.shape[-1]
    peak = maps.flatten(2).argmax(dim=2)
    row, column = peak // maps.shape[-1], peak % maps.shape[-1]
    image = torch.arange(len(maps))[:, None]
    under = masks[image, :, row * side + (side - 1) // 2, column * side + (side - 1) // 2]
    return torch.where(under.any(dim=2), under.int().argmax(dim=2), -1)
'''),
        ("fixed_side", '''\
    side = 8
    peak = maps.flatten(2).argmax(dim=2)
    row, column = peak // maps.shape[-1], peak % maps.shape[-1]
    image = torch.arange(len(maps))[:, None]
    under = masks[image, :, row * side + side // 2, column * side + side // 2]
    return torch.where(under.any(dim=2), under.int().argmax(dim=2), -1)
'''),
        ("height", '''\
    side = masks.shape[-1] // maps.shape[-1]
    peak = maps.flatten(2).argmax(dim=2)
    row, column = peak // maps.shape[-2], peak % maps.shape[-1]
    image = torch.arange(len(maps))[:, None]
    under = masks[image, :, row * side + side // 2, column * side + side // 2]
    return torch.where(under.any(dim=2), under.int().argmax(dim=2), -1)
'''),
        ("rows_and_columns", '''\
    side = masks.shape[-1] // maps.shape[-1]
    peak = maps.flatten(2).argmax(dim=2)
    row, column = peak % maps.shape[-1], peak // maps.shape[-1]
    image = torch.arange(len(maps))[:, None]
    under = masks[image, :, row * side + side // 2, column * side + side // 2]
    return torch.where(under.any(dim=2), under.int().argmax(dim=2), -1)
'''),
        ("shape", '''\
    side = masks.shape[-1] // maps.shape[-1]
    peak = maps.mean(dim=1).flatten(1).argmax(dim=1)
    row, column = peak // maps.shape[-1], peak % maps.shape[-1]
    under = masks[torch.arange(len(maps)), :, row * side + side // 2, column * side + side // 2]
    return torch.where(under.any(dim=1), under.int().argmax(dim=1), -1)
'''),
    ],
    "ex_00_4": [
        ("no_control", '''\
    before = study[study["row"] == "pretrained"].set_index("pretrained")[metric]
    deal = study[study["row"] == "DEAL"]
    return (deal[metric] > deal["pretrained"].map(before)).mean()
'''),
        ("unpaired", '''\
    deal = study.loc[study["row"] == "DEAL", metric].to_numpy()
    control = study.loc[study["row"] == "contrastive only", metric].to_numpy()
    return (deal[:, None] > control[None, :]).mean()
'''),
        ("metric_ignored", '''\
    runs = study.pivot(index=["pretrained", "seed"], columns="row", values="mass_in_mask")
    pairs = runs[["DEAL", "contrastive only"]].dropna()
    return (pairs["DEAL"] > pairs["contrastive only"]).mean()
'''),
        ("tie", '''\
    runs = study.pivot(index=["pretrained", "seed"], columns="row", values=metric)
    pairs = runs[["DEAL", "contrastive only"]].dropna()
    return (pairs["DEAL"] >= pairs["contrastive only"]).mean()
'''),
        ("half_a_pair", '''\
    deal, control = (study[study["row"] == row] for row in ("DEAL", "contrastive only"))
    pairs = deal.merge(control, on="seed")
    return (pairs[metric + "_x"] > pairs[metric + "_y"]).mean()
'''),
        ("by_position", '''\
    deal = study.loc[study["row"] == "DEAL", metric].to_numpy()
    control = study.loc[study["row"] == "contrastive only", metric].to_numpy()
    return (deal > control).mean()
'''),
        ("two_rows", '''\
    deal = study[study["row"].str.contains("DEAL")]
    control = study[study["row"] == "contrastive only"]
    pairs = deal.merge(control, on=["pretrained", "seed"])
    return (pairs[metric + "_x"] > pairs[metric + "_y"]).mean()
'''),
        ("of_means", '''\
    means = study.groupby("row")[metric].mean()
    return float(means["DEAL"] > means["contrastive only"])
'''),
        ("count", '''\
    deal, control = (study[study["row"] == row] for row in ("DEAL", "contrastive only"))
    pairs = deal.merge(control, on=["pretrained", "seed"])
    return (pairs[metric + "_x"] > pairs[metric + "_y"]).sum()
'''),
        ("size", '''\
    means = study.groupby("row")[metric].mean()
    return means["DEAL"] - means["contrastive only"]
'''),
    ],
    "ex_00_5": [
        ("no_control", '''\
    right = dealkit.metrics.mass_in_mask(explain(images, own), masks, reduction="none")
    chance = masks.float().mean(dim=(2, 3))
    return (right - chance).nanmean(dim=1)
'''),
        ("unpaired", '''\
    right = dealkit.metrics.mass_in_mask(explain(images, own), masks, reduction="none")
    control = dealkit.metrics.mass_in_mask(explain(images.roll(1, 0), wrong), masks.roll(1, 0), reduction="none")
    return right.nanmean(dim=1) - control.nanmean(dim=1)
'''),
        ("one_number", '''\
    right = dealkit.metrics.mass_in_mask(explain(images, own), masks)
    control = dealkit.metrics.mass_in_mask(explain(images, wrong), masks)
    return right - control
'''),
        ("hidden_part", '''\
    right = dealkit.metrics.mass_in_mask(explain(images, own), masks, reduction="none")
    control = dealkit.metrics.mass_in_mask(explain(images, wrong), masks, reduction="none")
    return (right - control).mean(dim=1)
'''),
        ("pixel_mean", '''\
    right, control = (explain(images, texts).mean(dim=1, keepdim=True).expand(-1, masks.shape[1], -1, -1)
                      for texts in (own, wrong))
    right, control = (dealkit.metrics.mass_in_mask(maps, masks, reduction="none") for maps in (right, control))
    return (right - control).nanmean(dim=1)
'''),
        ("sign", '''\
    right = dealkit.metrics.mass_in_mask(explain(images, own), masks, reduction="none")
    control = dealkit.metrics.mass_in_mask(explain(images, wrong), masks, reduction="none")
    return (control - right).nanmean(dim=1)
'''),
        ("sum_not_mean", '''\
    right = dealkit.metrics.mass_in_mask(explain(images, own), masks, reduction="none")
    control = dealkit.metrics.mass_in_mask(explain(images, wrong), masks, reduction="none")
    return (right - control).nansum(dim=1)
'''),
    ],
}
