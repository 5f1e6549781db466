"""The tiny model of bytes in memory, and a way to write configurations."""

import textwrap

import pytest
from rich.console import Console

import kvsieve
from kvsieve.compare import config, run


@pytest.fixture(scope="session")
def model(model_folder):
    return kvsieve.load(str(model_folder))


@pytest.fixture
def write(tmp_path, model_folder):
    """Writes a configuration about the tiny model and returns its path."""

    def write(text, name="test.yaml", with_model=True):
        path = tmp_path / name
        first = f"model: {model_folder}\n" if with_model else ""
        path.write_text(first + textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def load(write):
    return lambda text, **options: config.load(write(text, **options))


@pytest.fixture
def compare(load, model, tmp_path):
    """Runs a configuration on the tiny model; what it printed is in `compare.console`."""

    def compare(text, out="out", **options):
        compare.console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
        return run.compare(load(text, **options), tmp_path / out, compare.console, model)

    return compare
