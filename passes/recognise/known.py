"""What is known of a graph, found once for each version of it. Reads only."""

from __future__ import annotations

from functools import cached_property

from torch import fx

from ..facts.backward import backward_nodes
from ..facts.collectives import Collective, ResolveGroup, find_collectives
from .hazards import Hazards
from .norms import Norm, find_norms
from .sites import Recognition, recognise


class Known:
    """Facts about `graph`: each is found when it is first asked for, and kept until the graph changes.

    Whoever edits the graph says so by `changed`; facts asked for afterwards are those of the new version.
    """

    #: Everything that can be asked.
    FACTS = ("collectives", "norms", "hazards", "backward", "recognition")

    def __init__(self, graph: fx.Graph, resolve: ResolveGroup, split: bool = False):
        """split: the graph is the forward half of one that had a backward pass."""
        self.graph, self.resolve, self.split = graph, resolve, split

    def changed(self, *facts: str) -> None:
        """The graph was edited: forget `facts`, or all of them where none is named."""
        for name in facts or self.FACTS:
            self.__dict__.pop(name, None)

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """In graph order."""
        return tuple(find_collectives(self.graph, self.resolve))

    @cached_property
    def norms(self) -> tuple[Norm, ...]:
        """In the order of their statistics; none in a graph without collectives, where nobody asks."""
        return tuple(find_norms(self.graph)) if self.collectives else ()

    @cached_property
    def hazards(self) -> Hazards:
        return Hazards(self.graph)

    @cached_property
    def backward(self) -> frozenset[fx.Node]:
        """The nodes computed from incoming gradients."""
        return frozenset(backward_nodes(self.graph))

    @cached_property
    def recognition(self) -> Recognition:
        hazards = self.hazards if self.norms else None
        training = self.split or bool(self.backward)
        return recognise(self.graph, self.collectives, self.norms, self.backward, hazards, training)


__all__ = ["Known"]
