"""Tracing a network and finding the groups that keep its function."""
