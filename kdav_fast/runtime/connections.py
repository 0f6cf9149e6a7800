"""Who has ended, known at once: the system closes a process's connections, whatever ended it.

Every process holds one to rank 0, on which nothing is said but its rank. Where none can be made, as through a firewall,
only its silence tells that a process has ended.
"""

import os
import selectors
import socket
from contextlib import suppress

import torch.distributed as dist

from kdav_fast.runtime.meeting import look

_KEY = "connections"
_TIME = 5.0
"""Seconds to connect: whoever needs longer has a firewall in between."""
_STRANGER = -1
"""Who has not said its rank yet."""
_open: set[socket.socket] = set()


class Connections:
    """This process's: to rank 0, or rank 0's to all others.

    Args:
        store: of the run.
        rank: this process's.
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._rank = rank
        self._selector = selectors.DefaultSelector()
        self._closed: set[int] = set()
        if rank == 0:
            with suppress(OSError):
                server = _server()
                self._add(server, None)
                store.set(_KEY, str(server.getsockname()[1]))

    def connect(self, store: dist.Store, address: str) -> None:
        """To rank 0, which must have begun.

        Args:
            store: of the run; its connection must be free.
            address: where rank 0 is to be found.
        """
        if self._rank > 0 and (port := look(store, _KEY)):
            with suppress(OSError):
                connection = socket.create_connection((address, int(port)), _TIME)
                connection.sendall(self._rank.to_bytes(4, "big"))
                self._add(connection, 0)

    def closed(self) -> set[int]:
        """Ranks whose connections are closed: of one that still gives signs of life, that means nothing."""
        for key, _ in self._selector.select(0):
            if key.data is None:
                with suppress(OSError):
                    self._add(key.fileobj.accept()[0], _STRANGER)
            else:
                self._hear(key)
        return self._closed

    def close(self) -> None:
        """End all of them: the process leaves the run."""
        for key in list(self._selector.get_map().values()):
            self._end(key.fileobj)
        self._selector.close()

    def _add(self, opened: socket.socket, rank: int | None) -> None:
        opened.setblocking(False)
        _open.add(opened)
        self._selector.register(opened, selectors.EVENT_READ, rank)

    def _hear(self, key: selectors.SelectorKey) -> None:
        try:
            said = key.fileobj.recv(4)
        except OSError:
            said = b""
        if said:
            self._selector.modify(key.fileobj, selectors.EVENT_READ, int.from_bytes(said, "big"))
            return
        self._closed.add(key.data)
        self._end(key.fileobj)

    def _end(self, opened: socket.socket) -> None:
        self._selector.unregister(opened)
        _open.discard(opened)
        opened.close()


def _server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _close_all() -> None:
    """In a forked child, which would keep them open when its parent has ended."""
    for connection in _open:
        connection.close()
    _open.clear()


os.register_at_fork(after_in_child=_close_all)
