"""Write a page about one run, or about several side by side: report.html, report.md and figures.

    lora-jax report runs/reviews

`document` says what a report is, `render` writes one; the other files fill it from what runs have
left in their directories.
"""

from lora_jax.extras import require

require("train", __name__)
require("report", __name__)
