"""Diffusion-DPO on a small real denoiser: preferences teach it which shape to draw; run.py runs it."""
