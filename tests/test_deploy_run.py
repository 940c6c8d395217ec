"""The scripts under deploy/ as they run: slurm.sh with a real Ray and stand-ins for Slurm, drain.py on a real node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
import tenacity

from tests.fakes import ingested

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

# What the script uses of Slurm. A step runs here, as if this machine were the second node; a requeue leaves a mark.
SRUN = '#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\nif [ "$1" = requeue ]; then echo "$2" >"$MARKS/requeued"; else echo localhost; fi\n'


def until(what: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until a function says yes."""
    tenacity.Retrying(
        stop=tenacity.stop_after_delay(seconds),
        wait=tenacity.wait_fixed(0.1),
        retry=tenacity.retry_if_result(lambda yes: not yes),
    )(what)


class Job:
    """A job of `slurm.sh` with two nodes, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin, self.marks = folder / "bin", folder / "marks"
        self.bin.mkdir()
        self.marks.mkdir()
        self.program("srun", SRUN)
        self.program("scontrol", SCONTROL)
        self.process: subprocess.Popen[str] | None = None

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
        environment |= {
            "PATH": os.pathsep.join([str(self.bin), str(BIN), os.environ["PATH"]]),
            "TMPDIR": str(self.folder),
            "MARKS": str(self.marks),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "two",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "1",
        }
        self.process = subprocess.Popen(
            ["bash", ROOT / "deploy" / "slurm.sh", *words],
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # its process group is what Slurm would end with the job
        )
        return self.process

    def end(self) -> tuple[int, str]:
        assert self.process is not None
        said, _ = self.process.communicate(timeout=120)
        return self.process.returncode, said

    def left(self) -> list[psutil.Process]:
        """Processes of the job's Ray that still run."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = " ".join(process.info["cmdline"] or ())
            if f"{self.folder}/ray-" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found


@pytest.fixture
def job() -> Iterator[Job]:
    # Short, because Ray makes sockets there and their paths may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="job", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Job(Path(folder))
        yield made
        if made.process is not None and made.process.poll() is None:
            os.killpg(made.process.pid, signal.SIGKILL)
            made.process.communicate()
        for process in made.left():
            process.kill()


def test_the_script_is_clean() -> None:
    script = ROOT / "deploy" / "slurm.sh"
    assert os.access(script, os.X_OK)
    said = subprocess.run([BIN / "shellcheck", script], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "")


@pytest.mark.ray
def test_a_job_labels_on_two_nodes_and_leaves_nothing_behind(job: Job) -> None:
    dataset = ingested(job.folder, 4, shard_size=2)
    # The command as it is, once the second node is there: the run would not wait for it.
    job.program(
        "dataengine",
        f"""#!{sys.executable}
import os, sys, time, ray
ray.init(log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.1)
ray.shutdown()
os.execv("{BIN}/dataengine", ["dataengine", *sys.argv[1:]])
""",
    )
    job.start("label", dataset.store.url, "canny_edge", "color_palette", "--device", "cpu", "--workers", "2")
    code, said = job.end()
    assert code == 0, said
    assert "on 2 nodes, try 1" in said
    assert all(len(dataset.committed(m)) == dataset.plan.num_shards for m in ("canny_edge", "color_palette"))
    until(lambda: not job.left())
    assert not list(job.folder.glob("ray-*"))
    assert not list(job.marks.iterdir())


# The rest is about the script alone: Ray is a process that waits, the command one that does as it is told.
RAY = """#!/bin/bash
case "$*" in
health-check*) [ -e "$MARKS/head" ] ;;
*--head*) touch "$MARKS/head"; exec sleep 300 ;;
*) echo $$ >"$MARKS/worker"; exec sleep 300 ;;
esac
"""
DRAINS = """#!/bin/bash
trap 'echo drained >"$MARKS/drained"; kill $!; exit 9' TERM
touch "$MARKS/started"
sleep 300 &
wait $!
"""
DEAF = """#!/bin/bash
trap '' TERM
touch "$MARKS/started"
exec sleep 300
"""


def test_a_notice_drains_the_command_and_requeues_the_job(job: Job) -> None:
    job.program("ray", RAY)
    job.program("dataengine", DRAINS)
    process = job.start("label", "root")
    until((job.marks / "started").exists)
    process.send_signal(signal.SIGTERM)
    code, said = job.end()
    assert (code, (job.marks / "drained").exists()) == (9, True), said
    assert (job.marks / "requeued").read_text().strip() == str(os.getpid())


def test_the_end_of_the_workers_is_a_notice_too(job: Job) -> None:
    """Slurm without preempt_send_user_signal ends the steps, and does not tell the script."""
    job.program("ray", RAY)
    job.program("dataengine", DRAINS)
    job.start("label", "root")
    until((job.marks / "started").exists)
    until((job.marks / "worker").exists)
    os.kill(int((job.marks / "worker").read_text()), signal.SIGTERM)
    code, said = job.end()
    assert (code, (job.marks / "drained").exists()) == (9, True), said
    assert (job.marks / "requeued").exists()


def test_a_command_that_does_not_end_is_killed_and_the_job_requeued(job: Job) -> None:
    job.program("ray", RAY)
    job.program("dataengine", DEAF)
    process = job.start("label", "root", DRAIN_SECONDS="1")
    until((job.marks / "started").exists)
    process.send_signal(signal.SIGTERM)
    code, said = job.end()
    assert code == 128 + signal.SIGKILL, said
    assert (job.marks / "requeued").exists()


def test_a_command_that_fails_is_not_tried_again(job: Job) -> None:
    job.program("ray", RAY)
    job.program("dataengine", "#!/bin/sh\nexit 3\n")
    job.start("label", "root")
    code, said = job.end()
    assert code == 3, said
    assert not (job.marks / "requeued").exists()


def test_a_head_that_cannot_start_ends_the_job_at_once(job: Job) -> None:
    job.program("ray", "#!/bin/sh\nexit 1\n")
    job.start("label", "root")
    code, said = job.end()
    assert code == 1
    assert "no Ray at localhost:" in said
    assert not (job.marks / "requeued").exists()


# -- a spot machine that is taken back --------------------------------------------------------------------------------


class Ec2(BaseHTTPRequestHandler):
    """What a machine can ask EC2 about itself: nothing, until a notice is set."""

    notice: str | None = None
    asked = 0

    def do_PUT(self) -> None:
        self.answer(200, "token" if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else "")

    def do_GET(self) -> None:
        assert self.path == "/latest/meta-data/spot/instance-action"
        type(self).asked += 1
        allowed = self.headers["X-aws-ec2-metadata-token"] == "token"
        self.answer(401 if not allowed else 404 if self.notice is None else 200, self.notice or "")

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *words: object) -> None:
        pass


@pytest.mark.ray
def test_a_notice_of_ec2_drains_the_node() -> None:
    import ray
    from ray.cluster_utils import Cluster

    server = HTTPServer(("127.0.0.1", 0), Ec2)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Any port for the dashboard: where the usual one is taken, Ray leaves a socket open, and warnings are errors here.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "dashboard_port": None})
    try:
        node = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

        @ray.remote(num_cpus=1)
        class Worker:
            def work(self) -> str:
                time.sleep(0.5)
                return "done"

        worker = Worker.remote()
        assert ray.get(worker.work.remote()) == "done"
        environment = os.environ | {
            "RAY_ADDRESS": cluster.address,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        }
        drain = [sys.executable, ROOT / "deploy" / "drain.py"]
        # Two nodes on one machine, which only a test has: it does not guess.
        said = subprocess.run([*drain, "now"], env=environment, capture_output=True, text=True, check=False)
        assert said.returncode == 1
        assert "say which with --node" in said.stderr

        watch = [*drain, "watch", "--every", "0.1", "--seconds", "30", "--node", node.node_id]
        process = subprocess.Popen(watch, env=environment, stdout=subprocess.PIPE, text=True)
        until(lambda: Ec2.asked > 2)
        Ec2.notice = '{"action": "terminate"}'
        assert process.stdout is not None
        assert "drains, 30 s left: EC2 announced" in process.stdout.readline()
        draining = ray._private.worker.global_worker.gcs_client.get_draining_nodes
        until(lambda: [n if isinstance(n, str) else n.hex() for n in draining()] == [node.node_id])
        assert ray.get(worker.work.remote()) == "done"  # what is there may finish
        assert process.poll() is None
        ray.kill(worker)
        assert "has left the cluster" in process.communicate(timeout=60)[0]
        assert process.returncode == 0
    finally:
        ray.shutdown()
        cluster.shutdown()
        server.shutdown()
        server.server_close()
