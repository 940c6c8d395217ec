"""What each way for a task or an actor to end on Ray means for a run: the one place that decides it.

A table of the names of Ray's exception classes, so that it can be read, and tested for completeness, without Ray.
"""

from __future__ import annotations

from typing import Literal

Verdict = Literal["task", "worker", "node", "result", "start", "run"]
"""task: the code of the task raised; it may be tried again, and counts against the task.
worker: the process is gone or out of reach; replaced, and counts against the task it had.
node: the machine is gone, or took the process with it; replaced, and is nobody's fault.
result: the work may be done but its report is lost; asked again, and commit records tell.
start: a worker cannot be made at all; the run ends.
run: Ray itself is broken for this driver; the run ends, and running it again resumes."""

VERDICTS: dict[str, Verdict] = {
    # The code that ran raised, or what it returned cannot travel.
    "RayTaskError": "task",
    "UserCodeException": "task",
    "UnserializableException": "task",
    "OufOfBandObjectRefSerializationException": "task",
    "CrossLanguageError": "task",
    # The worker process.
    "ActorDiedError": "worker",
    "ActorUnavailableError": "worker",
    "RayActorError": "worker",
    "WorkerCrashedError": "worker",
    "OutOfMemoryError": "worker",  # the memory monitor of the node chose it
    "AsyncioActorExit": "worker",
    "RpcError": "worker",
    "PendingCallsLimitExceeded": "worker",
    # The node.
    "NodeDiedError": "node",
    "LocalRayletDiedError": "node",
    "ActorPlacementGroupRemoved": "node",
    "TaskPlacementGroupRemoved": "node",
    # The report.
    "ObjectLostError": "result",
    "ObjectFetchTimedOutError": "result",
    "ObjectFreedError": "result",
    "ObjectReconstructionFailedError": "result",
    "OwnerDiedError": "result",
    "ReferenceCountingAssertionError": "result",
    "PlasmaObjectNotAvailable": "result",
    "GetTimeoutError": "result",
    "TaskCancelledError": "result",
    "ObjectRefStreamEndOfStreamError": "result",
    "StreamingGeneratorReplayInconsistentError": "result",
    # What no second attempt will cure.
    "RuntimeEnvSetupError": "start",
    "ActorUnschedulableError": "start",
    "TaskUnschedulableError": "start",
    "ActorHandleNotFoundError": "start",
    "ActorAlreadyExistsError": "start",
    "AuthenticationError": "run",
    "ObjectStoreFullError": "run",
    "OutOfDiskError": "run",
    "RaySystemError": "run",
    "RayChannelError": "run",
    "RayChannelTimeoutError": "run",
    "RayCgraphCapacityExceeded": "run",
    "RayDirectTransportError": "run",
    "RayError": "run",
}

_NODE_ENDED = ("node has been terminated", "node was terminated", "its node has died", "node is dead", "node died")


def of(error: BaseException) -> Verdict:
    """The verdict on an exception: that of the nearest of its classes that is in the table; `task` for any other.

    An actor that died with its node, or was preempted, says so in its text or by a flag, not by its class.
    """
    found = (VERDICTS[c.__name__] for c in type(error).__mro__ if c.__name__ in VERDICTS)
    verdict: Verdict = next(found, "task")
    if verdict == "worker" and (getattr(error, "preempted", False) or any(t in str(error) for t in _NODE_ENDED)):
        return "node"
    return verdict


def cause(error: BaseException) -> str:
    """A few words for tables and metrics: the class, and nothing that differs from case to case."""
    inner = getattr(error, "cause", None)
    return type(inner if isinstance(inner, BaseException) else error).__name__
