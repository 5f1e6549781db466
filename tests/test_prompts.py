"""Prompts: every form that is taken gives the same tokens, and everything else is refused before any work."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

import kvsieve
from kvsieve import UserError
from kvsieve.prompts import pad_token, token_lists
from kvsieve.reference_model.tokenizer import byte_tokenizer
from kvsieve.scoring import Scoring
from tests.models import tiny_llama

ROWS = [[5, 6, 7, 8], [9, 10]]
PADDED = {
    "left": ([[5, 6, 7, 8], [0, 0, 9, 10]], [[1, 1, 1, 1], [0, 0, 1, 1]]),
    "right": ([[5, 6, 7, 8], [9, 10, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]]),
    "both": ([[5, 6, 7, 8], [0, 9, 10, 0]], [[1, 1, 1, 1], [0, 1, 1, 0]]),
}


@pytest.fixture
def model(monkeypatch):
    """Pads with 0, ends with 60, has a tokenizer, and must not be run."""
    made = tiny_llama()
    monkeypatch.setattr(made.config, "pad_token_id", 0)
    monkeypatch.setattr(made.config, "eos_token_id", 60)
    monkeypatch.setattr(made.generation_config, "eos_token_id", 60)
    monkeypatch.setattr(made, "forward", lambda *_, **__: pytest.fail("work was done"))
    return made


# ---------------------------------------------------------------- forms that are taken
@pytest.mark.parametrize("side", PADDED)
@pytest.mark.parametrize(
    "form",
    [lambda rows: rows, torch.tensor, np.array, lambda rows: torch.tensor(rows, dtype=torch.int16)],
    ids=["lists", "tensor", "array", "int16"],
)
def test_what_a_tokenizer_returns_is_decoded_without_its_padding(model, side, form):
    ids, mask = PADDED[side]
    for mapping in (BatchEncoding, dict):
        assert token_lists(model, mapping({"input_ids": form(ids), "attention_mask": form(mask)})) == ROWS
    extra = BatchEncoding(
        {"input_ids": form(ids), "attention_mask": form(mask), "token_type_ids": form(mask)}
    )
    assert token_lists(model, extra) == ROWS


def test_a_real_tokenizers_answer_gives_the_tokens_of_its_texts(model, monkeypatch):
    reference = kvsieve.load("reference", device="cpu")
    texts, tokenizer = ["def main(", "x"], reference.tokenizer
    expected = token_lists(reference, texts)
    for side in ("left", "right"):
        monkeypatch.setattr(tokenizer, "padding_side", side)
        for options in ({}, {"padding": True}, {"padding": True, "return_tensors": "pt"}):
            assert token_lists(reference, tokenizer(texts, **options)) == expected
    with pytest.raises(UserError, match=r"input_ids is flat; give one list per row, .*tokenizer\(\[text\]\)"):
        token_lists(reference, tokenizer("def main("))


@pytest.mark.parametrize(
    "rows",
    [
        [[5, 6, 7], [8, 9, 10]],
        ((5, 6, 7), range(8, 11)),
        torch.tensor([[5, 6, 7], [8, 9, 10]]),
        np.array([[5, 6, 7], [8, 9, 10]], dtype=np.uint8),
        [torch.tensor([5, 6, 7]), np.array([8, 9, 10])],
        [[torch.tensor(5), np.int64(6), 7], [8, 9, 10]],
    ],
    ids=["lists", "tuples and ranges", "tensor", "array", "rows of tensors", "numbers of tensors"],
)
def test_token_ids_may_come_in_any_usual_container(model, rows):
    assert token_lists(model, rows) == [[5, 6, 7], [8, 9, 10]]


def test_masked_prompts_decode_and_score_as_plain_ones():
    model = tiny_llama()
    ids, mask = PADDED["right"]
    given_mask = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    tokens = [list(kvsieve.decode(model, p, max_new_tokens=3)) for p in (given_mask, ROWS)]
    assert torch.equal(torch.stack(tokens[0]), torch.stack(tokens[1]))
    scored, plain = kvsieve.score(model, given_mask, given_mask), kvsieve.score(model, ROWS, ROWS)
    assert all(map(torch.equal, scored, plain))


def test_a_list_of_ids_may_begin_with_the_pad_token(model):
    assert token_lists(model, [[0, 5, 6]]) == [[0, 5, 6]]
    with_mask = {"input_ids": [[0, 5, 6]], "attention_mask": [[1, 1, 1]]}
    assert token_lists(model, with_mask) == [[0, 5, 6]]


# ---------------------------------------------------------------- forms that are refused, by name and place
def mapping(ids=((5, 6),), **more):
    return {"input_ids": [list(row) for row in ids], **more}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "the prompts are None; give one text, a list of texts"),
        (3, r"the prompts are 3 \(int\)"),
        (2.5, r"the prompts are 2.5 \(float\)"),
        (object(), "the prompts are of type object"),
        (iter(["a"]), "the prompts are of type list_iterator"),
        (b"text", r"the prompt is bytes, not text: decode it, as in prompt.decode\(\)"),
        ([[5], b"text"], "prompt 1 is bytes, not text"),
        ([[5], None], "prompt 1 is None; give"),
        ([[5], {"input_ids": [5]}], "prompt 1 is of type dict"),
        ([], "no prompt was given"),
        (torch.zeros(0, 3, dtype=torch.int64), "no prompt was given"),
        ([[5], []], "prompt 1 is empty"),
        ([5, 6, 7], r"a flat list that begins with 5 \(int\); give one list .*: \[\[1, 2, 3\]\]"),
        ([True, False], r"a flat list that begins with True \(bool\)"),
        (torch.tensor([5, 6]), r"the prompts: the shape must be \[rows, tokens\], not \[2\]; .*ids\[None\]"),
        (torch.tensor(5), r"the shape must be \[rows, tokens\], not \[\]"),
        (torch.ones(1, 2, 3, dtype=torch.int64), r"the shape must be \[rows, tokens\], not \[1, 2, 3\]$"),
        (torch.ones(1, 2), r"whole numbers are needed, not Tensor torch.float32 \[1, 2\]"),
        (torch.ones(1, 2, dtype=torch.bool), r"prompt 0, token 0 is True \(bool\)"),
        (torch.ones(1, 2, dtype=torch.int64, device="meta"), "whole numbers are needed"),
        (np.ones((1, 2)), r"whole numbers are needed, not ndarray float64 \[1, 2\]"),
        ([[5, 6.0]], r"prompt 0, token 1 is 6.0 \(float\); token ids are whole numbers"),
        ([[5], [6, float("nan")]], r"prompt 1, token 1 is nan"),
        ([[5, True]], r"prompt 0, token 1 is True \(bool\)"),
        ([[5, "a"]], r"prompt 0, token 1 is 'a' \(str\)"),
        ([[[5, 6]]], "prompt 0, token 0 is of type list"),
        (
            [[5], [6, 61]],
            r"prompt 1 has a token id outside the vocabulary \(0 to 60\): 61 \(int\) at token 1",
        ),
        ([[5, -1]], r"prompt 0 has a token id outside .*: -1 \(int\) at token 1"),
        ([[10**6000]], r"prompt 0 has a token id outside .*: a very large number \(int\) at token 0"),
        ({"texts": ["a"]}, r"a dict with 'texts' \(str\); it needs 'input_ids'"),
        ({}, "a dict with nothing; it needs 'input_ids'"),
        (mapping(position_ids=[[0, 1]]), r"come with 'position_ids' \(str\), which kvsieve does not use"),
        ({"input_ids": None}, "input_ids: one list of whole numbers per row is needed, not None"),
        ({"input_ids": ["text"]}, "input_ids: one list of whole numbers per row is needed"),
        (mapping(attention_mask=[[1]]), "input_ids and attention_mask must be of one shape"),
        (
            mapping(attention_mask=[[1, 2]]),
            r"prompt 0: attention_mask is 2 \(int\) at column 1; it must be 0 or 1",
        ),
        (mapping(attention_mask=[[1, 1.0]]), r"attention_mask is 1.0 \(float\) at column 1"),
        (mapping(attention_mask=[[0, 0]]), "prompt 0 is empty: its attention_mask is 0 everywhere"),
        (mapping([[5, 6, 7]], attention_mask=[[1, 0, 1]]), "0 at column 1, between real tokens"),
        (
            torch.tensor([[5, 6], [7, 0]]),
            "prompt 1 ends with the pad token 0, and no mask says what is padding",
        ),
        (torch.tensor([[5, 6], [0, 7]]), "prompt 1 begins with the pad token 0"),
        (mapping([[5, 6], [0, 7]]), "prompt 1 begins with the pad token 0"),
        ("text", "prompt 0 is text, but the model has no tokenizer"),
    ],
)
def test_anything_else_is_refused_by_name_and_place(model, prompts, message):
    for refused in (
        lambda: kvsieve.decode(model, prompts, max_new_tokens=1),
        lambda: kvsieve.score(model, prompts, ROWS),
    ):
        with pytest.raises(UserError, match=message):
            refused()
    with pytest.raises(UserError, match=message.replace("prompt", "continuation", 1).split(", as in")[0]):
        Scoring(model, ROWS, prompts)


def test_an_end_token_that_also_pads_is_no_padding(model, monkeypatch):
    monkeypatch.setattr(model.config, "pad_token_id", 60)
    assert token_lists(model, torch.tensor([[60, 5], [6, 60]])) == [[60, 5], [6, 60]]


def test_text_that_is_not_unicode_is_refused(model, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", lambda text, **_: {"input_ids": [5] * len(text)}, raising=False)
    with pytest.raises(
        UserError, match=r"prompt 1 is not Unicode text: character 2 is the lone surrogate '\\udcff'"
    ):
        kvsieve.decode(model, ["good", "ab\udcff"], max_new_tokens=1)


def test_a_continuation_from_a_tokenizer_must_not_begin_a_text_again(model, monkeypatch):
    monkeypatch.setattr(model.config, "bos_token_id", 1)
    with pytest.raises(UserError, match="continuation 0 begins with 1, the token that begins a text"):
        Scoring(model, [[5]], mapping([[1, 6]]))
    assert token_lists(model, mapping([[1, 6]])) == [[1, 6]]


@pytest.mark.parametrize("ends", ["a", 2.5, [1, None], True, [[1]]])
def test_what_ends_a_row_must_be_token_ids(model, ends):
    with pytest.raises(UserError, match="eos_token_id must be a token id or a list of them, not"):
        kvsieve.decode(model, [[5]], max_new_tokens=1, eos_token_id=ends)


def test_a_pad_token_of_minus_one_is_none(model, monkeypatch):
    monkeypatch.setattr(model.config, "pad_token_id", -1)
    assert pad_token(model, [60]) == 60


# ---------------------------------------------------------------- generated junk
DTYPES = [
    torch.int64, torch.int32, torch.uint8, torch.uint16, torch.bool,
    torch.float32, torch.bfloat16, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip
SHAPES = st.lists(st.integers(0, 3), max_size=4)


@st.composite
def tensors(draw):
    kind = draw(st.sampled_from(DTYPES))
    values = torch.full(draw(SHAPES), draw(st.sampled_from([0, 1, 5, 60, 61, 200])))
    made = values.to(kind)
    if draw(st.booleans()):
        made = made.to_sparse() if kind in (torch.int64, torch.float32) else made.to("meta")
    return made


arrays = st.builds(
    np.full,
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from([0, 5, 61, 1.5, True, "a", None]),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 60),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(), max_size=4),  # surrogates too
    st.binary(max_size=4),
    st.builds(object),
    st.sampled_from([int, len, Ellipsis, np.int64(5), np.bool_(True), np.float32(2), range(3), {1}]),
    tensors(),
    arrays,
)
names = st.sampled_from(["input_ids", "attention_mask", "token_type_ids", "texts", 3, None])
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(names, inner, max_size=3),
        st.builds(lambda ids, mask: {"input_ids": ids, "attention_mask": mask}, inner, inner),
        st.lists(st.lists(st.integers(0, 60), max_size=3), max_size=3).map(lambda ids: {"input_ids": ids}),
        st.lists(inner, max_size=2).map(iter),
    ),
    max_leaves=6,
)


@functools.cache
def tokenizer_once():
    return byte_tokenizer()


class Still:
    """All that token_lists may ask of a model; it cannot be run."""

    def __init__(self, tokenizer):
        self.tokenizer, self.config = tokenizer, tiny_llama().config

    def get_input_embeddings(self):
        return torch.nn.Embedding(300, 1, device="meta")


@settings(max_examples=600, deadline=None)
@given(prompts=junk, has_tokenizer=st.booleans())
@pytest.mark.filterwarnings("ignore:Sparse")
def test_junk_is_a_user_error_or_rows_of_token_ids(prompts, has_tokenizer):
    model = Still(tokenizer_once() if has_tokenizer else None)
    for what in ("prompt", "continuation"):
        try:
            rows = token_lists(model, prompts, what)
        except UserError as error:
            assert what in str(error) or "input_ids" in str(error) or "attention_mask" in str(error)
            assert len(str(error)) < 600
            continue
        assert rows
        for row in rows:
            assert row
            assert all(type(token) is int and 0 <= token < 300 for token in row)
