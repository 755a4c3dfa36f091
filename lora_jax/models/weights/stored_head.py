"""Read the parts of a classification head that a checkpoint contains."""

import numpy as np

from lora_jax.errors import WeightsError
from lora_jax.models.weights.stored import Stored


def stored_head(stored: Stored, pooling: str) -> dict[str, np.ndarray]:
    """Return the stored parameters of a head, by path, in our layout.

    A pretrained encoder often has the dense layer of its pooler but no classes; then only that
    layer is returned.
    """
    rows = stored.table.heads.get(pooling)
    if rows is None:
        known = ", ".join(stored.table.heads) or "none"
        raise WeightsError(f"{stored.origin}: no head has the pooling {pooling!r}; known: {known}")
    names = {stored.table.clean(name): name for name in stored.shapes}
    found = {}
    for row in rows:
        if row.hf in names:
            name = names[row.hf]
            whole = tuple(slice(0, size) for size in stored.shapes[name])
            value = np.asarray(stored.read(name, row, whole), np.float32)
            found[row.path] = value.T if row.transposed else value
    return found
