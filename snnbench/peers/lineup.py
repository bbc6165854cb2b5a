"""Who can take part, and who does: networks, libraries and their settings, by name.

A contestant is named LIBRARY:ORDER+SETTING+..., for example

    spikingjelly:multi+cl+ma    order multi or step; also snntorch and norse
    ours:auto:rate+cl+ma        a kernel of ours, and a method if it is not bptt
    published:rate              the rate-based method in two phases, as its authors run it
    floor:ann+cl+ma             ReLU for neurons, on T * B images; ann-B on B; conv without BN, too
    floor:copy                  of one layer alone: the input, copied once

with the settings cl (channels_last), ma (the C library keeps freed memory), tc (torch.compile), cg
(a CUDA graph of the step), tf32, fp16, bf16, for ours the levels of memory balanced and smallest,
and for spikingjelly on a GPU: triton (its Triton code where it would take its CUDA build), state16
and state32 (the type of its membranes), cupy (version 0).
"""

from __future__ import annotations

from typing import Any

from snnbench import registry
from snnbench.errors import UsageError
from snnbench.spec import did_you_mean

NETS: dict[str, dict[str, Any]] = {
    "vgg11": {"model": "vgg11_a", "options": {"width": 0.25}, "shape": [3, 32, 32], "B": 32},
    "resnet18": {"model": "resnet18", "options": {"width": 0.25}, "shape": [3, 32, 32], "B": 32},
    "digits": {"model": "convnet", "options": {}, "shape": [1, 8, 8], "B": 64},
}
# One layer: 4 M neurons, for a GPU.
ALONE: dict[str, dict[str, Any]] = {
    net: {"model": net, "options": {}, "shape": [64, 32, 32], "B": 64} for net in ("lif", "bn-lif")
}
ON_GPU = {net: {"options": {}, "B": 128} for net in ("vgg11", "resnet18")}  # of whole width
ORDERS = ("multi", "step")
KINDS = {"spikingjelly": ORDERS, "snntorch": ORDERS, "norse": ORDERS,
         "floor": ("ann", "ann-B", "conv", "copy")}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "cl": {"channels_last": True},
    "ma": {},
    "tc": {"compiled": True},
    "cg": {"graph": True},
    **{precision: {"precision": precision} for precision in ("tf32", "fp16", "bf16")},
    **{level: {"memory": level} for level in ("balanced", "smallest")},
    **{code: {"code": code} for code in ("triton", "cupy")},
    **{f"state{bits}": {"code": f"fp{bits}"} for bits in (16, 32)},
}
FAMILY = {"memory": "ours", "code": "spikingjelly"}  # whose settings these are


def line_up(device: str) -> tuple[str, ...]:
    """All contestants worth a row: defaults, and the best settings found for each library."""
    if on_gpu(device):
        return line_up_of_gpu()
    names = [
        "floor:conv+cl+ma", "floor:ann+cl+ma", "floor:ann+cl+ma+tc", "floor:ann",
        "floor:ann-B+cl+ma",
        "spikingjelly:multi", "spikingjelly:step", "snntorch:step", "norse:step",
        "spikingjelly:multi+ma", "spikingjelly:multi+cl+ma",
        "spikingjelly:multi+ma+tc", "spikingjelly:multi+cl+ma+tc",
        "snntorch:multi+cl+ma", "snntorch:multi+cl+ma+tc",
        "norse:multi+cl+ma", "norse:multi+cl+ma+tc",
        "published:rate", "published:rate+cl+ma",
        "ours:reference", *(f"ours:{kernel}+cl+ma" for kernel in registry.components("kernels")),
        "ours:auto+cl+ma", "ours:auto:rate+cl+ma",
    ]  # fmt: skip
    return tuple(dict.fromkeys([*names, "ours:auto+cl+ma+bf16"]))


def line_up_of_gpu() -> tuple[str, ...]:
    """The same on a GPU: torch's own default has tf32 in convolutions, tuned ones are in fp16."""
    peer = "spikingjelly:multi"
    tuned = [f"{who}+cl+fp16" for who in ("floor:ann", peer, f"{peer}+state16", "ours:auto",
                                          "ours:auto:rate")]  # fmt: skip
    return (
        "floor:ann+tf32", f"{peer}+tf32", f"{peer}", "snntorch:step+tf32", "norse:step+tf32",
        "ours:auto+cl", "ours:auto+cl+tf32", *tuned, *(f"{who}+cg" for who in tuned),
        f"{peer}+cl+tc+fp16", "floor:ann+cl+tc+fp16", "published:rate+cl+fp16",
        "ours:auto+cl+bf16", "ours:auto+cl+fp16+smallest",
    )  # fmt: skip


LINE_UP_ALONE = (
    "floor:copy+cl+fp16", "ours:auto+cl+fp16",
    *(f"spikingjelly:multi{settings}" for settings in
      ("", "+triton", "+fp16", "+state16+fp16", "+cl+state16+fp16", "+cl+state32+fp16",
       "+cl+tc+fp16", "+cl+tc+state16+fp16")),
)  # fmt: skip


def on_gpu(device: str) -> bool:
    """Whether a device's name is that of a GPU."""
    return device.partition(":")[0] == "cuda"


def parse(name: str) -> tuple[dict[str, Any], bool]:
    """Fields of the contestant of that name, and whether the C library keeps freed memory.

    Raises UsageError for what does not exist; whether it can be had here is found out later.
    """
    who, *settings = name.split("+")
    family, *kind = who.split(":")
    families = (*KINDS, "ours", "published")
    if family not in families:
        raise UsageError(f"'{name}': unknown library '{family}'{did_you_mean(family, families)}")
    for setting in settings:
        if setting not in SETTINGS:
            raise UsageError(
                f"'{name}': unknown setting '{setting}'{did_you_mean(setting, SETTINGS)}"
            )
        for field_ in FAMILY.keys() & SETTINGS[setting].keys():
            if family != FAMILY[field_]:
                raise UsageError(f"'{name}': '{setting}' is a setting of {FAMILY[field_]} only")
    entry: dict[str, Any] = {"family": family}
    if family == "published" and kind == ["rate"]:
        entry |= {"kind": "reference", "method": "rate"}
    elif family == "ours" and len(kind) in (1, 2) and all(kind):
        entry |= dict(zip(("kind", "method"), kind, strict=False))
    elif len(kind) == 1 and kind[0] in KINDS.get(family, ()):
        entry |= {"kind": kind[0]}
    else:
        forms = [f"{family}:{k}" for k in KINDS.get(family, ())]
        forms = forms or ["published:rate" if family == "published" else "ours:KERNEL[:METHOD]"]
        raise UsageError(f"'{name}': write {' or '.join(forms)}")
    if family == "ours":
        if entry["kind"] != "auto":
            registry.find("kernels", entry["kind"])
        registry.find("methods", entry.get("method", "bptt"))
    for setting in settings:
        entry |= SETTINGS[setting]
    return entry, "ma" in settings
