"""Postgres and files: the study, the leases, the checkpoints."""
