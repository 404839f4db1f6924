"""Does a measure predict generalisation over many trained networks? One file per statistic."""
