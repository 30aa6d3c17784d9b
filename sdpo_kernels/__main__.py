"""`python -m sdpo_kernels …` is the same as `sdpo …`, for torchrun, which starts modules."""

from sdpo_kernels.cli import main

main()
