"""RULER (Hsieh et al., 2024, arXiv:2404.06654) as lm_eval makes and scores it, as a task of a comparison.

Prompts are lm_eval's to the letter for the same tokenizer, length and seed, made by its own functions.
`context` is RULER's length: prompt and answer together, by lm_eval's count, which leaves out the answer's
beginning. docs/lm_eval.md says where lm_eval departs from NVIDIA's RULER.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from typing import Any, Literal, NamedTuple

from ..compare.tasks import metrics, text, words
from ..compare.tasks.base import Answer, Sample, Task
from ..errors import UserError
from . import require

Name = Literal[
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
    "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
]  # fmt: skip
_THEIR_NAMES = {
    "vt": "ruler_vt", "cwe": "ruler_cwe", "fwe": "ruler_fwe",
    "qa_1": "ruler_qa_squad", "qa_2": "ruler_qa_hotpot",
}  # fmt: skip
_IN_ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")


class Document(NamedTuple):
    """A prompt and what its answer holds."""

    prompt: str
    references: list[str]
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Ruler(Task):
    """Share of the right answers to a question of RULER's that are said (needs kvsieve[lm-eval])."""

    name = "ruler"
    metric = "share found"
    chance = 0.0

    context: int = 4096
    tasks: Name = "niah_single_1"  # of RULER's; several are a list, as of any parameter
    chat: bool = False  # ask in the model's own chat template; the answer's beginning is given as well

    @property
    def title(self) -> str:
        return f"ruler {self.tasks}"

    @property
    def limits(self) -> tuple[float, float]:
        return 0.0, 1.0

    def source(self) -> str:
        return _digest(self.tasks)

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        wanted = max(self.samples, index + 1, 32)
        made = _documents(self.tasks, tokenizer, self.context, seed, self.chat, wanted)
        if max(self.samples, index + 1) > len(made):
            raise UserError(
                f"lm_eval makes {len(made)} prompts of {self.title} with {self.context} tokens: "
                f"samples cannot be {self.samples}"
            )
        prompt, references, new_tokens = made[index]
        begun = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        ids = tokenizer(prompt, add_special_tokens=not begun, verbose=False)["input_ids"]
        facts: dict[str, Any] = {"document": index}
        if len(references) == 1:
            facts["depth"] = max(0, prompt.find(references[0])) / len(prompt)
        return Sample(ids[-self.context :], references, needs="all", new_tokens=new_tokens, facts=facts)

    def score(self, sample: Sample, answer: Answer) -> float:
        return metrics.share_found(answer.text, sample.references)


@functools.cache
def _documents(name: str, tokenizer: Any, context: int, seed: int, chat: bool, count: int) -> list[Document]:
    """The first documents of a task; lm_eval makes 500 of them."""
    from .loading import load

    known = _THEIR_NAMES.get(name, name)
    if chat:
        text.check_chat(tokenizer)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        _, loaded = load([known], tokenizer=tokenizer, lengths=[context], seed=seed)
    task = loaded["tasks"][known]
    new_tokens = task.config.generation_kwargs["max_gen_toks"]

    def in_chat(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def document(row: dict[str, Any]) -> Document:
        begun = task.doc_to_prefix(row)
        asked = task.fewshot_context(
            row, 0, apply_chat_template=chat, chat_template=in_chat if chat else None, gen_prefix=begun
        )
        return Document(asked, list(row["outputs"]), new_tokens)

    rows = task.eval_docs
    return [document(rows[i]) for i in range(min(count, len(rows)))]


@functools.cache
def _digest(name: str) -> str:
    """Of lm_eval's version and of the words and essays that prompts are made of."""
    import importlib.metadata

    require()
    parts = [importlib.metadata.version("lm_eval"), words.digest()]
    if name in _IN_ESSAYS:
        from .loading import as_sentences

        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), as_sentences([name]):
            from lm_eval.tasks.ruler.prepare_niah import get_haystack

            parts += get_haystack("essay")
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]
