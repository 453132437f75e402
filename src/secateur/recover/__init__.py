"""What gives a pruned model its quality back."""

from secateur.recover.batchnorm import reestimate_

__all__ = ["reestimate_"]
