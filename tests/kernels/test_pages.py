"""Pages: bounds hold every key and only those, scores are the best products, slots are the live ones."""

import pytest
import torch

from kvsieve.ops import cpu, reference
from kvsieve.ops import triton as triton_ops

from .tensors import DEVICE, NAN, normal, unwritten_is_nan

IMPLEMENTATIONS = [pytest.param(reference, id="reference"), pytest.param(triton_ops, id="triton")]
if DEVICE == "cpu":  # a machine with a GPU need not have numba
    from kvsieve.ops import numba as compiled

    IMPLEMENTATIONS += [pytest.param(cpu, id="cpu"), pytest.param(compiled, id="numba")]
every_implementation = pytest.mark.parametrize("ops", IMPLEMENTATIONS)

B, K, D = 2, 2, 12
FAR = [-1, -7, 2**40, -(2**62), 2**62]


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("page", "pieces"), [(4, (9, 1, 1, 1, 1, 6)), (5, (1,) * 7), (64, (30, 41, 1)), (1, (3, 1))]
)
def test_bounds_hold_what_came_and_touch_no_other_page(ops, dtype, page, pieces) -> None:
    total = sum(pieces)
    keys = normal(B, K, total, D, dtype=dtype)
    pages = -(-total // page) + 1
    stores = [torch.full((B + 1, K + 1, pages, D), 77.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    low, high = (store[:B, 1:] for store in stores)
    lengths = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    for new in pieces:
        counts = torch.tensor([new, 0 if new == 1 else new - 1], device=DEVICE)
        slots = (lengths[:, None] + torch.arange(new, device=DEVICE))[:, None].expand(B, K, new)
        index = slots.clamp(max=total - 1)[..., None].expand(-1, -1, -1, D)
        real = (torch.arange(new, device=DEVICE) < counts[:, None])[:, None, :, None]
        ops.widen_bounds(low, high, keys.gather(2, index).masked_fill(~real, 0), slots, counts, page)
        lengths += counts
    for b, length in enumerate(lengths.tolist()):
        for n in range(pages):
            mine = keys[b, :, n * page : min((n + 1) * page, length)]
            for bound, best in ((low, torch.amin), (high, torch.amax)):
                wanted = (
                    best(mine, 1) if mine.shape[1] else torch.full((K, D), 77.0, dtype=dtype, device=DEVICE)
                )
                assert torch.equal(bound[b, :, n], wanted)
    assert all((store[B] == 77).all() and (store[:, 0] == 77).all() for store in stores)


@every_implementation
def test_new_keys_outside_the_storage_are_not_written(ops) -> None:
    low, high = torch.zeros(1, 2, 3, D, device=DEVICE), torch.zeros(1, 2, 3, D, device=DEVICE)
    for first in (12, -4, 2**40):
        slots = torch.tensor([[[first]] * 2], device=DEVICE)
        ops.widen_bounds(
            low, high, normal(1, 2, 1, D), slots, torch.ones(1, dtype=torch.int64, device=DEVICE), 4
        )
    assert not low.any()
    assert not high.any()


@every_implementation
@pytest.mark.parametrize(("dtype", "group"), [(torch.float32, 1), (torch.float32, 3), (torch.float16, 4)])
def test_scores_are_the_best_products_within_the_bounds(ops, dtype, group) -> None:
    lengths = torch.tensor([[9, 0], [1, 6]], device=DEVICE)
    query = normal(B, K, group, D, dtype=dtype)
    both = normal(2, B, K, 13, D, dtype=dtype).sort(0).values
    dead = torch.arange(13, device=DEVICE) >= lengths[..., None]
    low, high = both.masked_fill(dead[..., None], NAN)[:, :, :, :9]
    with unwritten_is_nan():
        got = ops.page_scores(query, low, high, lengths)
    q, low, high = query.float()[:, :, :, None], low.float()[:, :, None], high.float()[:, :, None]
    wanted = torch.maximum(q * low, q * high).sum(-1).masked_fill(dead[:, :, None, :9], -torch.inf)
    torch.testing.assert_close(got, wanted)


@every_implementation
@pytest.mark.parametrize("page", [1, 4, 7])
def test_slots_are_the_live_ones_of_the_pages_that_count(ops, page) -> None:
    lengths = torch.tensor([[22, 0], [4, 21]], device=DEVICE)
    pages = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    pages = pages.view(B, K, 8).to(DEVICE)
    pages[0, 0, 2], pages[1, 1, 1] = FAR[0], FAR[2]
    counts = torch.tensor([[5, 8], [8, 0]], device=DEVICE)
    with unwritten_is_nan():
        slots, found = ops.slots_of_pages(pages, counts, page, lengths)
    assert slots.shape == (B, K, 8 * page)
    for b in range(B):
        for k in range(K):
            chosen, length = pages[b, k, : int(counts[b, k])].tolist(), int(lengths[b, k])
            wanted = {slot for n in chosen for slot in range(n * page, (n + 1) * page) if 0 <= slot < length}
            got = slots[b, k, : int(found[b, k])].tolist()
            assert len(got) == len(wanted)
            assert set(got) == wanted
            assert all(0 <= slot < max(length, 1) for slot in slots[b, k].tolist())


@every_implementation
def test_pages_far_outside_the_row_add_no_slot(ops) -> None:
    pages = torch.tensor([[[*FAR, 1, 0, 2]]], device=DEVICE)
    one = torch.tensor([[len(FAR) + 3]], device=DEVICE)
    slots, found = ops.slots_of_pages(pages, one, 4, torch.tensor([[10]], device=DEVICE))
    assert sorted(slots[0, 0, : int(found)].tolist()) == list(range(10))
