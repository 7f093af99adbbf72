"""Train a student that makes images in one to four network evaluations; its teacher, a checkpoint, needs ten or more.

    python distill.py
    python distill.py --checkpoint outputs/model_final.pt --budget 10m --guidance_scale 2 --output_dir outputs/guided

Consistency distillation (Song et al. 2023): the teacher goes to an image in many small steps, the student learns to
jump there. The student is a checkpoint like any other. Writes to --output_dir: model_final.pt, run.json,
metrics.jsonl, and samples.png, two rows for each of 1, 2 and 4 evaluations. Results of an older run there are moved to
previous/. Ctrl-C and SIGTERM save a checkpoint to checkpoints/; a distillation cannot be resumed. The teacher should
predict edm, v or x0: one that predicts eps knows nothing about the image at the noisiest time, where the student
begins.
"""

import copy
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoint import check_same_data, load_model, training_flag
from data import ImageData, code_of, load_dataset
from diffusion import Denoise, DiffusionProcess, reduce_loss
from runtime import distributed, threads
from runtime.checkpoints import with_checkpoint
from runtime.errors import UserError
from runtime.files import check_inputs_stay, quoted
from runtime.parser import GUIDANCE_DEFAULTS, PRETRAINED_NAMES, SHARED_FLAGS, Parser, add_shared_flags, duration, number
from runtime.sampling import dataset_of, is_student, place_of_pictures, sampling_options
from runtime.script import script
from runtime.startup import seconds_since_start
from samplers import all_images, ddim_step, guide, spaced_timesteps
from training import autotune, run_folder, run_record
from training.budget import Budget
from training.run import CLOSING_SECONDS, LOG_STEPS, Run, print_summary, progress_bar
from training.setup import check_gpu_memory, time_reading
from training.trainer import Trainer, memory_advice, repeats_of
from utils import autocast, get_device, save_images

HUBER = 0.03  # the Huber constant c: errors above it count by their size, those below it by their square
SAMPLE_STEPS, SAMPLE_IMAGES, SAMPLE_COLUMNS = (1, 2, 4), 20, 10
TEACHER_STEPS = 20  # the default, or the teacher's T where that is less


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("run")
    group.add_argument("--checkpoint", help="the teacher: a file of train.py, or a pretrained model by its name: "
                                            f"{PRETRAINED_NAMES} (default: the newest model_final.pt of train.py below "
                                            "outputs/, else mnist)")
    group.add_argument("--budget", type=duration, default="5m", metavar="TIME",
                       help="the wall-clock time for everything, including start-up and saving, but not the reading "
                            "of your own pictures: 90s, 10m, 1.5h")
    add_shared_flags(group, "data_dir", "output_dir", "device", "precision", "threads", "seed")
    group = parser.add_argument_group("what the student learns")
    group.add_argument("--teacher_steps", type=number(int, 2), metavar="N",
                       help=f"the number of steps of the teacher's path, at most the checkpoint's T (default: "
                            f"{TEACHER_STEPS}, or T where that is less)")
    group.add_argument("--teacher_order", type=int, choices=(1, 2), default=2,
                       help="the order of the teacher's steps: 1 is ddim; 2 evaluates it twice and is more exact")
    group.add_argument("--guidance_scale", **SHARED_FLAGS["guidance_scale"] | dict(
        help="the strength of the teacher's guidance; the student then makes guided images with one evaluation a step "
             f"(default: {GUIDANCE_DEFAULTS}, where there are labels)"))
    group = parser.add_argument_group("optimiser")
    group.add_argument("--batch_size", type=number(int, 1), default=128, help="the number of images in a step")
    group.add_argument("--lr", type=number(float, 0), default=5e-4, help="the peak learning rate of AdamW")
    group.add_argument("--muon_lr", type=number(float, 0), default=0.005, help="the peak learning rate of Muon")
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
             labels: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """sqrt(e² + c²) - c, e² = |network(x_t, t) - target|², c = HUBER, as `DiffusionProcess.loss` without weights.

        The target is the ordinary one, a · x_0 + b · noise, but with the `image` that the model should see in x_t for
        x_0, and for noise what x_t holds beside it. Pseudo-Huber: Song and Dhariwal 2024, section 3.3. Learned
        variances stay as the teacher's.
        """
        t = (self.sample_timesteps(len(x_0)) if t is None else t).float()
        x_t, _ = self.forward_diffusion(x_0, t, noise)
        output = self.predict(model, x_t, t, labels)  # before `image`: autocast keeps the first cast of the weights
        image = self.image(model, x_t, t, labels)
        target = self.target(image, (x_t - self.alpha(t) * image) / self.sigma(t), t)
        squares = F.mse_loss(output, target, reduction="none").flatten(1).mean(1)
        error = (squares + HUBER**2).sqrt() - HUBER
        return reduce_loss(error, reduction)


# --------------------------------------------------------------------------------------------------------- the run


def distill(run: Run) -> None:
    """Train the student until the time or a signal ends the run."""
    trainer, tuner = run.trainer, threads.ThreadTuner()
    with progress_bar(run):
        while run.progress < 1 and not run.stopped:
            with tuner:
                x_0, labels = trainer.batch()                                               # (B, C, H, W), (B,)
                loss = trainer.train_step(x_0, labels, run.progress)                        # ()
            run.losses.append(loss)
            if trainer.step % LOG_STEPS == 0:
                run.record(run.speed())
            run.update()
    if run.losses:
        run.record(run.speed())


def save_samples(run: Run) -> None:
    """Write samples.png: images from the same starting noise in 1, 2 and 4 steps, one column for each class."""
    trainer, blocks = run.trainer, []
    for steps in SAMPLE_STEPS:
        steps = min(steps, trainer.diffusion.num_timesteps)
        flags = Namespace(seed=trainer.seed, steps=steps, batch_size=trainer.preview_batch(SAMPLE_IMAGES))
        options = sampling_options(run.config, flags, SAMPLE_IMAGES)
        with autocast(trainer.device, trainer.precision):
            blocks.append(all_images(trainer.ema, trainer.diffusion, run.config["data"]["shape"],
                                     range(SAMPLE_IMAGES), **options).cpu())
    save_images(trainer.data.code.decode(torch.cat(blocks)), run.folder / "samples.png", columns=SAMPLE_COLUMNS)


def make_run(args: Namespace, start: float) -> Run:
    """The run that the flags ask for. start: time.perf_counter() when it began."""
    device = get_device(args.device)
    autotune.set_up_cuda(device)
    threads.set_up(args.threads, device)
    teacher, process, checkpoint = load_model(args.checkpoint, device)
    check_teacher(args, process, checkpoint)
    guidance_scale = sampling_options(checkpoint["config"], Namespace(guidance_scale=args.guidance_scale),
                                      1)["guidance_scale"]
    data, seconds = time_reading(lambda: load_dataset(dataset_of(checkpoint, args.data_dir), "train", args.data_dir))
    learned = dict(train_images=int(training_flag(checkpoint, "train_images", 0)),
                   hflip=bool(training_flag(checkpoint, "hflip", False)))  # from what: read for the figures of copies
    data = data.first(learned["train_images"] or None).coded(code_of(checkpoint["config"]))
    check_gpu_memory(data, device)
    check_same_data(checkpoint["config"], data)
    steps = args.teacher_steps or min(TEACHER_STEPS, process.num_timesteps)
    settings = Namespace(**vars(args) | learned | dict(guidance_scale=guidance_scale, teacher_steps=steps))
    trainer, settings = make_trainer(settings, teacher, process, data.to(device))
    config = dict(model=teacher.config, diffusion=process.config, data=checkpoint["config"]["data"],
                  training=dict(vars(settings), student=True, teacher_images_seen=checkpoint["images_seen"]))
    budget = Budget(math.inf, args.budget, start + seconds, reserve=CLOSING_SECONDS)
    advice = f"try --lr {args.lr / 4:g} --muon_lr {args.muon_lr / 4:g}, or --precision fp32"
    return Run(Path(args.output_dir), trainer, budget, config, advice, SAMPLE_IMAGES * sum(SAMPLE_STEPS))


def check_teacher(args: Namespace, process: DiffusionProcess, checkpoint: dict) -> None:
    """UserError, with what to do, where the flags do not fit the teacher."""
    if is_student(checkpoint["config"]):
        raise UserError(f"{args.checkpoint} is a student, which cannot teach: give its teacher with --checkpoint")
    if process.num_timesteps < 2:
        raise UserError(f"{args.checkpoint} has only one timestep, so that nothing can be shortened: train a teacher "
                        f"with more --timesteps")
    if (args.teacher_steps or 0) > process.num_timesteps:
        raise UserError(f"--teacher_steps must lie in 2..{process.num_timesteps} (the checkpoint's number of "
                        f"timesteps), not {args.teacher_steps}")
    check_inputs_stay([Path(args.output_dir)], [place_of_pictures(checkpoint)])
    if run_folder.holds(Path(args.output_dir), Path(args.checkpoint)):
        raise UserError(f"{args.output_dir} holds the teacher, which a new run there would move away: choose "
                        f"another --output_dir")


def make_trainer(settings: Namespace, teacher, process: DiffusionProcess,
                 data: ImageData) -> tuple[Trainer, Namespace]:
    """The trainer of a student that is still a copy of the teacher, and the settings with the measured precision."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    consistency = Consistency(process, teacher, settings.teacher_steps, settings.guidance_scale,
                              settings.teacher_order)
    conditional, count = bool(teacher.num_classes), min(settings.batch_size, repeats_of(data) * len(data.images))
    precision, layout = autotune.fastest_arithmetic(settings.precision, None, student, consistency, data, conditional,
                                                    count, autotune.seconds_for_race(math.inf, settings.budget))
    for network in (teacher, student):
        network.to(memory_format=autotune.LAYOUTS[layout])
    trainer = Trainer(data, student, consistency, batch_size=count, lr=settings.lr, muon_lr=settings.muon_lr,
                      conditional=conditional, label_dropout=0.0, precision=precision, seed=settings.seed,
                      hflip=settings.hflip, cuda_graph=data.images.device.type == "cuda")
    return trainer, Namespace(**vars(settings) | dict(precision=precision))


@script
def main(argv=None):
    start = time.perf_counter() - (seconds_since_start() if argv is None else 0.0)  # with the time of the imports
    if distributed.is_launched() and os.environ["WORLD_SIZE"] != "1":
        raise UserError("distill.py runs in one process: start it with python, without torchrun")
    args = with_checkpoint(parse_args(argv), students=False)
    with run_folder.claim(args.output_dir) as folder:
        run = make_run(args, start)
        with run_folder.stop_on_signals(run):
            trainer = run.trainer
            run_folder.check_space(folder, trainer.checkpoint_bytes)
            print_summary(trainer, "a student")
            run.update()
            if run.progress == 1:
                raise UserError(f"the {args.budget:g} s of --budget were over before the first step: give it more")
            if place := run_folder.set_aside(folder):
                print(f"Moved the results of an older run to {place}")
            with run_record.recorded(run, "distill.py", argv, earlier=[]):
                help_memory = partial(memory_advice, trainer, smaller="choose a smaller teacher")
                run.carry_out(partial(distill, run), help_memory)
                if run.stopped:
                    print(f"Stopped by a signal after {trainer.step:,} steps; saved {run.save_step()}")
                    return 128 + run.stopped
                path = run.save("model_final.pt")
                save_samples(run)
                print(f"Saved {path}: python sample.py --checkpoint {quoted(path)}")


if __name__ == "__main__":
    sys.exit(main())
