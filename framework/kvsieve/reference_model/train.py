"""Train the reference model: `python -m kvsieve.reference_model.train --out DIR`.

Deterministic for a seed and a number of threads; continues from the last checkpoint in `--out`; made for two
CPU cores. The learning rate is constant after a warm-up and falls to zero at the end of the course, so a run
can be extended with a larger `--tokens` before the fall begins. The second course continues from a model:
`--course second --start MODEL --seed 1`. Which runs made the weights that ship: docs/reference_model.md.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ..corpus import digest, training_text
from . import card
from .data import Recipe, batch
from .tokenizer import BOS, EOS, PAD, VOCABULARY, byte_tokenizer

TOKENS_PER_STEP = 8192
SAVE_EVERY = 300.0  # seconds


class Stage(NamedTuple):
    """One stage of a course."""

    until: float  # share of all steps
    length: int  # tokens a sequence
    recipe: Recipe


class Course(NamedTuple):
    """One training run, from its first step to its last."""

    stages: tuple[Stage, ...]
    fall: float  # share of all steps, the last ones, over which the learning rate falls to zero


_FIRST = {"needles": 0.36, "repetitions": 0.42, "pairs": 0.12, "plain": 0.10}
_SECOND = {
    "repetitions": 0.28, "needles": 0.05, "pairs": 0.05, "plain": 0.02, "records": 0.02, "things": 0.04,
    "facts": 0.06, "several_values": 0.20, "several_keys": 0.12, "chains": 0.16,
}  # fmt: skip
_THIRD = {
    "repetitions": 0.36, "needles": 0.04, "pairs": 0.06, "plain": 0.02, "records": 0.02, "things": 0.02,
    "facts": 0.04, "several_values": 0.18, "several_keys": 0.12, "chains": 0.14,
}  # fmt: skip
_FOURTH = {
    "repetitions": 0.12, "needles": 0.03, "pairs": 0.05, "plain": 0.02, "records": 0.02, "things": 0.02,
    "facts": 0.04, "several_values": 0.32, "several_keys": 0.22, "chains": 0.16,
}  # fmt: skip
_FOURTH_LONG = {
    "repetitions": 0.34, "needles": 0.03, "pairs": 0.07, "plain": 0.02, "records": 0.02, "things": 0.02,
    "facts": 0.03, "several_values": 0.21, "several_keys": 0.14, "chains": 0.12,
}  # fmt: skip
_FOURTH_LAST = {
    "repetitions": 0.32, "needles": 0.03, "pairs": 0.07, "plain": 0.02, "records": 0.02, "things": 0.02,
    "facts": 0.03, "several_values": 0.17, "several_keys": 0.20, "chains": 0.12,
}  # fmt: skip
_FIFTH = {
    "repetitions": 0.22, "needles": 0.02, "pairs": 0.20, "plain": 0.02, "records": 0.02, "things": 0.02,
    "facts": 0.02, "several_values": 0.19, "several_keys": 0.17, "chains": 0.12,
}  # fmt: skip
_FIFTH_LONG = {
    "repetitions": 0.24, "needles": 0.02, "pairs": 0.20, "plain": 0.02, "records": 0.02, "things": 0.02,
    "facts": 0.02, "several_values": 0.18, "several_keys": 0.16, "chains": 0.12,
}  # fmt: skip
# Repeated text weighs more once the model can repeat: then only exactness is left to learn.
# Answers get more parts once the model can give one.
COURSES = {
    "first": Course(
        (
            Stage(0.185, 256, Recipe(_FIRST, copy=0.6)),
            Stage(0.395, 512, Recipe(_FIRST, copy=0.6)),
            Stage(0.68, 1024, Recipe(_FIRST, copy=0.6)),
            Stage(1.0, 2048, Recipe(_FIRST, copy=2.0)),
        ),
        fall=0.25,
    ),
    "second": Course(
        (
            Stage(0.25, 512, Recipe(_SECOND, copy=2.0, parts=3, plain=0.75)),
            Stage(0.60, 1024, Recipe(_SECOND, copy=2.0, parts=4, plain=0.75)),
            Stage(1.0, 2048, Recipe(_SECOND, copy=2.0, parts=4, plain=0.75)),
        ),
        fall=0.4,
    ),
    "third": Course(
        (
            Stage(0.55, 1024, Recipe(_THIRD, copy=3.0, parts=4, plain=0.75)),
            Stage(1.0, 2048, Recipe(_THIRD, copy=3.0, parts=4, plain=0.75)),
        ),
        fall=0.9,
    ),
    "fourth": Course(
        (
            Stage(0.30, 512, Recipe(_FOURTH, copy=3.0, parts=4, plain=0.85)),
            Stage(0.65, 1024, Recipe(_FOURTH_LONG, copy=3.0, parts=4, plain=0.85)),
            Stage(1.0, 2048, Recipe(_FOURTH_LAST, copy=3.0, parts=4, plain=0.85)),
        ),
        fall=0.75,
    ),
    "fifth": Course(
        (
            Stage(0.40, 1024, Recipe(_FIFTH, copy=3.0, parts=4, plain=0.85, questions=8)),
            Stage(1.0, 2048, Recipe(_FIFTH_LONG, copy=3.0, parts=4, plain=0.85, questions=8)),
        ),
        fall=0.75,
    ),
}


def configuration() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def stage(course: Course, step: int, steps: int, rng: np.random.Generator) -> tuple[int, Recipe]:
    """Sequence length and recipe of this step; one step in four draws any length so far."""
    reached = next(i for i, stage in enumerate(course.stages) if step < stage.until * steps)
    lengths = [stage.length for stage in course.stages[: reached + 1]]
    length = int(rng.choice(lengths)) if rng.random() < 0.25 else lengths[-1]
    return length, course.stages[reached].recipe


def learning_rate(step: int, steps: int, peak: float, fall: float) -> float:
    return peak * min(1.0, (step + 1) / 100, (steps - step) / (fall * steps))


def train(
    out: Path, tokens: int, seed: int, peak: float, course: Course, start: Path | None = None
) -> LlamaForCausalLM:
    """Train on `tokens` tokens and return the model; continue from the checkpoint in `out`, if any.

    Without a checkpoint, begin with the weights of the model in the folder `start`, or with random ones.
    """
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    # Filling would take a tenth of the time and changes nothing here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    model = LlamaForCausalLM(configuration())
    if start is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict())
    optimizers = _optimizers(model, peak)
    first = _restore(out, model, optimizers)
    corpus = training_text()
    text = np.frombuffer(corpus.encode(), np.uint8)
    steps = tokens // TOKENS_PER_STEP
    log = _log(out / "log.jsonl", first)
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=steps, completed=first)
        saved = time.monotonic()
        for step in range(first, steps):
            started = time.perf_counter()
            rng = np.random.default_rng([seed, step])
            length, recipe = stage(course, step, steps, rng)
            ids, weights = batch(text, seed, step, TOKENS_PER_STEP // length, length, recipe)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, peak, course.fall)
            losses = _update(model, optimizers, torch.from_numpy(ids), torch.from_numpy(weights).float())
            seconds = time.perf_counter() - started
            record = {"step": step, "length": length, **losses, "seconds": round(seconds, 3)}
            log.write(json.dumps(record) + "\n")
            progress.update(
                bar, advance=1, description=f"step {step} length {length} retrieved {losses['retrieved']:.3f}"
            )
            if time.monotonic() - saved >= SAVE_EVERY or step + 1 == steps:
                _save(out, model, optimizers, step + 1)
                saved = time.monotonic()
    log.close()
    print(f"trained on {tokens:,} tokens of corpus {digest(corpus)} (seed {seed})")
    return model


def _optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, at the scale of AdamW's updates, and AdamW for all the rest."""
    matrices: list[torch.Tensor] = []
    rest: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _update(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> dict[str, float]:
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, use_cache=False).logits[:, :-1]  # whole rows: an odd length is half as slow again
    nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    loss = (nll * weight).sum() / weight.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not math.isfinite(norm.item()):
        raise FloatingPointError("the gradient is not finite; lower --learning-rate")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def mean(mask: torch.Tensor) -> float:
        return round((nll[mask].sum() / mask.sum().clamp(min=1)).item(), 4)

    return {
        "loss": round(loss.item(), 4),
        "filler": mean((weight > 0) & (weight < 0.5)),
        "retrieved": mean(weight > 0.5),
    }


def _save(out: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Replace the checkpoint in one move: an interruption leaves either the old or the new one complete."""
    state = {
        f"model/{name}": tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    for number, optimizer in enumerate(optimizers):
        for i, moments in optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{number}/{i}/{name}": tensor for name, tensor in moments.items()}
    save_file(
        {k: v.contiguous().clone() for k, v in state.items()}, out / "checkpoint.tmp", {"step": str(step)}
    )
    os.replace(out / "checkpoint.tmp", out / "checkpoint.safetensors")


def _restore(out: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> int:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "checkpoint.safetensors"
    if not path.exists():
        return 0
    state = load_file(path)
    weights = {name.removeprefix("model/"): t for name, t in state.items() if name.startswith("model/")}
    model.load_state_dict(weights, strict=False)
    moments: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    for name, tensor in state.items():
        if name.startswith("optimizer/"):
            _, number, i, kind = name.split("/")
            moments[int(number)].setdefault(int(i), {})[kind] = tensor
    for optimizer, found in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": found})
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def _log(path: Path, steps: int) -> TextIO:
    """Open the log after its first `steps` lines: later steps are run, and logged, again."""
    lines = path.read_text().splitlines(keepends=True)[:steps] if path.exists() else []
    path.write_text("".join(lines))
    return path.open("a", buffering=1)


def export(model: LlamaForCausalLM, folder: Path, courses: list[dict[str, Any]]) -> None:
    """Save the model in bfloat16 and its tokenizer for `from_pretrained`, and the courses it has taken."""
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(courses) + "\n")


def taken(folder: Path | None) -> list[dict[str, Any]]:
    """List the courses that a model has taken, the first one first."""
    return json.loads((folder / "training.json").read_text()) if folder else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for checkpoints, log, and the finished model with its card",
    )
    parser.add_argument("--course", choices=COURSES, default="first")
    parser.add_argument("--start", type=Path, help="folder of a model whose weights are the first ones")
    parser.add_argument("--tokens", type=float, default=34e6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    course = COURSES[options.course]
    model = train(
        options.out, int(options.tokens), options.seed, options.learning_rate, course, options.start
    )
    this = {"course": options.course, "tokens": int(options.tokens), "seed": options.seed}
    export(model, options.out / "model", [*taken(options.start), this])
    print(card.write(options.out / "model", options.out / "scores"))


if __name__ == "__main__":
    main()
