"""Episodes of a real engine and a real environment worker, against transformers on the same row of tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.actors.engine_helpers import Rig, ask, prompt, reference_logprobs, settings

CODE = """
def answer(completion, turns):
    return {"observation": "w5 w6", "reward": float(len(turns)), "done": len(turns) > 3}
"""


def assert_episodes_are_transformers(rig: Rig, folder: Path) -> None:
    """Tokens, masks and log-probabilities of three-turn episodes; the same seed gives them again."""
    import ray

    from actors.environment_worker import EnvironmentWorker
    from algorithms.environments.loading import read_environment
    from configs.environment import EnvironmentConfig

    (folder / "e.py").write_text(CODE)
    source = read_environment(EnvironmentConfig(function=f"{folder / 'e.py'}:answer"))
    worker: Any = ray.remote(EnvironmentWorker).options(num_cpus=0).remote(source, 60)
    ray.get(worker.start.remote(), timeout=90)
    # Most turns end after a few words.
    sampling = settings(n=4, max_tokens=60, seed=3, stop=tuple(f"w{word}" for word in range(100, 200)))
    question = replace(prompt(0), columns={"prompt": "any"})
    group = ask(rig, "generate", question, sampling, None, worker)
    again = ask(rig, "generate", question, sampling, None, worker)
    whole = [rollout for rollout in group.rollouts if len(rollout.turns) == 6]
    assert whole
    assert len({tuple(rollout.tokens) for rollout in group.rollouts}) == 4
    for index, rollout in enumerate(group.rollouts):
        assert rollout.tokens.tolist() == again.rollouts[index].tokens.tolist()
        sampled = rollout.loss_mask == 1
        assert rollout.tokens[~sampled].tolist() == [5, 6] * ((~sampled).sum() // 2)
        expected = np.where(sampled, reference_logprobs(rig.model, group, index), 0)
        np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-3)
    for rollout in whole:
        # The third reply, to five messages, ends the episode; what it says is not in the tokens.
        assert (rollout.loss_mask == 0).sum() == 4
        assert rollout.environment_reward == 1 + 3 + 5
        assert [turn["role"] for turn in rollout.turns] == ["assistant", "tool"] * 3
    ray.get(worker.close.remote(), timeout=30)
    ray.kill(worker)
