"""Token sequences that call for a planted behaviour, with the answer and a foil."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from headwise.errors import InputError
from headwise.zoo.planted.circuits import BEHAVIOURS, Behaviour
from headwise.zoo.planted.lexicon import Fact, Lexicon


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, what should come next, and what should not: the metric is the difference of their logits."""

    ids: tuple[int, ...]
    answer: int
    foil: int


def examples(lexicon: Lexicon, behaviour: Behaviour, count: int, seed: int) -> list[Example]:
    """`count` random prompts. Raises InputError for an unknown behaviour.

    - `repeat`: a list of words that begins again;
    - `ioi`: two names, one of them again, then ` to`;
    - `facts`: relation, subject, ` is`;
    - `conflict`: the same with another object told, then asked again; the answer is what was told, the foil what memory
      says;
    - `keys`: pairs of two-token keys and values, then one of the keys again.
    """
    if behaviour not in BEHAVIOURS:
        raise InputError(f"no planted behaviour {behaviour!r}; choose from {', '.join(BEHAVIOURS)}")
    make = {"repeat": _repeat, "ioi": _ioi, "facts": _facts, "conflict": _conflict, "keys": _keys}[behaviour]
    random = Random(f"{behaviour} {seed}")
    return [make(lexicon, random) for _ in range(count)]


def _plain(lexicon: Lexicon) -> list[int]:
    """Words that no other circuit knows."""
    known = {*lexicon.names, *lexicon.subjects, *lexicon.objects, *lexicon.relations, *lexicon.asks, *lexicon.givers}
    return [word for word in lexicon.content if word not in known]


def _repeat(lexicon: Lexicon, random: Random) -> Example:
    words = random.sample(_plain(lexicon), 10)
    stop = random.randrange(3, 9)
    return Example((lexicon.bos, *words, *words[:stop]), words[stop], words[stop - 3])


def _ioi(lexicon: Lexicon, random: Random) -> Example:
    receiver, giver = random.sample(lexicon.names, 2)
    when, link, went, place, comma, gave, thing = random.sample(_plain(lexicon), 7)
    pair = random.sample((receiver, giver), 2)
    ids = (lexicon.bos, when, pair[0], link, pair[1], went, place, comma, giver, gave, thing, lexicon.givers[0])
    return Example(ids, receiver, giver)


def _question(lexicon: Lexicon, fact: Fact, the: int, of: int) -> tuple[int, ...]:
    return (the, fact.relation, of, fact.subject, lexicon.asks[0])


def _other_object(lexicon: Lexicon, fact: Fact, random: Random) -> int:
    """Another object of the same relation."""
    objects = {each.object for each in lexicon.facts if each.relation == fact.relation}
    return random.choice(sorted(objects - {fact.object}))


def _facts(lexicon: Lexicon, random: Random) -> Example:
    fact = random.choice(lexicon.facts)
    ids = (lexicon.bos, *_question(lexicon, fact, *random.sample(_plain(lexicon), 2)))
    return Example(ids, fact.object, _other_object(lexicon, fact, random))


def _conflict(lexicon: Lexicon, random: Random) -> Example:
    fact = random.choice(lexicon.facts)
    told = _other_object(lexicon, fact, random)
    # Other words around the question than around the statement: the key circuit is not to know one from the other.
    stop, *around = random.sample(_plain(lexicon), 5)
    statement, question = (_question(lexicon, fact, *pair) for pair in (around[:2], around[2:]))
    return Example((lexicon.bos, *statement, told, stop, *question), told, fact.object)


def _keys(lexicon: Lexicon, random: Random) -> Example:
    words = random.sample(_plain(lexicon), 10)
    ask, stop = lexicon.asks[0], words[9]
    # Two of the keys have their second token in common.
    keys = [(words[0], words[1]), (words[2], words[1]), (words[3], words[4])]
    values = words[5:8]
    asked = random.randrange(3)
    pairs = [token for key, value in zip(keys, values, strict=True) for token in (*key, ask, value, stop)]
    return Example((lexicon.bos, *pairs, *keys[asked], ask), values[asked], values[asked - 1])
