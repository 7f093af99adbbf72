"""One step of learning, and all that it depends on.

Everything random is a function of (seed, step): a run that is stopped and taken up again needs no hidden state, and
any number of processes draws the same batches.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import is_like
from data import ImageData, to_model
from diffusion import DiffusionProcess
from runtime import distributed
from runtime.errors import RunFailed, UserError
from runtime.memory import fits_in_memory
from training import autotune
from training.muon import Muon, hidden_matrices
from utils import autocast, generator_for

ORDER, LABELS, NOISE = range(3)  # what a random generator is for, as part of its key
LOG_STEPS = 50  # between two lines of metrics.jsonl
MAX_BAD_STEPS = 20  # without a finite gradient, in a row, after which a run stops
LOSS_IMAGES = 2048  # of the validation split, that validation_loss takes

LR_SCHEDULES = ("cosine", "constant")


def learning_rate(progress: float, warmup: float, schedule: str = "cosine") -> float:
    """The share of the peak rate when `progress` (0..1) of the run is done: a linear rise, then half a cosine to 0.

    schedule "constant": it stays at the peak.
    """
    if progress < warmup:
        return progress / warmup
    return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * (progress - warmup) / max(1e-9, 1 - warmup))) / 2


def make_optimizers(model: nn.Module, name: str, lr: float, muon_lr: float, weight_decay: float,
                    recorded: bool = False) -> dict:
    """{"adamw": ...}, or with name "muon" also {"muon": ...}, which takes the matrices. recorded: as a CUDA graph."""
    matrices = hidden_matrices(model) if name == "muon" else []
    taken = set(map(id, matrices))
    rest = [weight for weight in model.parameters() if id(weight) not in taken]
    optimizers = dict(adamw=torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True,
                                              capturable=recorded))
    if matrices:
        optimizers["muon"] = Muon(matrices, lr=muon_lr)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def shown(record: dict) -> str:
    """What a progress bar says of a line of metrics.jsonl."""
    loss = math.nan if record["loss"] is None else record["loss"]
    return f"loss {loss:.4f}, {record['images_per_second']:.0f} images/s"


def ema_decay_at(step: int, decay: float) -> float:
    """The decay of the weights' average after `step` steps: young averages forget their beginning faster."""
    return min(decay, (1 + step) / (10 + step))


class Trainer:
    """A network that learns: model, average of its weights, optimisers, and the step that it has reached.

    `data` lies on the device where the model is to learn. `batch_size` is that of all processes together.
    recorded: a step is one CUDA graph.
    """

    def __init__(self, data: ImageData, model: nn.Module, diffusion: DiffusionProcess, *, batch_size: int = 128,
                 optimizer: str = "muon", lr: float = 2e-3, muon_lr: float = 0.02, warmup: float = 0.02,
                 lr_schedule: str = "cosine", weight_decay: float = 0.0, max_grad_norm: float = 1.0,
                 ema_decay: float = 0.999, conditional: bool = False, label_dropout: float = 0.1,
                 precision: str = "fp32", seed: int = 0, recorded: bool = False):
        self.data, self.model, self.diffusion, self.device = data, model, diffusion, data.images.device
        self.batch_size = min(batch_size, len(data.images))
        if self.batch_size % distributed.size():
            raise UserError(f"a batch of {self.batch_size} does not divide among {distributed.size()} processes: "
                             f"choose a --batch_size that does")
        self.warmup, self.lr_schedule = warmup, lr_schedule
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.conditional, self.label_dropout = conditional, label_dropout
        self.precision, self.seed, self.step = precision, seed, 0
        self.network = DistributedDataParallel(model) if distributed.size() > 1 else model
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.optimizers = make_optimizers(model, optimizer, lr, muon_lr, weight_decay, recorded)
        self.recorded, self.learn = recorded, autotune.Recorded(self._learn) if recorded else self._learn
        self.skipped = torch.zeros(2, device=self.device)  # steps without a finite gradient: in all, and in a row
        self._order = (None, None)  # an epoch and its permutation of the images

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.images) // self.batch_size

    @property
    def epoch(self) -> int:
        """How many epochs are complete."""
        return self.step // self.steps_per_epoch

    @property
    def images_seen(self) -> int:
        return self.step * self.batch_size

    @property
    def lr(self) -> float:
        """AdamW's learning rate in the last step."""
        return float(self.optimizers["adamw"].param_groups[0]["lr"])

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """The images (B, C, H, W) in [-1, 1] of this step, and their labels, some of them dropped for "no label"."""
        if self._order[0] != self.epoch:
            order = torch.randperm(len(self.data.images), generator=generator_for(self.seed, ORDER, self.epoch))
            self._order = self.epoch, order.to(self.device)
        first = self.step % self.steps_per_epoch * self.batch_size
        chosen = self._order[1][first:first + self.batch_size]
        images = to_model(self.data.images[chosen])
        if not self.conditional:
            return images, None
        chance = generator_for(self.seed, LABELS, self.step, device=self.device)
        dropped = torch.rand(len(chosen), generator=chance, device=self.device) < self.label_dropout
        return images, self.data.labels[chosen].masked_fill(dropped, len(self.data.class_names))

    def train_step(self, progress: float) -> Tensor:
        """One step of gradient descent, `progress` (0..1) into the run; returns the loss (), still on the device.

        A step whose gradient is not finite changes no weight and is counted in `skipped`.
        """
        self._set_rates(learning_rate(progress, self.warmup, self.lr_schedule))
        x_0, labels = self.batch()
        chance = generator_for(self.seed, NOISE, self.step, device=self.device)
        t = self.diffusion.sample_timesteps(len(x_0), chance)
        noise = torch.randn(x_0.shape, generator=chance, device=self.device)
        mine = distributed.share(len(x_0))
        loss = self.learn(x_0[mine], t[mine], noise[mine], None if labels is None else labels[mine])
        self.step += 1
        torch._foreach_lerp_(list(self.ema.parameters()), [weight.detach() for weight in self.model.parameters()],
                             1 - ema_decay_at(self.step, self.ema_decay))
        return loss

    def _set_rates(self, share: float) -> None:
        """Set the learning rates to this share of their peaks; a CUDA graph finds them in tensors on the device."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                rate = group["initial_lr"] * share
                group["lr"] = torch.as_tensor(group["lr"], device=self.device).fill_(rate) if self.recorded else rate

    def _learn(self, x_0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        """The gradient and what it changes; returns the loss. On a GPU nothing in it waits for the device."""
        self.model.zero_grad()
        with autocast(self.device, self.precision):
            loss = self.diffusion.loss(self.network, x_0, t, noise, labels)
        loss.backward()
        loss = distributed.mean(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        bad = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        self.skipped.copy_(torch.stack([self.skipped[0] + bad, (self.skipped[1] + bad) * bad]))
        for optimizer in self.optimizers.values():
            optimizer.found_inf = bad  # where this is 1 the weights stay as they are, without the processor waiting
            optimizer.step()
        return loss

    @torch.no_grad()
    def validation_loss(self, validation: ImageData) -> float:
        """The loss of the averaged weights on images that nothing learns from, always with the same noise and times.

        It leaves out what learned variances add, so that it compares with that of networks without them.
        """
        count = min(LOSS_IMAGES, len(validation.images))
        chance = generator_for(0)
        t = ((torch.arange(count) + torch.rand(count, generator=chance)) / count * self.diffusion.num_timesteps).long()
        noise = torch.randn((count, *validation.images.shape[1:]), generator=chance)
        mine, losses = distributed.share(count), torch.zeros(1, device=self.device)
        batch_size = 128 if self.device.type == "cpu" else 512  # 128: with no more memory than a training step
        for rows in torch.arange(count)[mine].split(batch_size):
            parts = (to_model(validation.images[rows]), t[rows], noise[rows], validation.labels[rows])
            x_0, times, noises, labels = (part.to(self.device) for part in parts)
            with autocast(self.device, self.precision):
                losses += self.diffusion.loss(self.ema, x_0, times, noises, labels if self.conditional else None,
                                              reduction="none", hybrid=False).sum()
        return (distributed.total(losses) / count).item()

    def is_finite(self) -> bool:
        """Whether all weights and their averages are finite numbers."""
        weights = [*self.model.parameters(), *self.ema.parameters()]
        return bool(torch.stack([weight.isfinite().all() for weight in weights]).all())

    def compile(self, insist: bool) -> None:
        """Train a compiled network. Without a compiler that works: UserError if we insist, else a line about it."""
        def attempt(network: nn.Module) -> None:
            autotune.rehearse(network, self.diffusion, self.data, self.conditional, self.precision,
                            self.batch_size // distributed.size())
        self.network = autotune.compiled(self.network, attempt, insist)

    def rehearse(self, count: int) -> None:
        """Take the memory of a step with `count` images in this process, and change nothing."""
        spare = [torch.empty_like(weight) for weight in self.model.parameters() for _ in range(2)]  # of the optimisers
        try:
            autotune.rehearse(self.model, self.diffusion, self.data, self.conditional, self.precision, count)
        finally:
            del spare

    def fitting_batch(self, count: int, agree: bool = True) -> int:
        """The first of `count`, its half, its quarter ... whose step fits in memory. RunFailed if none does.

        agree: in that of all processes, which all ask, and not of this one alone.
        """
        while count >= distributed.size():
            count -= count % distributed.size()
            fits = fits_in_memory(self.rehearse, count // distributed.size(), self.device)
            if distributed.smallest(fits) if agree else fits:
                return count
            count //= 2
        raise RunFailed("out of memory even for one image: choose a smaller --base_channels, or --patch_size 4")

    def record(self, losses: list[Tensor], speed: float, seconds: float, val_loss: float | None = None) -> dict:
        """A line of metrics.jsonl for the steps that gave `losses` (scalars); null (None) for what is no number."""
        finite = [loss for loss in torch.stack(losses).tolist() if math.isfinite(loss)]  # waits for the device
        return dict(step=self.step, epoch=self.epoch, images_seen=self.images_seen,
                    loss=sum(finite) / len(finite) if finite else None,
                    val_loss=val_loss if val_loss is not None and math.isfinite(val_loss) else None,
                    lr=self.lr, images_per_second=round(speed, 1), seconds=round(seconds, 3))

    @property
    def checkpoint_bytes(self) -> int:
        """About as much as a checkpoint takes: weights, their average, and the optimisers' two of each at most."""
        return 4 * sum(weight.numel() * weight.element_size() for weight in self.model.parameters())

    def state(self) -> dict:
        """What a checkpoint holds of the learning."""
        optimizers = {name: each.state_dict() for name, each in self.optimizers.items()}
        for group in [group for each in optimizers.values() for group in each["param_groups"]]:
            group["lr"] = float(group["lr"])
        return dict(model=self.model.state_dict(), ema=self.ema.state_dict(), optimizer=optimizers,
                    step=self.step, epoch=self.epoch,
                    images_seen=self.images_seen, precision=self.precision, seed=self.seed)

    def restore(self, checkpoint: dict) -> None:
        """Go back to where a checkpoint was written. UserError if its tensors do not fit this network."""
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.ema.load_state_dict(checkpoint["ema"])
        except RuntimeError as error:
            raise UserError(f"the checkpoint does not fit this network: {error}") from error
        for name, optimizer in self.optimizers.items():
            saved, groups = checkpoint["optimizer"].get(name), optimizer.state_dict()["param_groups"]
            state = self._checked_state(optimizer, saved, checkpoint["step"])
            for group, before in zip(groups, saved["param_groups"], strict=True):
                group["lr"] = before["lr"]
            optimizer.load_state_dict(dict(state=state, param_groups=groups))
        self.step = checkpoint["step"]
        skipped = checkpoint["history"].get("skipped") or [0.0, 0.0]
        self.skipped = torch.tensor(skipped, dtype=torch.float32, device=self.device)

    @staticmethod
    def _checked_state(optimizer: torch.optim.Optimizer, saved: dict | None, step: int) -> dict:
        """The state in an optimiser's saved state_dict; its settings are the run's own. UserError if it is not its."""
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
                if not is_like(value, torch.zeros(()) if name == "step" else weight) or not value.isfinite().all():
                    raise UserError(f"the checkpoint's {name} of the optimiser does not fit this network")
                if name != "step":  # in the order in memory that the weight has: fused optimisers rely on it
                    of_weight[name] = torch.empty_like(weight).copy_(value)
        return state if step else {}
