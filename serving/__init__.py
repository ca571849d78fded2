"""The gRPC process that answers from the latest release."""
