"""Bases: vectors inside a network that linear maps alone write and read, and whose coordinates may be changed."""
