"""A tiny random model over bytes, in a folder and in memory, and a way to write configurations."""

import textwrap

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import kvsieve
from kvsieve.compare import config, run
from kvsieve.reference_model.tokenizer import byte_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """2 layers, 2 query heads and 1 KV head of 16 channels, 512 positions."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(vocab_size=259, **shape, **heads)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


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
