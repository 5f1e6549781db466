"""Sampling: options out of range are refused, and logits from which no token can be chosen are noticed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor

import kvsieve
from kvsieve import UserError
from kvsieve.sampling import Given, Sampler
from tests.models import tiny_llama

PROMPTS = [[5, 6, 7], [8, 9]]


def decode(**options):
    return list(kvsieve.decode(tiny_llama(), PROMPTS, max_new_tokens=3, **options))


@pytest.mark.parametrize(
    ("option", "value", "legal"),
    [
        ("temperature", 1e-45, "a finite number of at least 1e-06, not 1e-45"),
        ("temperature", math.nan, "a finite number of at least 1e-06, not nan"),
        ("temperature", math.inf, "a finite number of at least 1e-06, not inf"),
        ("temperature", 0, "a finite number of at least 1e-06, not 0; leave it out"),
        ("temperature", -1.0, "a finite number of at least 1e-06, not -1.0"),
        ("temperature", True, "a finite number of at least 1e-06, not True"),
        ("temperature", "1", "a finite number of at least 1e-06, not '1'"),
        ("top_p", math.nan, "a number from 0 to 1, not nan"),
        ("top_p", 1.5, "a number from 0 to 1, not 1.5"),
        ("top_p", -0.1, "a number from 0 to 1, not -0.1"),
        ("top_p", True, "a number from 0 to 1, not True"),
        ("top_k", 0, "a whole number of at least 1, not 0"),
        ("top_k", -3, "a whole number of at least 1, not -3"),
        ("top_k", True, "a whole number of at least 1, not True"),
        ("top_k", 2.0, "a whole number of at least 1, not 2.0"),
        ("seed", -1, r"a whole number from 0 to 2\*\*64 - 2, not -1"),
        (
            "seed",
            2**64 - 1,
            r"a whole number from 0 to 2\*\*64 - 2, not 18446744073709551615: row b of 2 draws",
        ),
        ("seed", 10**30, "a whole number from 0"),
        ("seed", 1.0, "a whole number from 0 .*not 1.0"),
        ("seed", True, "a whole number from 0 .*not True"),
        ("seed", None, "a whole number from 0 .*not None"),
    ],
)
def test_an_option_out_of_its_range_is_refused_before_any_work(option, value, legal):
    with pytest.raises(UserError, match=f"sampling: {option} must be {legal}"):
        kvsieve.decode(tiny_llama(), PROMPTS, max_new_tokens=1, **{option: value})


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-6},
        {"temperature": np.float32(0.7), "top_k": np.int64(3), "seed": np.int64(2)},
        {"temperature": 1e30},
        {"top_p": 0.0},
        {"top_p": 1, "seed": 2**64 - 2},
        {"top_k": 10**30},
    ],
)
def test_the_ends_of_the_ranges_draw_tokens_of_the_vocabulary(options):
    tokens = torch.stack(decode(**options))
    assert tokens.shape == (3, 2)
    assert ((tokens >= 0) & (tokens < 61)).all()


def test_the_coldest_temperature_takes_the_likeliest_token():
    assert torch.equal(torch.stack(decode(temperature=1e-6)), torch.stack(decode()))


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=2), st.just(torch.ones(2))
)


@settings(max_examples=200, deadline=None)
@given(temperature=anything, top_k=anything, top_p=anything, seed=anything)
def test_junk_is_a_user_error_or_a_sampler_that_can_choose(temperature, top_k, top_p, seed):
    try:
        sampler = Sampler(temperature, top_k, top_p, seed, None, PROMPTS, torch.device("cpu"))
    except UserError:
        return
    logits = torch.linspace(-60000.0, 60000.0, 61).repeat(2, 1)
    tokens = sampler(logits, torch.zeros(2, dtype=torch.bool))
    assert not sampler.broken
    assert ((tokens >= 0) & (tokens < 61)).all()


# ---------------------------------------------------------------- logits from which no token can be chosen
class Fill(LogitsProcessor):
    """Replaces the logits of one row from its second new token on."""

    def __init__(self, value, row=1):
        self.value, self.begins = value, PROMPTS[row][0]

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if input_ids.shape[1] >= 3:
            scores[input_ids[:, 0] == self.begins] = self.value
        return scores


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_a_processor_that_leaves_no_token_is_noticed(value, options):
    steps = kvsieve.decode(tiny_llama(), PROMPTS, max_new_tokens=3, logits_processor=[Fill(value)], **options)
    next(steps)
    with pytest.raises(UserError, match="no token can be chosen at new token 2: behind the logits_processor"):
        next(steps)


def test_a_processor_may_force_a_token_with_infinity_where_none_is_drawn():
    class Force(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, 7] = math.inf
            return scores

    assert all((tokens == 7).all() for tokens in decode(logits_processor=[Force()]))
    with pytest.raises(UserError, match="no token can be chosen at new token 1"):
        decode(logits_processor=[Force()], temperature=1.0)


@pytest.mark.parametrize("kind", ["sampler", "given"])
def test_broken_is_kept_in_place_and_ignores_rows_that_have_ended(kind):
    device = torch.device("cpu")
    choice = (
        Sampler(None, None, None, 0, None, PROMPTS, device)
        if kind == "sampler"
        else Given([[3, 4, 5], [6]], device)
    )
    place = choice.broken.data_ptr()
    good, bad = torch.zeros(2, 61), torch.zeros(2, 61)
    bad[1] = math.nan
    for logits, ended, broken in ((good, [0, 0], False), (bad, [0, 0], True), (bad, [0, 1], False)):
        choice(logits, torch.tensor(ended, dtype=torch.bool))
        assert choice.broken.tolist() is broken
        assert choice.broken.data_ptr() == place


def test_scoring_raises_where_decoding_does(monkeypatch):
    model = tiny_llama()
    forward = model.forward

    def broken_from_the_second_step(*args, **kwargs):
        out = forward(*args, **kwargs)
        if kwargs["past_key_values"].get_seq_length() > 3:
            out.logits[1] = math.nan
        return out

    monkeypatch.setattr(model, "forward", broken_from_the_second_step)
    with pytest.raises(UserError, match="logits are NaN: .*torch.float32"):
        kvsieve.score(model, PROMPTS, [[3, 4], [5, 6]])
    with pytest.raises(UserError, match="logits are NaN at new token 2"):
        decode()
    assert len(kvsieve.score(model, PROMPTS, [[3, 4], [5]])) == 2  # row 1 has ended before
