"""A finished job once more, as a new one, in the surroundings of whoever asks (SURFACE C04, ``remotectl retry``)."""

from __future__ import annotations

import hashlib
import json
import secrets

from remoted.access import Peer
from remoted.errors import Conflict
from remoted.jobs import Jobs
from remoted.model import Status
from remoted.requests import Request
from remoted.spec import JobSpec, parse_options
from remoted_client import wire


async def retry(jobs: Jobs, peer: Peer, job_id: str, environ: dict[str, str]) -> str:
    """Submit it again; the new job's id. Raises NotFound, and Conflict while it is live."""
    row = await jobs.records.row(peer, job_id)
    if not Status(row["status"]).is_terminal:
        raise Conflict("NOT_FINISHED", f"cannot retry {job_id}: it is {row['status']}; cancel it first")
    digests = {digest for digest in (row["spec"], row["code"], row["modules"], row["arguments"]) if digest}
    options = json.loads(row["options"])
    instance = options.pop("instance", None)
    options.pop("identity", None)  # whoever asks now has groups of their own
    await jobs.contents.recover(peer.uid, digests | ({instance[2]} if instance else set()), row["context"])
    spec = jobs.contents.spec(peer.uid, row["spec"])
    context = await _fresh_context(jobs, peer, spec, environ)
    request = Request(
        key=secrets.token_hex(16),
        spec=row["spec"],
        code=row["code"],
        modules=row["modules"],
        context=context,
        arguments=row["arguments"],
        arguments_inline=row["arguments_inline"],
        options=parse_options({**options, "detach": True}),
        instance=tuple(instance) if instance else None,
    )
    try:
        return await jobs.submit(peer, request, "")
    finally:
        jobs.contents.release(peer.uid, context)


async def _fresh_context(jobs: Jobs, peer: Peer, spec: JobSpec, environ: dict[str, str]) -> str:
    """The first call's secrets went with it: whoever retries gives theirs. Held once for the caller."""
    declared = {name: environ[name] for name in spec.declared if name in environ}
    document = {"environ": environ, "declared": declared, "cwd": spec.cwd, "umask": 0o077, "sys_path": list(spec.sys_path), "argv": [""]}
    data = json.dumps(document).encode()
    digest = hashlib.sha256(data).hexdigest()
    await jobs.contents.put(peer.uid, digest, "context", _as_frame(data), jobs.clock.wall())
    return digest


def _as_frame(data: bytes) -> wire.Frame:
    """Content made here, in the shape in which content arrives."""
    if len(data) <= wire.INLINE_BYTES:
        return wire.Frame({}, data)
    return wire.Frame({}, b"", (wire.memfd("remoted-context", data),))
