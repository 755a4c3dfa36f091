"""Analyse updates: subspaces, spectra, amplification, and low-rank factors of full updates.

phi      = similarity(one, two)                  the share of directions of two adapters (paper 7.2)
spectra  = spectrum(layout, adapters)            singular values, effective rank, energy
factors  = amplification(layout, params, adapters)   against W's own directions (paper 7.3)
found    = extract(layout, base, finetuned, 8)   the best adapter of a full fine-tuning

The work is done on the host in float64, on arrays of the adapters' own size: `a b` has the singular
values of a [rank, rank] matrix (see `lora_jax.analysis.matrices`). Stacked layers and experts form
a batch, and every result has their axes first. Only questions about W itself, or about
a full update, read a matrix of the size of W, one at a time. The largest directions of W are
computed on JAX's default device, in float32.
"""

from lora_jax.analysis.amplify import Amplification as Amplification
from lora_jax.analysis.amplify import amplification as amplification
from lora_jax.analysis.decompose import Extraction as Extraction
from lora_jax.analysis.decompose import extract as extract
from lora_jax.analysis.from_base import Start as Start
from lora_jax.analysis.from_base import StartError as StartError
from lora_jax.analysis.spectra import Spectrum as Spectrum
from lora_jax.analysis.spectra import spectrum as spectrum
from lora_jax.analysis.subspaces import Side as Side
from lora_jax.analysis.subspaces import phi as phi
from lora_jax.analysis.subspaces import similarity as similarity
