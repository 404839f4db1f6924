"""Rows of results in other programs' formats. Their libraries are optional, and imported where they are used."""
