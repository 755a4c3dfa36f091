"""Writes ../bases/data/bitsandbytes.npz with bitsandbytes, in an environment of its own.

    python -m venv env && env/bin/pip install bitsandbytes==0.50.2 torch==2.13.0 numpy
    env/bin/python tests/golden/make_bitsandbytes.py

The operators are those that it has for devices without kernels of their own, in torch. Two of its
kernels for CPUs are of no use here: `quantize_blockwise` first rounds a number to one of 65,536,
and then differs from the GPU's kernels, with which checkpoints are written; `dequantize_4bit` takes
the wrong scales with AVX-512 where a row is not whole blocks. The names and all else are those of
`QuantState.as_dict(packed=True)`.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

KERNELS: dict[tuple[str, str], Callable[..., Any]] = {}
_register = torch.library.register_kernel


def _recorded(operator: str, devices: str) -> Callable[[Any], Any]:
    """`register_kernel`, which also keeps what each operator is for each kind of device."""

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
    """Numbers on, just below and just above each midpoint of the table, at scales of 2**k."""
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


def main() -> None:
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
