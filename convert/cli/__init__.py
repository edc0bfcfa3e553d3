"""The command line of dense2moe."""

from __future__ import annotations

import io
import sys

import click

from dense2moe.convert.cli.mixtures import add_expert
from dense2moe.convert.cli.packages import bench, generate, parity
from dense2moe.convert.cli.predictions import predict
from dense2moe.convert.cli.recipes import check, plan, run, schema
from dense2moe.convert.cli.runs import compare, package, show, verify


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="dense2moe", prog_name="dense2moe")
def main() -> None:
    """Turn a pretrained dense transformer into an ONNX Mixture of Experts.

    A recipe says how to upcycle, fine-tune, quantize and export the model. Parity tests show that the ONNX package
    computes what the torch model computes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # what a terminal cannot show ends no command; stderr is made so by Python
        sys.stdout.reconfigure(errors="replace")


for command in (check, plan, run, show, compare, package, verify, generate, predict, bench, parity, add_expert, schema):
    main.add_command(command)
