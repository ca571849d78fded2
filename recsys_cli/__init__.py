"""The `recsys` command, the local stack and the demo."""
