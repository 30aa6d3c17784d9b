"""Samples in the page."""
from sdpo_kernels.stepwise.report.reading import Run
def samples_part(run: Run) -> str:
    return ""
