"""Whatever a policy answers, no op reads or writes outside a row and head, or lets dead slots show.

Storage stands among other rows, heads and slots that hold poison. Expected results come slot by slot.
"""

import itertools
import math
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsieve.cache.layouts import CHANNELS, KINDS, KeyLayout, slots_first
from kvsieve.ops import cpu, reference
from kvsieve.ops import triton as triton_ops
from kvsieve.ops.triton import launch

from .tensors import DEVICE, NAN, normal

IMPLEMENTATIONS = [pytest.param(reference, id="reference"), pytest.param(triton_ops, id="triton")]
if DEVICE == "cpu":
    IMPLEMENTATIONS.append(pytest.param(cpu, id="cpu"))
every_implementation = pytest.mark.parametrize("ops", IMPLEMENTATIONS)
few = settings(max_examples=6, deadline=None, derandomize=True)

B, K, G, D, T, S, R = 2, 2, 2, 16, 11, 6, 5
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
FAR = [-1, -2, -T, -(2**31), -(2**62), T, T + 1, T + 5, 3 * T, 2**31, 2**32 + 3, 2**62]


def per_head(values: st.SearchStrategy, *shape: int) -> st.SearchStrategy[torch.Tensor]:
    """Tensors `[B, K, *shape]` of such values."""
    many = B * K * math.prod(shape)
    return st.lists(values, min_size=many, max_size=many).map(
        lambda drawn: torch.tensor(drawn, device=DEVICE).view(B, K, *shape)
    )


def junk_slots(count: int) -> st.SearchStrategy[torch.Tensor]:
    """`[B, K, count]`: slots below T, each at most once, among others that are none."""
    one = st.permutations(range(T)).flatmap(
        lambda order: st.lists(st.sampled_from([*FAR, *[None] * 12]), min_size=count, max_size=count).map(
            lambda far: [slot if other is None else other for slot, other in zip(order, far, strict=False)]
        )
    )
    return st.lists(one, min_size=B * K, max_size=B * K).map(
        lambda drawn: torch.tensor(drawn, device=DEVICE).view(B, K, count)
    )


lengths_of_rows = per_head(st.integers(0, T))
any_counts = per_head(st.integers(-3, S + 3) | st.sampled_from([-(2**40), 2**32 - 1, 2**62]))
any_channels = per_head(st.integers(0, D - 1) | st.sampled_from([-1, -D, D, D + 3, 2**31, -(2**62)]), R)
any_layout = st.sampled_from(KINDS)
any_score = st.floats(-3, 3, width=32) | st.sampled_from([NAN, -NAN, math.inf, -math.inf, 0.0, -0.0])


def among_poison(poison: float, layout: str, numbers: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """`numbers [B, K, T, D]` where `live [B, K, T]`, slots first; poison in other slots, heads and rows."""
    like = numbers.new_empty(B + 2, K + 2, 1, D)
    name, store = list(KeyLayout(layout).stores(like, T + 9).items())[-1]
    whole = slots_first(name, store.fill_(poison))
    for slot in range(T):
        place = whole[1:-1, 1:-1, slot // 16, slot % 16] if whole.dim() == 5 else whole[1:-1, 1:-1, slot]
        place.copy_(numbers[:, :, slot].masked_fill(~live[..., slot, None], poison))
    inner = whole[1:-1, 1:-1]
    return inner if whole.dim() == 5 else inner[:, :, :T]


def live_of(lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(T, device=DEVICE) < lengths[..., None]


def slots_to_read(slots: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor) -> dict:
    """By row and head: the slots that an implementation may read."""
    return {
        (b, h): [s for s in slots[b, h, : max(0, int(counts[b, h]))].tolist() if 0 <= s < int(lengths[b, h])]
        for b, h in itertools.product(range(B), range(K))
    }


def attention(query, keys, values, read, sinks) -> tuple[torch.Tensor, torch.Tensor]:
    output, mass = torch.zeros_like(query), torch.zeros(B, K, T, device=DEVICE)
    for (b, h), slots in read.items():
        logits = query[b, h] @ keys[b, h, slots].T * 0.3
        weights = torch.cat([logits, sinks[h, :, None]], 1).softmax(1)[:, :-1]
        output[b, h] = weights @ values[b, h, slots]
        mass[b, h, slots] = weights.mean(0)
    return output, mass


@every_implementation
@few
@given(st.sampled_from(["single", "blocked"]), junk_slots(S), any_counts, lengths_of_rows)
def test_attention_reads_only_live_chosen_slots(ops: ModuleType, layout, slots, counts, lengths) -> None:
    query, sinks = normal(B, K, G, D), normal(K, G, seed=3)
    keys, values = normal(B, K, T, D, seed=1), normal(B, K, T, D, seed=2)
    read = slots_to_read(slots, counts, lengths)
    chosen = torch.zeros(B, K, T, dtype=torch.bool, device=DEVICE)
    for (b, h), mine in read.items():
        chosen[b, h, mine] = True
    stored = among_poison(NAN, layout, keys, chosen), among_poison(NAN, "single", values, chosen)
    output, mass = ops.attend(
        query, *stored, lengths, scale=0.3, sinks=sinks, slots=slots, counts=counts, want_mass=True
    )
    wanted, wanted_mass = attention(query, keys, values, read, sinks)
    torch.testing.assert_close(output, wanted, **CLOSE)
    torch.testing.assert_close(mass, wanted_mass, **CLOSE)


def test_whole_blocks_and_splits_of_slots_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SLOTS_PER_SPLIT", 32)
    many, total = 180, 150
    slots = torch.arange(many, device=DEVICE).expand(B, K, many).clone()
    slots[0, 0, :70] = -5  # the first piece, and the first block of the next
    slots[0, 1] = 10_000
    slots[1, 0, 64:128] = 2**40
    lengths = torch.full((B, K), total, device=DEVICE)
    counts = torch.tensor([[many, many], [many, -(2**40)]], device=DEVICE)
    query, keys, values = normal(B, K, G, D), normal(B, K, total, D, seed=1), normal(B, K, total, D, seed=2)
    how = {"scale": 0.3, "slots": slots, "counts": counts, "want_mass": True}
    output, mass = triton_ops.attend(query, keys, values, lengths, **how)
    wanted, wanted_mass = reference.attend(query, keys, values, lengths, **how)
    assert not wanted[0, 1].any()
    torch.testing.assert_close(output, wanted, **CLOSE)
    torch.testing.assert_close(mass, wanted_mass, **CLOSE)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS[:2])  # a CPU's fused attention would have to copy every value
@pytest.mark.parametrize("layout", ["single", "blocked"])
def test_attention_over_all_slots_is_untouched_by_dead_ones(ops: ModuleType, layout: str) -> None:
    lengths = torch.tensor([[T, 0], [1, 7]], device=DEVICE)
    query, keys, values = normal(B, K, G, D), normal(B, K, T, D, seed=1), normal(B, K, T, D, seed=2)
    found = []
    for poison in (0.0, 1e30, NAN):
        stored = [
            among_poison(poison, kind, numbers, live_of(lengths))
            for kind, numbers in ((layout, keys), ("single", values))
        ]
        found.append(ops.attend(query, *stored, lengths, scale=0.3, softcap=5.0, want_mass=True))
    for output, mass in found:
        assert torch.equal(output, found[0][0])
        assert torch.equal(mass, found[0][1])
    assert found[0][0].isfinite().all()


@every_implementation
@pytest.mark.parametrize("want_mass", [False, True])
def test_a_piece_of_a_prompt_is_untouched_by_dead_slots(ops: ModuleType, want_mass: bool) -> None:
    new = 4
    starts = torch.tensor([[6, 0], [3, 1]], device=DEVICE)
    counts = torch.tensor([4, 2], device=DEVICE)
    query, keys, values = normal(B, K, G, new, D), normal(B, K, T, D, seed=1), normal(B, K, T, D, seed=2)
    how = {"fresh": False, "scale": 0.3, "want_mass": want_mass}
    clean_output, clean_mass = reference.prefill(query, keys, values, starts, counts, **how)
    stored = [among_poison(NAN, "single", n, live_of(starts + counts[:, None])) for n in (keys, values)]
    output, mass = ops.prefill(query, *stored, starts, counts, **how)
    torch.testing.assert_close(output, clean_output, **CLOSE)
    if want_mass:
        torch.testing.assert_close(mass, clean_mass, **CLOSE)


@every_implementation
@few
@given(any_layout, any_channels, lengths_of_rows)
def test_scores_come_from_the_channels_and_live_slots_of_their_head(
    ops: ModuleType, layout: str, channels: torch.Tensor, lengths: torch.Tensor
) -> None:
    query, keys = normal(B, K, G, D), normal(B, K, T, D, seed=1)
    # each channel once: twice is left open
    channels = torch.where((channels[..., None] == channels[..., None, :]).tril(-1).any(-1), -7, channels)
    alive = live_of(lengths)
    scores = ops.channel_scores(query, among_poison(NAN, layout, keys, alive), lengths, channels, scale=0.3)
    only = torch.zeros_like(query)
    for b, h, i in itertools.product(range(B), range(K), range(R)):
        channel = int(channels[b, h, i])
        if 0 <= channel < D:
            only[b, h, :, channel] = query[b, h, :, channel]
    coverage = (only.abs().sum(3) / query.abs().sum(3)).clamp(min=1e-6)
    wanted = only @ keys.transpose(2, 3) * (0.3 / coverage.sqrt())[..., None]
    wanted = wanted.masked_fill(~alive[:, :, None], -math.inf)
    torch.testing.assert_close(scores[..., :T], wanted, atol=1e-4, rtol=1e-4)


@every_implementation
@few
@given(
    any_layout,
    st.sampled_from(["softmax", "logits"]),
    st.sampled_from([4, T + 20]),
    any_channels,
    lengths_of_rows,
)
def test_the_selection_is_live_and_untouched_by_dead_slots(
    ops: ModuleType, layout: str, group_score: str, k: int, channels: torch.Tensor, lengths: torch.Tensor
) -> None:
    query, keys = normal(B, K, G, D), normal(B, K, T, D, seed=1)
    how = {"size": T, "scale": 0.3, "group_score": group_score, "newest": 2}
    first, *others = (
        ops.top_by_channels(
            query, among_poison(poison, layout, keys, live_of(lengths)), lengths, channels, k, **how
        )
        for poison in (0.0, 1e30, NAN)
    )
    check_selection(*first[:2], lengths, k)
    missed = first[2]
    assert ((missed >= 0) & (missed <= 1.001)).all()
    assert not missed[lengths <= k].any()
    for other in others:
        check_selection(*other[:2], lengths, k)
        assert torch.equal(sets(*other[:2]), sets(*first[:2]))
        torch.testing.assert_close(other[2], missed, atol=1e-6, rtol=1e-5)


@every_implementation
@pytest.mark.parametrize("spoilt", [NAN, math.inf, -math.inf])
def test_a_selection_by_spoilt_scores_is_of_live_slots(ops: ModuleType, spoilt: float) -> None:
    lengths = torch.tensor([[9, 0], [1, 6]], device=DEVICE)
    query, keys = normal(B, K, G, D), normal(B, K, T, D, seed=1)
    keys[:, :, 0] = spoilt
    query[1, 1, 0] = spoilt
    channels = torch.arange(R, device=DEVICE).expand(B, K, R)
    for layout in ("single", "double"):
        stored = among_poison(NAN, layout, keys, live_of(lengths))
        for group_score in ("softmax", "logits"):
            how = {"size": T, "scale": 0.3, "group_score": group_score, "newest": 2}
            slots, counts, _ = ops.top_by_channels(query, stored, lengths, channels, 4, **how)
            check_selection(slots, counts, lengths, 4)


def check_selection(slots: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor, k: int) -> None:
    assert slots.shape == (B, K, min(k, T))
    assert torch.equal(counts, lengths.clamp(max=k))
    assert slots.min() >= 0
    assert slots.max() < T
    for b, h in itertools.product(range(B), range(K)):
        mine = slots[b, h, : int(counts[b, h])].tolist()
        assert len(set(mine)) == len(mine)
        assert max(mine, default=-1) < int(lengths[b, h])


def sets(slots: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The live ones of the slots, in order; -1 for the rest."""
    live = torch.arange(slots.shape[2], device=DEVICE) < counts[..., None]
    return slots.masked_fill(~live, -1).sort(2).values


@every_implementation
@few
@given(st.sampled_from([1, 4, T, T + 20]), per_head(any_score, T), lengths_of_rows)
def test_the_top_of_any_ranking_is_live_and_best(ops: ModuleType, k: int, ranking, lengths) -> None:
    stored = torch.full((B + 2, K + 2, T + 3), math.inf, device=DEVICE)
    view = stored[1:-1, 1:-1, :T].copy_(ranking.masked_fill(~live_of(lengths), NAN))
    slots, counts = ops.top_slots(view, lengths, k)
    check_selection(slots, counts, lengths, k)
    # NaN is the highest; below it the values, whichever of equal ones were taken
    highest = ranking.nan_to_num(100, posinf=90, neginf=-90)
    wanted = highest.masked_fill(~live_of(lengths), -200).topk(min(k, T)).values
    live = torch.arange(min(k, T), device=DEVICE) < counts[..., None]
    got = highest.gather(2, slots).masked_fill(~live, -200).sort(2, descending=True).values
    assert torch.equal(got, wanted.masked_fill(~live, -200))


def test_a_ranking_shorter_than_the_rows_is_read_to_its_end() -> None:
    ranking, lengths = normal(B, K, 7), torch.full((B, K), T, device=DEVICE)
    guarded = torch.full((B, K, 16), math.inf, device=DEVICE)
    guarded[..., :7] = ranking
    slots, counts = triton_ops.top_slots(guarded[..., :7], lengths, 5)
    assert (counts == 5).all()
    assert torch.equal(slots, ranking.topk(5).indices.sort().values)


def test_a_ranking_of_another_shape_is_refused() -> None:
    lengths = torch.full((B, K), T, device=DEVICE)
    with pytest.raises(RuntimeError, match="expand"):
        triton_ops.top_slots(normal(B + 1, K, T), lengths, 5)


@every_implementation
@pytest.mark.parametrize("count", [1, 4, 9])
@few
@given(any_layout, st.sampled_from([None, [True, False]]), st.data())
def test_only_slots_of_the_storage_are_written(
    ops: ModuleType, count: int, layout: str, active, data
) -> None:
    slots, new = data.draw(junk_slots(count)), normal(B, K, count, D)
    rows = None if active is None else torch.tensor(active, device=DEVICE)
    name, whole = list(KeyLayout(layout).stores(normal(B + 2, K + 2, 1, D), T + 9).items())[-1]
    inner = slots_first(name, whole.copy_(normal(*whole.shape, seed=4)))[1:-1, 1:-1]
    if name == CHANNELS or inner.dim() == 4:
        inner = inner[:, :, :T]
    held = inner.shape[2] * (inner.shape[3] if inner.dim() == 5 else 1)
    wanted = whole.clone()
    target = slots_first(name, wanted)[1:-1, 1:-1]
    for b, h, i in itertools.product(range(B), range(K), range(count)):
        slot = int(slots[b, h, i])
        if 0 <= slot < held and (active is None or active[b]):
            place = (slot // 16, slot % 16) if inner.dim() == 5 else (slot,)
            target[(b, h, *place)] = new[b, h, i]
    ops.append(inner, new, slots, rows)
    assert torch.equal(whole, wanted)


@every_implementation
@few
@given(slots=junk_slots(3))
def test_only_slots_of_a_column_are_written(ops: ModuleType, slots: torch.Tensor) -> None:
    whole = torch.zeros(B + 2, K + 2, T + 2, dtype=torch.int64, device=DEVICE)
    new = torch.arange(1, 1 + B * K * 3, device=DEVICE).view(B, K, 3)
    for i in range(3):
        ops.append(whole[1:-1, 1:-1, :T], new[..., i : i + 1], slots[..., i : i + 1])
    together = torch.zeros_like(whole)
    ops.append(together[1:-1, 1:-1, :T], new, slots)
    written = new[(slots >= 0) & (slots < T)]
    assert torch.equal(whole, together)
    assert sorted(whole[whole != 0].tolist()) == sorted(written.tolist())
    assert whole[1:-1, 1:-1, :T].sum() == whole.sum()


@every_implementation
@few
@given(any_layout, junk_slots(S))
def test_slots_outside_the_storage_are_kept_as_zeros(
    ops: ModuleType, layout: str, slots: torch.Tensor
) -> None:
    keys, everything = normal(B, K, T, D), torch.full((B, K), T, device=DEVICE)
    storage = among_poison(NAN, layout, keys, live_of(everything))
    held = storage.shape[2] * (storage.shape[3] if storage.dim() == 5 else 1)
    inside = ((slots >= 0) & (slots < T))[..., None]
    poisoned = ((slots >= T) & (slots < held))[..., None]  # slots of the last block
    kept = keys.gather(2, slots.clamp(0, T - 1)[..., None].expand(B, K, S, D)) * inside
    out = torch.full((B, K, S + 2, D), 7.0, device=DEVICE)
    ops.compact(storage, slots, out)
    torch.testing.assert_close(out[:, :, :S], kept.masked_fill(poisoned, NAN), rtol=0, atol=0, equal_nan=True)
    assert (out[:, :, S:] == 7).all()
