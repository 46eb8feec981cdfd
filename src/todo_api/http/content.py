"""Public content that stays the same while the program runs: with a tag, and compressed."""

import gzip
from asyncio import to_thread
from collections.abc import Mapping
from hashlib import sha256

from starlette.requests import Request
from starlette.responses import Response

from todo_api.http.conditional import read_entity_tags
from todo_api.http.negotiation import accepts_gzip

ASK_EACH_TIME = "no-cache"
"""For an address whose content changes with a new version of the program."""

KEEP = "public, max-age=31536000, immutable"
"""For an address that contains the digest of its content."""


class Content:
    """Bytes that anybody may read. Clients that have them already get 304."""

    def __init__(
        self,
        body: bytes,
        media_type: str,
        headers: Mapping[str, str] | None = None,
        cache_control: str = ASK_EACH_TIME,
    ) -> None:
        self.digest = sha256(body).hexdigest()[:32]
        self._body = body
        self._media_type = media_type
        self._headers = {"Cache-Control": cache_control, **(headers or {})}
        self._compressed: bytes | None = None

    async def answer(self, request: Request) -> Response:
        """Return the content, compressed if the client accepts that. The two have two tags."""
        is_compressed = accepts_gzip(request)
        tag = f'"{self.digest}-gzip"' if is_compressed else f'"{self.digest}"'
        headers = {**self._headers, "ETag": tag, "Vary": "Accept-Encoding"}
        known = read_entity_tags(request, "If-None-Match")
        if known is not None and known.include(tag):
            return Response(status_code=304, headers=headers)
        if not is_compressed:
            return Response(self._body, headers=headers, media_type=self._media_type)
        headers["Content-Encoding"] = "gzip"
        return Response(await self._gzipped(), headers=headers, media_type=self._media_type)

    async def _gzipped(self) -> bytes:
        """Compress the content for the first client that asks for it, beside other requests."""
        if self._compressed is None:
            self._compressed = await to_thread(gzip.compress, self._body, mtime=0)
        return self._compressed
