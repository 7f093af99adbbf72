"""Pictures of a trained network: attention, activations, embeddings of time and images, and the error against t.

Forward hooks read the network's activations and change nothing. A `Frame` is one step of a trajectory: (t, x_t,
x_0_hat).
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import LINEAR, ImageData, LevelCode, to_uint8
from diffusion import DiffusionProcess
from evaluation.gaussian import bound_images, gaussian_bound
from models.layers import Attention
from runtime.errors import UserError
from utils import generator_for, plain_log_ticks, plain_text, pyplot, time_titles

Frame = tuple[float, Tensor, Tensor]

ERROR_IMAGES, ERROR_TIMES, GAUSSIAN_IMAGES = 512, 25, 10_000
EMBEDDED_IMAGES, EMBEDDED_TIMES = 500, 200


def capture_outputs(model, diffusion: DiffusionProcess, modules: dict[str, nn.Module], x_t: Tensor, t: Tensor,
             labels: Tensor | None = None) -> dict[str, Tensor]:
    """The outputs of `modules` of the model, by name, for x_t (B, C, H, W) at the times t (B,), with labels (B,)."""
    outputs = {}

    def keep(name: str):
        return lambda module, inputs, output: outputs.update({name: output.float().cpu()})

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            inputs = (part if part is None else part.to(diffusion.device) for part in (x_t, t, labels))
            diffusion.predict(model, *inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def stack_frames(frames: Sequence[Frame], labels: Tensor | None,
            count: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x_t, t, labels) of the first `count` images (default: all) of all frames, as one batch in frame order."""
    x_t = torch.stack([x[:count] for _, x, _ in frames])                                    # (frames, B, C, H, W)
    t = torch.tensor([t for t, _, _ in frames], dtype=torch.float32).repeat_interleave(x_t.shape[1])
    return x_t.flatten(0, 1), t, labels if labels is None else labels[:count].repeat(len(frames))


def split_batches(size: int, *parts: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Batches of `size` of several tensors of one length, or None."""
    return (tuple(part if part is None else part[start:start + size] for part in parts)
            for start in range(0, len(parts[0]), size))


# ------------------------------------------------------------------------------------------------------- attention


def attention_weights(qkv: Tensor, heads: int) -> Tensor:
    """The attention of each position to all others: softmax(q kᵀ / √d) (Vaswani et al. 2017, eq. 1).

    qkv (B, 3·C, H, W), the output of an Attention layer's `qkv`; returns (B, heads, H·W, H·W), whose rows sum to 1.
    """
    B, C3, H, W = qkv.shape
    q, k, _ = qkv.reshape(B, 3, heads, C3 // (3 * heads), H * W).transpose(-1, -2).unbind(1)
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)


def attention_maps(model, diffusion: DiffusionProcess, x_t: Tensor, t: Tensor,
                   labels: Tensor | None = None) -> dict[str, Tensor]:
    """The attention weights of each layer by name, averaged over the heads: (B, H, W of the query, H, W of the key).

    UserError for a network without attention.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    if not layers:
        raise UserError("this network has no attention layer: train one with python train.py --attention 4, or draw "
                        "--what features")
    outputs = capture_outputs(model, diffusion, {name: layer.qkv for name, layer in layers.items()}, x_t, t, labels)
    return {name: attention_weights(outputs[name], layer.heads).mean(1).unflatten(2, outputs[name].shape[2:])
            .unflatten(1, outputs[name].shape[2:]) for name, layer in layers.items()}


def choose_queries(image: Tensor, height: int, width: int, count: int) -> list[tuple[int, int]]:
    """At most `count` cells (row, column) of a grid over the image (C, H, W) with high contrast, no two adjacent."""
    pixels = image.mean(0)
    spread = F.adaptive_avg_pool2d((pixels - pixels.mean()).square()[None], (height, width))[0]
    chosen = []
    for best in spread.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(best, width)
        contrast = spread[row, column] > 0.1 * spread.max() or not chosen
        if contrast and all(max(abs(row - r), abs(column - c)) > 1 for r, c in chosen):
            chosen.append((row, column))
    return sorted(chosen[:count])


def draw_attention(model, diffusion: DiffusionProcess, frames: Sequence[Frame], labels: Tensor | None, rows: int,
                   code: LevelCode = LINEAR):
    """The attention of some positions of the first image in each frame, below its x_0_hat.

    `rows` positions in all, shared between the layers, at least one for each layer.
    """
    maps = attention_maps(model, diffusion, *stack_frames(frames, labels, 1))
    image, lines, titles = frames[-1][2][0], [], layer_titles(model)
    for name, weights in maps.items():
        height, width = weights.shape[1:3]
        for row, column in choose_queries(image, height, width, max(1, rows // len(maps))):
            label = f"{titles[name]}, {height}×{width}\nrow {row + 1}, column {column + 1}"
            lines.append((label, (row, column), weights[:, row, column] * height * width))
    colours = dict(norm="log", clim=(1.0, max(2.0, *(line.max().item() for _, _, line in lines))))
    figure, axes = pyplot().subplots(len(lines) + 1, len(frames), squeeze=False, layout="compressed",
                                     figsize=(1.1 * len(frames) + 2.2, 1.1 * (len(lines) + 1) + 0.8))
    for axis, (_, _, x_0_hat), title in zip(axes[0], frames, time_titles([t for t, _, _ in frames]), strict=True):
        axis.imshow(code.decode(x_0_hat[0]).permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=9)
    axes[0, 0].set_ylabel("x̂_0", rotation=0, ha="right", va="center", fontsize=8)
    for axis_row, (label, query, weights) in zip(axes[1:], lines, strict=True):
        for axis, (_, _, x_0_hat), weight in zip(axis_row, frames, weights, strict=True):
            shown = _attention_cell(axis, x_0_hat[0], weight, query, colours)
        axis_row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    bar = figure.colorbar(shown, ax=axes[1:], shrink=0.9, pad=0.01, label="attention (1 or less: as if evenly spread)")
    plain_log_ticks(bar.ax.yaxis)
    figure.suptitle("Where the position marked + looks, and the outline of the clean image expected at that time",
                    fontsize=11)
    return figure


def layer_titles(model) -> dict[str, str]:
    """A title for each attention layer by its name: its stage and, if that has several, a number."""
    titles, names = {}, {module: name for name, module in model.named_modules()}
    for stage, module in unet_stages(model).items():
        layers = [names[part] for part in module.modules() if isinstance(part, Attention)]
        titles |= {name: stage if len(layers) == 1 else f"{stage} ({i} of {len(layers)})"
                   for i, name in enumerate(layers, start=1)}
    return titles


def _attention_cell(axis, x_0_hat: Tensor, weight: Tensor, query: tuple[int, int], colours: dict):
    """Draw weight (h, w) with the outline of x_0_hat (C, H, W), and a + at the query."""
    height, width = x_0_hat.shape[1:]
    shown = axis.imshow(weight.numpy(), cmap="inferno", interpolation="nearest",
                        extent=(-0.5, width - 0.5, height - 0.5, -0.5), **colours)
    pixels = x_0_hat.mean(0)
    if pixels.min() < 0 < pixels.max():
        axis.contour(pixels.numpy(), levels=[0], colors="white", linewidths=0.6, alpha=0.8)
    row, column = ((q + 0.5) * size / cells - 0.5
                   for q, size, cells in zip(query, (height, width), weight.shape, strict=True))
    axis.plot(column, row, "+", color="cyan", markersize=9, markeredgewidth=2)
    return shown


# -------------------------------------------------------------------------------------------------------- features


def unet_stages(model) -> dict[str, nn.Module]:
    """The stages of the U-Net by name, in the order of the forward pass."""
    downs = {f"down {i}": block.stage for i, block in enumerate(model.downs, start=1)}
    ups = {f"up {i}": block.stage for i, block in zip(range(len(model.ups), 0, -1), model.ups, strict=True)}
    return {"stem": model.stem, **downs, "middle": model.middle, **ups}


def draw_features(model, diffusion: DiffusionProcess, frames: Sequence[Frame], labels: Tensor | None):
    """Mean |activation| of each stage: a map of the first image in each frame and, below, the mean of all against t."""
    means = {}
    for part in split_batches(100, *stack_frames(frames, labels)):
        for name, output in capture_outputs(model, diffusion, unet_stages(model), *part).items():
            means.setdefault(name, []).append(output.abs().mean(1))
    maps = {name: torch.cat(parts).unflatten(0, (len(frames), -1)) for name, parts in means.items()}
    figure = pyplot().figure(figsize=(1.1 * len(frames) + 1.8, 1.1 * (len(maps) + 1) + 3.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1 * (len(maps) + 1) + 0.8, 3.0))
    _feature_maps(top, frames, maps)
    axis = bottom.subplots()
    for name, values in maps.items():                                                       # (frames, B, h, w)
        axis.plot([t for t, _, _ in frames], values.flatten(1).mean(1), "o-", markersize=3, label=name)
    axis.set(xlabel="t", ylabel="mean |activation|", yscale="log",
             title=f"Mean over channels, positions and {values.shape[1]} images")
    plain_log_ticks(axis.yaxis)
    axis.invert_xaxis()  # noise on the left, as above
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _feature_maps(figure, frames: Sequence[Frame], maps: dict[str, Tensor]) -> None:
    """Draw x_t and below it a row of maps for each stage; each map from its minimum (dark) to its maximum (bright)."""
    axes = figure.subplots(len(maps) + 1, len(frames), squeeze=False)
    for axis, (_, x_t, _), title in zip(axes[0], frames, time_titles([t for t, _, _ in frames]), strict=True):
        axis.imshow(to_uint8(x_t[0]).permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=9)
    axes[0, 0].set_ylabel("x_t", rotation=0, ha="right", va="center", fontsize=9)
    for line, (name, values) in zip(axes[1:], maps.items(), strict=True):
        first = values[:, 0]                                                                # (frames, h, w)
        for axis, picture in zip(line, first, strict=True):
            axis.imshow(picture.numpy(), cmap="viridis")
        size = "×".join(map(str, first.shape[1:]))
        line[0].set_ylabel(f"{name}\n{size}", rotation=0, ha="right", va="center", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle("Where each level is active on the way from noise to an image: mean |activation| of its channels,\n"
                    "each picture from its least (dark) to its most (bright)", fontsize=11)


# ------------------------------------------------------------------------------------------------------- embedding


def project_to_2d(points: Tensor, how: str = "tsne", seed: int = 0) -> Tensor:
    """Points (N, D) projected to (N, 2): "pca" on the two axes of largest variance; "tsne" (van der Maaten and Hinton
    2008) keeps neighbours together. UserError if scikit-learn is missing, which t-SNE needs.
    """
    if how == "pca":
        centred = points.double() - points.double().mean(0)
        return (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T).float()
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError("t-SNE needs scikit-learn: pip install -r requirements-eval.txt, or ask for "
                        "--projection pca") from error
    perplexity = min(30.0, (len(points) - 1) / 3)
    return torch.from_numpy(TSNE(perplexity=perplexity, init="pca", random_state=seed % 2**32).fit_transform(
        points.numpy()))


def bottleneck_features(model, diffusion: DiffusionProcess, x_0: Tensor, t: Tensor, seed: int,
               labels: Tensor | None = None) -> Tensor:
    """Activations of the U-Net's middle for images x_0 (B, C, H, W) noised to t (B,): (B, C'), mean over positions."""
    noise = torch.randn(x_0.shape, generator=generator_for(seed))
    x_t = diffusion.q_sample(x_0, t, noise)
    return torch.cat([capture_outputs(model, diffusion, {"middle": model.middle}, *batch)["middle"].mean((2, 3))
                      for batch in split_batches(100, x_t, t, labels)])


def draw_embedding(model, diffusion: DiffusionProcess, data: ImageData, how: str, seed: int):
    """Time embeddings and bottleneck features in 2-D: of images at all times, and of images with little noise.

    UserError for a process of fewer than 5 timesteps.
    """
    T, count = diffusion.num_timesteps, min(EMBEDDED_IMAGES, len(data.images))
    if T < 5:
        raise UserError(f"this checkpoint's process has T = {T}, fewer than 5: train with more --timesteps")
    x_0, labels = data.first(count).x_0(), data.labels[:count]
    middle = partial(bottleneck_features, model, diffusion, x_0, seed=seed,
                     labels=labels if model.num_classes else None)
    times = torch.linspace(0, T - 1, min(T, EMBEDDED_TIMES)).round()
    with torch.no_grad():
        embedded = model.time_embedding(times.to(diffusion.device)).cpu()
    spread, early = torch.linspace(0, T - 1, count).round(), torch.full((count,), float(round(0.1 * (T - 1))))
    panels = [("time embeddings", embedded, times),
              (f"bottleneck, {count} images at all t", middle(spread), spread),
              (f"bottleneck, the same at t = {early[0]:.0f}", middle(early), None)]
    figure, axes = pyplot().subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, (title, points, colours) in zip(axes, panels, strict=True):
        _plot_points(axis, project_to_2d(points, how, seed), colours, labels, data.class_names)
        axis.set(title=title, xticks=[], yticks=[])
    figure.colorbar(axes[1].collections[0], ax=axes[:2], pad=0.01).ax.set_title("t")
    figure.suptitle({"tsne": "t-SNE: near points are alike", "pca": "The first two principal components"}[how])
    return figure


def _plot_points(axis, points: Tensor, times: Tensor | None, labels: Tensor, class_names: Sequence[str]) -> None:
    """Plot points (N, 2), coloured by their times or, without times, by their classes (if any), with a legend."""
    if times is not None:
        axis.scatter(*points.T.numpy(), c=times.numpy(), s=12, cmap="viridis")
        return
    if not class_names:
        axis.scatter(*points.T.numpy(), s=12)
        return
    colours = pyplot().get_cmap("tab10" if len(class_names) <= 10 else "turbo", len(class_names))
    for label, name in enumerate(class_names):
        axis.scatter(*points[labels == label].T.numpy(), color=colours(label), s=12, label=plain_text(name))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="class", markerscale=1.5)


# ------------------------------------------------------------------------------------------------------------ loss


def x_0_errors(model, diffusion: DiffusionProcess, x_0: Tensor, times: Sequence[float], seed: int,
               labels: Tensor | None = None) -> Tensor:
    """E |x_0_hat - x_0|² per pixel at each of the times (K,), with the same noise at all times.

    x_0 (N, C, H, W) in [-1, 1], labels (N,). x_0_hat is clipped, as for samplers, and without guidance.
    """
    x_0, labels = x_0.to(diffusion.device), labels if labels is None else labels.to(diffusion.device)
    noise = torch.randn(x_0.shape, generator=generator_for(seed)).to(x_0)

    def error(t: float, x: Tensor, n: Tensor, known: Tensor | None) -> Tensor:
        x_0_hat = diffusion.denoiser(model, known)(diffusion.q_sample(x, t, n), t)
        return (x_0_hat - x).square().flatten(1).mean(1)                                    # (B,)

    with torch.no_grad():
        return torch.stack([torch.cat([error(t, *batch) for batch in split_batches(64, x_0, noise, labels)]).mean()
                            for t in times]).cpu()


def draw_loss(model, diffusion: DiffusionProcess, unseen: ImageData, train: ImageData, seed: int):
    """The error of x_0_hat against t on images that were not used in training, and its ratio to the error of the best
    linear denoiser of the training images `train`.
    """
    T = diffusion.num_timesteps
    times = sorted({round(t) for t in torch.linspace(0, T - 1, ERROR_TIMES).tolist()})
    x_0 = unseen.first(ERROR_IMAGES).x_0()
    labels = unseen.labels[:ERROR_IMAGES] if model.num_classes else None
    network = x_0_errors(model, diffusion, x_0, times, seed, labels)
    some = train.first(bound_images(GAUSSIAN_IMAGES, train.images[0].numel()))
    bound = gaussian_bound(some.x_0(), diffusion, times)
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    style = dict(marker="o", markersize=3)
    left.plot(times, bound, "--", color="tab:orange", label="Gaussian model of the data", **style)
    left.plot(times, network, color="tab:blue", label="this network", **style)
    left.set(xlabel="t", ylabel="mean squared error of x̂_0, per pixel", yscale="log", title="Error of x̂_0")
    left.legend()
    right.plot(times, network / bound, color="tab:blue", label="this network", **style)
    right.axhline(1, color="tab:orange", linestyle="--", label="Gaussian model of the data")
    right.set(xlabel="t", ylabel="network / Gaussian", ylim=(0, None), title="Error as a share of the Gaussian's")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
    figure.suptitle(f"{len(x_0)} images of {unseen.name}, {unseen.split} split")
    return figure
