"""Where the processes of a job meet: the address of the coordinator, and the addresses on which process 0 listens."""

import errno
import ipaddress
import os
import re
import socket
from typing import Any

from absl import logging

ADDRESS = re.compile(r"(?P<host>\[[\w:.%]+\]|[^\s:\[\]]+):(?P<port>\d+)")


def split(coordinator: str) -> tuple[str, int]:
    """Divide HOST:PORT; an IPv6 address stands in brackets there.

    Raises:
      ValueError: it is no such address.

    >>> split("[::1]:8476")
    ('::1', 8476)
    """
    parts = ADDRESS.fullmatch(coordinator)
    if not parts or not 0 < int(parts["port"]) < 1 << 16:
        raise ValueError(
            f"--coordinator={coordinator}: give HOST:PORT of process 0, or auto. An IPv6 address stands in brackets."
        )
    return parts["host"].strip("[]"), int(parts["port"])


def is_local(host: str) -> bool:
    """Return whether a host's name or address says that only processes of the same machine reach it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name


def meeting_place(coordinator: str, num_processes: int, process_id: int, seconds: int) -> dict[str, Any]:
    """Return the arguments of `jax.distributed.initialize` that say where the processes meet.

    Args:
      coordinator: HOST:PORT of process 0, or "auto" to ask the cluster.
      num_processes, process_id: 0 and -1 to ask the cluster.
      seconds: for which to ask, at most.
    """
    given = os.environ.get("JAX_COORDINATOR_ADDRESS") if coordinator == "auto" else coordinator
    if num_processes:
        place = {"coordinator_address": given, "num_processes": num_processes, "process_id": process_id}
        place["cluster_detection_method"] = "deactivate"  # Slurm's would give this process one GPU of its host
    else:
        from jax._src import clusters  # JAX asks in `initialize` itself, too late to say where to listen

        ask = clusters.ClusterEnv.auto_detect_unset_distributed_params
        try:
            address, processes, process, _ = ask(given, None, None, None, None, seconds)
        except RuntimeError as error:
            raise ValueError(f"--coordinator=auto: the cluster does not tell: {error}") from error
        place = {"coordinator_address": address, "num_processes": processes, "process_id": process}
    if place["process_id"] == 0 and place["coordinator_address"] and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        place["coordinator_bind_address"] = listening_address(place["coordinator_address"])
    return place


def listening_address(coordinator: str) -> str:
    """Return the address on which process 0 shall listen: that of HOST, and no other, where this is possible.

    Where it is not, process 0 listens on all interfaces, and a warning says why.

    Raises:
      ValueError: the port is in use, or this user may not use it.
    """
    host, port = split(coordinator)
    try:
        found = {(family, place) for family, *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        reason = f"this host does not know the name {host} ({error.strerror})"
    else:
        addresses = ", ".join(sorted(place[0] for _, place in found))
        if not any(_is_own(family, place) for family, place in found):
            reason = f"{host} is {addresses}, which is no address of this host"
        elif not is_local(host) and all(is_local(place[0]) for _, place in found):
            reason = f"the name {host} is {addresses} on this host, which no other host reaches"
        else:
            return coordinator
    _is_own(socket.AF_INET, ("0.0.0.0", port))
    logging.warning("--coordinator=%s: process 0 listens on all interfaces, because %s.", coordinator, reason)
    return f"[::]:{port}"


def _is_own(family: int, place: tuple) -> bool:
    """Return whether this host has an address; JAX would crash at one that it has not, and share a port in use."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ValueError(
                f"port {place[1]} of {place[0]} cannot be used ({error.strerror}): another job may have it. Give "
                f"--coordinator another port."
            ) from None
        return False
    return True
