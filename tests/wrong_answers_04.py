"""Plausible wrong answers to the exercises of notebook 04, and the hint that each must get."""


def study(dead="0.01", loss="0.01", level='seen[control]["accuracy"]', default=", default=control",
          key='seen[row]["overlap_cosine"]') -> str:
    """The experiment of 4.5 with something else in one place."""
    return f'''\
    seen = {{row: pd.DataFrame([run(row, seed, "validation") for seed in seeds]).mean() for row in [control, *rows]}}
    good = [row for row in rows if seen[row]["dead_maps"] <= {dead} and seen[row]["accuracy"] >= {level} - {loss}]
    chosen = min(good, key=lambda row: {key}{default})
    gains = [run(chosen, seed, "test")["mass_in_mask"] - run(control, seed, "test")["mass_in_mask"] for seed in seeds]
    return chosen, sum(gains) / len(gains)
'''


WRONG = {
    "ex_04_1": [
        ("no_control", '''\
answer = means.loc["ResNet, DEAL", "accuracy"]
'''),
        ("other_control", '''\
answer = means.loc["ResNet, DEAL", "accuracy"] - means.loc["contrastive only", "accuracy"]
'''),
        ("pretrained_as_control", '''\
answer = means.loc["ResNet, DEAL", "accuracy"] - means.loc["pretrained", "accuracy"]
'''),
        ("sign", '''\
answer = means.loc["ResNet, contrastive only", "accuracy"] - means.loc["ResNet, DEAL", "accuracy"]
'''),
        ("percent", '''\
answer = 100 * (means.loc["ResNet, DEAL", "accuracy"] - means.loc["ResNet, contrastive only", "accuracy"])
'''),
    ],
    "ex_04_2": [
        ("coarse_grid", '''\
answer = (10, 1 / 2, 1 / 3)
'''),
        ("mean_over_places", '''\
answer = (40 / 400, 1 / 2, 1 / 3)
'''),
        ("product", '''\
answer = (20, 1 / 2, 1 / 3)
'''),
        ("no_root", '''\
answer = (40, 40 / (80 * 80), 1 / 3)
'''),
        ("all_grow", '''\
answer = (4 * 10, 4 * 1 / 2, 4 * 1 / 3)
'''),
        ("counted_twice", '''\
answer = (40, 0.5, 40 / (80 + 80))
'''),
    ],
    "ex_04_3": [
        ("no_control", '''\
    d = table.loc[table["row"] == row, metric].dropna()
    half = stats.t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5
    return d.mean(), d.mean() - half, d.mean() + half
'''),
        ("sign", '''\
    runs = table.pivot(index=["pretrained", "seed"], columns="row", values=metric)
    d = (runs[baseline] - runs[row]).dropna()
    half = stats.t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5
    return d.mean(), d.mean() - half, d.mean() + half
'''),
        ("file_order", '''\
    one, base = (table.loc[table["row"] == name, metric].to_numpy() for name in (row, baseline))
    d = one - base
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5
    return d.mean(), d.mean() - half, d.mean() + half
'''),
        ("seed_alone", '''\
    both = table[table["row"] == row].merge(table[table["row"] == baseline], on="seed")
    d = both[metric + "_x"] - both[metric + "_y"]
    half = stats.t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5
    return d.mean(), d.mean() - half, d.mean() + half
'''),
        ("unpaired", '''\
    one, base = (table.loc[table["row"] == name, metric].dropna() for name in (row, baseline))
    found = stats.ttest_ind(one, base, equal_var=False).confidence_interval(0.95)
    return one.mean() - base.mean(), found.low, found.high
'''),
        ("normal", '''\
    runs = table.pivot(index=["pretrained", "seed"], columns="row", values=metric)
    d = (runs[row] - runs[baseline]).dropna()
    half = 1.96 * d.std() / len(d) ** 0.5
    return d.mean(), d.mean() - half, d.mean() + half
'''),
        ("no_root", '''\
    runs = table.pivot(index=["pretrained", "seed"], columns="row", values=metric)
    d = (runs[row] - runs[baseline]).dropna()
    half = stats.t.ppf(0.975, len(d) - 1) * d.std()
    return d.mean(), d.mean() - half, d.mean() + half
'''),
        ("population", '''\
    runs = table.pivot(index=["pretrained", "seed"], columns="row", values=metric)
    d = (runs[row] - runs[baseline]).dropna().to_numpy()
    half = stats.t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5
    return d.mean(), d.mean() - half, d.mean() + half
'''),
        ("degrees_of_freedom", '''\
    runs = table.pivot(index=["pretrained", "seed"], columns="row", values=metric)
    d = (runs[row] - runs[baseline]).dropna()
    half = stats.t.ppf(0.975, 2 * len(d) - 2) * d.std() / len(d) ** 0.5
    return d.mean(), d.mean() - half, d.mean() + half
'''),
        ("fixed_number", '''\
    runs = table.pivot(index=["pretrained", "seed"], columns="row", values=metric)
    d = (runs[row] - runs[baseline]).dropna()
    half = 2.5706 * d.std() / 6 ** 0.5
    return d.mean(), d.mean() - half, d.mean() + half
'''),
        ("fixed_metric", '''\
    runs = table.pivot(index=["pretrained", "seed"], columns="row", values="overlap_cosine")
    d = (runs[row] - runs[baseline]).dropna()
    half = stats.t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5
    return d.mean(), d.mean() - half, d.mean() + half
'''),
        ("missing_run", '''\
    runs = table.set_index(["pretrained", "seed"])
    d = runs.loc[runs["row"] == row, metric] - runs.loc[runs["row"] == baseline, metric]
    half = stats.t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5
    return d.mean(), d.mean() - half, d.mean() + half
'''),
    ],
    "ex_04_4": [
        ("descent", '''\
    multiplier, weights = weight * limit, []
    for value in values:
        multiplier = max(0.0, multiplier - rate * (value / limit - 1))
        weights.append(multiplier / limit)
    return weights
'''),
        ("multiplier", '''\
    multiplier, weights = weight * limit, []
    for value in values:
        multiplier = max(0.0, multiplier + rate * (value / limit - 1))
        weights.append(multiplier)
    return weights
'''),
        ("mixed_units", '''\
    weights = []
    for value in values:
        weight = max(0.0, weight + rate * (value / limit - 1))
        weights.append(weight)
    return weights
'''),
        ("not_relative", '''\
    weights = []
    for value in values:
        weight = max(0.0, weight + rate * (value - limit))
        weights.append(weight)
    return weights
'''),
        ("no_floor", '''\
    multiplier, weights = weight * limit, []
    for value in values:
        multiplier += rate * (value / limit - 1)
        weights.append(multiplier / limit)
    return weights
'''),
        ("floor_at_end", '''\
    steps = rate * (torch.tensor(values, dtype=torch.float64) / limit - 1)
    return ((weight * limit + steps.cumsum(0)) / limit).clamp(min=0).tolist()
'''),
        ("starts_anew", '''\
    return [max(0.0, weight * limit + rate * (value / limit - 1)) / limit for value in values]
'''),
        ("one_step_early", '''\
    weights = [weight]
    for value in values:
        weights.append(max(0.0, weights[-1] * limit + rate * (value / limit - 1)) / limit)
    return weights
'''),
    ],
    "ex_04_5": [
        ("chosen_on_test", '''\
    level = {row: sum(run(row, seed, "test")["overlap_cosine"] for seed in seeds) for row in rows}
    chosen = min(level, key=level.get)
    gains = [run(chosen, seed, "test")["mass_in_mask"] - run(control, seed, "test")["mass_in_mask"] for seed in seeds]
    return chosen, sum(gains) / len(gains)
'''),
        ("one_seed", '''\
    seen = {row: run(row, seeds[0], "validation") for row in [control, *rows]}
    good = [row for row in rows if seen[row]["dead_maps"] <= 0.01
            and seen[row]["accuracy"] >= seen[control]["accuracy"] - 0.01]
    chosen = min(good, key=lambda row: seen[row]["overlap_cosine"])
    gains = [run(chosen, seed, "test")["mass_in_mask"] - run(control, seed, "test")["mass_in_mask"] for seed in seeds]
    return chosen, sum(gains) / len(gains)
'''),
        ("collapse", '''\
    level = {row: sum(run(row, seed, "validation")["overlap_cosine"] for seed in seeds) for row in rows}
    chosen = min(level, key=level.get)
    gains = [run(chosen, seed, "test")["mass_in_mask"] - run(control, seed, "test")["mass_in_mask"] for seed in seeds]
    return chosen, sum(gains) / len(gains)
'''),
        ("accuracy_lost", '''\
    seen = {row: pd.DataFrame([run(row, seed, "validation") for seed in seeds]).mean() for row in rows}
    alive = [row for row in rows if seen[row]["dead_maps"] <= 0.01]
    chosen = min(alive, key=lambda row: seen[row]["overlap_cosine"])
    gains = [run(chosen, seed, "test")["mass_in_mask"] - run(control, seed, "test")["mass_in_mask"] for seed in seeds]
    return chosen, sum(gains) / len(gains)
'''),
        ("masks", study(key='seen[row]["overlap_cosine"] - seen[row]["mass_in_mask"]')),
        ("no_control", '''\
    seen = {row: pd.DataFrame([run(row, seed, "validation") for seed in seeds]).mean() for row in [control, *rows]}
    good = [row for row in rows if seen[row]["dead_maps"] <= 0.01
            and seen[row]["accuracy"] >= seen[control]["accuracy"] - 0.01]
    chosen = min(good, key=lambda row: seen[row]["overlap_cosine"])
    return chosen, sum(run(chosen, seed, "test")["mass_in_mask"] for seed in seeds) / len(seeds)
'''),
        ("reported_on_validation", '''\
    seen = {row: pd.DataFrame([run(row, seed, "validation") for seed in seeds]).mean() for row in [control, *rows]}
    good = [row for row in rows if seen[row]["dead_maps"] <= 0.01
            and seen[row]["accuracy"] >= seen[control]["accuracy"] - 0.01]
    chosen = min(good, key=lambda row: seen[row]["overlap_cosine"])
    return chosen, seen[chosen]["mass_in_mask"] - seen[control]["mass_in_mask"]
'''),
        ("unpaired_seeds", '''\
    seen = {row: pd.DataFrame([run(row, seed, "validation") for seed in seeds]).mean() for row in [control, *rows]}
    good = [row for row in rows if seen[row]["dead_maps"] <= 0.01
            and seen[row]["accuracy"] >= seen[control]["accuracy"] - 0.01]
    chosen = min(good, key=lambda row: seen[row]["overlap_cosine"])
    base = run(control, seeds[0], "test")["mass_in_mask"]
    return chosen, sum(run(chosen, seed, "test")["mass_in_mask"] - base for seed in seeds) / len(seeds)
'''),
        ("dead_limit", study(dead="0.3")),
        ("accuracy_limit", study(loss="0.04")),
        ("control_seeds", study(level='run(control, seeds[0], "validation")["accuracy"]', loss="0.02").replace(
            "in [control, *rows]}", "in rows}")),
        ("masks_read", study().replace("pd.DataFrame([run(row, seed, \"validation\") for seed in seeds]).mean()", '''{
        metric: sum(run(row, seed, "validation")[metric] for seed in seeds) / len(seeds)
        for metric in ("overlap_cosine", "dead_maps", "accuracy", "mass_in_mask")}''')),
        ("nothing_admissible", study(default="")),
    ],
}
