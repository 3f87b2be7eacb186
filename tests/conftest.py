"""In which order files are tested."""

LONGEST = "test_run.py"


def pytest_collection_modifyitems(items):
    """Let the longest file be first: begun late, it would leave the other worker without work."""
    items.sort(key=lambda item: item.path.name != LONGEST)
