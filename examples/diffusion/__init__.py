"""Diffusion-DPO on a small denoiser: preferences teach it which shape to draw; run.py runs it."""
