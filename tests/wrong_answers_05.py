"""Plausible wrong answers to the exercises of notebook 05, and the hint that each must get."""
WRONG = {
    "ex_05_1": [
        ("difference", '''\
answer = (0.9 - 0.7, 0.9 - 0.7)
'''),
        ("zero", '''\
answer = (0, 0.4)
'''),
        ("wrong_at_home_stays", '''\
answer = (0.2, 1 - 0.7)
'''),
        ("right_twice_flips", '''\
answer = (0.2, 0.7)
'''),
        ("order", '''\
answer = (0.4, 0.2)
'''),
        ("percent", '''\
answer = (20, 40)
'''),
    ],
    "ex_05_2": [
        ("pretrained_as_control", '''\
answer = 1 - means.loc["swap", "flipped"] / means.loc["pretrained", "flipped"]
'''),
        ("weak_control", '''\
answer = 1 - means.loc["swap", "flipped"] / means.loc["swap, centre kept", "flipped"]
'''),
        ("difference", '''\
answer = means.loc["contrastive only", "flipped"] - means.loc["swap", "flipped"]
'''),
        ("share_left", '''\
answer = means.loc["swap", "flipped"] / means.loc["contrastive only", "flipped"]
'''),
        ("errors", '''\
wrong = 1 - means["accuracy"]
answer = 1 - wrong["swap"] / wrong["contrastive only"]
'''),
        ("no_control", '''\
answer = means.loc["swap", "flipped"]
'''),
    ],
    "ex_05_3": [
        ("difference", '''\
    correct, other = (predicted == label).float(), (predicted_other == label).float()
    group = 2 * (label % 2) + background
    return abs(correct.mean() - other.mean()), min(correct[group == g].mean() for g in range(4))
'''),
        ("right_to_wrong", '''\
    correct, group = predicted == label, 2 * (label % 2) + background
    flips = (correct & (predicted_other != label)).float().mean()
    return flips, min(correct[group == g].float().mean() for g in range(4))
'''),
        ("correctness", '''\
    correct, group = predicted == label, 2 * (label % 2) + background
    flips = (correct != (predicted_other == label)).float().mean()
    return flips, min(correct[group == g].float().mean() for g in range(4))
'''),
        ("unflipped", '''\
    correct, group = predicted == label, 2 * (label % 2) + background
    flips = (predicted == predicted_other).float().mean()
    return flips, min(correct[group == g].float().mean() for g in range(4))
'''),
        ("average", '''\
    return (predicted != predicted_other).float().mean(), (predicted == label).float().mean()
'''),
        ("mean_of_groups", '''\
    correct, group = (predicted == label).float(), 2 * (label % 2) + background
    return (predicted != predicted_other).float().mean(), sum(correct[group == g].mean() for g in range(4)) / 4
'''),
        ("best_group", '''\
    correct, group = (predicted == label).float(), 2 * (label % 2) + background
    return (predicted != predicted_other).float().mean(), max(correct[group == g].mean() for g in range(4))
'''),
        ("one_attribute", '''\
    correct = (predicted == label).float()
    return (predicted != predicted_other).float().mean(), min(correct[background == b].mean() for b in (0, 1))
'''),
        ("cells", '''\
    correct = (predicted == label).float()
    worst = min(correct[(label == y) & (background == b)].mean() for y in label.unique() for b in (0, 1))
    return (predicted != predicted_other).float().mean(), worst
'''),
    ],
    "ex_05_4": [
        ("same_birds", '''\
    z, b = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1), background * 2.0 - 1
    w = torch.linalg.solve(z[train].T @ z[train] + 0.01 * torch.eye(z.shape[1]), z[train].T @ b[train])
    return ((z[train] @ w).sign() == b[train]).float().mean().item()
'''),
        ("fitted_on_all", '''\
    z, b = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1), background * 2.0 - 1
    w = torch.linalg.solve(z.T @ z + 0.01 * torch.eye(z.shape[1]), z.T @ b)
    return ((z[~train] @ w).sign() == b[~train]).float().mean().item()
'''),
        ("scored_on_all", '''\
    z, b = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1), background * 2.0 - 1
    w = torch.linalg.solve(z[train].T @ z[train] + 0.01 * torch.eye(z.shape[1]), z[train].T @ b[train])
    return ((z @ w).sign() == b).float().mean().item()
'''),
        ("swapped_halves", '''\
    z, b = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1), background * 2.0 - 1
    w = torch.linalg.solve(z[~train].T @ z[~train] + 0.01 * torch.eye(z.shape[1]), z[~train].T @ b[~train])
    return ((z[train] @ w).sign() == b[train]).float().mean().item()
'''),
        ("own_split", '''\
    z, b = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1), background * 2.0 - 1
    fit, test = slice(0, len(z) // 2), slice(len(z) // 2, None)
    w = torch.linalg.solve(z[fit].T @ z[fit] + 0.01 * torch.eye(z.shape[1]), z[fit].T @ b[fit])
    return ((z[test] @ w).sign() == b[test]).float().mean().item()
'''),
        ("no_intercept", '''\
    z, b = tokens, background * 2.0 - 1
    w = torch.linalg.solve(z[train].T @ z[train] + 0.01 * torch.eye(z.shape[1]), z[train].T @ b[train])
    return ((z[~train] @ w).sign() == b[~train]).float().mean().item()
'''),
        ("targets", '''\
    z, b = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1), background.float()
    w = torch.linalg.solve(z[train].T @ z[train] + 0.01 * torch.eye(z.shape[1]), z[train].T @ b[train])
    return ((z[~train] @ w).sign() == b[~train]).float().mean().item()
'''),
        ("wrong_rate", '''\
    z, b = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1), background * 2.0 - 1
    w = torch.linalg.solve(z[train].T @ z[train] + 0.01 * torch.eye(z.shape[1]), z[train].T @ b[train])
    return ((z[~train] @ w).sign() != b[~train]).float().mean().item()
'''),
        ("scaled_on_all", '''\
    tokens = (tokens - tokens.mean(dim=0)) / tokens.std(dim=0)
    z, b = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1), background * 2.0 - 1
    w = torch.linalg.solve(z[train].T @ z[train] + 0.01 * torch.eye(z.shape[1]), z[train].T @ b[train])
    return ((z[~train] @ w).sign() == b[~train]).float().mean().item()
'''),
        ("chosen_on_others", '''\
    z, b, shares = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1), background * 2.0 - 1, []
    for alpha in (0.01, 0.1, 1, 10):
        w = torch.linalg.solve(z[train].T @ z[train] + alpha * torch.eye(z.shape[1]), z[train].T @ b[train])
        shares.append(((z[~train] @ w).sign() == b[~train]).float().mean().item())
    return max(shares)
'''),
    ],
    "ex_05_5": [
        ("masks", '''\
    bird = dict(batch)["part_masks"].any(1).float()[:, None]
    union = F.adaptive_avg_pool2d(bird, vlm.grid).flatten(1)
    kept = torch.zeros_like(union).scatter(1, union.topk(30, dim=1).indices, 1).bool().view(-1, *vlm.grid)
    return kept, kept.roll(1, 0)
'''),
        ("background", '''\
    maps = dealkit.explain(vlm, batch["image"], concepts, method="every_exit")
    union = dealkit.normalize_maps(maps).amax(1).flatten(1)
    kept = torch.zeros_like(union).scatter(1, union.topk(30, dim=1).indices, 1).bool().view(-1, *vlm.grid)
    return kept, kept[batch["background"].argsort()]
'''),
        ("no_control", '''\
    maps = dealkit.explain(vlm, batch["image"], concepts, method="every_exit")
    union = dealkit.normalize_maps(maps).amax(1).flatten(1)
    kept = torch.zeros_like(union).scatter(1, union.topk(30, dim=1).indices, 1).bool().view(-1, *vlm.grid)
    return kept, kept.clone()
'''),
        ("threshold", '''\
    maps = dealkit.explain(vlm, batch["image"], concepts, method="every_exit")
    kept = dealkit.normalize_maps(maps).amax(1) > 0.3
    return kept, kept.roll(1, 0)
'''),
        ("unequal_area", '''\
    maps = dealkit.explain(vlm, batch["image"], concepts, method="every_exit")
    union = dealkit.normalize_maps(maps).amax(1).flatten(1)
    kept = torch.zeros_like(union).scatter(1, union.topk(30, dim=1).indices, 1).bool().view(-1, *vlm.grid)
    centre = torch.zeros_like(kept)
    centre[:, 2:8, 2:8] = True
    return kept, centre
'''),
        ("control_sees_bird", '''\
    maps = dealkit.explain(vlm, batch["image"], concepts, method="every_exit")
    wrong = dealkit.explain(vlm, batch["image"], concepts[::-1], method="every_exit")
    places = []
    for one in (maps, wrong):
        union = dealkit.normalize_maps(one).amax(1).flatten(1)
        places.append(torch.zeros_like(union).scatter(1, union.topk(30, dim=1).indices, 1).bool().view(-1, *vlm.grid))
    return places[0], places[1]
'''),
        ("last_block", '''\
    maps = dealkit.explain(vlm, batch["image"], concepts)
    union = dealkit.normalize_maps(maps).amax(1).flatten(1)
    kept = torch.zeros_like(union).scatter(1, union.topk(30, dim=1).indices, 1).bool().view(-1, *vlm.grid)
    return kept, kept.roll(1, 0)
'''),
        ("not_normalised", '''\
    union = dealkit.explain(vlm, batch["image"], concepts, method="every_exit").amax(1).flatten(1)
    kept = torch.zeros_like(union).scatter(1, union.topk(30, dim=1).indices, 1).bool().view(-1, *vlm.grid)
    return kept, kept.roll(1, 0)
'''),
        ("mean_over_concepts", '''\
    maps = dealkit.explain(vlm, batch["image"], concepts, method="every_exit")
    union = dealkit.normalize_maps(maps).mean(1).flatten(1)
    kept = torch.zeros_like(union).scatter(1, union.topk(30, dim=1).indices, 1).bool().view(-1, *vlm.grid)
    return kept, kept.roll(1, 0)
'''),
        ("lowest", '''\
    maps = dealkit.explain(vlm, batch["image"], concepts, method="every_exit")
    union = dealkit.normalize_maps(maps).amax(1).flatten(1)
    low = union.topk(30, dim=1, largest=False).indices
    kept = torch.zeros_like(union).scatter(1, low, 1).bool().view(-1, *vlm.grid)
    return kept, kept.roll(1, 0)
'''),
        ("not_repeatable", '''\
    maps = dealkit.explain(vlm, batch["image"], concepts, method="every_exit")
    union = dealkit.normalize_maps(maps).amax(1).flatten(1)
    noise, places = torch.rand(union.shape), []
    for one in (union, noise):
        places.append(torch.zeros_like(one).scatter(1, one.topk(30, dim=1).indices, 1).bool().view(-1, *vlm.grid))
    return places[0], places[1]
'''),
    ],
}
