"""What a service tells systemd about itself, by the protocol of sd_notify(3)."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Tell systemd a state: ``"READY=1"``, ``"WATCHDOG=1"`` or ``"STOPPING=1"``.

    It is sent to the socket that ``NOTIFY_SOCKET`` names; where there is none, nothing happens. Nor
    does it where systemd has gone away: then nobody is left to tell.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # of Linux's abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(state.encode(), address)
        except OSError:
            pass
