"""Fixtures for all tests, and settings that must come first.

One torch thread: on two busy cores OpenMP's threads wait for each other. Without a GPU, Triton interprets its
kernels; it reads its variable once, when they are defined.
"""

import gc
import importlib.util
import os
import sys
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# A CUDA image, on which `make gpu` runs, need not have hypothesis.
collect_ignore = [] if importlib.util.find_spec("hypothesis") else ["kernels/test_bounds.py"]

gc.disable()  # until all tests are collected: it took a quarter of that time, and found nothing
torch.set_num_threads(1)
if not torch.cuda.is_available():  # with one, the ops are Triton's
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("KVSIEVE_OPS", "cpu")  # the others are chosen by the tests that compare them


# The longest files first: workers take whole files in order, and end together.
LONGEST = ["test_cpu_ops", "test_compile", "test_tensor_parallel", "test_families", "test_graph", "test_laws"]


def pytest_collection_modifyitems(items):
    """Bring the longest files to the front; skip tests that need a GPU where there is none."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A saved random model of bytes: 2 layers, 2 query heads and 1 KV head of 16 channels, 512 positions."""
    from tests.models import save_byte_llama

    folder = tmp_path_factory.mktemp("model")
    save_byte_llama(folder)
    return folder


@pytest.fixture(scope="session")
def few_words():
    """lm_eval pairs all adjectives with all nouns as RULER is imported, and sorts the millions: some will do.

    It would download nltk's data, too.
    """
    if not importlib.util.find_spec("nltk"):
        return
    import wonderwords

    every = wonderwords.RandomWord()._categories
    few = SimpleNamespace(_categories={kind: list(words)[::20] for kind, words in every.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nltk.download", lambda *arguments: False)
        patch.setattr(wonderwords, "RandomWord", lambda: few)
        importlib.import_module("lm_eval.tasks.ruler.prepare_niah")


class Recorded:
    """Stands for `StepGraph` on a CPU: "captures" the third step and replays that function."""

    captured = 0

    def __init__(self, device, generators=(), graph=None):
        self.graph, self.steps = graph, 0

    def __call__(self, step):
        self.steps += 1
        (self.graph or step)()
        if self.graph is None and self.steps == 3:
            self.graph = step
            Recorded.captured += 1


@pytest.fixture
def recorded(monkeypatch):
    """Decode steps are "captured" without a GPU too."""
    from kvsieve import graph

    monkeypatch.setattr(graph, "why_not", lambda cache, model: None if graph._wanted.capture else graph.EAGER)
    monkeypatch.setattr(graph, "StepGraph", Recorded)
    Recorded.captured = 0
    return Recorded


def lay_out(folder, name, code, entry_points, metadata):
    """Put a package where an installer would: its module beside a dist-info folder."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(metadata)
    (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package on sys.path, before all others."""

    def put(name, code, version="1.0", entry=None, point=None):
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        lay_out(tmp_path, name, code, f"[kvsieve]\n{point or name} = {entry or name}\n", metadata)
        plugins.reload()

    from kvsieve import plugins

    monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    monkeypatch.undo()
    for module in [
        name for name, found in sys.modules.items() if str(tmp_path) in str(getattr(found, "__file__", ""))
    ]:
        del sys.modules[module]
    plugins.reload()
