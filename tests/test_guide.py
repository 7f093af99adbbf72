"""GUIDE.md and guide/: what the guide prints is what the code prints, its commands run, its numbers are the code's."""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from documents import broken_links, commands, links
from PIL import Image
from small import pretrained_folder, small_checkpoint

import edit
import evaluate
import train
from checkpoint import load_checkpoint
from data import DATASETS, code_of, load_dataset
from data_sources import drawings
from diffusion import DiffusionProcess
from evaluation.classifier import load_feature_network
from evaluation.metrics import check_image_count
from guide import experiments, figures, measure, quality, results
from models import SimpleUNet
from runtime import checkpoints
from runtime.checkpoints import pretrained_path
from runtime.errors import RunFailed
from samplers import DEFAULT_GUIDANCE, DEFAULT_SAMPLER, DEFAULT_STEPS
from training import sizing
from training.flags import POINT_DEFAULTS, make_parser

DOCUMENTS = ("README.md", "GUIDE.md", "guide/experiments.md")
SNIPPET = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
MODULE = re.compile(r"python -m ((?:guide|data_sources)\.\w+)([^`\n#]*)")
# How commands of the documents are shrunk: flags that are added to those of each script.
TINY_NETWORK = ("--base_channels 8 --time_emb_dim 16 --patch_size 4 --middle_depth 1 --train_images 128 "
                "--batch_size 64 --epochs 1 --sample_interval 0 --precision fp32 --layout nchw --threads 1")
TINY_POINTS = "--train_images 256 --epochs 1 --sample_interval 0 --threads 1"
SHRUNK = {"sample": "--num_images 2 --steps 2 --threads 1", "visualize_diffusion": "--dpi 20", "edit": "--steps 2",
          "export": ""}
# These take long at any size; the tests named here run them.
RUN_ELSEWHERE = {"evaluate": "tests/test_evaluate.py", "distill": "tests/test_distill.py",
                 "doctor": "tests/test_doctor.py", "benchmark": "tests/test_benchmark.py"}
NOT_HERE = {  # commands that need what is not here, and the test of what they do
    "--resume": "tests/test_scripts.py", "--nproc_per_node": "tests/runtime/test_distributed.py",
    "--nnodes": "tests/runtime/test_distributed.py", "--format": "tests/test_export.py", "embedding":
    "tests/test_visualize.py", "FILE": "tests/test_editing.py", "outputs/student": "tests/test_distill.py",
    "cifar10": "tests/test_data.py", "PATH": "tests/test_own_pictures.py", "--help": "tests/test_scripts.py",
    "--lr 1000": "tests/training/test_trainer.py",
}


@pytest.fixture(scope="module")
def guide(pytestconfig):
    return (pytestconfig.rootpath / "GUIDE.md").read_text()


def runnable(root):
    """The commands of the documents that are run here, without what stands in NOT_HERE and RUN_ELSEWHERE."""
    found = set().union(*(commands((root / name).read_text()) for name in DOCUMENTS))
    return sorted((name, arguments) for name, arguments in found if name not in RUN_ELSEWHERE
                  and not any(word in arguments for word in NOT_HERE) and arguments)


def pytest_generate_tests(metafunc):
    if "shown_command" in metafunc.fixturenames:
        found = runnable(metafunc.config.rootpath)
        metafunc.parametrize("shown_command", found, ids=[" ".join(each)[:70] for each in found])


def shrink(name, arguments, data_dir):
    """The flags of a command, so that it takes a second."""
    words = shlex.split(arguments)
    if name == "train":
        if "--budget" in words:
            del words[words.index("--budget"):words.index("--budget") + 2]
        is_points = any(name in words for name in ("moons", "spirals"))
        own_pictures = "outputs/drawings" in words
        more = TINY_POINTS if is_points else TINY_NETWORK + " --dataset glyphs" * (not own_pictures)
    elif name == "edit":
        more = SHRUNK[name] + (" --num_images 2" if words[0] in ("inpaint", "vary") else "")
    else:
        more = SHRUNK[name]
        own_data = {"denoising", "attention", "features", "loss", "schedules", "field"}
        if name == "visualize_diffusion" and not own_data & set(words):
            more += " --dataset glyphs"
        more += " --num_images 2" * bool({"denoising", "attention"} & set(words))
        more += " --num_images 10" * bool({"0-9", "0-3"} & set(words))
    needs_data = name in ("train", "visualize_diffusion") or words[:1] in (["inpaint"], ["vary"], ["invert"])
    return [*words, *more.split(), *(["--data_dir", str(data_dir)] if needs_data else [])]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a trained model of images, one of points, and pretrained ones: none can do more than run."""
    folder = tmp_path_factory.mktemp("work")
    small_checkpoint(folder / "model_final.pt", conditional=True, num_timesteps=120)
    pretrained = pretrained_folder(folder, mnist=folder / "model_final.pt", fashion_mnist=folder / "model_final.pt",
                                   glyphs=folder / "model_final.pt")
    drawings.draw_folder(folder / "outputs/drawings", 128)
    assert train.main(["--dataset", "moons", *TINY_POINTS.split(), "--output_dir", str(folder / "outputs/moons")]) == 0
    (folder / "outputs/own").mkdir()
    shutil.copy(folder / "model_final.pt", folder / "outputs/own/model_final.pt")
    (folder / "model_final.pt").rename(folder / "outputs/model_final.pt")
    return folder, pretrained


def test_the_commands_of_the_documents_run(shown_command, work, data_dir, monkeypatch):
    folder, pretrained = work
    monkeypatch.chdir(folder)
    monkeypatch.setattr(checkpoints, "PRETRAINED", pretrained)
    monkeypatch.setattr("training.trainer.VALIDATION_LOSS_IMAGES", 64)
    monkeypatch.setattr("evaluation.point_plots.MAX_CENTRES", 500)
    name, arguments = shown_command
    newest = folder / "outputs" / ("moons/model_final.pt" if "field" in arguments else "model_final.pt")
    os.utime(newest)  # of those there, the one that a script takes without --checkpoint
    assert importlib.import_module(name).main(shrink(name, arguments, data_dir)) == 0


def test_evaluations_of_the_documents_have_enough_images(root):
    evaluations = [arguments for name in DOCUMENTS for script, arguments in commands((root / name).read_text())
                   if script == "evaluate" and "--num_images" in arguments]
    counts = [evaluate.parse_args(shlex.split(arguments)).num_images for arguments in evaluations]
    assert len(counts) >= 2
    for count in counts:
        check_image_count(count, load_feature_network("mnist", "cpu").head.in_features)


def test_the_modules_of_the_guide_understand_their_commands(root):
    texts = [*((root / name).read_text() for name in DOCUMENTS), measure.__doc__, experiments.__doc__]
    found = {each for text in texts for each in MODULE.findall(text)}
    assert {"guide.measure", "guide.experiments", "data_sources.drawings"} <= {name for name, _ in found}
    for name, arguments in found:
        importlib.import_module(name).parse_args(shlex.split(arguments))


def test_the_snippets_print_what_stands_below_them(guide):
    found, names = SNIPPET.findall(guide), {}
    assert len(found) == guide.count("```python") == guide.count("```text")
    for code, shown in found:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == shown, code


# ---------------------------------------------------------------------------------------------- numbers and documents


def pretrained_levels(name):
    """The numbers that stand for the first two grey levels in a network that comes along."""
    code = code_of(load_checkpoint(pretrained_path(name))["config"])
    return code.encode(torch.tensor([0, 1], dtype=torch.uint8).view(1, 1, 1, 2)).flatten().tolist()


def numbers():
    """Phrases of the guide with numbers that the code defines, made from the code."""
    linear, cosine = (DiffusionProcess(schedule=name) for name in ("linear", "cosine"))
    flags = make_parser("").parse_args([])
    a, s = ({t: rate(t).item() for t in (400, 500)} for rate in (cosine.alpha, cosine.sigma))
    eps = 1 / cosine.alpha(999).item()
    return [
        f"the linear schedule keeps {linear.alpha(500).item():.0%}".replace("%", " %"),
        f"the cosine schedule keeps {a[500]:.0%}".replace("%", " %"),
        f"0.28² = {linear.alphas_cumprod[500].item():.0%}".replace("%", " %"),
        f"schedule leaves {linear.alpha(999).item():.1%} of the amplitude".replace("%", " %"),
        f"The cosine schedule leaves {cosine.alpha(999).item():.5f} of the amplitude",
        f"{round(eps, -4):,.0f} times as large",
        rf"$\alpha_t = {a[500]:.4f}$, $\sigma_t^2 = {s[500] ** 2:.4f}$, $\alpha_s = {a[400]:.4f}$, "
        rf"$\sigma_s^2 = {s[400] ** 2:.4f}$",
        f"$r = (0.4923 / 0.5077) / (0.6460 / 0.3540) = {torch.exp(cosine.log_snr(500) - cosine.log_snr(400)):.4f}$",
        f"becomes {SimpleUNet().config['time_emb_dim']} sines and cosines",
        "black is {:.0f} and the next level is {:.2f}".format(*pretrained_levels("mnist")),
        f"(of points, which are simpler, {POINT_DEFAULTS['label_dropout']:.0%})".replace("%", " %"),
        f"`python evaluate.py` makes {evaluate.parse_args([]).num_images:,} and",
        f"{flags.label_dropout:.0%} of the images (`--label_dropout`)".replace("%", " %"),
        f"The default is {DEFAULT_GUIDANCE}, and {DATASETS['cifar10'].guidance:g} for `cifar10`.",
        f"{DEFAULT_STEPS} steps of a network".replace("10", "Ten"),
        f"({sizing.SMALL_BATCH_SIZE} or {sizing.BATCH_SIZE} by default)",
        f"- `{DEFAULT_SAMPLER}`",
        f"$T - 1 = {flags.timesteps - 1}$",
        f"`{flags.schedule}_schedule` (Nichol and Dhariwal 2021), which is the default of `train.py`",
        f"$T$ is {flags.timesteps:,} in training",
    ]


def test_numbers_of_the_guide_are_those_of_the_code(guide):
    text = " ".join(guide.split())
    assert [phrase for phrase in numbers() if " ".join(phrase.split()) not in text] == []


def test_the_spread_of_the_same_run_is_that_of_the_tables(root):
    same = dict(length="--budget 3m", width="--base_channels 32", depth="--middle_depth 3",
                guidance="--guidance_scale 1.5", images="--train_images 55000")
    found = [row for name, flags in same.items() for row in results.read(f"experiment_digits_{name}")["rows"]
             if row["flags"] == flags]
    assert len(found) == len(same)
    text = " ".join((root / "guide/experiments.md").read_text().split())
    assert all(f"`{flags}`" in text for flags in same.values())
    for name, words in (("frechet_distance", "Their Fréchet distances lie"), ("recall", "their recalls")):
        values = [row[name]["mean"] for row in found]
        assert f"{words} between {min(values):.3f} and {max(values):.3f}" in text


def test_links_and_anchors_resolve(root):
    assert [broken_links(root, name) for name in ("GUIDE.md", "guide/experiments.md")] == [[], []]


@pytest.mark.parametrize("name, tables", [("GUIDE.md", figures.TABLES), ("guide/experiments.md", experiments.TABLES)])
def test_the_tables_are_the_measured_ones(root, name, tables):
    text = (root / name).read_text()
    assert results.fill(text, tables) == text
    assert {table for _, table, _ in results.PLACE.findall(text)} == set(tables)


def test_every_measurement_names_its_command_and_date(root):
    paths = sorted(results.MEASURED.glob("*.json"))
    assert paths
    for path in paths:
        found = json.loads(path.read_text())
        [(module, arguments)] = MODULE.findall(found["command"])
        importlib.import_module(module).parse_args(shlex.split(arguments))
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"]) and "torch" in found["machine"] and found["rows"]


def test_numbers_from_the_benchmarks_have_a_date(guide):
    paragraphs = [part for part in guide.split("\n\n") if re.search(r"benchmarks/(RECORDS|RESULTS)\.md#", part)]
    assert len(paragraphs) >= 2
    for paragraph in paragraphs:
        for item in re.split(r"\n(?=- )", paragraph):
            without_links = re.sub(r"\]\([^)]*\)", "]", item)
            assert "benchmarks/" not in item or re.search(r"\b20\d\d-\d\d-\d\d\b", without_links), item


def test_the_pictures_are_drawn_from_the_committed_figures(root, tmp_path):
    before = (root / "GUIDE.md").read_text()
    assert figures.main(["--folder", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in figures.DRAWINGS}
    assert (root / "GUIDE.md").read_text() == before
    for path in tmp_path.iterdir():
        assert Image.open(path).size == Image.open(results.PICTURES / path.name).size, path.name


def test_pictures_are_shown_and_small(root, guide):
    shown = {link for link in links(guide) if link.startswith("guide/pictures/")}
    assert shown == {f"guide/pictures/{name}.png" for name in figures.DRAWINGS}
    files = [path for path in (root / "guide").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert all(path.stat().st_size < 150_000 for path in files if path.suffix == ".png")
    assert sum(path.stat().st_size for path in files) < 2_000_000


def test_every_chapter_has_an_idea_a_command_a_question_and_an_answer(guide):
    chapters = re.findall(r"^## (\d+) .*?(?=^## )", guide, re.MULTILINE | re.DOTALL)
    assert chapters == [str(number) for number in range(1, 12)]
    texts = re.findall(r"^## \d+ (.*?)(?=^## )", guide, re.MULTILINE | re.DOTALL)
    for number, text in zip(chapters, texts, strict=True):
        assert "**Idea: " in text and f"**Question {number}.**" in text and "![" in text, number
        assert number == "11" or "\n    python " in text, number
    answers = guide[guide.index("## Answers"):]
    assert re.findall(r"^(\d+)\. ", answers, re.MULTILINE) == chapters


# ------------------------------------------------------------------------------------------------------- the modules


def test_the_energy_distance_is_0_for_equal_distributions_and_grows_with_the_distance():
    torch.manual_seed(0)
    a, b = torch.randn(2, 2000, 2).unbind()
    assert abs(quality.energy_distance(a, b)) < 0.01
    shifted = [quality.energy_distance(a, b + shift) for shift in (0.5, 1, 2)]
    assert 0.02 < shifted[0] < shifted[1] < shifted[2]
    one = torch.zeros(50, 1), torch.full((50, 1), 3.0)
    assert quality.energy_distance(*one) == pytest.approx(6)  # 2 · |0 - 3|, and no distance within


def test_the_gap_is_1_for_equal_distributions_and_sees_points_beside_the_shape():
    torch.manual_seed(0)
    made, real, others = torch.rand(3, 2000, 2).mul_(torch.tensor([1.0, 0.01])).unbind()  # a thin line
    assert quality.relative_gap(made, real, others) == pytest.approx(1, abs=0.1)
    assert quality.relative_gap(real, real, others) == 0  # copies of the points that it is compared with
    assert 10 < quality.relative_gap(made + torch.tensor([0.0, 0.02]), real, others) < 16  # 0.015 beside 0.0011
    beside = torch.cat([made[:1900], made[:100] + torch.tensor([0.0, 0.2])])
    assert quality.relative_gap(beside, real, others) > 2 and quality.energy_distance(beside, real) < 0.001
    half = made[made[:, 0] < 0.5]  # what is missing is seen by the other figure only
    assert quality.relative_gap(half, real, others) < 1.1 and quality.energy_distance(half, real) > 0.1


def test_the_figures_of_points_are_those_of_the_asked_class(tmp_path, data_dir):
    data = load_dataset("spirals", "train", data_dir, points=True)
    found = {}
    for label in (0, 1):
        points = data.images[data.labels == label][:2000]
        np.savez(tmp_path / f"{label}.npz", arr_0=points.permute(0, 2, 3, 1).numpy())
        found[label] = quality.point_figures(tmp_path / f"{label}.npz", "spirals", data_dir, label=0)
    assert found[0]["gap"] == pytest.approx(1, abs=0.1) and abs(found[0]["distance"]) < 2
    assert found[1]["gap"] > 5 and found[1]["distance"] > 10


def test_tables_are_filled_between_their_comments():
    text = "a\n<!-- table x -->\nold\n<!-- end -->\nb <!-- table y -->"
    assert results.fill(text, {"x": lambda: "new\n"}) == "a\n<!-- table x -->\nnew\n<!-- end -->\nb <!-- table y -->"
    with pytest.raises(KeyError):
        results.fill(text, {})


def test_a_measurement_is_written_with_command_and_date(tmp_path):
    path = results.write("costs", "python -m guide.measure costs", [dict(a=1)], tmp_path)
    found = results.read("costs", tmp_path)
    assert path.name == "costs.json" and found["rows"] == [{"a": 1}] and "python -m guide.measure costs" in \
        results.source(found)


def test_points_are_learned_and_measured(tmp_path):
    loss, distance = measure.learn_points(tmp_path, "--train_images", "256", seed=0, epochs=1)
    assert 0 < loss < 10 and 0 < distance < 10_000
    with pytest.raises(RunFailed, match=re.escape(f"the training {tmp_path} ended with status 2")):
        measure.learn_points(tmp_path, "--lr", "fast", seed=0, epochs=1)


def test_costs_grow_with_size_and_width():
    rows = {(row["size"], row["patch_size"], row["width"]): row for row in measure.costs(None)}
    small, wide, large = rows[32, 2, 32], rows[32, 2, 64], rows[64, 2, 32]
    assert 3.5 < wide["multiplications"] / small["multiplications"] < 4.1
    assert 3.9 < large["multiplications"] / small["multiplications"] < 4.5
    assert 3.6 < large["kept"] / small["kept"] < 4.1
    assert rows[32, 1, 32]["multiplications"] > 3.5 * small["multiplications"]
    committed = {(r["size"], r["patch_size"], r["width"]): r for r in results.read("costs")["rows"]}
    assert {key: row["parameters"] for key, row in rows.items()} == {k: r["parameters"] for k, r in committed.items()}


def test_an_experiment_runs_writes_and_is_not_run_twice(tmp_path, data_dir, monkeypatch):
    experiment = experiments.EXPERIMENTS["prediction"]._replace(rows=("--prediction v", "--prediction edm"))
    monkeypatch.setitem(experiments.EXPERIMENTS, "prediction", experiment)
    calls, run = [], train.main
    monkeypatch.setattr(train, "main", lambda argv: calls.append(argv) or run(argv))
    argv = ["prediction", "--quick", "--output_dir", str(tmp_path), "--data_dir", str(data_dir)]
    assert experiments.main(argv) == 0 and len(calls) == 2
    rows = experiments.rows_of(experiment, tmp_path / "quick/prediction")
    assert [row["runs"] for row in rows] == [1, 1]
    assert all(row["distance"]["mean"] and row["gap"]["mean"] > 1 and row["images_seen"]["mean"] == 512
               for row in rows)
    assert experiments.main(argv) == 0 and len(calls) == 2  # resumed: nothing is left to do


def test_an_experiment_without_a_figure_keeps_the_table_and_says_so(tmp_path, data_dir, monkeypatch, capsys):
    """As where torchmetrics is missing: the table and the picture of an earlier run stay."""
    def fail(*_):
        raise RunFailed("it failed")
    monkeypatch.setattr(experiments, "carry_out", fail)
    for name in ("write", "fill_file"):
        monkeypatch.setattr(results, name, lambda *_: pytest.fail("it wrote"))
    argv = ["prediction", "digits_width", "--output_dir", str(tmp_path), "--data_dir", str(data_dir)]
    assert experiments.main(argv) == 1
    said = capsys.readouterr()
    assert "it failed" in said.err and said.out.count("failed") == sum(
        len(experiments.EXPERIMENTS[name].rows) for name in argv[:2])


def test_a_quick_experiment_measures_as_many_images_as_figures_need():
    check_image_count(experiments.QUICK_COUNT, load_feature_network("mnist").head.in_features)


def test_the_pictures_of_edits_and_symptoms_are_made_by_the_commands_of_the_guide(root):
    text = (root / "GUIDE.md").read_text()
    assert measure.EDITS.keys() == figures.EDITS.keys()
    assert {*measure.FAILURES, *measure.MISUSES} == figures.SYMPTOMS.keys()
    assert f"python train.py {measure.SHORT_RUN}\n" in text
    for flags in (*measure.FAILURES.values(), *measure.MISUSES.values()):
        assert flags in text
    for name, flags in measure.EDITS.items():
        assert f"edit.py {name} --checkpoint mnist {flags.partition(' --num_images')[0]}\n" in text


def test_a_picture_that_a_script_cannot_make_ends_the_measurement(tmp_path):
    with pytest.raises(RunFailed, match=r"edit.py vary .* status 2"):
        measure.picture(edit, "vary --checkpoint mnist --strength 7", tmp_path / "x.png")


def test_the_table_of_an_experiment_is_empty_until_it_is_measured(tmp_path):
    assert experiments.table_of("width", tmp_path) == ""
    rows = [dict(flags="--base_channels 16", runs=3, distance=dict(mean=12.34, spread=0.5),
                 gap=dict(mean=1.5, spread=None), seconds=dict(mean=8.0, spread=1)),
            dict(flags="--base_channels 32", runs=0)]
    results.write("experiment_width", "python -m guide.experiments width", rows, tmp_path)
    text = experiments.table_of("width", tmp_path)
    assert "| `--base_channels 16` | 12.34 ± 0.50 | 1.50 | 8 |" in text
    assert "| `--base_channels 32` | failed | failed | failed |" in text
    assert "python -m guide.experiments width" in text


def test_every_experiment_stands_on_the_page(root):
    text = (root / "guide/experiments.md").read_text()
    for name, experiment in experiments.EXPERIMENTS.items():
        assert f"python -m guide.experiments {name}\n" in text
        parser = importlib.import_module("sample" if experiment.of_sampling else "train")
        for row in experiment.rows:
            parser.parse_args([*row.split(), *([] if experiment.of_sampling else experiment.common.split())])
    assert text.count("**What to expect.**") == text.count("**Question.**") == len(experiments.EXPERIMENTS)
