"""How every package is started in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import torch

from dense2moe.export.errors import ExportError
from dense2moe.export.opening import OpenedPackage
from dense2moe.export.runtime.interface import check_version
from dense2moe.export.storage import MIN_ONNXRUNTIME_KEY


def read_metadata(package: OpenedPackage, provider: str) -> dict[str, str]:
    """What the graph says of itself.

    Raises:
        ExportError: this onnxruntime is older than it needs, or has no such provider.
    """
    if provider not in ort.get_available_providers():
        raise ExportError(
            f"{provider} is not in this onnxruntime ({', '.join(ort.get_available_providers())}); install the "
            "[gpu] extra"
        )
    metadata = {entry.key: entry.value for entry in package.model.metadata_props}
    check_version(metadata.get(MIN_ONNXRUNTIME_KEY, "0"), package.path)
    return metadata


def make_options(num_threads: int = 0, profile: Path | None = None) -> ort.SessionOptions:
    """Options of a session; 0 threads leave the choice to onnxruntime.

    `profile` is where onnxruntime's profile of it begins its name.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    # sums of products of 8 bits would saturate; with VNNI the exact kernel takes twice the time for nothing
    if not torch.cpu._is_vnni_supported():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return options


def start_session(package: OpenedPackage, options: ort.SessionOptions, provider: str) -> ort.InferenceSession:
    """A session of the graph in its present state, on this provider.

    Raises:
        ExportError: onnxruntime refuses it, or takes another provider.
    """
    session = package.start_session(options, provider)
    if session.get_providers()[0] != provider:
        raise ExportError(
            f"{provider} could not start, onnxruntime fell back to {session.get_providers()[0]}; check the driver"
        )
    return session
