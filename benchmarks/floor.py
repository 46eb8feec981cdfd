"""The floor: an ASGI application that always sends the same answer. It shows uvicorn's cost."""

BODY = b'{"id":1,"title":"Buy groceries"}'
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(BODY)).encode()),
    ],
}


async def app(scope, receive, send):  # noqa: ANN001, ANN201, ARG001  bare ASGI, as short as possible
    """Send the constant answer."""
    if scope["type"] == "http":
        await send(START)
        await send({"type": "http.response.body", "body": BODY})
