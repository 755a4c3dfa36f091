"""Analyse updates: subspaces, spectra, amplification, and low-rank factors of full updates.

phi      = similarity(one, two)                  how far two adapters share directions (paper 7.2)
spectra  = spectrum(layout, adapters)            singular values, effective rank, energy
factors  = amplification(layout, params, adapters)   against W's own directions (paper 7.3)
found    = extract(layout, base, finetuned, 8)   the best adapter of a full fine-tuning

All of it runs on the host in float64, on numbers of the adapters' own size: the singular values of
`a b` are those of a [rank, rank] matrix (see `lora_jax.analysis.matrices`). Stacked layers and
experts are done as a batch, and every result carries their axes first. Only what is asked of W
itself, or of a full update, reads a matrix of the size of W, one at a time; W's largest directions
are sought on JAX's default device, in float32.
"""

from lora_jax.analysis.amplify import Amplification as Amplification
from lora_jax.analysis.amplify import amplification as amplification
from lora_jax.analysis.decompose import Extraction as Extraction
from lora_jax.analysis.decompose import extract as extract
from lora_jax.analysis.spectra import Spectrum as Spectrum
from lora_jax.analysis.spectra import spectrum as spectrum
from lora_jax.analysis.subspaces import Side as Side
from lora_jax.analysis.subspaces import phi as phi
from lora_jax.analysis.subspaces import similarity as similarity
