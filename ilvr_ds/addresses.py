"""Addresses that servers of ours listen on: who reaches them, and how they are written."""

from __future__ import annotations

import ipaddress


def ip_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None: a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether it is reached from this machine alone."""
    ip = ip_of(host)
    return host == "localhost" if ip is None else ip.is_loopback


def url_of(host: str, port: int) -> str:
    """As browsers and clients write it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
