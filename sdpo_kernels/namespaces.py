"""The namespaces of this copy's operators at torch's dispatcher. `make hub-kernel` gives each build others."""

from __future__ import annotations

OPERATORS = "sdpo_kernels"  # the custom ops in Python
NATIVE = "sdpo_native"  # the operators of csrc/; the libraries are compiled with it
ONE_BUILD = False  # whether NATIVE names one build: then a library that another copy has loaded is this copy's too
