"""T15, T17: whatever bytes arrive, the decoder gives frames or a WireError with a stable code, and stays small."""

from __future__ import annotations

import contextlib
import json
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoted_client import wire

CODES = {"BAD_MAGIC", "BAD_VERSION", "TOO_LARGE", "BAD_HEADER", "BAD_FDS"}
headers = st.dictionaries(
    st.text(max_size=8), st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8), max_size=5
)


@given(st.lists(st.tuples(headers, st.binary(max_size=300)), max_size=5), st.integers(1, 40))
def test_t17_what_is_encoded_comes_back_however_the_stream_is_cut(messages: list[tuple[dict[str, object], bytes]], step: int) -> None:
    stream = b"".join(wire.encode(header, body) for header, body in messages)
    reader = wire.FrameReader()
    frames = [frame for start in range(0, len(stream), step) for frame in reader.feed(stream[start : start + step])]
    assert [(frame.header, frame.body) for frame in frames] == messages
    assert reader.pending_bytes == 0


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=200), max_size=10))
def test_t15_garbage_is_refused_with_a_stable_code(chunks: list[bytes]) -> None:
    reader = wire.FrameReader()
    try:
        for chunk in chunks:
            reader.feed(chunk)
    except wire.WireError as error:
        assert error.code in CODES
    assert reader.pending_bytes <= sum(map(len, chunks))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 255))
def test_t15_lengths_are_checked_before_anything_is_allocated(head: int, body: int, fds: int) -> None:
    prefix = struct.pack("!2sBBII", b"RM", wire.PROTOCOL, fds, head, body)
    allowed = head <= wire.HEADER_BYTES and body <= wire.INLINE_BYTES and fds <= wire.FRAME_FDS
    reader = wire.FrameReader()
    if allowed:
        with contextlib.suppress(wire.WireError):  # an empty header, or descriptors that did not come
            assert reader.feed(prefix) == []
        return
    with pytest.raises(wire.WireError) as caught:
        reader.feed(prefix)
    assert caught.value.code in ("TOO_LARGE", "BAD_FDS")


@pytest.mark.parametrize("text", ["[" * 50_000, "[]", '"x"', "NaN", '{"a": NaN}', '{"a": Infinity}', "{", "", "{}{}", '{"a":1}x'])
def test_t17_a_header_that_is_not_a_strict_object_is_refused(text: str) -> None:
    data = text.encode()
    frame = struct.pack("!2sBBII", b"RM", wire.PROTOCOL, 0, len(data), 0) + data
    with pytest.raises(wire.WireError) as caught:
        wire.FrameReader().feed(frame)
    assert caught.value.code == "BAD_HEADER"


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_t34_a_hostile_message_on_a_channel_is_refused_and_its_descriptors_closed(data: bytes) -> None:
    read, write = os.pipe()
    os.close(write)
    try:
        frame = wire.decode_message(data, [read])
    except wire.WireError as error:
        assert error.code in CODES
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(read)
    else:
        frame.close()


@given(headers, st.lists(st.tuples(headers, st.binary(max_size=3000)), min_size=1, max_size=200))
def test_t17_calls_of_one_frame_come_back_apart_as_far_as_there_was_room(common: dict[str, object], calls: list[tuple[dict[str, object], bytes]]) -> None:
    made = wire.CallsFrame({"op": "submit", **common})
    taken = [call for call in calls if made.add(*call)]
    frames = wire.FrameReader().feed(b"".join(made.frames()))
    assert [call for frame in frames for call in wire.calls_of(frame)] == taken
    assert len(taken) == len(calls) or len(taken) == wire.FRAME_CALLS or made.size > wire.INLINE_BYTES - 3000


def test_t15_words_that_are_too_long_for_one_header_come_in_several() -> None:
    made = wire.CallsFrame({"op": "done"})
    words = [{"error": str(number) * 20_000} for number in range(10)]
    assert all(made.add(word, b"x") for word in words)
    frames = wire.FrameReader().feed(b"".join(made.frames()))
    assert len(frames) > 3
    assert [call for frame in frames for call in wire.calls_of(frame)] == [(word, b"x") for word in words]


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)


@settings(max_examples=300)
@given(json_values, json_values | st.lists(st.integers(-2, 5) | st.booleans(), max_size=4), st.binary(max_size=10))
def test_t17_a_frame_whose_lists_lie_is_refused(calls: object, sizes: object, body: bytes) -> None:
    try:
        parts = wire.calls_of(wire.Frame({"op": "submit", "calls": calls, "sizes": sizes}, body))
    except ValueError:
        return
    assert isinstance(calls, list)
    assert [word for word, _ in parts] == calls
    assert b"".join(part for _, part in parts) == body


def test_a_header_with_lone_surrogates_survives() -> None:
    header = {"op": "x", "name": "\udc80"}
    assert wire.FrameReader().feed(wire.encode(header))[0].header == header
    assert json.dumps(header)
