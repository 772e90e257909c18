"""Options of the acceptance tests."""


def pytest_addoption(parser):
    """Let the long tests be longer: `pytest tests/acceptance/test_chaos.py --chaos-rounds 300`."""
    parser.addoption("--chaos-rounds", type=int, default=30, help="rounds of the chaos test (default 30)")
