"""The simulated shop: reproducible, with the rhythm, funnel, drift and defects that it is configured to have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import scipy.sparse as sp

from recsys_core.catalog import CATALOG_SCHEMA, read_catalog
from recsys_core.events import DAY_MS, EVENT_SCHEMA, HOUR_MS, invalid_reasons, key_start_ms
from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.settings import EventSettings
from recsys_core.simulate import Simulation, SimulationConfig, fixed_width

END = key_start_ms("2026-03-16T00")
"""A Monday midnight, so that blocks of 24 hours are days."""
SMALL = SimulationConfig(seed=3, users=400, items=200, days=7, events=40_000, end=END)


def all_events(simulation: Simulation) -> pa.Table:
    return pa.concat_tables([batch.events for batch in simulation.batches()])


def as_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return Simulation(SMALL)


@pytest.fixture(scope="module")
def events(simulation: Simulation) -> pa.Table:
    return all_events(simulation)


@pytest.fixture(scope="module")
def unique(events: pa.Table) -> pa.Table:
    first = pa.table({"id": events["event_id"], "row": np.arange(events.num_rows)}).group_by("id").aggregate([("row", "min")])
    return events.take(first["row_min"])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(simulation: Simulation, events: pa.Table) -> None:
    assert as_bytes(all_events(Simulation(SMALL))) == as_bytes(events)
    assert as_bytes(all_events(simulation)) == as_bytes(events)
    other = Simulation(SMALL.model_copy(update={"seed": 4}))
    assert as_bytes(all_events(other)) != as_bytes(events)
    assert not set(all_events(other)["event_id"].to_pylist()) & set(events["event_id"].to_pylist())


def test_every_row_is_a_valid_event_of_the_schema(events: pa.Table) -> None:
    assert events.schema == EVENT_SCHEMA
    assert invalid_reasons(events, EventSettings(), now=END).null_count == events.num_rows


def test_the_number_of_events_is_about_the_configured_one(unique: pa.Table) -> None:
    assert unique.num_rows == pytest.approx(SMALL.events, rel=0.1)


def test_late_and_duplicate_events_come_at_their_rates() -> None:
    config = SMALL.model_copy(update={"late_rate": 0.05, "duplicate_rate": 0.02})
    late, ids, rows = 0, set(), 0
    for batch in Simulation(config).batches():
        late += pc.sum(pc.less(batch.events["ts"], batch.arrival_ms - HOUR_MS)).as_py() or 0
        ids |= set(batch.events["event_id"].to_pylist())
        rows += batch.events.num_rows
    # One late by one to ten hours lies more than an hour before the start of its arrival hour in 17 of 18 cases.
    assert late / rows == pytest.approx(0.05 * 17 / 18, rel=0.15)
    assert (rows - len(ids)) / len(ids) == pytest.approx(0.02, rel=0.15)


def test_pieces_are_consecutive_hours_of_arrival_and_nothing_arrives_before_it_happens(simulation: Simulation) -> None:
    batches = list(simulation.batches())
    assert [b.arrival_ms for b in batches] == list(range(SMALL.start_ms, SMALL.end_ms, HOUR_MS))
    for batch in batches:
        assert (pc.max(batch.events["ts"]).as_py() or 0) < batch.arrival_ms + HOUR_MS


def test_without_late_and_duplicate_events_each_hour_holds_its_own_in_order() -> None:
    clean = SMALL.model_copy(update={"late_rate": 0.0, "duplicate_rate": 0.0})
    for batch in Simulation(clean).batches():
        ts = batch.events["ts"].to_numpy()
        assert np.all(np.diff(ts) >= 0)
        assert np.all(ts // HOUR_MS * HOUR_MS == batch.arrival_ms)


def test_a_purchase_follows_a_cart_and_a_cart_follows_a_view_of_the_session(unique: pa.Table) -> None:
    first: dict[tuple[str, str, str], int] = {}
    for row in unique.select(["session_id", "item_id", "event_type", "ts"]).to_pylist():
        key = (row["session_id"], row["item_id"], row["event_type"])
        first[key] = min(row["ts"], first.get(key, row["ts"]))
    carts = {k: ts for k, ts in first.items() if k[2] == "cart"}
    purchases = {k: ts for k, ts in first.items() if k[2] == "purchase"}
    # The view of a late event may not have arrived by the end of the simulation.
    ordered = [first.get((s, i, "view"), END) < ts for (s, i, _), ts in carts.items()]
    ordered += [first.get((s, i, "cart"), END) < ts for (s, i, _), ts in purchases.items()]
    assert len(purchases) > 500
    assert np.mean(ordered) > 0.998


def test_the_funnel_narrows_at_its_rates_and_purchases_carry_the_price(simulation: Simulation, unique: pa.Table) -> None:
    counts = {c["values"]: c["counts"] for c in unique["event_type"].value_counts().to_pylist()}
    assert counts["cart"] / counts["view"] == pytest.approx(SMALL.cart_rate, rel=0.1)
    assert counts["purchase"] / counts["cart"] == pytest.approx(SMALL.purchase_rate, rel=0.1)
    prices = dict(zip(*(simulation.catalog()[c].to_pylist() for c in ("item_id", "price")), strict=True))
    for row in unique.slice(0, 5000).to_pylist():
        assert row["value"] == (prices[row["item_id"]] if row["event_type"] == "purchase" else None)


def test_evenings_are_busier_than_nights_and_weekends_than_weekdays(unique: pa.Table) -> None:
    hours = unique["ts"].to_numpy() // HOUR_MS
    by_hour = np.bincount(hours % 24, minlength=24)
    assert by_hour[18:22].sum() > 5 * by_hour[1:5].sum()
    days = np.bincount(hours // 24 - SMALL.start_ms // DAY_MS, minlength=7)
    assert days[5:7].mean() > 1.15 * days[:5].mean()


def test_a_viral_item_takes_many_times_its_usual_share_while_it_lasts(simulation: Simulation, unique: pa.Table) -> None:
    ts, item = unique["ts"].to_numpy(), unique["item_id"].to_numpy(zero_copy_only=False)
    bursts = simulation.truth()["bursts"].to_pylist()
    assert len(bursts) == 14
    lifts = []
    for burst in bursts:
        during = (ts >= burst["start_ts"]) & (ts < burst["start_ts"] + HOUR_MS)
        lifts.append((item[during] == burst["item_id"]).mean() / (item == burst["item_id"]).mean())
    assert np.median(lifts) > 4


def test_items_and_users_join_every_day_and_no_item_is_seen_before_it_exists(simulation: Simulation, unique: pa.Table) -> None:
    catalog = simulation.catalog()
    created = dict(zip(catalog["item_id"].to_pylist(), catalog["created_ts"].to_pylist(), strict=True))
    for item, ts in zip(unique["item_id"].to_pylist(), unique["ts"].to_pylist(), strict=True):
        assert created[item] <= ts
    days = (catalog["created_ts"].to_numpy() - SMALL.start_ms) // DAY_MS
    assert np.bincount(days[days >= 0]).tolist() == [2] * 7
    seen_new = {item for item in unique["item_id"].to_pylist() if created[item] >= SMALL.start_ms}
    assert len(seen_new) >= 7
    first_day = {
        u for u, ts in zip(unique["user_id"].to_pylist(), unique["ts"].to_pylist(), strict=True) if ts < END - 6 * DAY_MS
    }
    assert max(first_day) < "u000400" <= max(unique["user_id"].to_pylist())


def test_popularity_drifts() -> None:
    config = SimulationConfig(
        seed=3, users=2000, items=100, days=10, events=400_000, end=END, drift=0.5, viral_items_per_day=0, new_items_per_day=0
    )
    events = all_events(Simulation(config))
    day = (events["ts"].to_numpy() - config.start_ms) // DAY_MS
    item = np.char.lstrip(events["item_id"].to_numpy(zero_copy_only=False).astype(str), "i").astype(int)
    counts = [np.bincount(item[day == d], minlength=100) for d in range(10)]
    next_day, last_day = (np.corrcoef(counts[1], counts[d])[0, 1] for d in (2, 9))
    assert last_day < next_day - 0.05


def test_a_factor_model_beats_popularity_on_a_time_split() -> None:
    from implicit.als import AlternatingLeastSquares

    config = SimulationConfig(seed=5, users=1500, items=1000, days=14, events=150_000, end=END)
    events = all_events(Simulation(config))
    user, item = (
        np.char.lstrip(events[c].to_numpy(zero_copy_only=False).astype(str), "ui").astype(int) for c in ("user_id", "item_id")
    )
    train = events["ts"].to_numpy() < END - 2 * DAY_MS
    shape = (user.max() + 1, item.max() + 1)
    seen = sp.csr_matrix((np.ones(train.sum()), (user[train], item[train])), shape)
    held = sp.csr_matrix((np.ones((~train).sum()), (user[~train], item[~train])), shape) > 0
    held = (held - held.multiply(seen > 0)).tocsr()
    held.eliminate_zeros()
    users = np.flatnonzero((np.diff(held.indptr) > 0) & (np.diff(seen.indptr) > 0))

    def ndcg(ranked: np.ndarray) -> float:
        gain = 1 / np.log2(np.arange(10) + 2)
        hits = np.take_along_axis(held[users].toarray(), ranked, axis=1)
        ideal = np.cumsum(gain)[np.minimum(np.diff(held.indptr)[users], 10) - 1]
        return float(((hits * gain).sum(axis=1) / ideal).mean())

    model = AlternatingLeastSquares(factors=32, alpha=10.0, regularization=5.0, iterations=8, random_state=1, num_threads=1)
    model.fit(seen, show_progress=False)
    factors = model.recommend(users, seen[users], N=10)[0]
    popularity = np.where(seen[users].toarray() > 0, -1.0, np.asarray(seen.sum(axis=0)))
    assert ndcg(factors) > 1.5 * ndcg(np.argsort(-popularity, axis=1)[:, :10])


def test_landing_gets_a_file_an_hour_of_arrival_and_a_second_run_rewrites_them(tmp_path: Path, events: pa.Table) -> None:
    landing = Landing(Lake(str(tmp_path)))
    assert Simulation(SMALL).write_landing(landing) == events.num_rows
    first = {f.path: Path(f.path).read_bytes() for f in landing.files()}
    assert min(first).endswith("/landing/simulated/2026-03-09T00.parquet")
    assert len(first) == 7 * 24
    Simulation(SMALL).write_landing(landing)
    assert {f.path: Path(f.path).read_bytes() for f in landing.files()} == first


def test_the_catalogue_has_readable_titles_and_goes_into_the_lake(lake: Lake, simulation: Simulation) -> None:
    catalog = simulation.catalog()
    assert catalog.column_names == ["item_id", "title", "category", "price", "available", "created_ts", "brand"]
    assert pc.all(pc.match_substring_regex(catalog["title"], r"^[A-Z][a-z]+ [A-Z][a-z]+ [A-Z][a-z]+ \d{3}$")).as_py()
    assert "sports/running/shoes" in catalog["category"].to_pylist()
    simulation.write_catalog(lake)
    stored = read_catalog(lake)
    assert stored.schema == CATALOG_SCHEMA
    assert stored["item_id"].to_pylist() == catalog["item_id"].to_pylist()


def test_the_truth_is_written_to_a_folder_of_its_own(tmp_path: Path, simulation: Simulation) -> None:
    simulation.write_truth(tmp_path / "truth")
    assert sorted(p.name for p in (tmp_path / "truth").iterdir()) == ["bursts.parquet", "items.parquet", "users.parquet"]
    users = simulation.truth()["users"]
    assert users.num_rows == 400 + 6 * 4
    assert all(len(c) == 4 for c in users["categories"].to_pylist())


def test_fixed_width_pads_widens_and_knows_hexadecimal() -> None:
    assert fixed_width("u", np.array([7, 123456]), 6).to_pylist() == ["u000007", "u123456"]
    assert fixed_width("i", np.array([1234567]), 6).to_pylist() == ["i1234567"]
    assert fixed_width("", np.array([255, 2**64 - 1], dtype=np.uint64), 16, hexadecimal=True).to_pylist() == [
        "00000000000000ff",
        "ffffffffffffffff",
    ]
