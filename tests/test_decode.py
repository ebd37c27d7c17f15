"""Decoders in anybody's code: what the speakers hear, the processor in transformers' own generate, sampling."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from moalign import lora
from moalign.api import Decoder
from moalign.decode import Decoding, Request, Speakers, hidden_states, processor
from moalign.errors import ConfigError, ModelError, PluginError
from moalign_plugins.decoders.best_of_n import BestOfN
from moalign_plugins.decoders.guidance import Guidance
from moalign_plugins.decoders.multi_objective import MultiObjective
from moalign_plugins.decoders.value_augmented import ValueAugmented

ADAPTERS = ("one", "two", "three")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32, two layers, logits of a few units
MIX = Request(shares={"one": 0.3, "two": 0.7})


def plain(path, taken_over: bool) -> PeftModel:
    """Three adapters of random weights on the tiny model, in peft's own layers or in moalign's."""
    base = AutoModelForCausalLM.from_pretrained(path)
    configuration = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    if taken_over:
        model = lora.inject(base, configuration, ADAPTERS[0])
    else:
        model = get_peft_model(base, configuration, adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.add_adapter(name, configuration)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture(scope="module", params=[False, True], ids=["peft", "moalign"])
def model(request, tiny_model_path) -> PeftModel:
    return plain(tiny_model_path, request.param)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


def batch(tokenizer):
    """Two prompts of different lengths, padded on the left."""
    tokenizer.padding_side = "left"
    made = tokenizer(["hello", "hi there, you"], return_tensors="pt", padding=True)
    return made["input_ids"], made["attention_mask"]


@torch.no_grad()
def alone(model, adapter, ids, mask=None):
    """Logits of what follows one row, without cache, padding or neighbours."""
    row = ids if mask is None else ids[mask.bool()]
    if adapter is None:
        with model.disable_adapter():
            return model(input_ids=row[None]).logits[0, -1]
    model.set_adapter(adapter)
    return model(input_ids=row[None]).logits[0, -1]


class Heard(Decoder):
    """Says what the first speaker says, and keeps nothing."""

    wanted: tuple[str | None, ...] = (None,)

    def speakers(self, request):
        return self.wanted


# --- speakers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("one",), (None,), ("two", "one"), ("one", None, "three"), ("one", "one", None)])
def test_every_speaker_hears_what_it_would_hear_alone(model, tokenizer, names):
    ids, mask = batch(tokenizer)
    speakers = Speakers(model, names, mask)
    said = torch.randint(4, 90, (2, 4), generator=torch.Generator().manual_seed(0))
    past = torch.zeros(len(names), 2, dtype=torch.float64)
    for step in range(5):
        now, seen = torch.cat([ids, said[:, :step]], 1), torch.cat([mask, mask.new_ones(2, step)], 1)
        logits = speakers.hear(now)
        for place, name in enumerate(names):
            for row in range(2):
                torch.testing.assert_close(logits[place, row], alone(model, name, now[row], seen[row]), **CLOSE)
        torch.testing.assert_close(speakers.past, past, rtol=1e-5, atol=1e-5)
        if step < 4:
            past = past + logits.double().log_softmax(-1)[:, [0, 1], said[:, step]]


def test_the_active_adapter_is_what_it_was(model, tokenizer):
    ids, mask = batch(tokenizer)
    model.set_adapter("three")
    Speakers(model, ["one", None, "two"], mask).hear(ids)
    assert model.active_adapter == "three"
    Speakers(model, ["one", "two"], mask).hear(ids)
    assert model.active_adapter == "three" and not any(getattr(each, "mixture", None) for each in lora.layers(model))


def test_rows_that_are_dropped_copied_or_reordered_are_followed(model, tokenizer):
    ids, mask = batch(tokenizer)
    speakers = Speakers(model, ["one", None], mask)
    speakers.hear(ids.repeat_interleave(2, 0))
    now = torch.cat([ids.repeat_interleave(2, 0), torch.tensor([[7], [8], [9], [10]])], 1)
    speakers.hear(now)
    now = torch.cat([now[[1, 1, 3, 2]], torch.tensor([[11], [12], [13], [14]])], 1)
    followed, past = speakers.hear(now), speakers.past
    afresh = Speakers(model, ["one", None], mask)
    afresh.hear(ids)
    torch.testing.assert_close(followed, afresh.hear(now), **CLOSE)
    torch.testing.assert_close(past, afresh.past, rtol=1e-5, atol=1e-5)


def test_what_was_never_heard_is_computed_anew(model, tokenizer):
    ids, mask = batch(tokenizer)
    speakers = Speakers(model, ["two"], mask)
    speakers.hear(ids)
    now = torch.cat([ids, torch.tensor([[5, 6, 7], [8, 9, 10]])], 1)
    logits = speakers.hear(now)
    seen = torch.cat([mask, mask.new_ones(2, 3)], 1)
    for row in range(2):
        torch.testing.assert_close(logits[0, row], alone(model, "two", now[row], seen[row]), **CLOSE)


@pytest.mark.parametrize("first", [None, "two"])
def test_looking_ahead_sees_the_states_that_come(model, tokenizer, first):
    ids, mask = batch(tokenizer)
    speakers = Speakers(model, [first, "one"], mask)
    before = speakers.hear(ids)
    tokens = torch.tensor([[5, 6, 7], [7, 8, 9]])
    hidden = speakers.ahead(tokens)
    for row in range(2):
        prompt = ids[row][mask[row].bool()].tolist()
        expected, there = hidden_states(model, first, [prompt] * 3, [[token] for token in tokens[row].tolist()])
        assert bool(there.all())
        torch.testing.assert_close(hidden[row], expected[:, 0], **CLOSE)
    after = speakers.hear(torch.cat([ids, tokens[:, :1]], 1))  # the cache is as if nobody had looked
    again = Speakers(model, [first, "one"], mask)
    assert torch.equal(again.hear(ids), before)
    assert torch.equal(again.hear(torch.cat([ids, tokens[:, :1]], 1)), after)


def test_wrong_uses_are_refused(model, tokenizer):
    ids, mask = batch(tokenizer)
    with pytest.raises(ConfigError, match="no adapter 'four'; it has one, two, three"):
        Speakers(model, ["four"])
    with pytest.raises(ModelError, match="padded on the right"):
        Speakers(model, ["one"], mask.flip(1))
    speakers = Speakers(model, ["one"], mask)
    speakers.hear(ids)
    with pytest.raises(ConfigError, match="other prompts than before"):
        speakers.hear(ids.flip(0))
    with pytest.raises(ConfigError, match="3 rows for 2 prompts"):
        speakers.hear(ids[[0, 0, 1]])
    with pytest.raises(ConfigError, match="attention mask"):
        Speakers(model, ["one"], mask[:, 1:]).hear(ids)


# --- in transformers' generate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_one_candidate_is_itself_in_generate(model, tokenizer, options):
    """Greedy and beam search through the processor find what plain generate finds with that adapter."""
    ids, mask = batch(tokenizer)
    common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    model.set_adapter("two")
    expected = model.generate(input_ids=ids, **common)
    model.set_adapter("one")
    given = processor(MultiObjective(), Request(shares={"two": 1.0}), model, mask)
    assert torch.equal(model.generate(input_ids=ids, logits_processor=[given], **common), expected)


def test_the_mix_in_generate_is_greedy_under_the_mix(model, tokenizer):
    ids, mask = batch(tokenizer)
    given = processor(MultiObjective(), MIX, model, mask)
    model.set_adapter("three")
    said = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, logits_processor=[given]
    )
    for row in range(2):
        now = ids[row][mask[row].bool()]
        for token in said[row, ids.shape[1] :].tolist():
            logps = [alone(model, name, now).double().log_softmax(-1) for name in MIX.shares]
            assert token == int((0.3 * logps[0] + 0.7 * logps[1]).argmax())
            if token == tokenizer.eos_token_id:
                break
            now = torch.cat([now, torch.tensor([token])])


def test_a_model_without_adapters_is_the_base(tiny_model_path, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path).eval()
    ids, mask = batch(tokenizer)
    plain = base.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    decoder = ValueAugmented(beta=0.0)
    given = processor(decoder, Request({"worth": 1.0}, values={"worth": lambda hidden: hidden.sum(-1)}), base, mask)
    said = base.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, logits_processor=[given]
    )
    assert torch.equal(said, plain)


def test_what_is_forbidden_before_stays_forbidden(model, tokenizer):
    ids, mask = batch(tokenizer)
    given = processor(MultiObjective(), MIX, model, mask)
    scores = torch.zeros(2, len(tokenizer))
    scores[:, 5] = -torch.inf
    found = given(ids, scores)
    assert bool(found[:, 5].isneginf().all()) and bool(found[:, :5].isfinite().all())


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_seed_and_a_prompt_decide_what_is_said(model, tokenizer):
    decoding = Decoding(MultiObjective(), MIX, model, tokenizer)
    first = decoding.generate(["hello", "hi there"], max_new_tokens=10, seed=3)
    assert first == decoding.generate(["hello", "hi there"], max_new_tokens=10, seed=3)
    assert first[::-1] == decoding.generate(["hi there", "hello"], max_new_tokens=10, seed=3, rows=1)
    assert first != decoding.generate(["hello", "hi there"], max_new_tokens=10, seed=4)
    before = torch.random.get_rng_state()
    assert "".join(decoding.stream("hello", max_new_tokens=10, seed=3)) == first[0].text
    assert torch.equal(torch.random.get_rng_state(), before)


def test_samples_have_the_probabilities_of_the_mix(model, tokenizer):
    """4,000 first tokens; each frequency within 5 standard errors, of which chance leaves out 1 in 10^6."""
    count = 4000
    ids = tokenizer("hi", return_tensors="pt")["input_ids"][0]
    bos = ids if ids[0] == tokenizer.bos_token_id else torch.cat([torch.tensor([tokenizer.bos_token_id]), ids])
    logps = [alone(model, name, bos).double().log_softmax(-1) for name in MIX.shares]
    expected = (0.3 * logps[0] + 0.7 * logps[1]).softmax(-1)

    class Many(MultiObjective):
        def responses(self):
            return count

        def keep(self, request, rewards):
            counts = torch.bincount(rewards[:, 0].long(), minlength=len(expected)).double() / count
            errors = (expected * (1 - expected) / count).sqrt()
            assert bool(((counts - expected).abs() <= 5 * errors + 1e-12).all())
            return 0

    request = Request({"token": 1.0}, MIX.shares)
    numbers = {tokenizer.decode([each]): each for each in range(4, len(tokenizer))}
    judge = lambda samples: [float(numbers.get(sample.response, 0)) for sample in samples]  # noqa: E731
    special = expected[:4].sum()
    expected[1:4], expected[0] = 0.0, special  # special tokens are no text
    decoding = Decoding(Many(), request, model, tokenizer, {"token": judge})
    decoding.generate(["hi"], max_new_tokens=1, rows=count)


def test_the_best_of_n_is_the_best_of_the_same_samples(model, tokenizer):
    request = Request({"early": 0.25, "short": 0.75})
    judges = {
        "early": lambda samples: [-float(ord(sample.response[:1] or "~")) for sample in samples],
        "short": lambda samples: [-float(len(sample.response)) for sample in samples],
    }
    best = Decoding(BestOfN(n=6), request, model, tokenizer, judges).generate(["hello", "hi"], max_new_tokens=5, seed=1)
    assert best == Decoding(BestOfN(n=6), request, model, tokenizer, judges).generate(
        ["hello", "hi"], max_new_tokens=5, seed=1, rows=5
    )
    single = Decoding(BestOfN(n=1), request, model, tokenizer).generate(["hello", "hi"], max_new_tokens=5, seed=1)
    for one, kept in zip(single, best, strict=True):  # n = 1 is the first of them
        (worth,) = (
            0.25 * early + 0.75 * short
            for early, short in [[judges[name]([_said(one)])[0] for name in ("early", "short")]]
        )
        assert sum(w * kept.rewards[name] for name, w in request.preference.items()) >= worth


def _said(response):
    from moalign.types import Sample

    return Sample("", response.text)


def test_temperature_0_is_greedy(model, tokenizer):
    decoding = Decoding(MultiObjective(weights={"one": 1.0}), Request(), model, tokenizer)
    (said,) = decoding.generate(["hello"], max_new_tokens=6, temperature=0.0, seed=1)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("hello", add_special_tokens=False)["input_ids"]]])
    model.set_adapter("one")
    expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert list(said.ids) == expected.tolist()[: len(said.ids)]


def test_guidance_at_its_ends_is_each_candidate(model, tokenizer):
    for scale, name in ((0.0, None), (1.0, "two")):
        guided = Decoding(Guidance(scale=scale, towards="two"), Request(), model, tokenizer)
        plain = Decoding(Heard(wanted=(name,)), Request(), model, tokenizer)
        options = {"max_new_tokens": 8, "seed": 5}
        assert guided.generate(["hello"], **options) == plain.generate(["hello"], **options)


def test_missing_rewards_and_bad_options_are_refused(model, tokenizer):
    best = Decoding(BestOfN(), Request({"helpful": 1.0}), model, tokenizer)
    with pytest.raises(ConfigError, match="chooses by rewards, and 'helpful' has no reward"):
        best.generate(["hello"])
    with pytest.raises(ConfigError, match=r"chooses among 4 responses, which no processor can; call decode\.generate"):
        best.processor()
    plain = Decoding(BestOfN(n=1), Request({"helpful": 1.0}), model, tokenizer)
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError, match="temperature is a number of 0 or more"):
            plain.generate(["hello"], **wrong)
        with pytest.raises(ConfigError, match="temperature is a number of 0 or more"):
            plain.stream("hello", **wrong)
    for prompts in ("hello", ({"role": "user", "content": "hello"},)):
        with pytest.raises(ConfigError, match=r"takes a list of prompts.* write generate\(\[prompt\]\)"):
            plain.generate(prompts)
    rated = Decoding(BestOfN(), Request({"helpful": 1.0}), model, tokenizer, {"helpful": lambda samples: [1.0]})
    with pytest.raises(ConfigError, match="the reward of helpful returned 1 scores for 4 samples"):
        rated.generate(["hello"], max_new_tokens=2)


def test_room_in_the_context_is_counted(model, tokenizer):
    """256 tokens in all, the first one of the prompt's included; a short prompt's response does not depend on it."""
    decoding = Decoding(BestOfN(n=1), Request({"helpful": 1.0}), model, tokenizer)
    for say in (lambda *a, **k: decoding.generate([*a], **k), decoding.stream):
        with pytest.raises(ModelError, match=r"251 tokens and the model takes 256 in all, which leaves 5 .*, not 6"):
            say("q" * 250, max_new_tokens=6)
        with pytest.raises(ModelError, match="leaves 0"):
            say("q" * 300)
    short, long = decoding.generate(["q: ", "q" * 250], seed=3)
    assert len(long.ids) <= 5 and (long.ended or len(long.ids) == 5)
    assert [short] == decoding.generate(["q: "], max_new_tokens=128, seed=3)
    assert "".join(decoding.stream("q" * 250, seed=3)) == long.text


class Bad(Decoder):
    what: str

    def speakers(self, request):
        return {"names": "one", "nothing": None, "nobody": []}.get(self.what, [None])

    def responses(self):
        return 0 if self.what == "none" else 2 if self.what == "keep" else 1

    def keep(self, request, rewards):
        return 2

    def scores(self, request, at):
        plain = at.logits[0]
        if self.what == "changes":
            at.logits.zero_()
        if self.what == "draws":
            torch.rand(1)
        return {
            "nan": plain * torch.nan,
            "shape": plain[:, :3],
            "forbids": plain - torch.inf,
            "type": plain.tolist(),
            "whole": plain.long(),
        }.get(self.what, plain)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("names", "in speakers: 'one'; return names"),
        ("nothing", "in speakers: None; return names"),
        ("nobody", r"in speakers: \[\]; return names"),
        ("none", "in responses: 0; return how many"),
        ("keep", "in keep: 2; return the number of one of 2 responses"),
        ("nan", "in scores: a score is NaN or inf"),
        ("shape", r"in scores: it returned \[1, 3\], not \[N,V\]"),
        ("forbids", "in scores: every token is forbidden"),
        ("type", "in scores: it returned list, not a tensor"),
        ("whole", r"in scores: it returned torch\.int64"),
        ("changes", "in scores: it changed a tensor that it was given"),
        ("draws", "in scores: it used the global random generator of torch"),
    ],
)
def test_what_a_decoder_must_not_do_is_an_error_that_names_it(model, tokenizer, what, message):
    decoding = Decoding(
        Bad(what=what), Request({"helpful": 1.0}), model, tokenizer, {"helpful": lambda samples: [0.0] * len(samples)}
    )
    with pytest.raises(PluginError, match=rf"decoder 'Bad' of test_decode, {message}"):
        decoding.generate(["hello"], max_new_tokens=2)
