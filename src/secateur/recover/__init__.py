"""What gives a pruned model its quality back."""

from secateur.recover.batchnorm import reestimate_, settle_
from secateur.recover.finetune import Epoch, Settings, finetune_

__all__ = ["Epoch", "Settings", "finetune_", "reestimate_", "settle_"]
