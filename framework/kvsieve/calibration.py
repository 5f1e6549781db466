"""Calibration files: numbers per layer and KV head, measured once on some text, that a policy reads by.

A file is safetensors: `layers.N.channels [K, >= r]` (Double Sparsity: the channels of a key, the most
telling first), `layers.N.basis [K, >= r, D]` (Loki: directions of falling variance) or `layers.N.retrieval
[K, 1]` (DuoAttention: the higher, the more a head needs what is far back), and metadata: `model`, its name;
`digest`, the `fingerprint` of its shape and all its weights; `text`, the digest of the text. A file without a
digest serves any model of its shape. Those of the model that ships are found as `reference`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedModel

from . import ops, reference_model
from .errors import UserError
from .fingerprint import fingerprint, same
from .hf import interface
from .prompts import check_lengths, token_lists

# One file a method that reads by one; made by `python -m kvsieve.reference_model.calibrations`.
SHIPPED = reference_model.FOLDER.parent / "calibrations"


class Calibration(NamedTuple):
    """A file, read."""

    path: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def take(
        self, what: str, layer: int, heads: range, head_size: int, r: int, device: torch.device
    ) -> torch.Tensor:
        """The first r of `what` ("channels" or "basis") of a layer, for these KV heads: `[K, r, ...]`.

        Raises:
            UserError: the file is for another head size, for fewer layers or heads, or holds fewer than r.
        """
        name = f"layers.{layer}.{what}"
        if name not in self.tensors:
            raise UserError(f"calibration {self.path} has no {name}: it holds {', '.join(self.tensors)}")
        found = self.tensors[name]
        if what == "basis" and found.shape[-1] != head_size:
            raise UserError(
                f"calibration {self.path} is for heads of {found.shape[-1]} channels, not {head_size}"
            )
        if what == "channels" and not 0 <= int(found.min()) <= int(found.max()) < head_size:
            raise UserError(
                f"calibration {self.path} has channels from {int(found.min())} to {int(found.max())}; this "
                f"model's heads have the channels 0 to {head_size - 1}"
            )
        if found.shape[0] < heads.stop:
            raise UserError(
                f"calibration {self.path} is for {found.shape[0]} KV heads, and this model has {heads.stop}"
            )
        if found.shape[1] < r:
            raise UserError(f"calibration {self.path} holds {found.shape[1]} {what} a head, and r is {r}")
        return found[heads.start : heads.stop, :r].to(device)

    def check_contents(self, what: str, head_size: int, r: int) -> None:
        """Raise UserError if the file is another method's, or lacks the first `r` of `what` of such heads."""
        parts = [name.split(".") for name in self.tensors if name.startswith("layers.")]
        layers = [
            int(part[1]) for part in parts if len(part) == 3 and part[2] == what and part[1].isdecimal()
        ]
        if not layers:
            held = ", ".join(dict.fromkeys(part[-1] for part in parts)) or "no layers"
            raise UserError(f"calibration {self.path} holds {held}, and not {what}: it is for another method")
        for layer in layers:
            try:
                self.take(what, layer, range(0), head_size, r, torch.device("cpu"))
            except UserError:
                if "digest" in self.metadata and self.tensors[f"layers.{layer}.{what}"].shape[1] >= r:
                    raise self._of_another_model() from None
                raise

    def check(self, model: PreTrainedModel, what: str, r: int) -> None:
        """Raise UserError if the file was made for another model, or, without a digest, for another shape.

        It is read so: the first `r` of `what`, in any layer.
        """
        wanted = self.metadata.get("digest")
        if wanted is not None:
            if not same(wanted, fingerprint(model)):
                raise self._of_another_model()
            return
        config = model.config.get_text_config(decoder=True)
        layers = config.num_hidden_layers
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if not isinstance(heads, int):  # layers differ: each is checked when it begins
            return
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for layer in range(layers):
            self.take(what, layer, range(heads), size, r, torch.device("cpu"))
        of = [tensor for name, tensor in self.tensors.items() if name.endswith(f".{what}")]
        if len(of) > layers or len(of[0]) > heads:
            raise UserError(
                f"calibration {self.path} is for {len(of)} layers of {len(of[0])} KV heads, and this model "
                f"has {layers} of {heads}"
            )

    def _of_another_model(self) -> UserError:
        return UserError(
            f"calibration {self.path} was made for {self.metadata.get('model', 'another model')}, whose "
            "configuration or weights are not this model's: make one for it with kvsieve calibrate"
        )


def path(name: str, method: str) -> str:
    """The file that a method's `calibration` means: a path, or `reference` for the one that ships."""
    return str(SHIPPED / f"{method}.safetensors") if name == reference_model.NAME else name


def read(path: str) -> Calibration:
    """Read a calibration file.

    Raises:
        UserError: there is no such file, or it is none.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no calibration file {path}: make one with kvsieve calibrate")
    return _read(path, Path(path).stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read(path: str, changed: int) -> Calibration:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Calibration(path, tensors, file.metadata() or {})
    except SafetensorError as error:
        raise UserError(f"{path} is no calibration file (safetensors): {error}") from error


def write(path: Path, tensors: dict[str, torch.Tensor], model: PreTrainedModel, text: str) -> None:
    """Write a calibration file, whole or not at all."""
    source = Path(str(getattr(model.config, "_name_or_path", "") or type(model).__name__))
    local = reference_model.NAME if source == reference_model.FOLDER else source.name
    name = local if source.is_dir() else str(source)  # no one's folders
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(save(tensors, {"model": name, "digest": fingerprint(model), "text": text}))
    unfinished.replace(path)


# -------------------------------------------------------------------- measuring
Note = Callable[[int, torch.Tensor, torch.Tensor, Mapping[str, Any]], None]


@contextlib.contextmanager
def _noting(note: Note) -> Iterator[None]:
    """Call `note(layer, query [B, H, Q, D], key [B, K, Q, D], scoring)` for every attention inside.

    Both are rotated; `scoring` has the `scale`, `softcap` and `sinks` of the model, as the ops take them. For
    all models in this process.
    """

    def attention(module, query, key, *args, **kwargs):  # type: ignore[no-untyped-def]
        scale, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
        scoring = {
            "scale": query.shape[3] ** -0.5 if scale is None else scale,
            "softcap": kwargs.get("softcap"),
            "sinks": None if sinks is None else sinks.view(key.shape[1], -1),
        }
        note(module.layer_idx, query, key, scoring)
        return interface.attention_forward(module, query, key, *args, **kwargs)

    interface.register(attention)
    try:
        yield
    finally:
        interface.register()


def pieces(model: PreTrainedModel, text: str, samples: int, length: int) -> list[list[int]]:
    """Cut so many pieces of `length` tokens out of a text, at equal distances.

    Raises:
        UserError: the text is too short, or the model cannot read so many tokens at once.
    """
    step = max(1, len(text) // samples)
    parts = [text[i * step : i * step + min(step, 32 * length)] for i in range(samples)]
    cut = [tokens[:length] for tokens in token_lists(model, [part for part in parts if part])]
    if len(cut) < samples or any(len(tokens) < length for tokens in cut):
        raise UserError(
            f"the text has {len(text)} characters, too few for {samples} pieces of {length} tokens: "
            "give a longer text, or fewer samples, or a smaller length"
        )
    check_lengths(model, cut, 0)
    return cut


def measure_channels(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    by: Literal["q", "k", "qk"],
    progress: Callable[[int], None] = lambda read: None,
) -> dict[str, torch.Tensor]:
    """Rank the channels of every KV head: `layers.N.channels [K, D]` int16, the largest first.

    By the mean of |q| over the tokens and the group, of |k|, or of the product of both, after RoPE.
    `progress` is told how many texts were read.
    """
    sums: dict[int, torch.Tensor] = {}

    def note(layer: int, query: torch.Tensor, key: torch.Tensor, _: Mapping[str, Any]) -> None:
        q = query.float().abs().unflatten(1, (key.shape[1], -1)).mean(2)
        k = key.float().abs()
        total = {"q": q, "k": k, "qk": q * k}[by].sum((0, 2))
        sums[layer] = sums.get(layer, 0) + total

    _read_texts(model, texts, note, progress)
    return {
        f"layers.{layer}.channels": total.argsort(1, descending=True).short().cpu()
        for layer, total in sorted(sums.items())
    }


def measure_basis(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    progress: Callable[[int], None] = lambda read: None,
) -> dict[str, torch.Tensor]:
    """The principal directions of every KV head's keys after RoPE: `layers.N.basis [K, D, D]` float32.

    Rows by falling variance. `progress` is told how many texts were read.
    """
    many: dict[int, int] = {}
    sums: dict[int, torch.Tensor] = {}
    products: dict[int, torch.Tensor] = {}

    def note(layer: int, query: torch.Tensor, key: torch.Tensor, _: Mapping[str, Any]) -> None:
        k = key.double().transpose(0, 1).flatten(1, 2)  # [K, tokens, D]
        many[layer] = many.get(layer, 0) + k.shape[1]
        sums[layer] = sums.get(layer, 0) + k.sum(1)
        products[layer] = products.get(layer, 0) + k.transpose(1, 2) @ k

    def basis(layer: int) -> torch.Tensor:
        mean = sums[layer] / many[layer]
        covariance = products[layer] / many[layer] - mean[:, :, None] * mean[:, None]
        return torch.linalg.eigh(covariance).eigenvectors.flip(2).transpose(1, 2).float().contiguous().cpu()

    _read_texts(model, texts, note, progress)
    return {f"layers.{layer}.basis": basis(layer) for layer in sorted(sums)}


def measure_retrieval(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    progress: Callable[[int], None] = lambda read: None,
) -> dict[str, torch.Tensor]:
    """Score every KV head by how much it retrieves: `layers.N.retrieval [K, 1]` float32, from 0 to 1.

    The last eighth of each text is replaced by a repetition of what stands a third into it. The score is the
    share of their attention that the repeated tokens pay to where they stood first, on average; of a query
    group, its largest. `progress` is told how many texts were read.
    """
    sums: dict[int, torch.Tensor] = {}
    passages = [repeating(text) for text in texts]

    def note(layer: int, query: torch.Tensor, key: torch.Tensor, scoring: Mapping[str, Any]) -> None:
        total = key.shape[2]
        first, many = _passage(total)
        last = query[:, :, -many:].unflatten(1, (key.shape[1], -1))
        lengths = torch.full(key.shape[:2], total, device=key.device)
        counts = torch.full((1,), many, device=key.device)
        weights = ops.reference.window_weights(last, key, lengths, counts, **scoring)
        share = weights[..., first : first + many].sum(3) / many
        sums[layer] = sums.get(layer, 0) + share[0].cpu()

    _read_texts(model, passages, note, progress)
    return {
        f"layers.{layer}.retrieval": (total / len(texts)).amax(1, keepdim=True)
        for layer, total in sorted(sums.items())
    }


def repeating(text: Sequence[int]) -> list[int]:
    """The text as a retrieval prompt: its end is replaced by a passage that it has already said."""
    first, many = _passage(len(text))
    return [*text[: len(text) - many], *text[first : first + many]]


def _passage(length: int) -> tuple[int, int]:
    """Where the passage that is repeated begins, and how many tokens it has."""
    return length // 3, max(1, length // 8)


def _read_texts(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], note: Note, progress: Callable[[int], None]
) -> None:
    for read, tokens in enumerate(texts, 1):
        with torch.inference_mode(), _noting(note):
            model(input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=False)
        progress(read)
