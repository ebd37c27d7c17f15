"""The methods that ship with moalign. They come in through the same door as a stranger's: this module is an entry
point of the group ``moalign``; it registers names and "module:Class" targets and imports no torch."""

from moalign.api import Register, hookimpl


@hookimpl
def register_objectives(register: Register) -> None:
    package = "moalign_plugins.objectives"
    register(
        "dpo",
        f"{package}.dpo:DPO",
        summary="direct preference optimisation: logistic loss on the log-ratio difference of a pair",
        paper="arXiv:2305.18290",
    )
    register(
        "ipo",
        f"{package}.ipo:IPO",
        summary="squared loss that pulls the log-ratio difference of a pair to 1/(2 beta)",
        paper="arXiv:2310.12036",
    )
    register(
        "sft",
        f"{package}.sft:SFT",
        summary="negative log-likelihood of the chosen response; needs no reference",
    )
    register(
        "rpo",
        f"{package}.rpo:RPO",
        summary="DPO with a likelihood term on the chosen response, against displacement",
        paper="arXiv:2405.16436",
    )
    register(
        "rebel",
        f"{package}.rebel:REBEL",
        summary="regression of reward differences on log-ratio differences; minimised by the KL-optimal policy",
        paper="arXiv:2404.16767, arXiv:2402.08714",
    )


@hookimpl
def register_combiners(register: Register) -> None:
    package = "moalign_plugins.combiners"
    register(
        "linear",
        f"{package}.linear:Linear",
        summary="weighted sum: of the losses of labelled pairs, of the rewards of scored ones",
    )
    register(
        "modpo",
        f"{package}.modpo:MODPO",
        summary="multi-objective DPO: the other objectives' rewards enter as a margin",
        paper="arXiv:2310.03708",
    )


@hookimpl
def register_rewards(register: Register) -> None:
    package = "moalign_plugins.rewards"
    register("length", f"{package}.length:Length", summary="words in the response, negated: shorter is better")


@hookimpl
def register_searches(register: Register) -> None:
    package = "moalign_plugins.searches"
    register("grid", f"{package}.grid:Grid", summary="an even (Das-Dennis) grid of weights")
    register(
        "soup",
        f"{package}.soup:Soup",
        summary="a few trained candidates, and mixes of their adapters between them",
        paper="arXiv:2306.04488",
    )
    register("random", f"{package}.random:Random", summary="weights drawn from a Dirichlet distribution")
    register("listed", f"{package}.listed:Listed", summary="exactly the preferences named in the configuration")


@hookimpl
def register_readers(register: Register) -> None:
    package = "moalign_plugins.readers"
    register(
        "preference", f"{package}.preference:PreferenceRows", summary="TRL preference rows: prompt, chosen, rejected"
    )
    register(
        "columns",
        f"{package}.columns:Columns",
        summary="any table, with a map from columns to prompt, responses, scores",
    )
    register("prompts", f"{package}.prompts:Prompts", summary="prompts alone, for responses that the policy samples")
    register(
        "qa-feedback",
        f"{package}.qa_feedback:QAFeedback",
        summary="QA-FEEDBACK: four answers per question, human pairs and fine-grained errors",
        paper="arXiv:2306.01693",
    )


@hookimpl
def register_observers(register: Register) -> None:
    package = "moalign_plugins.observers"
    register("jsonl", f"{package}.jsonl:JSONL", summary="every event as a line of JSON, in the run directory")
    register("tensorboard", f"{package}.tensorboard:TensorBoard", summary="event files for TensorBoard")
    register("wandb", f"{package}.wandb:WeightsAndBiases", summary="Weights & Biases, online or offline")
    register("mlflow", f"{package}.mlflow:MLflow", summary="MLflow, one nested run per candidate")
    register("trackio", f"{package}.trackio:Trackio", summary="trackio, on this machine or in a Space")
