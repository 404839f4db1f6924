"""Groups that leave the network's function unchanged."""
