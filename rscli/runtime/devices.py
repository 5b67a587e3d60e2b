"""Devices, precision, and what the environment is."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rscli.errors import InputError
from rscli.runtime.torchrun import local_rank

CPUINFO = Path("/proc/cpuinfo")
HALF_FLAGS = {
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
"""What Linux calls the instructions: the first two on x86, the last on ARM."""
PRECISIONS = ("fp32", "tf32", "bf16")
PACKAGES = ("rscli", "torch", "torchvision", "timm", "numpy", "scipy", "pydantic", "safetensors", "scikit-learn", "matplotlib")


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is CUDA if there is one, then Apple's MPS, then the CPU.

    `cuda` is the GPU that torchrun gave this process (LOCAL_RANK), or the first. It becomes the current device too: events,
    pinned memory and CUDA graphs belong to that one.

    Raises `InputError` if torch does not know it or cannot reach it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available():
            own = local_rank() % torch.cuda.device_count()
            device = torch.device("cuda", own if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
        torch.Generator(device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        reason = str(cause).strip().splitlines()[0]
        raise InputError(
            f"the device {name!r} cannot be used: {reason}", "`rscli doctor` lists what this machine has."
        ) from cause
    return device


def check_precision(precision: str, device: torch.device, known: Sequence[str] = PRECISIONS) -> None:
    """Raises `InputError` unless `precision` is one of the `known` that `device` has. TF32 exists on CUDA only."""
    if precision not in known:
        raise InputError(f"precision is {precision!r}, but must be one of {', '.join(known)}")
    if precision == "tf32" and device.type != "cuda":
        raise InputError(f"precision tf32 exists on CUDA devices only, not on {device.type}", "Use fp32 or bf16.")


@contextmanager
def precision_scope(precision: str, device: torch.device) -> Iterator[None]:
    """The context in which a forward runs in `precision`; raises as `check_precision` does.

    fp32 means it: TF32 is switched off meanwhile, also where a library had switched it on.
    """
    check_precision(precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    with tf32_only_if(precision == "tf32", device), autocast:
        yield


@contextmanager
def tf32_only_if(wanted: bool, device: torch.device) -> Iterator[None]:
    """While the body runs, products on a CUDA `device` use TF32 if it is `wanted`, and only then."""
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn) if device.type == "cuda" else ()
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = wanted
        yield
    finally:
        for flag, allowed in zip(flags, before, strict=True):
            flag.allow_tf32 = allowed


def emulated(precision: str, device: torch.device) -> bool:
    """Whether `device` has no instructions for `precision` (bf16 or fp16): it emulates them, many times slower than fp32."""
    if device.type != "cpu" or precision not in HALF_FLAGS:
        return False
    try:
        flags = set(CPUINFO.read_text(encoding="utf-8", errors="replace").split())
    except OSError:  # not Linux
        return precision == "fp16" or not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # also true of some that emulate them
    return not flags & HALF_FLAGS[precision]


def memory_layout(channels_last: bool) -> torch.memory_format:
    """The layout of images and convolutions (batch, channel, height, width)."""
    return torch.channels_last if channels_last else torch.contiguous_format


def device_name(device: torch.device) -> str:
    """What the device is called by its maker, as far as torch tells."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The versions of Python and of every library that figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """What a result may depend on besides its configuration: for the record in run folders and protocols."""
    return {
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": versions(),
    }
