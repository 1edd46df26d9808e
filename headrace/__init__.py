"""Headrace: an inference mesh whose data plane is Python.

What outsiders import: generated stubs (`headrace.v1`), errors, configuration and
the command line; and the small library that the services share. Nothing here
imports `services`.
"""

__version__ = "0.1.0"
