"""The processes that the tests of this folder share."""

import pytest

from distributed_world import World


@pytest.fixture(scope="session")
def world():
    """Four processes, with a group for the first 1, 2, 3 and 4 of them."""
    world = World(4)
    yield world
    world.close()
