"""``dalle import-openai``: the public release's dVAE as a model folder of ours."""

from __future__ import annotations

import argparse

NAME = "import-openai"
HELP = "Convert the public dall_e release's encoder.pkl and decoder.pkl into a model folder, running nothing in them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("encoder", metavar="ENCODER", help="the release's encoder.pkl")
    parser.add_argument("decoder", metavar="DECODER", help="the release's decoder.pkl")
    parser.add_argument("out", metavar="OUT", help="the folder to write: dvae.json and dvae.safetensors")


def run(args: argparse.Namespace) -> None:
    from dalle.checkpoint import save_dvae
    from dalle.files import require_replaceable
    from dalle.openai import load_openai_dvae

    require_replaceable(args.out, ("dvae.json", "dvae.safetensors"))
    dvae = load_openai_dvae(args.encoder, args.decoder)
    save_dvae(args.out, dvae, note={"source": "the public dall_e release, github.com/openai/DALL-E"})
    parameters = sum(parameter.numel() for parameter in dvae.parameters())
    print(f"wrote {args.out}: a dVAE of {dvae.config.vocab_size} codes and {parameters / 1e6:.1f} M parameters")
