"""Quantise matrices and a tiny model with bitsandbytes, in a separate environment.

    python -m venv env
    env/bin/pip install bitsandbytes==0.50.2 torch==2.13.0 numpy safetensors
    env/bin/python tests/golden/make_bitsandbytes.py

Matrices go to ../bases/data/bitsandbytes.npz. Folders, in the form in which transformers saves
them, go to golden_models/llama_nf4, llama_nf4_double (whose bytes are viewed as bfloat16) and
llama_int8.

The operators are bitsandbytes' torch operators for devices without special kernels. Two of its
kernels for CPUs cannot be used. `quantize_blockwise` first rounds a number to one of 65,536, and
then differs from the GPU's kernels, which write checkpoints. `dequantize_4bit` takes the wrong
scales with AVX-512 if a row does not consist of whole blocks. Names and all else are as in
`QuantState.as_dict(packed=True)`.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.torch
import torch

KERNELS: dict[tuple[str, str], Callable[..., Any]] = {}
_register = torch.library.register_kernel


def _recorded(operator: str, devices: str) -> Callable[[Any], Any]:
    """`register_kernel` that also keeps each operator's kernel for each kind of device."""

    def decorate(kernel: Any) -> Any:
        KERNELS[operator, devices] = kernel
        return _register(operator, devices)(kernel)

    return decorate


torch.library.register_kernel = _recorded
import bitsandbytes  # noqa: E402
import bitsandbytes.functional as F  # noqa: E402

DATA = pathlib.Path(__file__).parents[1] / "bases" / "data"


def written(w: torch.Tensor, block: int, double: bool) -> dict[str, np.ndarray]:
    codes, state = F.quantize_4bit(w, blocksize=block, quant_type="nf4")
    scales = state.absmax
    if double:
        table = F.create_dynamic_map()
        state.offset = scales.mean()
        centred = scales - state.offset
        state.absmax, nested = operator("quantize_blockwise")(centred, table, 256)
        state.state2 = F.QuantState(nested, code=table, blocksize=256, dtype=torch.float32)
        state.nested = True
        scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    dense = operator("dequantize_4bit")(codes, scales, block, "nf4", w.shape, w.dtype)
    found = {"w": w.float().numpy(), "weight": codes.numpy(), "dense": dense.float().numpy()}
    for name, x in state.as_dict(packed=True).items():
        found[name.removeprefix("quant_state.")] = x.numpy()
    return found


def operator(name: str) -> Callable[..., Any]:
    return KERNELS[f"bitsandbytes::{name}", "default"]


def ties() -> torch.Tensor:
    """Numbers on, just below and just above each midpoint of the table, with scales of 2**k."""
    code = F.get_4bit_type("nf4", device="cpu").numpy()
    middles = (code[:-1] + code[1:]) * np.float32(0.5)
    around = [middles, np.nextafter(middles, np.float32(-2)), np.nextafter(middles, np.float32(2))]
    block = np.concatenate([*around, code, [1.0, -1.0, 0.0]]).astype(np.float32)
    assert block.size == 64
    return torch.tensor(np.stack([block * np.float32(2.0**k) for k in (-9, -1, 0, 3)]))


def cases() -> dict[str, tuple[torch.Tensor, int, bool]]:
    torch.manual_seed(0)
    zeros = torch.randn(8, 64)
    zeros[2] = 0
    return {
        "ties": (ties(), 64, False),
        "plain": (torch.randn(16, 128), 64, False),
        "across_rows": (torch.randn(12, 96), 64, False),
        "short_block": (torch.randn(5, 50), 64, False),
        "odd": (torch.randn(5, 7), 32, False),
        "long_block": (torch.randn(6, 700), 4096, False),
        "bfloat16": (torch.randn(16, 128).bfloat16(), 64, False),
        "float16": (torch.randn(16, 64).half(), 64, False),
        "double": (torch.randn(70, 128).bfloat16(), 32, True),
        "double_short": (torch.randn(20, 96).bfloat16(), 32, True),
        "zeros": (zeros, 64, False),
    }


def write_folder(name: str, linear: Callable[..., torch.nn.Module], how: dict[str, Any]) -> None:
    """Write the golden Llama with quantised layer kernels, as transformers saves such a model."""
    models = pathlib.Path(__file__).parent / "golden_models"
    tensors = safetensors.torch.load_file(models / "llama" / "model.safetensors")
    saved = {}
    for key, w in tensors.items():
        if not key.endswith("_proj.weight"):
            saved[key] = w.bfloat16()
            continue
        layer = linear(w.shape[1], w.shape[0])
        layer.weight.data = w.bfloat16()
        layer = layer.to("cpu")
        stem = key.removesuffix("weight")
        saved |= {stem + k: x.contiguous() for k, x in layer.state_dict().items()}
    (models / name).mkdir(exist_ok=True)
    safetensors.torch.save_file(saved, models / name / "model.safetensors", {"format": "pt"})
    config = json.loads((models / "llama" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", **how}
    (models / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_folders() -> None:
    def four(double: bool, storage: torch.dtype) -> Callable[..., torch.nn.Module]:
        return lambda inputs, outputs: bitsandbytes.nn.Linear4bit(
            inputs,
            outputs,
            bias=False,
            compress_statistics=double,
            quant_type="nf4",
            quant_storage=storage,
        )

    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    write_folder("llama_nf4", four(False, torch.uint8), how)
    double = {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"}
    write_folder("llama_nf4_double", four(True, torch.bfloat16), how | double)

    def eight(inputs: int, outputs: int) -> torch.nn.Module:
        return bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)

    write_folder("llama_int8", eight, {"load_in_8bit": True})


def main() -> None:
    write_folders()
    found = {}
    for name, (w, block, double) in cases().items():
        for key, x in written(w, block, double).items():
            found[f"{name}/{key}"] = x
    w = torch.randn(24, 80)
    codes, scb, _ = F.int8_vectorwise_quant(w.half())
    found["int8/w"], found["int8/weight"] = w.half().float().numpy(), codes.numpy()
    found["int8/SCB"] = scb.numpy()
    found["int8/dense"] = F.int8_vectorwise_dequant(codes, scb).numpy()
    made_with = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
    found["made_with"] = np.frombuffer(json.dumps(made_with).encode(), np.uint8)
    np.savez_compressed(DATA / "bitsandbytes.npz", **found)


if __name__ == "__main__":
    main()
