"""What the driver of a run needs of a cluster: `actors.py` gives it with Ray, a test with what it wants to happen."""

from __future__ import annotations

from typing import Any, Protocol

from dataengine.schedule import Stage


class Cluster(Protocol):
    """What the driver needs of a cluster: processes that can be asked things, and nodes that come and go."""

    elastic: bool
    """Whether asking for more workers than there is room for may bring more nodes."""

    def start(self, stage: Stage, device: str, batch_seconds: float) -> Any:
        """A new worker of a stage, wherever and whenever there is room for it."""

    def ask(self, worker: Any, what: str, *arguments: Any) -> Any:
        """Call `ready`, `run`, `drain`, `usage` or `close` of a worker; the answer is to be waited for."""

    def wait(self, answers: list[Any], seconds: float) -> list[Any]:
        """Those of some answers that are there, at least one of them unless the time is over."""

    def get(self, answer: Any) -> Any:
        """What was answered; raises what was raised, or what became of the worker."""

    def kill(self, worker: Any) -> None:
        """End a worker at once."""

    def nodes(self) -> dict[str, dict[str, float]]:
        """The resources of every node that is alive."""

    def draining(self) -> dict[str, int]:
        """Nodes that have announced their end, with the deadline (milliseconds since the epoch, 0 for none)."""
