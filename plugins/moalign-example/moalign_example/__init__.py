"""The entry point: which plugins this distribution has. A target is imported when somebody uses it, not before."""

from moalign.api import Register, hookimpl

moalign_api_version = 1


@hookimpl
def register_objectives(register: Register) -> None:
    register(
        "squared-hinge",
        "moalign_example.squared_hinge:SquaredHinge",
        summary="squared hinge loss on the pairwise logit",
        paper="arXiv:2402.05749",
    )


@hookimpl
def register_combiners(register: Register) -> None:
    register(
        "soft-minimum",
        "moalign_example.soft_minimum:SoftMinimum",
        summary="between the weighted mean of the rewards and the worst of them",
    )


@hookimpl
def register_rewards(register: Register) -> None:
    register(
        "compressibility",
        "moalign_example.compressibility:Compressibility",
        summary="what deflate leaves of a response: repetition costs",
        paper="arXiv:2403.00553",
    )
