"""Training scenes of retrieval: facts about keys, several values or keys at a time, chains, counts, records.

The structure is that of RULER (Hsieh et al., 2024); the wordings are this file's own, words and numbers come
from `words.py`. A scene has many questions: a single one at its end would teach little for its length.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from .words import Words

# The first wording of each list is the plain one. {n}: what is stated, {k}: its key, {v}: the value
STATEMENTS = (
    "The {n} for {k} is {v}.", "The {n} of {k} is {v}.", "The {n} for {k} is: {v}.", "{k} has the {n} {v}.",
    "{k}'s {n} is {v}.", "One of the {n}s for {k} is {v}.", "One {n} of {k} is: {v}.", "{n} of {k}: {v}.",
    "Remember that the {n} of {k} is {v}.", "For {k}, the {n} is {v}.", "{k} was given the {n} {v}.",
    "The {n} that belongs to {k} is {v}.", "Note that {k} uses {v} as its {n}.", "{n} for {k} = {v};",
    "{k}: {v}", "{k} = {v}", "{k} -> {v}", "{n}[{k}] = {v}", "Our {n} with {k} was {v} all along.",
)  # fmt: skip
# A question, and how its answer begins.
QUESTIONS = (
    "What is the {n} for {k}?", "What is the {n} of {k}?", "Which {n} does {k} have?",
    "Find the {n} of {k}.", "Tell me the {n} for {k}.", "What {n} was mentioned for {k}?",
    "What is {k}'s {n}?", "{k}?", "Question: what is the {n} of {k} in the text above?",
    "Look up the {n} for {k} in the text.",
)  # fmt: skip
LEADS = (
    "The {n} for {k} is", "The {n} of {k} is", "Answer:", "A:", "{k}'s {n} is",
    "The {n} for {k} in the text is", "It is", "Answer: the {n} of {k} is", "The answer is", "",
)  # fmt: skip
PLURAL_QUESTIONS = (
    "What are all the {n}s for {k}?", "What are the {n}s of {k}?", "Which {n}s does {k} have?",
    "List every {n} of {k}.", "Find all {n}s for {k}.", "Which {n}s were mentioned for {k}?",
    "All {n}s of {k}?",
)  # fmt: skip
PLURAL_LEADS = (
    "The {n}s for {k} are", "The {n}s of {k} are", "Answer:", "A:", "All {n}s for {k} in the text are",
    "They are", "{k}'s {n}s are", "The answers are",
)  # fmt: skip
KEYLESS = (
    "The {n} is {v}. Remember it. {v} is the {n}.", "The {n} is {v}.", "{n}: {v}", "Keep in mind: {n} {v}.",
    "{v} is the {n}.",
)  # fmt: skip
KEYLESS_QUESTIONS = ("What is the {n}?", "Which {n} was mentioned?", "Tell me the {n}.", "{n}?")
KEYLESS_LEADS = ("The {n} is", "Answer:", "The {n} in the text is", "It is", "")
# {a}: what is assigned to {b}; a chain begins with a number in the place of {a}
ASSIGNMENTS = (
    "{b} is equal to {a}.", "VAR {b} = VAR {a}", "{b} = {a}", "let {b} = {a};", "{b} := {a}",
    "Set {b} to {a}.", "{b} takes the value of {a}.", "Now {b} is assigned {a}.", "Copy {a} into {b}.",
    "{b} <- {a}",
)  # fmt: skip
CHAIN_QUESTIONS = (
    "Find all variables that are equal to {v}.", "Which variables have the value {v}?", "Who holds {v}?",
    "List all names that were given {v}, directly or not.",
    "What variables are assigned {v} in the text above?",
)  # fmt: skip
CHAIN_LEADS = (
    "The variables with the value {v} are", "Answer:", "These are equal to {v}:", "Names that hold {v}:",
    "They are", "Answer: the variables that are assigned {v} are",
)  # fmt: skip


class Question(NamedTuple):
    text: str
    answer: str


class Scene(NamedTuple):
    """Statements in the order of the text, and questions about them."""

    statements: list[str]
    questions: list[Question]

    def size(self) -> int:
        return sum(len(s) + 2 for s in self.statements) + sum(
            len(q.text) + len(q.answer) + 3 for q in self.questions
        )


def ask(words: Words, questions: tuple[str, ...], leads: tuple[str, ...], **names: str) -> str:
    """Draw a question and the beginning of its answer, or one of the two alone."""
    if words.plain:
        return f"{questions[0]}\n{leads[0]}".format(**names)
    lead = words.pick(leads)
    if len(lead) > 10 and words.rng.random() < 0.25:
        return lead.format(**names)
    question = words.pick(("", "", "Question: ", "Q: ")) + words.pick(questions)
    return (question + (words.pick(("\n", "\n", " ")) + lead if lead else "")).format(**names)


def facts(words: Words, room: int, parts: int) -> Scene:
    """State one value per key and ask for one at a time."""
    noun, statement = words.noun(), words.wording(STATEMENTS)
    keys, values = _pairs(words, room // 40)
    asked = words.rng.choice([1.0, 1.0, 0.5, 0.2])
    statements: list[str] = []
    questions: list[Question] = []
    size = 0
    for key, value in zip(keys, values, strict=True):
        said = _say(statement, n=noun, k=key, v=value)
        question = Question(ask(words, QUESTIONS, LEADS, n=noun, k=key), f" {value}")
        if words.rng.random() > asked and questions:
            question = Question("", "")
        size += len(said) + 2 + len(question.text) + len(question.answer) + 3
        if size > room and statements:
            break
        statements.append(said)
        questions += [question] if question.text else []
    return _shuffled(words, statements, questions)


def things(words: Words, room: int, parts: int) -> Scene:
    """State a value for each of a few nouns, without a key, and ask for one at a time."""
    statement = words.wording(KEYLESS)
    nouns = list(dict.fromkeys(words.noun() for _ in range(int(words.rng.integers(1, 2 + 2 * parts)))))
    statements: list[str] = []
    questions: list[Question] = []
    size = 0
    for noun, value in zip(nouns, words.values(len(nouns)), strict=True):
        said = _say(statement, n=noun, v=value)
        question = Question(ask(words, KEYLESS_QUESTIONS, KEYLESS_LEADS, n=noun), f" {value}")
        size += len(said) + 2 + len(question.text) + len(question.answer) + 3
        if size > room and statements:
            break
        statements.append(said)
        questions.append(question)
    return _shuffled(words, statements, questions)


def several_values(words: Words, room: int, parts: int) -> Scene:
    """State up to `parts` values per key and ask for all of a key, in the order of the text."""
    noun, statement = words.noun(), words.wording(STATEMENTS)
    keys, values = words.keys(max(2, room // 100)), words.values(max(2, room // 30) + parts)
    said: list[tuple[str, str]] = []
    counts: dict[str, int] = {}
    size = 0
    for key in keys:
        count = words.count(parts)
        each = len(statement) + len(key) + len(noun)
        size += count * (each + len(values[0])) + 60 + len(noun) + len(key) + count * (len(values[0]) + 2)
        if (size > room and said) or count > len(values):
            break
        said += [(key, values.pop()) for _ in range(count)]
        counts[key] = count
    said = [said[i] for i in words.rng.permutation(len(said))]
    questions = []
    for key, count in counts.items():
        found = [value for k, value in said if k == key]
        if count == 1 and words.rng.random() < 0.7:
            text = ask(words, QUESTIONS, LEADS, n=noun, k=key)
        else:
            text = ask(words, PLURAL_QUESTIONS, PLURAL_LEADS, n=noun, k=key)
        questions.append(Question(text, " " + ", ".join(found)))
    statements = [_say(statement, n=noun, k=key, v=value) for key, value in said]
    order = words.rng.permutation(len(questions))
    return Scene(statements, [questions[i] for i in order])


def several_keys(words: Words, room: int, parts: int) -> Scene:
    """Ask for up to `parts` keys at a time; an answer repeats each key in front of its value."""
    noun, statement = words.noun(), words.wording(STATEMENTS)
    keys, values = _pairs(words, room // 110)
    # In plain words an answer says what a statement said, so that it can go on as that did.
    between = " is " if words.plain else words.pick([": ", ": ", " is ", " ", " = "])
    statements: list[str] = []
    questions: list[Question] = []
    size = 0
    left = list(zip(keys, values, strict=True))
    while left:
        group = [left.pop() for _ in range(min(len(left), words.count(parts)))]
        said = [_say(statement, n=noun, k=key, v=value) for key, value in group]
        asked = [group[i] for i in words.rng.permutation(len(group))]
        names = ", ".join(key for key, _ in asked[:-1])
        names = f"{names} and {asked[-1][0]}" if names else asked[-1][0]
        text = ask(words, PLURAL_QUESTIONS, PLURAL_LEADS, n=noun, k=names)
        question = Question(text, " " + ", ".join(f"{key}{between}{value}" for key, value in asked))
        size += sum(len(s) + 2 for s in said) + len(question.text) + len(question.answer) + 3
        if size > room and statements:
            break
        statements += said
        questions.append(question)
    return _shuffled(words, statements, questions)


def chains(words: Words, room: int, parts: int) -> Scene:
    """Write chains of up to `parts` assignments and ask for all names that hold a number, in order."""
    assignment = words.wording(ASSIGNMENTS)
    made = words.pick(["letters", "letters", "word", "name"])
    shortest, longest = words.pick([(5, 5), (3, 6)])
    names: dict[str, None] = {}
    while len(names) < max(room // 24, parts + 1):
        letters = made == "letters"
        names[
            words.letters(shortest, longest) if letters else words.word() if made == "word" else words.name()
        ] = None
    unused = list(names)
    size = 0
    said: list[list[str]] = []
    questions: list[Question] = []
    digits = int(words.rng.integers(4, 8))
    first = assignment.replace("VAR {a}", "{a}")
    while len(unused) > parts:
        held = [unused.pop() for _ in range(1 + words.count(parts))]
        value = words.digits(digits)
        chain = [first.format(a=value, b=held[0])]
        chain += [assignment.format(a=a, b=b) for a, b in itertools.pairwise(held)]
        question = Question(ask(words, CHAIN_QUESTIONS, CHAIN_LEADS, v=value), " " + ", ".join(held))
        size += sum(len(s) + 2 for s in chain) + len(question.text) + len(question.answer) + 3
        if size > room and said:
            break
        said.append(chain)
        questions.append(question)
    return Scene(_interleaved(words, said), [questions[i] for i in words.rng.permutation(len(questions))])


def records(words: Words, room: int, parts: int) -> Scene:
    """Write an object or a list of pairs without filler and ask for a few of its keys."""
    count = max(2, int(words.rng.integers(1, 7)))
    size = int(words.rng.choice([4, 8, 12]))
    kind = words.pick(("hexadecimal", "digits", "uuid"))
    width = 36 if kind == "uuid" else size

    def one() -> str:
        if kind == "uuid":
            return words.uuid()
        return words.hexadecimal(size) if kind == "hexadecimal" else words.digits(size)

    statement, between, question = words.pick(
        (
            ('"{k}": "{v}"', ", ", '"{k}": "'),
            ('"{k}": "{v}"', ", ", 'Key: "{k}"\nThe value of this key is: "'),
            ('"{k}": "{v}"', ",\n", 'What is the value of "{k}"?\nThe value is "'),
            ("{k} {v}", "\n", "{k} "),
            ("{k}: {v}", "; ", "{k}: "),
        )
    )
    each = len(statement) - 6 + 2 * width + len(between)
    pairs = {one(): one() for _ in range(max(2, (room - count * (2 * width + len(question) + 8)) // each))}
    asked = words.rng.permutation(list(pairs))[:count]
    body = between.join(statement.format(k=k, v=v) for k, v in pairs.items())
    if statement[0] == '"':
        body = "{" + body + "}"
    return Scene(
        [body],
        [Question(question.format(k=k), pairs[k] + ('"' if '"' in question[-1] else "")) for k in asked],
    )


def _pairs(words: Words, count: int) -> tuple[list[str], list[str]]:
    count = max(2, count)
    return words.keys(count), words.values(count)


def _say(wording: str, **names: str) -> str:
    text = wording.format(**names)
    return text[0].upper() + text[1:] if wording.startswith("{n}") else text


def _shuffled(words: Words, statements: list[str], questions: list[Question]) -> Scene:
    def mixed(things: list) -> list:  # type: ignore[type-arg]
        return [things[i] for i in words.rng.permutation(len(things))]

    return Scene(mixed(statements), mixed(questions))


def _interleaved(words: Words, chains: list[list[str]]) -> list[str]:
    """Mix the lines of all chains; each chain keeps its order."""
    turns = np.repeat(np.arange(len(chains)), [len(chain) for chain in chains])
    lines = [iter(chain) for chain in chains]
    return [next(lines[turn]) for turn in words.rng.permutation(turns)]
