"""A run file per method, the preparation of their warm start (prepare.py), and their comparison (compare.py)."""
