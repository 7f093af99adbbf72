"""Train a network on a data set, so that it can make images like those in it.

    python train.py --epochs 20
    python train.py --budget 10m
    python train.py --dataset fashion_mnist --schedule linear --prediction eps --output_dir outputs/fashion
    torchrun --nproc_per_node=2 train.py --epochs 20

Writes to --output_dir: samples/epoch_001.png ..., checkpoints/model_epoch_005.pt ..., model_final.pt,
training_loss.png, metrics.jsonl and run.json. Results of an older run there are moved to previous/.
"""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data import ImageData, load_dataset
from evaluation.copies import copies, copies_line
from runtime import checkpoints, distributed, threads
from runtime.errors import UserError
from runtime.files import check_output, quoted
from runtime.memory import trim_heap
from runtime.progress import say
from runtime.sampling import chosen_dataset, is_student, sampling_options
from runtime.script import script
from runtime.startup import seconds_since_start
from samplers import DEFAULT_STEPS, all_images
from training import autotune, run_folder, run_record
from training.budget import Budget
from training.flags import (
    check_effect,
    check_flags_of_data,
    defaults,
    make_code,
    make_config,
    make_parser,
    make_settings,
    start_from,
)
from training.resume import check_resumable, flags_of_begun_run, more_epochs, resume_command, saved_flags
from training.run import (
    LOG_STEPS,
    Run,
    is_complete,
    newest_valid,
    print_summary,
    progress_bar,
    warn_of_failed_writes,
)
from training.setup import build, check_gpu_memory, check_same_pictures, choose_size, make_trainer, time_reading
from training.sizing import FEW_IMAGES
from training.tensorboard import Board, summary_writer
from training.trainer import VALIDATION_LOSS_IMAGES, Trainer, memory_advice, validation_loss
from utils import autocast, evenly_spaced, get_device, grid_layout, plot_losses, save_images, tile

PREVIEW_IMAGES = 64
RISEN = 1.05  # a validation loss that is so many times the lowest one has risen
REPORT_SHARE = 0.01  # of a --budget between two reports, at least: on a GPU an epoch may take less than a second


def parse_args(argv: Sequence[str] | None) -> tuple[Namespace, dict | None]:
    """The flags and, with --resume, the checkpoint to continue from; its flags are the defaults then."""
    parser = make_parser(__doc__)
    args = parser.parse_args(argv)
    if args.resume and "init" in parser.typed:
        parser.error("--init starts a new run: leave out --resume")
    found = find_checkpoint(args) if args.resume or distributed.is_launched() else None
    begun = {}
    if args.resume and not found:
        begun = flags_of_begun_run(parser, args)
        parser.set_defaults(**begun)
        args = parser.parse_args(argv)
    parser.set_defaults(**defaults(args, init=None if found else args.init, resumes=bool(found)) | begun)
    args = parser.parse_args(argv)
    check_flags_of_data(parser, args)
    typed = parser.typed
    if not found:
        check_effect(parser, args, typed)
        if args.init and distributed.is_launched() and run_folder.holds(
                Path(args.output_dir), checkpoints.find_checkpoint(args.init)):
            parser.error(f"--init {args.init} is a result of the run in {args.output_dir}, which a new run there moves "
                         f"to previous/: torchrun could not restart it. Choose another --output_dir")
        return args, None
    path, checkpoint = found
    if is_student(checkpoint["config"]):
        raise UserError(f"{path} is a student of distill.py, which cannot be resumed: choose another --output_dir")
    words = saved_flags(parser, args, path, checkpoint)
    args = parser.parse_args([*words, *(sys.argv[1:] if argv is None else argv)])
    check_effect(parser, args, typed)
    print(f"Resuming {path} after {checkpoint['step']:,} steps")
    return args, checkpoint


def find_checkpoint(args: Namespace) -> tuple[Path, dict] | None:
    """The newest valid checkpoint in --output_dir, with --resume or if torchrun restarts what wrote it.

    UserError for --resume with a folder that no run has written to.
    """
    distributed.init_process_group(get_device(distributed.local_device(args.device)))
    folder = Path(args.output_dir)

    def find() -> tuple[Path, dict] | None:
        if args.resume and not run_folder.has_run(folder):
            raise UserError(run_folder.no_run_message(folder))
        if not (args.resume or run_record.is_of_this_launch(folder)):
            return None
        found = newest_valid(folder)
        if not found:
            print(f"Nothing to resume in {folder}: starting a new run")
        return found
    return distributed.from_rank_0(find)


def train(run: Run, validation: ImageData, settings: Namespace) -> None:
    """Train until the steps, the time or a signal end the run."""
    trainer, tuner, by_time = run.trainer, threads.ThreadTuner(), settings.epochs is None
    reported, progress, epoch = None if run.losses else trainer.step, run.progress, trainer.epoch
    with progress_bar(run):
        while run.progress < 1 and not run.stopped:
            with tuner:
                x_0, labels = trainer.batch()                                               # (B, C, H, W), (B,)
                loss = trainer.train_step(x_0, labels, run.progress, 1 / run.budget.steps)  # ()
            run.losses.append(loss)
            step_of_epoch = trainer.step % trainer.steps_per_epoch
            if (step_of_epoch == 0 and trainer.reports_now(by_time)
                    and (not by_time or run.progress - progress >= REPORT_SHARE)):
                epoch = end_epoch(run, validation, settings, epoch)
                run.update()
                reported, progress = trainer.step, run.progress
            elif len(run.losses) >= LOG_STEPS:
                run.record(run.speed())
            run.save_every(settings.checkpoint_minutes)
            run.update()
        if reported != trainer.step and not run.stopped:  # the time ended within an epoch
            end_epoch(run, validation, settings, epoch)


def end_epoch(run: Run, validation: ImageData, settings: Namespace, before: int) -> int:
    """Validate, print a line, and write the samples and the checkpoint that are due; returns the number of the epoch.

    before: the epoch of the last report.
    """
    speed, start, trainer = run.speed(), time.perf_counter(), run.trainer
    trim_heap()
    val_loss = validation_loss(trainer, validation)
    run.record(speed, val_loss)
    epoch = -(-trainer.step // trainer.steps_per_epoch)  # an epoch that the budget cut short counts
    say(epoch_summary(run.records, epoch, (epoch - 1) * trainer.steps_per_epoch, val_loss))
    drawn = is_due(settings.sample_interval, epoch, before)
    if drawn:
        save_preview(run, run.folder / f"samples/epoch_{epoch:03d}.png")
    with warn_of_failed_writes():
        if is_due(settings.save_interval, epoch, before):
            run.save(f"checkpoints/model_epoch_{epoch:03d}.pt")
        elif distributed.rank() == 0:
            run.save_records()
    if speed:
        not_drawn = 0.0 if drawn else preview_work(trainer, settings)
        run.closing_images = (time.perf_counter() - start) * speed + not_drawn
        run.set_reserve(speed)
    run.mark()
    return epoch


def is_due(interval: int, epoch: int, before: int) -> bool:
    """Whether what is done every `interval` epochs (0: never) is due, after a report of epoch `before`."""
    return interval > 0 and epoch // interval > before // interval


def epoch_summary(records: Sequence[dict], epoch: int, first_step: int, val_loss: float) -> str:
    """A line about the epoch whose records follow first_step: mean loss, validation loss, seconds."""
    own = [record for record in records if record["step"] > first_step]
    before = records[-len(own) - 1]["seconds"] if len(own) < len(records) else 0.0
    losses = [record["loss"] for record in own if record["loss"] is not None] or [math.nan]
    validation = "" if math.isnan(val_loss) else f"val_loss {val_loss:.5f}, "  # no image is held out of few
    return (f"epoch {epoch}: loss {sum(losses) / len(losses):.5f}, {validation}"
            f"{records[-1]['seconds'] - before:.1f} s")


def preview(run: Run) -> Tensor:
    """What sample.py makes with this seed, decoded (B, C, H, W); the starting noise is always the same."""
    trainer, data = run.trainer, run.config["data"]
    if run.preview and run.preview[0] == trainer.step:
        return run.preview[1]
    indices = range(PREVIEW_IMAGES)[distributed.rank_slice(PREVIEW_IMAGES)]
    flags = Namespace(seed=trainer.seed, batch_size=trainer.preview_batch(PREVIEW_IMAGES))
    options = sampling_options(run.config, flags, PREVIEW_IMAGES)
    with autocast(trainer.device, trainer.precision):
        images = all_images(trainer.ema, trainer.diffusion, data["shape"], indices, **options)
    run.preview = trainer.step, trainer.data.code.decode(distributed.all_gather(images))
    return run.preview[1]


def save_preview(run: Run, path: Path) -> None:
    """Write a grid of the images of `preview`."""
    pictures = preview(run)
    if distributed.rank() == 0:
        with warn_of_failed_writes():
            save_images(pictures, path)
            run.board.add_samples(tile(pictures, grid_layout(pictures.shape)[0]), run.trainer.step)


def is_few(data: ImageData) -> bool:
    """Whether these are so few pictures of one's own that they could be learned by heart."""
    return data.folder is not None and len(data.images) < FEW_IMAGES


def say_copies(run: Run) -> None:
    """For few pictures of one's own: print whether samples of the finished network are copies of them.

    And whether the validation loss was lower before, which is what learning by heart does to it.
    """
    if is_few(run.trainer.data):
        pictures = preview(run)
        if distributed.rank() == 0:
            print(copies_line(copies(pictures, run.trainer.data, run.trainer.hflip)[0]))
            flag = "--epochs" if run.config["training"]["epochs"] else "--budget"
            if line := earlier_end(run.records, flag):
                print(line)


def earlier_end(records: Sequence[dict], flag: str) -> str:
    """A line with the time at which the validation loss was lowest, if it has risen since; else an empty text.

    flag: what limits the run.
    """
    known = [record for record in records if record.get("val_loss")]
    if not known:
        return ""
    lowest, last = min(known, key=lambda record: record["val_loss"]), known[-1]
    if last["val_loss"] < RISEN * lowest["val_loss"]:
        return ""
    return (f"The loss on held-out pictures was lowest after {lowest['seconds']:.0f} s ({lowest['val_loss']:.4f}) and "
            f"is now {last['val_loss']:.4f}: a smaller {flag} may give fewer copies")


def preview_work(trainer: Trainer, settings: Namespace) -> float:
    """The work of the preview at the end of a run, if it makes one, in images of a training step."""
    if not (settings.sample_interval or is_few(trainer.data)):
        return 0.0
    evaluations = DEFAULT_STEPS * (2 if trainer.conditional else 1)  # guidance evaluates the network twice
    return PREVIEW_IMAGES * evaluations / 3  # no gradient: a third of the work


# ----------------------------------------------------------------------------------------------------------- set-up


def open_data(args: Namespace, device: torch.device) -> ImageData:
    """The images to learn from; of your own pictures it also says what was read."""
    data = load_dataset(chosen_dataset(args, small=device.type == "cpu"), "train", args.data_dir, points=True)
    data = data.first(args.train_images)
    letters = any(len(name) == 1 for name in data.class_names)
    may_flip = data.folder is not None and data.images.shape[1] == 3 and not letters and not args.hflip
    if is_few(data):
        known = "cifar10" if data.images.shape[1] == 3 else "mnist"
        helps = [] if args.init or args.resume else [f"--init {known}"]
        helps += [] if args.dropout else ["--dropout 0.1"]
        helps += ["--hflip (where left and right do not matter)"] if may_flip else []
        advice = f"{' or '.join(helps)} gave far fewer copies of drawings; " if helps else ""
        print(f"Fewer than {FEW_IMAGES:,} pictures to learn from: {advice}the end of the run says whether they were "
              f"learned by heart", flush=True)
    elif may_flip:
        print("If these are photographs or the like, in which left and right do not matter, add --hflip", flush=True)
    return data


def look(args: Namespace) -> None:
    """Write look.png, evenly chosen pictures as the network will see them, for --look."""
    path = check_output(Path(args.output_dir) / "look.png")
    data = open_data(args, get_device(args.device))
    save_images(data.images[evenly_spaced(len(data.images), PREVIEW_IMAGES)], path)
    print(f"Saved {path}: if it is right, leave out --look to train")


def make_run(args: Namespace, checkpoint: dict | None, start: float) -> tuple[Run, ImageData, Namespace]:
    """The run that the flags ask for, the validation images, and the flags with every open value filled in.

    start: time.perf_counter() when the run began; what reading your own pictures takes is added.
    """
    if args.tensorboard:
        summary_writer()  # an error now, if it is not installed
    device = get_device(distributed.local_device(args.device))
    autotune.set_up_cuda(device)
    data, seconds = time_reading(partial(open_data, args, device))
    check_same_pictures(data)
    check_gpu_memory(data, device)
    settings = make_settings(args, data)
    threads.set_up(args.threads, device, adapt=settings.epochs is None)
    validation = load_dataset(data.source, "validation", args.data_dir, points=True)
    saved = checkpoint and checkpoint["config"]
    data = data.coded(make_code(settings, data, saved))
    config = make_config(settings, data, saved)
    settings = choose_size(settings, config, data, device)
    config["model"]["base_channels"] = settings.base_channels
    torch.manual_seed(args.seed)
    model, diffusion = build(config, data, settings.dropout)
    if args.init and not checkpoint:
        print(start_from(model, args, data))
    trainer, settings = make_trainer(settings, data.to(device), model.to(device), diffusion.to(device))
    config |= dict(model=model.config, diffusion=diffusion.config, training=vars(settings))
    steps = settings.epochs * trainer.steps_per_epoch if settings.epochs else math.inf
    budget = Budget(steps, args.budget, start + seconds, checkpoint["seconds"] if checkpoint else 0.0)
    closing_images = min(VALIDATION_LOSS_IMAGES, len(validation.images)) / 3 + preview_work(trainer, settings)
    run = Run(Path(args.output_dir), trainer, budget, config, advice(settings), closing_images, args.keep_checkpoints)
    if checkpoint:
        check_resumable(checkpoint, config, resume_command(args))
        run.restore(checkpoint)
    trim_heap()
    return run, validation, settings


def advice(settings: Namespace) -> str:
    """Advice after NaN or inf, or after another process has ended."""
    muon = f" --muon_lr {settings.muon_lr / 4:g}" if settings.optimizer == "muon" else ""
    return (f"resume from the last good checkpoint with {resume_command(settings)}; after numbers that are not finite "
            f"add --lr {settings.lr / 4:g}{muon}, --max_grad_norm 0.5 or --precision fp32")


def complete_message(run: Run, checkpoint: dict | None, args: Namespace) -> str | None:
    """What to type to continue a run that --resume finds complete; None where there is something left to do."""
    if not (args.resume and checkpoint):
        return None
    over = (checkpoint["epoch"] >= (run.config["training"]["epochs"] or math.inf)
            or run.budget.seconds_used >= (args.budget or math.inf) - run.budget.reserve)
    if not distributed.broadcast(over and is_complete(run.folder)):
        return None
    return (f"The run in {run.folder} is complete, with {checkpoint['epoch']:,} epochs in "
            f"{checkpoint['seconds']:.0f} seconds: continue it with {resume_command(args)} --epochs "
            f"{more_epochs(checkpoint['epoch'])}, or with a --budget well above these seconds, which it includes")


# ------------------------------------------------------------------------------------------------------------- main


@script
def main(argv=None):
    args, checkpoint = parse_args(argv)
    if args.look:
        return look(args)
    distributed.init_process_group(get_device(distributed.local_device(args.device)))
    start = time.perf_counter() - (seconds_since_start() if argv is None else 0.0)  # with the time of the imports
    with run_folder.claim(args.output_dir) as folder:
        run, validation, settings = make_run(args, checkpoint, start)
        with run_folder.stop_on_signals(run):
            if message := complete_message(run, checkpoint, args):
                return print(message)
            # Before they are moved: of a run that began, too, but left no checkpoint, --resume takes the flags.
            earlier = run_record.sittings(folder, "train.py") if checkpoint or args.resume else []
            prepare_folder(run, resumed=checkpoint is not None)
            if settings.tensorboard and distributed.rank() == 0:
                run.board = Board(folder / "tensorboard", run.trainer.step)
            with run_record.recorded(run, "train.py", argv, earlier):
                help_memory = partial(memory_advice, run.trainer, resumed=checkpoint is not None)
                try:
                    run.carry_out(partial(train, run, validation, settings), help_memory)
                finally:
                    with warn_of_failed_writes():
                        run.board.close()
                if run.stopped:
                    path = run.save_step()
                    distributed.broadcast(None)  # wait for the file: torchrun ends all processes when one has ended
                    print(f"Stopped by a signal after {run.trainer.step:,} steps; saved {path}: continue with "
                          f"{resume_command(args)}")
                    return 128 + run.stopped
                path = run.save("model_final.pt")
                say_copies(run)
                if distributed.rank() == 0:
                    plot_losses(run.records, folder / "training_loss.png")
                print(f"Saved {path}: python sample.py --checkpoint {quoted(path)}")
    distributed.destroy_process_group()


def prepare_folder(run: Run, resumed: bool) -> None:
    """Check disk and budget, print what is trained, and move an older run's results aside."""
    trainer = run.trainer
    if distributed.rank() == 0:
        run_folder.check_space(run.folder, trainer.checkpoint_bytes)
    print_summary(trainer, "network")
    run.update()
    if run.progress == 1 and not trainer.step:
        seconds = math.ceil(run.budget.seconds_used + run.budget.reserve + 10)
        raise UserError(f"the {run.budget.seconds:g} s of --budget were over before the first step: give it more, "
                        f"such as --budget {seconds}s")
    if not resumed and distributed.rank() == 0 and (place := run_folder.set_aside(run.folder)):
        print(f"Moved the results of an older run to {place}")


if __name__ == "__main__":
    sys.exit(main())
