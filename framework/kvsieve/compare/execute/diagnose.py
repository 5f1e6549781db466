"""Diagnose samples of the cells of a comparison: nothing here is timed or metered.

Dense attention answers a sample once, and its tokens are fed to every policy.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ...diagnostics import Diagnosis, dense_answers, diagnose
from ...policy import Policy
from ..cells import Cell
from ..config import Diagnose, Settings
from ..samples import Record
from ..tasks import Sample
from . import Events, Failed, Measured


def diagnose_cells(
    model: PreTrainedModel,
    settings: Settings,
    asked: Diagnose,
    cells: Sequence[Cell],
    missing: Mapping[str, list[int]],
) -> Events:
    """Diagnose the `missing` samples, by cell id: a record for each; an error fails its cell alone."""
    failed = set()
    for task, of_task in itertools.groupby(cells, lambda cell: cell.task):
        same = list(of_task)
        for index in sorted(set().union(*(missing[cell.id] for cell in same))):
            question = None
            for cell in same:
                if index not in missing[cell.id] or cell.id in failed:
                    continue
                try:
                    if question is None:
                        question = Question(model, task.sample(model.tokenizer, settings.seed, index), asked)
                    found = question.diagnosis(cell.policy)
                    yield Measured(cell, [{"cell": cell.id, "sample": index} | _plain(found)])
                except Exception as error:
                    failed.add(cell.id)
                    yield Failed(cell, f"{type(error).__name__}: {error}", traceback.format_exc())


class Question:
    """A sample, and dense attention's answer to it; of several questions after the prompt, to the first."""

    def __init__(self, model: PreTrainedModel, sample: Sample, asked: Diagnose) -> None:
        self.model, self.sample = model, sample
        self.question = list(sample.questions[0]) if sample.questions else None
        # The first token comes from the prompt, the last one is fed to nobody.
        self.steps = min(asked.steps, sample.limit - 1)
        self.answer = list(sample.forced[: self.steps + 1])
        if self.steps and not self.answer:
            text = [*sample.prompt, *(self.question or [])]
            (self.answer,) = dense_answers(model, [text], self.steps)

    def diagnosis(self, policy: Policy) -> Diagnosis | None:
        """Diagnose the policy; None: the answer is a single token, which comes from the prompt."""
        if len(self.answer) < 2:
            return None
        return diagnose(
            self.model,
            [list(self.sample.prompt)],
            policy,
            steps=self.steps,
            questions=None if self.question is None else [self.question],
            answers=[self.answer],
            segments=[list(self.sample.segments)] if self.sample.segments else None,
        )


def _plain(found: Diagnosis | None) -> Record:
    """The numbers of one row as plain data, averaged over its steps: a list of heads for each layer."""
    if found is None:
        return {"steps": 0, "layers": [], "mass": [], "recall": [], "error": [], "tail": []}
    record: Record = {"steps": found.mass.shape[1], "layers": list(found.layers)}
    for name in ("mass", "recall", "error", "tail"):
        mean = getattr(found, name)[0].mean(0)
        if not mean.isfinite().all():
            raise ArithmeticError(f"{name} is not a number")
        record[name] = [[round(number, 5) for number in layer] for layer in mean.tolist()]
    return record
