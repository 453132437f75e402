"""Structure that is physically removed: channels, neurons, heads, hidden width, experts, whole blocks."""

from secateur.structure.apply import apply_
from secateur.structure.coupling import Coupling, Slice
from secateur.structure.couplings import Couplings, trace
from secateur.structure.criteria import importance
from secateur.structure.depth_planning import plan_layers, plan_sublayers
from secateur.structure.experts import expert_scores
from secateur.structure.origins import parameter_map
from secateur.structure.planning import plan, plan_experts, plan_heads
from secateur.structure.plans import Plan
from secateur.structure.rescale import norm_factors, rescale_
from secateur.structure.saved import load, save

__all__ = [
    "Coupling",
    "Couplings",
    "Plan",
    "Slice",
    "apply_",
    "expert_scores",
    "importance",
    "load",
    "norm_factors",
    "parameter_map",
    "plan",
    "plan_experts",
    "plan_heads",
    "plan_layers",
    "plan_sublayers",
    "rescale_",
    "save",
    "trace",
]
