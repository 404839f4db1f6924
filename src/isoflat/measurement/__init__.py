"""The engine: from a network, data and a loss to numbers, with passes over the data shared by all that need one."""
