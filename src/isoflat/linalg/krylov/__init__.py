"""Krylov subspaces: the one Lanczos recurrence."""
