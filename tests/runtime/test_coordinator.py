"""Where process 0 listens, and which addresses are refused."""

import logging
import socket
import subprocess
import sys

import pytest
from processes import free_port

from dppa_jax.runtime.coordinator import is_local, listening_address, meeting_place, split


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def resolves(monkeypatch):
    """resolves(ADDRESS, ...): what every name stands for on this host; nothing where there is none."""

    def make(*addresses: str) -> None:
        def getaddrinfo(host, port, type):
            if not addresses:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return [(socket.AF_INET, type, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return make


LISTENING = """
import sys
import psutil
from absl import logging
from dppa_jax.runtime import processes

processes.start(sys.argv[1], 1, 0)
print(*{at.laddr.ip for at in psutil.Process().net_connections("tcp") if at.status == psutil.CONN_LISTEN}, flush=True)
"""


def test_process_0_listens_on_the_address_of_host_alone(port):
    """On every interface, if it were left to JAX."""
    command = [sys.executable, "-c", LISTENING, f"127.0.0.1:{port}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert set(ended.stdout.split()) <= {"127.0.0.1", "::ffff:127.0.0.1"}, ended.stderr
    assert ended.stdout.strip(), ended.stderr


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_loopback_is_listened_on_as_it_is_named(host, port, caplog):
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    assert listening_address(f"{host}:{port}") == f"{host}:{port}"
    assert not caplog.records


@pytest.mark.parametrize(
    ("addresses", "reason"),
    [
        (["127.0.1.1"], "the name node7 is 127.0.1.1 on this host, which no other host reaches"),  # as Debian has it
        (["198.51.100.7"], "node7 is 198.51.100.7, which is no address of this host"),  # behind NAT, or a service
        ([], "this host does not know the name node7 (Name or service not known)"),
    ],
)
def test_all_interfaces_are_listened_on_only_where_host_cannot_be_with_the_reason(
    addresses, reason, resolves, port, caplog
):
    resolves(*addresses)
    with caplog.at_level(logging.WARNING, "absl"):
        assert listening_address(f"node7:{port}") == f"[::]:{port}"
    assert f"process 0 listens on all interfaces, because {reason}." in caplog.text


@pytest.mark.parametrize("address", ["", "0.0.0.0"])
def test_a_port_in_use_is_refused_and_not_shared(address, port, resolves):
    with socket.create_server((address, port)):
        with pytest.raises(ValueError, match=rf"port {port} of 127\.0\.0\.1 cannot be used .*another port"):
            listening_address(f"127.0.0.1:{port}")
        resolves()
        with pytest.raises(ValueError, match=rf"port {port} of 0\.0\.0\.0 cannot be used"):
            listening_address(f"node7:{port}")


def test_processes_that_the_cluster_knows_listen_as_those_that_are_given(monkeypatch, port):
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "localhost,b", "NTASKS": "2", "LOCALID": "0", "STEP_NUM_NODES": "2"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", str(port))
    for process in (0, 1):
        monkeypatch.setenv("SLURM_PROCID", str(process))
        place = {"coordinator_address": f"localhost:{port}", "num_processes": 2, "process_id": process}
        listening = {"coordinator_bind_address": f"localhost:{port}"} if process == 0 else {}
        assert meeting_place("auto", 0, -1, 1) == place | listening
        given = {"cluster_detection_method": "deactivate"}
        assert meeting_place(f"localhost:{port}", 2, process, 1) == place | listening | given
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"0.0.0.0:{port}")
    assert "coordinator_bind_address" not in meeting_place(f"localhost:{port}", 2, 0, 1)  # the user's word counts


@pytest.mark.parametrize("address", ["here", "here:", ":1", "::1:8476", "here:0", "here:65536", "here:1:2", "[::1]"])
def test_addresses_that_are_none_are_refused(address):
    with pytest.raises(ValueError, match=r"give HOST:PORT of process 0, or auto\. An IPv6 address"):
        split(address)


def test_only_loopback_is_this_host_alone():
    assert [host for host in ("localhost", "127.3.2.1", "::1", "node7", "10.0.0.1", "::") if is_local(host)] == [
        "localhost",
        "127.3.2.1",
        "::1",
    ]
