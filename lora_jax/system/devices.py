"""Common accelerators: memory, peak FLOPs, and bandwidth of memory and links.

A device is what JAX shows as one device. Speeds are the makers' peaks, for bfloat16 products
without sparsity. Link speeds are for one direction, because a ring sends and receives at the same
time.

Sources: the "System architecture" tables of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}
(whose inter-chip bandwidth is for both directions), NVIDIA's data sheets of A100, H100, H200, B200
(HGX), L4, L40S and the Ada GPU architecture whitepaper (RTX 4090). GPU memory is the amount that
nvidia-smi shows. Speeds beyond a domain: 200 Gb/s per GPU for A100, 400 Gb/s from H100 on (DGX
systems, with a network card for each GPU), 25 Gb/s for L4, L40S and RTX 4090 (an assumption: 200
Gb/s shared by eight); for TPUs, the data-centre network per chip.
"""

from __future__ import annotations

import dataclasses

GIB, MIB, GB, TERA = 2**30, 2**20, 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    memory: bytes of its memory.
    flops: peak FLOPs per second of bfloat16 products.
    bandwidth: bytes per second of its memory.
    link: bytes per second to the other devices of a domain, in one direction.
    domain: the number of devices that links connect (a slice of a pod, or the GPUs of a machine).
    network: bytes per second beyond the domain, in one direction.
    """

    memory: int
    flops: float
    bandwidth: float
    link: float
    domain: int
    network: float

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU, of whose memory JAX takes only a part unless told otherwise."""
        return self.domain == 8

    def rate(self, group: tuple[int, ...]) -> float:
        """Return the bytes per second that a device moves in a ring through a group of devices.

        If the group spans domains, each device contributes its own network link, so the devices of
        a domain together carry the data that enters it.
        """
        home = [d for d in group if d // self.domain == group[0] // self.domain]
        return self.link if len(home) == len(group) else min(self.link, len(home) * self.network)


def _gpu(mib: int, tflops: float, memory: float, link: float, network: float) -> Device:
    return Device(mib * MIB, tflops * TERA, memory * GB, link * GB, 8, network * GB)


def _tpu(gib: int, tflops: float, memory: float, link: float, pod: int, network: float) -> Device:
    return Device(gib * GIB, tflops * TERA, memory * GB, link * GB, pod, network * GB)


DEVICES: dict[str, Device] = {
    "a100-40gb": _gpu(40_960, 312, 1555, 300, 25),
    "a100-80gb": _gpu(81_920, 312, 2039, 300, 25),
    "h100-80gb": _gpu(81_559, 989.4, 3350, 450, 50),
    "h200-141gb": _gpu(143_771, 989.4, 4800, 450, 50),
    "b200-180gb": _gpu(183_359, 2250, 7700, 900, 50),
    "l4-24gb": _gpu(23_034, 121, 300, 32, 3.1),  # its link is PCIe 4.0 x16
    "l40s-48gb": _gpu(46_068, 362, 864, 32, 3.1),  # PCIe 4.0 x16
    "rtx4090-24gb": _gpu(24_564, 165.2, 1008, 32, 3.1),  # float32 accumulation; PCIe 4.0 x16
    "tpu-v4": _tpu(32, 275, 1200, 270, 4096, 6.25),  # the link is a pod's all-reduce rate per chip
    "tpu-v5e": _tpu(16, 197, 819, 200, 256, 3.1),
    "tpu-v5p": _tpu(95, 459, 2765, 600, 8960, 6.25),
    "tpu-v6e": _tpu(32, 918, 1638, 400, 256, 12.5),
    # JAX shows one chip as two devices, each with half of its memory and speed.
    "tpu-v7x": _tpu(96, 1153.5, 3690, 300, 2 * 9216, 6.25),
}

# JAX's name of a device (`jax.Device.device_kind`) -> its name in `DEVICES`.
KINDS = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100-80gb",  # others of its name are slower
    "NVIDIA H200": "h200-141gb",
    "NVIDIA B200": "b200-180gb",
    "NVIDIA L4": "l4-24gb",
    "NVIDIA L40S": "l40s-48gb",
    "NVIDIA GeForce RTX 4090": "rtx4090-24gb",
    "TPU v4": "tpu-v4",
    "TPU v5 lite": "tpu-v5e",
    "TPU v5e": "tpu-v5e",
    "TPU v5": "tpu-v5p",
    "TPU v5p": "tpu-v5p",
    "TPU v6 lite": "tpu-v6e",
    "TPU v6e": "tpu-v6e",
    "TPU7x": "tpu-v7x",
}


def known(kind: str) -> Device | None:
    """Return the device that JAX calls `kind`, or None if the table does not have it."""
    return DEVICES.get(KINDS.get(kind, ""))
