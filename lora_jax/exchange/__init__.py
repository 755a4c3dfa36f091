"""Adapters in the formats of other tools: `from lora_jax.exchange import peft`.

names            which parameter is which module of a Hugging Face model
module_update    the noun that every format shares: the update of one module
into_adapter     updates of modules -> an Adapter, whose axes a trace of the model finds
out_of_adapter   an Adapter -> updates of modules
tensor_file      safetensors files, read with distrust
peft             PEFT folders; peft_config and peft_keys know PEFT's settings and names
gguf             adapter files of llama.cpp (the extra `gguf`)
mlx              folders of mlx-lm
loralib          state dicts of Microsoft's loralib, read only
openpi           checkpoints of openpi, read only
consumers        the PEFT settings that each serving tool refuses or misreads
"""
