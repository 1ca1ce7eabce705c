"""A cluster of Ray on this machine, with the application of serving/ray_app.py, in a process of its own.

    python -m tests.support.ray_server ARGUMENTS NODES CORES    (ARGUMENTS in JSON)

It prints the server's address, and ends with its stdin.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.paths import REPOSITORY
from tests.support.processes import command_line, descendants


@dataclass
class RayServer:
    """A running cluster, and the server's address."""

    url: str
    pid: int

    def processes(self, words: str) -> list[int]:
        """The cluster's processes whose command line has these words, oldest first."""
        return sorted(pid for pid, line in descendants(self.pid) if words in line)

    def replicas(self, deployment: str) -> list[int]:
        """The processes of a deployment's replicas."""
        return self.processes(f"ServeReplica:default:{deployment}")

    def kill_node(self) -> None:
        """Kill the node that was started last, with all that runs on it."""
        raylets = self.processes("/raylet/raylet ")
        assert len(raylets) > 1
        victims = [raylets[-1], *(pid for pid, _ in descendants(raylets[-1]))]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)


@contextmanager
def ray_server(*, nodes: int = 1, cores: int = 8, **arguments: Any) -> Iterator[RayServer]:
    """Start a cluster with `cores` on each node, and the application; `arguments` are its own."""
    words = [sys.executable, "-m", "tests.support.ray_server", json.dumps(arguments), str(nodes), str(cores)]
    # Ray's workers are nice by default, and would wait for every other test.
    environment = {
        **os.environ, "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    }  # fmt: skip
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = next((line for line in process.stdout if line.startswith("http://")), None)
            assert line is not None, "the application was not deployed; the messages above have the reason"
            yield RayServer(line.strip(), process.pid)
        finally:
            started = [pid for pid, _ in descendants(process.pid)]
            process.stdin.close()
            try:
                process.wait(120)
            finally:
                process.kill()
                for pid in started:
                    if "ray" in command_line(pid):
                        os.kill(pid, signal.SIGKILL)


def _main(arguments: dict[str, Any], nodes: int, cores: int) -> None:
    import ray

    from llm2slm_export.serving.ray_app import build, serve

    options = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    cluster: Any = None
    if nodes == 1:
        ray.init("local", _node_ip_address="127.0.0.1", num_cpus=cores, log_to_driver=False, **options)
    else:
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores, **options})
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=cores)
        ray.init(address=cluster.address, log_to_driver=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(arguments))
    print(f"http://127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()
    if cluster is not None:
        cluster.shutdown()  # or a later ray.init finds its address


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
