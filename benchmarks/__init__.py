"""Benchmarks: one script per question (`python -m benchmarks.head`), peers behind one signature in `rivals.py`."""
