"""What a run is told before it starts: its loss, doubts, and whether its lengths and its reference fit."""

from pathlib import Path

import pytest

from actors.cli import main
from actors.run import Prepared, prepare
from configs.load import load_config
from tests.actors.engine_helpers import make_model, save_tokenizer
from tests.actors.run_helpers import make_workspace

GYM = ("--data.dataset", "reasoning_gym:chain_sum", "--dataset_size", "20")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workspace(tmp_path_factory.mktemp("plan"))
    (folder / "gkd.yaml").write_text(
        f"algorithm: gkd\nmodel: {{model: {folder / 'model'}, teacher_model: {folder / 'model'}}}\n"
        f"data: {{dataset: {folder / 'train.jsonl'}}}\ngkd: {{max_completion_length: 10}}\n"
        "rollout: {max_model_len: 64}\n"
    )
    return folder


def planned(
    workspace: Path, capsys: pytest.CaptureFixture[str], algorithm: str, *words: str, code: int = 0
) -> str:
    """What `bascule plan` prints, or its complaint when it ends with 2."""
    assert main(["plan", "--config", str(workspace / f"{algorithm}.yaml"), *words]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def prepared(workspace: Path, algorithm: str, *words: str) -> Prepared:
    return prepare(load_config(workspace / f"{algorithm}.yaml", words, algorithm))


def test_the_loss_of_every_algorithm_is_in_the_plan(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "\nloss: 1/N_tokens(step) Σ_i Σ_t [ -log π ]\n" in planned(workspace, capsys, "sft")
    assert "\nloss: 1/N_tokens(step) Σ_i Σ_t [ KL(T‖S) ], " in planned(
        workspace, capsys, "gkd", "--gkd.beta", "0"
    )
    shown = planned(workspace, capsys, "grpo", "--tuner_type", "lora", "--lora_dropout", "0.1")
    assert "\nloss: 1/N_tokens(generation) " in shown
    assert "\ndoubtful: tuner.lora_dropout: 0.1 makes log-probabilities random" in shown


@pytest.mark.parametrize(
    ("algorithm", "words", "budget", "complaint"),
    [
        # Prompts have 4 tokens, and completions at most 10.
        (
            "grpo",
            (),
            14,
            "is less than a sample may have: the longest prompt, train-1, has 4 tokens, and "
            "max_completion_length is 10; set it to 14 or more",
        ),
        ("gkd", ("--lmbda", "1"), 14, "the longest prompt, train-1, has 4 tokens"),
        ("gkd", ("--lmbda", "0"), 9, "is less than the longest sample, which has 9 tokens; set it to 9"),
        ("sft", (), 9, "is less than the longest sample, which has 9 tokens; set it to 9 or more"),
    ],
)
def test_a_micro_batch_that_is_too_small_is_noticed_beforehand(
    workspace: Path,
    capsys: pytest.CaptureFixture[str],
    algorithm: str,
    words: tuple[str, ...],
    budget: int,
    complaint: str,
) -> None:
    words = (*words, "--micro_batch_tokens")
    # Two tensor-parallel ranks share rows of an even length; that is nothing the user has to make room for.
    planned(workspace, capsys, algorithm, *words, str(budget))
    message = planned(workspace, capsys, algorithm, *words, str(budget - 1), code=2)
    assert message.startswith(f"error: trainer.micro_batch_tokens: {budget - 1} is less than")
    assert complaint in message


def test_held_out_samples_have_to_fit_too(
    workspace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    longer = tmp_path / "longer.jsonl"
    longer.write_text('{"prompt": "w1 w2", "completion": "' + "w3 " * 20 + '"}\n')
    for algorithm in ("sft", "gkd"):
        words = ("--micro_batch_tokens", "15", "--data.eval_dataset", str(longer))
        assert "15 is less than the longest sample" in planned(workspace, capsys, algorithm, *words, code=2)


def test_prompts_without_completions_are_enough_on_policy(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = prepared(workspace, "gkd", *GYM, "--lmbda", "1", "--max_model_len", "200").lessons
    assert found is not None
    assert (len(found.prompts), found.samples, found.held_out) == (20, (), ())
    words = (*GYM, "--lmbda", "1", "--max_model_len", "200", "--data.eval_dataset")
    found = prepared(workspace, "gkd", *words, str(workspace / "eval.jsonl")).lessons
    assert found is not None
    assert len(found.held_out) == 6


def test_a_reference_that_moves_has_the_policys_shape(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = workspace / "llama"
    make_model("llama", seed=7).save_pretrained(other)
    save_tokenizer(other)
    words = ("--grpo.beta", "0.1", "--model.ref_model", str(other))
    planned(workspace, capsys, "grpo", *words)
    message = planned(workspace, capsys, "grpo", *words, "--sync_ref_model", code=2)
    assert f"model.ref_model: {other} is another model than the one that is trained: qk_layernorm" in message
    same = ("--grpo.beta", "0.1", "--model.ref_model", str(workspace / "model"), "--sync_ref_model")
    planned(workspace, capsys, "grpo", *same)


def test_an_adapter_keeps_its_dropout_for_sft_alone(workspace: Path) -> None:
    from peft import LoraConfig, get_peft_model

    own = workspace / "adapter"
    lora = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj"])
    get_peft_model(make_model("qwen3", seed=3), lora).save_pretrained(own)  # pyright: ignore[reportArgumentType]
    words = ("--tuner_type", "lora", "--adapters", str(own))
    for algorithm, more, dropout in (
        ("sft", (), 0.2),
        ("sft", ("--lora_dropout", "0.1"), 0.1),
        ("grpo", (), 0.0),
        ("gkd", (), 0.0),
        ("grpo", ("--lora_dropout", "0.2"), 0.2),
    ):
        adapter = prepared(workspace, algorithm, *words, *more).sources.adapter
        assert adapter is not None
        # What is trained with, and what the adapter's own config.json will say.
        assert adapter.config.lora_dropout == dropout
        assert adapter.peft_config(workspace)["lora_dropout"] == dropout
