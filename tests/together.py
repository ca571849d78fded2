"""Several writers at once: processes of their own, or threads of this one."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Sequence
from typing import Any

IMPORTED = ["recsys_core.catalog", "recsys_core.precompute", "recsys_core.profiles", "recsys_core.release"]
SECONDS = 120


def in_processes(work: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
    """Call `work`, a function of a module, in a process for each tuple of arguments; all have to end well."""
    context = multiprocessing.get_context("forkserver")  # a fork of a process with threads may hang
    context.set_forkserver_preload(IMPORTED)
    processes = [context.Process(target=work, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def in_threads(work: Sequence[Callable[[], object]]) -> None:
    """Do several things at once; what one of them raises is raised."""
    raised: list[BaseException] = []
    begin = threading.Barrier(len(work))

    def run(one: Callable[[], object]) -> None:
        begin.wait()
        try:
            one()
        except BaseException as error:  # noqa: BLE001 - raised below
            raised.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
