"""Plausible wrong answers to the exercises of notebook 02, and the hint that each must get."""

WRONG = {
    "ex_02_1": [
        ("interchangeable", '''\
answer = {"A": "absent colour", "B": "other part", "C": "centre", "D": "random weights"}
'''),
        ("colour", '''\
answer = {"A": "other part", "B": "random", "C": "centre", "D": "random weights"}
'''),
        ("middle", '''\
answer = {"A": "other part", "B": "absent colour", "C": "random", "D": "random weights"}
'''),
        ("learned", '''\
answer = {"A": "other part", "B": "absent colour", "C": "centre", "D": "random"}
'''),
        ("ceiling", '''\
answer = {"A": "true masks", "B": "absent colour", "C": "centre", "D": "random weights"}
'''),
        ("names", '''\
answer = {"A": "other part", "B": "wrong colour", "C": "centre", "D": "random weights"}
'''),
    ],
    "ex_02_2": [
        ("correlation", '''\
answer = 0
'''),
        ("no_length", '''\
answer = 0.25
'''),
        ("no_root", '''\
answer = (1 / 4) / (1 / 3 * 1 / 3)
'''),
        ("variance", '''\
answer = (1 / 4) / (1 / 12)
'''),
        ("read_off", '''\
answer = 0.74
'''),
    ],
    "ex_02_3": [
        ("softmax_axis", '''\
    attention = logits.softmax(dim=1).requires_grad_()
    gradient, = torch.autograd.grad(score(attention).sum(), attention)
    return (gradient * attention.detach())[:, :, 1:].relu().mean(dim=1).unflatten(1, grid)
'''),
        ("attention_only", '''\
    return logits.softmax(dim=-1)[:, :, 1:].mean(dim=1).unflatten(1, grid)
'''),
        ("gradient_only", '''\
    attention = logits.softmax(dim=-1).requires_grad_()
    gradient, = torch.autograd.grad(score(attention).sum(), attention)
    return gradient[:, :, 1:].relu().mean(dim=1).unflatten(1, grid)
'''),
        ("mean_of_scores", '''\
    attention = logits.softmax(dim=-1).requires_grad_()
    gradient, = torch.autograd.grad(score(attention).mean(), attention)
    return (gradient * attention).relu().mean(dim=1)[:, 1:].unflatten(1, grid)
'''),
        ("no_relu", '''\
    attention = logits.softmax(dim=-1).requires_grad_()
    gradient, = torch.autograd.grad(score(attention).sum(), attention)
    return (gradient * attention).mean(dim=1)[:, 1:].unflatten(1, grid)
'''),
        ("relu_after_mean", '''\
    attention = logits.softmax(dim=-1).requires_grad_()
    gradient, = torch.autograd.grad(score(attention).sum(), attention)
    return (gradient * attention).mean(dim=1)[:, 1:].relu().unflatten(1, grid)
'''),
        ("heads_first", '''\
    attention = logits.softmax(dim=-1).requires_grad_()
    gradient, = torch.autograd.grad(score(attention).sum(), attention)
    products = gradient.mean(dim=1) * attention.detach().mean(dim=1)
    return products[:, 1:].relu().unflatten(1, grid)
'''),
        ("shape", '''\
    attention = logits.softmax(dim=-1).requires_grad_()
    gradient, = torch.autograd.grad(score(attention).sum(), attention)
    return (gradient * attention)[:, :, 1:].relu().mean(dim=1)
'''),
        ("cls_kept", '''\
    attention = logits.softmax(dim=-1).requires_grad_()
    gradient, = torch.autograd.grad(score(attention).sum(), attention)
    products = (gradient * attention.detach())[:, :, :grid[0] * grid[1]]
    return products.relu().mean(dim=1).unflatten(1, grid)
'''),
    ],
    "ex_02_4": [
        ("batch", '''\
    return (maps - maps.min()) / (maps.max() - maps.min())
'''),
        ("per_image", '''\
    low, high = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
    return (maps - low) / (high - low)
'''),
        ("no_minimum", '''\
    return maps / maps.amax(dim=(-2, -1), keepdim=True)
'''),
        ("constant", '''\
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low)
'''),
        ("epsilon", '''\
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low + 1e-7)
'''),
        ("detached", '''\
    maps = maps.detach()
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)
'''),
        ("range_detached", '''\
    with torch.no_grad():
        low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)
'''),
        ("nan_gradient", '''\
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0.0)
'''),
    ],
    "ex_02_5": [
        ("hidden", '''\
    fine = interpolate(maps, size=masks.shape[-2:], mode="bilinear")
    low, high = fine.amin(dim=(-2, -1), keepdim=True), fine.amax(dim=(-2, -1), keepdim=True)
    peak = (fine >= high - 1e-6 * (high - low)) & (high > low)
    return ((peak & masks).sum(dim=(-2, -1)) / peak.sum(dim=(-2, -1)).clamp(min=1)).mean(dim=0)
'''),
        ("plateau", '''\
    fine = interpolate(maps, size=masks.shape[-2:], mode="bilinear").flatten(2)
    hits = masks.flatten(2).gather(2, fine.argmax(dim=-1, keepdim=True))[..., 0].float()
    return hits.where(masks.flatten(2).any(dim=-1), torch.nan).nanmean(dim=0)
'''),
        ("plateau_any", '''\
    fine = interpolate(maps, size=masks.shape[-2:], mode="bilinear")
    low, high = fine.amin(dim=(-2, -1), keepdim=True), fine.amax(dim=(-2, -1), keepdim=True)
    peak = (fine >= high - 1e-6 * (high - low)) & (high > low)
    hits = (peak & masks).flatten(2).any(dim=-1).float()
    return hits.where(masks.flatten(2).any(dim=-1), torch.nan).nanmean(dim=0)
'''),
        ("dead", '''\
    fine = interpolate(maps, size=masks.shape[-2:], mode="bilinear")
    peak = fine >= fine.amax(dim=(-2, -1), keepdim=True) - 1e-6
    hits = (peak & masks).sum(dim=(-2, -1)) / peak.sum(dim=(-2, -1))
    return hits.where(masks.flatten(2).any(dim=-1), torch.nan).nanmean(dim=0)
'''),
        ("near_tie", '''\
    fine = dealkit.normalize_maps(interpolate(maps, size=masks.shape[-2:], mode="bilinear"))
    hits = ((fine > 0.999) & masks).sum(dim=(-2, -1)) / (fine > 0.999).sum(dim=(-2, -1))
    return hits.nan_to_num().where(masks.flatten(2).any(dim=-1), torch.nan).nanmean(dim=0)
'''),
        ("absolute", '''\
    fine = interpolate(maps, size=masks.shape[-2:], mode="bilinear")
    peak = (fine >= fine.amax(dim=(-2, -1), keepdim=True) - 1e-6) & (fine > fine.amin(dim=(-2, -1), keepdim=True))
    hits = (peak & masks).sum(dim=(-2, -1)) / peak.sum(dim=(-2, -1)).clamp(min=1)
    return hits.where(masks.flatten(2).any(dim=-1), torch.nan).nanmean(dim=0)
'''),
        ("coarse", '''\
    part = torch.nn.functional.adaptive_avg_pool2d(masks.float(), maps.shape[-2:]) > 0.5
    hits = part.flatten(2).gather(2, maps.flatten(2).argmax(dim=-1, keepdim=True))[..., 0].float()
    return hits.where(masks.flatten(2).any(dim=-1), torch.nan).nanmean(dim=0)
'''),
        ("shape", '''\
    return metrics.pointing_game(maps, masks)
'''),
        ("nan", '''\
    return metrics.pointing_game(maps, masks, reduction="none").mean(dim=0)
'''),
    ],
    "ex_02_6": [
        ("no_experiment", '''\
    named = torch.arange(mass.shape[1])
    missed, shifted = (rows.argmax(dim=2) != named for rows in (mass, mass.roll(-1, dims=1)))
    return 0.0, missed.float().mean().item(), shifted.float().mean().item()
'''),
        ("no_control", '''\
    before = score(images)
    losses = torch.stack([before - score(repaint(part)) for part in range(before.shape[1])], dim=2)
    named = torch.arange(before.shape[1])
    right = losses.argmax(dim=2) == named
    return (~right).float().mean(), (mass.argmax(dim=2) != named)[right].float().mean()
'''),
        ("sign", '''\
    before = score(images)
    losses = torch.stack([score(repaint(part)) - before for part in range(before.shape[1])], dim=2)
    named = torch.arange(before.shape[1])
    right = losses.argmax(dim=2) == named
    missed, shifted = (rows.argmax(dim=2) != named for rows in (mass, mass.roll(-1, dims=1)))
    return tuple(share.float().mean().item() for share in (~right, missed[right], shifted[right]))
'''),
        ("absolute", '''\
    before = score(images)
    losses = torch.stack([(before - score(repaint(part))).abs() for part in range(before.shape[1])], dim=2)
    named = torch.arange(before.shape[1])
    right = losses.argmax(dim=2) == named
    missed, shifted = (rows.argmax(dim=2) != named for rows in (mass, mass.roll(-1, dims=1)))
    return tuple(share.float().mean().item() for share in (~right, missed[right], shifted[right]))
'''),
        ("axis", '''\
    before = score(images)
    losses = torch.stack([before - score(repaint(part)) for part in range(before.shape[1])], dim=1)
    named = torch.arange(before.shape[1])
    right = losses.argmax(dim=2) == named
    missed, shifted = (rows.argmax(dim=2) != named for rows in (mass, mass.roll(-1, dims=1)))
    return tuple(share.float().mean().item() for share in (~right, missed[right], shifted[right]))
'''),
        ("averaged", '''\
    before = score(images)
    losses = torch.stack([(before - score(repaint(part))).mean(dim=0) for part in range(before.shape[1])], dim=1)
    named = torch.arange(before.shape[1])
    right = losses.argmax(dim=1) == named
    missed, shifted = (rows.mean(dim=0).argmax(dim=1) != named for rows in (mass, mass.roll(-1, dims=1)))
    return tuple(share.float().mean().item() for share in (~right, missed[right], shifted[right]))
'''),
        ("unconditioned", '''\
    before = score(images)
    losses = torch.stack([before - score(repaint(part)) for part in range(before.shape[1])], dim=2)
    named = torch.arange(before.shape[1])
    missed, shifted = (rows.argmax(dim=2) != named for rows in (mass, mass.roll(-1, dims=1)))
    return tuple(share.float().mean().item() for share in (losses.argmax(dim=2) != named, missed, shifted))
'''),
        ("denominator", '''\
    before = score(images)
    losses = torch.stack([before - score(repaint(part)) for part in range(before.shape[1])], dim=2)
    named = torch.arange(before.shape[1])
    right = losses.argmax(dim=2) == named
    missed, shifted = (rows.argmax(dim=2) != named for rows in (mass, mass.roll(-1, dims=1)))
    return tuple(share.float().mean().item() for share in (~right, missed & right, shifted & right))
'''),
        ("previous", '''\
    before = score(images)
    losses = torch.stack([before - score(repaint(part)) for part in range(before.shape[1])], dim=2)
    named = torch.arange(before.shape[1])
    right = losses.argmax(dim=2) == named
    missed, shifted = (rows.argmax(dim=2) != named for rows in (mass, mass.roll(1, dims=1)))
    return tuple(share.float().mean().item() for share in (~right, missed[right], shifted[right]))
'''),
        ("other_axis", '''\
    before = score(images)
    losses = torch.stack([before - score(repaint(part)) for part in range(before.shape[1])], dim=2)
    named = torch.arange(before.shape[1])
    right = losses.argmax(dim=2) == named
    missed, shifted = (rows.argmax(dim=2) != named for rows in (mass, mass.roll(-1, dims=2)))
    return tuple(share.float().mean().item() for share in (~right, missed[right], shifted[right]))
'''),
    ],
}
