"""How tests call a server of this machine."""

import ssl
from typing import Any

from support.waiting import LIMIT

LOCAL: dict[str, Any] = {
    "timeout": LIMIT,
    "trust_env": False,
    "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
}
"""Options of httpx2 for no proxy and no certificates, which take each client 17 ms to load."""
