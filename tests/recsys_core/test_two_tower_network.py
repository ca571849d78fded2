"""Losses and gradients of the two towers on one small batch, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from recsys_core.settings import TwoTowerSettings

B, NEGATIVES, ITEMS, D = 6, 5, 20, 4
HIDDEN = [(0, 1), (2, 4), (2, 0)]


def settings(**more: Any) -> TwoTowerSettings:
    return TwoTowerSettings(dimension=D, hidden=(), negatives=NEGATIVES, temperature=0.5, dropout=0.0, **more)


def make_towers(chosen: TwoTowerSettings) -> Any:
    from recsys_core.two_tower_network import Sizes, Towers

    return Towers(Sizes(4, ITEMS, np.zeros((1, 4), np.int32), 1, 1, 1), chosen)


def make_batch(chosen: TwoTowerSettings, history: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    candidates = NEGATIVES + (B if chosen.in_batch else 0)
    zeros = {name: np.zeros(B, np.int32) for name in ("hour", "weekday", "device", "country", "category")}
    return {
        "user_rows": np.arange(4, dtype=np.int32),
        "user_at": random.integers(0, 4, B).astype(np.int32),
        "item_rows": np.arange(ITEMS, dtype=np.int32),
        "row_at": np.arange(ITEMS, dtype=np.int32),
        "path": np.zeros(ITEMS, np.int32),
        "history": random.integers(0, ITEMS, history).astype(np.int32),
        "segments": np.sort(random.integers(0, B, history)).astype(np.int32),
        "recent": np.empty(0, np.int32),
        "recent_segments": np.empty(0, np.int32),
        "item": random.permutation(ITEMS)[: B + NEGATIVES].astype(np.int32),
        "price": np.zeros(B + NEGATIVES, np.int32),
        "item_numbers": np.zeros((B + NEGATIVES, 5), np.float32),
        "correction": random.normal(size=candidates).astype(np.float32),
        "correction_label": random.normal(size=B).astype(np.float32),
        "hidden": np.array(HIDDEN, np.int32),
        "weight": np.ones(B, np.float32),
        "numbers": np.zeros((B, 5), np.float32),
        "seed": np.zeros(2, np.int32),
        **zeros,
    }


def expected_loss(chosen: TwoTowerSettings, users: np.ndarray, items: np.ndarray, batch: dict[str, np.ndarray]) -> np.ndarray:
    candidates = items if chosen.in_batch else items[B:]
    losses = []
    for n in range(B):
        own = float(users[n] @ items[n])
        gone = {c for row, c in HIDDEN if row == n} | ({n} if chosen.in_batch else set())
        kept = [c for c in range(len(candidates)) if c not in gone]
        scores = candidates[kept] @ users[n]
        if chosen.loss == "softmax":
            label = own / 0.5 - batch["correction_label"][n]
            others = scores / 0.5 - batch["correction"][kept]
            losses.append(np.log(np.exp(label) + np.exp(others).sum()) - label)
        elif chosen.loss == "binary":
            losses.append(np.log1p(np.exp(-own / 0.5)) + np.log1p(np.exp(scores / 0.5)).mean())
        else:
            losses.append(1 - own + chosen.negative_weight * np.maximum(scores - chosen.margin, 0).mean())
    return np.array(losses)


@pytest.mark.parametrize("item_bias", [True, False])
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("loss", ["softmax", "binary", "contrastive"])
def test_a_loss_is_that_of_its_formula_without_the_hidden_pairs(loss, in_batch, item_bias):
    chosen = settings(loss=loss, in_batch=in_batch, item_bias=item_bias)
    towers, batch = make_towers(chosen), make_batch(chosen, 12)
    users, items = towers.batch_vectors(towers.gather(batch), batch, training=False)
    found = towers.loss_of(users, items, batch).numpy()
    assert found == pytest.approx(expected_loss(chosen, users.numpy(), items.numpy(), batch), rel=1e-4)


@pytest.mark.parametrize("hidden", [(), (6,)])
def test_an_inner_product_is_the_cosine_plus_the_bias_of_the_item(hidden):
    chosen = settings(item_bias=True).model_copy(update={"hidden": hidden})
    towers, batch = make_towers(chosen), make_batch(chosen, 12)
    users, items = (v.numpy() for v in towers.batch_vectors(towers.gather(batch), batch, training=False))
    directions = [v[:, :-1] / np.linalg.norm(v[:, :-1], axis=1, keepdims=True) for v in (users, items)]
    assert users @ items.T == pytest.approx(directions[0] @ directions[1].T + items[:, -1], abs=1e-6)
    assert len(np.unique(items[:, -1])) > 1


@pytest.mark.parametrize("history", [12, 0])
def test_the_gradient_is_that_of_differences_even_without_any_history(history):
    import tensorflow as tf

    chosen = settings()
    towers, batch = make_towers(chosen), make_batch(chosen, history)
    own, rows = towers.gather(batch)

    def loss(values: Any) -> Any:
        return tf.reduce_mean(towers.loss_of(*towers.batch_vectors((own, values), batch, training=False), batch))

    for _ in range(3):
        with tf.GradientTape() as tape:
            tape.watch(rows)
            value = loss(rows)
        gradient = tf.convert_to_tensor(tape.gradient(value, rows)).numpy()
        start = rows.numpy()
        for row in (int(batch["item"][0]), int(batch["item"][-1]), *batch["history"][:2].tolist()):
            step = np.zeros_like(start)
            step[row, 1] = 1e-2
            difference = float(loss(tf.constant(start + step)) - loss(tf.constant(start - step))) / 2e-2
            assert gradient[row, 1] == pytest.approx(difference, rel=0.05, abs=5e-3)
        untouched = np.setdiff1d(np.arange(ITEMS), np.concatenate([batch["item"], batch["history"]]))
        assert not gradient[untouched].any()
