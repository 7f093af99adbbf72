"""Small networks and checkpoints that act without any training."""

import hashlib
import json

import torch

from benchmarks.pretrained import packed
from checkpoint import FIELDS, load_checkpoint, save_checkpoint
from data import DATASETS, histogram_code
from diffusion import DiffusionProcess
from models import create_model


def small_model(**config):
    """A small network in which no layer is zero, so that it acts."""
    torch.manual_seed(0)
    model = create_model(**{"base_channels": 8, "time_emb_dim": 16, "patch_size": 2, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model.requires_grad_(False)


def small_checkpoint(path, dataset="glyphs", conditional=False, num_timesteps=40, **config):
    """Write a checkpoint of such a network for 28×28 grey images of `dataset`; returns its path."""
    class_names = DATASETS[dataset].class_names
    model = small_model(num_classes=len(class_names) if conditional else None, **config)
    diffusion = DiffusionProcess(num_timesteps, "cosine", prediction="edm", data_std=0.6)
    data = dict(dataset=dataset, shape=[1, 28, 28], class_names=list(class_names))
    given = dict(config=dict(model=model.config, diffusion=diffusion.config, data=data, training={}),
                 model=model.state_dict(), ema=model.state_dict())
    save_checkpoint(path, **{name: given.get(name, kind()) for name, kind in FIELDS.items()})
    return path


def with_level_code(path, images):
    """Give a checkpoint the code of the levels of these images, as most runs have one; returns its path."""
    content = torch.load(path, weights_only=True)
    content["config"]["data"]["level_code"] = histogram_code(images).points.tolist()
    torch.save(content, path)
    return path


def pretrained_folder(folder, **paths):
    """Make a folder like models/pretrained/ that holds checkpoints by their names; returns it."""
    index = {}
    for name, path in paths.items():
        save_checkpoint(folder / f"{name}.pt", **packed(load_checkpoint(path)))
        digest = hashlib.sha256((folder / f"{name}.pt").read_bytes()).hexdigest()
        index[name] = dict(sha256=digest, command=f"python train.py --dataset {name} --budget 10m", figures={})
    (folder / "index.json").write_text(json.dumps(index))
    return folder
