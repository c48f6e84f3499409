"""Fixtures of the training tests."""

import pytest
from training.toy_run import write_text


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """A folder with sums and a tokenizer, see `toy_run.write_text`; nobody writes into it."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    return str(folder)
