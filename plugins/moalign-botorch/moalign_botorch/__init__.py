"""A Bayesian search over preferences. Nothing here imports botorch before a search is asked for candidates."""

from moalign.api import Register, hookimpl

moalign_api_version = 1


@hookimpl
def register_searches(register: Register) -> None:
    register(
        "bayesian",
        "moalign_botorch.bayesian:Bayesian",
        summary="weights that promise most hypervolume, by Gaussian processes that know the scores' errors",
        paper="arXiv:2105.08195",
    )
