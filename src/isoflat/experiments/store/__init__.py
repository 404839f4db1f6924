"""A store of finished cells on disk, each a result with the settings that decide it; a cell is whole or not there at all.

```
folder/isoflat-store.json              what this folder is, and the version of its layout
folder/cells/<address>.json            settings and result, with the SHA-256 of the weights
folder/cells/<address>.safetensors     weights, where the cell has some; written first
folder/under-way/<address>/            a cell's own checkpoints, until it is finished
folder/locks/                          empty files to lock; one that is left behind holds nothing
folder/index.sqlite                    made from the cells, to look them up; always replaceable
```
"""

from isoflat.experiments.store.artifact import Artifact, Refused
from isoflat.experiments.store.main import Store
from isoflat.io.strict import address

__all__ = ["Artifact", "Refused", "Store", "address"]
