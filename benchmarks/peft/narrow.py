"""Limit YNNPACK, which computes XLA's products on a CPU, to AVX2 and FMA. For benchmarks only.

`--xla_cpu_max_isa` limits the code that XLA compiles. It does not limit YNNPACK, which asks the CPU
itself (`perf` shows `dot_fp32_5x64x1_1x16x1_avx512` under that flag). YNNPACK keeps the answer in a
variable, and `narrow` overwrites this variable in its process.
"""

import ctypes
import os
import pathlib
import subprocess

VARIABLE = "BENCHMARK_YNNPACK"

_LIBRARY = "libjax_common.so"
_ASK = "ynn::get_supported_arch_flags()"
_KEPT = f"{_ASK}::flags"
_UP_TO_FMA3 = (1 << 7) - 1  # ynnpack/base/arch.h: bit 7 is avx512f, and the bits above it are wider


def narrow() -> None:
    """Limit YNNPACK if the environment variable is "avx2". Call this before the first product.

    Raises:
      RuntimeError: this jaxlib has no symbol for YNNPACK's variable.
    """
    if os.environ.get(VARIABLE) != "avx2":
        return
    import jaxlib

    library = pathlib.Path(jaxlib.__file__).parent / _LIBRARY
    places = _symbols(library)
    if not {_ASK, _KEPT} <= set(places):
        raise RuntimeError(f"{library}: no symbols of YNNPACK, so it cannot be told to take AVX2")
    maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
    start = min(int(line.split("-")[0], 16) for line in maps if line.endswith(str(library)))
    ask = ctypes.CFUNCTYPE(ctypes.c_uint64)(start + places[_ASK])
    found = ask()
    kept = ctypes.c_uint64.from_address(start + places[_KEPT])
    if kept.value != found:
        raise RuntimeError(f"{_KEPT} is {kept.value:#x}, expected {found:#x}")
    kept.value = found & _UP_TO_FMA3


def _symbols(library: pathlib.Path) -> dict[str, int]:
    listed = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True)
    lines = [line.split(" ", 2) for line in listed.stdout.splitlines() if _ASK in line]
    return {name: int(address, 16) for address, _, name in lines}
