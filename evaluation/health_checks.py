"""The checks of doctor.py: functions of tensors and numbers that return findings.

Every check computes a value of which more is worse, and has two limits: WARN above the first, FAIL above the second.
Values of generated images are relative to those of real images, so that the limits hold for every data set.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from packaging.requirements import Requirement
from torch import Tensor
from torch.nn import functional as F

from data import in_parts
from diffusion import DiffusionProcess
from samplers import DEFAULT_STEPS

LEVELS = 127.5  # a difference of 1 between images in [-1, 1], in grey levels


class Finding(NamedTuple):
    """The result of a check: its status OK, WARN or FAIL, a message, and the likely cause with how to fix it."""

    check: str
    status: str
    message: str
    fix: str = ""


def judge(check: str, value: float, warn: float, fail: float, message: str, fix: str) -> Finding:
    """OK up to `warn`, WARN up to `fail`, FAIL above it and for NaN."""
    status = "OK" if value <= warn else "WARN" if value <= fail else "FAIL"
    return Finding(check, status, message, "" if status == "OK" else fix)


# ------------------------------------------------------------------------------------------------------- the machine


def check_versions(python: tuple[int, int], torch_version: str, torchvision_version: str,
                   requirements: Sequence[str]) -> Finding:
    """Whether torchvision was built for this torch; requirements: those of its package, such as "torch==2.5.1".

    If both versions name a build ("+cu124", "+cpu"), it must be the same. The project needs Python 3.10.
    """
    versions = f"Python {python[0]}.{python[1]}, torch {torch_version}, torchvision {torchvision_version}"
    if python < (3, 10):
        return Finding("versions", "FAIL", f"{versions}: Python is too old", "install Python 3.10 or newer")
    broken = [text for text in requirements if (need := Requirement(text)).name == "torch"
              and not need.specifier.contains(torch_version, prereleases=True)]
    builds = [version.partition("+")[2] for version in (torch_version, torchvision_version)]
    reason = (f": this torchvision needs {broken[0]}" if broken else
              ": their builds differ" if all(builds) and builds[0] != builds[1] else "")
    return judge("versions", bool(reason), 0, 0, versions + reason,
                 "pip install --upgrade torch torchvision (both in one command)")


# --------------------------------------------------------------------------------------------------------- the data


def check_data(images: Tensor, labels: Tensor, class_names: Sequence[str]) -> list[Finding]:
    """The value range, channels, classes, copies and blanks of images (N, C, H, W) uint8 with labels (N,)."""
    if images.dtype != torch.uint8:
        return [Finding("value range", "FAIL", f"the images are {images.dtype} from {images.min():g} to "
                        f"{images.max():g}, not uint8 from 0 to 255: networks would not get [-1, 1]",
                        "in data.py: (images * 255).round().to(torch.uint8) for images in 0..1")]
    return [check_range(images), check_channels(images), check_classes(labels, class_names),
            check_duplicates(images), check_constant(images)]


def check_range(images: Tensor) -> Finding:
    """Whether the levels fill 0..255."""
    low, high = images.min().item(), images.max().item()
    return judge("value range", 255 - (high - low), 127, 253, f"levels {low} to {high} of 0 to 255",
                 "the images were scaled before they became uint8: multiply by 255 in data.py, then round (your own "
                 "pictures: save them with more contrast)")


def check_channels(images: Tensor) -> Finding:
    """1 or 3 channels, the 3 not all equal."""
    channels = images.shape[1]
    grey = channels == 3 and all(bool((part == part[:, :1]).all()) for part in in_parts(images, len(images)))
    what = f"{len(images):,} images of {channels} × {images.shape[2]} × {images.shape[3]}"
    return judge("channels", 2 if channels not in (1, 3) else float(grey), 0, 1,
                 what + (", all grey in three equal channels" if grey else ""),
                 "in data.py, keep one channel of grey images; 1 or 3 channels are possible (your own pictures: "
                 "--channels 1)")


def check_classes(labels: Tensor, class_names: Sequence[str]) -> Finding:
    """Labels in range, and classes of similar size."""
    if not class_names:
        return Finding("classes", "OK", "none")
    outside = int(((labels < 0) | (labels >= len(class_names))).sum())
    if outside:
        return Finding("classes", "FAIL", f"{outside:,} labels lie outside 0..{len(class_names) - 1}",
                       "count labels from 0 in data.py, one for each of class_names")
    counts = labels.bincount(minlength=len(class_names))
    rare = class_names[int(counts.argmin())]
    return judge("classes", (counts.max() / counts.min()).item(), 5, math.inf,
                 f"{len(class_names)} classes of {counts.min():,} ({rare}) to {counts.max():,} images",
                 f"class {rare!r} will be learned badly: add images of it, or leave it out")


def check_duplicates(images: Tensor) -> Finding:
    """Images that occur more than once."""
    different = len({hash(image.tobytes()) for image in images.cpu().numpy()})
    share = 1 - different / len(images)
    return judge("duplicates", share, 0.01, 0.5, f"{len(images) - different:,} images are exact copies of others "
                 f"({share:.1%})", "delete copies: a model memorises them, and its figures are too good")


def check_constant(images: Tensor) -> Finding:
    """Images of one colour."""
    flat = images.flatten(1)
    count = int((flat.amax(1) == flat.amin(1)).sum())
    return judge("blank images", count / len(images), 0, 0.01, f"{count:,} images are of one colour",
                 "delete them: they are damaged or padding, and the model learns to make such images")


# ----------------------------------------------------------------------------------------------------- the schedule


def check_schedule(diffusion: DiffusionProcess, steps: int = DEFAULT_STEPS) -> list[Finding]:
    """The signal left at T - 1, the error of x_0_hat per error of the network there, and whether T is large enough."""
    last = diffusion.num_timesteps - 1
    alpha, log_snr = diffusion.alpha(last).item(), diffusion.log_snr(last).item()
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    gain = (diffusion.to_x_0(one, 0 * one, last) - diffusion.to_x_0(0 * one, 0 * one, last)).abs().item()
    return [
        judge("terminal SNR", alpha, 0.05, 0.3, f"at t = {last} the signal rate alpha is {alpha:.2g} (log-SNR "
              f"{log_snr:.1f}), while sampling starts from pure noise (Lin et al. 2024)",
              "brightness and contrast will be off: python train.py --schedule cosine, or --prediction v "
              "--zero_terminal_snr"),
        judge("first step", gain, 1000, math.inf, f"at t = {last} an error of x_0_hat is {gain:.3g} times the "
              f"error of the network", "the first steps have large errors that only clipping bounds: "
              "python train.py --prediction v, or --schedule linear"),
        judge("timesteps", steps - last - 1, 0, steps - 1, f"T is {last + 1}; sample.py takes {steps} steps by default",
              "too few steps make images worse: python train.py --timesteps 1000"),
    ]


# --------------------------------------------------------------------------------------------------- the checkpoint


def check_tensors(weights: dict[str, Tensor], initial: dict[str, Tensor], step: int, part: str) -> Finding:
    """Which tensors are constant (also zero) or equal to what they were before the first step."""
    def is_untrained(name: str, weight: Tensor) -> bool:
        constant = weight.numel() > 1 and bool((weight == weight.flatten()[0]).all())
        return constant or torch.equal(weight, initial[name])

    untrained = [name for name, weight in weights.items() if is_untrained(name, weight)]
    listed = f" after {step:,} steps: {', '.join(untrained[:3])}{' ...' * (len(untrained) > 3)}" if untrained else ""
    return judge(f"tensors of {part}", (1 if step < 10 else 2) * bool(untrained), 0, 1,
                 f"{len(untrained)} of {len(weights)} have not been trained{listed}",
                 "a learning rate of 0, an unused layer, or an average that is never updated: train again, "
                 "python train.py --lr 2e-3 --ema_decay 0.999")


def check_label_rows(embedding: Tensor, initial: Tensor, class_names: Sequence[str]) -> Finding:
    """Labels that never occurred keep their initial row of the embedding (classes + 1, D); the last is "no label".

    initial: those of the seed, so that nothing is found in a network that began with --init.
    """
    unchanged = (embedding == initial).all(1).tolist()
    classes = [name for name, missing in zip(class_names, unchanged[:-1], strict=True) if missing]
    message = f"classes never trained on: {', '.join(classes)}" if classes else "all classes were trained on"
    message += ", but never without a label" * unchanged[-1]
    return judge("labels shown", 2 * bool(classes) + unchanged[-1], 0, 1, message,
                 "the training images have none of these classes, or labels were dropped for whole batches, or never "
                 "(guidance needs a model without labels too): python train.py --conditional --label_dropout 0.1")


def check_history(losses: Sequence[float], val_losses: Sequence[float]) -> list[Finding]:
    """Whether the training loss was not finite or rose, and whether the validation loss rose."""
    lower = "the learning rate is too high: python train.py --lr 5e-4 --muon_lr 0.005, or --max_grad_norm 0.5"
    bad = sum(not math.isfinite(loss) for loss in losses)
    if bad:
        return [Finding("history of the loss", "FAIL", f"{bad} of {len(losses)} recorded losses are not finite", lower)]
    if len(losses) < 10:
        return [Finding("history of the loss", "OK", f"{len(losses)} records, too few to judge")]
    means = [part.mean().item() for part in torch.tensor(losses, dtype=torch.float64).chunk(10)]
    rise = means[-1] / max(min(means), 1e-12)
    findings = [judge("history of the loss", rise, 1.2, 2, f"the last tenth is {rise:.2f} times the lowest tenth "
                      f"({means[-1]:.4g}, first {means[0]:.4g})", lower)]
    if len(val_losses) >= 5:
        rise = val_losses[-1] / max(min(val_losses), 1e-12)
        findings.append(judge("validation loss", rise, 1.1, 2, f"the last is {rise:.2f} times the lowest",
                              "it memorises the training images: fewer --epochs, more images or a smaller "
                              "--base_channels"))
    return findings


def check_error(error: Tensor, bound: Tensor, log_snr: Sequence[float], longer: str) -> Finding:
    """The error of x_0_hat (K,) relative to that of the best linear denoiser (K,), from little to much noise.

    longer: the command that trains longer.
    """
    ratios = (error / bound).tolist()
    listed = ", ".join(f"{ratio:.2f} at {snr:.0f}" for ratio, snr in zip(ratios, log_snr, strict=True))
    return judge("error against t", math.nan if any(map(math.isnan, ratios)) else max(ratios), 1.1, 1.5,
                 f"times the Gaussian bound, by log-SNR: {listed}",
                 f"a network worse than a linear filter is broken or hardly trained: train longer ({longer}), or with "
                 f"a lower --lr and on images in [-1, 1]")


def check_labels_used(right: Tensor, wrong: Tensor, x_0: Tensor) -> Finding:
    """Whether x_0_hat (B, C, H, W) of the same x_t depends on the labels: with the right ones and with wrong ones."""
    change = ((right - wrong).square().mean().sqrt() / x_0.std()).item()
    gain = ((wrong - x_0).square().mean() / (right - x_0).square().mean()).item()
    if change > 0.05 and gain < 1:
        return Finding("labels used", "FAIL", f"wrong labels make the error smaller, by {1 - gain:.1%}",
                       "the labels do not match the images: check that data.py keeps their order (your own pictures: "
                       "that each lies in the folder of its class)")
    return judge("labels used", 1 - change, 0.95, 0.99, f"another label changes x_0_hat by {change:.1%} of the images' "
                 f"standard deviation, and makes its error {gain:.2f} times as large",
                 "labels are ignored: python train.py --conditional --label_dropout 0.1, and train longer")


# ------------------------------------------------------------------------------------------------------ the samples


def check_samples(images: Tensor, real: Tensor, most_steps: int = 1000) -> list[Finding]:
    """Defects of generated images (N, C, H, W), not clipped, compared with real ones (M, C, H, W) in [-1, 1].

    most_steps: the number of timesteps of the schedule.
    """
    if not bool(images.isfinite().all()):
        return [Finding("samples", "FAIL", "the images contain NaN or inf",
                        "the run diverged: python train.py --lr 5e-4 --muon_lr 0.005 --precision fp32")]
    images = images.clamp(-1, 1)
    blank = check_blank(images, real)
    if blank.status == "FAIL":
        return [blank]  # the other checks would fail for the same reason
    pattern = check_pattern(images, real)
    noise = [check_noise(images, real, most_steps)] if pattern.status == "OK" else []  # a pattern would count as noise
    return [blank, check_brightness(images, real), check_saturation(images, real), check_diversity(images, real),
            pattern, *noise]


def check_blank(images: Tensor, real: Tensor) -> Finding:
    """Images of one colour."""
    blank, real_blank = (x.flatten(1).std(1) < 0.03 for x in (images, real))
    mean = images[blank].mean().item() if blank.any() else 0.0
    colour = "black" if mean < -0.9 else "white" if mean > 0.9 else "grey"
    share, real_share = (x.double().mean().item() for x in (blank, real_blank))
    message = f"{share:.0%} are of one colour" + f", {colour}" * bool(share)
    message += f", of real images {real_share:.0%}" * bool(real_share)
    return judge("blank samples", share - real_share, real_share, max(0.1, real_share), message,
                 "hardly trained, diverged, or too few steps for the EMA: train longer, and compare python sample.py "
                 "--no_use_ema")


def check_brightness(images: Tensor, real: Tensor) -> Finding:
    """The mean of the pixels."""
    shift = ((images.mean() - real.mean()) / real.std()).item()
    return judge("brightness", abs(shift), 0.25, 0.5, f"the mean is {images.mean():.2f}, that of real images "
                 f"{real.mean():.2f}: {shift:+.2f} standard deviations of a pixel",
                 "trained on another value range ([0, 1] in place of [-1, 1]), or a schedule that does not end in "
                 "noise: use data.to_model, python train.py --schedule cosine")


def check_saturation(images: Tensor, real: Tensor) -> Finding:
    """The share of pixels that are neither black nor white."""
    between, real_between = ((x.abs() < 0.9).double().mean().item() for x in (images, real))
    lost = 1 - between / max(real_between, 1e-9)
    return judge("saturation", lost, 0.5, 0.8, f"{between:.0%} of the pixels are neither black nor white, of real "
                 f"images {real_between:.0%}", "clipped values: lower --guidance_scale, or train longer")


def nearest_other(images: Tensor) -> Tensor:
    """The distance of each image (N, C, H, W) to the nearest of the others (N,)."""
    flat = images.flatten(1)
    return torch.cdist(flat, flat).fill_diagonal_(math.inf).amin(1)


def check_diversity(images: Tensor, real: Tensor) -> Finding:
    """The variance between images and the median distance to the nearest other image."""
    real = real[:len(images)]
    spread = (images.var(0).mean() / real.var(0).mean()).sqrt().item()
    apart = (nearest_other(images).median() / nearest_other(real).median().clamp(min=1e-9)).item()
    return judge("diversity", 1 - min(spread, apart), 0.4, 0.75, f"the images differ {spread:.2f} times as much as "
                 f"real ones, and {apart:.2f} times from the nearest other",
                 "the images are nearly the same: train longer or on more images, lower --guidance_scale")


def noise_level(images: Tensor) -> float:
    """The standard deviation of white noise in images: median |diagonal Haar coefficient| / 0.6745.

    Donoho and Johnstone 1994, section 4.1: edges are few, so that the median is that of the flat parts.
    """
    kernel = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).expand(images.shape[1], 1, 2, 2) / 2
    return F.conv2d(images, kernel, groups=images.shape[1]).abs().median().item() / 0.6745


def check_noise(images: Tensor, real: Tensor, most_steps: int) -> Finding:
    """Noise that sampling did not remove. most_steps: the number of timesteps of the schedule."""
    left, normal = noise_level(images), noise_level(real)
    return judge("noise left", left - normal, 0.04, 0.12, f"noise of {left * LEVELS:.1f} grey levels, in real images "
                 f"{normal * LEVELS:.1f}", f"too few steps or a network that is hardly trained: python sample.py "
                 f"--steps {min(50, most_steps)}, train longer, python train.py --schedule cosine")


def pattern_peaks(images: Tensor) -> Tensor:
    """Peaks of the spectrum at periods of 2 and 4 pixels: power / median power of the 8 neighbouring frequencies.

    The spectrum is the median over the images, so that a single striped shirt makes no peak.
    """
    height, width = images.shape[2:]
    power = torch.fft.fft2(images - images.mean((2, 3), keepdim=True)).abs().square().mean(1).median(0).values  # (H, W)
    around = [power.roll((i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    peaks = power / torch.stack(around).median(0).values.clamp(min=1e-9)
    period = 4 if height % 4 == 0 and width % 4 == 0 else 2 if height % 2 == 0 and width % 2 == 0 else 1
    return peaks[::height // period, ::width // period].flatten()[1:]                       # without frequency 0


def check_pattern(images: Tensor, real: Tensor) -> Finding:
    """A regular grid in the images."""
    ratio = max((pattern_peaks(images) / pattern_peaks(real)).tolist(), default=1.0)
    return judge("grid pattern", ratio, 4, 10, f"peaks of the spectrum at periods of 2 and 4 pixels are {ratio:.1f} "
                 f"times those of real images", "patches or up-sampling are visible: train longer; if --patch_size was "
                 "more than 1, python train.py --patch_size 1")


def check_copies(closeness: dict[str, float]) -> Finding:
    """Memorised training images; closeness: that of metrics.closeness."""
    share, copies = closeness["closer_than_99_percent"], closeness["copies"]
    return judge("copies", max(share, 10 * copies), 0.25, 0.6, f"{share:.0%} are closer to a training image than 99 % "
                 f"of unseen real ones, {copies:.0%} are exact copies",
                 "it has memorised images: more images, fewer --epochs or a smaller --base_channels; "
                 "python evaluate.py shows the pairs")


def check_steps(images: Tensor, more: Tensor, steps: int, most_steps: int = 1000) -> Finding:
    """Images with `steps` and with twice as many steps, at most most_steps: if they differ, `steps` is too small."""
    change = ((images - more).square().mean().sqrt() / more.std()).item()
    return judge("steps", change, 0.3, math.inf, f"twice as many as {steps} steps change the images by {change:.0%} of "
                 f"their standard deviation", "too few steps: python sample.py --steps "
                 f"{min(5 * steps, most_steps)}, or --prediction v in training")


# ----------------------------------------------------------------------------- what the classifier says


def check_recognised(probabilities: Tensor, real: Tensor, labels: Tensor | None, real_labels: Tensor) -> list[Finding]:
    """Class probabilities (N, K) of samples and (M, K) of real images; requested labels (N,), or None; labels (M,)."""
    confidence, real_confidence = probabilities.amax(1).mean().item(), real.amax(1).mean().item()
    seen, count = probabilities.argmax(1), probabilities.shape[1]
    classes, asked = (x.bincount(minlength=count) for x in (seen, real_labels if labels is None else labels))
    shares, asked = classes / classes.sum(), asked / asked.sum()
    pairs = torch.zeros(count, count).index_put_((real_labels, real.argmax(1)), torch.ones(()), accumulate=True)
    pairs[pairs.sum(1) == 0] = torch.eye(count)[pairs.sum(1) == 0]
    seen_in_real = pairs / pairs.sum(1, keepdim=True)  # [true class, class that the classifier sees]
    expected = asked @ seen_in_real
    most = int((shares - expected).argmax())
    findings = [judge("recognisable", real_confidence - confidence, 0.15, 0.3, f"the classifier is {confidence:.0%} "
                      f"confident, {real_confidence:.0%} on real images", "shapes of no class: train longer, or a "
                      "larger --base_channels"),
                judge("classes made", (shares - expected)[most].item(), 0.25, 0.45, f"{int((classes > 0).sum())} of "
                      f"{count} classes; {shares[most]:.0%} of the images are of one of which {expected[most]:.0%} "
                      f"should be", "one class is too frequent: train longer, or --conditional")]
    if labels is not None:
        wrong, real_wrong = (seen != labels).double().mean().item(), 1 - (asked @ seen_in_real.diagonal()).item()
        findings.append(judge("labels obeyed", wrong - real_wrong, 0.25, 0.6, f"the classifier sees another class than "
                              f"requested in {wrong:.0%}, another than the true one in {real_wrong:.0%} of real images",
                              "labels are ignored: python train.py --conditional --label_dropout 0.1, train longer"))
    return findings


def check_mirrored(confidence: Tensor, mirrored: Tensor, real: Tensor, real_mirrored: Tensor) -> list[Finding]:
    """The classifier's confidence in samples (N,) and their mirror images, and the same for real images (M,).

    Mirroring lowers the confidence in real digits, but not in samples of a network trained on flipped images. There is
    no finding if mirroring does not matter for real images either, or if the samples are not recognised.
    """
    gap, real_gap = (confidence - mirrored).mean().item(), (real - real_mirrored).mean().item()
    if real_gap < 0.03 or confidence.maximum(mirrored).mean() < real.mean() - 0.15:
        return []
    return [judge("mirrored", 1 - gap / real_gap, 0.6, 0.9, f"mirroring lowers the classifier's confidence by "
                  f"{gap:.1%}, on real images by {real_gap:.1%}",
                  "trained with random flips, after which digits are no digits: train again without them")]
