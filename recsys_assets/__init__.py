"""The lineage graph: assets, checks, resources and the code location."""

import warnings

from dagster import BetaWarning

# Backfill policies, observable multi-assets and partial partition windows are used knowingly; requirements.lock pins them.
warnings.filterwarnings("ignore", category=BetaWarning)
