"""Short hashes that tell whether two things are the same."""

from __future__ import annotations

import hashlib


def fingerprint(*parts: str | bytes) -> str:
    """First 16 hex digits of SHA-256 over the parts in order, each with its length.

    >>> fingerprint("ab", "c") == fingerprint("a", "bc")
    False
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]
