"""A run with a budget chooses its width and its batch size by the speed that it measures, and says so."""

import pytest

import train
from training import autotune, sizing
from training.sizing import BATCH_SIZE, SMALL_BATCH_SIZE, WIDTHS

SHORT = ["--dataset", "glyphs", "--device", "cpu", "--precision", "fp32", "--sample_interval", "0", "--train_images",
         "2000", "--middle_depth", "1", "--time_emb_dim", "8", "--budget", "10s"]
SLOW, FAST = 1.0, WIDTHS[-1][1] / 10 + 1


@pytest.fixture
def made(data_dir, tmp_path, monkeypatch):
    """made(speed, *flags): the config of a run on a machine that trains any network at this speed, and its trainer."""
    def of_run(speed, *more):
        monkeypatch.setattr(autotune, "images_per_second", lambda *_: speed)
        args, _ = train.parse_args([*SHORT, "--data_dir", str(data_dir), "--output_dir", str(tmp_path), *more])
        run, *_ = train.make_run(args, None, 0.0)
        return run.config, run.trainer
    return of_run


@pytest.mark.parametrize("speed, width, batch_size", [(SLOW, 16, SMALL_BATCH_SIZE), (FAST, 64, BATCH_SIZE)])
def test_a_budget_is_spent_on_what_the_machine_can_do(made, capsys, speed, width, batch_size):
    config, trainer = made(speed)
    assert config["model"]["base_channels"] == config["training"]["base_channels"] == width
    assert config["training"]["batch_size"] == trainer.batch_size == batch_size
    assert f"with {width} channels the budget is enough for about {10 * speed:,.0f} images" in capsys.readouterr().out


def test_flags_are_kept_and_with_both_nothing_is_measured(made, monkeypatch, capsys):
    config, trainer = made(SLOW, "--base_channels", "8")
    assert (config["model"]["base_channels"], trainer.batch_size) == (8, SMALL_BATCH_SIZE)
    config, trainer = made(SLOW, "--batch_size", "100")
    assert (config["model"]["base_channels"], trainer.batch_size) == (16, 100)
    capsys.readouterr()
    monkeypatch.setattr(sizing, "choose", pytest.fail)
    config, trainer = made(SLOW, "--base_channels", "8", "--batch_size", "100")
    assert (config["model"]["base_channels"], trainer.batch_size) == (8, 100)
    assert "the budget is enough" not in capsys.readouterr().out


def test_the_measurement_takes_networks_of_the_width_in_question(data_dir, tmp_path, monkeypatch):
    widths = []

    def speed(model, diffusion, data, conditional, precision, count):
        widths.append(model.config["base_channels"])
        return SLOW if widths[-1] == 32 else FAST
    monkeypatch.setattr(autotune, "images_per_second", speed)
    args, _ = train.parse_args([*SHORT, "--data_dir", str(data_dir), "--output_dir", str(tmp_path)])
    assert train.make_run(args, None, 0.0)[0].config["model"]["base_channels"] == 24
    assert widths == [16, 16, 24, 24, 32, 32]


def test_the_measured_networks_change_no_weight_of_the_run(made):
    one, two = (made(SLOW, "--base_channels", "8", *more)[1].model.state_dict() for more in ([], ["--batch_size", "9"]))
    assert all((one[name] == two[name]).all() for name in one)
