"""The network: shapes, what it depends on, what it refuses, and that it can learn."""

import json

import numpy as np
import pytest
import torch
from harness import tiny
from small import small_checkpoint
from torch import nn
from torch.testing import assert_close

import sample
import train
from checkpoint import FIELDS, load_checkpoint, load_model, save_checkpoint
from diffusion import DiffusionProcess
from learned_variance import LearnedVariance
from models import create_model
from models.layers import ACTIVATIONS, Attention, ResidualBlock, TimeEmbedding, normalisation
from models.unet import SimpleUNet

SMALL = dict(base_channels=8, time_emb_dim=16)


def filled(**config):
    """A network whose zero-initialised layers hold small random numbers, so that every part acts."""
    torch.manual_seed(0)
    model = create_model(**{**SMALL, **config})
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model


# ------------------------------------------------------------------------------------------------------------ pieces


@pytest.mark.parametrize("size", [16, 128, 256])
def test_time_embedding_tells_all_times_apart(size):
    sinusoids = TimeEmbedding(size).sinusoids(torch.arange(1000))
    assert sinusoids.shape == (1000, size) and sinusoids.abs().max() <= 1
    distances = torch.cdist(sinusoids.double(), sinusoids.double()) + 10 * torch.eye(1000)
    assert distances.min() > 0.5  # neighbours differ most where the frequency is 1: |e^i - 1| = 0.96


def test_time_embedding_puts_real_times_between_whole_ones():
    embedding, t = TimeEmbedding(256), torch.arange(999)
    at = {part: embedding.sinusoids(t + part).double() for part in (0, 0.5, 1)}
    step, left, right = (at[1] - at[0]).norm(dim=1), (at[0.5] - at[0]).norm(dim=1), (at[1] - at[0.5]).norm(dim=1)
    assert (left < 0.6 * step).all() and (right < 0.6 * step).all()


def test_time_embedding_takes_whole_and_real_times_alike():
    embedding = TimeEmbedding(32)
    t = torch.tensor([0, 5, 999])
    for other in (t.float(), t.double()):
        assert_close(embedding(other), embedding(t), rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, 1, 7, -2])
def test_time_embedding_refuses_odd_sizes(size):
    with pytest.raises(ValueError, match=f"even.* not {size}"):
        TimeEmbedding(size)


@pytest.mark.parametrize("channels", [1, 3, 8, 12, 20, 64, 96, 128])
def test_normalisation_fits_any_number_of_channels(channels):
    y = normalisation(channels)(3 * torch.randn(2, channels, 4, 4) + 5)
    assert_close(y.mean(), torch.tensor(0.0), rtol=0, atol=1e-4)
    assert_close(y.var(correction=0), torch.tensor(1.0), rtol=0, atol=1e-3)


def test_blocks_start_as_the_identity():
    x, emb = torch.randn(2, 16, 4, 4), torch.randn(2, 8)
    assert_close(ResidualBlock(16, 16, 8)(x, emb), x, rtol=0, atol=0)
    assert_close(Attention(16)(x), x, rtol=0, atol=0)


def test_attention_is_that_of_vaswani_et_al():
    torch.manual_seed(0)
    layer, x = Attention(64, head_channels=32).double(), torch.randn(2, 64, 3, 5).double()
    nn.init.normal_(layer.project.weight)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)                           # (B, C, H·W)
    heads = []
    for part in (slice(0, 32), slice(32, 64)):
        weights = torch.softmax(q[:, part].mT @ k[:, part] / 32**0.5, dim=-1)
        heads.append(v[:, part] @ weights.mT)
    expected = x + layer.project(torch.cat(heads, dim=1).unflatten(2, (3, 5)))
    assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_on_cuda_attention_gets_tensors_that_flash_attention_takes(monkeypatch):
    """It wants the channels of a head side by side. On the CPU the strides, and so the bits of results, stay."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    attend, strides = torch.nn.functional.scaled_dot_product_attention, []

    def watch(*parts):
        strides.append([part.stride(-1) for part in parts])
        return attend(*parts)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    for device in ("cuda", "cpu"):
        with FakeTensorMode(), torch.device(device):  # no values, and no GPU
            Attention(96)(torch.empty(2, 96, 7, 7))
    assert strides == [[1, 1, 1], [49, 49, 49]]


def test_checkpointing_leaves_the_random_numbers_alone(monkeypatch):
    """To save their state would stop a CUDA graph from being captured in older versions of torch."""
    model = create_model(base_channels=8, time_emb_dim=8, patch_size=2, checkpointing=True)
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("the state is saved"))
    model(torch.zeros(2, 1, 8, 8), torch.zeros(2)).sum().backward()


# ------------------------------------------------------------------------------------------------------------ dropout


def test_dropout_zeroes_its_share_before_the_last_convolution_and_only_in_training():
    block, inputs = ResidualBlock(8, 8, 4, dropout=0.25), []
    block.conv2.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    x, emb = torch.randn(64, 8, 6, 6), torch.randn(64, 4)
    block.eval()(x, emb)
    block.train()(x, emb)
    whole, dropped = inputs
    kept = dropped != 0
    assert 0.23 < 1 - kept.float().mean() < 0.27
    assert_close(dropped[kept], whole[kept] / 0.75)


def test_dropout_is_in_every_block_and_not_in_the_config():
    model = create_model(**SMALL, depth=2, dropout=0.3)
    assert {block.dropout.p for block in model.modules() if isinstance(block, ResidualBlock)} == {0.3}
    assert "dropout" not in model.config
    assert {layer.p for layer in create_model(**model.config).modules() if isinstance(layer, nn.Dropout)} == {0.0}


def test_checkpointing_draws_the_same_dropout_in_both_passes():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = create_model(base_channels=8, time_emb_dim=8, patch_size=2, checkpointing=checkpointing, dropout=0.5)
        for weight in model.parameters():
            nn.init.normal_(weight)  # some are zero at first, and gradients with them
        torch.manual_seed(1)
        model(torch.ones(4, 1, 8, 8), torch.arange(4)).square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(plain, recomputed)


# ------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("config, shape", [
    (dict(), (1, 28, 28)),
    (dict(), (1, 16, 24)),
    (dict(image_channels=3), (3, 32, 32)),
    (dict(patch_size=2), (1, 28, 28)),
    (dict(patch_size=4), (1, 28, 28)),
    (dict(patch_size=4, image_channels=3, attention=()), (3, 32, 32)),
    (dict(depth=2), (1, 28, 28)),
    (dict(depth=3, patch_size=2, attention=(2, 4)), (1, 8, 8)),
    (dict(channel_mults=(1,)), (1, 5, 7)),
    (dict(channel_mults=(1, 2, 3, 4), attention=(8,)), (1, 16, 16)),
    (dict(channel_mults=(2, 1)), (1, 6, 6)),
    (dict(attention=(1, 2, 4)), (1, 8, 8)),
    (dict(attention=()), (1, 8, 8)),
    (dict(base_channels=5), (1, 8, 8)),
    (dict(base_channels=48), (1, 8, 8)),
    *((dict(activation=name), (1, 8, 8)) for name in ACTIVATIONS),
], ids=str)
@pytest.mark.parametrize("num_classes", [None, 4])
def test_the_output_has_the_shape_of_the_input(config, shape, num_classes):
    model, x, t = filled(**config, num_classes=num_classes), torch.randn(2, *shape), torch.tensor([0, 500])
    y = model(x, t)
    assert y.shape == x.shape and y.isfinite().all() and y.abs().max() > 0
    if num_classes:
        assert model(x, t, torch.tensor([0, 4])).shape == x.shape


@pytest.mark.parametrize("config, shape", [(dict(), (1, 8, 8)), (dict(image_channels=3, patch_size=2), (3, 8, 8)),
                                           (dict(patch_size=4, num_classes=4), (1, 8, 8))], ids=str)
def test_a_network_that_learns_variances_has_them_beside_its_prediction(config, shape):
    model, x, t = filled(**config, learn_variance=True), torch.randn(2, *shape), torch.tensor([0, 500])
    prediction, v = model(x, t).chunk(2, dim=1)
    assert prediction.shape == v.shape == x.shape and (prediction - v).abs().max() > 1e-3
    again = filled(**config, learn_variance=True, checkpointing=True)
    assert_close(again(x, t), model(x, t), rtol=0, atol=0)


def test_the_defaults_have_about_two_million_parameters():
    assert 1.5e6 < sum(p.numel() for p in SimpleUNet().parameters()) < 2.5e6


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_the_output_is_zero_at_the_start(patch_size):
    model = create_model(**SMALL, patch_size=patch_size)
    assert model(torch.randn(2, 1, 8, 8), torch.tensor([3, 900])).abs().max() == 0


def test_there_is_no_transposed_convolution():
    assert not any(isinstance(layer, nn.ConvTranspose2d) for layer in SimpleUNet().modules())


@pytest.mark.parametrize("attention, count", [((), 0), ((1,), 2), ((2,), 2), ((4,), 1), ((2, 4), 3)])
def test_attention_stands_where_it_is_asked_for(attention, count):
    model = create_model(**SMALL, attention=attention, depth=2)  # one in each stage there, on the way down and up
    assert sum(isinstance(layer, Attention) for layer in model.modules()) == count


# ------------------------------------------------------------------------------------------------- what it depends on


def test_the_output_depends_on_image_time_and_label():
    model, x, t = filled(num_classes=4), torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 900])
    labels = torch.tensor([0, 1, 2])
    y = model(x, t, labels)
    for other in (model(x + 0.1, t, labels), model(x, t + 50, labels), model(x, t, labels + 1)):
        assert ((other - y).flatten(1).abs().amax(1) > 1e-4).all()


def test_images_of_a_batch_do_not_mix():
    model, x, t = filled(num_classes=4).double(), torch.randn(3, 1, 8, 8).double(), torch.tensor([1, 2, 900])
    one_by_one = [model(x[i:i + 1], t[i:i + 1], t[i:i + 1] % 4) for i in range(3)]
    assert_close(model(x, t, t % 4), torch.cat(one_by_one), rtol=1e-9, atol=1e-9)


def test_no_label_is_the_label_num_classes():
    model, x, t = filled(num_classes=4), torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    assert_close(model(x, t), model(x, t, torch.tensor([4, 4])), rtol=0, atol=0)
    assert_close(model.embed(t.double()), model.embed(t, torch.tensor([4, 4])), rtol=0, atol=0)


@pytest.mark.parametrize("config", [dict(), dict(patch_size=4), dict(num_classes=4, depth=2)], ids=str)
def test_every_parameter_learns(config):
    model = filled(**config)
    labels = torch.tensor([0, 1, 2, 3, 4]) if "num_classes" in config else None
    args = (torch.randn(5, 1, 8, 8), torch.arange(5) * 200) + (() if labels is None else (labels,))
    (model(*args) - torch.randn(5, 1, 8, 8)).square().mean().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


# ------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("config", [dict(), dict(patch_size=2, num_classes=10, depth=2, attention=(2,)),
                                    dict(image_channels=3, channel_mults=(1, 3), activation="mish"),
                                    dict(learn_variance=True)], ids=str)
def test_the_config_rebuilds_the_model_through_json(config):
    model = create_model(**SMALL, **config)
    again = create_model(**json.loads(json.dumps(model.config)))
    assert again.config == model.config
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (model, again)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("config, words", [
    (dict(chanels=3), ["chanels"]),
    (dict(image_channels=2), ["image_channels", "1 or 3", "2"]),
    (dict(patch_size=3), ["patch_size", "1, 2 or 4", "3"]),
    (dict(activation="tanh"), ["activation", "tanh", *ACTIVATIONS]),
    (dict(base_channels=0), ["base_channels", "0"]),
    (dict(depth=0), ["depth", "0"]),
    (dict(num_classes=0), ["num_classes", "0"]),
    (dict(time_emb_dim=15), ["time_emb_dim", "15"]),
    (dict(channel_mults=()), ["channel_mults", "()"]),
    (dict(channel_mults=(1, 0)), ["channel_mults", "(1, 0)"]),
], ids=str)
def test_impossible_configs_are_named(config, words):
    with pytest.raises(ValueError) as caught:
        create_model(**{**SMALL, **config})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("config, size, divisor", [(dict(), 30, 4), (dict(patch_size=2), 30, 4),
                                                   (dict(patch_size=4), 30, 4), (dict(channel_mults=(1,) * 5), 28, 16)])
def test_a_size_that_cannot_be_halved_is_refused_with_the_divisor(config, size, divisor):
    model = create_model(**SMALL, **config)
    assert model.divisor == divisor
    for shape in ((size, 32), (32, size)):
        with pytest.raises(ValueError, match=rf"divisible by {divisor}\b.*{shape[0]}×{shape[1]}"):
            model(torch.zeros(1, 1, *shape), torch.zeros(1))


@pytest.mark.parametrize("args, words", [
    ((torch.zeros(2, 3, 8, 8), torch.zeros(2)), ["(B, 1, H, W)", "(2, 3, 8, 8)"]),
    ((torch.zeros(1, 8, 8), torch.zeros(1)), ["(B, 1, H, W)", "(1, 8, 8)"]),
    ((torch.zeros(2, 1, 8, 8), torch.zeros(1)), ["2 images", "(1,)"]),
    ((torch.zeros(2, 1, 8, 8), torch.tensor(0)), ["2 images", "()"]),
    ((torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2).long()), ["without labels", "num_classes=None"]),
])
def test_wrong_inputs_are_refused_with_both_sides_named(args, words):
    with pytest.raises(ValueError) as caught:
        create_model(**SMALL)(*args)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("labels", [torch.tensor([1]), torch.tensor([[1], [2]])], ids=["(1,)", "(2, 1)"])
def test_labels_of_another_shape_are_refused_not_broadcast(labels):
    model = create_model(**SMALL, num_classes=4)
    with pytest.raises(ValueError, match="label"):
        model(torch.zeros(2, 1, 8, 8), torch.zeros(2), labels)


@pytest.mark.parametrize("labels", [[0, 5], [-1, 0]], ids=str)
def test_labels_out_of_range_are_refused(labels):
    model = create_model(**SMALL, num_classes=4)
    with pytest.raises((ValueError, IndexError)):
        model(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor(labels))


# -------------------------------------------------------------------------------------------------------- it can learn


@pytest.mark.parametrize("prediction", ["eps", "edm"])
def test_it_can_learn_one_batch_by_heart(prediction):
    torch.manual_seed(0)
    process, model = DiffusionProcess(100, "cosine", prediction=prediction), create_model(base_channels=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x_0, noise, t = torch.rand(8, 1, 8, 8) * 2 - 1, torch.randn(8, 1, 8, 8), torch.arange(8) * 14
    first = process.loss(model, x_0, t, noise).item()
    for _ in range(200):
        loss = process.loss(model, x_0, t, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.05:
            break
    assert first > 0.5 and loss.item() < 0.05


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "edm"])
def test_it_can_learn_that_constant_images_leave_nothing_uncertain(prediction):
    torch.manual_seed(0)
    process, model = LearnedVariance(10, "cosine", prediction=prediction), create_model(**SMALL, learn_variance=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x_0, noise, t = torch.full((9, 1, 8, 8), 0.5), torch.randn(9, 1, 8, 8), torch.arange(1, 10)
    learned = lambda x, t: torch.cat([process.target(x_0, noise, t), model(x, t)[:, 1:]], dim=1)  # noqa: E731
    losses = []
    for _ in range(40):
        losses.append(process.loss(learned, x_0, t, noise))  # the prediction is perfect: the bound alone is left
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 20
    v = process.predict_both(model, process.q_sample(x_0, t, noise), t)[1]
    assert_close(v.mean(), torch.tensor(-1.0), rtol=0, atol=0.2)  # the posterior's variance; it began at 0


# --------------------------------------------------------------------------- learned variances, from the flag to images


@pytest.fixture
def little(monkeypatch):
    """Validation and samples of a run prove no more with many images."""
    monkeypatch.setattr("training.trainer.VALIDATION_LOSS_IMAGES", 64)


def call(script, *argv):
    assert script.main([*map(str, argv)]) == 0


def drawn(checkpoint, output, *more):
    call(sample, "--checkpoint", checkpoint, "--num_images", 4, "--device", "cpu", "--precision", "fp32", "--steps", 5,
         "--output", output, *more)
    with np.load(output) as file:
        return file["arr_0"]


def test_train_and_sample_with_learned_variances(data_dir, tmp_path, little, capsys):
    argv = [*tiny(data_dir, tmp_path, "--learn_variance", "--conditional", "--checkpointing", "--sample_interval", 0,
                  "--timesteps", 20)]
    call(train, *argv, "--epochs", 1)
    call(train, "--output_dir", tmp_path, "--data_dir", data_dir, "--resume", "--epochs", 2, "--device", "cpu")
    model, _, saved = load_model(tmp_path / "model_final.pt")
    assert model.learn_variance and saved["config"]["model"]["learn_variance"] and saved["epoch"] == 2
    v = model(torch.randn(2, 1, 28, 28), torch.tensor([3.0, 12.0]))[:, 1:]
    assert v.abs().max() > 1e-4  # it began at zero
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite([record["loss"], record["val_loss"]]).all() for record in records)
    for options in ([], ["--label", "3", "--guidance_scale", 2]):
        images = [drawn(tmp_path / "model_final.pt", tmp_path / "x.npz", "--sampler", sampler, *options)
                  for sampler in ("ddpm", "dpmpp_2m")]
        assert all(each.shape == (4, 28, 28, 1) and each.std() > 1 for each in images)
    assert train.main([*argv, "--no-learn_variance", "--resume", "--epochs", "3"]) == 2
    assert "learn_variance True, the flags ask for False" in capsys.readouterr().err


def forget(path):
    """Make a checkpoint one from before learned variances."""
    saved = load_checkpoint(path)
    del saved["config"]["model"]["learn_variance"]
    saved["config"]["training"].pop("learn_variance", None)
    save_checkpoint(path, **{name: saved[name] for name in FIELDS})


def test_a_checkpoint_from_before_learned_variances_makes_the_same_images(tmp_path):
    path = small_checkpoint(tmp_path / "model.pt")
    before = drawn(path, tmp_path / "x.npz", "--sampler", "ddpm")
    forget(path)
    assert not load_model(path)[0].learn_variance
    assert np.array_equal(drawn(path, tmp_path / "x.npz", "--sampler", "ddpm"), before)


def test_a_run_from_before_learned_variances_goes_on(data_dir, tmp_path, little):
    call(train, *tiny(data_dir, tmp_path, "--epochs", 1, "--sample_interval", 0, "--save_interval", 0))
    forget(tmp_path / "model_final.pt")
    call(train, "--output_dir", tmp_path, "--data_dir", data_dir, "--resume", "--epochs", 2, "--device", "cpu")
    saved = load_checkpoint(tmp_path / "model_final.pt")
    assert saved["epoch"] == 2 and saved["config"]["model"]["learn_variance"] is False


def test_a_learn_variance_that_does_not_fit_the_weights_is_refused(tmp_path):
    path = small_checkpoint(tmp_path / "model.pt")
    saved = load_checkpoint(path)
    saved["config"]["model"]["learn_variance"] = True
    save_checkpoint(path, **{name: saved[name] for name in FIELDS})
    with pytest.raises(ValueError, match="head"):
        load_model(path)
