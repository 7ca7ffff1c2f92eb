"""States as JSON beside safetensors: every value, key and order comes back as it was, and nothing is pickled.

Numbers, strings, lists, and dicts whose keys are plain strings stand as they are; the rest is an object with a key
that begins with "$", which the key of a plain dict never does:

    {"$tensor": name}  {"$tuple": [...]}  {"$float": "nan"}  {"$dict": [[key, value], ...]}  {"$counter": dict}
    {"$ordered": dict, "$metadata": what a module noted beside its state}
"""

import json
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gac_plugin.errors import UsageError

MARK = "$"
SCALARS = (str, int, float, bool, type(None))
BUILDERS: dict[str, Callable[[Any], Any]] = {
    "$tuple": tuple,
    "$float": float,
    "$dict": dict,
    "$counter": Counter,
    "$ordered": OrderedDict,
}
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def pack(state: Any, part: str) -> tuple[Any, dict[str, Tensor]]:
    """Split a state into JSON values and named tensors.

    Args:
        state: dicts, lists, tuples, counters, tensors and scalars, nested.
        part: whose state it is, for messages.

    Returns:
        JSON values, and the tensors that they name: the very ones of the state, neither copied nor made contiguous.

    Raises:
        UsageError: an entry is of another type, or a tensor that safetensors does not take.
    """
    packer = _Packer(part)
    return packer.pack(state, ()), packer.tensors


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `pack` split.

    Raises:
        KeyError: a tensor is missing, or a kind of value is unknown.
        TypeError, ValueError: what stands there was not written by `pack`.
    """
    if isinstance(packed, list):
        return [unpack(entry, tensors) for entry in packed]
    if not isinstance(packed, dict):
        return packed
    kind = next(iter(packed), "")
    if not kind.startswith(MARK):
        return {key: unpack(entry, tensors) for key, entry in packed.items()}
    if kind == "$tensor":
        return tensors[packed[kind]]
    value = BUILDERS[kind](unpack(packed[kind], tensors))
    if "$metadata" in packed:
        value._metadata = unpack(packed["$metadata"], tensors)
    return value


class _Packer:
    def __init__(self, part: str) -> None:
        self.part = part
        self.tensors: dict[str, Tensor] = {}

    def pack(self, value: Any, path: tuple[Any, ...]) -> Any:
        kind = type(value)
        if isinstance(value, Tensor):
            return {"$tensor": self.keep(value, path)}
        if kind is float and not math.isfinite(value):
            return {"$float": repr(value)}
        if kind in SCALARS:
            return value
        if kind is list:
            return [self.pack(entry, (*path, index)) for index, entry in enumerate(value)]
        if kind is tuple:
            return {"$tuple": self.pack(list(value), path)}
        if kind is Counter:
            return {"$counter": self.pack(dict(value), path)}
        if kind is OrderedDict:
            noted = {"$metadata": self.pack(value._metadata, path)} if hasattr(value, "_metadata") else {}
            return {"$ordered": self.pack(dict(value), path), **noted}
        if kind is dict:
            entries = {self.key(key, path): self.pack(entry, (*path, key)) for key, entry in value.items()}
            if all(type(key) is str and not key.startswith(MARK) for key in value):
                return entries
            return {"$dict": [[self.pack(key, path), entry] for key, entry in entries.items()]}
        raise self.refusal(f"is a {kind.__name__}", path)

    def key(self, key: Any, path: tuple[Any, ...]) -> Any:
        if type(key) not in SCALARS:
            raise self.refusal(f"has a key that is a {type(key).__name__}", path)
        return key

    def keep(self, tensor: Tensor, path: tuple[Any, ...]) -> str:
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise self.refusal(f"is a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}", path)
        name = ".".join(map(str, path)).encode(errors="backslashreplace").decode()
        while name in self.tensors or name == "__metadata__":  # "a.b" in a dict, and "b" in the dict "a" beside it
            name += "~"
        self.tensors[name] = tensor.detach()
        return name

    def refusal(self, what: str, path: tuple[Any, ...]) -> UsageError:
        entry = ".".join(map(str, path))
        return UsageError(
            f"cannot write the state of {self.part!r} into a checkpoint: entry {entry!r} {what}; it takes dense "
            "tensors, numbers, strings, None, and dicts, lists and tuples of them"
        )


class Stage:
    """CPU memory for the tensors of a part, laid out as in the safetensors file, and kept from save to save.

    Fresh memory costs a page fault for every 4 KiB, which takes longer than the copy itself.

    Args:
        tensors: by name; what is on a CUDA device is given pinned memory, which it can be copied to without waiting.

    Attributes:
        views: a place for each tensor, in the order of `tensors`, to copy it to.
        header: first bytes of the file.
        data: the rest of the file, uint8, shape (bytes,): the memory behind `views`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.signature = _signature(tensors)
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):  # so that all of them are aligned
            tensor = tensors[name]
            start, end = end, end + tensor.numel() * tensor.itemsize
            entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        self.data = torch.empty(end, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self.views = [
            self.data[slice(*entries[name]["data_offsets"])].view(tensor.dtype).view(tensor.shape)
            for name, tensor in tensors.items()
        ]

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these tensors have the names, shapes and types, and are where, those before them were."""
        return self.signature == _signature(tensors)


def _signature(tensors: Mapping[str, Tensor]) -> list[tuple[Any, ...]]:
    return [(name, tensor.dtype, tensor.shape, tensor.is_cuda) for name, tensor in tensors.items()]
