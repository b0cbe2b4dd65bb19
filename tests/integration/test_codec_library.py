"""Objects of the standard library, there and back: what plain cloudpickle carries travels here too (F18)."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path

import pytest

from remoted_client.codec import Encoder, UnpicklableError
from remoted_client.codec.reference import by_reference, import_name, importable
from tests.integration.test_codec_peer import Peers, peers

__all__ = ["peers"]


def test_f18_what_plain_cloudpickle_carries_of_the_standard_library_travels_both_ways(peers: Peers) -> None:
    out = peers.run(
        """
        import argparse, array, ast, collections, configparser, contextvars, csv, ctypes, datetime, decimal, email.message, fractions
        import functools, graphlib, io, ipaddress, itertools, json, logging, operator, os, pathlib, pickle, queue, random, re, socket
        import statistics, string, struct, subprocess, tarfile, tempfile, threading, time, types, typing, uuid, weakref, zipfile
        import xml.etree.ElementTree as tree
        import cloudpickle

        class Upper(io.StringIO):
            def write(self, text): return super().write(text.upper())
        class Counted(io.BytesIO):
            pass
        class Lines(io.TextIOBase):
            def readline(self): return "line"
        def filled(file, content):
            file.write(content)
            return file

        VALUES = {
            "bytes": filled(io.BytesIO(), b"ab"), "text": filled(io.StringIO(), "ab"), "upper": filled(Upper(), "ab"), "counted": filled(Counted(), b"ab"),
            "lines": Lines(), "spooled": filled(tempfile.SpooledTemporaryFile(), b"ab"), "io": [io, sys_io := io._io],
            "classes": [io.BytesIO, io.StringIO, io.FileIO, io.IOBase, sys_io._IOBase, sys_io._BufferedIOBase, sys_io._RawIOBase, sys_io._TextIOBase, io.TextIOWrapper],
            "more classes": [struct.Struct, socket.socket, socket._socket.socket, pickle.Pickler, pickle._Pickler, threading.local,
                             threading.Thread, random.Random, random._random.Random, decimal.Decimal, decimal.Context, datetime.datetime, array.array,
                             collections.deque, queue.SimpleQueue, functools.partial, itertools.chain, weakref.WeakSet, contextvars.ContextVar, time.struct_time],
            "functions": [open, io.open, len, os.getpid, struct.pack, time.time, "".join, dict.fromkeys, str.join, json.dumps],
            "random": random.Random(3), "decimal": decimal.Decimal("1.5"), "context": decimal.Context(prec=3), "fraction": fractions.Fraction(1, 3),
            "time": datetime.datetime.now(datetime.timezone.utc), "span": datetime.timedelta(1), "clock": time.localtime(0), "stat": os.stat("/"),
            "deque": collections.deque([1], 3), "ordered": collections.OrderedDict(a=1), "counter": collections.Counter("aab"), "default": collections.defaultdict(list),
            "chain": collections.ChainMap({1: 2}), "user": collections.UserDict(a=1), "array": array.array("d", [1]), "proxy": types.MappingProxyType({1: 2}),
            "simple": types.SimpleNamespace(a=1), "partial": functools.partial(max, 3), "item": operator.itemgetter(1), "method": operator.methodcaller("lower"),
            "pattern": re.compile("a+"), "uuid": uuid.uuid4(), "path": pathlib.Path("/a"), "network": ipaddress.ip_network("10.0.0.0/8"), "template": string.Template("$a"),
            "logger": logging.getLogger("x"), "record": logging.makeLogRecord({}), "parser": argparse.ArgumentParser(), "config": configparser.ConfigParser(),
            "message": email.message.EmailMessage(), "element": tree.fromstring("<a><b/></a>"), "ast": ast.parse("1 + 1"), "code": compile("1", "a", "eval"),
            "dialect": csv.excel(), "normal": statistics.NormalDist(), "count": itertools.count(3), "slice": slice(1, 2), "generic": typing.List[int], "alias": list[int],
            "sorter": graphlib.TopologicalSorter({1: [2]}), "c": ctypes.c_int(3), "member": zipfile.ZipInfo("a"), "entry": tarfile.TarInfo("a"),
            "ended": subprocess.CompletedProcess("a", 0), "weak": weakref.WeakSet(), "environment": os.environ,
        }
        def back(value): return value

        for name, value in VALUES.items():
            cloudpickle.dumps(value)  # the list holds nothing that it cannot carry
            found = call(back, value)
            if name not in ("classes", "more classes", "functions", "io"):
                assert type(found) is type(value), name
            elif found != value:
                print("changed", name, found)
        for name in ("bytes", "text", "upper", "counted"):
            print(name, repr(call(back, VALUES[name]).getvalue()), call(back, VALUES[name]).tell())
        print(call(filled, VALUES["upper"], "c").getvalue(), call(lambda file: file.readline(), Lines()))
        print(type(call(back, open(__file__))))  # a text that is open for reading travels as what it holds
        """
    )
    assert out == "bytes b'ab' 2\ntext 'ab' 2\nupper 'AB' 2\ncounted b'ab' 2\nABC line\n<class '_io.StringIO'>\n"


def test_f18_every_module_that_python_brings_is_known_by_the_name_it_is_imported_by() -> None:
    """Some call themselves otherwise (``_io`` says "io"), and their classes went by value for it."""
    for name, module in list(sys.modules.items()):
        is_builtin = name in sys.builtin_module_names or name.partition(".")[0] in sys.stdlib_module_names
        if is_builtin and isinstance(module, types.ModuleType) and name not in ("__main__", "__mp_main__") and module.__spec__ is not None:
            assert importable(module), name
            assert sys.modules[import_name(module) or ""] is module, name
    assert by_reference(io.BytesIO)
    assert by_reference(io.BytesIO.__mro__[-2])  # _io._IOBase


def test_f18_a_class_made_in_c_without_a_name_to_import_is_refused_before_sending() -> None:
    """Put together from its attributes it would fail in the worker, at the cost of an attempt."""
    with pytest.raises(UnpicklableError, match=r"argument 'kind'.*is made in C"):
        Encoder().encode_arguments((), {"kind": type(iter([]))})


def test_f18_an_open_file_is_named_before_sending_with_what_to_do_instead(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def refused(value: object) -> str:
        with pytest.raises(UnpicklableError) as caught:
            Encoder().encode_arguments((), {"config": {"log": value}})
        assert caught.value.path == "argument 'config'['log']"
        return caught.value.reason.partition("; ")[2]

    with path.open("wb") as writing, path.open("rb") as reading, path.open("w") as text:
        assert refused(writing) == refused(text) == "an open file stays in its process: send its path, and open it there"
        assert refused(reading) == "an open file stays in its process: send its path, and open it there, or what it holds: .read()"
    assert refused(reading) == ""
    assert refused(io.BufferedReader(io.BytesIO(b"x"))) == "an open file stays in its process: send what it holds: .read()"  # type: ignore[arg-type]
