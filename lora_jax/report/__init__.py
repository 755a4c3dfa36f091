"""Write a page about one run, or about several side by side: report.html, report.md and figures.

    lora-jax report runs/reviews

`document` says what a report is, `render` writes one; the other files fill it from what runs have
left in their directories.
"""

from lora_jax.extras import require

require("train", __name__)
require("report", __name__)

from lora_jax.report.document import Fact as Fact
from lora_jax.report.document import Figure as Figure
from lora_jax.report.document import Note as Note
from lora_jax.report.document import Panel as Panel
from lora_jax.report.document import Paragraph as Paragraph
from lora_jax.report.document import Report as Report
from lora_jax.report.document import Section as Section
from lora_jax.report.document import Table as Table
from lora_jax.report.render import write as write
