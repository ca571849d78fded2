"""What the resources of one process keep between the steps that use them."""

from __future__ import annotations

import pytest
from snapshots import make_manifest, make_snapshot

from recsys_assets.resources import Platform
from recsys_core.release import ReleaseError
from recsys_core.settings import Settings


def test_a_snapshot_is_kept_for_the_manifest_that_it_was_verified_by(settings: Settings) -> None:
    platform = Platform(settings)
    made = make_snapshot(items=60, rank=4)
    platform.releases.write(make_manifest(made), made)
    promoted = platform.releases.promote(made.release_id).manifest_sha256
    kept = platform.snapshot(made.release_id, promoted)
    assert platform.snapshot(made.release_id, promoted) is kept
    with pytest.raises(ReleaseError, match="not the one that was promoted"):
        platform.snapshot(made.release_id, "0" * 64)
    assert platform.snapshot(made.release_id, promoted).item_ids[0] == made.item_ids[0]
