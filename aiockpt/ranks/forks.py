"""Sockets that a forked child does not keep open.

A connection ends, for the other side, when the last process that holds its socket is
gone: the workers of a data loader would keep a killed rank alive. So a child that
`os.fork` makes lets go of these sockets at once. (One that is made in other ways, by
foreign code that forks without exec, keeps them as long as it lives. So does one that
hangs before Python calls its hooks: torch's thread-locals, a gloo group among them, are
destroyed there with the thread that had them, where another thread has forked.)
"""

__all__ = ["keep_from_children"]

import contextlib
import os
import socket
import weakref

# Objects and not descriptors: the number of one that was closed is another file's soon.
_sockets: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def keep_from_children(sock: socket.socket) -> None:
    """No child that is forked from here on has the socket open."""
    _sockets.add(sock)


def _release() -> None:
    """Puts an empty socket in the place of each.

    Closing them is not enough: the child's copies of the objects would later close
    the same numbers, which by then belong to other files.
    """
    with contextlib.suppress(OSError):  # a child out of descriptors keeps them
        with socket.socket() as empty:
            for fd in [sock.fileno() for sock in _sockets]:
                if fd >= 0:
                    os.dup2(empty.fileno(), fd, inheritable=False)
    _sockets.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release)
