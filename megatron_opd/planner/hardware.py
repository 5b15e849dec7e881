"""What GPUs and links can do by their makers' data sheets, and how much of it a run is taken to reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

NEVER = "assumed, never validated"


@dataclass(frozen=True)
class Efficiencies:
    """Shares of the peaks that a run reaches, and fixed times. Nothing has validated one of them."""

    products: float = 0.6  # of the FLOPs; norms, activations and other passes over memory between products are in it
    attention: float = 0.5  # of the FLOPs
    memory: float = 0.7  # of the device memory's rate
    nvlink: float = 0.75
    network: float = 0.8
    host: float = 0.8
    call: float = 15e-6  # seconds of a collective beside its bytes
    decoding_step: float = 2e-3  # seconds of an engine beside its memory, products and collectives
    request: float = 0.2  # seconds of a step's engine calls: requests, waking, flushing, versions


@dataclass(frozen=True)
class Gpu:
    """Rates are per second and GPU; links count one direction."""

    name: str
    memory: int  # bytes
    flops: float  # bf16 matrix products with fp32 accumulation, without sparsity
    memory_bytes: float
    nvlink_bytes: float
    network_bytes: float
    host_bytes: float  # to and from host memory
    capability: tuple[int, int] | None  # as CUDA has it; None: no GPU
    source: str
    rates: Efficiencies = Efficiencies()


_DGX_H = "NVIDIA's data sheets of the {} (SXM) and the DGX {}: NVLink 900 GB/s both ways, one 400 Gb/s port a GPU, PCIe 5 x16"
GPUS = {
    "h100": Gpu("H100", 80 * 10**9, 989e12, 3.35e12, 450e9, 50e9, 64e9, (9, 0), _DGX_H.format("H100", "H100")),
    "h200": Gpu("H200", 141 * 10**9, 989e12, 4.8e12, 450e9, 50e9, 64e9, (9, 0), _DGX_H.format("H200", "H200")),
    "b200": Gpu(
        *("B200", 180 * 10**9, 2250e12, 7.7e12, 900e9, 50e9, 64e9, (10, 0)),
        "NVIDIA's data sheets of the HGX B200 and DGX B200: NVLink 1.8 TB/s both ways, one 400 Gb/s port a GPU, PCIe 5 x16",
    ),
    # One core of a laptop or server, for --calibrate with CPU runs, whose measured seconds replace these.
    "cpu": Gpu("CPU core", 8 * 10**9, 50e9, 10e9, 1e9, 0.1e9, 10e9, None, "assumed, never validated; orders of magnitude"),
}


class Assumption(NamedTuple):
    what: str
    value: str
    source: str


_WHAT = {
    "products": "share of peak FLOPs in matrix products",
    "attention": "share of peak FLOPs in attention",
    "memory": "share of the memory's rate",
    "nvlink": "share of NVLink's rate",
    "network": "share of the network's rate",
    "host": "share of PCIe's rate",
    "call": "seconds of a collective beside its bytes",
    "decoding_step": "seconds of a decoding step beside what is counted",
    "request": "seconds of a step's engine calls",
}


def assumptions(gpu: Gpu) -> Iterator[Assumption]:
    peaks = (
        f"{gpu.flops / 1e12:g} TFLOP/s bf16, {gpu.memory / 1e9:g} GB at {gpu.memory_bytes / 1e12:g} TB/s, NVLink "
        f"{gpu.nvlink_bytes / 1e9:g}, network {gpu.network_bytes / 1e9:g}, host {gpu.host_bytes / 1e9:g} GB/s one way"
    )
    yield Assumption(gpu.name, peaks, gpu.source)
    for each in fields(gpu.rates):
        yield Assumption(_WHAT[each.name], f"{vars(gpu.rates)[each.name]:g}", NEVER)
