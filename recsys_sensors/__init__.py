"""When things run: schedules and sensors."""
