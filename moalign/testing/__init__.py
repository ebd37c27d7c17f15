"""The conformance kit for authors of plugins: one check per kind, each for a plugin that is built already.

    from moalign.testing import check_objective

    def test_hinge_conforms():
        check_objective(Hinge(beta=0.2))

A check returns nothing, or raises ConformanceError, which reads like a review: what was tried, what came back, what to
change. ``exempt`` leaves out a check by the name that stands in the error, for a plugin that means it.
"""

from moalign.testing.combiner import check_combiner
from moalign.testing.conditioner import check_conditioner
from moalign.testing.decoder import check_decoder
from moalign.testing.filter import check_filter
from moalign.testing.objective import check_objective
from moalign.testing.observer import check_observer
from moalign.testing.reader import check_reader
from moalign.testing.reference import check_reference
from moalign.testing.review import ConformanceError
from moalign.testing.reward import check_reward
from moalign.testing.reward_model import check_reward_model
from moalign.testing.sampler import check_sampler
from moalign.testing.search import check_search
from moalign.testing.transform import check_transform

__all__ = [
    "ConformanceError",
    "check_combiner",
    "check_conditioner",
    "check_decoder",
    "check_filter",
    "check_objective",
    "check_observer",
    "check_reader",
    "check_reference",
    "check_reward",
    "check_reward_model",
    "check_sampler",
    "check_search",
    "check_transform",
]
