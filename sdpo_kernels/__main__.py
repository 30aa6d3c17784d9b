"""`python -m sdpo_kernels …` is the command `sdpo …`; torchrun wants a module."""

from sdpo_kernels.cli import main

main()
