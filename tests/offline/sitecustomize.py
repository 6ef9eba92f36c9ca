"""On PYTHONPATH, this keeps every Python that starts away from the network: so chapters are run by `make test`.

An audit hook sees what every library does through Python's sockets, and cannot be taken off again.  The error is none that a
library takes for a broken line and works around.
"""

import sys

HERE = ("127.0.0.1", "::1", "localhost", "", None)


class ReachesOut(Exception):
    """A program that must do without the network tried to use it."""


def only_here(event: str, args: tuple) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(args[1], tuple):
        host = args[1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    else:
        return
    host = host.decode(errors="replace") if isinstance(host, bytes) else host
    if host not in HERE:
        raise ReachesOut(f"this program reaches for the network: {event} {host}")


sys.addaudithook(only_here)
