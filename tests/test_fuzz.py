"""Flags at random: no script ever shows a traceback, hangs, says more than a line of what is wrong, or loses a file."""

import contextlib
import io
import math
import os
import re
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from harness import files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import pretrained_folder, small_checkpoint

import benchmark
import distill
import doctor
import edit
import evaluate
import export
import sample
import train
import visualize_diffusion
from checkpoint import load_checkpoint
from evaluation import inputs
from samplers import SAMPLERS, SPACINGS
from training.budget import Budget

CASES = int(os.environ.get("FUZZ_CASES", 60))  # of each test; `make torture` asks for more
quietly = settings(max_examples=CASES, deadline=None, database=None,
                   suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

NUMBERS = st.one_of(st.integers(-3, 70).map(str), st.floats().map(str), st.sampled_from(
    ["0", "1", "-1", "1e-3", "0.5", "1e400", "-0", "9" * 30, "9" * 5000, "0x10", "1_000", "", " ", "nan", "inf", "٣"]))
WORDS = st.one_of(st.text(max_size=8), st.sampled_from(
    ["", "auto", "cpu", "cuda", "cuda:99", "mps", "fp32", "bf16", "glyphs", "mnist", "linear", "cosine", "eps", "edm",
     "v", "muon", "3-5", "9-0", "cat,dog", "--", "-", "/dev/null", "/", ".", "\0", "a\nb", "é\udcff", "broken.pt"]))
VALUES = st.one_of(NUMBERS, WORDS)


def choices(script, *argv):
    """The flags that a script has, from its own parser."""
    args = script.parse_args(list(argv))
    return sorted(vars(args[0] if isinstance(args, tuple) else args).keys() - {"worker"})  # which is no user's


@pytest.fixture(scope="module")
def place(tmp_path_factory, data_dir):
    """A folder to work in, with a checkpoint (also pretrained), a file that is none, images, and the user's notes."""
    folder = tmp_path_factory.mktemp("fuzz")
    small_checkpoint(folder / "model.pt", conditional=True, num_timesteps=8)
    pretrained = pretrained_folder(tmp_path_factory.mktemp("pretrained"), mnist=folder / "model.pt")
    (folder / "broken.pt").write_bytes(b"broken")
    np.savez(folder / "images.npz", arr_0=np.zeros((2, 28, 28, 1), np.uint8), labels=np.zeros(2, int))
    (folder / "outputs").mkdir()
    (folder / "outputs/notes.txt").write_text("mine")
    before = os.getcwd()
    os.chdir(folder)
    os.symlink(data_dir.resolve(), folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.checkpoints.PRETRAINED", pretrained)
        yield folder
        # After all that was tried here, a run still works.
        assert call(train, [*SHORT, "--batch_size", "1"], folder) == 0
        assert load_checkpoint(folder / "outputs/model_final.pt")["step"] == 4
    os.chdir(before)


def own(place):
    """The user's files, and those of the present run."""
    patterns = ("*.*", "outputs/*", "outputs/samples/*", "outputs/checkpoints/*")
    kept = [path for pattern in patterns for path in place.glob(pattern)]
    return {str(path.relative_to(place)): path.read_bytes() for path in kept if path.is_file() and path.name != ".lock"}


CALLS = Counter()  # how often each script ended with which status


def call(script, argv, place):
    """The exit status of a script's main(argv), which says one line at most of what is wrong and loses no file."""
    out, err, before = io.StringIO(), io.StringIO(), own(place)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("error")
        status = script.main(argv)
    now, CALLS[script.__name__, status] = own(place), CALLS[script.__name__, status] + 1
    assert status in (0, 1, 2), status
    if status == 2:
        assert now == before
    elif script is train and "--resume" not in argv:  # what an older run left is there still, if elsewhere
        places = sorted((place / "outputs/previous").glob("*"), key=lambda path: path.stat().st_ctime_ns)
        moved = files(places[-1]).values() if places else ()
        assert {*before.values()} <= {*now.values(), *moved}
    assert all(now[name] == before[name] for name in ("model.pt", "broken.pt", "images.npz", "outputs/notes.txt"))
    lines = [line for line in err.getvalue().replace("\r", "\n").splitlines() if line.strip()]
    if status == 2:
        assert len([line for line in lines if not is_bar(line)]) == 1, err.getvalue()
    assert not list((place / "outputs").rglob(".*.tmp"))
    return status


def is_bar(line):
    """Whether this is of a progress bar."""
    return "%|" in line or re.search(r"\d\w* \[\d\d:\d\d", line) is not None


def flags_of(names, values=VALUES, most=6):
    """Lists of arguments: some of the flags, with values that may or may not make sense."""
    one = st.tuples(st.sampled_from(names), st.lists(values, max_size=3)).map(lambda pair: [f"--{pair[0]}", *pair[1]])
    return st.lists(one, max_size=most).map(lambda parts: [argument for part in parts for argument in part])


# ---------------------------------------------------------------------------------------------------------------- train

# A run that does start is over at once: these come last, so that they win.
SHORT = ["--dataset", "glyphs", "--data_dir", "data", "--train_images", "4", "--epochs", "1", "--budget", "20s",
         "--base_channels", "4", "--time_emb_dim", "4", "--depth", "1", "--middle_depth", "1", "--device", "cpu",
         "--output_dir", "outputs"]


@pytest.fixture(scope="module", autouse=True)
def small(data_dir):
    """Little data, and few images to look at: what is tested here is what is done with flags."""
    from data import load_dataset
    loaded = {split: load_dataset("glyphs", split, data_dir).first(64) for split in ("train", "validation", "test")}

    def load(name, split="train", folder="data", points=False):
        if name != "glyphs" or folder != "data":
            raise ValueError("there is no such data set in this test")
        return loaded[split]
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, visualize_diffusion, edit, evaluate, inputs, doctor, benchmark, distill):
            patch.setattr(module, "load_dataset", load)
        progress = Budget.progress
        patch.setattr(Budget, "progress", lambda budget, step, time_share: (  # two steps where the time alone limits
            step / 2 if math.isinf(budget.steps) else progress(budget, step, time_share)))
        patch.setattr("evaluation.reference.check_image_count", lambda *_: None)
        patch.setattr(evaluate, "make_reference", lambda *_: None)  # images are made, and nothing is measured
        patch.setattr(evaluate, "train_feature_network", lambda *_: "trained")
        patch.setattr(evaluate, "train_second_network", lambda *_: "trained")
        for name, count in (("SAMPLES", 4), ("REAL", 8), ("BOUND_IMAGES", 16), ("ERROR_IMAGES", 8)):
            patch.setattr(doctor, name, count)
        for part in benchmark.PARTS:
            patch.setitem(benchmark.PARTS, part, lambda _: {})
        patch.setattr(train, "PREVIEW_IMAGES", 2)
        patch.setattr(export, "to_onnx", lambda *_: SimpleNamespace(SerializeToString=lambda: b"a network"))  # fast
        patch.setattr(export, "difference", lambda *_: 0.0)
        patch.setattr("training.trainer.VALIDATION_LOSS_IMAGES", 2)
        yield


@quietly
@given(flags=flags_of(choices(train)))
def test_train_refuses_or_runs_with_any_flags(place, flags):
    call(train, [*flags, *SHORT], place)


VALID = {  # flags with values that each make sense; together they may not
    "timesteps": ["1", "2", "50"], "schedule": ["linear", "cosine"], "prediction": ["eps", "x0", "v", "edm"],
    "timestep_sampling": ["uniform", "stratified", "lognormal"], "loss_weight": ["target", "min_snr"],
    "snr_gamma": ["1e-6", "5", "1e30"], "patch_size": ["1", "2", "4"], "channel_mults": ["1", "1 2", "3", "1 1 1 1"],
    "attention": ["0", "1", "2", "4", "2 4", "7"], "activation": ["silu", "gelu", "relu", "mish"],
    "label_dropout": ["0", "0.5", "1"], "dropout": ["0", "0.1", "0.9"], "batch_size": ["1", "2", "3", "1000", "auto"],
    "optimizer": ["muon", "adamw"], "lr": ["0", "1e-3", "1e30"], "muon_lr": ["0", "0.02", "1e30"],
    "warmup": ["0", "0.5", "1"], "lr_schedule": ["cosine", "constant"], "weight_decay": ["0", "1e30"],
    "max_grad_norm": ["1e-6", "1e30"], "ema_decay": ["0", "0.999", "1"], "precision": ["fp32", "bf16", "auto"],
    "recipe": ["fast", "ddpm"], "seed": ["0", str(2**63 - 1)], "sample_interval": ["0", "1", "3"],
    "save_interval": ["0", "1", "3"], "checkpoint_minutes": ["0", "1e-9", "5"], "keep_checkpoints": ["1", "5"],
    "conditional": [""], "zero_terminal_snr": [""],
    "learn_variance": [""], "checkpointing": [""], "resume": [""], "epochs": ["1", "2"],
}


VALID_ELSEWHERE = {  # the same for the other scripts
    sample: {"num_images": ["1", "3"], "steps": ["1", "3", "8"], "sampler": [*SAMPLERS], "spacing": [*SPACINGS],
             "eta": ["0", "1"], "label": ["3", "0-2", "7,1"], "guidance_scale": ["0", "1", "3.5"], "seed": ["0", "9"],
             "guidance_interval": ["0 7", "2 3"], "batch_size": ["1", "100"], "no_use_ema": [""], "gif": [""],
             "show_intermediate": [""], "precision": ["fp32", "bf16"], "output": ["outputs/x.png", "outputs/x.npz"]},
    visualize_diffusion: {"what": ["forward", "schedules", "denoising"], "num_images": ["1", "2"], "steps": ["1", "8"],
                          "schedule": ["linear", "cosine"], "timesteps": ["1", "8"], "sampler": ["ddim", "heun"],
                          "checkpoint": ["model.pt", "broken.pt"], "seed": ["0", "9"], "spacing": [*SPACINGS],
                          "dataset": ["glyphs"],
                          "label": ["3", "0-2"], "guidance_scale": ["0", "2"]},
    edit: {"steps": ["1", "8"], "seed": ["0", "9"], "gif": [""], "index": ["0", "63", "64"], "mask": ["left", "center"],
           "resample": ["1", "2"], "num_images": ["1", "2"], "strength": ["0", "0.5", "1"], "frames": ["2", "3"],
           "seeds": ["1 2", "3 3"], "label": ["3", "0-1"], "guidance_scale": ["1", "2"]},
    evaluate: {"num_images": ["1", "3"], "steps": ["1", "8"], "sampler": [*SAMPLERS], "spacing": [*SPACINGS],
               "batch_size": ["1", "100"], "guidance_scale": ["0", "1", "1 2"], "sweep": ["", "1", "1 2"],
               "guidance_interval": ["0 7", "3 2"], "reference": ["test", "validation"], "cas": [""],
               "dataset": ["glyphs", "mnist"], "seed": ["0", "9"], "precision": ["fp32", "bf16"]},
    distill: {"teacher_steps": ["2", "8", "9"], "teacher_order": ["1", "2"], "guidance_scale": ["0", "1", "3.5"],
              "batch_size": ["1", "3", "1000"], "lr": ["0", "1e30"], "muon_lr": ["0", "1e30"], "seed": ["0", "9"],
              "precision": ["fp32", "bf16", "auto"], "budget": ["1e-9", "1m"]},
    doctor: {"checkpoint": ["model.pt", "broken.pt", "mnist"], "dataset": ["glyphs", "mnist"], "json": [""]},
    benchmark: {"contestants": ["fast", "ddpm fast", "first_try"], "budgets": ["1s", "1m 2m"], "quick": [""],
                "num_images": ["1", "500"], "limit": ["0", "1"], "dataset": ["glyphs", "mnist"]},
}


def valid_flags(table=VALID, most=8):
    one = st.sampled_from(sorted(table)).flatmap(lambda name: st.sampled_from(table[name]).map(
        lambda value: [f"--{name}", *value.split()]))
    return st.lists(one, max_size=most).map(lambda parts: [argument for part in parts for argument in part])


@settings(quietly, max_examples=max(10, CASES // 4))
@given(flags=valid_flags())
def test_train_ends_well_or_says_why_with_flags_that_make_sense(place, flags):
    status = call(train, [*SHORT, *flags], place)
    if status == 0:
        saved = load_checkpoint(place / "outputs/model_final.pt")
        assert all(weight.isfinite().all() for part in ("model", "ema") for weight in saved[part].values())


# -------------------------------------------------------------------------------------------------------- other scripts


@quietly
@given(flags=flags_of(choices(sample)), given=st.sampled_from(["model.pt", "mnist", None]), whole=st.booleans())
def test_sample_refuses_or_makes_images_with_any_flags(place, flags, given, whole):
    end = ["--num_images", "2", "--steps", "2", "--device", "cpu", "--output", "outputs/x.png"]
    call(sample, [*(["--checkpoint", given] if given else []), *flags, *(end if whole else end[:2])], place)


@quietly
@given(flags=flags_of(choices(visualize_diffusion)), whole=st.booleans())
def test_visualize_refuses_or_draws_with_any_flags(place, flags, whole):
    end = ["--dataset", "glyphs", "--data_dir", "data", "--save_path", "outputs/x.png"]
    call(visualize_diffusion, [*flags, *(end if whole else [])], place)


DISTILLED = ["--checkpoint", "model.pt", "--data_dir", "data", "--output_dir", "outputs/student", "--batch_size", "4",
             "--teacher_steps", "3", "--device", "cpu"]
COMMANDS = ("inpaint", "vary", "interpolate", "invert")


@quietly
@given(command=st.sampled_from(COMMANDS), flags=flags_of(choices(edit, "inpaint", "--checkpoint", "x")),
       whole=st.booleans())
def test_edit_refuses_or_edits_with_any_flags(place, command, flags, whole):
    end = ["--checkpoint", "model.pt", "--output", "outputs/x.png", "--steps", "1", "--device", "cpu"]
    call(edit, [command, *flags, *(end if whole else end[:2])], place)


@quietly
@given(flags=flags_of(choices(evaluate, "--checkpoint", "x")), made=st.booleans(), whole=st.booleans())
def test_evaluate_refuses_or_makes_images_with_any_flags(place, flags, made, whole):
    begin = (["--checkpoint", "model.pt", "--num_images", "2"] if made else
             ["--images", "images.npz", "--dataset", "glyphs"])
    end = ["--output_dir", "outputs", "--device", "cpu", "--data_dir", "data"]
    call(evaluate, [*begin, *flags, *(end if whole else end[:2])], place)


@settings(quietly, max_examples=max(10, CASES // 4))
@given(flags=flags_of(choices(distill, "--checkpoint", "x")), whole=st.booleans())
def test_distill_refuses_or_teaches_with_any_flags(place, flags, whole):
    call(distill, [*flags, *(DISTILLED if whole else DISTILLED[:6])], place)


@settings(quietly, max_examples=max(10, CASES // 4))
@given(flags=flags_of(choices(doctor)), given=st.booleans(), whole=st.booleans())
def test_doctor_refuses_or_examines_with_any_flags(place, flags, given, whole):
    end = ["--device", "cpu", "--data_dir", "data"]
    call(doctor, [*(["--checkpoint", "model.pt"] if given else []), *flags, *(end if whole else [])], place)


@settings(quietly, max_examples=max(10, CASES // 4))
@given(flags=flags_of(choices(export)), given=st.booleans())
def test_export_refuses_or_writes_with_any_flags(place, flags, given):
    call(export, [*(["--checkpoint", "model.pt"] if given else []), *flags, "--output", "outputs/x.html"], place)


@quietly
@given(what=st.lists(st.sampled_from([*benchmark.PARTS, "nonsense"]), max_size=2), flags=flags_of(choices(benchmark)),
       whole=st.booleans())
def test_benchmark_refuses_or_begins_with_any_flags(place, what, flags, whole):
    end = ["--output_dir", "outputs", "--contestants", "fast", "--device", "cpu", "--dataset", "glyphs", "--data_dir",
           "data"]
    call(benchmark, [*what, *flags, *(end if whole else end[:2])], place)


@settings(quietly, max_examples=max(10, CASES // 4))
@given(data=st.data(), script=st.sampled_from([*VALID_ELSEWHERE]), command=st.sampled_from(COMMANDS))
def test_the_others_end_well_or_say_why_with_flags_that_make_sense(place, data, script, command):
    flags = data.draw(valid_flags(VALID_ELSEWHERE[script], most=3))
    begin = {sample: ["--checkpoint", "model.pt", "--num_images", "2", "--steps", "2", "--output", "outputs/x.png"],
             visualize_diffusion: ["--data_dir", "data", "--save_path", "outputs/x.png"],
             edit: [command, "--checkpoint", "model.pt", "--output", "outputs/x.png", "--steps", "2"],
             evaluate: ["--checkpoint", "model.pt", "--num_images", "2", "--output_dir", "outputs"],
             distill: DISTILLED, doctor: ["--checkpoint", "model.pt"],
             benchmark: ["train", "quality", "--output_dir", "outputs"]}[script]
    call(script, [*begin, *flags, "--device", "cpu"], place)
