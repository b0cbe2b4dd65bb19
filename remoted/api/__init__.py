"""The HTTP door: JSON on ``api.sock`` for ``remotectl``, curl and dashboards.

The only package that imports aiohttp. It parses, asks the use cases and replies; it decides nothing about jobs.
Who gets in is decided in ``guard`` (the connection) and ``routes`` (the table), before any handler runs.
"""

from __future__ import annotations

from remoted.api.server import ApiServer, serve
from remoted.api.services import Services

__all__ = ["ApiServer", "Services", "serve"]
