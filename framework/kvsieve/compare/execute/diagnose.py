"""Diagnose samples of the cells of a comparison: nothing here is timed or metered.

Dense attention answers a sample once, and its tokens are fed to every policy.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ...attention import ChangedKeys
from ...cache.kv_cache import KVCache
from ...diagnostics import Diagnosis, dense_answers, diagnose
from ...policy import Policy
from ...reading import Reading
from ...recording import Needs, Recording, needs
from ..cells import Cell
from ..config import Diagnose, Settings
from ..samples import Record
from ..tasks import Sample
from . import Events, Measured
from .cell import prompts_of
from .unit import failed


def diagnose_cells(
    model: PreTrainedModel,
    settings: Settings,
    asked: Diagnose,
    cells: Sequence[Cell],
    missing: Mapping[str, list[int]],
) -> Events:
    """Diagnose the `missing` samples, by cell id: a record for each; an error fails its cell alone."""
    broken = set()
    for task, of_task in itertools.groupby(cells, lambda cell: cell.task):
        same = list(of_task)
        for index in sorted(set().union(*(missing[cell.id] for cell in same))):
            question = None
            for cell in same:
                if index not in missing[cell.id] or cell.id in broken:
                    continue
                try:
                    if question is None:
                        question = Question(model, task.sample(model.tokenizer, settings.seed, index), asked)
                    found = question.diagnosis(cell.policy)
                    yield Measured(cell, [{"cell": cell.id, "sample": index} | _plain(found)])
                except Exception as error:
                    broken.add(cell.id)
                    yield failed(cell, error)


class Question:
    """A sample, and dense attention's answer to it; of several questions after the prompt, to the first.

    The prompt is prefilled once for all policies that need the same of it.
    """

    def __init__(self, model: PreTrainedModel, sample: Sample, asked: Diagnose) -> None:
        self.model = model
        self.prompts, self.segments = prompts_of([sample])
        self.questions = [list(sample.questions[0])] if sample.questions else None
        # The first token comes from the prompt, the last one is fed to nobody.
        self.steps = min(asked.steps, sample.limit - 1)
        self.answers = [list(sample.forced[: self.steps + 1])]
        if self.steps and not sample.forced:
            text = [*self.prompts[0], *(self.questions or [[]])[0]]
            self.answers = dense_answers(model, [text], self.steps)
        self.recordings: dict[Needs, Recording] = {}

    def diagnosis(self, policy: Policy) -> Diagnosis | None:
        """Diagnose the policy; None: the answer is a single token, which comes from the prompt."""
        if len(self.answers[0]) < 2:
            return None
        reading = Reading(self.model, self.prompts, policy, self.segments)
        wanted = needs(KVCache(self.model, policy), reading)
        if not isinstance(wanted, Needs):  # it reads the prompt itself
            return self._diagnosis(policy, None)
        if wanted not in self.recordings:
            self.recordings[wanted] = Recording(self.model, self.prompts, [wanted])
        try:
            return self._diagnosis(policy, self.recordings[wanted])
        except ChangedKeys:
            return self._diagnosis(policy, None)

    def _diagnosis(self, policy: Policy, recording: Recording | None) -> Diagnosis:
        return diagnose(
            self.model,
            self.prompts,
            policy,
            steps=self.steps,
            questions=self.questions,
            answers=self.answers,
            segments=self.segments,
            reader=recording,
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
