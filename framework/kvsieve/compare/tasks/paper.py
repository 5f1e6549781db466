"""The tasks of the SparQ paper (arXiv:2312.04985), from the hub or a local folder with the same rows.

Prompts, their order and their references are those of the authors' code (llm-inference-research@ead9b6a), so
the seed of a comparison changes nothing: sample i is the i-th of their shuffle. Text and question are
tokenised as one text and lose their beginning where they are longer than `context`; the authors' is the
model's positions less 256. Deviations: an answer ends where the model ends it, and `shakespeare` gives an
answer that is too short the length of the answer, not full marks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ...errors import UserError
from . import metrics, text
from .base import Answer, Sample, check_range
from .hub import DataSet
from .rows import FromRows, Row

_CHARACTERS = range(4000, 8001)  # of an article or a page
_PAGE = re.compile(r"(.{6000,}?)(\s.{399,}?)(?=\s|\Z)", re.DOTALL)
_PASSAGES = re.compile(r".{6000,}?(?=\s)", re.DOTALL)
_REPEATED = re.compile(r"(.{128,}?)(\s.{255,}?)(?=\s)", re.DOTALL)


class Question(NamedTuple):
    """A prompt and its right answers."""

    id: Any
    prompt: str
    references: list[str]


@dataclasses.dataclass(frozen=True)
class Paper(FromRows):
    """Base of these tasks: `questions` of the rows, shuffled by the authors' seed."""

    shuffle: ClassVar[int]

    def questions(self, found: list[Row]) -> list[Question]:
        """The questions of all rows, in their order."""
        raise NotImplementedError

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        shuffled = _shuffled(dataclasses.replace(self, context=1, samples=1))
        self.check_count(len(shuffled), index)
        question = shuffled[index]
        prompt = tokenizer(question.prompt, verbose=False)["input_ids"][-self.context :]
        return self.asked(tokenizer, question, prompt)

    def asked(self, tokenizer: Any, question: Question, prompt: list[int]) -> Sample:
        """The sample of a question, whose prompt has these token ids."""
        raise NotImplementedError


@functools.cache
def _shuffled(task: Paper) -> list[Question]:
    found = task.questions(task.rows())
    return [found[i] for i in np.random.default_rng(task.shuffle).permutation(len(found))]


# -------------------------------------------------------------------- questions and short answers
@dataclasses.dataclass(frozen=True)
class Answers(Paper):
    """Base of the two that ask for a short answer."""

    metric = "match"
    chance = 0.0

    @property
    def limits(self) -> tuple[float, float]:
        return 0.0, 1.0

    def asked(self, tokenizer: Any, question: Question, prompt: list[int]) -> Sample:
        if not any(map(metrics.normalised, question.references)):
            raise UserError(
                f"{self.name}: the answers of question {question.id} normalise to nothing: "
                f"{question.references}"
            )
        longest = max(len(text.encode(tokenizer, answer)) for answer in question.references)
        facts = {"document": question.id}
        return Sample(prompt, question.references, new_tokens=min(30, 5 + longest), facts=facts)

    def score(self, sample: Sample, answer: Answer) -> float:
        return float(metrics.begins_with_any(answer.text, sample.references))


@dataclasses.dataclass(frozen=True)
class Squad(Answers):
    """Share of answers that begin with a right one: SQuAD v1.1 among paragraphs of other articles."""

    name = "squad"
    hub = DataSet("rajpurkar/squad", None, "validation", "7b6d24c440a36b6815f21b70d25016731768db1f")
    columns = ("id", "title", "context", "question", "answers")
    shuffle = 945237

    shots: int = 1  # solved questions before the one that is asked
    confusion_contexts: int = 7  # other paragraphs

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("shots", self.shots, 0, 5)
        check_range("confusion_contexts", self.confusion_contexts, 0, 1000)

    def questions(self, found: list[Row]) -> list[Question]:
        rng = np.random.RandomState(82735235)
        contexts = sorted(set(map(self._context, found)))
        same: dict[str, list[Row]] = {}
        for row in found:
            same.setdefault(row["context"], []).append(row)
        made = []
        for row in found:
            drawn = rng.choice(len(contexts), self.confusion_contexts)
            shown = [self._context(row), *(contexts[i] for i in drawn)]
            rng.shuffle(shown)
            examples: list[Any] = _without(row, same[row["context"]])
            rng.shuffle(examples)
            examples += _without(row, [found[i] for i in rng.choice(len(found), 6)])
            solved = [f"{_ask(one)} {min(one['answers']['text'], key=len)}" for one in examples[: self.shots]]
            request = (
                f"From what you've just read about {_title(row)}, please answer the following questions."
            )
            prompt = "\n".join([*shown, request, *solved, _ask(row)])
            made.append(Question(row["id"], prompt, list(row["answers"]["text"])))
        return made

    def _context(self, row: Row) -> str:
        return f"Title: {_title(row)}. Background: {row['context']}"


def _title(row: Row) -> str:
    return str(row["title"]).replace("_", " ")


def _ask(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"


def _without(row: Row, others: Sequence[Row]) -> list[Row]:
    return [other for other in others if other["id"] != row["id"]]


@dataclasses.dataclass(frozen=True)
class TriviaQA(Answers):
    """Share of answers that begin with a right one: TriviaQA behind a page of Wikipedia."""

    name = "triviaqa"
    hub = DataSet("mandarjoshi/trivia_qa", "rc", "validation", "0f7faf33a3908546c6fd5b73a660e0f8ff173c2f")
    columns = ("question_id", "question", "answer", "entity_pages")
    shuffle = 487523

    single_word: bool = False  # ask for a single word, as the authors do of Pythia

    def questions(self, found: list[Row]) -> list[Question]:
        rng, made = np.random.RandomState(2751584), []
        wanted = "Single-word answer:" if self.single_word else "Answer:"
        for row in found:
            pages = [page for page in row["entity_pages"]["wiki_context"] if len(page) in _CHARACTERS]
            if pages:
                rng.choice(len(found), 7)  # the authors draw examples here, which no shot uses
                page = pages[rng.randint(len(pages))]
                prompt = f"{page}\nQuestion: {row['question']}\n{wanted}"
                made.append(Question(row["question_id"], prompt, list(row["answer"]["aliases"])))
        return made


# -------------------------------------------------------------------- longer answers
@dataclasses.dataclass(frozen=True)
class CnnDailyMail(Paper):
    """ROUGE-L F of a summary of an article, with the stemmer (needs rouge-score)."""

    name = "cnn_dailymail"
    metric = "ROUGE-L"
    hub = DataSet("abisee/cnn_dailymail", "3.0.0", "validation", "96df5e686bee6baa90b8bee7c28b81fa3fa6223d")
    columns = ("id", "article", "highlights")
    shuffle = 2353669

    @property
    def limits(self) -> tuple[float, float]:
        return 0.0, 1.0

    def questions(self, found: list[Row]) -> list[Question]:
        return [
            Question(row["id"], f"Article: {row['article']}\nSummary:", [row["highlights"]])
            for row in found
            if len(row["article"]) in _CHARACTERS
        ]

    def asked(self, tokenizer: Any, question: Question, prompt: list[int]) -> Sample:
        metrics.rouge()
        new_tokens = min(128, len(text.encode(tokenizer, question.references[0])))
        facts = {"document": question.id}
        return Sample(prompt, question.references, new_tokens=new_tokens, facts=facts)

    def score(self, sample: Sample, answer: Answer) -> float:
        return metrics.rouge_l(answer.text, sample.reference)


@dataclasses.dataclass(frozen=True)
class WikiText(Paper):
    """Bits per character of what follows 6,000 characters of a page, token by token on the decode path."""

    name = "wikitext"
    metric = "bits per character"
    higher_is_better = False
    hub = DataSet("EleutherAI/wikitext_document_level", "wikitext-103-raw-v1", "train", None)
    columns = ("page",)
    shuffle = 2353669

    def questions(self, found: list[Row]) -> list[Question]:
        parts = [(number, _PAGE.match(row["page"])) for number, row in enumerate(found)]
        return [Question(number, part[1], [part[2]]) for number, part in parts if part]

    def asked(self, tokenizer: Any, question: Question, prompt: list[int]) -> Sample:
        forced = text.encode(tokenizer, question.references[0])
        return Sample(prompt, question.references, forced=forced, facts={"document": question.id})

    def score(self, sample: Sample, answer: Answer) -> float:
        return -sum(answer.log_probabilities) / math.log(2) / len(sample.reference)


@dataclasses.dataclass(frozen=True)
class Shakespeare(Paper):
    """Characters that are right before the first wrong one, where a passage of Shakespeare begins anew."""

    name = "shakespeare"
    metric = "matching characters"
    chance = 0.0
    # The files that the hub makes of its script, which datasets does not run.
    hub = DataSet("karpathy/tiny_shakespeare", None, "train+validation+test", "refs/convert/parquet")
    columns = ("text",)
    shuffle = 544085

    def questions(self, found: list[Row]) -> list[Question]:
        whole = "".join(row["text"] for row in found)
        return [
            Question(passage.start() + part.start(), f"{passage[0]}\n{part[1]}", [part[2]])
            for passage in _PASSAGES.finditer(whole)
            for part in _REPEATED.finditer(passage[0])
        ]

    def asked(self, tokenizer: Any, question: Question, prompt: list[int]) -> Sample:
        new_tokens = min(128, len(text.encode(tokenizer, question.references[0])))
        facts = {"document": question.id}
        return Sample(prompt, question.references, new_tokens=new_tokens, facts=facts)

    def score(self, sample: Sample, answer: Answer) -> float:
        return float(metrics.matching_characters(answer.text, sample.reference))
