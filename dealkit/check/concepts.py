"""Checks of the exercises to notebook 01, concepts."""
from __future__ import annotations

import math
from collections import Counter
from itertools import product

import torch

from dealkit.check.result import Hint, call, exercise, other, same
from dealkit.concepts import ConceptBank, check_concepts, load_concepts

__all__ = ["ex_01_1", "ex_01_2", "ex_01_3", "ex_01_4", "ex_01_5"]

# exercise 1: the reply that the student judges by eye
_JAY = {"a": "blue crest", "b": "black necklace", "c": "crests of blue", "d": "white-tipped dark tail feathers",
        "e": "unspotted white throat", "f": "jay-sized grey belly", "g": "pale spot beside the black eye",
        "h": "beautiful barred wing"}
_TOO_MUCH = {
    "a": Hint("look_is_no_leak", "\"Blue\" stands in the name, but it also says how the crest looks. A word that names "
                                 "a colour, a shape or a part may be in both."),
    "d": Hint("hyphen", "Count the words of line d as the rule does: two words that a hyphen joins count as one, and "
                        "the limit itself is allowed."),
}
_OVERLOOKED = {
    "c": Hint("duplicate_missed", "Two lines say the same. Compare them as sets of words: capitals, order, plurals and "
                                  "little words such as \"of\" do not count."),
    "e": Hint("absence_missed", "One line describes something that is not there. Where would a map of it be bright?"),
    "f": Hint("leak_missed", "One line holds a word of the name that describes no look. The text tower would answer to "
                             "that word alone, whatever the picture shows."),
    "g": Hint("length_missed", "One line is longer than five words; count the little words as well this time."),
    "h": Hint("praise_missed", "One line has a word of praise. Which word could nobody point at in the picture?"),
}


@exercise(start="Start with line a, and go through the rules one by one: length, language, visible, name, repetition.",
          right="You read the lines as the rules do. A rule that reads words is easy to check, and it never "
                "asks if a jay has a crest.")
def ex_01_1(answer):
    """A set of letters from "a" to "h", such as {"a", "b"}."""
    found = check_concepts(ConceptBank("jay", {"Blue Jay": list(_JAY.values())}), count=len(_JAY))
    wanted = {letter for letter, phrase in _JAY.items() if phrase in set(found["concept"])}
    given = {letter.strip().lower() for letter in answer} - {"", ","}
    if given - set(_JAY):
        raise ValueError("the lines have the letters a to h")
    if given - wanted:
        letter = min(given - wanted)
        return _TOO_MUCH.get(letter) or other(f"Line {letter} breaks no rule. Which rule did you have in mind, and "
                                              "does it say exactly that?")
    if wanted - given:
        letter = min(wanted - given)
        return _OVERLOOKED.get(letter) or other(f"Read line {letter} again, with each of the rules in turn.")
    return None


@exercise(start="Start with the largest number in the printed table: of how many species is that phrase true?",
          right="The rule speaks up only beyond its limit, so the share of the most common phrase is the "
                "smallest limit that this bank keeps.")
def ex_01_2(answer):
    """A number between 0 and 1."""
    bank = load_concepts("birdworld")
    holders = Counter(phrase for phrases in bank.values() for phrase in set(phrases))
    most, value = max(holders.values()), float(answer)
    if same(value, most / len(bank)):
        return None
    if same(value, 0.5):
        return Hint("default", "That is the default of the rule, not a property of this bank. How much lower can the "
                               "limit go before the first phrase is flagged?")
    if same(value, most):
        return Hint("count", "That is a number of species. The rule compares a share: a number between 0 and 1.")
    if same(value, (most + 1) / len(bank)) or same(value, (most - 1) / len(bank)):
        return Hint("off_by_one", "You are off by one species. A phrase is flagged when its share is above the limit, "
                                  "and not when it reaches it: what does that mean for the most common phrase?")
    if any(same(value, most / n) for n in (len(holders), sum(map(len, bank.values())))):
        return Hint("share_of_phrases", "You divide by a number of phrases. Equation (1) asks in which part of the "
                                        "categories a phrase occurs.")
    if same(value, min(holders.values()) / len(bank)):
        return Hint("rarest", "That is the share of the rarest phrase. A bank keeps a limit when all of its phrases "
                              "do, so which phrase decides?")
    return other("Take a bank of two categories that share one phrase: its smallest limit is 1, the share 2 / 2.")


@exercise(start="Start with the shares: for every phrase, how many of the categories have it in their list?",
          right="A phrase that half of the categories share is worth one bit, a rare one and a common one less, "
                "and a phrase that all share is worth nothing.")
def ex_01_3(answer):
    """A function of a bank that returns a dict from each phrase to a number of bits."""
    banks = [load_concepts("birdworld").concepts,
             {"wren": ["cocked tail", "pale brow"], "crow": ["black wing"], "rook": ["black wing", "bare face"],
              "jay": ["black wing", "blue crest", "pale brow"], "owl": ["pale brow", "pale brow", "round face"]},
             {"wren": ["round eye", "cocked tail"], "crow": ["round eye", "black wing"]}]
    for bank in banks:
        value = dict(call(answer, {category: list(phrases) for category, phrases in bank.items()}))
        share = {phrase: sum(phrase in phrases for phrases in bank.values()) / len(bank)
                 for phrases in bank.values() for phrase in phrases}
        if set(value) != set(share):
            return Hint("other_keys", f"The bank has {len(share)} different phrases, and your dict has {len(value)} "
                                      "keys. Every phrase is asked about once, whoever shares it.")
        given = torch.tensor([float(value[phrase]) for phrase in share])

        def gives(term, shares=share):
            return same(given, torch.tensor([term(p) for p in shares.values()]), atol=1e-3)

        listed = Counter(phrase for phrases in bank.values() for phrase in phrases)
        if gives(_bits):
            continue
        if given.isnan().any():
            return Hint("certain_answer", "A phrase that every category has gives no number: 0 times the logarithm of "
                                          "0. What does the answer to such a question tell you?")
        if gives(lambda p: _bits(p) * math.log(2)):
            return Hint("nats", "Your unit is the nat. A question that halves the categories should come out as 1: "
                                "which logarithm does that?")
        if gives(lambda p: -p * math.log2(p)):
            return Hint("yes_only", "You count only what a yes tells. A no tells something as well, and comes with the "
                                    "probability 1 - p.")
        if gives(lambda p: -math.log2(p)):
            return Hint("surprise", "That is what a yes tells you once it has come. Before the answer is known, weigh "
                                    "yes and no by how probable they are.")
        if any(gives(_bits, {phrase: n / size for phrase, n in listed.items()})
               for size in (len(listed), listed.total())):
            return Hint("share_of_phrases", "You divide by a number of phrases. The question is put to a category, so "
                                            "p is a share of the categories.")
        if gives(_bits, {phrase: listed[phrase] / len(bank) for phrase in share}):
            return Hint("twice_in_a_list", "A phrase that stands twice in one list counts twice with you. It is true "
                                           "of one category all the same.")
        return other("Take four categories: a phrase of two of them is worth 1 bit, of one of them 0.811 bits.")
    return None


def _bits(p):
    return -sum(q * math.log2(q) for q in (p, 1 - p) if 0 < q < 1)


@exercise(start="Start with one candidate and one species: in how many places do the two lists of colours differ?",
          right="You counted, and needed no formula. Twins share some of their neighbours, so neighbours must "
                "not be counted one species at a time.")
def ex_01_4(answer):
    """A function of species [N, P] (whole numbers) and a number of colours that returns a whole number."""
    generator, worlds = torch.Generator().manual_seed(4), []
    for n, parts, colours in ((3, 3, 3), (5, 4, 4), (4, 5, 3)):
        species = torch.randint(colours, (n, parts), generator=generator)
        species[1] = species[0]
        species[1, -1] = (species[0, -1] + 1) % colours                                       # twins
        worlds.append((species, colours))
    values = [float(call(answer, species.clone(), colours)) for species, colours in worlds]

    def counts(rule, first=0):
        def candidates(species, colours):
            return torch.tensor(list(product(range(first, colours), repeat=species.shape[1])))
        return [int(rule((candidates(s, c)[:, None] != s).sum(2)).sum()) for s, c in worlds]

    if values == counts(lambda different: (different >= 2).all(1)):
        return None
    if broken := [value for value in values if value % 1]:
        return Hint("not_whole", f"You return {broken[0]:.3f}, but birds are counted in whole numbers. A chance for "
                                 "each species, multiplied, treats the species as if none of them were alike.")
    if values == [c ** s.shape[1] - len(s) * (1 + s.shape[1] * (c - 1)) for s, c in worlds]:
        return Hint("counted_twice", "You take away every species with its neighbours. Twins are neighbours, so some "
                                     "birds belong to two species and are taken away twice.")
    if values == counts(lambda different: (different >= 1).all(1)):
        return Hint("new_is_not_enough", "You count all birds that are no species yet. A bird that differs from one of "
                                         "them in a single part would be its twin.")
    if values == counts(lambda different: (different >= 2).any(1)):
        return Hint("any", "It is enough for you that the bird is far from some species. A twin of one species is far "
                           "from most of the others.")
    if values == counts(lambda different: (different == 2).all(1)):
        return Hint("exactly_two", "You ask for exactly two different parts. Three, four or five are as good: they "
                                   "make no twin either.")
    if values == counts(lambda different: (different > 2).all(1)):
        return Hint("off_by_one", "You ask for more than two different parts; a bird that differs in two has no twin "
                                  "already.")
    if values == counts(lambda different: (different >= 2).all(1), first=1):
        return Hint("first_colour", "Your candidates never wear the first colour. Colours are counted from 0.")
    return other("Take one species with two parts and three colours, [[0, 0]]: 4 of its 9 birds differ in both parts.")


@exercise(start="Start with the images whose answer for this part is wrong; all else is counted among these alone.",
          right="A share means little before guessing has had its say. What is left above it is a habit of the "
                "model, on birds whose colours no species explains.")
def ex_01_5(answer):
    """A function of answers [N, P], attributes [N, P] and the number of a part that returns P numbers."""
    generator = torch.Generator().manual_seed(5)
    for part in (3, 0):
        attributes = torch.randint(6, (400, 4), generator=generator)
        attributes[:150, 1] = attributes[:150, part]                  # colours that recur, so that guessing differs
        answers = torch.where(torch.rand(400, 4, generator=generator) < 0.4, attributes,
                              torch.randint(6, (400, 4), generator=generator))
        source = torch.where(torch.rand(400, generator=generator) < 0.3, attributes[:, 2], answers[:, part])
        answers[:, part] = source                                     # many wrong answers come from part 2
        answers[:150, part] = torch.where(torch.rand(150, generator=generator) < 0.7, attributes[:150, part],
                                          answers[:150, part])        # right more often where colours recur
        value = torch.as_tensor(call(answer, answers.clone(), attributes.clone(), part)).double()
        wrong = answers[:, part] != attributes[:, part]
        hits = (answers[:, part, None] == attributes).double()
        chance = (attributes != attributes[:, part, None]).double() / 5
        right = (hits - chance)[wrong].mean(0)
        if value.shape != right.shape:
            return Hint("shape", f"There are 4 parts here, and your result has the shape {tuple(value.shape)}; one "
                                 "number is wanted for each part, the part itself included.")
        if same(value, right):
            continue
        if same(value, hits[wrong].mean(0)):
            return Hint("no_control", "You give the share and leave out what guessing would give. A random wrong "
                                      "colour is often worn by some other part, too.")
        if same(value, (hits[wrong] - 0.2).mean(0)) or same(value, (hits[wrong] - 1 / 6).mean(0)):
            return Hint("constant_guess", "You take the same chance for all. Where another part wears the true colour, "
                                          "a wrong answer cannot be the colour of that part: its chance is 0.")
        if same(value, (hits - chance * 5 / 6)[wrong].mean(0)):
            return Hint("six_colours", "You let the guess choose among six colours. It is a wrong answer, so one of "
                                       "them is excluded.")
        if same(value, (hits - chance).mean(0)):
            return Hint("right_answers_too", "Right answers are in your mean. They are the colour of the part itself, "
                                             "and say nothing about where mistakes come from.")
        if same(value, hits[wrong].mean(0) - chance.mean(0)):
            return Hint("other_images", "Share and chance are taken over different images: one over the mistakes, the "
                                        "other over all. Use the same ones for both.")
        if same(value, ((answers == attributes[:, part, None]).double() - chance)[wrong].mean(0)):
            return Hint("turned_round", "You ask if another part was given this part's true colour. The question is if "
                                        "this part was given the true colour of another.")
        return other("Take one image with the colours 0, 1, 0, 2 and the answer 1 for part 0: the share is 1 for part "
                     "1 and 0 elsewhere, the chance 1 / 5 for parts 1 and 3 and 0 for parts 0 and 2.")
    return None
