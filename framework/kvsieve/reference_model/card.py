"""Measure a trained reference model and write its card: `python -m kvsieve.reference_model.card FOLDER`.

FOLDER holds the model; the card is its README.md. Text and keys are held out from training.
"""

import argparse
import json
from pathlib import Path

from ..compare import config, run
from ..compare.results import Results
from ..hf.models import load
from . import exams

SAMPLES = 32  # of every exam

_CARD = """---
license: apache-2.0
library_name: transformers
---
# kvsieve's reference model

A small Llama (4 layers, width 256, 4 query and 2 KV heads of 64 channels, byte-level tokens, {size:.1f} MB in
bfloat16) that retrieves and repeats parts of its context. It serves to compare attention policies offline and
is of no use as a language model.

Trained by `python -m kvsieve.reference_model.train` on the Python standard library's sources, with retrieval
and repetition inserted: {courses}.
One file in eight is held out, and so are the words, keys and names of all tasks. Longest training sequence:
2048 tokens; the configuration allows 4096.

Measured by `python -m kvsieve.reference_model.card` with the settings in `card.yaml`. Policies other than
dense read an eighth of dense attention's bytes. Brackets: 95 % interval.

{table}

Exams (`python -m kvsieve.reference_model.exams`), dense: the mean share of references that an answer
contains, in RULER's shapes. Words are real, unlike the training's; every second sample has a new wording.

{exams}
"""


def write(folder: Path, results: Path) -> Path:
    """Measure the model in `folder`, store the samples in `results`, write the card and return its path.

    Raises:
        RuntimeError: a cell of the comparison failed.
    """
    settings = config.load(Path(__file__).with_name("card.yaml"), [f"model={folder}"])
    outcome = run.compare(settings, results)
    if outcome.failures:
        raise RuntimeError(f"not every cell could be measured: {outcome.failures}")
    courses = ", then ".join(
        f"{taken['tokens']:,} tokens of the {taken['course']} course (seed {taken['seed']})"
        for taken in json.loads((folder / "training.json").read_text())
    )
    size = (folder / "model.safetensors").stat().st_size / 1e6
    card = folder / "README.md"
    graded = _exams(list(exams.run(load(str(folder)), samples=SAMPLES)))
    card.write_text(
        _CARD.format(size=size, courses=courses, table=_table(Results(outcome.rows)), exams=graded)
    )
    return card


def _table(results: Results) -> str:
    policies = results.policies
    lines = ["| task | context | " + " | ".join(policies) + " |", "|---|---|" + "---|" * len(policies)]
    for group in results.groups:
        scores = {
            row.policy: f"{row.score:.3g} [{row.score_low:.3g}, {row.score_high:.3g}]" for row in group.rows
        }
        shown = " | ".join(scores[policy] for policy in policies)
        lines.append(f"| {group.task} ({group.metric}) | {group.rows[0].context} | {shown} |")
    return "\n".join(lines)


def _exams(results: list[exams.Result]) -> str:
    lines = ["| exam | context | n | score | trained wording | new wording |", "|---|---|---|---|---|---|"]
    for row in results:
        scores = f"{row.score:.2f} | {row.known:.2f} | {row.new:.2f}"
        lines.append(f"| {row.kind} | {row.context} | {row.samples} | {scores} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder that `train` has exported")
    parser.add_argument(
        "--results", type=Path, default=Path("results/reference_model"), help="where samples are kept"
    )
    options = parser.parse_args()
    print(write(options.folder, options.results))


if __name__ == "__main__":
    main()
