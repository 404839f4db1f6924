"""Modules of `cases` are imported by name; collected for doctests they would run once more, under another one."""

import torch

from cases import elsewhere

collect_ignore = ["cases"]

if not torch.cuda.is_available():  # torch knows one kind of accelerator in a process
    elsewhere.device()  # the engine of derivatives counts its devices at the first derivative
