"""Who may reach a server through a browser: pages of its own alone, by names that are its own."""

import ipaddress
import re
import socket
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers

# What else a browser's address may hold, such as a user before an @, is no name.
_HOST = re.compile(
    r"(?:(?P<name>[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,253}))|\[(?P<address>[0-9A-Fa-f:.]{2,45})\])"
    r"(?::[0-9]{1,5})?"
)
_NEAR = ("same-origin", "none")  # "none": typed into the address bar


def is_loopback(name: Any) -> bool:
    """Whether an address or a name means this machine, for sure."""
    if str(name).lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(str(name)).is_loopback
    except ValueError:
        return False


def is_own(name: str) -> bool:
    """Whether no stranger can let a name mean this server: an address, or no name of the internet.

    Whoever owns a name can let it mean 127.0.0.1 or an address of the local net, but the browser
    says which name it looked up.
    """
    if "." not in name.rstrip(".") or name.lower() == socket.gethostname().lower():
        return bool(name)
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def problem(headers: Headers, host_is_known: Callable[[str], bool]) -> str | None:
    """Why a request may not come from where it comes from, or None.

    Args:
      headers: of the request.
      host_is_known: tells whether the name by which the server was reached is one of its own.
    """
    host = headers.get("host", "")
    match = _HOST.fullmatch(host)
    name = (match["name"] or match["address"]) if match else ""
    if not host_is_known(name):
        return f"Host: this server does not answer to the name {name[:80]!r}"
    if headers.get("sec-fetch-site", "none") not in _NEAR:
        return "Sec-Fetch-Site: pages of other sites are not answered"
    origin = headers.get("origin")
    if origin is not None and origin.lower() != f"http://{host}".lower():
        return "Origin: pages of other sites are not answered"
    return None


def is_json(kind: str) -> bool:
    """Whether a Content-Type is JSON: a page can send all others to strangers without asking."""
    essence, *parameters = (part.strip().lower() for part in kind.split(";"))
    plain = all(part in ("", "charset=utf-8", 'charset="utf-8"') for part in parameters)
    return essence == "application/json" and plain
