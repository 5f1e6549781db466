"""Examine a reference model in retrieval: `python -m kvsieve.reference_model.exams FOLDER`.

The structure is RULER's (Hsieh et al., 2024). Words are real and nouns are new to the model; every second
sample has a new wording too: training saw neither its statement nor its question. A sample depends on its
kind, context and index alone.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .. import corpus
from .words import Words

if TYPE_CHECKING:
    from ..policy import Policy

_ADJECTIVES = [
    "amber", "ancient", "bitter", "brave", "bright", "calm", "clever", "cold", "curious", "dark", "deep",
    "distant", "eager", "early", "empty", "fancy", "gentle", "golden", "green", "happy", "heavy", "honest",
    "humble", "jolly", "kind", "large", "late", "lazy", "little", "lonely", "loud", "lucky", "modern",
    "narrow", "noble", "odd", "old", "plain", "polite", "proud", "quick", "quiet", "rapid", "rare", "red",
    "rough", "round", "silent", "silver", "simple", "small", "smooth", "solid", "steep", "strange", "sweet",
    "tall", "thin", "tiny", "warm", "wild", "wise", "young",
]  # fmt: skip
_NOUNS = [
    "anchor", "apple", "arrow", "barrel", "basket", "bear", "bell", "bird", "boat", "bottle", "bridge",
    "bucket", "butter", "cabin", "camel", "candle", "canyon", "carpet", "castle", "cherry", "circle",
    "cloud", "coffee", "desert", "dragon", "engine", "falcon", "feather", "fiddle", "flower", "forest",
    "garden", "glove", "hammer", "harbor", "helmet", "island", "jacket", "kettle", "ladder", "lantern",
    "lemon", "letter", "lion", "marble", "meadow", "mirror", "monkey", "mountain", "needle", "ocean",
    "orange", "owl", "parrot", "pepper", "pillow", "planet", "pocket", "rabbit", "river", "rocket",
    "saddle", "sailor", "shadow", "spider", "teapot", "tiger", "tower", "tunnel", "turtle", "valley",
    "violin", "wagon", "walnut", "whale", "window", "wolf",
]  # fmt: skip
_FACTS = ("access code", "locker combination", "flight code", "passport stamp", "vault setting")
_NOISE = (
    "The river runs slowly. Bread is on the table. A door stands open. Somebody sings. Winter comes again.\n"
)


class Wording(NamedTuple):
    statement: str
    question: str
    lead: str
    questions: str  # for several values or keys
    leads: str


# Statements and questions of the training, with other nouns and words. The second does not begin the answer:
# a model that can only continue a repeated statement fails there.
_KNOWN = (
    Wording(
        "The {n} for {k} is {v}.", "What is the {n} for {k}?", "The {n} for {k} is",
        "What are all the {n}s for {k}?", "The {n}s for {k} are",
    ),
    Wording(
        "The {n} of {k} is {v}.", "What is the {n} of {k}?", "Answer:",
        "What are the {n}s of {k}?", "Answer:",
    ),
)  # fmt: skip
_NEW = (
    Wording(
        "It was agreed that {k} gets the {n} {v}.",
        "Please give me the {n} that {k} got.", "As agreed, {k} gets",
        "Please give me every {n} that {k} got.", "As agreed, the {n}s of {k} are these:",
    ),
    Wording(
        "Whoever opens {k} must enter the {n} {v}.", "Which {n} opens {k}?", "To open {k}, enter",
        "Which {n}s open {k}?", "To open {k}, enter the {n}s",
    ),
    Wording(
        "In the ledger {k} stands beside the {n} {v}.", "What does the ledger say about {k}?", "It says:",
        "What does the ledger say about {k}?", "It says:",
    ),
)  # fmt: skip
_ASSIGNMENTS = (
    ("VAR {b} = {v}", "VAR {b} = VAR {a}"),
    ("{b} starts with {v}.", "{b} inherits what {a} has."),
)
_TRACKING = (
    "Which variables are assigned the value {v} in the text above?\nThe variables with the value {v} are",
    "Tell me who has {v} now.\nAnswer: those with {v} are",
)


class Exam(NamedTuple):
    """A prompt, what its answer must contain, and how many tokens the answer may have."""

    prompt: str
    references: list[str]
    new_tokens: int
    new_wording: bool


def exam(kind: str, context: int, index: int) -> Exam:
    """Make sample `index` of a kind: its prompt has `context` tokens, `<bos>` included."""
    rng = np.random.default_rng([index, context, *kind.encode()])
    new_wording = index % 2 == 1
    statements, question, references, new_tokens = KINDS[kind](Words(rng), context, index)
    fixed = sum(len(statement) + 2 for statement in statements) + len(question) + 2
    room = context - 1 - fixed
    if room < 0:
        raise ValueError(f"{kind} needs a context of {context - room} tokens")
    places = np.sort(rng.integers(0, room + 1, size=len(statements)))
    if kind == "single":
        places = np.array([round((0.5 + index * 0.618034) % 1.0 * room)])
    text = corpus.held_out_text()
    start = int(rng.integers(0, len(text) - room))
    noise = (_NOISE * (room // len(_NOISE) + 1))[:room]
    hay = noise if rng.random() < 0.5 else text[start : start + room]
    prompt, done = "", 0
    for place, statement in zip(places, statements, strict=True):
        prompt += hay[done:place] + "\n" + statement + "\n"
        done = place
    return Exam(prompt + hay[done:] + "\n\n" + question, references, new_tokens, new_wording)


Draft = tuple[list[str], str, list[str], int]


def _facts(words: Words, index: int, keys: int, values: int, asked: int) -> Draft:
    wordings = _NEW if index % 2 else _KNOWN
    wording = wordings[index // 2 % len(wordings)]
    noun = words.pick(_FACTS)
    names: dict[str, list[str]] = {}
    while len(names) < keys:
        names[f"{words.pick(_ADJECTIVES)}-{words.pick(_NOUNS)}"] = [words.digits(7) for _ in range(values)]
    wanted = list(names)[:asked]
    said = [(key, value) for key, several in names.items() for value in several]
    said = [said[i] for i in words.rng.permutation(len(said))]
    statements = [wording.statement.format(n=noun, k=key, v=value) for key, value in said]
    listed = ", ".join(wanted[:-1]) + " and " + wanted[-1] if asked > 1 else wanted[0]
    one = values == asked == 1
    question = f"{wording.question}\n{wording.lead}" if one else f"{wording.questions}\n{wording.leads}"
    references = [value for key in wanted for value in names[key]]
    characters = sum(len(key) + 4 for key in wanted) * (asked > 1) + 9 * len(references) + len(noun) + 16
    return statements, question.format(n=noun, k=listed), references, characters


def _lines(words: Words, context: int, index: int) -> Draft:
    return _facts(words, index, keys=(context - 200) // 72, values=1, asked=1)


def _tracking(words: Words, context: int, index: int, hops: int = 2) -> Draft:
    first, then = _ASSIGNMENTS[index % 2]
    names: dict[str, None] = {}
    while len(names) < hops + 1:
        names[words.letters(5, 5)] = None
    held, value = list(names), words.digits(5)
    statements = [first.format(b=held[0], v=value)]
    statements += [then.format(a=a, b=b) for a, b in itertools.pairwise(held)]
    return statements, _TRACKING[index % 2].format(v=value), held, 8 + 7 * len(held)


def _common_words(words: Words, context: int, index: int) -> Draft:
    real = [*_ADJECTIVES, *_NOUNS]
    drawn = [real[i] for i in words.rng.permutation(len(real))]
    often, rare = drawn[:3], drawn[3 : 3 + min(len(drawn) - 3, (context - 500) // 11)]
    items = rare + often * 6
    items = [items[i] for i in words.rng.permutation(len(items))]
    text = " ".join(f"{i}. {word}" for i, word in enumerate(items, 1))
    question = (
        "What are the 3 most common words in the list?\nAnswer:",
        "Name the 3 words that come up most:",
    )
    return [text], question[index % 2], often, 40


KINDS: dict[str, Callable[[Words, int, int], Draft]] = {
    "single": lambda words, context, index: _facts(words, index, keys=1, values=1, asked=1),
    "multikey": lambda words, context, index: _facts(words, index, keys=4, values=1, asked=1),
    "lines": _lines,
    "multivalue": lambda words, context, index: _facts(words, index, keys=1, values=4, asked=1),
    "multiquery": lambda words, context, index: _facts(words, index, keys=4, values=1, asked=4),
    "tracking": _tracking,
    "tracking, 4 hops": lambda words, context, index: _tracking(words, context, index, hops=4),
    "common words": _common_words,
}


class Result(NamedTuple):
    """Mean share of references that an answer contains, which is RULER's score."""

    kind: str
    context: int
    samples: int
    score: float
    known: float  # with wordings of the training
    new: float  # with new ones


def run(
    model: Any, policy: Callable[[int], Policy | None] = lambda context: None,
    kinds: Sequence[str] = tuple(KINDS), contexts: Sequence[int] = (1024, 2048),
    samples: int = 32, batch: int = 8, show: int = 0,
) -> Iterator[Result]:  # fmt: skip
    """Ask `model` under the policy for each context (None: dense), and print the first `show` answers."""
    from .. import decode

    for context in contexts:
        for kind in kinds:
            scores: dict[bool, list[float]] = {False: [], True: []}
            exams = [exam(kind, context, index) for index in range(samples)]
            for i in range(0, samples, batch):
                some = exams[i : i + batch]
                new_tokens = max(e.new_tokens for e in some)
                rows = [e.prompt for e in some]
                steps = list(decode(model, rows, policy(context), max_new_tokens=new_tokens, eos_token_id=()))
                for e, ids in zip(some, torch.stack(steps, 1), strict=True):
                    answer = model.tokenizer.decode(ids[: e.new_tokens]).strip().split("\n")[0]
                    found = [reference in answer for reference in e.references]
                    scores[e.new_wording].append(sum(found) / len(found))
                    if show > 0:
                        print(kind, context, e.prompt[-90:].replace("\n", "|"), "->", answer, e.references)
                        show -= 1
            both = scores[False] + scores[True]
            yield Result(
                kind, context, samples, *(float(np.mean(s)) for s in (both, scores[False], scores[True]))
            )


def main() -> None:
    from .. import load, make_policy

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder that `train` has exported")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 2048])
    parser.add_argument("--policy", default="dense")
    parser.add_argument("--compression", help="share of dense attention's bytes: 1/8")
    parser.add_argument("--show", type=int, default=0, help="print the first answers of each context")
    options = parser.parse_args()
    model = load(str(options.folder))
    print(f"{'kind':18}{'context':>8}{'n':>5}{'score':>8}{'known':>8}{'new wording':>13}")

    def policy(context: int) -> Policy:
        sizes = {"head_size": model.config.head_dim, "context": context} if options.compression else {}
        return make_policy(options.policy, compression=options.compression, **sizes)

    for row in run(model, policy, options.kinds, options.contexts, options.samples, show=options.show):
        print(
            f"{row.kind:18}{row.context:8}{row.samples:5}{row.score:8.2f}{row.known:8.2f}{row.new:13.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
