"""What an engine thinks of given tokens, against transformers on the same ones."""

import numpy as np
import torch

from actors.engine_group import EngineGroup
from actors.megatron_topk import topk_divergence
from actors.teacher_engines import TeacherEngines
from algorithms.data import TrainSample, float_row, int_row
from algorithms.packing import pack, with_top_tokens
from configs.schema import TrainerConfig
from tests.actors import gkd_reference
from tests.actors.engine_helpers import VOCABULARY, Rig, make_model, prompt, reference_score

K = 16


def sample_to_judge(number: int, length: int) -> TrainSample:
    """Random words, of which all but the first count."""
    zeros = float_row(np.zeros(length))
    mask = int_row([0, *[1] * (length - 1)])
    tokens = prompt(number, length=length).tokens
    return TrainSample(tokens=tokens, loss_mask=mask, advantages=zeros, logprobs=zeros, version=0)


def assert_judges_like_transformers(rig: Rig) -> None:
    """Log-probabilities of the tokens, and the divergence of another model from the likeliest ones."""
    # One more than these and the engine's length is used up.
    samples = [sample_to_judge(number, length) for number, length in enumerate((9, 2, 60, 127))]
    group = EngineGroup(rig.engines.pool, room=2, timeout_s=60, gets_weights=False)
    teacher = TeacherEngines(group, K)
    for sample, row in zip(samples, teacher.token_logprobs(samples), strict=True):
        np.testing.assert_allclose(row, [0.0, *reference_score(rig.model, sample.tokens)], atol=1e-4)
    batch = with_top_tokens(pack(samples, TrainerConfig()), teacher.top_tokens(samples))
    student = make_model("llama", seed=11)
    (micro,) = batch.ranks[0]
    for number, start, end in zip(micro.samples_S, micro.starts_S[:-1], micro.starts_S[1:], strict=True):
        row = torch.tensor(samples[number].tokens[None].astype(np.int64))
        with torch.no_grad():
            student_TV, teacher_TV = (model(row).logits[0, :-1].float() for model in (student, rig.model))
        places = slice(start, end - 1)
        ids, logprobs = (
            torch.tensor(rows[places]) for rows in (micro.teacher_ids_TK, micro.teacher_logprobs_TK)
        )
        for beta in (0.0, 0.5, 1.0):
            got = topk_divergence(
                *(student_TV, ids.long(), logprobs),
                beta=beta,
                temperature=1.0,
                vocab_size=VOCABULARY,
                group=None,
                tail=True,
            )
            want = gkd_reference.of_topk(
                student_TV, teacher_TV, teacher_TV.topk(K).indices, beta, 1.0, tail=True
            )
            np.testing.assert_allclose(got, want, atol=1e-4)
