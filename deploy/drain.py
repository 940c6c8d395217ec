"""Tell Ray that this node is about to end, so that the work on it is finished or handed on before it does.

    python drain.py watch                 # wait for EC2's notice that this spot machine is taken back, then drain it
    python drain.py now --seconds 45      # drain it at once: for a person, or a provider with another kind of notice

A draining node takes no new work. Its workers see it, finish or spill the batch they are at and give their shard back;
once the node has nothing left to do it leaves the cluster by itself, and what it did is not lost.

This file stands beside the engine and not in it: it runs on the machine that ends, whatever runs there.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import requests
import tenacity
import typer
from ray._private.services import canonicalize_bootstrap_address_or_die, get_node_ip_address
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2, gcs_pb2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Why = Annotated[str, typer.Option(help="What the run's log and table will say.")]
Node = Annotated[str, typer.Option(help="Ray's id of the node; needed only where one machine runs several.")]

METADATA = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
"""Where an EC2 machine asks about itself. AWS names the variable; its own SDKs read it too."""


@app.callback()
def drain() -> None:
    """Tell Ray that this node is about to end, so that its work is finished or handed on before it does."""


@app.command()
def now(
    seconds: Annotated[int, typer.Option(min=1, help="How long this node still lives.")] = 45,
    why: Why = "told to end",
    node: Node = "",
) -> None:
    """Drain this node and wait until it has left the cluster; exit 1 when it had not after so many seconds."""
    ends = time.time() + seconds
    address = canonicalize_bootstrap_address_or_die(os.environ.get("RAY_ADDRESS"))
    gcs = GcsClient(address=address)
    # The address that `ray start` gave this node: the one from which it reaches the head.
    node = node or _only_node_at(get_node_ip_address(address), gcs)
    # The same call as the hidden command `ray drain-node`, which cannot find its own node's id from outside a job.
    accepted, refusal = gcs.drain_node(
        node, autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), why, int(ends * 1000)
    )
    if not accepted:
        sys.exit(f"Ray refused to drain node {node}: {refusal}")
    print(f"node {node} drains, {seconds} s left: {why}", flush=True)
    try:
        tenacity.Retrying(
            stop=tenacity.stop_after_delay(seconds),
            wait=tenacity.wait_fixed(0.5),
            retry=tenacity.retry_if_result(bool),
        )(lambda: node in _alive(gcs))
    except tenacity.RetryError:
        sys.exit(f"node {node} still had work after {seconds} s; what is unfinished will be made again elsewhere")
    print(f"node {node} has left the cluster", flush=True)


@app.command()
def watch(
    seconds: Annotated[int, typer.Option(min=1, help="Tell Ray that the node lives so long from the notice on.")] = 90,
    every: Annotated[float, typer.Option(min=0.1, help="Ask every so many seconds.")] = 5.0,
    node: Node = "",
) -> None:
    """Ask EC2 until it announces the end of this spot machine (two minutes before), then drain the node."""
    with requests.Session() as session:
        notice = tenacity.Retrying(
            wait=tenacity.wait_fixed(every),
            retry=tenacity.retry_if_result(lambda found: found is None)
            | tenacity.retry_if_exception_type(requests.RequestException),
        )(_notice, session)
    now(seconds, f"EC2 announced: {notice}", node)


def _notice(session: requests.Session) -> str | None:
    """EC2's announcement (an action and a time), None while there is none; the two steps are IMDSv2's."""
    token = session.put(
        f"{METADATA}/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}, timeout=2
    )
    token.raise_for_status()
    found = session.get(
        f"{METADATA}/latest/meta-data/spot/instance-action",
        headers={"X-aws-ec2-metadata-token": token.text},
        timeout=2,
    )
    if found.status_code == 404:
        return None
    found.raise_for_status()
    return found.text


def _alive(gcs: GcsClient) -> dict[str, str]:
    """Ids of the nodes that are in the cluster, with their addresses."""
    alive = gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE
    return {
        node_id.hex(): info.node_manager_address
        for node_id, info in gcs.get_all_node_info().items()
        if info.state == alive
    }


def _only_node_at(here: str, gcs: GcsClient) -> str:
    found = [node for node, address in _alive(gcs).items() if address == here]
    if len(found) != 1:
        sys.exit(f"expected one Ray node at {here}, found {len(found)}: {found}; say which with --node")
    return found[0]


if __name__ == "__main__":
    app()
