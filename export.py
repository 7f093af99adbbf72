"""Write a trained model in a form that needs nothing of this program.

    python export.py
    python export.py --checkpoint mnist fashion_mnist --output page.html
    python export.py --format onnx --checkpoint outputs/model_final.pt
    python export.py --format safetensors --checkpoint outputs/model_final.pt --output outputs/model

    html          one page that draws in any browser, offline and without a server: open it with a double click; it
                  can hold several models
    onnx          the neural network alone, for batches of any size: (x, t, labels) -> its output, with 2C channels if
                  it has learned variances; the caller does what DiffusionProcess.predict does, such as scaling x for
                  edm; the config is in the metadata
    safetensors   a folder with the weights, config.json and a model card; sample.py --checkpoint FOLDER draws with it

The last two need pip install -r requirements-export.txt.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from checkpoint import SAFETENSORS, load_model, save_safetensors, to_precision
from evaluation.report import evaluation_of
from runtime.checkpoints import folder_of_results, is_pretrained, pretrained_models, with_checkpoint
from runtime.errors import RunFailed, UserError
from runtime.files import atomic_write, check_output, quoted
from runtime.parser import SHARED_FLAGS, Parser, add_shared_flags
from runtime.sampling import sampling_options
from runtime.script import script
from training.resume import without_own_flags
from web.page import PRECISIONS, PageModel, page, page_model

OUTPUTS = {"html": "page.html", "onnx": "model.onnx", "safetensors": "safetensors"}  # beside the checkpoint
LIBRARIES = ("onnx", "onnxscript", "onnxruntime", "safetensors")  # of requirements-export.txt
LARGEST_DIFFERENCE = 1e-3  # of ONNX's prediction from PyTorch's
LICENCES = {"mnist": "MNIST (LeCun, Cortes, Burges) is commonly given as CC BY-SA 3.0.",
            "fashion_mnist": "Fashion-MNIST (Zalando SE) has the MIT licence.",
            "cifar10": "The authors of CIFAR-10 (Krizhevsky 2009) state no licence.",
            "glyphs": "The digits were drawn by this program from the typefaces that matplotlib ships.",
            "scenes": "The pictures were drawn by this program, their digits from typefaces that matplotlib ships."}


def parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", nargs="+", default=[None], metavar="CHECKPOINT",
                        help=f"{SHARED_FLAGS['checkpoint']['help']}; several are put into one page")
    add_shared_flags(parser, "use_ema")
    parser.add_argument("--format", choices=tuple(OUTPUTS), default="html", help="what to write")
    parser.add_argument("--weights", choices=tuple(PRECISIONS), help="the precision of the weights that are written "
                                                                     "(default: float16 for html, else float32)")
    parser.add_argument("--output", help="the file or, for safetensors, the folder to write (default: page.html, "
                                         "model.onnx or safetensors beside the first checkpoint)")
    args = parser.parse_args(argv)
    if args.output and args.format != "safetensors" and Path(args.output).suffix != f".{args.format}":
        parser.error(f"--output must end in .{args.format}, not {args.output!r}")
    if args.format != "html" and len(args.checkpoint) > 1:
        parser.error(f"--format {args.format} takes one --checkpoint; several go into one page of --format html")
    if args.format == "onnx" and args.weights == "float16":
        parser.error("--format onnx writes float32: leave out --weights")
    return args


def shown_name(path: Path) -> str:
    """What sample.py is given on a command line to read a checkpoint, without the folders above the working one."""
    if is_pretrained(path):
        return path.stem
    for whole in (Path(os.path.abspath(path)), path.resolve()):  # first as it was given: outputs/ may be a link
        if whole.is_relative_to(Path.cwd()):
            return quoted(whole.relative_to(Path.cwd()))
    return quoted(path.name)


# -------------------------------------------------------------------------------------------------------------- html


def read_models(paths: Sequence[Path], args: Namespace) -> list[PageModel]:
    """The models of the checkpoints, for a page."""
    models, names = [], [shown_name(path) for path in paths]
    for path, name in zip(paths, names, strict=True):
        model, diffusion, checkpoint = load_model(path, use_ema=args.use_ema)
        name = quoted(Path(path.resolve().parent.name, path.name)) if names.count(name) > 1 else name
        models.append(page_model(name, model, diffusion, checkpoint["config"], args.weights or "float16",
                                 args.use_ema))
    return models


def write_html(paths: Sequence[Path], args: Namespace, output: Path) -> None:
    models = read_models(paths, args)
    check_output(output, *paths)  # makes the folder: not before what cannot be exported has been refused
    text = page(models)
    with atomic_write(output) as file:
        file.write(text.encode())
    print(f"Saved {output}, {output.stat().st_size:,} bytes: open it in a browser")


# -------------------------------------------------------------------------------------------------------------- onnx


def example_inputs(model: nn.Module, shape: Sequence[int], count: int) -> tuple[torch.Tensor, ...]:
    """Inputs of the network for `count` images: x, t and, where it has labels, labels."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, *shape, generator=generator)
    t = torch.linspace(0.0, 900.0, count + 1)[1:]
    labels = (torch.arange(count) % (model.num_classes + 1),) if model.num_classes else ()
    return x, t, *labels


def to_onnx(model: nn.Module, shape: Sequence[int], config: dict):
    """The network as an onnx.ModelProto: names of the inputs x, t, labels; the batch has any size; no paths of this
    machine, which torch writes into the metadata of the nodes."""
    import onnx

    names = ("x", "t", "labels")[:3 if model.num_classes else 2]
    program = torch.onnx.export(model, example_inputs(model, shape, 2), dynamo=True, input_names=names, verbose=False,
                                output_names=["prediction"], dynamic_shapes=tuple({0: "batch"} for _ in names))
    exported = program.model_proto
    for node in exported.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*exported.graph.value_info, *exported.graph.input, *exported.graph.output):
        del value.metadata_props[:]
    del exported.metadata_props[:], exported.graph.metadata_props[:]
    onnx.helper.set_model_props(exported, {"config": json.dumps(config)})
    for value in (*exported.graph.input, *exported.graph.output):
        if value.type.tensor_type.shape.dim[0].dim_param == "":
            raise RuntimeError(f"the batch of {value.name} has a fixed size in the exported network")
    return exported


def difference(model: nn.Module, content: bytes, shape: Sequence[int]) -> float:
    """The largest difference between the predictions of the network by onnxruntime and by PyTorch."""
    from onnxruntime import InferenceSession

    session, largest = InferenceSession(content, providers=["CPUExecutionProvider"]), 0.0
    for count in (1, 5):
        inputs = example_inputs(model, shape, count)
        named = {each.name: value.numpy() for each, value in zip(session.get_inputs(), inputs, strict=True)}
        [prediction] = session.run(None, named)
        largest = max(largest, (torch.from_numpy(prediction) - model(*inputs)).abs().max().item())
    return largest


def write_onnx(path: Path, args: Namespace, output: Path) -> None:
    model, _, checkpoint = load_model(path, use_ema=args.use_ema)
    check_output(output, path)
    shape = checkpoint["config"]["data"]["shape"]
    content = to_onnx(model, shape, without_own_flags(checkpoint["config"])).SerializeToString()
    largest = difference(model, content, shape)
    if not largest < LARGEST_DIFFERENCE:
        raise RunFailed(f"onnxruntime's predictions differ from PyTorch's by {largest:.1e}, so nothing is written: try "
                        f"other versions of onnx and onnxruntime")
    with atomic_write(output) as file:
        file.write(content)
    print(f"The predictions of onnxruntime differ from PyTorch's by {largest:.1e} at most")
    print(f"Saved {output}, {len(content):,} bytes")


# ------------------------------------------------------------------------------------------------------- safetensors


def figures_of(path: Path, use_ema: bool) -> dict[str, dict]:
    """The figures of a checkpoint by evaluate.py, {name: {"value", "low", "high", "floor"}}; empty if not measured."""
    if is_pretrained(path):
        return pretrained_models()[path.stem].get("figures", {})
    report = evaluation_of(path)
    return report["figures"] if report and report["use_ema"] == use_ema else {}


def model_card(checkpoint: dict, figures: dict[str, dict], folder: Path, parameters: int) -> str:
    """The README.md of the folder: what the model is, its data and licence, its figures, how to load it."""
    config = checkpoint["config"]
    data = config["data"]["dataset"]
    classes = ", ".join(config["data"]["class_names"]) if config["model"].get("num_classes") else "none: no labels"
    rows = [f"| {name} | {f['value']:.4f} | {f['low']:.4f} to {f['high']:.4f} | "
            f"{'' if f['floor'] is None else format(f['floor'], '.4f')} |" for name, f in figures.items()]
    options = sampling_options(config, count=16)
    given = "".join(f", {name}={options[name]!r}" for name in ("sampler", "steps", "guidance_scale"))
    labels = f", labels=torch.arange(16) % {config['model'].get('num_classes')}"
    shape = tuple(config["data"]["shape"])
    table = ["| figure | value | 95 % interval | floor |", "| --- | --- | --- | --- |", *rows] if rows else [
        "Not measured: `python evaluate.py --checkpoint FILE` before the export measures them."]
    return "\n".join([
        "---", "library_name: tiny-diffusion", "pipeline_tag: unconditional-image-generation", "tags: [diffusion]",
        "---", "", f"# A diffusion model of {data}", "",
        f"A U-Net of {parameters:,} parameters that makes images of {' × '.join(map(str, config['data']['shape']))} "
        f"(channels, height, width), written by Tiny Diffusion.", "",
        f"- Trained on {data}: {checkpoint['images_seen']:,} images in {checkpoint['step']:,} steps, "
        f"{checkpoint['seconds']:,.0f} seconds, seed {checkpoint['seed']}, {checkpoint['precision']}.",
        f"- Classes: {classes}.", f"- Predicts `{config['diffusion']['prediction']}` on the "
        f"`{config['diffusion']['schedule']}` schedule with {config['diffusion']['num_timesteps']} timesteps.", "",
        "## Figures", "", *table, "", "## Licence", "",
        f"The program has the MIT licence. {LICENCES.get(data, 'The data are the user’s own: ask them.')}", "",
        "## Use", "", "```sh", f"python sample.py --checkpoint {quoted(folder.name)}", "```", "", "```python",
        "import torch", "from checkpoint import load_model", "from data import code_of",
        "from samplers import all_images", "",
        f"model, diffusion, checkpoint = load_model({str(Path(folder.name) / SAFETENSORS)!r})",
        f"images = all_images(model, diffusion, {shape}, range(16){given}"
        f"{labels if config['model'].get('num_classes') else ''})",
        f"pixels = code_of(checkpoint['config']).decode(images)  # {(16, *shape)} uint8", "```", ""])


def write_safetensors(path: Path, args: Namespace, output: Path) -> None:
    others = [name for name in ("README.md", "config.json") if (output / name).exists()]
    if others and not (output / SAFETENSORS).exists():
        raise UserError(f"{output / others[0]} is not of an export and would be overwritten: name another folder")
    model, _, checkpoint = load_model(path, use_ema=args.use_ema)
    check_output(output / SAFETENSORS, path)
    checkpoint["config"] = without_own_flags(checkpoint["config"])
    weights = to_precision(model.state_dict(), PRECISIONS[args.weights or "float32"])
    parameters = sum(weight.numel() for weight in weights.values())
    card = model_card(checkpoint, figures_of(path, args.use_ema), output.resolve(), parameters)
    card = card.encode(errors="backslashreplace")  # a path may not be UTF-8
    save_safetensors(output, weights, checkpoint)
    with atomic_write(output / "README.md") as file:
        file.write(card)
    print(f"Saved {output}: {SAFETENSORS}, config.json and README.md; python sample.py --checkpoint {quoted(output)}")


@script
def main(argv=None):
    args = parse_args(argv)
    paths = [Path(with_checkpoint(Namespace(**vars(args) | dict(checkpoint=given))).checkpoint)
             for given in args.checkpoint]
    output = Path(args.output or folder_of_results(paths[0]) / OUTPUTS[args.format])
    try:
        if args.format == "html":
            write_html(paths, args, output)
        elif args.format == "onnx":
            write_onnx(paths[0], args, output)
        else:
            write_safetensors(paths[0], args, output)
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in LIBRARIES:
            raise
        raise UserError(f"--format {args.format} needs {library}: pip install -r requirements-export.txt") from error


if __name__ == "__main__":
    sys.exit(main())
