"""Header fields that make a request conditional.

`If-Match` and `If-None-Match` are those of RFC 9110, section 13.1. `Idempotency-Key` is that of
draft-ietf-httpapi-idempotency-key-header.
"""

import re
from typing import NamedTuple

from starlette.requests import Request

from todo_api.errors import InvalidParameter
from todo_api.request_context import RequestContext

_TAG = rb'(W/)?("[\x21\x23-\x7e\x80-\xff]*")'
_TAGS = re.compile(rb"[ \t,]*(?:" + _TAG + rb"[ \t]*(?:,[ \t,]*|$))+")
_ONE_TAG = re.compile(_TAG)
_VERSION = re.compile(r'"[1-9][0-9]{0,17}"')


class EntityTags(NamedTuple):
    """The value of `If-Match` or `If-None-Match`: any entity, or one with one of these tags."""

    any: bool = False
    strong: tuple[str, ...] = ()
    weak: tuple[str, ...] = ()

    def include(self, tag: str) -> bool:
        """Compare weakly, as `If-None-Match` does (RFC 9110, section 8.8.3.2)."""
        return self.any or tag in self.strong or tag in self.weak

    @property
    def versions(self) -> list[int] | None:
        """The versions that strong tags of tasks name. None if any version will do."""
        if self.any:
            return None
        return [int(tag[1:-1]) for tag in self.strong if _VERSION.fullmatch(tag)]


def read_entity_tags(request: Request, name: str) -> EntityTags | None:
    """Read a list of entity tags from a header field, or None without one.

    Raises `InvalidParameter` for anything else.
    """
    values = RequestContext.of(request.scope).headers.get(name.lower().encode())
    if values is None:
        return None
    value = b",".join(values)
    if value.strip(b" \t") == b"*":
        return EntityTags(any=True)
    if not _TAGS.fullmatch(value):
        raise InvalidParameter(f'{name} must be * or a list of entity tags such as "7"')
    found = [(weak, tag.decode("latin-1")) for weak, tag in _ONE_TAG.findall(value)]
    return EntityTags(
        strong=tuple(tag for weak, tag in found if not weak),
        weak=tuple(tag for weak, tag in found if weak),
    )


_KEY = re.compile(rb'"([\x21-\x7e]{1,255})"|([\x21\x23-\x7e][\x21-\x7e]{0,254})')


def read_idempotency_key(request: Request) -> str | None:
    """Read the key, which is the same with the quotes of a structured field and without them.

    Raises `InvalidParameter`.
    """
    values = RequestContext.of(request.scope).headers.get(b"idempotency-key")
    if values is None:
        return None
    found = _KEY.fullmatch(values[0].strip(b" \t"))
    if len(values) > 1 or found is None:
        raise InvalidParameter(
            "Send one Idempotency-Key of 1 to 255 visible ASCII characters, in quotes or without"
        )
    return (found[1] or found[2]).decode()
