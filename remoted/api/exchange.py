"""One request as a handler sees it, and the two kinds of answer: a document or a refusal.

Every refusal has one shape, ``{"error": {"code": ..., "message": ...}}``; the code is stable, the message is for people.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel

from remoted.access import Peer
from remoted.errors import Refused

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that may be answered: its peer is known, its query and body are checked."""

    peer: Peer
    parameters: Mapping[str, str]
    query: BaseModel | None
    body: BaseModel | None
    #: For streams only; nothing in it says who is asking (T01).
    request: web.BaseRequest

    def query_as(self, kind: type[M]) -> M:
        assert isinstance(self.query, kind), "the table names another query model"
        return self.query

    def body_as(self, kind: type[M]) -> M:
        assert isinstance(self.body, kind), "the table names another body model"
        return self.body


class HttpRefusal(Refused):
    """A refusal that only HTTP knows: no route, too large, too slow."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None, document: Mapping[str, Any] | None = None) -> None:
        super().__init__(code, message)
        self.http_status = status
        self.headers = dict(headers or {})
        #: What it says beside the error, in the same document.
        self.document = dict(document or {})


def reply(document: BaseModel) -> web.Response:
    """A document, with 200."""
    return web.Response(body=document.model_dump_json().encode(), content_type="application/json")


def refusal_body(code: str, message: str, more: Mapping[str, Any] | None = None) -> bytes:
    return json.dumps({"error": {"code": code, "message": message}, **(more or {})}).encode()


def refuse(status: int, code: str, message: str, headers: Mapping[str, str] | None = None, more: Mapping[str, Any] | None = None) -> web.Response:
    return web.Response(status=status, body=refusal_body(code, message, more), content_type="application/json", headers=headers)
