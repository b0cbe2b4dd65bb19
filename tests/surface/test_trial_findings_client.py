"""What a new user ran into: each of these was a silence, a wrong word or a value in the wrong place."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.harness import Host, wait_until

HEAD = """
import asyncio, json, logging, os, sys, time
import remoted_client as rc
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer, Job, as_completed
queue = CpuLiveServerless(name="queue")
direct = CpuLiveLoadBalancer(name="direct")
"""


def _files_with(word: str, folder: Path) -> list[str]:
    return subprocess.run(["grep", "-rlae", word, str(folder)], capture_output=True, text=True, check=False).stdout.split()


def test_f16_no_literal_of_env_is_kept_by_the_daemon(shared_daemon: Host) -> None:
    shared_daemon.write(
        "with_values.py",
        '''
        import os
        import remoted_client as rc
        from remoted_client import remote as far
        config = rc.CpuLiveServerless(name="m", env={"IN_CONFIG": "literal-a"})
        @far(config, env={
            "LONG": """literal-b
        and more""", "SUM": "literal-c" + "é",
        })
        def step(): return [os.environ[name][::-1] for name in ("IN_CONFIG", "LONG", "SUM")]
        @far(config, max_retries=0)
        def fails(): raise ValueError("line 13")
        ''',
    )
    result = shared_daemon.run(
        HEAD
        + """
import with_values
NAMED = "literal-d"
config = CpuLiveServerless(name="x", env={"IN_CONFIG": "literal-e"})
@remote(config, env={"PLAIN": "literal-f", "NAMED": NAMED})
def f(): return [os.environ[name][::-1] for name in ("IN_CONFIG", "PLAIN", "NAMED")], config.name
print(json.dumps([f().result().unwrap(), with_values.step().result().unwrap(), with_values.fails().result().exception.remote_traceback]))
"""
    )
    ((names, config), module, trace) = result.json
    assert [value[::-1] for value in names] == ["literal-e", "literal-f", "literal-d"]
    assert config == "x"
    assert [value[::-1] for value in module] == ["literal-a", "literal-b\nand more", "literal-cé"]
    assert 'with_values.py", line 11, in fails\n    def fails(): raise ValueError("line 13")' in trace.replace("line 12", "line 11")
    wait_until(lambda: not _files_with("literal-", shared_daemon.state), 10, lambda: str(_files_with("literal-", shared_daemon.state)))


def test_f16_a_nested_function_has_the_values_of_its_own_env(shared_daemon: Host) -> None:
    shared_daemon.write(
        "inner.py",
        """
        import os
        from remoted_client import CpuLiveServerless, remote
        @remote(CpuLiveServerless(name="inner"), env={"OF_INNER": "module"})
        def step(): return os.environ["OF_INNER"]
        """,
    )
    result = shared_daemon.run(
        HEAD
        + """
import inner
@remote(CpuLiveServerless(name="leaf"), env={"OF_LEAF": "script"})
def leaf(): return os.environ["OF_LEAF"]
@remote(queue)
def parent(): return [leaf().result().unwrap(), inner.step().result().unwrap()]
print(json.dumps(parent().result().unwrap()))
"""
    )
    assert result.json == ["script", "module"]


def test_f22_logging_is_set_up_in_the_worker_as_in_the_script(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue)
def f():
    logging.debug("no")
    logging.getLogger("app").info("yes")
before = f().result()
logging.basicConfig(level=logging.INFO, format="{levelname}|{name}|{message}", style="{")
after = f().result()
print(json.dumps([before.stderr, after.stderr]))
"""
    )
    assert result.json == ["", "INFO|app|yes\n"]


def test_c02_another_socket_folder_beside_a_running_daemon_is_refused_with_the_reason(shared_daemon: Host) -> None:
    began = time.monotonic()
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue)
def f(): pass
try: f().result()
except DaemonUnreachable as error: print(error)
""",
        REMOTED_SOCKET=str(shared_daemon.folder / "other"),
    )
    assert "another daemon of yours holds" in result.out
    assert "unset REMOTED_SOCKET" in result.out
    assert "XDG_STATE_HOME" in result.out
    assert time.monotonic() - began < 20
