"""The speed layer's processes around Kafka."""
