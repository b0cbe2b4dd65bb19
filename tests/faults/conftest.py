"""What several files of faults need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.service_manager import ServiceManager
from tests.harness import Host


@pytest.fixture
def manager(bare_host: Host) -> Iterator[ServiceManager]:
    """A daemon whose descriptors are kept over its restarts."""
    made = ServiceManager(bare_host)
    made.start()
    yield made
    bare_host.stop()
    made.close()
