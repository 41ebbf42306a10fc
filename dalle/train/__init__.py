"""Training of both stages: loops, schedules, averaging, sampled pictures."""
