"""SURFACE: importing the client costs little, opens nothing, starts nothing."""

from __future__ import annotations

import subprocess
import sys

from tests.harness import ROOT

PROBE = """
import sys, threading, signal, os
before = set(sys.modules), threading.active_count(), signal.getsignal(signal.SIGINT), set(os.listdir("/proc/self/fd"))
import remoted_client
new = set(sys.modules) - before[0]
assert threading.active_count() == before[1] and signal.getsignal(signal.SIGINT) is before[2]
assert set(os.listdir("/proc/self/fd")) == before[3]
assert not new & {"cloudpickle", "asyncio", "socket", "json", "inspect", "pydantic", "aiohttp", "dataclasses", "typing"}, new
from remoted_client import *
missing = [name for name in remoted_client.__all__ if getattr(remoted_client, name, None) is None]
assert not missing, missing
assert "cloudpickle" not in sys.modules
print(sorted(new))
"""


def test_the_import_has_no_side_effects_and_every_public_name_exists() -> None:
    done = subprocess.run([sys.executable, "-S", "-c", PROBE.replace("import sys,", f"import sys; sys.path.insert(0, {str(ROOT / 'client')!r}); sys.path.append({_site()!r}); import", 1)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['__future__', 'remoted_client']"


def _site() -> str:
    import sysconfig

    return sysconfig.get_paths()["purelib"]
