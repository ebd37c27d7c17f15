"""From judgements to a directory: what is learned, what is written, and that it says what it said in training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from judged_worlds import judged_config, scored_config, write_judgements, write_scores
from typer.testing import CliRunner

import moalign
from moalign import registry, storage
from moalign.api import Sample
from moalign.cli import app
from moalign.errors import ConfigError, CorruptFileError, DataError, RunError
from moalign.pareto import standard_error_clustered


@pytest.fixture(scope="module")
def trained(tiny_model_path, tmp_path_factory):
    """(directory, report) of two members that have learned two rules."""
    folder = tmp_path_factory.mktemp("reward-model")
    file = write_judgements(folder / "pairs.jsonl")
    report = moalign.train_reward_model(judged_config(tiny_model_path, file, members=2), folder / "out")
    file.rename(folder / "elsewhere.jsonl")
    return folder / "out", report


def test_what_a_rule_says_is_learned(trained):
    directory, report = trained
    for name in ("letters", "short"):
        assert report["per_objective"][name]["accuracy"]["value"] > 0.9
    for member in ("member-0", "member-1"):
        lines = (directory / member / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        assert np.mean(losses[-3:]) < 0.5 * losses[0]


def held_out_pairs(directory):
    """The held-out pairs with their sequences, read anew by the directory's own configuration."""
    from moalign.data.tokenise import Tokeniser
    from moalign.engine import model as models
    from moalign.reward_models import config as configuration
    from moalign.reward_models.material import gather
    from moalign.reward_models.plan import prepare

    content = json.loads((directory / "reward_model.json").read_text())["config"]
    content["data"]["path"] = str(directory.parent / "elsewhere.jsonl")
    plan = prepare(configuration.from_mapping(content), registry.discover())
    tokeniser = Tokeniser.of(models.load_tokenizer(plan.config.model_directory))
    return gather(plan, tokeniser).held_out


def plain_scores(folder, sequences) -> np.ndarray:
    """Of plain transformers, all rows in one padded batch."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    width = max(len(sequence.ids) for sequence in sequences)
    pad = model.config.pad_token_id
    rows = [[*sequence.ids, *[pad] * (width - len(sequence.ids))] for sequence in sequences]
    with torch.no_grad():
        return model(input_ids=torch.tensor(rows)).logits.double().numpy()


def test_the_report_is_what_plain_transformers_computes(trained):
    """From the written classifiers alone, by hand."""
    directory, report = trained
    pairs = held_out_pairs(directory)
    members = [plain_scores(directory / name, pairs.sequences) for name in ("member-0", "member-1")]
    mean = (members[0] + members[1]) / 2
    lengths = np.array([len(sequence.response) for sequence in pairs.sequences])
    for index, name in enumerate(report["objectives"]):
        found, mine = report["per_objective"][name], pairs.pair_objective == index
        chosen, rejected = pairs.pairs[mine].T
        right = (mean[chosen, index] > mean[rejected, index]).astype(float)
        value, error = standard_error_clustered(right, pairs.groups[chosen].tolist())
        assert found["pairs"] == mine.sum()
        assert found["accuracy"]["value"] == pytest.approx(value)
        assert found["accuracy"]["stderr"] == pytest.approx(error)
        each = [float((own[chosen, index] > own[rejected, index]).mean()) for own in members]
        assert found["member_accuracy"]["each"] == pytest.approx(each)
        longer = (lengths[chosen] > lengths[rejected]) + 0.5 * (lengths[chosen] == lengths[rejected])
        assert found["baselines"]["always longer"]["value"] == pytest.approx(longer.mean())
        assert found["baselines"]["always shorter"]["value"] == pytest.approx(1 - longer.mean())
        better = max(longer.mean(), 1 - longer.mean())
        assert found["gain"]["value"] == pytest.approx(value - better)
        for other in range(2):
            agreed = (mean[chosen, other] > mean[rejected, other]).mean()
            assert report["agreement"][index][other] == pytest.approx(agreed)
    assert report["per_objective"]["short"]["baselines"]["always shorter"]["value"] == 1.0


def test_the_directory_is_an_ordinary_classifier(trained):
    from transformers import AutoConfig, AutoTokenizer

    directory, _ = trained
    config = AutoConfig.from_pretrained(directory / "member-0")
    assert config.id2label == {0: "letters", 1: "short"} and config.num_labels == 2
    tokenizer = AutoTokenizer.from_pretrained(directory / "member-0")
    assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    suffixes = {file.suffix for file in directory.rglob("*") if file.is_file()}
    assert suffixes == {".json", ".jsonl", ".safetensors"}
    record = json.loads((directory / "reward_model.json").read_text())
    assert all(member["largest_difference"] < 1e-4 for member in record["members"].values())
    assert record["members"]["member-0"]["seed"] == 0 != record["members"]["member-1"]["seed"]
    assert set(record["plugins"]) == {"reward-model moalign:bradley-terry", "reader moalign:preference"}
    assert record["scale"]["members"]["member-1"]["short"]["deviation"] > 0


def test_moaligns_own_reward_gives_the_same_scores(trained):
    """Fed as a sweep feeds it, with texts: nobody has to say how the model reads."""
    directory, _ = trained
    pairs = held_out_pairs(directory)
    expected = plain_scores(directory / "member-1", pairs.sequences)
    samples = [Sample(sample.prompt, sample.response) for sample in pairs.samples]
    for index, name in enumerate(("letters", "short")):
        options = {"path": str(directory / "member-1"), "head": name, "device": "cpu"}
        reward = registry.discover().build("reward", "sequence-classification", options, "reward")
        assert reward.score(samples) == pytest.approx(expected[:, index].tolist(), abs=1e-4)
        as_text = reward.model_copy(update={"read": "text"}).score(samples)
        assert as_text != pytest.approx(expected[:, index].tolist(), abs=1e-2)  # without its end it is another text


def test_the_members_are_an_ensemble(trained):
    directory, _ = trained
    pairs = held_out_pairs(directory)
    members = [plain_scores(directory / name, pairs.sequences)[:, 0] for name in ("member-0", "member-1")]
    paths = [str(directory / name) for name in ("member-0", "member-1")]
    options = {"paths": paths, "head": "letters", "combine": "mean", "device": "cpu"}
    reward = registry.discover().build("reward", "ensemble", options, "reward")
    expected = ((members[0] + members[1]) / 2).tolist()
    assert reward.score(list(pairs.samples)) == pytest.approx(expected, abs=1e-4)


def test_a_changed_byte_is_found(trained, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained[0], copy)
    assert storage.verify(copy) == []
    file = copy / "member-0" / "head.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CorruptFileError, match=r"head\.safetensors"):
        storage.verify(copy)


def test_scores_are_learned_and_compared(tiny_model_path, tmp_path):
    file = write_scores(tmp_path / "scores.jsonl")
    train = {"steps": 25, "pairs_per_step": 24, "lr": 0.01}
    content = scored_config(tiny_model_path, file, train=train)
    report = moalign.train_reward_model(content, tmp_path / "out")
    found = report["per_objective"]["letters"]
    assert found["accuracy"]["value"] > 0.75 and found["spearman_with_labels"] > 0.5
    assert "fitted" in report["probability"] and len(found["slopes"]) == 2  # its scores are no probabilities
    assert json.loads((tmp_path / "out" / "reward_model.json").read_text())["scale"]["labels"]["letters"]["mean"] > 0


def test_a_form_without_a_linear_head_is_written_as_adapter_and_head(tiny_model_path, tmp_path):
    file = write_judgements(tmp_path / "pairs.jsonl", prompts=12)
    train = {"steps": 2, "pairs_per_step": 4}
    content = judged_config(tiny_model_path, file, reward_model={"name": "mixture"}, train=train)
    moalign.train_reward_model(content, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    assert record["members"]["member-0"]["classifier"] is None
    assert "not linear" in record["members"]["member-0"]["why"]
    folder = tmp_path / "out" / "member-0"
    assert not (folder / "config.json").exists()
    assert set(storage.read_tensors(folder / "head.safetensors")) == {"head.weight", "router.weight", "router.bias"}
    scores = moalign.open_reward_model(tmp_path / "out").scores([Sample("say 1:", "abc"), Sample("say 1:", "")])
    assert np.isfinite(scores[0]).all() and np.isnan(scores[1]).all()


def test_the_directory_scores_again_whatever_its_form(trained):
    directory, _ = trained
    pairs = held_out_pairs(directory)
    opened = moalign.open_reward_model(directory)
    members = np.stack([plain_scores(directory / name, pairs.sequences) for name in ("member-0", "member-1")])
    assert opened.member_scores(pairs.samples) == pytest.approx(members, abs=1e-4)
    assert opened.scores(pairs.samples) == pytest.approx(members.mean(0), abs=1e-4)
    worst = opened.reward("short", combine="worst")(pairs.samples)
    assert worst == pytest.approx(members[:, :, 1].min(0).tolist(), abs=1e-4)
    less = opened.reward("short", combine="uncertainty", lam=2.0)(pairs.samples)
    assert less == pytest.approx((members.mean(0) - 2 * members.var(0))[:, 1].tolist(), abs=1e-3)
    with pytest.raises(ConfigError, match="no head is called 'shot'; did you mean 'short'"):
        opened.reward("shot")


# --- the command ----------------------------------------------------------------------------------------------------


def typed(*words: str):
    """A command as somebody types it; what went wrong is raised, as ``cli.main`` takes it."""
    done = CliRunner().invoke(app, ["reward-model", *words], catch_exceptions=False)
    return done.stdout


@pytest.fixture
def written(tiny_model_path, tmp_path):
    file = write_judgements(tmp_path / "pairs.jsonl", prompts=12)
    content = judged_config(tiny_model_path, file, train={"steps": 2, "pairs_per_step": 4})
    (tmp_path / "rm.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "rm.yaml"


def test_the_command_trains_and_reports(written):
    out = written.parent / "out"
    plan = typed("train", str(written), "--dry-run", "--set", "members=2")
    assert "2, 2 in a pass" in plan and "nothing was written" in plan and not out.exists()
    said = typed("train", str(written), "--out", str(out))
    assert "held-out pairs: 6" in said and "letters" in said and "ECE" in said
    assert json.loads(typed("report", str(out), "--json")) == json.loads((out / "report.json").read_text())
    assert "held-out pairs of 3 groups" in typed("report", str(out)).replace("\n", " ")
    with pytest.raises(RunError, match="exists already; it is never overwritten"):
        typed("train", str(written), "--out", str(out))
    with pytest.raises(RunError, match=r"no reward_model\.json in it"):
        typed("report", str(written.parent))


def test_ctrl_c_leaves_nothing(written, monkeypatch):
    from moalign.reward_models import training

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_members", interrupted)
    done = CliRunner().invoke(app, ["reward-model", "train", str(written), "--out", str(written.parent / "out")])
    assert done.exit_code == 130
    assert "nothing was written" in done.stderr
    assert not (written.parent / "out").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("reward_model.name=bradly", "did you mean 'bradley-terry'"),
        ("reward_model.head_lrr=2", r"reward_model\.head_lrr: unknown key; did you mean 'head_lr'"),
        ("objectives.letters.reward=length", r"objectives\.letters\.reward: unknown key"),
        ("member=2", "member: unknown key; did you mean 'members'"),
        ("members=0", "members: input should be greater than or equal to 1"),
        ("loss=dpo", "loss: unknown key"),
        ("data.margins=scores", r"data\.margins: a reward model learns from what the data says"),
        ("data.path=tiny-assistant", r"data\.path: the built-in prompts have no judgements"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said_before_a_model_is_loaded(written, change, reason):
    with pytest.raises(moalign_errors(), match=reason):
        typed("train", str(written), "--set", change)


def moalign_errors():
    from moalign.errors import UserError

    return UserError


def test_a_configuration_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"rm\.yaml: no such file"):
        typed("train", str(tmp_path / "rm.yaml"))


def test_an_objective_that_nothing_judges_is_named(written):
    with pytest.raises(ConfigError, match=r"objectives\.safe: no training pair is judged for it in .*pairs\.jsonl"):
        moalign.train_reward_model(written, written.parent / "out", ["objectives.safe={}"])


def test_a_form_that_learns_from_scores_says_that_there_are_none(written):
    with pytest.raises(DataError, match="reward model 'regression' learns from scores, and no response of this file"):
        moalign.train_reward_model(written, written.parent / "out", ["reward_model={name: regression}"])
