"""Which words of a tokenizer the planted circuits know: names, facts, words to repeat, and where to answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headwise.errors import InputError
from headwise.words import facts as listed_facts
from headwise.words import word_list
from headwise.zoo.planted.stream import CODE

MAX_VOCABULARY = 2000
"""Token codes are random directions; beyond this many they would lie too close to one another."""

ASKS = (" is", ":", " was", "=")
GIVERS = (" to",)


@dataclass(frozen=True, slots=True)
class Fact:
    """`object` is the `relation` of `subject`, all three as token ids."""

    relation: int
    subject: int
    object: int


@dataclass(frozen=True)
class Lexicon:
    """Token ids by what the circuits do with them.

    Attributes:
        size: rows of the embedding.
        bos: the token in front of every text; heads that find nothing attend to it.
        names: who can receive something.
        content: words after which a repeated text is continued. Induction does not answer after other tokens.
        asks: tokens after which a fact or a value under a key is wanted (` is`, `:`).
        givers: tokens after which a receiver is wanted (` to`).
        facts: what memory holds.
    """

    size: int
    bos: int
    names: tuple[int, ...]
    content: tuple[int, ...]
    asks: tuple[int, ...]
    givers: tuple[int, ...]
    facts: tuple[Fact, ...]

    def __post_init__(self) -> None:
        if self.size > MAX_VOCABULARY:
            raise InputError(
                f"the tokenizer has {self.size} tokens and planted models take at most {MAX_VOCABULARY}; "
                "use a word tokenizer of that size"
            )
        if len(self.subjects) > CODE:
            raise InputError(
                f"{len(self.subjects)} subjects are too many for a memory head of {CODE} dimensions; give fewer facts"
            )
        alone = [r for r in self.relations if len({fact.object for fact in self.facts if fact.relation == r}) < 2]
        if alone:
            raise InputError(f"relation {alone[0]} has one object only; give facts with two objects or more to each")
        lacking = [
            f"{len(tokens)} {what} of {least}"
            for what, tokens, least in (
                ("names", self.names, 3),
                ("content words", self.content, 16),
                ("asking tokens", self.asks, 1),
                ("giving tokens", self.givers, 1),
                ("facts", self.facts, 4),
            )
            if len(tokens) < least
        ]
        if lacking:
            raise InputError(
                f"the tokenizer knows too few words as one token ({', '.join(lacking)}); "
                "give another tokenizer or lexicon"
            )

    @property
    def relations(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(fact.relation for fact in self.facts))

    @property
    def subjects(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(fact.subject for fact in self.facts))

    @property
    def objects(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(fact.object for fact in self.facts))

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        names: Iterable[str] | None = None,
        content: Iterable[str] | None = None,
        facts: Iterable[tuple[str, str, str]] | None = None,
        asks: Sequence[str] = ASKS,
        givers: Sequence[str] = GIVERS,
    ) -> Lexicon:
        """The words of the package's lists (or those given) that `tokenizer` writes, after a blank, as one token.

        `facts` are triples (relation, subject, object). `asks` and `givers` are given as they stand in a text, with
        their blank. Words that take several tokens are left out.

        Raises InputError if the tokenizer has no first token of its own, is too large, or knows too few of the words.
        """
        if tokenizer.bos_token_id is None:
            raise InputError("the tokenizer has no bos token; planted heads rest on one, so give one to the tokenizer")

        def single(texts: Iterable[str]) -> list[int | None]:
            written = tokenizer(list(texts), add_special_tokens=False).input_ids
            return [ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None for ids in written]

        def known(texts: Iterable[str]) -> tuple[int, ...]:
            return tuple(dict.fromkeys(token for token in single(texts) if token is not None))

        def known_facts() -> Iterator[Fact]:
            triples = list(_listed_facts() if facts is None else facts)
            columns = [single(f" {fact[part]}" for fact in triples) for part in range(3)]
            for relation, subject, object in zip(*columns, strict=True):
                if relation is not None and subject is not None and object is not None:
                    yield Fact(relation, subject, object)

        return cls(
            size=len(tokenizer),
            bos=tokenizer.bos_token_id,
            names=known(f" {name}" for name in (word_list("names") if names is None else names)),
            content=known(f" {word}" for word in (_listed_content() if content is None else content)),
            asks=known(asks),
            givers=known(givers),
            facts=tuple(known_facts()),
        )


def own_tokenizer() -> PreTrainedTokenizerBase:
    """The package's word tokenizer: byte-level, a token for every word of the probes. `training/` builds it."""
    return AutoTokenizer.from_pretrained(str(files("headwise") / "zoo" / "tokenizer"), local_files_only=True)


@cache
def _listed_content() -> tuple[str, ...]:
    lists = ("objects", "animals", "materials", "adjectives", "colors", "kinds", "people", "places")
    return tuple(word for name in lists for word in word_list(name))


@cache
def _listed_facts() -> tuple[tuple[str, str, str], ...]:
    return tuple((fact.relation, fact.subject, fact.object) for fact in listed_facts())
