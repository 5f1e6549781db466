"""A task of lm-evaluation-harness as a task of a comparison (`kvsieve[lm-eval]`); registered, with RULER, as
a plugin's tasks are.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..compare.tasks.base import Answer, Sample, Task
from ..errors import UserError, unknown
from ..hooks import hookimpl
from .ruler import Ruler


@dataclasses.dataclass(frozen=True)
class Document(Sample):
    """One of lm_eval's documents: several requests, each with a prompt of its own."""

    index: int = 0


@dataclasses.dataclass(frozen=True)
class Judged(Answer):
    """lm_eval's own verdict on a document."""

    score: float = 0.0


@dataclasses.dataclass(frozen=True)
class LmEval(Task):
    """A task of lm-evaluation-harness: its prompts and its metric, computed through our decode path.

    A compression refers to `context`: say how long the task's prompts are. The samples are the task's first
    documents.
    """

    name = "lm_eval"

    task: str = dataclasses.field(kw_only=True)  # one of lm_eval's, or of include_path
    metric: str = "acc"  # type: ignore[misc]  # one of the task's that has a number for every document
    higher_is_better: bool = True  # type: ignore[misc]
    include_path: str | None = None  # a folder with task files of your own
    num_fewshot: int | None = None  # examples in the prompt; none: as the task says

    @property
    def title(self) -> str:
        return self.task

    def code(self) -> Mapping[str, Path]:
        return {} if self.include_path is None else {"include_path": Path(self.include_path)}

    def positions(self) -> None:
        """Its prompts have their own lengths; `context` is only what a compression refers to."""
        return None

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        task = self._loaded()
        size = len(task.eval_docs)
        if self.samples > size:
            raise UserError(f"lm_eval's {self.task} has {size} documents: samples cannot be {self.samples}")
        better = task.higher_is_better()
        if self.metric not in better:
            raise UserError(unknown(f"metric of lm_eval's {self.task}", self.metric, better))
        if better[self.metric] != self.higher_is_better:
            raise UserError(
                f"{self.metric} of lm_eval's {self.task}: higher_is_better is {better[self.metric]} there"
            )
        return Document(prompt=[], references=[str(task.doc_to_target(task.eval_docs[index]))], index=index)

    def answer(
        self, model: Any, policy: Any, samples: Sequence[Sample]
    ) -> tuple[Sequence[Answer], int] | None:
        from .model import PolicyLM
        from .run import ask

        task = self._loaded()
        indexes = [sample.index for sample in samples if isinstance(sample, Document)]
        lm = PolicyLM(model, policy, batch_size=len(samples), seed=indexes[0])
        documents = _requests(self.task, self.include_path, self.num_fewshot, self.samples)
        answers = []
        for said, metrics in ask(lm, task, [documents[index] for index in indexes]):
            value = metrics[self.metric]
            if not isinstance(value, int | float):  # a perplexity is only defined over all documents
                raise UserError(
                    f"metric {self.metric} of lm_eval's {self.task} is no number for a single document"
                )
            answers.append(Judged(text=said, score=float(value)))
        return answers, lm.kv_bytes

    def score(self, sample: Sample, answer: Answer) -> float:
        assert isinstance(answer, Judged)
        return answer.score

    def source(self) -> str:
        """Of lm_eval's version and the documents as they are asked."""
        return _digest(self.task, self.include_path, self.num_fewshot)

    def _loaded(self) -> Any:
        return _load(self.task, self.include_path, self.num_fewshot)


@functools.cache
def _load(name: str, include_path: str | None, num_fewshot: int | None) -> Any:
    from .run import load_one

    return load_one(name, include_path, num_fewshot)


@functools.cache
def _requests(name: str, include_path: str | None, num_fewshot: int | None, documents: int) -> Any:
    from .run import requests

    return requests(_load(name, include_path, num_fewshot), documents)


@functools.cache
def _digest(name: str, include_path: str | None, num_fewshot: int | None) -> str:
    import importlib.metadata

    asked = [request.args for request in _requests(name, include_path, num_fewshot, 1)[0]]
    documents = list(_load(name, include_path, num_fewshot).eval_docs)
    everything = [importlib.metadata.version("lm_eval"), asked, documents]
    return hashlib.sha256(json.dumps(everything, default=str).encode()).hexdigest()[:12]


@hookimpl
def register_tasks(register: Callable[[type[Task]], None]) -> None:
    register(LmEval)
    register(Ruler)
