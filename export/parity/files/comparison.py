"""A package's tokenizer and configs against the checkpoint's.

A graph with the right logits is still another model to its users when the tokenizer gives other ids, when text ends at
another token, or when a runtime is told other sizes. Four things are compared, each where the package has it:

1. The tokenizer: its vocabulary by id, the ids of a set of texts with and without special tokens, the text that ids
   decode to, the special tokens, the chat template. `AutoTokenizer` loads both with the checkpoint's config: the class
   depends on the architecture, and a package of another maker may have no config.json.
2. generation_config.json: where text ends and how it is drawn. A setting that is left out counts as transformers'
   default.
3. config.json: architecture, sizes, special tokens.
4. genai_config.json: the same sizes and tokens, and names that the graph has. onnxruntime-genai wants every special
   token, so where the checkpoint has none the writers' substitutes are right: `dense2moe.export.package.genai_config`,
   and `resolve_special_token_ids` of genai's builder (models/builders/base.py, 0.18.0), which also lets text end at the
   tokenizer's end token.

A package of another maker may leave files out, which is told; from ours none may be missing that the checkpoint has. A
file that cannot be read is a difference. Code beside a tokenizer or a config is never run.
"""

from __future__ import annotations

from pathlib import Path

from dense2moe.export.parity.files.configs import check_config, check_generation
from dense2moe.export.parity.files.genai import check_genai
from dense2moe.export.parity.files.sides import Failure, Sides, attempt, load_config, or_none, read_graph
from dense2moe.export.parity.files.tokenizer import check_tokenizer, load_tokenizer, vocabulary_name
from dense2moe.export.parity.records import FilesCheck
from dense2moe.export.storage import MODEL_NAME
from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME


def check_files(package: Path, twin: Path) -> FilesCheck:
    """Compare a package's tokenizer and configs with the checkpoint `twin`'s.

    The checkpoint may be the reference of a package by another maker. A damaged file is a difference, never an
    exception.
    """
    config = attempt(load_config, twin)
    tokenizer = None if isinstance(config, Failure) else load_tokenizer(twin, config)
    graph = attempt(read_graph, package)
    failures = tuple(
        f"{name}: {whose} cannot be read ({found.reason}); {cure}"
        for name, whose, found, cure in (
            (MODEL_NAME, "the package's", graph, "it must be an ONNX model"),
            (CONFIG_NAME, "the checkpoint's", config, "it must be the config of a transformers model"),
            (
                vocabulary_name(twin),
                "the checkpoint's tokenizer",
                tokenizer,
                "it must be one that transformers can load",
            ),
        )
        if isinstance(found, Failure)
    )
    sides = Sides(package, twin, or_none(config), or_none(tokenizer), or_none(graph))
    parts = (
        FilesCheck(differences=failures),
        check_tokenizer(sides),
        check_generation(sides),
        check_config(sides),
        check_genai(sides),
    )
    return FilesCheck(
        *(
            tuple(entry for part in parts for entry in getattr(part, field))
            for field in ("compared", "missing", "differences")
        )
    )
