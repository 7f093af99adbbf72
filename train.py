"""Learn to make images like those of a data set.

    python train.py --epochs 20
    python train.py --budget 10m
    python train.py --dataset fashion_mnist --schedule cosine --prediction v --output_dir outputs/fashion

Writes to --output_dir: samples/epoch_001.png ..., checkpoints/model_epoch_005.pt ..., model_final.pt,
training_loss.png and metrics.jsonl.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from data import load_dataset, to_model
from diffusion import PREDICTIONS, SCHEDULES, TIMESTEP_SAMPLING, DiffusionProcess
from models import create_model
from models.layers import ACTIVATIONS
from samplers import final_image, generate
from utils import (
    Parser,
    add_shared_flags,
    autocast,
    check_writable,
    count_parameters,
    duration,
    generator_for,
    get_device,
    number,
    pick_precision,
    plot_losses,
    save_images,
    script,
    set_seed,
    write_json_lines,
)

LOG_STEPS = 50  # between two lines of metrics.jsonl within an epoch
VALIDATION_BATCHES, VALIDATION_BATCH = 4, 512
PREVIEW_IMAGES, PREVIEW_STEPS = 64, 20
MODEL_FLAGS = ("base_channels", "time_emb_dim", "channel_mults", "depth", "attention", "activation", "patch_size")
DIFFUSION_FLAGS = {"timesteps": "num_timesteps", "schedule": "schedule", "prediction": "prediction",
                   "timestep_sampling": "timestep_sampling"}


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("run")
    add_shared_flags(group, "dataset", "data_dir", "output_dir", "device", "precision", "seed")
    group.add_argument("--epochs", type=number(int, 1),
                       help="passes over the training images (default: 20, or what --budget allows)")
    group.add_argument("--budget", type=duration, metavar="TIME",
                       help="wall-clock time for everything, start-up and saving included: 90s, 10m, 1.5h")
    group.add_argument("--train_images", type=number(int, 1), help="learn from the first N training images only")
    group.add_argument("--sample_interval", type=number(int, 0), default=1,
                       help="epochs between two grids of samples; 0: none")
    group.add_argument("--save_interval", type=number(int, 0), default=5,
                       help="epochs between two checkpoints; 0: only model_final.pt")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output_dir")
    group = parser.add_argument_group("diffusion process")
    group.add_argument("--timesteps", type=number(int, 1, 100_000), default=1000, help="T, the number of noising steps")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="how the noise grows")
    group.add_argument("--prediction", choices=tuple(PREDICTIONS), default="edm", help="what the network predicts")
    group.add_argument("--timestep_sampling", choices=TIMESTEP_SAMPLING, default="lognormal",
                       help="which t are trained on")
    group = parser.add_argument_group("network")
    group.add_argument("--base_channels", type=number(int, 1, 4096), default=64,
                       help="channels at the highest resolution")
    group.add_argument("--patch_size", type=int, choices=(1, 2, 4), default=2,
                       help="pixels unshuffled into channels; 1: convolutions at full resolution")
    group.add_argument("--channel_mults", type=number(int, 1, 64), nargs="+", metavar="N",
                       help="channels at each resolution / base_channels (default: by patch_size)")
    group.add_argument("--depth", type=number(int, 1, 64), default=1, help="residual blocks in each stage")
    group.add_argument("--attention", type=number(int, 0, 64), nargs="+", default=[4], metavar="N",
                       help="self-attention at 1/N of the image's size for each N; 0: none")
    group.add_argument("--activation", choices=tuple(ACTIVATIONS), default="silu", help="between the layers")
    group.add_argument("--time_emb_dim", type=number(int, 2, 65536), default=256, help="size of the time embedding")
    group.add_argument("--conditional", action="store_true", help="learn the classes too")
    group.add_argument("--label_dropout", type=number(float, 0, 1), default=0.1,
                       help="share of the images that --conditional shows without their label")
    group = parser.add_argument_group("optimiser")
    group.add_argument("--batch_size", type=number(int, 1), default=128, help="images in a step")
    group.add_argument("--lr", type=number(float, 0), default=2e-3, help="peak learning rate")
    group.add_argument("--warmup", type=number(float, 0, 1), default=0.02, help="share of the steps in which lr rises")
    group.add_argument("--weight_decay", type=number(float, 0), default=0.0, help="of AdamW")
    group.add_argument("--max_grad_norm", type=number(float, 0), default=1.0, help="gradients are clipped to this norm")
    group.add_argument("--ema_decay", type=number(float, 0, 1), default=0.999, help="of the average of the weights")
    args = parser.parse_args(argv)
    if args.epochs is None and args.budget is None:
        args.epochs = 20
    return args


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """The learning rate when `progress` (0..1) of the run is done: a linear rise, then half a cosine down to 0."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * (1 + math.cos(math.pi * (progress - warmup) / max(1e-9, 1 - warmup))) / 2


def ema_decay_at(step: int, decay: float) -> float:
    """The decay of the weights' average after `step` steps: young averages forget their beginning faster."""
    return min(decay, (1 + step) / (10 + step))


class Run:
    """A training run: what it learns, how far it is, and what it writes."""

    def __init__(self, args, startup: float = 0.0):
        self.args, self.device, self.start = args, get_device(args.device), time.perf_counter() - startup
        self.output_dir = check_writable(args.output_dir)
        self.precision = pick_precision(args.precision, self.device)
        self.data = load_dataset(args.dataset, "train", args.data_dir).first(args.train_images or sys.maxsize)
        self.data = self.data.to(self.device)
        self.validation = load_dataset(args.dataset, "validation", args.data_dir)
        self.batch_size = min(args.batch_size, len(self.data.images))
        self.steps_per_epoch = len(self.data.images) // self.batch_size
        self.total_steps = args.epochs * self.steps_per_epoch if args.epochs else math.inf
        self.closing = 3.0  # seconds that the end of the run will take: measured at the end of each epoch
        set_seed(args.seed)
        channels = self.data.images.shape[1]
        model_config = dict({name: getattr(args, name) for name in MODEL_FLAGS}, image_channels=channels,
                            num_classes=len(self.data.class_names) if args.conditional else None)
        model_config["attention"] = [factor for factor in args.attention if factor]
        self.diffusion = DiffusionProcess(
            **{ours: getattr(args, flag) for flag, ours in DIFFUSION_FLAGS.items()},
            data_std=round(to_model(self.data.images[:10_000]).std().item(), 3)).to(self.device)
        self.model = create_model(**model_config).to(self.device)
        self.model(torch.zeros(1, *self.shape, device=self.device), torch.zeros(1, device=self.device))  # sizes fit?
        self.ema = AveragedModel(self.model, multi_avg_fn=self._average).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, betas=(0.9, 0.99),
                                           weight_decay=args.weight_decay, fused=self.device.type in ("cpu", "cuda"))
        self.step, self.seconds, self.records, self._order = 0, 0.0, [], (None, None)  # seconds: of all its sittings

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.images.shape[1:])

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def progress(self) -> float:
        """How much of the run is done, 0..1: of its steps or of its time, whichever is further."""
        in_time = self.elapsed / max(1e-9, self.args.budget - self.closing) if self.args.budget else 0.0
        return min(1.0, max(self.step / self.total_steps, in_time))

    def _average(self, averages, weights, _) -> None:
        torch._foreach_lerp_(averages, weights, 1 - ema_decay_at(self.step, self.args.ema_decay))

    # ------------------------------------------------------------------------------------------------ one step

    def batch(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images (B, C, H, W) in [-1, 1] of this step, and their labels; both depend on (seed, step) only."""
        if self._order[0] != self.epoch:
            order = torch.randperm(len(self.data.images), generator=generator_for(self.args.seed, 0, self.epoch))
            self._order = self.epoch, order.to(self.device)
        first = self.step % self.steps_per_epoch * self.batch_size
        chosen = self._order[1][first:first + self.batch_size]
        images = to_model(self.data.images[chosen])
        if not self.args.conditional:
            return images, None
        dropped = torch.rand(len(chosen), generator=generator_for(self.args.seed, 1, self.step))
        dropped = dropped.to(self.device) < self.args.label_dropout
        return images, self.data.labels[chosen].masked_fill(dropped, len(self.data.class_names))

    def train_step(self) -> torch.Tensor:
        """Take one step of gradient descent; returns the loss, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.progress, self.args.lr, self.args.warmup)
        x_0, labels = self.batch()
        chance = generator_for(self.args.seed, 2, self.step, device=self.device)
        t = self.diffusion.sample_timesteps(len(x_0), chance)
        noise = torch.randn(x_0.shape, generator=chance, device=self.device)
        with autocast(self.device, self.precision):
            loss = self.diffusion.loss(self.model, x_0, t, noise, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.model)
        self.step += 1
        return loss.detach()

    # --------------------------------------------------------------------------------------- between the epochs

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The loss of the averaged weights on validation images, always with the same noise and times."""
        total = 0.0
        for i in range(VALIDATION_BATCHES):
            part = slice(i * VALIDATION_BATCH, (i + 1) * VALIDATION_BATCH)
            x_0, chance = to_model(self.validation.images[part]).to(self.device), generator_for(0, i)
            t = (torch.arange(len(x_0)) + torch.rand(len(x_0), generator=chance)) / len(x_0)
            t = (t * self.diffusion.num_timesteps).long().to(self.device)
            noise = torch.randn(x_0.shape, generator=chance).to(self.device)
            labels = self.validation.labels[part].to(self.device) if self.args.conditional else None
            with autocast(self.device, self.precision):
                total += self.diffusion.loss(self.ema.module, x_0, t, noise, labels).item() / VALIDATION_BATCHES
        return total

    def save_preview(self, epoch: int) -> None:
        """Write a grid of images from the same starting noise as in every other epoch."""
        steps = min(PREVIEW_STEPS, self.diffusion.num_timesteps)
        indices = range(PREVIEW_IMAGES)
        labels = torch.arange(PREVIEW_IMAGES) % len(self.data.class_names) if self.args.conditional else None
        with autocast(self.device, self.precision):
            images = [final_image(trajectory) for _, trajectory in generate(
                self.ema.module, self.diffusion, self.shape, indices, seed=self.args.seed, steps=steps, labels=labels)]
        save_images(torch.cat(images), self.output_dir / f"samples/epoch_{epoch:03d}.png")

    def end_epoch(self, loss: float, speed: float) -> None:
        """Validate, log, and write what the number of the epoch that ended here calls for."""
        start = time.perf_counter()
        val_loss = self.validation_loss()
        self.record(loss, speed, val_loss)
        epoch = -(-self.step // self.steps_per_epoch)  # one that a budget cut short counts
        own = [r for r in self.records if r["step"] > (epoch - 1) * self.steps_per_epoch]
        mean = sum(r["loss"] for r in own) / len(own)
        seconds = self.seconds - max((r["seconds"] for r in self.records[:-len(own)]), default=0)
        tqdm.write(f"epoch {epoch}: loss {mean:.5f}, val_loss {val_loss:.5f}, {seconds:.1f} s", file=sys.stdout)
        if self.args.sample_interval and epoch % self.args.sample_interval == 0:
            self.save_preview(epoch)
        if self.args.save_interval and epoch % self.args.save_interval == 0:
            self.save(f"checkpoints/model_epoch_{epoch:03d}.pt")
        write_json_lines(self.records, self.output_dir / "metrics.jsonl")
        self.closing = time.perf_counter() - start + 1.0  # and a second for the last checkpoint and the plot
        self.seconds += time.perf_counter() - start

    def time_left(self, speed: float) -> float:
        """Seconds to the end at `speed` images a second, with the validation and the samples that are to come."""
        in_time = self.args.budget - self.elapsed if self.args.budget else math.inf
        epochs = (self.total_steps - self.step) / self.steps_per_epoch
        return min(in_time, epochs * (self.steps_per_epoch * self.batch_size / speed + self.closing))

    def record(self, loss: float, speed: float, val_loss: float | None = None) -> None:
        """Add a line to metrics.jsonl."""
        self.records.append(dict(step=self.step, epoch=self.epoch, images_seen=self.step * self.batch_size, loss=loss,
                                 val_loss=val_loss, lr=self.optimizer.param_groups[0]["lr"],
                                 images_per_second=round(speed, 1), seconds=round(self.seconds, 3)))

    def save(self, name: str) -> Path:
        """Write a checkpoint and what it goes with."""
        config = dict(model=self.model.config, diffusion=self.diffusion.config,
                      data=dict(dataset=self.data.name, shape=list(self.shape),
                                class_names=list(self.data.class_names)),
                      training=vars(self.args))
        save_checkpoint(self.output_dir / name, config=config, model=self.model.state_dict(),
                        ema=self.ema.module.state_dict(), optimizer=self.optimizer.state_dict(), step=self.step,
                        epoch=self.epoch, images_seen=self.step * self.batch_size, seconds=self.seconds,
                        precision=self.precision, seed=self.args.seed)
        return self.output_dir / name

    def resume(self) -> None:
        """Take up the newest checkpoint in the output folder, if there is one."""
        path = newest_checkpoint(self.output_dir)
        if path is None:
            print(f"Nothing to resume in {self.output_dir}: starting afresh")
            return
        saved = load_checkpoint(path)
        for part, mine in (("model", self.model.config), ("diffusion", self.diffusion.config)):
            for name, value in mine.items():
                if saved["config"][part].get(name) != value:
                    raise ValueError(f"{path} was trained with {name} {saved['config'][part].get(name)}, not {value}: "
                                     f"give the flags of that run, or another --output_dir")
        self.model.load_state_dict(saved["model"])
        self.ema.module.load_state_dict(saved["ema"])
        self.ema.n_averaged.fill_(saved["step"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds, self.precision = saved["step"], saved["seconds"], saved["precision"]
        self.records = [r for r in read_records(self.output_dir) if r["step"] <= self.step]
        print(f"Resuming {path} after {self.step} steps")


def read_records(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl, none where there is no such file."""
    import json

    path = output_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(run: Run) -> None:
    """The loop: steps, and after each epoch validation, a line in the log, samples and checkpoints."""
    bar = tqdm(total=100, unit="%", dynamic_ncols=True, bar_format="{percentage:3.0f}%|{bar}| [{elapsed}{postfix}]")
    while run.progress < 1:
        start, losses = time.perf_counter(), []
        for _ in range(min(LOG_STEPS, run.steps_per_epoch - run.step % run.steps_per_epoch)):
            losses.append(run.train_step())
            if run.progress >= 1:
                break
        loss = torch.stack(losses).mean().item()  # the device is waited for only here
        seconds = time.perf_counter() - start
        speed = len(losses) * run.batch_size / seconds
        run.seconds += seconds
        if run.step % run.steps_per_epoch and run.progress < 1:
            run.record(loss, speed)
        else:
            run.end_epoch(loss, speed)
        bar.update(round(100 * run.progress) - bar.n)
        bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s, {tqdm.format_interval(run.time_left(speed))} left")
    bar.close()


@script
def main(argv=None):
    run = Run(parse_args(argv), startup=time.process_time() if argv is None else 0.0)
    print(f"Using device: {run.device}")
    print(f"{run.data.name}: {len(run.data.images):,} images; network of {count_parameters(run.model):,} parameters; "
          f"{run.precision}", flush=True)
    if run.args.resume:
        run.resume()
    train(run)
    path = run.save("model_final.pt")
    plot_losses(run.records, run.output_dir / "training_loss.png")
    print(f"Saved {path}: python sample.py --checkpoint {path}")


if __name__ == "__main__":
    sys.exit(main())
