"""Benchmarks: one script a question (`python -m benchmarks.head`), peers behind one signature in `rivals.py`."""
