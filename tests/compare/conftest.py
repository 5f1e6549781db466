"""The tiny model of bytes in memory, and a way to write configurations."""

import textwrap

import pytest

import kvsieve
from kvsieve.compare import config


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
