"""RULER through lm_eval: its prompts and its scores, as a task of a comparison and from the command line."""

import copy
import json
import os
import random
import sys
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'kvsieve[lm-eval]'")
pytest.importorskip("nltk", reason="RULER needs nltk: pip install 'kvsieve[lm-eval]'")

import nltk
from tests.models import save_byte_llama

import kvsieve
from kvsieve import UserError
from kvsieve.cli import app
from kvsieve.compare.tasks import Answer
from kvsieve.lm_eval import run
from kvsieve.lm_eval.ruler import Ruler
from kvsieve.testing import TASK_LAWS, tokenizers


def words():
    """A tokenizer with a token for every word, so that RULER's solved example has its 500 tokens."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


pytestmark = pytest.mark.usefixtures("few_words")
TOKENIZERS = {"bytes": tokenizers()["bytes"], "words": words()}


@pytest.fixture(autouse=True, scope="module")
def no_network():
    """lm_eval downloads nltk's data when it makes RULER's prompts, and asks pip what there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *arguments: False)
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_byte_llama(folder, positions=1300)
    return folder


@pytest.mark.parametrize(
    ("name", "tokenizer", "context", "function", "between"),
    [
        ("niah_single_1", "bytes", 1000, "niah_utils.niah_single_1", " "),
        ("niah_multikey_3", "words", 400, "niah_utils.niah_multikey_3", " "),
        ("vt", "words", 900, "vt_utils.get_vt_dataset", " "),
        ("cwe", "words", 700, "cwe_utils.get_cw_dataset", "\n\n"),
        pytest.param("fwe", "words", 320, "fwe_utils.fwe_download", " ", marks=pytest.mark.slow),
    ],
)
def test_prompts_and_references_are_those_of_lm_evals_functions(
    name, tokenizer, context, function, between, tmp_path
):
    tokenizer = TOKENIZERS[tokenizer]
    task = Ruler(context, samples=3, tasks=name)
    found = [task.sample(tokenizer, 0, i) for i in range(3)]
    tokenizer.save_pretrained(tmp_path)
    module, _, function = function.partition(".")
    random.seed(0)
    np.random.seed(1234)
    own = getattr(__import__(f"lm_eval.tasks.ruler.{module}", fromlist=[function]), function)
    if name == "cwe":  # as its generator is in a new process
        own.__globals__["RNG"].seed(42)
        own.__globals__["RNG"].shuffle(list(own.__globals__["WORDS"]))
    documents = own(tokenizer=str(tmp_path), max_seq_lengths=[context])["test"]
    for sample, document in zip(found, documents, strict=False):
        prompt = f"{document['input']}{between}{document['gen_prefix']}"
        assert list(sample.prompt) == tokenizer(prompt)["input_ids"]
        assert sample.references == document["outputs"]
    assert {len(document["outputs"]) for document in documents} == {len(found[0].references)}


def test_a_sample_does_not_depend_on_what_lm_eval_made_before():
    first = Ruler(700, tasks="cwe").sample(TOKENIZERS["words"], 0, 0)
    again = Ruler(700, samples=40, tasks="cwe").sample(TOKENIZERS["words"], 0, 0)  # not from memory
    assert again == first


def test_making_prompts_leaves_the_generators_as_they_were():
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    Ruler(400, tasks="niah_multikey_3").sample(TOKENIZERS["words"], 3, 0)
    assert (random.random(), np.random.random()) == expected


@pytest.mark.parametrize("text", ["", "12 and\n77", "\x00 AB12CD", "12, 77, ab", "77 77"])
def test_a_score_is_that_of_lm_eval(text):
    from lm_eval.tasks.ruler.common_utils import process_results, process_results_part

    sample = SimpleNamespace(references=["12", "77", "ab"])
    document = {"outputs": sample.references, "max_length": 700}
    score = Ruler(700).score(sample, Answer(text))
    assert process_results(document, [text])["700"] == score == process_results_part(document, [text])["700"]


@pytest.mark.parametrize("law", TASK_LAWS, ids=lambda law: law.__name__)
def test_it_obeys_the_laws_of_tasks(law):
    law(Ruler(1000))


def test_in_a_chat_the_beginning_of_the_answer_stands_in_the_models_turn():
    tokenizer = copy.deepcopy(TOKENIZERS["bytes"])
    with pytest.raises(UserError, match="no chat template"):
        Ruler(1000, chat=True).sample(tokenizer, 0, 0)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</turn>{% endfor %}"
    prompt = tokenizer.decode(Ruler(1100, chat=True).sample(tokenizer, 0, 0).prompt)
    asked, _, begun = prompt.removeprefix("<bos>").partition("</turn><assistant>")
    assert asked.startswith("<user>A special magic number is hidden") or asked.startswith("<user>Some")
    assert begun.startswith("The special magic number for ")
    assert begun.endswith(" is")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Ruler(900, tasks="vt"), "ruler_vt cannot be made for this tokenizer: its solved example takes"),
        (Ruler(300, tasks="cwe"), r"ruler_cwe needs a length of at least \d+ tokens here, not 300"),
        (Ruler(20, tasks="fwe"), r"ruler_fwe needs a length of at least \d+ tokens here, not 20"),
        (Ruler(200), "cannot load niah_single_1: Could not generate any sample .* max_seq_length=200"),
        (Ruler(1000, samples=501), "makes 500 prompts of ruler niah_single_1 .* samples cannot be 501"),
        (
            Ruler(tasks="niah_multikey_1"),
            "'baber/paul_graham_essays' .* Without the network run niah_single_1",
        ),
    ],
    ids=["vt", "cwe", "fwe", "niah_single_1", "samples", "essays"],
)
def test_what_cannot_be_made_is_one_sentence(task, message):
    """lm_eval itself would try the first three for ever."""
    with pytest.raises(UserError, match=message) as caught:
        task.sample(TOKENIZERS["bytes"], 0, 0)
    assert "\n" not in str(caught.value)


def test_data_that_are_missing_are_named(monkeypatch):
    Ruler(1000).sample(TOKENIZERS["bytes"], 0, 0)  # its module is loaded

    def refused(*arguments, **keywords):
        raise LookupError("\n****\n  Resource punkt_tab not found.\n****")

    def unreachable(*arguments, **keywords):
        raise OSError("HTTPSConnectionPool(host='rajpurkar.github.io', port=443): Max retries exceeded")

    monkeypatch.setattr(sys.modules["lm_eval.tasks.ruler.niah_utils"], "get_haystack", refused)
    with pytest.raises(UserError, match=r"python -m nltk\.downloader punkt_tab$"):
        Ruler(1000, tasks="niah_single_2").sample(TOKENIZERS["bytes"], 0, 0)
    monkeypatch.setattr("requests.get", unreachable)
    with pytest.raises(UserError, match=r"qa_squad: rajpurkar\.github\.io cannot be reached\. Without"):
        Ruler(1000, tasks="qa_1").sample(TOKENIZERS["bytes"], 0, 0)


def test_the_command_runs_them_with_the_models_tokenizer(model_folder, tmp_path):
    out = tmp_path / "results.json"
    arguments = ["lm-eval", "--model", model_folder, "--tasks", "niah_single_1", "--limit", "1", "--out", out]
    result = CliRunner().invoke(app, [*map(str, arguments), "--lengths", "1000"])
    assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    assert results["configs"]["niah_single_1"]["metadata"]["tokenizer"] == str(model_folder)
    (sample,) = results["samples"]["niah_single_1"]
    prompt = sample["arguments"]["gen_args_0"]["arg_0"] if isinstance(sample["arguments"], dict) else (
        sample["arguments"][0][0]
    )  # fmt: skip
    own = Ruler(1000).sample(TOKENIZERS["bytes"], 0, 0)
    assert list(own.prompt) == TOKENIZERS["bytes"](prompt)["input_ids"]
    assert results["results"]["niah_single_1"]["1000,none"] == 0
    wrong = CliRunner().invoke(app, [*map(str, arguments), "--lengths", "4k"])
    assert wrong.exit_code == 2
    assert "numbers of tokens with commas between them, not '4k'" in wrong.stderr


def test_lengths_are_the_models_positions_if_these_are_fewer(model_folder):
    model = kvsieve.load(str(model_folder), device="cpu")
    outcome = run.evaluate(model, ["niah_multikey_2"], limit=1, bootstrap_iters=0)
    assert outcome.results["configs"]["niah_multikey_2"]["metadata"]["max_seq_lengths"] == [1300]


def test_a_list_of_tasks_and_lengths_runs_in_a_comparison(model_folder, tmp_path):
    from rich.console import Console

    from kvsieve.compare import config
    from kvsieve.compare.run import compare

    path = tmp_path / "test.yaml"
    path.write_text(
        f"model: {model_folder}\ntasks:\n"
        "  - ruler: {context: [1000, 1100], tasks: [niah_single_1, vt], samples: 1}\n"
        "  - lm_eval: {task: niah_single_1, samples: 1, metric: '4096'}\n"
        "policies: [dense]\n"
    )
    listed = [task for task, _ in config.load(path).tasks]
    assert [(task.title, task.context) for task in listed[:-1]] == [
        (f"ruler {name}", context) for context in (1000, 1100) for name in ("niah_single_1", "vt")
    ]
    with pytest.raises(UserError, match="niah_single_1: it makes prompts to a length: `ruler` is the task"):
        listed[-1].source()
    one = f"model: {model_folder}\ntasks: [{{ruler: {{context: 1000, samples: 1}}}}]\npolicies: [dense]\n"
    path.write_text(one)
    outcome = compare(config.load(path), tmp_path / "out", Console(quiet=True))
    assert outcome.failures == {}
    assert [(row.task, row.context, row.score) for row in outcome.rows] == [("ruler niah_single_1", 1000, 0)]
