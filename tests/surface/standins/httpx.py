"""A stand-in network: what is posted comes back; ``fail`` raises, ``flaky`` names a file that counts failures."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any


class Response:
    def __init__(self, body: Any) -> None:
        self._body = body
        self.content = str(body).encode()

    def json(self) -> Any:
        return self._body


class AsyncClient:
    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        return None

    async def get(self, url: str) -> Response:
        return Response(f"content of {url}")

    async def post(self, url: str, json: dict[str, Any]) -> Response:
        if "fail" in json:
            raise getattr(builtins, json["fail"])("the stand-in refuses")
        if "flaky" in json:
            _fail_at_first(Path(json["flaky"]), json["times"])
        return Response({"url": url, "got": json.get("id")})


def _fail_at_first(count: Path, times: int) -> None:
    before = count.read_text() if count.exists() else ""
    count.write_text(before + "x")
    if len(before) < times:
        raise ConnectionError("the stand-in is flaky")
