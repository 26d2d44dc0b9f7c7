"""What a model is worth in use: agreement, calibration, choices, latency and memory."""
