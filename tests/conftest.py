"""Fixtures that every folder uses."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.harness import Host, host

# A shell's background job (as CI may be) ignores SIGINT, and so would every script that we start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def bare_host() -> Iterator[Host]:
    """A host without a daemon."""
    with host() as made:
        yield made


@pytest.fixture
def daemon(bare_host: Host) -> Host:
    """A host with a daemon of its own."""
    return bare_host.start()


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Host]:
    """A daemon for tests that only call functions."""
    with host() as made:
        yield made.start()
