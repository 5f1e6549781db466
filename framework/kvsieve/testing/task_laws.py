"""The laws that every task of a comparison obeys, each with three tokenizers.

Each takes a task whose context has room for it, such as `MyTask(context=1000)`: bytes are tokens here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from .. import registration
from ..compare.tasks import Answer, Sample, Task
from ..compare.tasks import text as texts
from ..errors import UserError
from .tokenizers import tokenizers

_SEED = 7
_INDEXES = range(5)


def a_sample_depends_on_tokenizer_seed_and_index_alone(task: Task) -> None:
    """Asked again, in another order and of a task with one sample, it is the same; another index is not."""
    other = dataclasses.replace(task, samples=1)
    for name, tokenizer, samples in _samples(task):
        again = [other.sample(tokenizer, _SEED, i) for i in reversed(_INDEXES)]
        assert samples == again[::-1], f"{task} with {name}: asked again, a sample is another"
        prompts = {tuple(sample.prompt) for sample in samples}
        assert len(prompts) > 1, f"{task} with {name}: all samples are the same"


def a_perfect_answer_scores_full(task: Task) -> None:
    """The references themselves get the best score that the task's `limits` name."""
    for name, sample in _each(task):
        score = task.score(sample, _perfect(sample))
        best = _best(task)
        assert best is None or score == best, (
            f"{task} with {name}: the perfect answer {_perfect(sample).text!r} scores {score}, not {best}"
        )


def an_empty_answer_does_not(task: Task) -> None:
    """Nothing said, or each token thought unlikely, scores worse than the perfect answer."""
    for name, sample in _each(task):
        empty = Answer(log_probabilities=[-20.0] * len(sample.forced))
        better, worse = task.score(sample, _perfect(sample)), task.score(sample, empty)
        if not task.higher_is_better:
            better, worse = worse, better
        assert better > worse, f"{task} with {name}: an empty answer scores {worse}, a perfect one {better}"


def prompt_and_answer_fit(task: Task) -> None:
    """A prompt has 1 to `context` tokens of the vocabulary, and a perfect answer may be said to its end."""
    for name, tokenizer, samples in _samples(task):
        for sample in samples:
            size = len(sample.prompt)
            assert 1 <= size <= task.context, f"{task} with {name}: a prompt of {size} tokens"
            known = len(tokenizer)
            assert all(0 <= token < known for token in (*sample.prompt, *sample.forced)), (
                f"{task} with {name}: a token id outside the vocabulary of {known}"
            )
            text = _perfect(sample).text
            longest = max(sample.references, key=len) if len(sample.questions) > 1 else text
            needed = len(sample.forced) or _new_tokens(tokenizer, longest)
            assert needed <= sample.limit, (
                f"{task} with {name}: {text!r} takes {needed} tokens, and new_tokens are {sample.limit}"
            )
            cut = [stop for stop in sample.stop if stop in text]
            assert not cut, f"{task} with {name}: {cut[0]!r} ends the perfect answer {text!r}"
            whole = (
                sample.characters is None
                or len(sample.questions) > 1
                or task.score(sample, Answer(text[: sample.characters])) == task.score(sample, Answer(text))
            )
            assert whole, f"{task} with {name}: {sample.characters} characters are too few for {text!r}"


def a_context_of_one_token_is_refused(task: Task) -> None:
    """Before any work, with a UserError; a task whose prompts have their own length serves it none longer."""
    short = dataclasses.replace(task, context=1)
    for name, tokenizer in tokenizers().items():
        try:
            sample = short.sample(tokenizer, _SEED, 0)
        except UserError:
            continue
        assert len(sample.prompt) <= 1, f"{short} with {name}: a prompt of {len(sample.prompt)} tokens"


def it_can_be_registered(task: Task) -> None:
    """A frozen dataclass whose fields are plain data, with a name and a metric."""
    registration.check("tasks", type(task))
    assert task.metric, f"{type(task).__name__} names no metric"


TASK_LAWS: list[Callable[[Task], None]] = [
    a_sample_depends_on_tokenizer_seed_and_index_alone,
    a_perfect_answer_scores_full,
    an_empty_answer_does_not,
    prompt_and_answer_fit,
    a_context_of_one_token_is_refused,
    it_can_be_registered,
]


def check_task(task: Task) -> None:
    """All laws at once; raises AssertionError with the first that is broken."""
    for law in TASK_LAWS:
        law(task)


def _samples(task: Task) -> Iterator[tuple[str, Any, list[Sample]]]:
    for name, tokenizer in tokenizers().items():
        yield name, tokenizer, [task.sample(tokenizer, _SEED, i) for i in _INDEXES]


def _each(task: Task) -> Iterator[tuple[str, Sample]]:
    return ((name, sample) for name, _, samples in _samples(task) for sample in samples)


def _perfect(sample: Sample) -> Answer:
    """Any of the references, or all of them with commas between; certain of each forced token."""
    text = ", ".join(sample.references) if sample.needs == "all" else sample.reference
    texts = sample.references if len(sample.questions) > 1 else ()
    return Answer(text, texts=texts, log_probabilities=[0.0] * len(sample.forced))


def _best(task: Task) -> float | None:
    return None if task.limits is None else task.limits[1 if task.higher_is_better else 0]


def _new_tokens(tokenizer: Any, text: str) -> int:
    """Tokens that the text takes behind others: some tokenizers put a space before the first."""
    return len(texts.encode(tokenizer, "\n" + text)) - len(texts.encode(tokenizer, "\n"))
