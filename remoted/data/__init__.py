"""The data socket: frames from clients to the two use cases, and what happens back to them.

``server`` lets connections in, ``transport`` reads and writes frames, ``connection`` does what clients ask,
``following`` tells them what happens, ``callers`` knows when the process behind them has ended.
"""

from remoted.data.callers import Runners, watch_caller
from remoted.data.server import DataServer

__all__ = ["DataServer", "Runners", "watch_caller"]
