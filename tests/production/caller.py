"""Calls a server all the time, from inside of the cluster, until it is told to end.

python caller.py ADDRESS, until SIGTERM. Prints one JSON object: answers by release, and failures by status.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections import Counter

import grpc

from serving.client import ClientOptions, RecsysClient

CALLERS = 4
PER_SECOND = 25
ATTEMPTS = 2


def main(address: str) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    answers: Counter[str] = Counter()
    failures: Counter[str] = Counter()

    def call() -> None:
        with RecsysClient(address, options=ClientOptions(timeout=5, attempts=ATTEMPTS)) as client:
            while not stop.wait(1 / PER_SECOND):
                try:
                    answers[client.recommend("anybody").release_id] += 1
                except grpc.RpcError as error:
                    failures[f"{error.code().name}: {error.details()}"] += 1  # type: ignore[attr-defined]

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    print("calling", flush=True)
    for caller in callers:
        caller.join()
    print(json.dumps({"answers": answers, "failures": failures}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
