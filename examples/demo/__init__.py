"""The demo: preferences teach a small model which of two authors to follow; run.py runs and explains it."""
