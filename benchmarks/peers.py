"""Other toolkits ("peers"), set up as in their own training scripts; uint8 images in and out.

Each network has about as many parameters as that of `--recipe ddpm` (2.06 M) and trains in fp32, with the optimiser,
EMA and gradient clipping of its package's own script and, where quality is measured, its batch size. Two things favour
the peers: the images are in memory, and there is no validation and no preview. They learn without labels. A package is
imported only when it is used.
"""

import math
from importlib.util import find_spec

import torch
from torch import Tensor

SAMPLE_BATCH = 64  # images at a time in sampling


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1] -> uint8 images on the CPU."""
    return (images.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)


class Diffusers:
    """diffusers: UNet2DModel, trained as by its examples/unconditional_image_generation/train_unconditional.py.

    The defaults of that script: batches of 16, AdamW 1e-4 (0.95, 0.999), weight decay 1e-6, 500 steps of warm-up, then
    half a cosine over 100 epochs, gradients clipped at 1, a linear schedule of 1000 steps, noise prediction; and
    --use_ema, as in its README. Samplers: DPMSolverMultistepScheduler ("few"), with thresholding, which clips x_0_hat
    to [-1, 1] as DDPMScheduler does by default, and DDPMScheduler ("ddpm"), both through DDPMPipeline.
    """

    package, batch_size = "diffusers", 16

    def __init__(self, shape, device, steps_per_epoch: int = 430):
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.device, self.shape = torch.device(device), tuple(shape)
        self.network = UNet2DModel(
            sample_size=shape[-1], in_channels=shape[0], out_channels=shape[0], layers_per_block=1,
            block_out_channels=(32, 64, 96), down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")).to(device)
        self.noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.ema = EMAModel(self.network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75,
                                model_cls=UNet2DModel, model_config=self.network.config)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6,
                                           eps=1e-8)
        self.lr_scheduler = get_scheduler("cosine", self.optimizer, num_warmup_steps=500,
                                  num_training_steps=100 * steps_per_epoch)

    def train_step(self, images: Tensor) -> float:
        """One step on uint8 images (B, C, H, W); returns the loss."""
        x_0 = images.float() / 127.5 - 1
        noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (len(x_0),), device=self.device)
        predicted = self.network(self.noise_scheduler.add_noise(x_0, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        return loss.item()

    def snapshot(self):
        """A copy of the EMA weights, for `sample`."""
        return [weight.clone() for weight in self.ema.shadow_params]

    def sample(self, count: int, sampler: str, steps: int, weights=None) -> Tensor:
        """uint8 images (N, C, H, W) by "few" or "ddpm". weights: from `snapshot`; None: the present ones."""
        from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

        if weights:
            for parameter, weight in zip(self.network.parameters(), weights, strict=True):
                parameter.data.copy_(weight)
        scheduler = self.noise_scheduler
        if sampler == "few":
            scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config, thresholding=True)
        pipeline = DDPMPipeline(unet=self.network.eval(), scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        sizes = [min(SAMPLE_BATCH, count - first) for first in range(0, count, SAMPLE_BATCH)]
        images = [pipeline(batch_size=size, num_inference_steps=steps, output_type="np").images for size in sizes]
        return to_uint8(torch.cat([torch.from_numpy(part) for part in images]).permute(0, 3, 1, 2))


class DenoisingDiffusionPytorch:
    """denoising-diffusion-pytorch: Unet, GaussianDiffusion (v, sigmoid schedule, 1000 steps) and Trainer, by default.

    The Trainer's defaults: batches of 16, Adam 1e-4 (0.9, 0.99), gradients clipped at 1, an EMA of decay 0.995 every 10
    steps, half of the images mirrored; grey ones are not, because mirrored digits are wrong. dim 28 and dim_mults (1,
    2, 4), because 28 pixels can be halved only twice; a wider network would see fewer images in the same time.
    Samplers: its DDIM ("few") and its p_sample_loop ("ddpm").
    """

    package, batch_size = "denoising_diffusion_pytorch", 16

    def __init__(self, shape, device, steps_per_epoch: int = 430):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        self.device, self.shape = torch.device(device), tuple(shape)
        self.network = Unet(dim=28, dim_mults=(1, 2, 4), channels=shape[0])
        self.process = GaussianDiffusion(self.network, image_size=shape[-1]).to(device)
        self.ema = EMA(self.process, beta=0.995, update_every=10).to(device)
        self.optimizer = torch.optim.Adam(self.process.parameters(), lr=1e-4, betas=(0.9, 0.99))

    def train_step(self, images: Tensor) -> float:
        """One step on uint8 images (B, C, H, W); returns the loss."""
        if self.shape[0] > 1:
            mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
            images = torch.where(mirrored, images.flip(3), images)
        loss = self.process(images.float() / 255)
        value = loss.item()  # before the backward pass, as its Trainer does
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.process.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return value

    def snapshot(self):
        """A copy of the EMA weights, for `sample`."""
        return {name: weight.clone() for name, weight in self.ema.ema_model.state_dict().items()}

    def sample(self, count: int, sampler: str, steps: int, weights=None) -> Tensor:
        """uint8 images (N, C, H, W) by "few" or "ddpm". weights: from `snapshot`; None: the present ones."""
        process = self.ema.ema_model.eval()
        if weights:
            process.load_state_dict(weights)
        process.is_ddim_sampling, process.sampling_timesteps = sampler == "few", steps
        all_steps = process.num_timesteps
        if sampler == "ddpm":
            process.num_timesteps = steps  # below 1000 only the time is of use, not the images
        sizes = [min(SAMPLE_BATCH, count - first) for first in range(0, count, SAMPLE_BATCH)]
        images = [process.sample(batch_size=size) for size in sizes]
        process.num_timesteps = all_steps
        return to_uint8(torch.cat(images))


PEERS = {"diffusers": Diffusers, "denoising-diffusion-pytorch": DenoisingDiffusionPytorch}


def is_installed(name: str) -> bool:
    """Whether the package of this peer is installed."""
    return find_spec(PEERS[name].package) is not None


def make_peer(name: str, shape, device, train_images: int = 55_000, batch_size: int = 128):
    """The peer of this name with new weights, initialised from seed 0."""
    torch.manual_seed(0)
    return PEERS[name](shape, device, math.ceil(train_images / batch_size))
