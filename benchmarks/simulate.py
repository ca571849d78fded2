"""Events a second that the simulator makes as Arrow tables of event schema v1, on one core.

python benchmarks/simulate.py [events]
"""

from __future__ import annotations

import resource
import sys
import time

import pyarrow as pa

from recsys_core.simulate import Simulation, SimulationConfig


def main(events: int) -> None:
    pa.set_cpu_count(1)
    started = time.perf_counter()
    simulation = Simulation(SimulationConfig(events=events))
    made = time.perf_counter()
    rows = sum(batch.events.num_rows for batch in simulation.batches())
    seconds = time.perf_counter() - made
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{rows:,} events in {seconds:.2f} s: {rows / seconds:,.0f} events/s")
    print(f"set up in {made - started:.2f} s, {memory:.0f} MB RSS")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 600_000)
