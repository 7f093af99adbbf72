"""Other toolkits as their users have them: each learns from uint8 images and makes uint8 images, in its own way.

Networks of about as many parameters as the textbook's 2.06 M, fp32, the optimiser, averaging and clipping of each
package's own training script. Images come from memory, not from files, and neither validation nor previews interrupt
the training: both are to the peers' advantage. A package is imported only when it is used.
"""

import math
from importlib.util import find_spec

import torch
from torch import Tensor

BATCH = 64  # images at a time when they are made


def to_levels(images: Tensor) -> Tensor:
    """Float images in [0, 1] -> uint8 levels 0..255, on the CPU."""
    return (images.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)


class Diffusers:
    """diffusers: UNet2DModel, trained as examples/unconditional_image_generation/train_unconditional.py does it.

    Its defaults: AdamW 1e-4 (0.95, 0.999), weight decay 1e-6, 500 steps of warm-up, then half a cosine over 100 epochs,
    gradients clipped at 1, 1000 linear steps, the noise as the target, and --use_ema, as its README has it.
    few: DPMSolverMultistepScheduler; ddpm: DDPMScheduler; both by DDPMPipeline.
    """

    package = "diffusers"

    def __init__(self, shape, device, steps_per_epoch: int = 430):
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.device, self.shape = torch.device(device), tuple(shape)
        self.network = UNet2DModel(
            sample_size=shape[-1], in_channels=shape[0], out_channels=shape[0], layers_per_block=1,
            block_out_channels=(32, 64, 96), down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")).to(device)
        self.schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.average = EMAModel(self.network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75,
                                model_cls=UNet2DModel, model_config=self.network.config)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6,
                                           eps=1e-8)
        self.rate = get_scheduler("cosine", self.optimizer, num_warmup_steps=500,
                                  num_training_steps=100 * steps_per_epoch)

    def train_step(self, images: Tensor) -> float:
        """One step on uint8 images (B, C, H, W); returns the loss."""
        x_0 = images.float() / 127.5 - 1
        noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (len(x_0),), device=self.device)
        predicted = self.network(self.schedule.add_noise(x_0, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.average.step(self.network.parameters())
        return loss.item()

    def snapshot(self):
        """The averaged weights as they are now, for `sample`."""
        return [weight.clone() for weight in self.average.shadow_params]

    def sample(self, count: int, sampler: str, steps: int, weights=None) -> Tensor:
        """uint8 images (N, C, H, W) by "few" or "ddpm" in so many steps."""
        from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

        if weights:
            for own, kept in zip(self.network.parameters(), weights, strict=True):
                own.data.copy_(kept)
        few = sampler == "few"
        schedule = DPMSolverMultistepScheduler.from_config(self.schedule.config) if few else self.schedule
        pipeline = DDPMPipeline(unet=self.network.eval(), scheduler=schedule)
        pipeline.set_progress_bar_config(disable=True)
        images = [pipeline(batch_size=min(BATCH, count - first), num_inference_steps=steps, output_type="np").images
                  for first in range(0, count, BATCH)]
        return to_levels(torch.cat([torch.from_numpy(part) for part in images]).permute(0, 3, 1, 2))


class DenoisingDiffusionPytorch:
    """denoising-diffusion-pytorch: Unet and GaussianDiffusion by their defaults (v, sigmoid, 1000), and its Trainer's.

    Those are Adam 1e-4 (0.9, 0.99), gradients clipped at 1, an average of decay 0.995 every 10 steps. No flips, which
    its Trainer has by default: digits are no digits in a mirror. dim 28 and dim_mults (1, 2, 4): 28 pixels can only be
    halved twice. few: its DDIM; ddpm: its p_sample_loop.
    """

    package = "denoising_diffusion_pytorch"

    def __init__(self, shape, device, steps_per_epoch: int = 430):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        self.device, self.shape = torch.device(device), tuple(shape)
        self.network = Unet(dim=28, dim_mults=(1, 2, 4), channels=shape[0])
        self.process = GaussianDiffusion(self.network, image_size=shape[-1]).to(device)
        self.average = EMA(self.process, beta=0.995, update_every=10).to(device)
        self.optimizer = torch.optim.Adam(self.process.parameters(), lr=1e-4, betas=(0.9, 0.99))

    def train_step(self, images: Tensor) -> float:
        """One step on uint8 images (B, C, H, W); returns the loss."""
        loss = self.process(images.float() / 255)
        total = loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.process.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        return total

    def snapshot(self):
        """The averaged weights as they are now, for `sample`."""
        return {name: weight.clone() for name, weight in self.average.ema_model.state_dict().items()}

    def sample(self, count: int, sampler: str, steps: int, weights=None) -> Tensor:
        """uint8 images (N, C, H, W) by "few" or "ddpm" in so many steps."""
        process = self.average.ema_model.eval()
        if weights:
            process.load_state_dict(weights)
        process.is_ddim_sampling, process.sampling_timesteps = sampler == "few", steps
        all_steps = process.num_timesteps
        if sampler == "ddpm":
            process.num_timesteps = steps  # below 1000 these are no images: only their time is of use
        images = [process.sample(batch_size=min(BATCH, count - first)) for first in range(0, count, BATCH)]
        process.num_timesteps = all_steps
        return to_levels(torch.cat(images))


PEERS = {"diffusers": Diffusers, "denoising-diffusion-pytorch": DenoisingDiffusionPytorch}


def installed(name: str) -> bool:
    return find_spec(PEERS[name].package) is not None


def make_peer(name: str, shape, device, train_images: int = 55_000, batch_size: int = 128):
    """The peer by its name, its network fresh, as `torch.manual_seed(0)` starts it."""
    torch.manual_seed(0)
    return PEERS[name](shape, device, math.ceil(train_images / batch_size))
