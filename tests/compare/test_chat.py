"""Tasks, `generate` and `lm-eval` in a model's own chat template."""

import copy
import json
import re

import pytest
from typer.testing import CliRunner

from kvsieve import UserError
from kvsieve.cli import app
from kvsieve.compare import identity
from kvsieve.compare.tasks import KeyValue, Needle, Passkey, Retrieval
from kvsieve.compare.tasks import text as texts
from kvsieve.testing import tokenizers

TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</turn>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chatting(name):
    tokenizer = copy.deepcopy(tokenizers()[name])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("name", tokenizers())
@pytest.mark.parametrize(
    "task", [Retrieval(1100, kind="multivalue", chat=True), Retrieval(1100, kind="common_words", chat=True),
             Passkey(700, chat=True), Needle(500, chat=True), KeyValue(400, chat=True)],
    ids=lambda task: task.title,
)  # fmt: skip
def test_a_prompt_is_a_turn_of_the_user_and_the_beginning_of_an_answer(task, name):
    tokenizer = chatting(name)
    sample = task.sample(tokenizer, 0, 1)
    prompt = texts.decode(tokenizer, sample.prompt)
    assert len(sample.prompt) == task.context
    begin = tokenizer.bos_token or ""
    assert re.fullmatch(re.escape(begin) + r" ?<user> ?.*\? ?</turn><assistant>.*", prompt, re.DOTALL)
    lead = prompt.rpartition("<assistant>")[2]
    assert re.fullmatch(r' ?(The (p|s).* (are|is)|Answer:|{"[0-9a-f]{8}": ")', lead)


@pytest.mark.parametrize("cls", [Needle, KeyValue])
def test_a_question_asked_after_the_text_ends_the_users_turn(cls):
    tokenizer = chatting("bytes")
    sample = cls(500, question="after", chat=True).sample(tokenizer, 0, 1)
    assert "</turn>" not in tokenizer.decode(sample.prompt)
    assert re.fullmatch(r"\nWhat is .*\?</turn><assistant>[{T].*", tokenizer.decode(sample.questions[0]))


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(UserError, match="no chat template"):
        Passkey(700, chat=True).sample(tokenizers()["bpe"], 0, 0)


def test_another_template_is_another_protocol(model, monkeypatch):
    before = identity._tokenizer(model)
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    assert identity._tokenizer(model) != before


@pytest.fixture
def chat_model(model_folder, tmp_path):
    folder = tmp_path / "chat"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": TEMPLATE}))
    return folder


def generate(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments), "--max-new-tokens", "4"])


def test_generate_asks_in_the_template(chat_model, model_folder):
    shown = generate("hello", "--model", chat_model, "--chat")
    assert shown.exit_code == 0
    tokens = len("<user>hello</turn><assistant>") + 1
    assert f"{tokens} + 4 tokens" in shown.stderr
    plain = generate("<user>hello</turn><assistant>", "--model", model_folder)
    assert shown.stdout == plain.stdout
    refused = generate("hello", "--model", model_folder, "--chat")
    assert refused.exit_code == 2
    assert "no chat template" in refused.stderr


def test_lm_eval_refuses_a_model_without_a_template(model_folder):
    pytest.importorskip("lm_eval")
    shown = CliRunner().invoke(app, ["lm-eval", "--tasks", "x", "--model", str(model_folder), "--chat"])
    assert shown.exit_code == 2
    assert "no chat template" in shown.stderr
