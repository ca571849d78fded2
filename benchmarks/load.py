"""Load on a gRPC server from processes of their own, and what the server spends on it.

Every client process keeps some calls under way (closed loop) or starts them at a fixed rate (open loop) on its own channel
and reports the time of each call; the processor time of the server's processes is read from the system.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil

DEADLINE_SECONDS = 5.0


@dataclass(frozen=True)
class Load:
    """What one run of load gave.

    Attributes:
        milliseconds: of every answered call, float64 (n,).
        started: when each was started, seconds since the start of the run, float64 (n,).
        failed: number of failed calls by status.
        rate: answered calls a second.
        cpu_ms: processor time of the server for a call, in ms.
    """

    milliseconds: np.ndarray
    started: np.ndarray
    failed: dict[str, int]
    rate: float
    cpu_ms: float

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.milliseconds, q)) if len(self.milliseconds) else float("nan")


def run_load(
    address: str,
    method: str,
    requests: Path,
    seconds: float,
    callers: int,
    server: psutil.Process,
    processes: int = 1,
    rate: float = 0.0,
    deadline: float = DEADLINE_SECONDS,
) -> Load:
    """Load from `processes` clients with `callers` calls each under way, or `rate` calls a second together.

    `requests` is a file of requests: for each its length, 4 bytes little-endian, and its bytes.
    """
    plan = {
        "address": address,
        "method": method,
        "requests": str(requests),
        "seconds": seconds,
        "callers": callers,
        "rate": rate / processes,
        "deadline": deadline,
    }
    clients = [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps({**plan, "offset": k, "step": processes, "out": f"{requests}.{k}.json"})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for k in range(processes)
    ]
    for client in clients:
        assert client.stdout is not None
        client.stdout.readline()
    before = cpu_seconds(server)
    for client in clients:
        assert client.stdin is not None
        client.stdin.write(b"go\n")
        client.stdin.flush()
    for client in clients:
        client.communicate()
    said = [json.loads(Path(f"{requests}.{k}.json").read_text()) for k in range(processes)]
    spent = cpu_seconds(server) - before
    took = np.concatenate([np.asarray(s["took"]) for s in said])
    started = np.concatenate([np.asarray(s["started"]) for s in said])
    failed: dict[str, int] = {}
    for s in said:
        for status, count in s["failed"].items():
            failed[status] = failed.get(status, 0) + count
    calls = len(took) + sum(failed.values())
    return Load(took, started, failed, len(took) / seconds, spent * 1000 / max(calls, 1))


def cpu_seconds(server: psutil.Process) -> float:
    """User and system time of a process and its children."""
    total = 0.0
    for process in (server, *server.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def write_requests(path: Path, requests: Sequence[bytes]) -> Path:
    """The file that `run_load` reads."""
    path.write_bytes(b"".join(len(r).to_bytes(4, "little") + r for r in requests))
    return path


def read_requests(path: Path) -> list[bytes]:
    data, at, requests = path.read_bytes(), 0, []
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        requests.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return requests


async def client(plan: dict[str, Any]) -> dict[str, Any]:
    """One client process."""
    requests = read_requests(Path(plan["requests"]))[plan["offset"] :: plan["step"]]
    took: list[float] = []
    started: list[float] = []
    failed: dict[str, int] = {}
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(plan["address"], options=options) as channel:
        await channel.channel_ready()
        call = channel.unary_unary(plan["method"])
        await call(requests[0])
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        begin = time.perf_counter()
        end = begin + plan["seconds"]

        async def one(request: bytes, due: float) -> None:
            try:
                await call(request, timeout=plan["deadline"])
            except grpc.RpcError as error:
                failed[error.code().name] = failed.get(error.code().name, 0) + 1
                return
            took.append((time.perf_counter() - due) * 1000)
            started.append(due - begin)

        async def closed(number: int) -> None:
            at = number
            while (now := time.perf_counter()) < end:
                await one(requests[at % len(requests)], now)
                at += plan["callers"]

        if not plan["rate"]:
            await asyncio.gather(*(closed(k) for k in range(plan["callers"])))
        else:
            tasks = []
            for k in range(int(plan["rate"] * plan["seconds"])):
                due = begin + k / plan["rate"]
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(one(requests[k % len(requests)], due)))
            await asyncio.gather(*tasks)
    return {"took": took, "started": started, "failed": failed}


def main() -> None:
    import uvloop

    plan = json.loads(sys.argv[1])
    Path(plan["out"]).write_text(json.dumps(uvloop.run(client(plan))))


if __name__ == "__main__":
    main()
