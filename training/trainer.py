"""One training step and everything that it depends on.

Everything random is a function of (seed, step), and what dropout sets to 0 also of the process: a resumed run needs no
hidden state, and any number of processes draws the same batches.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data import ImageData
from diffusion import DiffusionProcess
from runtime import distributed
from runtime.errors import RunFailed, UserError
from runtime.memory import fits_in_memory
from training import autotune
from training.cuda_graph import CudaGraph
from training.learning_rate import ema_decay_at, learning_rate
from training.optimizers import make_optimizers, restore_optimizer, set_learning_rates, step_unless
from utils import autocast, generator_for, seed_for

ORDER, LABELS, NOISE, FLIPS, DROPOUT = range(5)  # the purpose of a random generator, a part of its key
VALIDATION_LOSS_IMAGES = 2048
EPOCH_IMAGES = 8000  # an epoch of your own pictures shows at least so many images
SMALLER = "train a smaller network, with a smaller --base_channels or with --patch_size 4"  # advice


class Trainer:
    """A network in training: model, moving average of its weights, optimisers, and the number of steps taken.

    data         the training images, on the device where the model is trained
    batch_size   images in a step, of all processes together
    hflip        mirror each image with probability 1/2
    cuda_graph   run each step as one CUDA graph

    UserError for a batch size that the number of processes does not divide.
    """

    def __init__(self, data: ImageData, model: nn.Module, diffusion: DiffusionProcess, *, batch_size: int = 128,
                 optimizer: str = "muon", lr: float = 2e-3, muon_lr: float = 0.02, warmup: float = 0.02,
                 lr_schedule: str = "cosine", weight_decay: float = 0.0, max_grad_norm: float = 1.0,
                 ema_decay: float = 0.999, conditional: bool = False, label_dropout: float = 0.1,
                 precision: str = "fp32", seed: int = 0, hflip: bool = False,
                 cuda_graph: bool = False):
        self.data, self.model, self.diffusion, self.device = data, model, diffusion, data.images.device
        self.repeats = repeats_of(data)
        self.batch_size = min(batch_size, self.repeats * len(data.images))
        if self.batch_size % distributed.world_size():
            raise UserError(f"a batch of {self.batch_size} does not divide among {distributed.world_size()} processes: "
                            f"choose a --batch_size that does")
        self.warmup, self.lr_schedule = warmup, lr_schedule
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.conditional, self.label_dropout = conditional, label_dropout
        self.precision, self.seed, self.hflip, self.step = precision, seed, hflip, 0
        self.network = DistributedDataParallel(model) if distributed.world_size() > 1 else model
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.dropout = any(isinstance(layer, nn.Dropout) and layer.p for layer in model.modules())
        self.optimizers = make_optimizers(model, optimizer, lr, muon_lr, weight_decay, cuda_graph)
        self.cuda_graph, self.learn = cuda_graph, CudaGraph(self._learn) if cuda_graph else self._learn
        self.skipped = torch.zeros(2, device=self.device)  # steps without a finite gradient: in all, and in a row
        self._order = (None, None)  # an epoch and its permutation of the images

    @property
    def steps_per_epoch(self) -> int:
        return self.repeats * len(self.data.images) // self.batch_size

    @property
    def local_batch(self) -> int:
        """Images of a step in this process: as many can be evaluated at a time, for less memory."""
        return self.batch_size // distributed.world_size()

    def preview_batch(self, count: int) -> int:
        """How many of `count` images to make at a time; guidance evaluates each of them twice."""
        return max(1, min(count, self.local_batch // (2 if self.conditional else 1)))

    @property
    def epoch(self) -> int:
        """The number of complete epochs."""
        return self.step // self.steps_per_epoch

    @property
    def images_seen(self) -> int:
        return self.step * self.batch_size

    def reports_now(self, by_time: bool) -> bool:
        """Whether the epoch that has just ended is reported: every one; by time the first after each EPOCH_IMAGES.

        Else the reports of a run on few --train_images would take most of its time. Epochs of your own pictures are
        long enough: see `repeats_of`.
        """
        before = self.images_seen - self.steps_per_epoch * self.batch_size
        return not by_time or self.data.folder is not None or self.images_seen // EPOCH_IMAGES > before // EPOCH_IMAGES

    @property
    def lr(self) -> float:
        """AdamW's learning rate in the last step."""
        return float(self.optimizers["adamw"].param_groups[0]["lr"])

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) in [-1, 1] of the next step, and labels (B,), some of them replaced by "no label"."""
        if self._order[0] != self.epoch:
            generator = generator_for(self.seed, ORDER, self.epoch)
            order = [torch.randperm(len(self.data.images), generator=generator) for _ in range(self.repeats)]
            self._order = self.epoch, torch.cat(order).to(self.device)
        first = self.step % self.steps_per_epoch * self.batch_size
        chosen = self._order[1][first:first + self.batch_size]
        images = self.data.x_0(chosen)
        if self.hflip:
            generator = generator_for(self.seed, FLIPS, self.step, device=self.device)
            mirrored = torch.rand(len(chosen), 1, 1, 1, generator=generator, device=self.device) < 0.5
            images = torch.where(mirrored, images.flip(3), images)
        if not self.conditional:
            return images, None
        generator = generator_for(self.seed, LABELS, self.step, device=self.device)
        dropped = torch.rand(len(chosen), generator=generator, device=self.device) < self.label_dropout
        return images, self.data.labels[chosen].masked_fill(dropped, len(self.data.class_names))

    def train_step(self, x_0: Tensor, labels: Tensor | None, progress: float, step_share: float = 0.0) -> Tensor:
        """One step of gradient descent on a batch; returns the loss (), still on the device.

        progress (0..1): how much of the run is done, and step_share, how much a step adds (0: unknown), for the
        learning rate. A step whose gradient is not finite changes no weight and is counted in `skipped`.
        """
        share = learning_rate(progress, self.warmup, self.lr_schedule, step_share)
        set_learning_rates(self.optimizers, share, self.device, self.cuda_graph)
        generator = generator_for(self.seed, NOISE, self.step, device=self.device)
        t = self.diffusion.sample_timesteps(len(x_0), generator)
        noise = torch.randn(x_0.shape, generator=generator, device=self.device)
        mine = distributed.rank_slice(len(x_0))
        if self.dropout:  # it draws from the generator of torch itself
            torch.manual_seed(seed_for(self.seed, DROPOUT, self.step, distributed.rank()))
        loss = self.learn(x_0[mine], t[mine], noise[mine], None if labels is None else labels[mine])
        self.step += 1
        update_ema = get_ema_multi_avg_fn(ema_decay_at(self.step, self.ema_decay))
        update_ema(list(self.ema.parameters()), [weight.detach() for weight in self.model.parameters()], None)
        return loss

    def _learn(self, x_0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Loss, gradient, clipping, and the optimisers' step. On a GPU nothing here waits for the device."""
        self.model.zero_grad()
        loss = autotune.loss_and_gradient(self.network, self.diffusion, x_0, t, noise, labels, self.precision)
        loss = distributed.all_reduce_mean(loss)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        bad = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        self.skipped.copy_(torch.stack([self.skipped[0] + bad, (self.skipped[1] + bad) * bad]))
        for optimizer in self.optimizers.values():
            step_unless(bad, optimizer)  # a tensor: where it is 1 the weights stay as they are, without a wait
        return loss

    def is_finite(self) -> bool:
        """Whether all weights and their averages are finite numbers."""
        weights = [*self.model.parameters(), *self.ema.parameters()]
        return bool(torch.stack([weight.isfinite().all() for weight in weights]).all())

    def compile(self, required: bool) -> None:
        """Compile the network. Where that fails: UserError if `required`, else a line that says so."""
        self.network = autotune.compiled(self.network, lambda network: autotune.forward_backward(
            network, self.diffusion, self.data, self.conditional, self.precision,
            self.batch_size // distributed.world_size()), required)

    def leave_graph(self) -> None:
        """Take ordinary steps from now on, and give back the memory that a CUDA graph holds."""
        self.model.zero_grad()
        self.learn = self._learn

    def rehearse(self, count: int) -> None:
        """Use as much memory as steps with `count` images in this process, and change nothing.

        With several processes in a copy of the network: its own would wait for the gradients of the others.
        """
        self.model.zero_grad()
        model = copy.deepcopy(self.model) if distributed.world_size() > 1 else self.model
        rehearse_steps(model, self.diffusion, self.data, self.conditional, self.precision, count)

    @property
    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: weights, their average, and up to two tensors of the optimisers for each."""
        return 4 * sum(weight.numel() * weight.element_size() for weight in self.model.parameters())

    def state(self) -> dict:
        """The part of a checkpoint that training changes."""
        optimizers = {name: each.state_dict() for name, each in self.optimizers.items()}
        for group in [group for each in optimizers.values() for group in each["param_groups"]]:
            group["lr"] = float(group["lr"])
        return dict(model=self.model.state_dict(), ema=self.ema.state_dict(), optimizer=optimizers, step=self.step,
                    epoch=self.epoch, images_seen=self.images_seen, precision=self.precision, seed=self.seed)

    def restore(self, checkpoint: dict) -> None:
        """Continue from a checkpoint. UserError if its tensors do not fit this network."""
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.ema.load_state_dict(checkpoint["ema"])
        except RuntimeError as error:
            raise UserError(f"the checkpoint does not fit this network: {error}") from error
        for name, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, checkpoint["optimizer"].get(name), checkpoint["step"])
        self.step = checkpoint["step"]
        skipped = checkpoint["history"].get("skipped") or [0.0, 0.0]
        self.skipped = torch.tensor(skipped, dtype=torch.float32, device=self.device)


def repeats_of(data: ImageData) -> int:
    """How often an epoch shows each image: of few pictures of one's own often, else samples would take all the time."""
    return 1 if data.folder is None else -(-EPOCH_IMAGES // len(data.images))


def rehearse_steps(model: nn.Module, diffusion: DiffusionProcess, data: ImageData, conditional: bool, precision: str,
                   count: int) -> None:
    """Use as much memory as two training steps with `count` images in this process, and change nothing.

    As in a run, the states of the optimisers and the averaged weights appear after the first backward pass, in the
    memory that it has freed, so that the second step finds less of it in one piece.
    """
    kept, part = [], autotune.PART + autotune.PART // 4  # a margin for large images, as count has one: fits_in_memory
    try:
        for _ in range(2):
            model.zero_grad()
            batch = autotune.trial_batch(data, conditional, count)
            autotune.loss_and_gradient(model, diffusion, *batch, precision, part)
            kept = kept or [torch.empty_like(weight) for weight in model.parameters() for _ in range(3)]
    finally:
        model.zero_grad()


def memory_advice(trainer: Trainer, resumed: bool = False, smaller: str = SMALLER) -> str:
    """Advice after a step that ran out of memory; measures the batch size that fits this process.

    resumed: the run goes on from a checkpoint, with which --batch_size cannot change. smaller: how to get a smaller
    network.
    """
    trainer.leave_graph()
    fits = fitting_batch(trainer.rehearse, trainer.batch_size // 2, trainer.device, agree=False, smaller=smaller)
    how = "close other programs, or start a new run with that --batch_size" if resumed else "give it with --batch_size"
    return f"out of memory in a step of {trainer.batch_size} images: a batch of {fits} fits (measured): {how}"


def fitting_batch(rehearse: Callable[[int], None], count: int, device: torch.device, agree: bool = True,
                  smaller: str = SMALLER) -> int:
    """The first of `count`, half of it, a quarter ... whose step fits in memory. RunFailed if none does.

    rehearse(n): a step of n images in one process, which changes nothing.
    agree: it must fit for all processes, and all of them must call this; else only for this one.
    """
    while count >= distributed.world_size():
        count -= count % distributed.world_size()
        fits = fits_in_memory(rehearse, count // distributed.world_size(), device)
        if distributed.all_reduce_min(fits) if agree else fits:
            return count
        count //= 2
    raise RunFailed(f"out of memory even for one image: {smaller}, or close other programs")


@torch.no_grad()
def validation_loss(trainer: Trainer, validation: ImageData) -> float:
    """The loss of the averaged weights on validation images, always with the same times and noise; NaN without any.

    The times are evenly spread over 0..T-1 whatever the training draws: it compares runs, but not with their `loss`.
    It leaves out the loss of learned variances, so that networks with and without them can be compared.
    """
    count, device = min(VALIDATION_LOSS_IMAGES, len(validation.images)), trainer.device
    if not count:
        return math.nan
    generator = generator_for(0)
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    t = (u * trainer.diffusion.num_timesteps).long().clamp(max=trainer.diffusion.num_timesteps - 1)  # u may round to 1
    noise = torch.randn((count, *validation.images.shape[1:]), generator=generator)
    mine, losses = distributed.rank_slice(count), torch.zeros(1, device=device)
    batch_size = min(trainer.local_batch, 128 if device.type == "cpu" else 512)
    for rows in torch.arange(count)[mine].split(batch_size):
        parts = (trainer.data.code.encode(validation.images[rows]), t[rows], noise[rows], validation.labels[rows])
        x_0, times, noises, labels = (part.to(device) for part in parts)
        with autocast(device, trainer.precision):
            losses += trainer.diffusion.simple_loss(trainer.ema, x_0, times, noises,
                                                    labels if trainer.conditional else None, reduction="none").sum()
    return (distributed.all_reduce_sum(losses) / count).item()
