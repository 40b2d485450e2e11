"""A supernet: one store of parameters for a whole space, and every architecture as a view of it.

``store`` is the supernet. Below it: ``variants``, every form that an operation takes in a space; ``slicing``, which
entries of a stored parameter a form uses; ``stored``, what is stored and how it starts; ``sharing``, which of it is
one; ``structure``, a network without numbers. Beside it: ``scoring`` many subnets at once, ``compiled`` views,
``checkpoint``, and two scores of a subnet besides its accuracy, ``flatness`` and ``readout``.
"""

from nasgraph.supernet.store import SAMPLES, Subnet, Supernet, recalibrate

__all__ = ["SAMPLES", "Subnet", "Supernet", "recalibrate"]
