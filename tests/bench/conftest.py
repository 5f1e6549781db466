import pytest

from kvsieve.bench import timing


@pytest.fixture(autouse=True, scope="package")
def quick():
    """Tiny buffers and few rounds: the numbers mean nothing here, their bookkeeping does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "last_level_cache", lambda device: 2**16)
        patch.setattr(timing, "LEAST_ROUNDS", 2)
        patch.setattr(timing, "MOST_ROUNDS", 2)
        yield
