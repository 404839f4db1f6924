"""Torch knows one kind of accelerator in a process, and counts it at the first derivative: a process of its own pretends."""

import os

from cases import elsewhere

if os.environ.get("ISOFLAT_PRETEND"):
    elsewhere.device()
