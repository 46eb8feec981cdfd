"""What a client prefers, from the weights in its header fields (RFC 9110, section 12.4.2)."""

import re

from starlette.requests import Request

_WEIGHT = re.compile(r"q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)", re.ASCII)


def prefers_html(request: Request) -> bool:
    """Tell whether the client likes HTML better than JSON. Without a preference it gets JSON."""
    weights = _weights(request, "accept")
    html = _weight(weights, "text/html", "text/*", "*/*")
    return html > _weight(weights, "application/json", "application/*", "*/*")


def accepts_gzip(request: Request) -> bool:
    """Tell whether the client accepts gzip, and likes it no less than the plain bytes."""
    weights = _weights(request, "accept-encoding")
    gzip = _weight(weights, "gzip", "*")
    return gzip > 0 and gzip >= weights.get("identity", 0)


def _weight(weights: dict[str, float], *names: str) -> float:
    """Return the weight of the first of these names that the client lists, or 0."""
    return next((weights[name] for name in names if name in weights), 0)


def _weights(request: Request, field: str) -> dict[str, float]:
    """Return what a field lists, in lower case, with weights. An item with a wrong one is 0."""
    weights = {}
    for item in ",".join(request.headers.getlist(field)).lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        given = [each for each in parameters if each.startswith("q=")]
        found = _WEIGHT.fullmatch(given[0] if given else "q=1")
        weights[name] = float(found[1]) if found else 0
    return weights
