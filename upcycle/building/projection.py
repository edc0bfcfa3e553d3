"""A mixture's projection of domain embeddings, kept in a folder beside it.

See `gates.nexus`. transformers reads none of it: the router's rows are what was multiplied out. It is there for experts
that are added later, and goes along with the mixture through training.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dense2moe.upcycle.errors import one_line_errors
from dense2moe.upcycle.gates.nexus import Embeddings, place

FOLDER = "nexus"
_NAME = "projection.safetensors"
_LAYER = "layers.{layer}"


@dataclass(frozen=True)
class Projection:
    """From embeddings of texts to router rows, layer by layer; float32.

    Embeddings are means of token embeddings, [H]; `centre` [H] is the mean of the domains that it was fitted to, and
    `directions` [R, H] are the ones that it reads. `places` [rows, R] are those of the domains of the first router rows
    along them, and `layers` has [R, H] of each layer with experts, by its number.
    """

    centre: torch.Tensor
    directions: torch.Tensor
    places: torch.Tensor
    layers: Mapping[int, torch.Tensor]

    def rows(self, layer: int) -> torch.Tensor:
        """The router rows [rows, H] that a layer began with."""
        return self.places @ self.layers[layer]

    def project(self, embedding: torch.Tensor, layer: int) -> torch.Tensor:
        """The router row [H] of a domain's embedding [H]."""
        return place(embedding, self.centre, self.directions).float() @ self.layers[layer]


def make_projection(embeddings: Embeddings, layers: Mapping[int, torch.Tensor]) -> Projection:
    """What is kept of texts' embeddings and of each layer's matrix."""
    return Projection(
        embeddings.domains.mean(0).to(torch.float32),
        embeddings.directions.to(torch.float32),
        embeddings.places.to(torch.float32),
        layers,
    )


def write_projection(projection: Projection, directory: Path) -> None:
    """Write it into a folder of a mixture's directory."""
    tensors = {name: getattr(projection, name) for name in ("centre", "directions", "places")}
    tensors |= {_LAYER.format(layer=layer): matrix for layer, matrix in projection.layers.items()}
    (directory / FOLDER).mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / FOLDER / _NAME)


def read_projection(directory: Path) -> Projection | None:
    """A mixture's projection; None where it has none.

    Raises:
        UpcycleError: the file is damaged.
    """
    path = directory / FOLDER / _NAME
    if not path.is_file():
        return None
    with one_line_errors(path, "cannot be read as a projection of router rows", "delete it, or restore it"):
        tensors = load_file(path)
        prefix = _LAYER.format(layer="")
        layers = {int(name.removeprefix(prefix)): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return Projection(tensors["centre"], tensors["directions"], tensors["places"], layers)


def copy_projection(source: Path, target: Path) -> None:
    """Let a mixture made of another one have its projection."""
    if (source / FOLDER).is_dir():
        shutil.copytree(source / FOLDER, target / FOLDER, dirs_exist_ok=True)
