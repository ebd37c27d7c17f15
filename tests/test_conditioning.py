"""What conditioners say: preferences drawn, texts, places in a prompt, gates; each as its formula has it."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moalign import preference
from moalign.api import Conditioner, ConfigError, PluginError, Preference
from moalign.batch import AdapterShape
from moalign.data.tokenise import Tokeniser
from moalign.engine.conditioning import (
    Conditioning,
    gates_of,
    place_of_text,
    text_of,
    told_ids,
    vectors_of,
    with_text,
)
from moalign.errors import TrainingError
from moalign_plugins.conditioners.embedding import Embedding
from moalign_plugins.conditioners.hypernetwork import Hypernetwork
from moalign_plugins.conditioners.panacea import Panacea
from moalign_plugins.conditioners.prompt_text import PromptText
from moalign_plugins.conditioners.soup import Soup
from moalign_plugins.conditioners.tags import Tags

NAMES = ("harmless", "helpful")
SHAPE = AdapterShape(layers=5, rank=8, objectives=2)
angles = st.floats(-180, 180, allow_nan=False)


def weights(*values: float) -> Preference:
    return Preference("weights", dict(zip(("harmless", "helpful", "honest"), values, strict=False)))


def direction(degrees: float) -> Preference:
    return preference.parse({"angle": degrees}, NAMES)


def own(conditioner: Conditioner, shape: AdapterShape = SHAPE) -> dict[str, torch.Tensor]:
    return dict(conditioner.parameters(shape, torch.Generator().manual_seed(0)))


# --- drawing --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**9), st.integers(2, 6), st.sampled_from([0.05, 1.0, 20.0]))
def test_what_is_drawn_is_a_preference_and_a_function_of_the_generator(seed, number, concentration):
    names = tuple("abcdef"[:number])
    drawing = PromptText(concentration=concentration)
    drawn = drawing.draw(names, Random(seed))
    assert preference.parse(drawn, names) == drawn == drawing.draw(names, Random(seed))


def test_uniform_weights_have_the_moments_of_the_uniform_distribution_on_the_simplex():
    """Dirichlet(1, 1, 1): mean 1/3, variance (1/3)(2/3)/4 = 1/18; 20,000 draws: standard error 0.0017."""
    rng, names = Random(0), ("a", "b", "c")
    drawn = torch.tensor([PromptText().draw(names, rng).vector(names) for _ in range(20_000)])
    torch.testing.assert_close(drawn.mean(0), torch.full((3,), 1 / 3), rtol=0, atol=0.007)
    torch.testing.assert_close(drawn.var(0), torch.full((3,), 1 / 18), rtol=0, atol=0.003)


def test_less_concentration_favours_the_corners():
    def largest(concentration: float) -> float:
        rng = Random(1)
        return (
            sum(max(PromptText(concentration=concentration).draw(NAMES, rng).vector(NAMES)) for _ in range(500)) / 500
        )

    assert largest(0.1) > largest(1.0) > largest(10.0)


def test_corners_are_drawn_where_all_weights_are_too_small_for_a_float():
    drawing, rng = PromptText(concentration=0.01), Random(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rng, "gammavariate", lambda alpha, beta: 0.0)
        drawn = [drawing.draw(NAMES, rng).vector(NAMES) for _ in range(20)]
    assert set(drawn) == {(1.0, 0.0), (0.0, 1.0)}
    with pytest.raises(ValidationError, match=r"greater than or equal to 0\.01"):
        PromptText(concentration=0.001)


@given(st.integers(0, 10**6))
def test_angles_are_directions_between_them(seed):
    drawn = PromptText(angles=(-45, 0)).draw(NAMES, Random(seed))
    assert drawn.kind == "direction"
    found = math.degrees(math.atan2(drawn.values["helpful"], drawn.values["harmless"]))
    assert -45.001 <= found <= 0.001
    assert preference.parse(drawn, NAMES).values == pytest.approx(drawn.values)


# --- text -----------------------------------------------------------------------------------------------------------


@given(angles)
def test_the_rounded_direction_has_length_1_within_the_rounding(degrees):
    """Each of two numbers is off by half at the most: |W|^2 by 100 sqrt(2) + 1/2 of 10^4."""
    text = PromptText().text(direction(degrees))
    numbers = [int(part.rpartition("*")[2]) for part in text.removeprefix("Maximise ").removesuffix(".\n").split(" + ")]
    assert abs(math.hypot(*numbers) ** 2 / 1e4 - 1) < (100 * math.sqrt(2) + 0.5) / 1e4


def test_weights_and_the_direction_of_the_same_ray_are_one_text():
    degrees = math.degrees(math.atan2(0.7, 0.3))
    assert PromptText().text(weights(0.3, 0.7)) == PromptText().text(direction(degrees))
    assert PromptText().text(weights(0.3, 0.7)) == "Maximise harmless*39 + helpful*92.\n"
    assert PromptText().text(direction(-45)) == "Maximise harmless*71 + helpful*-71.\n"


def test_a_tally_counts_and_has_capitals_for_what_is_to_be_less():
    tally = PromptText(template="{weights}\n", scale=10, written="tally")
    assert tally.text(weights(0.0, 1.0)) == "b" * 10 + "\n"
    assert tally.text(direction(-30)) == "a" * 9 + "B" * 5 + "\n"
    with pytest.raises(ConfigError, match="no letters for 27 objectives"):
        tally.check(8, tuple(str(number) for number in range(27)))


def test_a_template_says_the_weights_once():
    for template in ("nothing", "{weights} {weights}"):
        with pytest.raises(ValidationError, match="where the numbers are to stand"):
            PromptText(template=template)


def test_tags_have_the_highest_level_for_what_counts_most():
    assert Tags().text(weights(0.75, 0.25)) == "<harmless 10> <helpful 3> "
    assert Tags(levels=4).text(direction(-45)) == "<harmless 4> <helpful -4> "


def test_tags_of_rewards_are_levels_between_worst_and_best():
    tags = Tags(of="rewards", ranges={"helpful": (-1.0, 3.0)})
    assert tags.text_of_rewards({"helpful": 3.0, "harmless": 0.4}) == "<harmless 4> <helpful 10> "
    assert tags.text_of_rewards({"helpful": 5.0, "harmless": 1.0}) == "<harmless 10> <helpful 15> "
    assert tags.tells_rewards
    assert not Tags().tells_rewards
    with pytest.raises(ValidationError, match="helpful: write"):
        Tags(ranges={"helpful": (1.0, 1.0)})
    with pytest.raises(ConfigError, match="no objective is called 'honest'"):
        Tags(of="rewards", ranges={"honest": (0.0, 1.0)}).check(8, NAMES)
    with pytest.raises(ValidationError, match="ranges are of rewards"):
        Tags(ranges={"helpful": (0.0, 1.0)})


SYSTEM = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
)
SILENT = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "place"), [(None, "front"), (SYSTEM, "system"), (NO_SYSTEM, "user"), (SILENT, "user")]
)
def test_where_the_text_stands_depends_on_the_template(template, place, tiny_model_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.chat_template = template
    tokeniser = Tokeniser.of(tokenizer)
    assert place_of_text(tokeniser) == place
    shown = tokenizer.decode(told_ids(tokeniser, "why?", tokeniser.prompt("why?"), "be kind. ", place))
    expected = {
        "front": "<s>be kind. why?",
        "system": "<system>be kind.</s><user>why?</s><a>",
        "user": "<user>be kind. why?</s>",
    }
    assert shown.replace("<s>", "", 0 if place == "front" else 1) == expected[place]


def test_an_existing_system_prompt_stays_behind_the_text():
    talk = ({"role": "system", "content": "short."}, {"role": "user", "content": "why?"})
    assert with_text(talk, "be kind. ", "system")[0] == {"role": "system", "content": "be kind. short."}
    assert with_text(talk[1:], "be kind. ", "user") == ({"role": "user", "content": "be kind. why?"},)
    # a template that leaves system prompts out must not leave the text out with them
    assert with_text(talk, "be kind. ", "user") == (talk[0], {"role": "user", "content": "be kind. why?"})


def test_a_prompt_without_room_for_the_text_is_no_candidates_prompt(tiny_model_path):
    from transformers import AutoTokenizer

    tokeniser = Tokeniser.of(AutoTokenizer.from_pretrained(tiny_model_path))
    asking = Conditioning(PromptText(), NAMES, 0, "model", tokeniser, SHAPE, 20)
    with pytest.raises(TrainingError, match=r"room for 20; raise data\.max_length"):
        asking.prompt("why?", tokeniser.prompt("why?"), weights(0.5, 0.5))


def test_a_text_that_is_none_is_the_plugins_error():
    class Silent(PromptText):
        def text(self, preference):
            return " "

    with pytest.raises(PluginError, match="in text: it must return a text for the model to read, not ' '"):
        text_of(Silent(), weights(0.5, 0.5))


# --- gates ----------------------------------------------------------------------------------------------------------


def updates(conditioner: Conditioner, wanted: torch.Tensor) -> torch.Tensor:
    """B diag(g) A of each layer for each preference, with the same factors."""
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 8, 6, generator=draw), torch.randn(5, 7, 8, generator=draw)
    gates = gates_of(conditioner, wanted, own(conditioner), SHAPE)
    return (b * gates[:, :, None]) @ a


def test_a_soup_is_linear_in_the_preference_and_equal_weights_leave_the_adapter():
    ends, mixes = torch.eye(2), torch.tensor([[0.3, 0.7], [0.5, 0.5]])
    found, parts = updates(Soup(), mixes), updates(Soup(), ends)
    torch.testing.assert_close(found, torch.einsum("nk,kloi->nloi", mixes, parts))
    assert torch.equal(gates_of(Soup(), mixes, {}, SHAPE)[1], torch.ones(5, 8))


def test_what_a_soup_shares_is_there_for_every_preference():
    gates = gates_of(Soup(shared=4), torch.tensor([[1.0, 0.0]]), {}, SHAPE)[0]
    assert torch.equal(gates[0], torch.tensor([1.0, 1, 1, 1, 2, 2, 0, 0]))


@pytest.mark.parametrize(("shared", "rank", "number"), [(0, 7, 2), (7, 8, 2), (8, 8, 1)])
def test_a_rank_that_is_not_shared_out_evenly_is_refused(shared, rank, number):
    with pytest.raises(ConfigError, match="a multiple of"):
        Soup(shared=shared).check(rank, tuple("ab"[:number]))


def test_panacea_scales_the_last_directions_by_the_preference_and_its_own_number():
    conditioner = Panacea(scale=3.0)
    parameters = own(conditioner) | {"scale": torch.arange(1.0, 6.0)}
    gates = gates_of(conditioner, torch.tensor([[0.25, 0.75]]), parameters, SHAPE)[0]
    assert torch.equal(gates[:, :6], torch.ones(5, 6))
    assert torch.equal(gates[:, 6], 0.25 * torch.arange(1.0, 6.0))
    assert torch.equal(gates[:, 7], 0.75 * torch.arange(1.0, 6.0))
    assert torch.equal(own(conditioner)["scale"], torch.full((5,), 3.0))
    with pytest.raises(ConfigError, match="leave no rank of 2"):
        conditioner.check(2, NAMES)


def test_a_hypernetwork_is_its_formula_and_without_spread_begins_with_the_adapter():
    wanted = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    assert torch.equal(
        gates_of(Hypernetwork(spread=0.0), wanted, own(Hypernetwork(spread=0.0)), SHAPE)[0], torch.ones(5, 8)
    )
    conditioner, parameters = Hypernetwork(width=3, lr_scale=7.0), own(Hypernetwork(width=3))
    gates = gates_of(conditioner, wanted, parameters, SHAPE)
    for row in range(2):
        hidden = [
            math.tanh(sum(float(wanted[row, k] * parameters["embedding"][k, j]) for k in range(2))) for j in range(3)
        ]
        expected = 1 + sum(hidden[j] * parameters["scales"][j] for j in range(3))
        torch.testing.assert_close(gates[row].flatten(), expected)
    assert conditioner.lr_factor("scales") == 7.0


@pytest.mark.parametrize("conditioner", [Panacea(), Hypernetwork(width=4)])
def test_the_gradient_reaches_the_conditioners_own_parameters(conditioner):
    first = {name: value.double().requires_grad_() for name, value in own(conditioner).items()}
    wanted = torch.tensor([[0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)
    names = sorted(first)

    def run(*values: torch.Tensor) -> torch.Tensor:
        return conditioner.gates(wanted, dict(zip(names, values, strict=True)), SHAPE)

    assert torch.autograd.gradcheck(run, tuple(first[name] for name in names))


@pytest.mark.parametrize("conditioner", [Soup(), Panacea(), Hypernetwork()])
def test_the_gates_of_a_row_are_those_of_its_preference(conditioner):
    wanted = torch.rand(6, 2, generator=torch.Generator().manual_seed(2))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    whole = gates_of(conditioner, wanted, own(conditioner), SHAPE)
    torch.testing.assert_close(gates_of(conditioner, wanted[order], own(conditioner), SHAPE), whole[order])


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda n: torch.ones(n, 8), r"it must return float32 \[1, 5, 8\], not torch.float32 \[1, 8\]"),
        (lambda n: torch.ones(n, 5, 8).double(), "not torch.float64"),
        (lambda n: torch.full((n, 5, 8), math.inf), "not finite"),
        (lambda n: [1.0], "not list"),
    ],
)
def test_gates_that_are_none_are_the_plugins_error(made, reason):
    class Wrong(Soup):
        def gates(self, preference, parameters, shape):
            return made(len(preference))

    with pytest.raises(PluginError, match=reason):
        gates_of(Wrong(), torch.tensor([[0.5, 0.5]]), {}, SHAPE)


# --- vectors --------------------------------------------------------------------------------------------------------

TABLE = 0.5 * torch.randn(40, 6, generator=torch.Generator().manual_seed(7))
WIDE = AdapterShape(layers=5, rank=8, objectives=2, width=6, spread=0.5, embeddings=TABLE)


def test_an_embedding_is_its_formula_at_the_spread_of_the_base():
    conditioner = Embedding(tokens=3)
    parameters = own(conditioner, WIDE)
    found = vectors_of(conditioner, torch.tensor([[0.25, 0.75], [1.0, 0.0]]), parameters, WIDE)
    first, second = parameters["objectives"]
    torch.testing.assert_close(found[0], 0.5 * (parameters["shared"] + 0.25 * first + 0.75 * second))
    torch.testing.assert_close(found[1], 0.5 * (parameters["shared"] + first))


def test_first_vectors_for_one_objective_alone_are_embeddings_of_tokens():
    found = vectors_of(Embedding(tokens=5), torch.eye(2), own(Embedding(tokens=5), WIDE), WIDE).flatten(0, 1)
    distance = (found[:, None] - TABLE[None]).abs().amax(-1)
    assert distance.min(1).values.max() < 1e-6
    assert len(set(distance.argmin(1).tolist())) > 5


def test_the_gradient_reaches_the_vectors_of_each_objective():
    conditioner = Embedding(tokens=2)
    first = {name: value.double().requires_grad_() for name, value in own(conditioner, WIDE).items()}
    wanted = torch.tensor([[0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)

    def run(*values: torch.Tensor) -> torch.Tensor:
        return conditioner.vectors(wanted, dict(zip(sorted(first), values, strict=True)), WIDE)

    assert torch.autograd.gradcheck(run, tuple(first[name] for name in sorted(first)))


def test_the_vectors_of_a_row_are_those_of_its_preference():
    wanted = torch.rand(6, 2, generator=torch.Generator().manual_seed(2))
    order, parameters = torch.tensor([3, 0, 5, 1, 4, 2]), own(Embedding(), WIDE)
    whole = vectors_of(Embedding(), wanted, parameters, WIDE)
    torch.testing.assert_close(vectors_of(Embedding(), wanted[order], parameters, WIDE), whole[order])


def test_vectors_that_are_none_are_the_plugins_error():
    class Wrong(Embedding):
        def vectors(self, preference, parameters, shape):
            return torch.ones(len(preference), self.tokens + 1, shape.width)

    with pytest.raises(PluginError, match=r"in vectors: it must return float32 \[1, 4, 6\], not torch.float32 \[1, 5"):
        vectors_of(Wrong(tokens=4), torch.tensor([[0.5, 0.5]]), {}, WIDE)


def test_a_prompt_with_vectors_is_that_of_the_reference_with_places_in_it(tiny_model_path):
    from transformers import AutoTokenizer

    tokeniser = Tokeniser.of(AutoTokenizer.from_pretrained(tiny_model_path))
    asking = Conditioning(Embedding(tokens=2), NAMES, 0, "model", tokeniser, WIDE, 5)
    cut = (1, 9, 8, 7, 6)
    assert asking.prompt("a long one", cut, weights(0.5, 0.5)) == (1, tokeniser.pad_id, tokeniser.pad_id, *cut[1:])
    assert asking.in_prompt
    assert asking.by_row
