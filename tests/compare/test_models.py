"""Several models in one file: measured one after the other, told apart everywhere."""

import gc
import json
import weakref

import pytest
from rich.console import Console
from tests.models import save_byte_llama

from kvsieve import UserError
from kvsieve.compare import cells, config, fit, results, run, samples
from kvsieve.compare.execute import local
from kvsieve.compare.markdown import markdown

TEXT = """\
    batch_size: 2
    tasks: [needle: {context: 80, samples: 2}]
    policies: [dense, h2o: {tokens: 20}]
    """


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models, of 2 and 4 query heads."""
    found = [tmp_path_factory.mktemp("models") / name for name in ("small", "large")]
    for heads, folder in enumerate(found, 1):
        save_byte_llama(folder, kv_heads=heads, positions=128)
    return [str(folder) for folder in found]


@pytest.fixture
def on(write):
    """Loads TEXT about these models, after `more` lines."""

    def on(models, text=TEXT, more=""):
        first = f"model: {json.dumps(models)}\n{more}"
        path = write(text, with_model=False)
        path.write_text(first + path.read_text())
        return config.load(path)

    return on


@pytest.fixture(scope="module")
def ran(folders, tmp_path_factory):
    """A run on both, what it printed, and for each loaded model whether an earlier one was still there."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "both.yaml"
    path.write_text(f"model: {json.dumps(folders)}\n" + "\n".join(map(str.strip, TEXT.splitlines())))
    loaded, alive = [], []

    def load_model(settings, load=local.load_model):
        gc.collect()
        alive.append([one() is not None for one in loaded])
        model = load(settings)
        loaded.append(weakref.ref(model))
        return model

    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "load_model", load_model)
        outcome = run.compare(config.load(path), folder / "out", console)
    return outcome, console.export_text(), alive


def test_never_two_models_are_in_memory(ran):
    assert ran[2] == [[], [False]]


def test_rows_and_tables_keep_the_models_apart(ran, folders):
    outcome = ran[0]
    assert [(row.model, row.policy) for row in outcome.rows] == [
        (folder, policy) for folder in folders for policy in ("dense", "h2o")
    ]
    found = results.Results(outcome.rows)
    assert [group.task for group in found.groups] == ["needle on small", "needle on large"]
    assert [group.column for group in found.groups] == ["needle 80 on small", "needle 80 on large"]
    assert [row.pairs for row in outcome.rows] == [None, 2, None, 2]  # each compared with its own dense
    assert "## needle on large" in markdown(found, [])
    small, large = (group.dense for group in found.groups)
    assert large.kv_bytes == 2 * small.kv_bytes


def test_ids_are_those_of_a_model_alone(ran, folders, on, tmp_path):
    stored = [record["cell"] for record in samples.read(ran[0].folder / "samples.jsonl")]
    alone = on(folders[1])
    model = local.load_model(alone.settings)
    assert [cell.id for cell in cells.expand(alone, model)] == list(dict.fromkeys(stored))[2:]


def test_the_folder_tells_of_both_and_repeats_the_run(ran, folders):
    folder, printed = ran[0].folder, ran[1]
    again = config.load(folder / "config.yaml")
    assert again.models == folders
    environment = json.loads((folder / "environment.json").read_text())
    small, large = (environment["models"][name]["parameters"] for name in folders)
    assert small < large
    assert "dtype" in environment
    assert "were measured with another" not in printed
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    before = (folder / "samples.jsonl").read_text()
    assert run.compare(again, folder, console).rows == ran[0].rows
    assert (folder / "samples.jsonl").read_text() == before
    assert "were measured with another" not in console.export_text()


def test_a_later_model_that_cannot_be_prepared_spoils_nothing(folders, on, tmp_path):
    (tmp_path / "empty").mkdir()
    models = [str(tmp_path / "empty"), folders[0]]
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    with pytest.raises(UserError):  # the first: before anything is written
        run.compare(on(models), tmp_path / "out", console)
    assert not (tmp_path / "out").exists()
    outcome = run.compare(on(models[::-1]), tmp_path / "out", console)
    assert list(outcome.failures) == [models[0]]
    assert [row.model for row in outcome.rows] == [folders[0]] * 2
    assert f"failed: model {models[0]}: " in console.export_text()


@pytest.mark.parametrize(
    ("models", "more", "message"),
    [
        ([], "", "1:1: model: an empty list names no model"),
        (["reference", 3], "", "1:22: model.1: must be text, not empty (got 3)"),
        (["reference", ""], "", "model.1: must be text, not empty"),
        (["reference", "a"], "revision: main\n", "2:11: revision: is one model's, and there are several"),
    ],
    ids=str,
)
def test_mistakes_in_a_list_of_models_have_their_place(on, models, more, message):
    with pytest.raises(UserError) as caught:
        on(models, more=more)
    assert message in str(caught.value)


def test_a_model_named_twice_is_measured_once(on):
    found = on(["reference", "reference"])
    assert found.models == ["reference"]
    assert found.remarks[0].endswith("model.1: the same as model.0; it is measured once")


def test_what_a_model_cannot_do_names_it(on, folders):
    text = TEXT.replace("80", "200").replace("h2o: {tokens: 20}", "sparq: {r: 32}")
    with pytest.raises(UserError) as caught:
        fit.check(on([*folders[:1], "reference", "./nowhere"], text))
    lines = str(caught.value).splitlines()
    assert [line.partition("yaml:")[2] for line in lines if "positions" in line] == [
        "3:9: tasks.0.needle: context 200 needs at least 201 positions with its answer, and "
        f"{folders[0]} has 128: the longest context here is at most 127"
    ]
    assert any(line.endswith(f"this model's heads have only 16 channels (on {folders[0]})") for line in lines)
    assert any("model.2: no such folder" in line for line in lines)
