import pytest

from omniconv.testing.harness import ContractError, run_check


@pytest.fixture(scope="session")
def assert_caught():
    """Return a function that runs a check and requires it to fail by its own name, with `words`."""

    def run(check, subject, words):
        with pytest.raises(ContractError) as caught:
            run_check(check, "Toy", subject)
        message = str(caught.value)
        assert caught.value.check == check.__name__
        assert message.startswith(f"Toy fails {check.__name__} (")
        assert words in message

    return run
