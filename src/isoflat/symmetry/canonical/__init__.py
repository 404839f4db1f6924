"""The canonical representative of an orbit: shifts by least norm, gains folded, scales and bases balanced."""
