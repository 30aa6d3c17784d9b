"""The demo: preferences teach a small model which of two authors to follow; run.py runs it and says what it does."""
