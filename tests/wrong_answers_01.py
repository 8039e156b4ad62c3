"""Plausible wrong answers to the exercises of notebook 01, and the hint that each must get."""

WRONG = {
    "ex_01_1": [
        ("look_is_no_leak", '''\
answer = {"a", "c", "e", "f", "g", "h"}
'''),
        ("hyphen", '''\
answer = {"c", "d", "e", "f", "g", "h"}
'''),
        ("absence_missed", '''\
answer = {"c", "f", "g", "h"}
'''),
        ("duplicate_missed", '''\
answer = {"e", "f", "g", "h"}
'''),
        ("leak_missed", '''\
answer = {"c", "e", "g", "h"}
'''),
        ("praise_missed", '''\
answer = {"c", "e", "f", "g"}
'''),
        ("length_missed", '''\
answer = {"c", "e", "f", "h"}
'''),
    ],
    "ex_01_2": [
        ("default", '''\
answer = 0.5
'''),
        ("count", '''\
answer = 4
'''),
        ("off_by_one", '''\
answer = 5 / 16
'''),
        ("share_of_phrases", '''\
answer = 4 / 80
'''),
        ("rarest", '''\
answer = 1 / 16
'''),
    ],
    "ex_01_3": [
        ("nats", '''\
    bits = {}
    for phrase in {phrase for phrases in bank.values() for phrase in phrases}:
        p = np.mean([phrase in phrases for phrases in bank.values()])
        bits[phrase] = -sum(q * np.log(q) for q in (p, 1 - p) if q > 0)
    return bits
'''),
        ("yes_only", '''\
    bits = {}
    for phrase in {phrase for phrases in bank.values() for phrase in phrases}:
        p = np.mean([phrase in phrases for phrases in bank.values()])
        bits[phrase] = -p * np.log2(p)
    return bits
'''),
        ("surprise", '''\
    phrases = sum(bank.values(), [])
    return {phrase: -np.log2(phrases.count(phrase) / len(bank)) for phrase in phrases}
'''),
        ("certain_answer", '''\
    bits = {}
    for phrase in {phrase for phrases in bank.values() for phrase in phrases}:
        p = torch.tensor([phrase in phrases for phrases in bank.values()]).float().mean()
        bits[phrase] = -p * torch.log2(p) - (1 - p) * torch.log2(1 - p)
    return bits
'''),
        ("share_of_phrases", '''\
    phrases = sum(bank.values(), [])
    share = {phrase: phrases.count(phrase) / len(phrases) for phrase in phrases}
    return {phrase: -p * np.log2(p) - (1 - p) * np.log2(1 - p) for phrase, p in share.items()}
'''),
        ("twice_in_a_list", '''\
    phrases = sum(bank.values(), [])
    share = {phrase: phrases.count(phrase) / len(bank) for phrase in phrases}
    return {phrase: -sum(q * np.log2(q) for q in (p, 1 - p) if q > 0) for phrase, p in share.items()}
'''),
        ("other_keys", '''\
    bits = {}
    for phrases in bank.values():
        for phrase in phrases:
            p = np.mean([phrase in others for others in bank.values()])
            bits[phrase.split()[0]] = -sum(q * np.log2(q) for q in (p, 1 - p) if q > 0)
    return bits
'''),
    ],
    "ex_01_4": [
        ("counted_twice", '''\
    n, parts = species.shape
    return colours ** parts - n * (1 + parts * (colours - 1))
'''),
        ("not_whole", '''\
    n, parts = species.shape
    near = (1 + parts * (colours - 1)) / colours ** parts
    return colours ** parts * (1 - near) ** n
'''),
        ("new_is_not_enough", '''\
    known = {tuple(row) for row in species.tolist()}
    return sum(bird not in known for bird in product(range(colours), repeat=species.shape[1]))
'''),
        ("any", '''\
    birds = torch.tensor(list(product(range(colours), repeat=species.shape[1])))
    different = (birds[:, None, :] != species).sum(dim=2)
    return int((different >= 2).any(dim=1).sum())
'''),
        ("exactly_two", '''\
    birds = torch.tensor(list(product(range(colours), repeat=species.shape[1])))
    different = (birds[:, None, :] != species).sum(dim=2)
    return int((different == 2).all(dim=1).sum())
'''),
        ("off_by_one", '''\
    birds = torch.tensor(list(product(range(colours), repeat=species.shape[1])))
    different = (birds[:, None, :] != species).sum(dim=2)
    return int((different > 2).all(dim=1).sum())
'''),
        ("first_colour", '''\
    birds = torch.tensor(list(product(range(1, colours), repeat=species.shape[1])))
    different = (birds[:, None, :] != species).sum(dim=2)
    return int((different >= 2).all(dim=1).sum())
'''),
    ],
    "ex_01_5": [
        ("no_control", '''\
    wrong = answers[:, part] != attributes[:, part]
    return (answers[wrong, part, None] == attributes[wrong]).float().mean(dim=0)
'''),
        ("constant_guess", '''\
    wrong = answers[:, part] != attributes[:, part]
    return (answers[wrong, part, None] == attributes[wrong]).float().mean(dim=0) - 1 / 5
'''),
        ("six_colours", '''\
    wrong = answers[:, part] != attributes[:, part]
    hit = answers[wrong, part, None] == attributes[wrong]
    chance = (attributes[wrong] != attributes[wrong, part, None]) / 6
    return (hit.float() - chance).mean(dim=0)
'''),
        ("right_answers_too", '''\
    hit = answers[:, part, None] == attributes
    chance = (attributes != attributes[:, part, None]) / 5
    return (hit.float() - chance).mean(dim=0)
'''),
        ("other_images", '''\
    wrong = answers[:, part] != attributes[:, part]
    hit = answers[wrong, part, None] == attributes[wrong]
    chance = (attributes != attributes[:, part, None]) / 5
    return hit.float().mean(dim=0) - chance.mean(dim=0)
'''),
        ("turned_round", '''\
    wrong = answers[:, part] != attributes[:, part]
    hit = answers[wrong] == attributes[wrong, part, None]
    chance = (attributes[wrong] != attributes[wrong, part, None]) / 5
    return (hit.float() - chance).mean(dim=0)
'''),
        ("shape", '''\
    wrong = answers[:, part] != attributes[:, part]
    elsewhere = (answers[wrong, part, None] == attributes[wrong]).any(dim=1)
    return elsewhere.float().mean()
'''),
    ],
}
