"""FusedAdamW against torch's own optimizers."""

from copy import deepcopy

import pytest
import torch

from actors.megatron_adam import FusedAdamW


@pytest.mark.parametrize(("decoupled", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_equals_torch(decoupled: bool, reference: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(4))]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in mine]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours = FusedAdamW(mine, adam_w_mode=decoupled, **settings)
    torchs = reference(theirs, **settings)
    for step in range(4):
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        if step == 3:
            # A parameter without a gradient is left alone, as torch does.
            mine[1].grad = theirs[1].grad = None
        ours.step()
        torchs.step()
    torch.testing.assert_close(mine[0], theirs[0])
    torch.testing.assert_close(mine[1], theirs[1])


def test_step_lives_in_the_group_and_reloads() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([parameter], lr=1e-2)
    for _ in range(3):
        parameter.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3
    assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"}

    copy = torch.nn.Parameter(parameter.detach().clone())
    loaded = FusedAdamW([copy], lr=1e-2)
    loaded.load_state_dict(deepcopy(optimizer.state_dict()))
    copy.grad = parameter.grad = torch.full((3,), 2.0)
    optimizer.step()
    loaded.step()
    assert torch.equal(copy, parameter)
