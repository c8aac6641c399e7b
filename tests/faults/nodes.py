"""A Ray cluster of three nodes on this machine, in a process of its own: prints its address and the processes of each
node as one line of JSON, and ends them all when its standard input closes.

The suite's own process is connected to another Ray, and a node is killed by its processes, as a power cut would.
"""

import json
import sys

from ray.cluster_utils import Cluster

NODES = 3
STORE_BYTES = 80_000_000
FAST_HEALTH_CHECK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 3,
}
"""Ray's defaults take a node for dead after a minute; a timeout below 10 s would take a busy machine for a dead one."""


def main() -> None:
    """Start the nodes, one CPU each, the head first; wait to be told to end them."""
    cluster = Cluster()
    nodes = []
    for number in range(NODES):
        head = {"_system_config": FAST_HEALTH_CHECK, "include_dashboard": False} if number == 0 else {}
        nodes.append(cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, **head))
    processes = [[p.process.pid for group in n.all_processes.values() for p in group] for n in nodes]
    sys.stdout.write(json.dumps({"address": cluster.address, "nodes": processes}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
