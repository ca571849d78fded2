"""The lineage graph: assets, checks, resources and the code location."""

import warnings

from dagster import BetaWarning

# Backfill policies, observable multi-assets and partial partition windows are used knowingly; requirements.lock pins them.
warnings.filterwarnings("ignore", category=BetaWarning)

# Tables are backfilled as one run for a range, models as one run for a day; a job that holds both takes the latter.
warnings.filterwarnings("ignore", message="Asset job .* materializes assets with varying BackfillPolicies")
