"""Muon, an optimiser for the weight matrices of a network; makes all singular values of an update about 1."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from utils import has_bf16_instructions

# Coefficients of the Newton-Schulz polynomial of Jordan et al. 2024; five iterations bring singular values near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Matrices (N, rows, columns) with the same singular vectors and singular values of about 1 (0.7 to 1.2).

    Singular values below 0.0015 of a matrix's Frobenius norm grow too, but stay below 0.7.

    X <- a X + (b A + c A²) X with A = X Xᵀ, computed in bfloat16 (Jordan et al. 2024); on a CPU without instructions
    for it, where bfloat16 takes twenty times as long, in float32. Returns the input's dtype.
    """
    (a, b, c), bf16 = NEWTON_SCHULZ, matrices.device.type != "cpu" or has_bf16_instructions()
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).to(torch.bfloat16 if bf16 else torch.float32)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """W <- W - lr · sqrt(max(1, rows / columns)) · orthogonalise(Nesterov momentum of the gradient of W).

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". For weights of two dimensions or
    more; a convolution is a matrix (out, in · height · width). The other weights need another optimiser. If the tensor
    `found_inf` is 1, a step changes nothing, as in torch's fused optimisers.

    Not torch.optim.Muon (torch 2.14), which refuses convolutions, ignores `found_inf`, and reads a learning rate in a
    tensor as a number, which a CUDA graph cannot do.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.flatten(1).shape, []).append(weight)
            for weights in by_shape.values():
                self._step(weights, group["lr"], group["momentum"])

    def _step(self, weights: list[Tensor], lr: float, momentum: float) -> None:
        """Update weights that have the same shape as matrices."""
        apply = 1.0 if self.found_inf is None else 1.0 - self.found_inf  # 0: this step changes nothing
        updates = []
        for weight in weights:
            gradient = weight.grad if self.found_inf is None else weight.grad.nan_to_num(0, 0, 0)
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            buffer = self.state[weight]["momentum"]
            buffer.lerp_(gradient, (1 - momentum) * apply)
            updates.append(gradient.lerp(buffer, momentum).flatten(1))
        rows, columns = updates[0].shape
        step = orthogonalise(torch.stack(updates)) * (lr * apply * max(1, rows / columns) ** 0.5)
        subtract_(weights, [s.view_as(w) for s, w in zip(step, weights, strict=True)])


def subtract_(weights: list[Tensor], steps: list[Tensor]) -> None:
    """weight <- weight - step for each pair, on a GPU in one kernel where torch has its private function for it."""
    if hasattr(torch, "_foreach_sub_"):
        torch._foreach_sub_(weights, steps)
    else:
        for weight, step in zip(weights, steps, strict=True):
            weight.sub_(step)


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The weights for Muon: those of two dimensions or more, except the first and last layer and the embeddings."""
    return [weight for name, weight in model.named_parameters()
            if weight.ndim >= 2 and not name.startswith(("stem", "head", "label_embedding"))]
