"""Options of the integration tests."""


def pytest_addoption(parser):
    """Let the long tests be longer: `pytest tests/integration/test_many_starts.py --start-rounds 500`."""
    parser.addoption("--start-rounds", type=int, default=50, help="rounds of simultaneous starts (default 50)")
