"""Order of the files, for two workers (`make test`)."""

import pytest

# Files of the first last minutes, of the last seconds: so the workers end at nearly the same time.
LANES = ("e2e", "engine", "megatron")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the whole stack first, those that start nothing last; a file stays together."""
    lanes: dict[str, int] = {}
    for item in items:
        lane = next((n for n, name in enumerate(LANES) if item.get_closest_marker(name)), len(LANES))
        lanes[item.nodeid.partition("::")[0]] = min(lane, lanes.get(item.nodeid.partition("::")[0], lane))
    items.sort(key=lambda item: lanes[item.nodeid.partition("::")[0]])
