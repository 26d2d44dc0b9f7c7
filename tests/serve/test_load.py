"""The short form of soak's `serve`: many clients, good and bad, and nothing is lost or mixed."""

import asyncio

from tests.serve.clients import until
from tests.serve.load import Load


def test_good_clients_are_answered_among_bad_ones(port, served):
    load = Load(port, 0)
    asyncio.run(load.run(clients=16, seconds=2))
    assert set(load.found) <= set(Load.GOOD), load.found
    assert {"answered", "streamed", "hung up"} <= set(load.found)
    until(lambda: served.engine.pending == 0)
    until(lambda: not served.engine._generator.busy)
