"""What the replicas of a cluster would compute on, asked before a model is loaded in the dtype that suits them.

The answer is one node's: of a cluster of unlike nodes, the one that Ray gives the question. It knows no model.
"""

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.cluster import connect, joins_cluster, node_resources
from actors.replica import Seat, choose_seat
from engine.config import RayConfig
from engine.devices import Hardware, choose_device, hardware_of
from engine.errors import ClusterError


def hardware_of_replicas(config: RayConfig, device: str) -> Hardware:
    """Return what replicas compute on; `device` is model.device. A private Ray is this machine, and is not started.

    Raises: ClusterError when the cluster does not answer or has no place for a replica within ray.start_timeout_s.
    """
    if not joins_cluster(config):
        return hardware_of(choose_device(device))
    with connect(config):
        seat = choose_seat(config, 1, device, node_resources())  # type: ignore[arg-type]  # one of the key's names
        return hardware_at(seat, config.start_timeout_s)


def hardware_at(seat: Seat, timeout_s: float) -> Hardware:
    """Return what a replica at such a seat of the connected cluster computes on. Raises: ClusterError."""
    here = ray.util.get_node_ip_address()
    if seat.device == "cpu" and all(node.address == here for node in node_resources()):
        return hardware_of("cpu")  # a task would import torch first
    question = ray.remote(num_cpus=seat.num_cpus, num_gpus=seat.num_gpus)(hardware_of).remote(seat.device)
    try:
        return ray.get(question, timeout=timeout_s)
    except GetTimeoutError as error:
        ray.cancel(question, force=True)
        raise ClusterError(
            f"A node must say within ray.start_timeout_s={timeout_s:g} what it computes on; none did. "
            f"{seat.shortage()} Wait for room, or set model.dtype."
        ) from error
    except RayError as error:
        raise ClusterError(
            f"A node must say what it computes on; {str(error).strip().splitlines()[-1]}. Set model.dtype, or mend the "
            "cluster."
        ) from error
