"""Structure that is physically removed: channels, neurons, heads, hidden width, experts, whole blocks."""

from secateur.structure.coupling import Coupling, Slice
from secateur.structure.couplings import Couplings, trace

__all__ = ["Coupling", "Couplings", "Slice", "trace"]
