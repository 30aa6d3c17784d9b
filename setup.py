"""Build script: everything declarative is in pyproject.toml; csrc/ extensions will be built from here."""

from setuptools import setup

setup()
