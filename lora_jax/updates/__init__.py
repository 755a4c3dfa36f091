"""The kinds of updates: one file for each.

    name   W'                                                arXiv         trained, for W [in, out]
    lora   W + scale * a @ b                                 2106.09685    r (in + out)
    alora  W + scale * a @ b for some tokens, W for others   2504.12397    r (in + out)
    dora   magnitude / ||V|| * V,  V = W + scale * a @ b     2402.09353    r (in + out) + out
    vera   W + A diag(lambda_d) B diag(lambda_b)             2310.11454    r + out
    loha   W + scale * (a1 @ b1) * (a2 @ b2)                 2108.06098    2 r (in + out)
    lokr   W + scale * kron(left, a @ b)                     2212.10650    m l + r (in/m + out/l)
    ia3    W diag(gain); "ia3_inputs" diag(gain) W           2205.05638    out; in
    oft    R W, R in blocks [r, r]                           2306.07280    in (r - 1) / 2
    miss   W + block[i % r] for each input i                 2409.15371    r out
    tokens W[rows] + delta                                                 rows out
    bias   W + delta                                         2106.10199    all of it

`Rule(pattern, kind=...)` and `LoraSpec(kind=...)` choose one by its name. To add one of your own,
derive a class from `Kind` and pass an object of it to `register`.

A kind says which arrays are trained and saved. An `Update` (`update.py`) is the object that runs
through a program together with W. Every kind runs as plain factors (`lowrank.py`), with gains if it
rescales W. The other updates wrap these.
"""

from lora_jax.updates.activated import Alora as Alora
from lora_jax.updates.bias import Bias as Bias
from lora_jax.updates.bias import Shift as Shift
from lora_jax.updates.dora import Directed as Directed
from lora_jax.updates.dora import Dora as Dora
from lora_jax.updates.factors import Factors as Factors
from lora_jax.updates.factors import Gains as Gains
from lora_jax.updates.ia3 import Gain as Gain
from lora_jax.updates.ia3 import Ia3 as Ia3
from lora_jax.updates.ia3 import Ia3Inputs as Ia3Inputs
from lora_jax.updates.kind import Kind as Kind
from lora_jax.updates.kind import kind_of as kind_of
from lora_jax.updates.kind import register as register
from lora_jax.updates.loha import HadamardFactors as HadamardFactors
from lora_jax.updates.loha import Loha as Loha
from lora_jax.updates.lokr import KroneckerFactors as KroneckerFactors
from lora_jax.updates.lokr import Lokr as Lokr
from lora_jax.updates.lora import Lora as Lora
from lora_jax.updates.miss import Miss as Miss
from lora_jax.updates.miss import Shared as Shared
from lora_jax.updates.oft import Oft as Oft
from lora_jax.updates.oft import OftCayley as OftCayley
from lora_jax.updates.oft import Rotation as Rotation
from lora_jax.updates.tokens import Rows as Rows
from lora_jax.updates.tokens import TrainedRows as TrainedRows
from lora_jax.updates.tokens import row_parts as row_parts
from lora_jax.updates.vera import Vectors as Vectors
from lora_jax.updates.vera import Vera as Vera

for _kind in (
    *(Lora(), Dora(), Vera(), Loha(), Lokr(), Bias()),
    *(Ia3(), Ia3Inputs(), Oft(), OftCayley(), Miss(), TrainedRows(), Alora()),
):
    register(_kind)
