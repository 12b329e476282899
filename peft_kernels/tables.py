"""Tables in device memory, where kernels that work on many tensors of different shapes find addresses and sizes."""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .records import Results


class Address(NamedTuple):
    """Where a tensor begins, or what lies so many bytes behind that."""

    tensor: Tensor
    offset: int = 0


Rows = Iterable[Sequence[int | Address]]


def place(tensor: Tensor | None) -> tuple[int | Address, int]:
    """(address, distance of neighbouring rows, or of a vector's elements) as rows of tables hold them; zeros for None.

    A lone row has the distance that more of them would have.
    """
    if tensor is None:
        return 0, 0
    return Address(tensor), tensor.shape[1] if tensor.dim() == 2 and len(tensor) == 1 else tensor.stride(0)


class Table:
    """Sections of rows, in one copy to a device; each section begins at a multiple of 16 bytes.

    What stands where is worked out once. Then the tensors may be elsewhere every time: only addresses are filled in.
    """

    def __init__(self, sections: Iterable[Rows]):
        self.tensors: list[Tensor] = []
        numbers, owners, indices, self.sizes = [], [], {}, []
        for rows in sections:
            begin = len(numbers)
            for entry in (entry for row in rows for entry in row):
                if isinstance(entry, Address):
                    index = indices.setdefault(id(entry.tensor), len(indices) + 1)
                    if index > len(self.tensors):
                        self.tensors.append(entry.tensor)
                    owners += [0] * (len(numbers) - len(owners)) + [index]
                    numbers.append(entry.offset)
                else:
                    numbers.append(entry)
            numbers += [0] * (len(numbers) % 2)
            self.sizes.append(len(numbers) - begin)
        self.numbers = torch.tensor(numbers, dtype=torch.int64)
        self.owners = torch.tensor(owners, dtype=torch.int64)  # whose address is added to each; 0: nothing's

    def follow(self, sources: dict[int, tuple[int, int]]) -> None:
        """From now on `to` takes the addresses of these sources; no tensor is kept.

        sources: for each tensor, by its id, the number of its source and how many bytes it lies behind that one's start
        """
        found = [sources[id(tensor)] for tensor in self.tensors]
        self.numbers[: len(self.owners)] += torch.tensor([0, *(offset for _, offset in found)])[self.owners]
        self.owners = torch.tensor([0, *(source + 1 for source, _ in found)])[self.owners]
        self.tensors = []

    def to(self, device: torch.device, addresses: Sequence[int] | None = None) -> Sequence[Tensor]:
        """The sections on a device, for which the host does not wait; addresses: of the sources if there are any."""
        if addresses is None:
            addresses = map(Tensor.data_ptr, self.tensors)
        starts = torch.frombuffer(array("q", (0, *addresses)), dtype=torch.int64)
        if device.type == "cuda":
            host = torch.empty(len(self.numbers), dtype=torch.int64, pin_memory=True)
        else:
            host = torch.empty_like(self.numbers)
        host.copy_(self.numbers)
        host[: self.owners.numel()].add_(starts.index_select(0, self.owners))
        return host.to(device, non_blocking=True).split_with_sizes(self.sizes)


class Part(Protocol):
    """What its backend knows of one stage, but for addresses."""

    def at(self, sections: Sequence[Tensor], results: Results | None) -> Any:
        """What else launching it takes, with the part's sections on the device."""


class Placed(NamedTuple):
    """What `weight_distance_fwd` takes."""

    stages: list[tuple[Part, Any]]
    memo: dict  # for whatever a backend works out about all stages together


class Tables:
    """Stages of distances or of products, whose rows are in one table; what of them does not depend on addresses.

    stages: the part of each, and the sections of rows that it has
    """

    def __init__(self, stages: Sequence[tuple[Part, list[Rows]]]):
        self.table, self.memo = Table(rows for _, sections in stages for rows in sections), {}
        self.device = self.table.tensors[0].device
        self.parts = [(part, len(sections)) for part, sections in stages]

    def at(self, results: Results | None, addresses: Sequence[int] | None = None) -> Placed:
        """Ready to run as often as wanted, while the tensors stay; addresses: as `Table.to` takes them."""
        sections, first, stages = self.table.to(self.device, addresses), 0, []
        for part, count in self.parts:
            stages.append((part, part.at(sections[first : first + count], results)))
            first += count
        return Placed(stages, self.memo)
