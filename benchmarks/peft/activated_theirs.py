"""The logits of PEFT for `activated.py`. It does not import JAX."""

import pathlib
import sys

import numpy as np
import peft
import torch
import transformers


def main() -> None:
    folder, count = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    ids, found = torch.tensor(np.load(folder / "ids.npy")), []
    for i in range(count):
        load = transformers.AutoModelForCausalLM.from_pretrained
        base = load(folder / "model", dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, folder / f"adapter_{i}").eval()
        with torch.no_grad():
            found.append(model(input_ids=ids).logits[0].numpy())
    np.save(folder / "logits.npy", np.stack(found))


if __name__ == "__main__":
    main()
