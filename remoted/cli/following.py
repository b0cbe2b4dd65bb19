"""logs, wait: staying with a job until it ends."""

from __future__ import annotations

import codecs
import os
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from remoted.cli import overview, transport
from remoted.cli.absence import AWAY, Absence
from remoted.cli.ending import CliError
from remoted.cli.jobs import path_of
from remoted.cli.text import cell, duration, escape, print_json, print_json_line, short

_STREAMS = {1: "stdout", 2: "stderr"}
#: No stream, but where another attempt begins.
_ATTEMPT = 3
_RECORD = struct.Struct("!BI")
_PROGRESS_SECONDS = 1.0
_WAIT_SECONDS = 60.0
#: Before a log is asked for more, of a job that goes on.
_LOOK_SECONDS = 0.2
_TERMINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


@click.command()
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Stay until the job ends; exit 1 unless it completed.")
@click.option("--stdout", "stream", flag_value="stdout", help="Only what it wrote to standard output.")
@click.option("--stderr", "stream", flag_value="stderr", help="Only what it wrote to standard error.")
@click.option("--json", "as_json", is_flag=True, help='A line per piece: {"attempt": ..., "stream": ..., "text": ...}; what is not UTF-8 is escaped.')
def logs(job: str, follow: bool, stream: str | None, as_json: bool) -> int:
    """What a job printed: its stdout on stdout, its stderr on stderr, byte for byte."""
    if as_json:
        return _logs_as_json(job, follow, stream)
    log = _Log(job, follow)
    if stream is None:
        _copy_both(log.records())
    else:
        for number, data in log.records():
            if _STREAMS.get(number) == stream:
                _write(number, data)
    is_terminal = sys.stderr.isatty()
    if not (follow or is_terminal):
        return 0
    ended = log.ask_job()
    if is_terminal:
        _say_why_it_failed(ended)
    return exit_code(ended) if follow else 0


def _say_why_it_failed(job: dict[str, Any]) -> None:
    """Nothing of it is in what the job printed."""
    if job["status"] in ("FAILED", "TIMED_OUT"):
        last = (job["error"] or job["status"]).strip().splitlines()[-1]
        print(f"remotectl: the job ended {job['status']}: {escape(last)}; `remotectl show {job['id'][:12]}` says more", file=sys.stderr)


def _logs_as_json(job: str, follow: bool, stream: str | None) -> int:
    log = _Log(job, follow)
    # A character may be split between two pieces of its stream.
    readers = {number: codecs.getincrementaldecoder("utf-8")("backslashreplace") for number in _STREAMS}
    attempt = 1
    for number, data in log.records():
        if number == _ATTEMPT:
            attempt = int(data.split()[0])
        if number not in readers:
            continue
        text = readers[number].decode(data)
        if text and stream in (None, _STREAMS[number]):
            print_json_line({"attempt": attempt, "stream": _STREAMS[number], "text": text})
    return exit_code(log.ask_job()) if follow else 0


class _Log:
    """What a job printed, told by one daemon after another: each record once."""

    def __init__(self, job: str, follow: bool) -> None:
        self._job = job
        self._follow = follow
        self._offset = 0
        self._absence = Absence()

    def records(self) -> Iterator[tuple[int, bytes]]:
        """To the end of what there is; with ``follow``, to the job's end."""
        while True:
            try:
                yield from self._told()
            except AWAY as error:
                self._absence.endure(error)
            else:
                # A daemon that ends well ends its answers well, and the job goes on with the next one.
                if not self._follow or self.ask_job()["status"] in _TERMINAL:
                    return
                time.sleep(_LOOK_SECONDS)

    def _told(self) -> Iterator[tuple[int, bytes]]:
        """By one daemon. Of a record that was not told whole the next one tells all."""
        path = path_of(self._job, f"/logs?stream=both&follow={int(self._follow)}&offset={self._offset}")
        answer = transport.request("GET", path, timeout=None if self._follow else 60.0)
        self._absence.ends()
        self._job = answer.headers.get("x-remoted-job", self._job)
        for number, data in _records(answer.chunks()):
            self._offset += _RECORD.size + len(data)
            yield number, data

    def ask_job(self) -> dict[str, Any]:
        found: dict[str, Any] = self._absence.ask(lambda: transport.get(path_of(self._job)))
        return found


def _copy_both(records: Iterator[tuple[int, bytes]]) -> None:
    """Attempts are told apart where somebody looks; a file or a pipe gets what was printed and nothing else."""
    shows, last = sys.stderr.isatty(), b"\n"
    for stream, data in records:
        if stream in _STREAMS:
            _write(stream, data)
            last = data[-1:] or last
        elif stream == _ATTEMPT and shows:
            attempt, most = data.decode().split()
            _write(2, (b"" if last == b"\n" else b"\n") + f"-- attempt {attempt} of {most} --\n".encode())
            last = b"\n"


def _records(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Undo the records of ``api.output``: stream u8, length u32, bytes."""
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= _RECORD.size:
            stream, length = _RECORD.unpack_from(buffer)
            if len(buffer) < _RECORD.size + length:
                break
            yield stream, bytes(buffer[_RECORD.size : _RECORD.size + length])
            del buffer[: _RECORD.size + length]


def _write(stream: int, data: bytes) -> None:
    """Straight to the descriptor, so that the two streams keep their order."""
    view = memoryview(data)
    while view:
        view = view[os.write(stream, view) :]


def exit_code(job: dict[str, Any]) -> int:
    return 0 if job["status"] == "COMPLETED" else 1


@click.command()
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@click.option("--timeout", type=click.FloatRange(min=0), help="Give up after so many seconds (exit code 1); the jobs go on.")
@click.option("--json", "as_json", is_flag=True, help="Print documents with stable keys.")
def wait(jobs: tuple[str, ...], timeout: float | None, as_json: bool) -> int:
    """Wait until jobs have ended; exit 0 if all completed."""
    until = None if timeout is None else time.monotonic() + timeout
    ended, absence = [], Absence(until)
    for job in jobs:
        ended.append(_wait_for(job, until, absence))
        if not as_json:
            _erase()
            print(_sentence(ended[-1]))
    if as_json:
        print_json({"jobs": ended})
    return max(map(exit_code, ended))


def _wait_for(job: str, until: float | None, absence: Absence) -> dict[str, Any]:
    shows = sys.stderr.isatty()
    step = _PROGRESS_SECONDS if shows else _WAIT_SECONDS

    def ask() -> dict[str, Any]:
        left = step if until is None else min(step, max(0.0, until - time.monotonic()))
        answer: dict[str, Any] = transport.get(path_of(job, f"/wait?timeout={left:.3f}"), timeout=left + 30.0, takes=left)
        return answer

    while True:
        found = absence.ask(ask)
        if found["status"] in _TERMINAL:
            return found
        if until is not None and time.monotonic() >= until:
            _erase()
            raise CliError(f"job {found['id']} is not over: it is {found['status']} ({overview.why(found) or 'running'}); it goes on")
        if shows:
            _show_progress(found)


def _show_progress(job: dict[str, Any]) -> None:
    since = time.time() - (job["started_at"] or job["submitted_at"])
    place = f", place {job['position']}" if job["position"] else ""
    sys.stderr.write(f"\r\x1b[K{short(job['id'])} {cell(job['name'])}: {job['status']} {overview.why(job)}{place}, {duration(since)}")
    sys.stderr.flush()


def _erase() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _sentence(job: dict[str, Any]) -> str:
    error = f": {escape(job['error'])}" if job["error"] else ""
    return f"{job['id']} {cell(job['name'])} {job['status']} after {duration(job['run_seconds'])}{error}"
