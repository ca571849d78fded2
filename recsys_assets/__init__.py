"""The lineage graph: assets, checks, resources and the code location."""
