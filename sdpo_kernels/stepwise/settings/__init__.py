"""The schema of run.yaml: reading, checking and comparing a run's settings."""
