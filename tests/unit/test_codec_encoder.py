"""What is built once, and when it is built again."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remoted_client.codec import BadPayload, Decoder, Encoder, decode_result

ROOT = Path(__file__).resolve().parents[2]


def made(text: str, **names: object) -> tuple[Callable[..., Any], dict[str, Any]]:
    scope: dict[str, Any] = {"__name__": "notebook", **names}
    exec(text, scope)
    return scope["f"], scope


@pytest.fixture(autouse=True)
def _main_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


def test_nothing_heavy_is_imported_before_first_use() -> None:
    program = (
        "import sys, remoted_client.codec as c; c.Encoder(); c.Decoder()\n"
        "assert not {'cloudpickle', 'asyncio', 'multiprocessing'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT / "client")}, check=True)


@pytest.mark.parametrize(
    "value", [1, "text", 2.5, None, (1, "a"), [1], {"k": [1, 2]}, {"a", "b"}, types, len, object()]
)
def test_unchanged_code_is_the_same_object(value: object) -> None:
    function, _ = made("def f(): return helper(VALUE)\ndef helper(x): return x", VALUE=value)
    encoder = Encoder()

    assert encoder.encode_call_target(function) is encoder.encode_call_target(function)


@pytest.mark.parametrize(
    "change",
    [
        lambda scope: scope.update(VALUE=[1, 2]),
        lambda scope: scope["VALUE"].append(2),
        lambda scope: scope.update(LATER=1),
        lambda scope: scope["helper"].__dict__.update(note=1),
        lambda scope: setattr(scope["helper"], "__defaults__", (5,)),
        lambda scope: setattr(scope["helper"], "__code__", (lambda x=0: -x).__code__),
        lambda scope: exec("def helper(x=0): return x + 1", scope),
    ],
)
def test_a_change_of_anything_captured_is_noticed(change: Callable[[dict[str, Any]], object]) -> None:
    function, scope = made(
        "def f(): return helper(VALUE), LATER if flag else 0\ndef helper(x=0): return x", VALUE=[1], flag=False
    )
    encoder = Encoder()
    before = encoder.encode_call_target(function)

    change(scope)

    assert encoder.encode_call_target(function).digest != before.digest


@pytest.mark.parametrize(
    "change",
    [
        lambda scope: scope.update(VALUE=[1]),
        lambda scope: scope.update(flag=not 1),
        lambda scope: scope.update(KEYS={"b", "a"}),
        lambda scope: scope.update(other="unused"),
        lambda scope: exec("def helper(x=0): return x", scope),
    ],
)
def test_an_equal_value_is_no_change(change: Callable[[dict[str, Any]], object]) -> None:
    function, scope = made(
        "def f(): return helper(VALUE), KEYS, flag\ndef helper(x=0): return x", VALUE=[1], flag=False, KEYS={"a", "b"}
    )
    encoder = Encoder()
    before = encoder.encode_call_target(function)

    change(scope)

    assert encoder.encode_call_target(function).digest == before.digest


def test_a_closures_content_is_watched() -> None:
    function, _ = made("def f():\n n = 0\n def up():\n  nonlocal n\n  n += 1\n  return n\n return up")
    up = function()
    encoder = Encoder()
    before = encoder.encode_call_target(up)
    assert encoder.encode_call_target(up) is before

    up()

    assert encoder.encode_call_target(up).digest != before.digest


def test_two_alike_closures_are_two_functions() -> None:
    function, _ = made("def f():\n n = 0\n def up():\n  nonlocal n\n  n += 1\n  return n\n return up")
    encoder, decoder = Encoder(), Decoder()
    first, second = (decoder.load_target(encoder.encode_call_target(function()).payload) for _ in range(2))

    assert (first(), first(), second()) == (1, 2, 1)


def test_a_value_without_a_digest_is_sent_each_time() -> None:
    function, _ = made("def f(): return VALUE", VALUE=Restless())
    encoder = Encoder()

    assert encoder.encode_call_target(function).digest != encoder.encode_call_target(function).digest


class Restless:
    count = 0

    def __reduce__(self) -> tuple[type, tuple[int]]:
        Restless.count += 1
        return int, (Restless.count,)


def test_large_bytes_are_not_copied_on_their_way_to_a_file(tmp_path: Path) -> None:
    big = bytes(64 << 20)
    encoder, decoder = Encoder(), Decoder()
    encoder.encode_arguments((1,), {})
    decoder.load_result(encoder.encode_arguments((1,), {}))

    tracemalloc.start()
    with open(tmp_path / "arguments", "wb") as file:
        encoder.encode_arguments_into(file, (big,), {})
    _, written_peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    with open(tmp_path / "arguments", "rb") as file:
        (again,), _ = decoder.load_arguments(file)
    _, read_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert again == big
    assert written_peak < 1 << 20
    assert read_peak < 65 << 20


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_payloads_may_be_any_bytes(kind: Callable[[bytes], Any]) -> None:
    encoder, decoder = Encoder(), Decoder()
    function, _ = made("def f(x, y): return x + y")
    code = encoder.encode_call_target(function)

    target = decoder.load_target(kind(code.payload))
    args, kwargs = decoder.load_arguments(kind(encoder.encode_arguments((1,), {"y": 2}, code)))

    assert target(*args, **kwargs) == 3


def test_buffers_may_travel_out_of_band() -> None:
    numpy = pytest.importorskip("numpy")
    buffers: list[Any] = []
    file = io.BytesIO()
    array = numpy.arange(100_000)

    Encoder().encode_arguments_into(file, (array,), {}, buffer_callback=buffers.append)
    (again,), _ = Decoder().load_arguments(file.getvalue(), buffers)

    assert len(file.getvalue()) < 1000
    assert numpy.shares_memory(again, array)


def test_foreign_bytes_are_refused() -> None:
    with pytest.raises(BadPayload, match="another version"):
        Decoder().load_target(b"\x80\x05K\x01.")


def test_results_are_readable_where_nothing_is_known() -> None:
    function, scope = made("class P:\n k = 2\n def m(self): return self.k * N\ndef f(): return P()", N=3)
    file = io.BytesIO()
    Decoder().encode_result({"p": function(), "g": function}, file)
    program = (
        "import sys; from remoted_client.codec import decode_result\n"
        "value = decode_result(sys.stdin.buffer); print(value['p'].m(), value['g']().m())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=file.getvalue(),
        env={**os.environ, "PYTHONPATH": str(ROOT / "client")},
        check=True,
        capture_output=True,
    )

    assert done.stdout == b"6 6\n"
    assert type(decode_result(file.getvalue())["p"]) is scope["P"]


def test_threads_may_share_an_encoder() -> None:
    function, scope = made("def f(x): return x + VALUE", VALUE=1)
    encoder, decoder, results = Encoder(), Decoder(), []

    def work(n: int) -> None:
        scope["VALUE"] = n
        code = encoder.encode_call_target(function)
        args, kwargs = decoder.load_arguments(encoder.encode_arguments((n,), {}, code))
        results.append(decoder.load_target(code.payload)(*args, **kwargs) >= n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == [True] * 8


def test_a_forked_child_is_another_run() -> None:
    encoder = Encoder()
    before = encoder.run_id
    read, write = os.pipe()

    child = os.fork()
    if child == 0:
        os.write(write, encoder.run_id.encode())
        os._exit(0)
    os.waitpid(child, 0)
    childs = os.read(read, 100).decode()
    os.close(read)
    os.close(write)

    assert childs != before == encoder.run_id


def test_forgotten_runs_start_afresh() -> None:
    function, _ = made("def f():\n global N\n N = globals().get('N', 0) + 1\n return N")
    encoder, decoder = Encoder(), Decoder()
    code = encoder.encode_call_target(function)
    assert [decoder.load_target(code.payload)() for _ in range(2)] == [1, 2]

    decoder.forget(encoder.run_id)

    assert decoder.load_target(code.payload)() == 1


def test_runs_take_turns_as_main() -> None:
    main = sys.modules["__main__"]
    first, second, decoder = Encoder(), Encoder(), Decoder()
    function, _ = made("def f(): ...")
    payloads = [each.encode_call_target(function).payload for each in (first, second)]

    modules = []
    for payload in payloads:
        decoder.load_target(payload)
        modules.append(sys.modules["__main__"])
        sys.modules["__main__"] = main
    decoder.activate(first.run_id)

    assert sys.modules["__main__"] is modules[0] is not modules[1]
