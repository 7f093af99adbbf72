"""What the page computes is what Python computes: networks, noise, samplers, level codes."""

import itertools

import pytest
import torch
from small import small_model
from torch.testing import assert_close

import diffusion
from data import LevelCode, histogram_code
from editing import inpaint, slerp
from learned_variance import create_process
from models.layers import ACTIVATIONS
from samplers import SAMPLERS, SPACINGS, final_image, generate, guide, image_noise, spaced_timesteps, uniform_timesteps
from web import page as page_of
from web.page import PRODUCT, page_model

ARCHITECTURES = {  # by name: the network, and the height and width of its images
    "base": (dict(), (28, 28)),
    "patches of 1": (dict(patch_size=1, num_classes=3), (16, 24)),
    "patches of 4": (dict(patch_size=4, base_channels=20, num_classes=10), (32, 32)),
    "colours, learned variances": (dict(image_channels=3, learn_variance=True, num_classes=10), (16, 16)),
    "deep, without attention": (dict(attention=[], channel_mults=[1, 2, 3], depth=2, activation="relu"), (16, 32)),
    "attention everywhere": (dict(attention=[2, 4], middle_depth=3, base_channels=12, activation="gelu"), (28, 28)),
    "wide, one resolution": (dict(base_channels=64, channel_mults=[1], activation="mish", num_classes=4), (16, 16)),
    "odd widths": (dict(base_channels=5, time_emb_dim=6, patch_size=1, channel_mults=[1, 1, 3]), (12, 12)),
    "colours, patches of 4": (dict(image_channels=3, patch_size=4, base_channels=33, num_classes=2), (32, 32)),
}
PREDICTIONS = ("edm", "v", "eps", "x0")


def network_and_process(name, prediction, **config):
    """A network by its name in ARCHITECTURES, its process, and a config like that of a checkpoint."""
    architecture, (height, width) = ARCHITECTURES[name]
    model = small_model(**architecture)
    if prediction == "eps":
        config["beta_end"] = 0.005  # x_0_hat is divided by alpha: where it is small, errors of rounding grow
    process = create_process(model.learn_variance, num_timesteps=100, prediction=prediction,
                             data_std=0.5 if prediction == "edm" else 1.0, **config)
    names = [str(i) for i in range(model.num_classes or 1)]
    return model, process, dict(model=model.config, diffusion=process.config, training={}, data=dict(
        dataset="small", shape=[model.image_channels, height, width], class_names=names))


def draw(model, process, config, job):
    """The image (C, H, W) that Python makes for a job of the page."""
    labels = None if job["label"] is None else torch.tensor([job["label"]])
    batches = generate(model, process, config["data"]["shape"], [0], seed=job["seed"], sampler=job["sampler"],
                       steps=job["steps"], labels=labels, guidance_scale=job["guidance"])
    return final_image(next(batches)[1])[0]


def drawn(opened, jobs, model=0):
    """The images (N, numbers) that the page makes for jobs."""
    return torch.tensor(opened.page.evaluate("""async ([model, jobs]) => {
        const images = [];
        await app.engine.ask("test", "many", {model, jobs}, ({x}) => images.push([...x]));
        return images;
    }""", [model, jobs]))


def jobs_for(model, samplers):
    """A job for each sampler, with and without labels and guidance where the network has labels."""
    classes = model.num_classes
    return [dict(sampler=sampler, steps=3 + i, seed=i, label=i % classes if classes and i else None,
                 guidance=(1, 2.5, 0)[i % 3] if classes and i else 1) for i, sampler in enumerate(samplers)]


@pytest.mark.parametrize("name, prediction", [*zip(ARCHITECTURES, itertools.cycle(PREDICTIONS), strict=False)])
def test_images_are_those_of_samplers_py(name, prediction, opened):
    """1e-4 in float32; in half precision, 1e-4 from the network with rounded weights. With and without WebAssembly."""
    model, process, config = network_and_process(name, prediction)
    exact = page_model("x.pt", model, process, config, "float32")
    jobs = jobs_for(model, exact.entry["samplers"])
    expected = torch.stack([draw(model, process, config, job) for job in jobs]).flatten(1)
    assert expected.std() > 0.1
    rounded = page_model("x.pt", model, process, config, "float16")
    page = opened([exact, rounded], f"#steps=1&sampler={jobs[0]['sampler']}")
    page.made()
    assert_close(drawn(page, jobs), expected, rtol=0, atol=1e-4)
    load = """async ([from, to, wasm]) => app.engine.ask("load", "load", {model: to, entry: app.entries[from],
        weights: $(`weights-${from}`).textContent, wasm: wasm ?? $("multiply").textContent})"""
    page.page.evaluate(load, [0, 2, "AAAA"])  # nothing that this browser can run, as without SIMD
    assert_close(drawn(page, jobs, 2), expected, rtol=0, atol=1e-4)
    page.page.evaluate(load, [1, 1, None])
    model.load_state_dict({key: weight.half().float() for key, weight in model.state_dict().items()})
    expected = torch.stack([draw(model, process, config, job) for job in jobs]).flatten(1)
    assert_close(drawn(page, jobs, 1), expected, rtol=0, atol=1e-4)


def test_the_end_of_the_way_to_another_seed_is_the_image_of_that_seed(opened):
    """Also where the steps draw noise of their own."""
    model, process, config = network_and_process("patches of 4", "v")
    page = opened([page_model("x.pt", model, process, config, "float32")], "#steps=1")
    page.made()
    for sampler in ("ddpm", "consistency", "ddim"):
        job = dict(sampler=sampler, steps=3, label=1, guidance=1, seed=5)
        image, end, middle = drawn(page, [job, dict(job, seed=2, towards=5, share=1),
                                          dict(job, seed=2, towards=5, share=0.5)])
        assert_close(end, image, rtol=0, atol=1e-4)
        assert (middle - image).abs().max() > 0.1


@pytest.mark.parametrize("config", [dict(schedule="cosine"), dict(zero_terminal_snr=True),
                                    dict(data_std=0.3, timestep_sampling="lognormal", low_share=0.05)])
def test_schedules_and_times_are_those_of_python(config, opened):
    config = dict(prediction="edm", **config)
    model = small_model()
    process = create_process(False, num_timesteps=60, **config)
    data = dict(dataset="small", shape=[1, 28, 28], class_names=["0"])
    page = opened([page_model("x.pt", model, process, dict(model=model.config, diffusion=process.config, training={},
                                                           data=data))], "#steps=1")
    page.made()
    times = [-1, 0, 0.25, 17.5, 58, 58.5, 59]
    found = torch.tensor(page.page.evaluate("times => times.map((t) => [app.process.alpha(t), app.process.sigma(t)])",
                                            times), dtype=torch.float64)
    assert_close(found, torch.tensor([[process.alpha(t), process.sigma(t)] for t in times], dtype=torch.float64))
    for spacing, steps in itertools.product(("uniform", "karras"), (1, 2, 7, 60)):
        found = page.page.evaluate("([steps, spacing]) => spacedTimesteps(app.process, steps, spacing, "
                                   "app.entry.noise_range)", [steps, spacing])
        expected = torch.tensor(spaced_timesteps(process, steps, spacing), dtype=torch.float64)
        assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-6, atol=1e-6)


def test_every_row_of_pythons_tables_is_in_the_page(opened):
    model, process, config = network_and_process("base", "edm")
    page = opened([page_model("x.pt", model, process, config)], "#steps=1")
    page.made()
    for name, table in dict(SAMPLERS=SAMPLERS, PREDICTIONS=diffusion.PREDICTIONS, ACTIVATIONS=ACTIVATIONS).items():
        assert page.page.evaluate(f"Object.keys({name})") == list(table)
    assert {row.spacing for row in SAMPLERS.values()} <= {"uniform", "karras"} <= set(SPACINGS)


def test_noise_is_numpys(opened):
    """Bit for bit, but for the last digit of one number in 4,000, far out in the tail."""
    model, process, config = network_and_process("base", "edm")
    page = opened([page_model("x.pt", model, process, config)], "#steps=1")
    page.made()
    seeds = [(0, 0), (0, 1), (1, 0), (12345, 9), (2**32 + 7, 3), (2**53 - 1, 2**31)]
    found = torch.tensor(page.page.evaluate("""seeds => seeds.map(([seed, k]) => {
        const randn = imageNoise(seed, k, 20000);
        return [...randn(), ...randn()];
    })""", seeds))
    expected = torch.cat([torch.cat([randn(), randn()], 1) for randn in (
        image_noise([k], seed, (20000,)) for seed, k in seeds)])
    assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found != expected).sum() < 40 and expected.abs().max() > 4


def test_noise_that_is_kept_is_the_same_noise(opened):
    model, process, config = network_and_process("base", "edm")
    page = opened([page_model("x.pt", model, process, config)], "#steps=1")
    page.made()
    assert page.page.evaluate("""[...Array(30).keys(), 0, 29, 29].every((seed) => {
        const kept = noiseOf(seed, 50), fresh = imageNoise(seed, 0, 50);
        return [1, 2, 3].every(() => kept().join() === fresh().join()) && streams.size <= STREAMS;
    })""")


@pytest.mark.parametrize("code", [LevelCode(torch.arange(256) / 127.5 - 1), histogram_code(
    (torch.arange(256).repeat(4) * torch.tensor([0, 0, 0, 1]).repeat_interleave(256)).to(torch.uint8))])
def test_levels_are_those_of_the_code(code, opened):
    model, process, config = network_and_process("base", "edm")
    config["data"]["level_code"] = code.points.tolist()
    page = opened([page_model("x.pt", model, process, config)], "#steps=1")
    page.made()
    levels = torch.arange(256, dtype=torch.uint8)
    x = torch.cat([torch.linspace(-1.5, 1.5, 3001), code.encode(levels), code.edges.float()])
    decoded, encoded = page.page.evaluate("""x => [[...app.code.decode(new Float32Array(x))],
        [...app.code.encode(Uint8Array.from({length: 256}, (_, i) => i))]]""", x.tolist())
    assert decoded == code.decode(x).tolist()
    assert_close(torch.tensor(encoded), code.encode(levels), rtol=0, atol=0)


def test_guesses_and_completions_are_those_of_python(opened):
    model, process, config = network_and_process("patches of 1", "v")
    shape = config["data"]["shape"]
    page = opened([page_model("x.pt", model, process, config, "float32")], "#steps=1")
    page.made()
    x_0, mask = torch.rand(1, *shape) * 2 - 1, torch.zeros(1, *shape)
    mask[..., 6:] = 1
    x, x_0_hat = page.page.evaluate("""async (x0) => {
        let part;
        await app.engine.ask("test", "guess", {model: 0, x0: new Float32Array(x0), t: 40, label: 1, seed: 5},
                             (got) => { part = got; });
        return [[...part.x], [...part.x0]];
    }""", x_0.flatten().tolist())
    x_t = process.q_sample(x_0, 40, image_noise([0], 5, shape)())
    assert_close(torch.tensor(x), x_t.flatten(), rtol=0, atol=1e-5)
    expected = process.denoiser(model, torch.tensor([1]))(x_t, 40)
    assert_close(torch.tensor(x_0_hat), expected.flatten(), rtol=0, atol=1e-4)
    found = page.page.evaluate("""async ([known, mask]) => {
        const images = [];
        await app.engine.ask("test", "complete", {model: 0, known: new Float32Array(known), mask, label: 2,
            guidance: 1.5, seed: 3, steps: 4, resample: 2, count: 2}, ({index, x}) => { images[index] = [...x]; });
        return images;
    }""", [x_0.flatten().tolist(), mask.flatten().tolist()])
    randn = image_noise(range(2), 3, shape)
    filled = final_image(inpaint(guide(process, model, torch.tensor([2, 2]), 1.5), randn(), uniform_timesteps(100, 4),
                                 process, known=x_0, mask=mask, resample=2, randn=lambda _: randn()))
    assert_close(torch.tensor(found), filled.flatten(1), rtol=0, atol=1e-4)
    between = page.page.evaluate("""[...slerp(imageNoise(1, 0, 384), imageNoise(2, 0, 384), 0.3)]""".replace(
        "384)", "384)()"))
    ends = [image_noise([0], seed, shape)() for seed in (1, 2)]
    assert_close(torch.tensor(between), slerp(*ends, 0.3).flatten(), rtol=0, atol=1e-5)


def test_the_matrix_product_is_what_its_source_says():
    wasmtime = pytest.importorskip("wasmtime", reason="wasmtime is missing: pip install -r requirements-web.txt")
    assert bytes(wasmtime.wat2wasm(PRODUCT.with_suffix(".wat").read_text())) == PRODUCT.read_bytes()


def test_the_page_holds_all_scripts():
    assert {f"{part}.js" for part in page_of.SCRIPT} == {path.name for path in page_of.FOLDER.glob("*.js")}
