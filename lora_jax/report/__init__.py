"""Write a report about one run, or about several runs that it compares.

    lora-jax report runs/reviews

A report is a folder with report.html, report.md and the figures. `document` defines the parts of a
report and `render` writes it; the other files fill it from the files in run directories.
"""

from lora_jax.system.extras import require

require("train", __name__)
require("report", __name__)
