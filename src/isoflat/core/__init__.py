"""Nouns everyone may import: no networks, no input or output."""
