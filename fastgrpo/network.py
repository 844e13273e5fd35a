"""The network between a job's nodes: which of a machine's addresses the others reach it by."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from fastgrpo.config import UserError
from fastgrpo.nodes import has_store, num_nodes, whoami

REACH_S = 60.0


def torchrun_store(timeout_s: float = REACH_S) -> dist.Store:
    """A connection to the store of the job's torchrun. Raises RuntimeError where it cannot be reached in that time."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    tcp = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    return dist.PrefixStore(f"fastgrpo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)


def join(backend: str) -> None:
    """Make the default process group of the processes that torchrun has started.

    Raises UserError where this node cannot reach the others, or they cannot reach it.
    """
    if not has_store():
        dist.init_process_group(backend)
        return
    try:
        store = torchrun_store()
    except RuntimeError as error:
        raise UserError(
            f"MASTER_ADDR={os.environ['MASTER_ADDR']}: {whoami()} does not reach torchrun there; start torchrun on "
            "every node with --local-addr and the address by which the others reach that node"
        ) from error
    _name_the_network(store)
    try:
        dist.init_process_group(backend)
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise UserError(
            f"GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME', 'null')}: {whoami()} cannot exchange with the "
            "others over it; set it on every node to the interface of the network between the nodes"
        ) from error


def _name_the_network(store: dist.Store) -> None:
    """Set GLOO_SOCKET_IFNAME where gloo would take the loopback, and VLLM_HOST_IP where vLLM would have to guess.

    gloo takes the interface that the machine's name leads to, and many a machine's leads to itself.
    """
    address = _address(store)
    if address is None:  # all nodes are this machine
        return
    os.environ.setdefault("VLLM_HOST_IP", address)
    interface = _interface_of(address)
    if interface is not None and _leads_to_itself(socket.gethostname()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _address(store: dist.Store) -> str | None:
    """By which of its addresses the other nodes reach this one; None where they are on this machine too.

    It is the one that packets to torchrun's store go out from; on the store's own node, those to the next node.
    """
    node = int(os.environ["GROUP_RANK"])
    mine = _towards(os.environ["MASTER_ADDR"])
    store.set(f"address/{node}", mine)
    if not _is_loopback(mine):
        return mine
    store.set_timeout(default_pg_timeout)  # the next node may be slow to start
    mine = _towards(store.get(f"address/{(node + 1) % num_nodes()}").decode())
    return None if _is_loopback(mine) else mine


def _towards(host: str) -> str:
    """The address that packets to a host would go out from; nothing is sent."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _leads_to_itself(name: str) -> bool:
    """Whether gloo, looking for an address of this machine's under the name, finds only its loopback, or nothing."""
    with suppress(OSError):
        for family, kind, protocol, _, target in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(target)
                return _is_loopback(str(target[0]))
    return True


def _interface_of(address: str) -> str | None:
    from psutil import net_if_addrs

    return next((name for name, addresses in net_if_addrs().items() if address in (a.address for a in addresses)), None)
