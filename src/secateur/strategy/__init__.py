"""A strategy for a classifier that costs too much: what to test, and rounds that stop by themselves."""

from secateur.strategy.propose import Proposal, propose
from secateur.strategy.request import Strategy, make_strategy
from secateur.strategy.rounds import Outcome, Trial, run_rounds

__all__ = ["Outcome", "Proposal", "Strategy", "Trial", "make_strategy", "propose", "run_rounds"]
