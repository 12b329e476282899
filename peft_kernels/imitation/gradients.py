"""Where the imitation step's gradients go: into the adapters' `.grad`, and where that is missing into its own."""

import operator
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from peft_kernels.looks import looks
from peft_kernels.records import Product

_GRAD = operator.attrgetter("grad")


class Gradients:
    """The `.grad` of each adapter as the last `find` left it, and how all of them look, addresses included."""

    def __init__(self, adapters: Sequence[Tensor]):
        self.adapters = adapters
        self.tensors: list[Tensor | None] = [None] * len(adapters)
        self.places: Hashable = None
        self.own: list[Tensor] = []
        self.own_places: Hashable = None

    def find(self, overwritten: bool) -> bool:
        """Own gradients take the places of missing ones, as zeros; overwritten: or as they are, if all are missing.

        -> are they as they were?
        """
        found = [*map(_GRAD, self.adapters)]
        missing = [index for index, grad in enumerate(found) if grad is None]
        all_own = 0 < len(found) == len(missing)
        if missing:
            self._set_own(missing, found)
            if not (all_own and overwritten):
                torch._foreach_zero_([self.own[index] for index in missing])
        if not all(map(operator.is_, found, self.tensors)):
            for grad in found:
                if grad.layout != torch.strided or grad.is_inference():
                    raise ValueError("groups: an adapter's .grad is sparse or an inference tensor; set it to None")
        self.tensors, self.places = found, self.own_places if all_own else looks(found, addresses=True)
        return all_own and overwritten

    def drop(self) -> None:
        for adapter in self.adapters:
            adapter.grad = None

    def _set_own(self, missing: list[int], found: list[Tensor | None]) -> None:
        if looks(self.own, addresses=True) != self.own_places:  # none yet, or given other data since
            self.own = [t.new_empty(t.shape) for t in self.adapters]
            self.own_places = looks(self.own, addresses=True)
        for index in missing:
            found[index] = self.adapters[index].grad = self.own[index]


def without_collisions(stage: list[Product]) -> list[Product]:
    """Tied adapters: products that add to the same gradient become one, since those of a stage run side by side."""
    merged: dict[int, Product] = {}
    for product in stage:
        place = product.result.data_ptr()
        known = merged.get(place)
        if known is None:
            merged[place] = product
        elif (known.form, known.result_last is None) == (product.form, product.result_last is None):
            merged[place] = known._replace(terms=known.terms + product.terms)
        else:
            raise ValueError("groups: an adapter is tied between parts of layers that cannot share it")
    vectors = [product.result_last.data_ptr() for product in merged.values() if product.result_last is not None]
    if len({*merged, *vectors}) < len(merged) + len(vectors):
        raise ValueError("groups: transforms share a bias and not their matrices; tie all of them or none")
    return list(merged.values())


def written_first(stages: list[list[Product]]) -> list[list[Product]]:
    """Where gradients hold nothing yet: the first product writes each, later ones add to it."""
    written: set[int] = set()
    for number, stage in enumerate(stages):
        stages[number] = [p._replace(accumulate=not written.isdisjoint(places_of(p))) for p in stage]
        written.update(*map(places_of, stage))
    return stages


def places_of(product: Product) -> list[int]:
    return [t.data_ptr() for t in (product.result, product.result_last) if t is not None]
