"""Asks roialign_ext/_build.py what to compile; everything else is in pyproject.toml."""

from importlib.util import module_from_spec, spec_from_file_location

from setuptools import setup

# Loaded by its path: importing the package would import the very module that is to be built.
spec = spec_from_file_location("_build", "roialign_ext/_build.py")
build = module_from_spec(spec)
spec.loader.exec_module(build)

setup(**build.setup_options())
