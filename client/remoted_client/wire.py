"""The frames that client, daemon and worker exchange: the one truth of three programs.

A frame is a fixed prefix, a JSON header and an opaque body; descriptors may travel beside it. Bodies of more
than ``INLINE_BYTES`` never travel inline: they go as the descriptor of a memfd or file. Nothing here opens a
socket, starts a thread or unpickles. Standard library only, Python 3.10 or newer.

    prefix:  b"RM" | version u8 | descriptors u8 | header length u32 | body length u32   (big endian)

The two caps are checked on the prefix, before any allocation (threat T15: a frame length of 0xFFFFFFFF).
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

#: Raised when a message changes its meaning; both sides refuse another number in one sentence.
PROTOCOL = 3
#: A body up to this size travels in its frame and is stored in the database; a larger one is a file.
INLINE_BYTES = 64 * 1024
HEADER_BYTES = 64 * 1024
#: Descriptors that one frame may carry.
FRAME_FDS = 4
#: Calls that one frame may be about.
FRAME_CALLS = 128
#: SCM_MAX_FD of the kernel (include/net/scm.h) is 253 descriptors a message.
KERNEL_FDS = 253
#: Room that malloc gives without new pages: for who reads small messages, a large one costs 20 us of page faults, and a buffer that is kept a copy.
SOME_BYTES = 32 * 1024
_ANCILLARY_BYTES = socket.CMSG_SPACE(KERNEL_FDS * 4)
# As plain numbers: arithmetic with the enum's members costs more than the system call.
# Plain numbers: to combine two of Python's flags takes longer than the system call.
_CLOEXEC, _CUT_OFF = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC)
AT_ONCE = int(socket.MSG_DONTWAIT)

#: What a worker says of the calls of one lease, in a page that it shares with the daemon: number of the newest call
#: that was accepted and of the newest that is answered, when the former began and the latter ended (CLOCK_BOOTTIME,
#: nanoseconds), and how long the former may take (milliseconds, 0 for ever). Stores, no system call (MECHANISMS 3).
LEASE_PAGE = struct.Struct("=QQQQQ")
LEASE_PAGE_BYTES = 4096
#: Which call of those that the daemon has given to it a worker has begun last, by position, and 1 if it begins no more.
PROGRESS_PAGE = struct.Struct("=QQ")
PROGRESS_PAGE_BYTES = 4096

#: Stands behind every outcome that a worker has left behind whole.
OUTCOME_MARK = b"done"

_PREFIX = struct.Struct("!2sBBII")
PREFIX_BYTES = _PREFIX.size
MESSAGE_BYTES = PREFIX_BYTES + HEADER_BYTES + INLINE_BYTES
_MAGIC = b"RM"


class Status(str, Enum):
    """What a job is, in the Flash document's six words. Terminal statuses never change."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    # Scripts print it: "COMPLETED", in every version of Python.
    def __str__(self) -> str:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    @property
    def is_terminal(self) -> bool:
        return self not in (Status.IN_QUEUE, Status.IN_PROGRESS)


#: The end of a call: what is as it is here is not said.
DONE: dict[str, Any] = {
    "op": "done", "status": "COMPLETED", "reason": "", "kind": "returned", "error": "", "error_type": "", "traceback": "",
    "attempts": 1, "gpus": [], "items": 0, "reconstructed": False,
}  # fmt: skip


class WireError(Exception):
    """The peer broke the protocol; the connection is of no further use.

    ``code`` is stable and may be shown to the peer: BAD_MAGIC, BAD_VERSION, TOO_LARGE, BAD_HEADER, BAD_FDS.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Frame(NamedTuple):
    """One message. ``fds`` belong to whoever received the frame, who must close them."""

    header: dict[str, Any]
    body: bytes
    fds: tuple[int, ...] = ()

    @property
    def op(self) -> str:
        op = self.header.get("op")
        return op if isinstance(op, str) else ""

    def close(self) -> None:
        close_all(self.fds)


def close_all(fds: Any) -> None:
    for fd in fds:
        os.close(fd)


def encode(header: dict[str, Any], body: bytes = b"", fd_count: int = 0) -> bytes:
    """The bytes of one frame. Raises WireError TOO_LARGE when header or body exceed their caps."""
    return frame(encode_header(header), body, fd_count)


def encode_header(header: dict[str, Any]) -> bytes:
    return encode_json(header).encode("utf-8", "surrogatepass")


def _make_encode() -> Callable[[Any], str]:
    """``JSONEncoder.encode`` builds its machine anew at each call, which takes as long as a header. Ours are trees that we build: no rings to look for."""
    slow = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # another Python
        return slow.encode
    parts = make(None, slow.default, json.encoder.encode_basestring, None, ":", ",", False, False, False)
    return lambda header: "".join(parts(header, 0))


#: Of a tree of what JSON knows; as few bytes as can be.
encode_json = _make_encode()


def frame(head: bytes, body: bytes = b"", fd_count: int = 0) -> bytes:
    """The same, of a header that is JSON already."""
    if len(head) > HEADER_BYTES or len(body) > INLINE_BYTES or fd_count > FRAME_FDS:
        raise WireError("TOO_LARGE", f"cannot send a frame of {len(head)}+{len(body)} bytes: the cap is {HEADER_BYTES}+{INLINE_BYTES}")
    return b"".join((_PREFIX.pack(_MAGIC, PROTOCOL, fd_count, len(head), len(body)), head, body))


class CallsFrame:
    """A frame about one call or many, as it grows: what they have in common once, then each with its part of the body.

    header: {..., "calls": [word about each], "sizes": [bytes of the body for each]}
    """

    def __init__(self, common: dict[str, Any]) -> None:
        self.common = common
        self._words: list[Any] = []
        self._bodies: list[bytes] = []
        #: Of the body alone.
        self.size = 0

    def add(self, word: Any, body: bytes = b"") -> bool:
        """False if there is no room for it any more; the first always has room here."""
        if self._words and (len(self._words) >= FRAME_CALLS or self.size + len(body) > INLINE_BYTES):
            return False
        self._words.append(word)
        self._bodies.append(body)
        self.size += len(body)
        return True

    def frames(self) -> list[bytes]:
        """More than one where their words are long. Raises WireError TOO_LARGE as ``encode`` does."""
        return self._frames(0, len(self._words))

    def _frames(self, start: int, end: int) -> list[bytes]:
        bodies = self._bodies[start:end]
        head = encode_header({**self.common, "calls": self._words[start:end], "sizes": [len(body) for body in bodies]})
        if len(head) > HEADER_BYTES and end - start > 1:
            middle = (start + end) // 2
            return self._frames(start, middle) + self._frames(middle, end)
        return [frame(head, b"".join(bodies))]


def calls_of(found: Frame) -> list[tuple[Any, bytes]]:
    """Each call that the frame is about, and its part of the body. Raises KeyError and ValueError for what is not as it must be."""
    words, sizes, body = found.header["calls"], found.header["sizes"], found.body
    if not isinstance(words, list) or not isinstance(sizes, list) or not len(words) == len(sizes) <= FRAME_CALLS:
        raise ValueError("calls and sizes are no lists of the same length")
    if not all(type(size) is int and size >= 0 for size in sizes) or sum(sizes) != len(body) or (found.fds and len(words) != 1):
        raise ValueError("the sizes of the calls are not those of the frame")
    parts, start = [], 0
    for word, size in zip(words, sizes, strict=True):
        parts.append((word, body[start : start + size]))
        start += size
    return parts


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_scan_json: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(parse_constant=_refuse_constant).scan_once  # type: ignore[attr-defined]


def parse_header(data: bytes) -> dict[str, Any]:
    """Strict JSON object. Raises WireError BAD_HEADER (also on NaN and on nesting deeper than the recursion limit)."""
    try:
        text = data.decode("utf-8", "surrogatepass")
        header, end = _scan_json(text, 0)
    except (ValueError, RecursionError, StopIteration) as error:
        raise WireError("BAD_HEADER", f"cannot read the header: {error}") from error
    if not isinstance(header, dict) or end != len(text):
        raise WireError("BAD_HEADER", "cannot read the header: it is not an object and nothing else")
    return header


def _parse_prefix(data: bytes | memoryview) -> tuple[int, int, int]:
    """(descriptors, header length, body length), refused before anything of that size is allocated."""
    magic, version, fd_count, head_size, body_size = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise WireError("BAD_MAGIC", "cannot read a frame: these bytes are not of this protocol")
    if version != PROTOCOL:
        raise WireError("BAD_VERSION", f"cannot talk: the peer speaks protocol {version}, this side {PROTOCOL}; install the same version of remoted on both")
    if head_size > HEADER_BYTES or body_size > INLINE_BYTES:
        raise WireError("TOO_LARGE", f"cannot read a frame of {head_size}+{body_size} bytes: the cap is {HEADER_BYTES}+{INLINE_BYTES}")
    if fd_count > FRAME_FDS:
        raise WireError("BAD_FDS", f"cannot take {fd_count} descriptors with one frame: the cap is {FRAME_FDS}")
    return fd_count, head_size, body_size


class FrameReader:
    """Cuts a byte stream and its descriptors into frames; holds at most one incomplete frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._fds: deque[int] = deque()

    def expected(self, head: bytes, data: bytes) -> bytes | None:
        """The body, if these bytes are one whole frame with just this header; None: they have to be read.

        Who knows what comes next need not parse it, which costs more than the rest of a small frame.
        """
        start = PREFIX_BYTES + len(head)
        size = len(data) - start
        if 0 <= size <= INLINE_BYTES and not self._buffer and not self._fds and data.startswith(_PREFIX.pack(_MAGIC, PROTOCOL, 0, len(head), size) + head):
            return data[start:]
        return None

    def feed(self, data: bytes, fds: list[int] | tuple[int, ...] = ()) -> list[Frame]:
        """Frames completed by these bytes. Raises WireError; then the connection must be closed."""
        if not self._buffer and not self._fds and not fds and len(data) >= PREFIX_BYTES:
            count, head_size, body_size = _parse_prefix(data)
            if not count and len(data) == PREFIX_BYTES + head_size + body_size:  # the common case, without a copy
                head_end = PREFIX_BYTES + head_size
                return [Frame(parse_header(data[PREFIX_BYTES:head_end]), data[head_end:])]
        self._buffer += data
        self._fds.extend(fds)
        if len(self._fds) > 2 * FRAME_FDS:  # those of the frame that comes, and of the one that begins behind it
            raise WireError("BAD_FDS", "cannot keep so many descriptors without a frame for them")
        frames: list[Frame] = []
        offset = 0
        try:
            while len(self._buffer) - offset >= PREFIX_BYTES:
                frame, offset = self._cut(offset)
                if frame is None:
                    break
                frames.append(frame)
            del self._buffer[:offset]
            if not self._buffer and self._fds:
                raise WireError("BAD_FDS", "cannot take descriptors that no frame asked for")
        except WireError:
            for whole in frames:
                whole.close()  # nobody will see it
            raise
        return frames

    def _cut(self, offset: int) -> tuple[Frame | None, int]:
        fd_count, head_size, body_size = _parse_prefix(memoryview(self._buffer)[offset : offset + PREFIX_BYTES])
        start = offset + PREFIX_BYTES
        end = start + head_size + body_size
        if len(self._buffer) < end:
            return None, offset
        if len(self._fds) < fd_count:
            raise WireError("BAD_FDS", "cannot read a frame: its descriptors are missing")
        header = parse_header(bytes(self._buffer[start : start + head_size]))
        fds = tuple(self._fds.popleft() for _ in range(fd_count))
        return Frame(header, bytes(self._buffer[start + head_size : end]), fds), end

    @property
    def pending_bytes(self) -> int:
        return len(self._buffer)

    def close(self) -> None:
        close_all(self._fds)
        self._fds.clear()


def decode_message(data: bytes, fds: list[int]) -> Frame:
    """One frame from one SEQPACKET message. Raises WireError; the descriptors are then closed."""
    try:
        if len(data) < PREFIX_BYTES:
            raise WireError("BAD_HEADER", "cannot read a message: it is shorter than its prefix")
        fd_count, head_size, body_size = _parse_prefix(data)
        if len(data) != PREFIX_BYTES + head_size + body_size or len(fds) != fd_count:
            raise WireError("BAD_HEADER", "cannot read a message: its lengths disagree")
        head_end = PREFIX_BYTES + head_size
        return Frame(parse_header(data[PREFIX_BYTES:head_end]), data[head_end:], tuple(fds))
    except WireError:
        close_all(fds)
        raise


def receive(sock: socket.socket, size: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """recvmsg with CLOEXEC descriptors. Raises WireError BAD_FDS when the kernel had to cut some off (T20)."""
    data, ancillary, seen, _ = sock.recvmsg(size, _ANCILLARY_BYTES, _CLOEXEC | flags)
    return data, _descriptors(ancillary, seen) if ancillary or seen & _CUT_OFF else []


def receive_into(sock: socket.socket, buffer: bytearray, flags: int = 0) -> tuple[bytes, list[int]]:
    """The same into a buffer that is kept: allocating a large one for each small message costs 20 us of page faults."""
    size, ancillary, seen, _ = sock.recvmsg_into([buffer], _ANCILLARY_BYTES, _CLOEXEC | flags)
    return bytes(memoryview(buffer)[:size]), _descriptors(ancillary, seen) if ancillary or seen & _CUT_OFF else []


def _descriptors(ancillary: list[tuple[int, int, bytes]], flags: int) -> list[int]:
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
            fds.extend(numbers)
    if flags & _CUT_OFF:
        close_all(fds)
        raise WireError("BAD_FDS", "cannot take the descriptors: the kernel cut them off")
    return fds


def send(sock: socket.socket, data: bytes, fds: tuple[int, ...] = (), flags: int = 0) -> int:
    """sendmsg; on a stream it may send less than all of ``data`` (the descriptors go with the first byte)."""
    if not fds:
        return sock.send(data, flags)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    return sock.sendmsg([data], rights, flags)


def memfd(name: str, data: bytes = b"") -> int:
    """An anonymous file for a large body, positioned at its start; close-on-exec."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if data:
        with open(fd, "wb", buffering=0, closefd=False) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) or 0 :]
        os.lseek(fd, 0, os.SEEK_SET)
    return fd
