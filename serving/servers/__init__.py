"""The servers a model repository can be served from, by the name a recipe says (``serving.server=...``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from serving.servers import container, path, wheel
from serving.servers.running import Ports, RunningServer, ServerError

__all__ = ["SERVERS", "Ports", "RunningServer", "Server", "ServerError", "StartServer"]


class StartServer(Protocol):
    """Serve ``model_names`` of ``repository`` on loopback ports and return when they are ready."""

    def __call__(
        self,
        repository: Path,
        model_names: Sequence[str],
        *,
        ports: Ports = ...,
        log_path: Path,
        use_gpu: bool = ...,
        ready_timeout_seconds: float = ...,
    ) -> RunningServer: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server:
    """One way to get a server.

    Attributes:
        check: raises ``ServerError`` when this machine lacks something; cheap, so a run calls it first.
        start: see :class:`StartServer`.
    """

    check: Callable[[], None]
    start: StartServer


SERVERS: dict[str, Server] = {
    "wheel": Server(check=wheel.check, start=wheel.start),
    "path": Server(check=path.check, start=path.start),
    "container": Server(check=container.check, start=container.start),
}
