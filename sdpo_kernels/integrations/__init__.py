"""Adapters that let other people's models and trainers use the kernels."""
