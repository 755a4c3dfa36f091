"""Read data: from the name of a source to batches, with TFDS and Grain."""

from lora_jax.system.extras import require

require("train", __name__)

from lora_jax.data.batches import Batches as Batches
from lora_jax.data.batches import Facts as Facts
from lora_jax.data.batches import describe as describe
from lora_jax.data.catalogue import open_source as open_source
from lora_jax.data.classification import classification as classification
from lora_jax.data.config import DataConfig as DataConfig
from lora_jax.data.config import ImageDataConfig as ImageDataConfig
from lora_jax.data.labels import Labels as Labels
from lora_jax.data.labels import labels_of as labels_of
from lora_jax.data.language_modelling import language_modelling as language_modelling
from lora_jax.data.process_slice import Shard as Shard
from lora_jax.data.source import DataSource as DataSource
from lora_jax.errors import DataError as DataError
