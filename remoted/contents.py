"""What clients send once and refer to by digest: specs, code, modules, arguments; and secrets beside them.

Content is one user's: a digest never crosses users (T10, T35). A small one is a row, a large one a file. A
secret (the caller's environment) is a 0600 file for as long as a connection or a live call refers to it, and
never a row.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from typing import Any

from remoted.attempts import Content
from remoted.backlog import Backlog
from remoted.blobs import Blobs, memory_bytes
from remoted.errors import BadRequest, OverLimit, StoreBroken, StoreError
from remoted.limits import Limits
from remoted.quotas import Held, Quotas
from remoted.recent import Recents
from remoted.spec import Context, JobSpec, parse_context, parse_spec
from remoted.store import Statements, Store
from remoted_client import wire

ROLES = frozenset({"spec", "code", "modules", "arguments", "constructor", "context"})
_SECRET = "context"
_ABSENT: Any = object()
_Key = tuple[int, str]
#: In memory, of one user: one who has more loses only his own.
_RECENT_BYTES = 16 << 20
_RECENT_COUNT = 4096
#: What is parsed can be parsed again.
_PARSED_BYTES = 16 << 20
#: Of one without its texts.
_OBJECT_BYTES = 2048
_AGAIN_SECONDS = 0.5


class Contents:
    """Content by (uid, digest)."""

    def __init__(self, store: Store, blobs: Blobs, limits: Limits) -> None:
        self._store = store
        self._blobs = blobs
        self._limits = limits
        #: What each user has on the disk, content and everything else.
        self.quotas = Quotas(limits, blobs.free_bytes, blobs.place)
        self.held = Held(limits)
        self.backlog = Backlog()
        #: The newest small ones of each user, so that a warm call touches neither disk nor database.
        self._recent: Recents[str, bytes] = Recents(_RECENT_BYTES, _RECENT_COUNT)
        #: Those that left ``_recent`` while a live call still refers to them.
        self._needed: dict[_Key, bytes] = {}
        self._files: set[_Key] = set()
        self._secrets: dict[_Key, bytes | None] = {}
        #: Bytes of those, by user.
        self._secret_bytes: Counter[int] = Counter()
        self._holders: Counter[_Key] = Counter()
        self._specs: Recents[str, JobSpec] = Recents(_PARSED_BYTES)
        self._contexts: Recents[str, Context] = Recents(_PARSED_BYTES)
        self._unstored = 0
        self._storing: set[asyncio.Task[None]] = set()

    async def put(self, uid: int, digest: str, role: str, frame: wire.Frame, now: float) -> None:
        """Store what a frame carries; a secret is held for the caller then. Raises BadRequest, OverLimit; the frame's descriptors are closed either way.

        Who is cancelled holds nothing, and what has begun ends all the same: no file is left that nobody knows of.
        """
        storing = asyncio.get_running_loop().create_task(self._put(uid, digest, role, frame, now))
        self._storing.add(storing)
        storing.add_done_callback(self._storing.discard)
        try:
            await asyncio.shield(storing)
        except asyncio.CancelledError:
            if role == _SECRET:
                storing.add_done_callback(lambda done: None if done.cancelled() or done.exception() else self.release(uid, digest))
            raise

    async def _put(self, uid: int, digest: str, role: str, frame: wire.Frame, now: float) -> None:
        fds = list(frame.fds)  # those that nobody has taken over yet
        try:
            if role not in ROLES:
                raise BadRequest("BAD_CONTENT", f"cannot store content with role {role[:40]!r}")
            if role == _SECRET:
                await self._put_secret(uid, digest, fds, frame.body)
            elif fds:
                await self._put_file(uid, digest, role, fds, now)
            else:
                self._put_inline(uid, digest, role, frame.body, now)
        except (OverLimit, StoreError):
            if role == _SECRET or not self.has(uid, digest):
                raise
            # It lies here from before: a call that comes behind it is served, so its caller must not hear of a refusal.
        finally:
            wire.close_all(fds)

    async def _put_secret(self, uid: int, digest: str, fds: list[int], data: bytes) -> None:
        """Held before its file is written: whoever holds the same one from before and ends meanwhile must not take the new file along."""
        is_inline = not fds
        if is_inline:
            _require_digest(data, digest)
        self.hold(uid, digest)
        try:
            size = len(data) if is_inline else memory_bytes(fds[0], digest)
            self._require_small(digest, size)
            self.quotas.take(uid, size)
            path = self._blobs.secret_path(uid, digest)
            await (self._blobs.store_bytes(uid, data, path) if is_inline else self._blobs.store_descriptor(uid, fds.pop(), path, digest))
        except BaseException as error:
            if isinstance(error, (OverLimit, StoreError)) and (uid, digest) in self._secrets:
                return  # as in ``_put``
            self.release(uid, digest)
            raise
        is_kept = is_inline and self._secret_bytes[uid] + len(data) <= _RECENT_BYTES
        self._keep_secret((uid, digest), data if is_kept else None)

    def _keep_secret(self, key: _Key, data: bytes | None) -> None:
        """In memory too, unless its user has much there."""
        self._secret_bytes[key[0]] += len(data or b"") - len(self._secrets.get(key) or b"")
        self._secrets[key] = data

    def _require_small(self, digest: str, size: int) -> None:
        if size > self._limits.spec_bytes:
            raise BadRequest("TOO_LARGE", f"cannot store the surroundings {digest[:12]}: they are {size} bytes, and spec_bytes is {self._limits.spec_bytes}")

    def _put_inline(self, uid: int, digest: str, role: str, data: bytes, now: float) -> None:
        _require_digest(data, digest)
        if not self.has(uid, digest):
            self.quotas.take(uid, len(data))
        self._remember((uid, digest), data)
        row = {"uid": uid, "digest": digest, "role": role, "size": len(data), "inline": data, "now": now}
        # Not awaited: whatever refers to it is committed in the same transaction or a later one.
        self.backlog.enter(uid, len(data))
        self._unstored += 1
        self._store_inline(row)

    def _store_inline(self, row: dict[str, Any]) -> None:
        """Until it is stored: calls that refer to it are taken already."""

        def stored(done: asyncio.Future[int]) -> None:
            error = done.exception()
            if not isinstance(error, StoreError):
                self._unstored -= 1
                self.backlog.leave(row["uid"], row["size"])
            elif not isinstance(error, StoreBroken):
                asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._store_inline, row)

        self._store.submit(lambda db: db.run("add_content", **row)).add_done_callback(stored)

    @property
    def is_behind(self) -> bool:
        """Is anything that a call may refer to not stored yet?"""
        return self._unstored > 0

    async def _put_file(self, uid: int, digest: str, role: str, fds: list[int], now: float) -> None:
        path = self._blobs.content_path(uid, digest)
        if (size := memory_bytes(fds[0], digest)) > self._limits.content_bytes:
            raise OverLimit("OVER_LIMIT", f"cannot store {size} bytes of content: the limit content_bytes is {self._limits.content_bytes}")
        self.quotas.take(uid, size)
        size = await self._blobs.store_descriptor(uid, fds.pop(), path, digest)
        row = {"uid": uid, "digest": digest, "role": role, "size": size, "inline": None, "now": now}
        await self._store.submit(lambda db: db.run("add_content", **row))
        self._files.add((uid, digest))  # only now: a call that comes behind content that was refused is refused too

    def _remember(self, key: _Key, data: bytes) -> None:
        uid, digest = key
        for older, left in self._recent.add(uid, digest, data, len(data)):
            if self._holders[(uid, older)] > 0:
                self._needed[(uid, older)] = left

    def has(self, uid: int, digest: str) -> bool:
        key = (uid, digest)
        return self._recent.get(*key) is not None or key in self._needed or key in self._files or key in self._secrets

    def require(self, uid: int, *digests: str) -> None:
        """Raises BadRequest MISSING_CONTENT before anything is acknowledged that refers to it; "" means none."""
        for digest in digests:
            if digest and not self.has(uid, digest):
                raise BadRequest("MISSING_CONTENT", f"cannot find the content {digest[:80]}: send it again")

    def content(self, uid: int, digest: str) -> Content:
        """For a worker. Raises BadRequest MISSING_CONTENT: the client sends it again."""
        key = (uid, digest)
        if (data := self._recent.get(*key)) is not None or (data := self._needed.get(key)) is not None:
            return Content(digest, data, None)
        if key in self._files:
            return Content(digest, None, str(self._blobs.content_path(uid, digest)))
        if key in self._secrets:
            return self._secret(key)
        raise BadRequest("MISSING_CONTENT", f"cannot find the content {digest[:80]}: send it again")

    def _secret(self, key: _Key) -> Content:
        data = self._secrets[key]
        return Content(key[1], data, None if data is not None else str(self._blobs.secret_path(*key)))

    def spec(self, uid: int, digest: str) -> JobSpec:
        """The parsed spec; parsed once for all calls that refer to it."""
        if (found := self._specs.get(uid, digest)) is None:
            data = self._read((uid, digest), self._limits.spec_bytes)
            found = parse_spec(data)
            self._specs.add(uid, digest, found, _OBJECT_BYTES + len(data))
        return found

    def context(self, uid: int, digest: str) -> Context:
        if (found := self._contexts.get(uid, digest)) is None:
            data = self._read((uid, digest), self._limits.spec_bytes)
            found = parse_context(data)
            self._contexts.add(uid, digest, found, _OBJECT_BYTES + len(data))
        return found

    def _read(self, key: _Key, cap: int) -> bytes:
        content = self.content(*key)
        if content.inline is not None:
            return content.inline
        with open(content.open(), "rb") as file:
            data = file.read(cap + 1)
        if len(data) > cap:
            raise BadRequest("TOO_LARGE", f"cannot read the description: it is larger than {cap} bytes")
        return data

    # -- as long as somebody needs it ----------------------------------------------------------------------

    def hold(self, uid: int, digest: str) -> None:
        """A connection or a live call refers to it: a secret keeps its file, small content its place in memory."""
        self._holders[(uid, digest)] += 1

    def release(self, uid: int, digest: str) -> None:
        """The last holder takes the file with it."""
        key = (uid, digest)
        self._holders[key] -= 1
        if self._holders[key] <= 0:
            del self._holders[key]
            self._needed.pop(key, None)
            if (data := self._secrets.pop(key, _ABSENT)) is not _ABSENT:
                self._secret_bytes[uid] -= len(data or b"")
                self._contexts.drop(uid, digest)
                self._blobs.remove(self._blobs.secret_path(uid, digest))

    # -- after a restart -----------------------------------------------------------------------------------

    async def recover(self, uid: int, digests: set[str], secret: str) -> None:
        """Make the content of a job from the last daemon available again."""
        rows = await self._store.submit(lambda db: [db.one("get_content", uid=uid, digest=digest) for digest in digests])
        for row in rows:
            if row is None:
                continue
            if row["inline"] is not None:
                self._remember((uid, row["digest"]), row["inline"])
            else:
                self._files.add((uid, row["digest"]))
        if secret and self._blobs.secret_path(uid, secret).exists():
            self._secrets.setdefault((uid, secret), None)

    async def sweep_secrets(self) -> None:
        """After every live call has been revived: what the last daemon's connections held is nobody's any more."""
        for uid, name in await asyncio.to_thread(self._blobs.secrets):
            if (uid, name) not in self._secrets:
                self._blobs.remove_secret(uid, name)

    async def forget_unused(self, before: float, of: int | None = None) -> int:
        """Drop content (of one user) that nobody has used since ``before`` (Unix seconds) and no live job refers to."""

        held = set(self._holders)  # by routes of functions, which may wait for days

        def forget(db: Statements) -> list[tuple[int, str, bool]]:
            found = [(row["uid"], row["digest"], bool(row["is_file"])) for row in db.all("stale_contents", before=before, uid=of)]
            found = [row for row in found if row[:2] not in held]
            for uid, digest, _ in found:
                db.run("delete_content", uid=uid, digest=digest)
            return found

        gone = await self._store.submit(forget)
        for uid, digest, is_file in gone:
            self._recent.drop(uid, digest)
            self._files.discard((uid, digest))
            self._specs.drop(uid, digest)
            if is_file:
                self._blobs.remove(self._blobs.content_path(uid, digest))
        return len(gone)


def _require_digest(data: bytes, digest: str) -> None:
    if hashlib.sha256(data).hexdigest() != digest:
        raise BadRequest("BAD_DIGEST", "cannot store the content: it is not what its digest says")
