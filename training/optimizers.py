"""The optimisers of a run, and a check of the state that a checkpoint holds of them."""

import math

import torch
from torch import Tensor, nn

from runtime.errors import UserError
from training.muon import Muon, hidden_matrices
from utils import is_tensor_like

IGNORE_FOUND_INF = ("mps",)  # devices whose fused AdamW takes a step in spite of found_inf (PyTorch PR 186360)


def make_optimizers(model: nn.Module, name: str, lr: float, muon_lr: float, weight_decay: float,
                    capturable: bool = False) -> dict[str, torch.optim.Optimizer]:
    """{"adamw": AdamW}, or for name "muon" {"adamw": AdamW, "muon": Muon}, where Muon has the hidden matrices.

    capturable: the step can be part of a CUDA graph.
    """
    matrices = hidden_matrices(model) if name == "muon" else []
    taken = set(map(id, matrices))
    rest = [weight for weight in model.parameters() if id(weight) not in taken]
    optimizers = dict(adamw=torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True,
                                              capturable=capturable))
    if matrices:
        optimizers["muon"] = Muon(matrices, lr=muon_lr)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: dict[str, torch.optim.Optimizer], share: float, device: torch.device,
                       capturable: bool) -> None:
    """Set every learning rate to `share` of its peak. A CUDA graph reads it from a tensor on the device."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            rate = group["initial_lr"] * share
            group["lr"] = torch.as_tensor(group["lr"], device=device).fill_(rate) if capturable else rate


def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """optimizer.step(), which changes nothing if the tensor `bad` is 1; does not wait for the device."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if isinstance(optimizer, Muon) or weights[0].device.type not in IGNORE_FOUND_INF:
        optimizer.found_inf = bad
        optimizer.step()
        return
    before = [(weight.detach().clone(), {name: value.clone() for name, value in optimizer.state[weight].items()})
              for weight in weights]
    optimizer.step()
    with torch.no_grad():
        for weight, (old_weight, old_state) in zip(weights, before, strict=True):
            weight.copy_(torch.where(bad > 0, old_weight, weight))
            for name, value in optimizer.state[weight].items():
                value.copy_(torch.where(bad > 0, old_state.get(name, torch.zeros_like(value)), value))


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict | None, step: int) -> None:
    """Load the state and the learning rates of a saved state_dict; the other settings stay the run's own.

    step: the number of steps that the optimiser had taken. UserError if the state does not fit.
    """
    groups = optimizer.state_dict()["param_groups"]
    state = _checked_state(optimizer, saved, step)
    for group, before in zip(groups, saved["param_groups"], strict=True):
        group["lr"] = before["lr"]
    optimizer.load_state_dict(dict(state=state, param_groups=groups))


def _checked_state(optimizer: torch.optim.Optimizer, saved: dict | None, step: int) -> dict:
    """The "state" of a saved state_dict. UserError if it is not one of this optimiser and its weights."""
    state, groups = (saved.get(part) if isinstance(saved, dict) else None for part in ("state", "param_groups"))
    if type(groups) is not list or len(groups) != len(optimizer.param_groups) or any(
            type(group) is not dict or type(group.get("lr")) is not float or not 0 <= group["lr"] < math.inf
            for group in groups):
        raise UserError("the checkpoint does not hold the settings of this run's optimisers")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    parts = ("momentum",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
    for i, weight in enumerate(weights if step else ()):
        of_weight = state.get(i) if isinstance(state, dict) else None
        if not isinstance(of_weight, dict) or of_weight.keys() != set(parts) or len(state) != len(weights):
            raise UserError("the checkpoint does not hold the state of this run's optimisers")
        for name, value in of_weight.items():
            if not is_tensor_like(value, torch.zeros(()) if name == "step" else weight) or not value.isfinite().all():
                raise UserError(f"the checkpoint's {name} of the optimiser does not fit this network")
            if name != "step":  # fused optimisers need the memory layout of the weight
                of_weight[name] = torch.empty_like(weight).copy_(value)
    return state if step else {}
