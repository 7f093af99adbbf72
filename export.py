"""Write trained models as one HTML page that draws with them in any browser.

    python export.py
    python export.py --checkpoint mnist fashion_mnist --output page.html

The page needs no server and no network: open it with a double click. It holds the networks, the samplers and the
weights, in half precision unless --weights float32 is given.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from checkpoint import load_model
from runtime.checkpoints import folder_of_results, is_pretrained, with_checkpoint
from runtime.files import atomic_write, check_output
from runtime.parser import SHARED_FLAGS, Parser, add_shared_flags
from runtime.script import script
from web.page import PRECISIONS, PageModel, page, page_model


def parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(__doc__)
    several = "; several for a page that can switch between them"
    help_text = SHARED_FLAGS["checkpoint"]["help"].replace(" (default", f"{several} (default")
    parser.add_argument("--checkpoint", nargs="+", default=[None], metavar="CHECKPOINT", help=help_text)
    add_shared_flags(parser, "use_ema")
    parser.add_argument("--weights", choices=tuple(PRECISIONS), default="float16",
                        help="the precision of the weights in the file")
    parser.add_argument("--output", help="the .html file to write (default: page.html beside the first checkpoint)")
    args = parser.parse_args(argv)
    if args.output and Path(args.output).suffix != ".html":
        parser.error(f"--output must end in .html, not {args.output!r}")
    return args


def shown_name(path: Path) -> str:
    """What sample.py is given on a command line to read a checkpoint, without the folders above the working one."""
    if is_pretrained(path):
        return path.stem
    whole = path.resolve()
    return shlex.quote(str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else path.name)


def read_models(paths: Sequence[Path], args: Namespace) -> list[PageModel]:
    """The models of the checkpoints."""
    models = []
    for path in paths:
        model, diffusion, checkpoint = load_model(path, use_ema=args.use_ema)
        models.append(page_model(shown_name(path), model, diffusion, checkpoint["config"], args.weights))
    return models


@script
def main(argv=None):
    args = parse_args(argv)
    paths = [Path(with_checkpoint(Namespace(**vars(args) | dict(checkpoint=given))).checkpoint)
             for given in args.checkpoint]
    output = check_output(args.output or folder_of_results(paths[0]) / "page.html", *paths)
    text = page(read_models(paths, args))
    with atomic_write(output) as file:
        file.write(text.encode())
    print(f"Saved {output}, {output.stat().st_size:,} bytes: open it in a browser")


if __name__ == "__main__":
    sys.exit(main())
