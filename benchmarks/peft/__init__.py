"""Compute the same gradients in PyTorch with Hugging Face PEFT, in turns with ours."""
