"""The two sides of the codec as real processes: a worker that lives on, and scripts that call it.

A script is run as ``python script.py`` with ``call`` at hand, which sends a function to the worker and returns
what it gives. Both sides are as thin as can be: no daemon, no leases, only the codec and a Unix socket.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_WIRE = '''
import pickle, struct

def receive(stream):
    head = stream.read(8)
    return pickle.loads(stream.read(struct.unpack("!Q", head)[0])) if len(head) == 8 else None

def send(stream, value):
    data = pickle.dumps(value)
    stream.write(struct.pack("!Q", len(data)) + data)
    stream.flush()
'''

_WORKER = _WIRE + '''
import asyncio, inspect, io, os, socket, sys, traceback
from remoted_client.codec import Decoder, ModuleSet, StaleModules, install_modules

def answer(decoder, request):
    sys.path[:] = request["path"] + [each for each in sys.path if each not in request["path"]]
    try:
        install_modules(ModuleSet.from_bytes(request["modules"]))
    except StaleModules as error:
        return "stale", error.names
    try:
        target = decoder.load_target(request["code"])
        args, kwargs = decoder.load_arguments(request["arguments"])
        value = target(*args, **kwargs)
        if inspect.iscoroutine(value):
            value = asyncio.new_event_loop().run_until_complete(value)
        value = list(value) if inspect.isgenerator(value) else value
        file = io.BytesIO()
        decoder.encode_result(value, file, standalone=request["standalone"])
        return "value", file.getvalue()
    except BaseException:
        return "raised", traceback.format_exc()

def main():
    listener = socket.socket(fileno=int(sys.argv[1]))
    decoder = Decoder()
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as stream:
            while (request := receive(stream)) is not None:
                send(stream, answer(decoder, request))

if __name__ == "__main__":
    main()
'''

_PEER = _WIRE + '''
import os, socket, sys
from remoted_client.codec import Encoder

encoder = Encoder()
connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ["CODEC_WORKER"])
stream = connection.makefile("rwb")

class Raised(Exception):
    pass

class Stale(Exception):
    pass

def send_only(function, *args, **kwargs):
    code = encoder.encode_call_target(function)
    arguments = encoder.encode_arguments(args, kwargs, code)
    send(stream, {
        "code": code.payload,
        "arguments": arguments,
        "modules": code.modules.to_bytes(),
        "standalone": "CODEC_NAMED" not in os.environ,
        "path": [os.path.dirname(os.path.abspath(sys.argv[0]))],
    })
    return receive(stream)

def call(function, *args, **kwargs):
    kind, value = send_only(function, *args, **kwargs)
    if kind == "value":
        return encoder.decode_result(value)
    raise {"raised": Raised, "stale": Stale}[kind](value)
'''


_IMPORTS = "from codec_peer_lib import Raised, Stale, call, encoder, send_only\n"


class Peers:
    """A worker process, and a folder for the scripts that call it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.folder.mkdir()
        library = folder / "site-packages"  # so that it counts as installed
        library.mkdir()
        (library / "codec_peer_lib.py").write_text(_PEER)
        worker = folder / "worker.py"
        worker.write_text(_WORKER)
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            "PYTHONPATH": f"{ROOT / 'client'}{os.pathsep}{library}{os.pathsep}{os.environ.get('CODEC_EXTRA_PATH', '')}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "CODEC_WORKER": str(folder / "w.sock"),
            "TMPDIR": str(folder),
        }
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._environment["CODEC_WORKER"])
            listener.listen()
            self.worker = subprocess.Popen(
                [sys.executable, str(worker), str(listener.fileno())],
                pass_fds=[listener.fileno()],
                env=self._environment,
                cwd=folder,
            )

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def run(self, text: str, name: str = "script.py", **environment: str) -> str:
        """Run a script to its end; its output."""
        path = self.write(name, _IMPORTS + textwrap.dedent(text))
        done = subprocess.run(
            [sys.executable, str(path)],
            env={**self._environment, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        self.worker.kill()
        self.worker.wait()


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    made = Peers(tmp_path)
    try:
        yield made
    finally:
        made.close()
