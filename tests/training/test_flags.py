"""What a training run can be asked for: recipes that flags override, defaults by data set and budget, what to type."""

import shlex
from types import SimpleNamespace

import pytest
import torch
from harness import tiny

import train
from data import DATASETS, ImageData
from diffusion import DiffusionProcess
from runtime import distributed
from runtime.sampling import sampling_options
from samplers import DEFAULT_GUIDANCE, highest_noise
from training import flags
from training.flags import RECIPES, make_settings
from training.resume import OWN_FLAGS, resume_command

DATA = ImageData("glyphs", "train", torch.zeros(2000, 1, 28, 28, dtype=torch.uint8), torch.zeros(2000).long(), ("0",))


def parsed(*argv):
    return train.parse_args(list(argv))[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_gives_its_values_and_flags_override_them(recipe):
    args = parsed("--recipe", recipe)
    assert {name: getattr(args, name) for name in RECIPES[recipe]} == RECIPES[recipe]
    given = dict(schedule="linear", prediction="v", lr=0.5, batch_size=7, conditional=not args.conditional)
    flags = [f"--{name}={value}" for name, value in given.items() if name != "conditional"]
    args = parsed(*flags, "--conditional" if given["conditional"] else "--no-conditional", "--recipe", recipe)
    assert {name: getattr(args, name) for name in RECIPES[recipe]} == RECIPES[recipe] | given


def test_the_recipes_differ_and_the_fast_one_is_the_default():
    assert parsed() == parsed("--recipe", "fast")
    assert vars(parsed()).items() >= RECIPES["fast"].items() and RECIPES["fast"].keys() == RECIPES["ddpm"].keys()
    assert (parsed("--recipe", "ddpm").optimizer, parsed("--recipe", "ddpm").precision) == ("adamw", "fp32")


@pytest.mark.parametrize("dataset, mean, std", [("mnist", 0.7, 0.9), ("glyphs", 0.7, 0.9),
                                                ("fashion_mnist", 0.0, 1.2), ("cifar10", -0.5, 1.2),
                                                ("scenes", 0.2, 1.2)])
def test_what_is_left_open_is_filled_in_by_the_data_set(dataset, mean, std):
    args = parsed("--dataset", dataset, "--budget", "2m")
    before, settings = vars(args).copy(), make_settings(args, DATA)
    assert (settings.noise_mean, settings.noise_std, settings.base_channels) == (mean, std, None)
    assert (settings.patch_size, settings.channel_mults, settings.middle_depth) == (2, [1, 2], 3)  # DATA are grey
    assert vars(args) == before  # parsed flags are not written to
    args = parsed("--dataset", dataset, "--noise_mean", "0", "--noise_std", "3", "--base_channels", "8")
    settings = make_settings(args, DATA)
    assert (settings.noise_mean, settings.noise_std, settings.base_channels) == (0, 3, 8)


def test_without_epochs_and_budget_there_are_twenty_epochs():
    given = ([], ["--budget", "9s"], ["--epochs", "3"])
    assert [make_settings(parsed(*words), DATA).epochs for words in given] == [20, None, 3]


@pytest.mark.parametrize("own", [dict(), dict(data_dir="my data"), dict(output_dir="a b/run", device="cpu")], ids=str)
def test_the_command_that_goes_on_names_what_a_checkpoint_does_not_know(own, monkeypatch):
    given = dict(output_dir="outputs/fashion", data_dir="data", device="auto") | own
    start, script, *argv = shlex.split(resume_command(SimpleNamespace(**given)))
    assert (start, script, argv[:3]) == ("python", "train.py", ["--resume", "--output_dir", given["output_dir"]])
    args = flags.make_parser("").parse_args(argv)
    assert args.resume and {name: getattr(args, name) for name in given} == given
    assert len(argv) == 3 + 2 * len(own.keys() - {"output_dir"})
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert resume_command(SimpleNamespace(**given)).startswith("torchrun --nproc_per_node=2 train.py --resume ")
    for name, value in dict(GROUP_WORLD_SIZE="2", LOCAL_WORLD_SIZE="1").items():  # of a launch on two machines
        monkeypatch.setenv(name, value)
    assert resume_command(SimpleNamespace(**given)).startswith(
        "torchrun --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py --resume ")


def test_the_help_of_resume_names_what_is_not_taken_from_the_checkpoint():
    said = {action.dest: action.help for action in flags.make_parser("")._actions}
    assert all(f"--{name}" in said["resume"] for name in OWN_FLAGS if name != "resume")
    assert "the time used before" in said["budget"]
    assert "on CUDA it differs by rounding" in said["resume"] and "--epochs" in said["threads"]


@pytest.mark.parametrize("words, missing", [
    (["--muon_lr", "1", "--optimizer", "adamw"], "--optimizer muon"), (["--snr_gamma", "4"], "--loss_weight min_snr"),
    (["--noise_mean", "1", "--timestep_sampling", "uniform"], "--timestep_sampling lognormal"),
    (["--noise_std", "1", "--recipe", "ddpm"], "--timestep_sampling lognormal"),
    (["--label_dropout", "0", "--no-conditional"], "--conditional")], ids=lambda words: words[0][2:])
def test_a_flag_that_would_change_nothing_is_refused(words, missing, tmp_path, capfd):
    assert train.main([*words, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{words[0]} changes nothing without {missing}" in line and not (tmp_path / "run").exists()


def test_a_network_that_no_checkpoint_may_hold_is_refused(tmp_path, capfd):
    assert train.main(["--channel_mults", *["1"] * 9, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "--channel_mults has 9 numbers, more than the 8" in line and not (tmp_path / "run").exists()


def test_min_snr_is_refused_where_it_would_leave_the_first_time_of_sampling_untrained(tmp_path, capfd):
    words = ["--zero_terminal_snr", "--loss_weight", "min_snr", "--output_dir", str(tmp_path / "run")]
    assert train.main(words) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "--loss_weight target" in line and not (tmp_path / "run").exists()
    DiffusionProcess(prediction="v", zero_terminal_snr=True, loss_weight="min_snr")  # of a checkpoint that has both


@pytest.mark.parametrize("name, more, low_share, lowest", [
    ("mnist", [], 0.0, 0.3), ("fashion_mnist", [], 0.0, 0.1), ("glyphs", [], 0.0, 0.3), ("cifar10", [], 0.0, None),
    ("mnist", ["--level_code", "linear"], 0.0, None), ("moons", [], 0.05, None)])
def test_what_a_process_has_without_flags_is_what_was_measured(name, more, low_share, lowest):
    images = torch.zeros(4, 2, 1, 1) if name == "moons" else torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    data = ImageData(name, "train", images, torch.zeros(4, dtype=torch.long), ("a", "b"), DATASETS[name].code)
    settings = make_settings(parsed("--dataset", name, *more), data)
    data = data.coded(flags.make_code(settings, data))
    process = flags.make_config(settings, data)["diffusion"]
    assert (process["last_share"], process["low_share"], process["lowest_noise"]) == (0.01, low_share, lowest)
    assert process["highest_noise"] == 20


def test_the_spread_of_the_data_is_measured_on_what_the_network_sees():
    levels = torch.cat([torch.zeros(1000, dtype=torch.uint8), torch.arange(24, dtype=torch.uint8)]).view(16, 1, 8, 8)
    data, stds = ImageData("glyphs", "train", levels, torch.zeros(16, dtype=torch.long), ("a", "b")), {}
    for code in ("linear", "histogram"):
        settings = make_settings(parsed("--dataset", "glyphs", "--level_code", code), data)
        seen = data.coded(flags.make_code(settings, data))
        stds[code] = flags.make_config(settings, seen)["diffusion"]["data_std"]
        assert stds[code] == round(seen.code.encode(levels).std().item(), 3)
    assert stds["linear"] < 0.5 * stds["histogram"]


def test_samplers_of_larger_images_begin_with_more_noise():
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 64, 64)
    data = ImageData("scenes", "train", images, torch.zeros(4, dtype=torch.long), ("a", "b"))
    made = flags.make_config(make_settings(parsed("--dataset", "scenes"), data), data)
    assert made["diffusion"]["highest_noise"] == pytest.approx(highest_noise((3, 64, 64)), abs=0.1)
    del made["diffusion"]["highest_noise"]  # a run from before it was kept is continued as it began
    again = flags.make_config(make_settings(parsed("--dataset", "scenes"), data), data, saved=made)
    assert again["diffusion"]["highest_noise"] is None


def test_the_guidance_of_a_data_set_is_kept_in_its_checkpoints():
    """A run that began before a data set had one goes on without it, and draws as before."""
    data = ImageData("cifar10", "train", torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8),
                     torch.zeros(4, dtype=torch.long), ("a", "b"))
    settings = make_settings(parsed("--dataset", "cifar10"), data)
    config = flags.make_config(settings, data) | dict(training=vars(settings))
    assert DATASETS["cifar10"].guidance != DEFAULT_GUIDANCE
    assert sampling_options(config, count=2)["guidance_scale"] == DATASETS["cifar10"].guidance
    del config["data"]["guidance_scale"]
    assert flags.make_config(settings, data, config)["data"] == config["data"]
    assert sampling_options(config, count=2)["guidance_scale"] == DEFAULT_GUIDANCE


def test_a_resumed_run_takes_a_flag_whose_condition_its_checkpoint_holds(data_dir, tmp_path, capfd):
    assert train.main(tiny(data_dir, tmp_path, "--loss_weight", "min_snr", "--optimizer", "adamw")) == 0
    assert train.main(["--resume", "--output_dir", str(tmp_path), "--data_dir", str(data_dir), "--muon_lr", "1"]) == 2
    assert "--muon_lr changes nothing without --optimizer muon" in capfd.readouterr().err
    again = ["--resume", "--output_dir", str(tmp_path), "--data_dir", str(data_dir), "--epochs", "3"]
    assert train.main([*again, "--snr_gamma", "5"]) == 0
