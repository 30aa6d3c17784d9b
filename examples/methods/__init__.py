"""A run file for every method, what they start from (prepare.py), and all of them compared (compare.py)."""
