"""lm_eval's tasks under a policy: dense is lm_eval's own HFLM, and a policy acts on every scored token."""

import json
import os
import subprocess
import sys
import textwrap

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import kvsieve
from kvsieve import UserError
from kvsieve.cli import app
from kvsieve.reference_model.tokenizer import byte_tokenizer

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'kvsieve[lm-eval]'")
pytest.importorskip("accelerate", reason="lm_eval's HFLM needs accelerate: pip install 'kvsieve[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kvsieve.lm_eval import loading, run
from kvsieve.lm_eval.model import PolicyLM
from tests.models import save_byte_llama

pytestmark = pytest.mark.usefixtures("few_words")
POSITIONS = 96
TIGHT = kvsieve.make_policy("local_window", budget=4, sinks=0)
DOCUMENTS = [
    {
        "text": "The sky above the harbour was the colour of",
        "choices": [" slate", " milk", " a bee"],
        "label": 0,
    },
    {"text": "Two and two are", "choices": [" 4", " 5", " x"], "label": 1},
    {"text": "She put the book on", "choices": [" the table", " fire", " and on and on"], "label": 2},
]
TASKS = {
    "tiny_choice": """
        output_type: multiple_choice
        doc_to_text: "{{text}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: label
        target_delimiter: ""
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """,
    "tiny_words": """
        output_type: generate_until
        doc_to_text: "{{text}}"
        doc_to_target: "{{choices[label]}}"
        generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
        metric_list: [{metric: exact_match}]
        """,
    "tiny_rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}} {{text}} {{text}}"
        metric_list: [{metric: bits_per_byte}]
        """,
}


@pytest.fixture(autouse=True, scope="module")
def no_inventory():
    """lm_eval asks pip and the operating system what there is, for every evaluation: seconds each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    # Large weights, so that attention matters.
    save_byte_llama(folder, kv_heads=2, positions=POSITIONS, initializer_range=0.4)
    return folder


@pytest.fixture(scope="module")
def model(model_folder):
    return kvsieve.load(str(model_folder), device="cpu")


@pytest.fixture(scope="module")
def stock(model_folder):
    """lm_eval's own, on a model that kvsieve has not touched."""
    untouched = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return HFLM(pretrained=untouched, tokenizer=byte_tokenizer(), batch_size=2, device="cpu")


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(head + textwrap.dedent(body))
    return folder


def requests(kind, *arguments):
    return [Instance(kind, {}, given, 0, ("test", 0, 1)) for given in arguments]


def log_likelihoods(lm, *pairs):
    return lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


LONG = "abc defg " * 14  # more than the model has positions
PAIRS = [("The sky is", " blue"), ("", "Once upon"), ("A", "B"), (LONG, " the end"), ("x" * 60, "y" * 40)]


def test_dense_log_likelihoods_are_those_of_hflm(model, stock):
    for batch_size in (1, 3):
        ours = log_likelihoods(PolicyLM(model, batch_size=batch_size), *PAIRS)
        for (mine, greedy), (theirs, theirs_greedy) in zip(ours, log_likelihoods(stock, *PAIRS), strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
            assert greedy == theirs_greedy


def test_greedy_is_told_as_hflm_tells_it(model, stock):
    context = "The sky is"
    (likeliest,) = kvsieve.decode(model, [list(context.encode())], max_new_tokens=1)
    pairs = [
        (None, list(context.encode()), [token]) for token in (int(likeliest), (int(likeliest) + 1) % 256)
    ]
    for lm in (stock, PolicyLM(model)):
        assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs, disable_tqdm=True)] == [True, False]


def test_rolling_windows_are_those_of_hflm(model, stock):
    texts = requests("loglikelihood_rolling", (LONG + "and so on",), ("short",))
    ours = PolicyLM(model, batch_size=2).loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours == pytest.approx(stock.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3)


def test_a_policy_acts_on_every_scored_token_here_and_on_none_in_stock_scoring(model):
    """HFLM on a prepared model: the policy is there in name only."""
    pairs = [(LONG[:80], " the end"), (LONG[:80], "a")]  # an answer of one token, too
    dense, tight = (log_likelihoods(PolicyLM(model, policy), *pairs) for policy in (None, TIGHT))
    assert all(abs(a - b) > 1e-2 for (a, _), (b, _) in zip(dense, tight, strict=True))

    class Stock(HFLM):
        def _model_call(self, inps, attn_mask=None, labels=None):
            with torch.no_grad():
                return self.model(inps, past_key_values=kvsieve.KVCache(self.model, TIGHT)).logits

    stock = Stock(pretrained=model, tokenizer=model.tokenizer, batch_size=1)
    for (a, _), (b, _) in zip(dense, log_likelihoods(stock, *pairs), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("policy", [TIGHT, kvsieve.make_policy("kvzip", repeat="Again:")], ids=str)
def test_a_log_likelihood_is_the_sum_of_what_score_says(model, policy):
    context, continuation = [256, *b"The sky above"], list(b" is")  # a text begins with <bos>
    (scored,) = kvsieve.score(model, [context[:-1]], [context[-1:] + continuation], policy)
    ((found, _),) = log_likelihoods(PolicyLM(model, policy), ("The sky above", " is"))
    assert found == pytest.approx(float(scored[1:].sum()), abs=1e-5)


def test_dense_generation_is_that_of_hflm(model, stock):
    for until, size in ([" "], 20), ([], 9), (["e", "\x00"], 14):
        asked = requests(
            "generate_until", *((d["text"], {"until": until, "max_gen_toks": size}) for d in DOCUMENTS)
        )
        ours = PolicyLM(model, batch_size=2).generate_until(asked, disable_tqdm=True)
        assert ours == stock.generate_until(asked, disable_tqdm=True)


def test_generation_stops_at_a_stop_string(model):
    lm = PolicyLM(model)
    asked = {"until": [], "max_gen_toks": 40}
    with kvsieve.transfer.measure() as whole:
        (said,) = lm.generate_until(requests("generate_until", ("She put", asked)), disable_tqdm=True)
    stop = said[5]
    with kvsieve.transfer.measure() as cut:
        (short,) = lm.generate_until(
            requests("generate_until", ("She put", asked | {"until": [stop]})), disable_tqdm=True
        )
    assert short == said.split(stop)[0]
    assert cut.steps < whole.steps
    assert lm.kv_bytes > 0


def test_sampling_is_reproducible_and_repeats_differ(model):
    kwargs = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    asked = requests("generate_until", *[("She put", kwargs)] * 2)
    one, again = (PolicyLM(model, seed=3).generate_until(asked, disable_tqdm=True) for _ in range(2))
    assert one == again
    assert one[0] != one[1]


def test_an_unknown_way_to_generate_is_refused(model):
    asked = requests("generate_until", ("x", {"until": [], "max_gen_toks": 2, "num_beams": 4}))
    with pytest.raises(UserError, match="'num_beams'; Legal: do_sample"):
        PolicyLM(model).generate_until(asked, disable_tqdm=True)


def test_a_log_likelihood_that_is_not_a_number_is_an_error(model):
    hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + float("inf"))
    try:
        with pytest.raises(UserError, match=r"NaN: the model's weights or its dtype \(torch.float32\)"):
            log_likelihoods(PolicyLM(model), *PAIRS[:1])
    finally:
        hook.remove()


def flat(values):
    return [x for value in values for x in (flat(value) if isinstance(value, list | tuple) else [value])]


def numbers(values):
    return [value for value in flat(values) if isinstance(value, float)]


def texts(values):
    return [value for value in flat(values) if not isinstance(value, float)]


def test_an_evaluation_is_that_of_hflm_in_every_metric(model, stock, task_folder):
    import lm_eval

    ours = run.evaluate(model, list(TASKS), include_path=task_folder, batch_size=2, bootstrap_iters=0)
    theirs = lm_eval.simple_evaluate(
        stock, tasks=list(TASKS), task_manager=loading.load(list(TASKS), task_folder)[0], bootstrap_iters=0
    )
    for task in TASKS:
        mine, other = ours.results["results"][task], theirs["results"][task]
        values = {name for name, value in other.items() if isinstance(value, float) and "stderr" not in name}
        assert values
        for name in values:
            assert mine[name] == pytest.approx(other[name], abs=1e-4), (task, name)
        for a, b in zip(ours.results["samples"][task], theirs["samples"][task], strict=True):
            assert numbers(a["filtered_resps"]) == pytest.approx(numbers(b["filtered_resps"]), abs=1e-3)
            assert texts(a["filtered_resps"]) == texts(b["filtered_resps"])
    assert ours.bytes_ratio == 1
    assert "tiny_choice" in ours.table


def test_a_compression_refers_to_the_mean_prompt(model, task_folder):
    asked = []

    def make(context):
        asked.append(context)
        return TIGHT

    outcome = run.evaluate(model, ["tiny_words"], make, include_path=task_folder)
    assert asked == [round(sum(1 + len(d["text"]) for d in DOCUMENTS) / len(DOCUMENTS))]  # with <bos>
    assert outcome.bytes_ratio < 0.5
    run.evaluate(model, ["tiny_words"], make, include_path=task_folder, context=77, limit=1)
    assert asked[1:] == [77]


def test_from_the_command_line(model_folder, task_folder, tmp_path):
    arguments = [
        "lm-eval",
        "--model",
        model_folder,
        "--policy",
        "sparq",
        "--compression",
        "1/2",
        "-p",
        "local=2",
    ]
    arguments += ["--tasks", "tiny_choice,tiny_words", "--include-path", task_folder, "--trust-task-code"]
    arguments += ["--limit", "2"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path / "out" / "results.json")])
    assert result.exit_code == 0, result.output
    assert "|tiny_choice|" in result.stdout
    assert "of dense attention's bytes read" in result.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["kvsieve"]["policy"]["sparq"]["local"] == 2
    assert 0 < results["kvsieve"]["bytes_ratio"] < 1
    assert results["n-samples"]["tiny_choice"]["effective"] == 2


def test_a_mistake_is_a_message(model_folder, task_folder, tmp_path):
    def fails(*arguments):
        result = CliRunner().invoke(app, ["lm-eval", "--model", str(model_folder), *map(str, arguments)])
        assert result.exit_code == 2, result.output
        return result.stderr

    nowhere = ["--tasks", "x", "--include-path", tmp_path / "nowhere"]
    assert "run code: if you trust them, give --trust-task-code, too" in fails(*nowhere)
    assert "no such folder" in fails(*nowhere, "--trust-task-code")
    assert "unknown policy 'sparc'" in fails("--tasks", "x", "--policy", "sparc")


def test_without_lm_eval_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from kvsieve.lm_eval import require\n"
        "from kvsieve import UserError\n"
        "try: require()\n"
        "except UserError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'kvsieve[lm-eval]'" in found.stdout


# -------------------------------------------------------------------- in a comparison
@pytest.fixture
def compare(tmp_path, model, model_folder, task_folder):
    """Runs a comparison of lm_eval tasks; gives the rows of its summary by task and policy."""
    from rich.console import Console

    from kvsieve.compare import config
    from kvsieve.compare.run import compare

    def run(tasks, policies="[dense, local_window: {budget: 4, sinks: 0}]"):
        path = tmp_path / "test.yaml"
        entries = "".join(f"  - lm_eval: {{include_path: {task_folder}, {task}}}\n" for task in tasks)
        path.write_text(f"model: {model_folder}\nbatch_size: 2\ntasks:\n{entries}policies: {policies}\n")
        outcome = compare(
            config.load(path, trust_task_code=True), tmp_path / "out", Console(quiet=True), model
        )
        assert outcome.failures == {}
        return {(row.task, row.policy): row for row in outcome.rows}

    return run


def test_in_a_comparison_the_score_is_lm_evals_own_metric(compare, model, task_folder):
    rows = compare(
        [
            "task: tiny_choice, metric: acc_norm, context: 64, samples: 3",
            "task: tiny_words, metric: exact_match, samples: 2",
        ]
    )
    assert list(rows) == [(t, p) for t in ("tiny_choice", "tiny_words") for p in ("dense", "local_window")]
    for policy, made in (("dense", None), ("local_window", TIGHT)):
        whole = run.evaluate(model, ["tiny_choice"], made, include_path=task_folder, bootstrap_iters=0)
        row = rows["tiny_choice", policy]
        assert row.score == pytest.approx(whole.results["results"]["tiny_choice"]["acc_norm,none"])
        assert row.score_low <= row.score <= row.score_high
        assert row.bytes_ratio == pytest.approx(whole.bytes_ratio)
        assert (row.metric, row.context, row.samples) == ("acc_norm", 64, 3)
    assert rows["tiny_choice", "local_window"].kv_bytes < rows["tiny_choice", "dense"].kv_bytes


def test_a_comparison_is_quiet(compare, capfd):
    from kvsieve.lm_eval import task

    task._load.cache_clear()
    task._requests.cache_clear()
    compare(["task: tiny_choice, samples: 1"], "[dense]")
    assert capfd.readouterr() == ("", "")


def test_a_comparison_goes_on_where_it_stopped(compare, monkeypatch):
    task = "task: tiny_choice, samples: "
    compare([task + "1"], "[dense]")
    asked = []
    stock = run.ask
    monkeypatch.setattr(
        run, "ask", lambda lm, task, documents: asked.extend(documents) or stock(lm, task, documents)
    )
    row = compare([task + "3"], "[dense]")["tiny_choice", "dense"]
    assert [requests[0].doc_id for requests in asked] == [1, 2]
    assert row.samples == 3


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "task: tiny_choice, samples: 3, metric: acc_nrm",
            "unknown metric of lm_eval's tiny_choice 'acc_nrm'; did you mean 'acc_norm'?",
        ),
        ("task: tiny_choice, samples: 4", "tiny_choice has 3 documents: samples cannot be 4"),
        ("task: tiny_choice, samples: 3, higher_is_better: false", "higher_is_better is True there"),
        ("samples: 4", "task: must be given"),
    ],
)
def test_a_mistake_in_a_comparison_is_a_message(compare, task, message):
    with pytest.raises(UserError, match="test.yaml:") as raised:
        compare([task])
    assert message in str(raised.value)
