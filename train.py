"""Learn to make images like those of a data set.

    python train.py --epochs 20
    python train.py --budget 10m
    python train.py --dataset fashion_mnist --schedule linear --prediction eps --output_dir outputs/fashion
    torchrun --nproc_per_node=2 train.py --epochs 20

Writes to --output_dir: samples/epoch_001.png ..., checkpoints/model_epoch_005.pt ..., model_final.pt,
training_loss.png and metrics.jsonl. An older run's results there move to previous/.
"""

import contextlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from checkpoint import save_checkpoint
from data import ImageData, load_dataset, to_model
from diffusion import DiffusionProcess
from models import create_model
from runtime import distributed
from runtime.cli import guidance, script
from runtime.errors import RunFailed, UserError
from runtime.memory import give_memory_back, out_of_memory
from samplers import DEFAULT_STEPS, final_image, generate
from training import autotune, run_folder
from training.flags import RECIPES, fill_in, make_parser, more_epochs, resume_command, saved_flags
from training.trainer import LOG_STEPS, LOSS_IMAGES, MAX_BAD_STEPS, Trainer, shown
from utils import autocast, count_parameters, get_device, plot_losses, save_images, set_seed, write_json_lines

AGREE_STEPS = 10
PREVIEW_IMAGES = 64
MODEL_FLAGS = ("base_channels", "time_emb_dim", "channel_mults", "depth", "middle_depth", "attention", "activation",
               "patch_size", "checkpointing", "learn_variance")
DIFFUSION_FLAGS = {"timesteps": "num_timesteps", "schedule": "schedule", "prediction": "prediction",
                   "timestep_sampling": "timestep_sampling", "noise_mean": "noise_mean",
                   "noise_std": "noise_std", "loss_weight": "loss_weight", "snr_gamma": "snr_gamma",
                   "zero_terminal_snr": "zero_terminal_snr"}
TRAINER_FLAGS = ("batch_size", "optimizer", "lr", "muon_lr", "lr_schedule", "warmup", "weight_decay", "max_grad_norm",
                 "ema_decay", "conditional", "label_dropout", "precision", "seed")
FIXED_FLAGS = ("train_images", "batch_size", "optimizer")  # what a resumed run cannot change, beside network and data


def parse_args(argv: Sequence[str] | None):
    """The flags and, with --resume, the checkpoint to go on from, whose flags are the defaults then."""
    parser, saved = make_parser(__doc__), None
    args = parser.parse_args(argv)
    if args.recipe != "fast":
        parser.set_defaults(**RECIPES[args.recipe])
        args = parser.parse_args(argv)
    if args.resume or distributed.restarts():
        distributed.start(get_device(distributed.local_device(args.device)))
        found = distributed.from_first(None if distributed.rank() else run_folder.newest_valid(Path(args.output_dir)))
        if found:
            path, saved = found
            if saved["config"]["training"].get("student"):
                raise UserError(f"{path} is a student of distill.py, which cannot be resumed: choose another "
                                 f"--output_dir")
            asked = sys.argv[1:] if argv is None else argv
            args = parser.parse_args([*saved_flags(parser, args, path, saved), *asked])
            print(f"Resuming {path} after {saved['step']:,} steps")
        else:
            print(f"Nothing to resume in {args.output_dir}: starting afresh")
    if args.epochs is None and args.budget is None:
        args.epochs = 20
    return args, saved


class Run:
    """A training run: a trainer, the time that it has, and the folder that it writes to."""

    def __init__(self, args, saved: dict | None, startup: float):
        self.args, self.folder, self.clock = args, Path(args.output_dir), time.perf_counter() - startup
        device = get_device(distributed.local_device(args.device))
        autotune.prepare(device)
        fill_in(args, device)
        with distributed.first_alone():
            data = load_dataset(args.dataset, "train", args.data_dir).first(args.train_images or sys.maxsize)
        self.validation = load_dataset(args.dataset, "validation", args.data_dir)
        self.shape = tuple(data.images.shape[1:])
        self.config = dict(
            model=dict({name: getattr(args, name) for name in MODEL_FLAGS}, image_channels=self.shape[0],
                       attention=args.attention and [factor for factor in args.attention if factor],
                       num_classes=len(data.class_names) if args.conditional else None),
            diffusion=dict({ours: getattr(args, flag) for flag, ours in DIFFUSION_FLAGS.items()},
                           data_std=saved["config"]["diffusion"]["data_std"] if saved else
                           round(to_model(data.images[:10_000]).std().item(), 3)),
            data=dict(dataset=data.name, shape=list(self.shape), class_names=list(data.class_names)),
            training=vars(args))
        set_seed(args.seed)
        model, diffusion = create_model(**self.config["model"]), DiffusionProcess(**self.config["diffusion"])
        self.config |= dict(model=model.config, diffusion=diffusion.config)
        model(torch.zeros(1, *self.shape), torch.zeros(1))  # a size that does not fit is told before any work
        self.trainer = self.make_trainer(data.to(device), model.to(device), diffusion.to(device))
        self.total_steps = args.epochs * self.trainer.steps_per_epoch if args.epochs else math.inf
        self.records, self.losses, self.earlier = [], [], 0.0  # earlier: seconds of the sittings before this one
        self.closing, self.measured = 3.0, False  # seconds that the end of the run will take
        self.reported = 0  # skipped steps that the user knows of
        self.progress, self.agreed_time, self.last_save = 0.0, 0.0, time.perf_counter()
        self.complete = None  # a line about a run that has nothing left to do
        self.signal = self.stopped = None  # the signal that arrived, and the one that all processes stop for
        if saved:
            self.restore(saved)
        give_memory_back()

    def make_trainer(self, data: ImageData, model: nn.Module, diffusion: DiffusionProcess) -> Trainer:
        """The trainer, with what the flags leave to be measured measured, and noted in `args`."""
        args, device, measure = self.args, data.images.device, self.args.batch_size == "auto"
        args.batch_size = RECIPES[args.recipe]["batch_size"] if measure else args.batch_size
        size = min(args.batch_size, len(data.images))
        seconds = autotune.seconds_for_trials(args.epochs * len(data.images) // size if args.epochs else math.inf,
                                            args.budget)
        args.precision, args.layout = autotune.choose(args.precision, args.layout, model, diffusion, data,
                                                    args.conditional, -(-size // distributed.size()), seconds)
        recorded = device.type == "cuda" and distributed.size() == 1 and args.compile is not False
        trainer = Trainer(data, model.to(memory_format=autotune.LAYOUTS[args.layout]), diffusion, recorded=recorded,
                          **{name: getattr(args, name) for name in TRAINER_FLAGS})
        if measure:
            trainer.batch_size = args.batch_size = trainer.fitting_batch(trainer.batch_size)
            print(f"A batch of {args.batch_size} images fits in memory")
        if args.compile or (args.compile is None and autotune.worth_compiling(args.budget, device)):
            trainer.compile(insist=bool(args.compile))
        return trainer

    def restore(self, saved: dict) -> None:
        """Take up a checkpoint. UserError if it is of another network, process or data set than the flags ask for."""
        asked = self.config | dict(training={name: getattr(self.args, name) for name in FIXED_FLAGS})
        for part, values in asked.items():
            for name, value in sorted(values.items(), key=lambda item: item[0] in ("channel_mults", "attention")):
                before = saved["config"][part].get(name, False)  # what the file does not know was off
                if before != value:
                    raise UserError(f"the checkpoint was trained with {name} {before}, the flags ask for {value}: "
                                     f"go on as it was with {resume_command(self.args)}, or start afresh without "
                                     f"--resume")
        self.complete = self.said_if_complete(saved)
        self.trainer.restore(saved)
        self.earlier = saved["seconds"]
        self.records = saved["history"].get("records", [])
        self.losses = [torch.tensor(loss, device=self.trainer.device) for loss in saved["history"].get("losses", [])]

    def said_if_complete(self, saved: dict) -> str | None:
        """What to type to go on, if --resume finds a run that is complete and asks for no more than it had."""
        args, seconds = self.args, saved["seconds"] + self.seconds
        over = saved["epoch"] >= (args.epochs or math.inf) or seconds >= (args.budget or math.inf) - self.closing
        if args.resume and distributed.from_first(over and run_folder.is_complete(self.folder)):
            return (f"The run in {self.folder} is complete already, with {saved['epoch']:,} epochs in "
                    f"{saved['seconds']:.0f} seconds: go on with {resume_command(args)} --epochs "
                    f"{more_epochs(saved['epoch'])}, or with a --budget well beyond these seconds, which it includes")
        return None

    # ------------------------------------------------------------------------------------------------- the time

    @property
    def seconds(self) -> float:
        """Since the start of the run, its earlier sittings included."""
        return self.earlier + time.perf_counter() - self.clock

    def goes_on(self) -> bool:
        """Update `progress`, how much is done (0..1) of the steps or of the time, whichever is further: is there more?

        Several processes agree about the time and about a signal to stop, whichever of them has got it, every
        AGREE_STEPS steps.
        """
        in_time = self.seconds / max(1e-9, self.args.budget - self.closing) if self.args.budget else 0.0
        self.progress = min(1.0, max(self.trainer.step / self.total_steps, in_time))
        if distributed.size() == 1:
            self.stopped = self.signal
        elif self.trainer.step % AGREE_STEPS == 0:
            mine = torch.tensor([in_time, self.signal or 0], device=self.trainer.device)
            self.agreed_time, stop = distributed.largest(mine).tolist()
            self.stopped = int(stop)
        if distributed.size() > 1:
            self.progress = min(1.0, max(self.trainer.step / self.total_steps, self.agreed_time))
        return self.progress < 1 and not self.stopped

    def expect_closing(self, speed: float) -> None:
        """Until the first epoch has ended, guess `closing` from the speed of training, a third of that of looking."""
        if not self.measured:
            looks = 2 if self.trainer.conditional else 1  # guidance looks with the label and without
            self.closing = 1.5 + (LOSS_IMAGES + PREVIEW_IMAGES * DEFAULT_STEPS * looks) / (3 * speed)

    def time_left(self, speed: float) -> float:
        """Seconds to the end at `speed` images a second, with the validation and the samples that are to come."""
        in_time = self.args.budget - self.seconds if self.args.budget else math.inf
        epochs = (self.total_steps - self.trainer.step) / self.trainer.steps_per_epoch
        return max(0, min(in_time, epochs * (len(self.trainer.data.images) / speed + self.closing)))

    # -------------------------------------------------------------------------------------------- what it writes

    def record(self, speed: float, val_loss: float | None = None) -> None:
        """Add a line to metrics.jsonl for the steps since the last."""
        self.records.append(self.trainer.record(self.losses, speed, self.seconds, val_loss))
        self.losses = []

    def end_epoch(self, speed: float) -> None:
        """Validate, log, and write what the number of the epoch that ended here calls for."""
        start, trainer = time.perf_counter(), self.trainer
        give_memory_back()
        val_loss = trainer.validation_loss(self.validation)
        self.record(speed, val_loss)
        epoch = -(-trainer.step // trainer.steps_per_epoch)  # one that a budget cut short counts
        own = [r for r in self.records if r["step"] > (epoch - 1) * trainer.steps_per_epoch]
        before = self.records[-len(own) - 1]["seconds"] if len(own) < len(self.records) else 0.0
        losses = [r["loss"] for r in own if r["loss"] is not None] or [math.nan]
        tqdm.write(f"epoch {epoch}: loss {sum(losses) / len(losses):.5f}, val_loss {val_loss:.5f}, "
                   f"{self.records[-1]['seconds'] - before:.1f} s", file=sys.stdout)
        if self.args.sample_interval and epoch % self.args.sample_interval == 0:
            self.save_preview(epoch)
        if self.args.save_interval and epoch % self.args.save_interval == 0:
            self.save_if_possible(f"checkpoints/model_epoch_{epoch:03d}.pt")
        elif distributed.rank() == 0:
            with going_on():
                write_json_lines(self.records, self.folder / "metrics.jsonl")
        self.closing, self.measured = time.perf_counter() - start + 1.5, True  # with the last checkpoint and the plot

    def save_preview(self, epoch: int) -> None:
        """Write the grid of images that sample.py would make, from the same starting noise in every epoch."""
        trainer, indices = self.trainer, range(PREVIEW_IMAGES)[distributed.share(PREVIEW_IMAGES)]
        labels = torch.arange(PREVIEW_IMAGES) % len(trainer.data.class_names) if trainer.conditional else None
        with autocast(trainer.device, trainer.precision):
            images = [final_image(trajectory) for _, trajectory in generate(
                trainer.ema, trainer.diffusion, self.shape, indices, seed=trainer.seed, labels=labels,
                guidance_scale=guidance(None, labels), steps=min(DEFAULT_STEPS, trainer.diffusion.num_timesteps))]
        images = distributed.gather(torch.cat(images) if images else torch.empty(0, *self.shape))
        if distributed.rank() == 0:
            with going_on():
                save_images(images, self.folder / f"samples/epoch_{epoch:03d}.png")

    def save(self, name: str) -> Path:
        """Write a checkpoint and metrics.jsonl, and delete the checkpoints that are too many."""
        self.last_save = time.perf_counter()
        if not self.trainer.is_finite():
            raise RunFailed(f"the weights are not finite after step {self.trainer.step}; {self.remedy()}")
        if distributed.rank() == 0:
            history = dict(records=self.records, losses=[loss.item() for loss in self.losses],
                           skipped=self.trainer.skipped.tolist())
            save_checkpoint(self.folder / name, config=self.config, seconds=self.seconds, history=history,
                            **self.trainer.state())
            run_folder.prune(self.folder, self.args.keep_checkpoints)
            write_json_lines(self.records, self.folder / "metrics.jsonl")
        return self.folder / name

    def save_if_possible(self, name: str) -> None:
        """As `save`; where it fails, on a full disk for instance, the run goes on and tries again later."""
        with going_on():
            self.save(name)

    def remedy(self) -> str:
        """What to do about numbers that are none."""
        return (f"the likely cause is too high a learning rate. The last good checkpoint stays: go on from it with "
                f"{resume_command(self.args)} and --lr {self.args.lr / 4:g} --muon_lr {self.args.muon_lr / 4:g}, "
                f"--max_grad_norm 0.5 or --precision fp32")

    def check_gradients(self) -> None:
        """Stop a run whose gradients are no numbers any more. RunFailed with what to try."""
        skipped, in_a_row = self.trainer.skipped.tolist()
        if in_a_row >= MAX_BAD_STEPS:
            raise RunFailed(
                f"the loss or its gradient was not finite in {in_a_row:.0f} steps in a row, up to step "
                f"{self.trainer.step}; {self.remedy()}")
        if skipped > self.reported:
            self.reported = skipped
            tqdm.write(f"Warning: {skipped:.0f} steps so far had no finite gradient and were skipped", file=sys.stderr)


@contextlib.contextmanager
def going_on():
    """Let a run go on where a file cannot be written: there may be room for the next."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            tqdm.write(f"Warning: a file could not be written ({error}); the run goes on", file=sys.stderr)


def train(run: Run) -> None:
    """The loop: steps, a line in the log every LOG_STEPS, and after each epoch validation, samples, checkpoints."""
    trainer, since, first = run.trainer, time.perf_counter(), run.trainer.step
    with tqdm(total=100, unit="%", dynamic_ncols=True, disable=distributed.rank() > 0,
              bar_format="{percentage:3.0f}%|{bar}| [{elapsed}{postfix}]") as bar:
        while run.goes_on():
            run.losses.append(trainer.train_step(run.progress))
            in_epoch = trainer.step % trainer.steps_per_epoch
            if in_epoch % LOG_STEPS == 0:
                speed = (trainer.step - first) * trainer.batch_size / (autotune.now(trainer.device) - since)
                run.expect_closing(speed)
                if in_epoch:
                    run.record(speed)
                else:
                    run.end_epoch(speed)
                run.check_gradients()
                since, first = time.perf_counter(), trainer.step
                bar.update(round(100 * run.progress) - bar.n)
                left = tqdm.format_interval(run.time_left(speed))
                bar.set_postfix_str(f"{shown(run.records[-1])}, {left} left")
            if run.args.checkpoint_minutes and time.perf_counter() - run.last_save > 60 * run.args.checkpoint_minutes:
                run.save_if_possible(f"checkpoints/model_step_{trainer.step:08d}.pt")
        bar.update(0 if run.stopped else 100 - bar.n)
    if run.losses and not run.stopped:  # the time was over within an epoch
        run.end_epoch((trainer.step - first) * trainer.batch_size / (autotune.now(trainer.device) - since))
        run.check_gradients()


def train_or_explain(run: Run) -> None:
    """`train`; RunFailed with what to do where the memory is too small or another process has ended."""
    try:
        return train(run)
    except OSError:  # the terminal, or what reads the output, is gone
        run.save_if_possible(f"checkpoints/model_step_{run.trainer.step:08d}.pt")
        raise
    except (RuntimeError, MemoryError) as error:
        if distributed.lost(error):
            raise RunFailed(f"another process of this run has ended: go on with {resume_command(run.args)}") from error
        if not out_of_memory(error):
            raise
    size = run.trainer.batch_size  # measured out here, where what the error held is free again
    fits = run.trainer.fitting_batch(size // 2, agree=False)
    raise RunFailed(f"out of memory in a step of {size} images: a batch of {fits} fits (measured): give it with "
                    f"--batch_size, or let --batch_size auto find it")


@script
def main(argv=None):
    args, saved = parse_args(argv)
    distributed.start(get_device(distributed.local_device(args.device)))
    startup = time.process_time() if argv is None else 0.0
    with run_folder.claim(args.output_dir) as folder, run_folder.stop_on_signals(Run(args, saved, startup)) as run:
        trainer = run.trainer
        if run.complete:
            return print(run.complete)
        if distributed.rank() == 0:
            run_folder.check_space(folder, trainer.checkpoint_bytes)
        print(f"Using device: {trainer.device}")
        print(f"{trainer.data.name}: {len(trainer.data.images):,} images; network of "
              f"{count_parameters(trainer.model):,} parameters; {trainer.precision}", flush=True)
        run.goes_on()
        if run.progress == 1 and not trainer.step:
            raise UserError(f"the {args.budget:g} s of --budget were over before the first step: give it more, "
                             f"such as --budget {math.ceil(run.seconds + run.closing + 10)}s")
        place = None if saved or distributed.rank() else run_folder.set_aside(folder)
        if place:
            print(f"Moved the results of an older run to {place}")
        train_or_explain(run)
        if run.stopped:
            path = run.save(f"checkpoints/model_step_{trainer.step:08d}.pt")
            distributed.from_first(None)  # all wait for the file: torchrun ends the others as soon as one has ended
            print(f"Stopped by a signal after {trainer.step:,} steps; saved {path}: go on with "
                  f"{resume_command(args)}")
            return 128 + run.stopped
        path = run.save("model_final.pt")
        if distributed.rank() == 0:
            plot_losses(run.records, folder / "training_loss.png")
        print(f"Saved {path}: python sample.py --checkpoint {path}")
    distributed.finish()


if __name__ == "__main__":
    sys.exit(main())
