"""Teach a student to make in one to four evaluations the images that its teacher, a checkpoint, makes in ten or more.

    python distill.py --checkpoint outputs/model_final.pt
    python distill.py --checkpoint outputs/model_final.pt --budget 10m --guidance_scale 2 --output_dir outputs/guided

Consistency distillation (Song et al. 2023): where the teacher walks down its path to an image, the student learns to
jump. It is a checkpoint like any other. Writes to --output_dir: model_final.pt, metrics.jsonl, and samples.png, two
rows for each of 1, 2 and 4 evaluations. An older run's results there move to previous/. Ctrl-C and SIGTERM save what
there is to checkpoints/; a run cannot be resumed. A teacher that predicts eps says nothing about the image where there
is nothing but noise, and nor does its student: for so few evaluations it should have learned edm, v or x0.
"""

import copy
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from checkpoint import load_model, misfit, save_checkpoint
from data import load_dataset
from diffusion import Denoise, DiffusionProcess
from runtime.cli import SHARED_FLAGS, Parser, add_shared_flags, duration, guidance, is_student, number, script
from runtime.errors import RunFailed, UserError
from samplers import DEFAULT_GUIDANCE, STUDENT_SAMPLER, ddim_step, final_image, generate, guide, spaced_timesteps
from training import autotune, run_folder
from training.trainer import LOG_STEPS, MAX_BAD_STEPS, Trainer, shown
from utils import autocast, count_parameters, get_device, save_images, write_json_lines

HUBER = 0.03  # root mean square errors above it count by their size, below it by their square
CLOSING = 1.5  # seconds that the end of a run takes, its sampling apart
SAMPLE_STEPS, SAMPLE_IMAGES, SAMPLE_COLUMNS = (1, 2, 4), 20, 10


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("run")
    group.add_argument("--checkpoint", required=True, help="the teacher: a file that train.py wrote")
    group.add_argument("--budget", type=duration, default="5m", metavar="TIME",
                       help="wall-clock time for everything, start-up and saving included: 90s, 10m, 1.5h")
    add_shared_flags(group, "data_dir", "output_dir", "device", "precision", "seed")
    group = parser.add_argument_group("what the student learns")
    group.add_argument("--teacher_steps", type=number(int, 2), default=20, metavar="N",
                       help="steps of the teacher's path, at most the checkpoint's T")
    group.add_argument("--teacher_order", type=int, choices=(1, 2), default=2,
                       help="of its steps: 1 is ddim, 2 looks twice and goes nearer to the true path")
    group.add_argument("--guidance_scale", **SHARED_FLAGS["guidance_scale"] | dict(
        help="of the teacher: the student makes guided images in one evaluation, with --guidance_scale 1 for itself "
             f"(default: {DEFAULT_GUIDANCE} where there are labels)"))
    group = parser.add_argument_group("optimiser")
    group.add_argument("--batch_size", type=number(int, 1), default=128, help="images in a step")
    group.add_argument("--lr", type=number(float, 0), default=5e-4, help="peak learning rate of adamw")
    group.add_argument("--muon_lr", type=number(float, 0), default=0.005, help="peak learning rate of muon")
    parser.set_defaults(output_dir="outputs/student")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------- the mathematics


class Consistency(DiffusionProcess):
    """A process whose loss teaches a network to jump to the end of the teacher's path.

    The probability-flow ODE leads each x_t to one image, f(x_t, t), and so it does every other x_s of the same path:
    f(x_t, t) = f(x_s, s). The student is to be such an f. From x_t the teacher goes one step down, to the next of
    `steps` times that are spread as a sampler's, and the image that the student sees from there is what it has to see
    from x_t (Song et al. 2023, algorithm 2). At the end of the path the image is the teacher's own x_0_hat, and from
    there the truth spreads to ever noisier times.

    process         that of the teacher
    teacher         the teacher's network; with labels it is asked with `guidance_scale`
    order           of the teacher's steps: 1 (ddim), or 2 (DPM-Solver++ (2S) with r = 1: Lu et al. 2022, algorithm 1)
    """

    def __init__(self, process: DiffusionProcess, teacher, steps: int, guidance_scale: float = 1.0, order: int = 2):
        super().__init__(**process.config)
        self.to(process.device)
        self.teacher, self.guidance_scale, self.order = teacher, guidance_scale, order
        path = spaced_timesteps(process, steps, "karras")
        self.times = torch.tensor([-1.0, *reversed(path)], device=process.device)           # (steps + 1,)

    def sample_timesteps(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw real times (B,) in 0..T-1: one in each of B equal parts of the path, whose steps are all as likely."""
        u = torch.rand(batch_size, generator=generator, device=self.device)
        place = (torch.arange(batch_size, device=self.device) + u) / batch_size * (len(self.times) - 1)
        step = place.long().clamp(max=len(self.times) - 2)
        return torch.lerp(self.times[step].clamp(min=0), self.times[step + 1], place - step)

    def next_time(self, t: Tensor) -> Tensor:
        """The time s < t at which the teacher's step from t (B,) ends: (B,); -1 at the end of the path."""
        return self.times[torch.searchsorted(self.times, t) - 1]

    def teach(self, labels: Tensor | None) -> Denoise:
        """The teacher's denoise(x_t, t) -> x_0_hat."""
        if labels is None:
            return self.denoiser(self.teacher)
        return guide(self, self.teacher, labels, self.guidance_scale)

    @torch.no_grad()
    def image(self, model, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The image (B, C, H, W) that `model` should see in x_t: what it sees in the teacher's x_s, without gradient.

        x_s = sigma_s / sigma_t · x_t + (alpha_s - sigma_s / sigma_t · alpha_t) · D with D = x_0_hat of the teacher at t
        or, at order 2, the mean of that and of its x_0_hat at the x_s which that leads to. At s = -1 the image is
        x_0_hat. The model is asked as it is, not an average of its weights (Song and Dhariwal 2024, section 3.2).
        """
        teach, s = self.teach(labels), self.next_time(t)
        end, s_or_0 = (s < 0).view(-1, 1, 1, 1), s.clamp(min=0)  # no network knows the time -1
        x_0_hat = teach(x_t, t)
        x_s = ddim_step(x_t, x_0_hat, t, s, self)
        if self.order == 2:
            x_s = ddim_step(x_t, (x_0_hat + teach(x_s, s_or_0)) / 2, t, s, self)
        return torch.where(end, x_0_hat, self.denoiser(model, labels)(x_s, s_or_0))

    def loss(self, model, x_0: Tensor, t: Tensor | None = None, noise: Tensor | None = None,
             labels: Tensor | None = None, reduction: str = "mean", hybrid: bool = True) -> Tensor:
        """sqrt(e² + c²) - c with e² = |network(x_t, t) - target|² and c = HUBER, as `DiffusionProcess.loss` otherwise.

        The target is the ordinary one, a · x_0 + b · noise, but with the `image` that the model should see in x_t for
        x_0, and for noise what x_t holds beside it. Pseudo-Huber: Song and Dhariwal 2024, section 3.3. hybrid is not
        used: learned variances stay as the teacher's.
        """
        t = (self.sample_timesteps(len(x_0)) if t is None else t).float()
        x_t, _ = self.forward_diffusion(x_0, t, noise)
        output = self.predict(model, x_t, t, labels)  # before `image`: autocast keeps the first cast of the weights
        image = self.image(model, x_t, t, labels)
        target = self.target(image, (x_t - self.alpha(t) * image) / self.sigma(t), t)
        squares = F.mse_loss(output, target, reduction="none").flatten(1).mean(1)
        error = (squares + HUBER**2).sqrt() - HUBER
        return error.mean() if reduction == "mean" else error


# --------------------------------------------------------------------------------------------------------- the run


class Run:
    """A distillation: a trainer, the time that it has, and the folder that it writes to."""

    def __init__(self, args, startup: float):
        self.args, self.folder, self.clock = args, Path(args.output_dir), time.perf_counter() - startup
        device = get_device(args.device)
        autotune.prepare(device)
        teacher, process, checkpoint = load_model(args.checkpoint, device)
        self.check(teacher, process, checkpoint)
        args.guidance_scale = guidance(args.guidance_scale, teacher.num_classes)
        data = load_dataset(checkpoint["config"]["data"]["dataset"], "train", args.data_dir)
        self.shape = tuple(data.images.shape[1:])
        if wrong := misfit(checkpoint["config"], data):
            raise UserError(f"{wrong}: give the --data_dir that it was trained on")
        self.trainer = self.make_trainer(teacher, process, data.to(device))
        self.config = dict(model=teacher.config, diffusion=process.config,
                           data=checkpoint["config"]["data"],
                           training=dict(vars(args), student=True, teacher_images_seen=checkpoint["images_seen"]))
        self.records, self.losses, self.signal = [], [], None
        self.closing = CLOSING
        self.last = 0, time.perf_counter()  # the step and the moment of the last record

    def check(self, teacher, process: DiffusionProcess, checkpoint: dict) -> None:
        """UserError, with what to do, where the flags do not go with the teacher."""
        args = self.args
        if is_student(checkpoint):
            raise UserError(f"{args.checkpoint} is a student, whose x_0_hat is no mean to learn from: give its "
                             f"teacher with --checkpoint")
        if args.teacher_steps > process.num_timesteps:
            raise UserError(f"--teacher_steps must lie in 2..{process.num_timesteps} (the checkpoint's number of "
                             f"timesteps), not {args.teacher_steps}")
        if args.guidance_scale not in (None, 1) and not teacher.num_classes:
            raise UserError("this checkpoint was trained without labels: leave --guidance_scale out, or train one "
                             "with python train.py --conditional")
        if Path(args.checkpoint).resolve() in (path.resolve() for path in run_folder.results(self.folder)):
            raise UserError(f"{args.output_dir} holds the teacher, which a new run there would move away: choose "
                             f"another --output_dir")

    def make_trainer(self, teacher, process: DiffusionProcess, data) -> Trainer:
        """The trainer of a student that is still a copy of the teacher; an open precision is measured."""
        args, student = self.args, copy.deepcopy(teacher).requires_grad_(True)
        consistency = Consistency(process, teacher, args.teacher_steps, args.guidance_scale, args.teacher_order)
        conditional, count = bool(teacher.num_classes), min(args.batch_size, len(data.images))
        args.precision, layout = autotune.choose(args.precision, None, student, consistency, data, conditional, count,
                                               autotune.seconds_for_trials(math.inf, args.budget))
        for network in (teacher, student):
            network.to(memory_format=autotune.LAYOUTS[layout])
        return Trainer(data, student, consistency, batch_size=count, lr=args.lr, muon_lr=args.muon_lr,
                       conditional=conditional, label_dropout=0.0, precision=args.precision, seed=args.seed,
                       recorded=data.images.device.type == "cuda")

    @property
    def seconds(self) -> float:
        """Since the start of the run."""
        return time.perf_counter() - self.clock

    @property
    def progress(self) -> float:
        """How much is done (0..1) of the time for learning."""
        return min(1.0, self.seconds / max(1e-9, self.args.budget - self.closing))

    def record(self) -> str:
        """Add a line to the records for the steps since the last, and say how it goes. RunFailed if it goes wrong."""
        trainer, (step, since), self.last = self.trainer, self.last, (self.trainer.step, time.perf_counter())
        speed = (trainer.step - step) * trainer.batch_size / (time.perf_counter() - since)
        self.closing = CLOSING + SAMPLE_IMAGES * sum(SAMPLE_STEPS) / speed
        self.records.append(trainer.record(self.losses, speed, self.seconds))
        self.losses = []
        if trainer.skipped[1] >= MAX_BAD_STEPS:
            raise RunFailed(f"the loss or its gradient was not finite in {trainer.skipped[1]:.0f} steps in a row: try "
                            f"--lr {self.args.lr / 4:g} --muon_lr {self.args.muon_lr / 4:g}, or --precision fp32")
        return shown(self.records[-1])

    def save(self, name: str) -> Path:
        """Write a checkpoint and metrics.jsonl."""
        if self.losses:
            self.record()
        if not self.trainer.is_finite():
            raise RunFailed(f"the weights are not finite after step {self.trainer.step}: try --lr "
                            f"{self.args.lr / 4:g} --muon_lr {self.args.muon_lr / 4:g}")
        history = dict(records=self.records, losses=[], skipped=self.trainer.skipped.tolist())
        save_checkpoint(self.folder / name, config=self.config, seconds=self.seconds, history=history,
                        **self.trainer.state())
        write_json_lines(self.records, self.folder / "metrics.jsonl")
        return self.folder / name

    def save_samples(self) -> None:
        """Write samples.png: the same starting noise in 1, 2 and 4 steps, each class in a column of its own."""
        trainer, blocks = self.trainer, []
        labels = torch.arange(SAMPLE_IMAGES) % len(trainer.data.class_names) if trainer.conditional else None
        for steps in SAMPLE_STEPS:
            with autocast(trainer.device, trainer.precision):
                blocks += [final_image(trajectory).cpu() for _, trajectory in generate(
                    trainer.ema, trainer.diffusion, self.shape, range(SAMPLE_IMAGES), seed=trainer.seed,
                    sampler=STUDENT_SAMPLER, steps=min(steps, trainer.diffusion.num_timesteps), labels=labels)]
        save_images(torch.cat(blocks), self.folder / "samples.png", columns=SAMPLE_COLUMNS)


def distill(run: Run) -> None:
    """The loop: steps until the time is over or a signal arrives, and a record every LOG_STEPS."""
    with tqdm(total=100, unit="%", dynamic_ncols=True,
              bar_format="{percentage:3.0f}%|{bar}| [{elapsed}{postfix}]") as bar:
        while (progress := run.progress) < 1 and not run.signal:
            run.losses.append(run.trainer.train_step(progress))
            if run.trainer.step % LOG_STEPS == 0:
                bar.set_postfix_str(run.record())
                bar.update(round(100 * progress) - bar.n)
        bar.update(0 if run.signal else 100 - bar.n)
    if not run.trainer.step and not run.signal:
        raise RunFailed(f"the {run.args.budget:g} s of --budget were over before the first step: give it more")


@script
def main(argv=None):
    args, startup = parse_args(argv), time.process_time() if argv is None else 0.0
    with run_folder.claim(args.output_dir) as folder, run_folder.stop_on_signals(Run(args, startup)) as run:
        trainer = run.trainer
        run_folder.check_space(folder, trainer.checkpoint_bytes)
        print(f"Using device: {trainer.device}")
        print(f"{trainer.data.name}: {len(trainer.data.images):,} images; a student of "
              f"{count_parameters(trainer.model):,} parameters; {trainer.precision}", flush=True)
        place = run_folder.set_aside(folder)
        if place:
            print(f"Moved the results of an older run to {place}")
        partial = "checkpoints/model_step_{:08d}.pt"
        try:
            distill(run)
        except OSError:  # the terminal, or what reads the output, is gone
            run.save(partial.format(trainer.step))
            raise
        if run.signal:
            path = run.save(partial.format(trainer.step))
            print(f"Stopped by a signal after {trainer.step:,} steps; saved {path}")
            return 128 + run.signal
        path = run.save("model_final.pt")
        run.save_samples()
        print(f"Saved {path}: python sample.py --checkpoint {path}")


if __name__ == "__main__":
    sys.exit(main())
