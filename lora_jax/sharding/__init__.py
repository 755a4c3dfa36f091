"""The placement of parameters and adapters on a mesh."""

from lora_jax.sharding.gathered import gathered as gathered
from lora_jax.sharding.partition import automatic as automatic
from lora_jax.sharding.partition import names_of as names_of
from lora_jax.sharding.partition import partition_specs as partition_specs
from lora_jax.sharding.partition import place as place
from lora_jax.sharding.partition import tree_of as tree_of
from lora_jax.sharding.rules import ShardingRule as ShardingRule
from lora_jax.sharding.rules import Specs as Specs
from lora_jax.sharding.rules import check_divides as check_divides
from lora_jax.sharding.rules import specs as specs
