"""Facts of a run that never was, as the report takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dense2moe.convert.report.facts import ReportFacts, read_facts

HOSTILE = "name: quickstart\n# <script>alert('recipe')</script> & \"quotes\"\nupcycle:\n  num_experts: 4\n"


def figures(value: float) -> list[dict[str, Any]]:
    return [{"name": "perplexity", "value": value, "unit": "", "better": "lower"}]


def evaluation(loss: float, perplexity: float, parameters: int, size: int, speed: float) -> dict[str, Any]:
    return {
        "loss": loss,
        "figures": figures(perplexity),
        "num_parameters": parameters,
        "weight_bytes": size,
        "decode_tokens_per_second": speed,
        "domain_losses": {"prose": loss + 0.25, "code": loss - 0.25},
    }


def routing(load: list[float], entropy: float, margin: float, cosine: float) -> dict[str, Any]:
    return {"load": load, "entropy": entropy, "margin": margin, "cosine": cosine}


def history() -> list[dict[str, Any]]:
    """Two stages of two looks each; the dense model with equal compute takes half as many steps again."""
    lines = []
    for model, stride, train, validation in (
        ("fine-tuned", 20, (2.90, 2.55, 2.41, 2.33), (2.71, 2.52, 2.44, 2.43)),
        ("dense continued", 20, (2.9, 2.6, 2.5, 2.4), (2.74, 2.6, 2.52, 2.54)),
        ("dense, same FLOPs", 30, (2.8, 2.6, 2.4, 2.3), (2.70, 2.55, 2.49, 2.5)),
    ):
        for number, (t, v) in enumerate(zip(train, validation, strict=True), start=1):
            losses = {
                "train_loss": t,
                "balance_loss": 1.1 if model == "fine-tuned" else None,
                "z_loss": None,
                "distillation_loss": None,
            }
            step = {
                "model": model,
                "step": stride * number,
                "num_tokens": stride * number * 2048,
                "phase": (number - 1) // 2,
            }
            high = 0.25 + 0.2 / number
            rest = (1 - high) / 3
            even = routing([0.25, 0.26, 0.24, 0.25], 1.3, 0.2, 1 - 0.01 * number)
            uneven = routing([rest, high, rest + 0.01, rest - 0.01], 1.2, 0.1 * number, 1 - 0.02 * number)
            layers = [{"number": n, **found} for n, found in enumerate([uneven, even] * 2)]
            learned = {
                "learning_rate": 3e-4 / number,
                "validation_loss": None,
                "layers": layers if model == "fine-tuned" else [],
            }
            lines.append({**step, **losses, **learned})
            lines.append({**step, **dict.fromkeys(losses), "learning_rate": None, "validation_loss": v, "layers": []})
    return lines


def agreement(scale: float, top1: float, routing: list[float]) -> dict[str, Any]:
    return {
        "max_error": 8 * scale,
        "mean_error": scale,
        "kl": scale * scale,
        "top1_agreement": top1,
        "routing_agreement": routing,
        "hidden_error": [scale * (1 + layer / 2) for layer in range(4)],
    }


TIMINGS = [
    {
        "lowering": "grouped",
        "prefill_tokens_per_second": 1234.4,
        "decode_tokens_per_second": 432.1,
        "request_seconds": 0.35552,
    },
    {
        "lowering": "qmoe",
        "prefill_tokens_per_second": 1000.0,
        "decode_tokens_per_second": 400.0,
        "request_seconds": 0.416,
    },
]


def variant(
    bits: int, size: int, perplexity: float, scale: float, top1: float, routing: list[float], speed: float
) -> dict[str, Any]:
    names = ("prefill, batch 1, 64 tokens", "prefill, batch 3, left padding", "decode, 24 steps after 40 tokens")
    checks = [
        {
            "name": name,
            "max_error": 3e-6,
            "mean_error": 4e-7,
            "relative_error": 2.5e-6,
            "top1_agreement": 1.0,
            "num_tokens": 64,
            "num_tie_flips": 0,
        }
        for name in names
    ]
    found = {
        "onnxruntime": "1.32.0",
        "checks": checks,
        "twin": agreement(4e-7, 1.0, [1.0, 1.0, 1.0, 0.99998]),
        "finetuned": agreement(scale, top1, routing),
        "figures": figures(perplexity),
        "twin_figures": figures(perplexity),
        "finetuned_figures": figures(11.2345),
        "worst_layer": 2,
        "prefill_tokens_per_second": 20 * speed,
        "decode_tokens_per_second": speed,
    }
    return {
        "quantize": {
            "bits": {"experts": bits, "attention": bits},
            "expert_bytes": size // 2,
            "quantized_expert_share": 1.0 if bits < 32 else 0.0,
            "block_size": 32,
            "quantized_bytes": size // 2,
            "num_quantized_tensors": 40,
            "method": "gptq",
            "fewest_expert_tokens": 900,
            "num_matrices_with_few_tokens": 0,
            "zero_points": False,
            "search": None,
            "tokens_by_layer": {},
            "routing_by_layer": {},
            "num_scaled_groups": 0,
            "num_groups_best_unscaled": 0,
            "num_groups_without_place": 0,
        },
        "onnx": {
            "device": "cpu",
            "element_type": "float32",
            "choice": "timed",
            "num_nodes": 200,
            "lowering": "moe" if bits == 32 else "qmoe",
            "package_bytes": size,
            "min_onnxruntime": "1.23",
            "timings": TIMINGS,
        },
        "parity": {
            "providers": {"CPUExecutionProvider": found, "CUDAExecutionProvider": "not run: no CUDA device"},
            "passed": True,
            "breaches": [],
        },
    }


def make_facts() -> dict[str, Any]:
    """Facts of a run with three variants, both controls, two domains."""
    return {
        "dense2moe": "0.1.0",
        "name": "quickstart",
        "seed": 0,
        "created": "2026-11-23T05:00:00Z",
        "versions": {"python": "3.11.2", "torch": "2.10.0", "transformers": "5.3.0", "onnxruntime": "1.32.0"},
        "machine": {"processor": "x86_64", "cores": 2, "system": "Linux", "memory_bytes": 16_000_000_000},
        "costs": {"finetune": {"seconds": 127.4, "peak_resident_bytes": 1_200_000_000, "planned_bytes": 1_000_000_000}},
        "recipe": HOSTILE,
        "digests": {
            "source": {"config.json": "3c" * 32},
            **{f"onnx-{name}": {"model.onnx": "a7" * 32} for name in ("float32", "int8", "int4")},
        },
        "base_model": "someone/python-docs-4m",
        "license": {"license": "apache-2.0"},
        "keys": {"source": "3f9ad2c09b41", "upcycle": "8c1177e0aa52", "finetune": "d04c55b1a9e7"},
        "source": {
            "architecture": "LlamaForCausalLM",
            "num_parameters": 4_131_072,
            "num_bytes": 8_262_144,
            "dtype": "bfloat16",
            "origin": "recipes/models/python-docs-4m",
        },
        "data": {
            "block_size": 256,
            "domains": ["prose", "code"],
            "num_tokens": {"train": 2_104_320, "validation": 110_592, "test": 113_408},
            "digest": "sha256:5d0c" + "9a" * 28,
        },
        "branches": {},
        "upcycle": {
            "target": "MixtralForCausalLM",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_parameters": 10_430_208,
            "num_active_parameters": 6_231_808,
            "num_bytes": 20_860_416,
            "num_layers": 4,
            "num_sparse_layers": 4,
            "dropped": [],
            "keeps_function": True,
            "num_tensors_compared": 75,
            "router_text_tokens": [],
            "router_loads": {},
            "receipt_mode": "whole",
            "receipt_notes": [HOSTILE],
            "receipt": [
                {
                    "router": "shipped",
                    "dtype": "float32",
                    "text": "one long text",
                    "experts": "eager",
                    "num_tokens": 320,
                    "rel": 6.1e-7,
                    "bitwise": False,
                    "bitwise_due": False,
                    "limit": None,
                },
                {
                    "router": "zero",
                    "dtype": "float32",
                    "text": "one long text",
                    "experts": "eager",
                    "num_tokens": 320,
                    "rel": 0.0,
                    "bitwise": True,
                    "bitwise_due": True,
                    "limit": None,
                },
                {
                    "router": "shipped",
                    "dtype": "bfloat16",
                    "text": "padded batch",
                    "experts": "eager",
                    "num_tokens": 320,
                    "rel": 7.3e-3,
                    "bitwise": False,
                    "bitwise_due": False,
                    "limit": None,
                },
                {
                    "router": "zero",
                    "dtype": "bfloat16",
                    "text": "padded batch",
                    "experts": "eager",
                    "num_tokens": 320,
                    "rel": 0.0,
                    "bitwise": True,
                    "bitwise_due": True,
                    "limit": None,
                },
            ],
        },
        "finetune": {
            "evaluations": {
                "dense": evaluation(2.7, 14.8797, 4_131_072, 8_262_144, 210.0),
                "upcycled": evaluation(2.7, 14.8798, 10_430_208, 20_860_416, 96.0),
                "fine-tuned": evaluation(2.419, 11.2345, 10_430_208, 41_720_832, 97.0),
                "dense continued": evaluation(2.51, 12.3049, 4_131_072, 16_524_288, 208.0),
                "dense, same FLOPs": evaluation(2.4849, 12.0000, 4_131_072, 16_524_288, 209.0),
            },
            "history": history(),
            "best_steps": {"fine-tuned": 80, "dense continued": 60, "dense, same FLOPs": 90},
            "num_steps": {"fine-tuned": 80, "dense continued": 80, "dense, same FLOPs": 120},
            "seconds": {"fine-tuned": 45.0, "dense continued": 30.0, "dense, same FLOPs": 44.0},
            "flops": {"fine-tuned": 4.0e13, "dense continued": 2.6e13, "dense, same FLOPs": 3.9e13},
            "control_rate": 1.0,
            "oracle": {
                "num_blocks": 32,
                "routed": {"prose": 2.5, "code": 2.3},
                "experts": [
                    {"prose": 2.6, "code": 2.9},
                    {"prose": 2.8, "code": 2.41},
                    {"prose": 2.9, "code": 2.7},
                    {"prose": 2.7, "code": 2.5},
                ],
                "best_expert": {"prose": 0, "code": 1},
                "random": {"prose": 3.0, "code": 2.8},
            },
            "precision": "bfloat16",
            "router_task_gradient": 1e-9,
            "domains": {
                "loads": {
                    "prose": [
                        [0.25, 0.25, 0.25, 0.25],
                        [0.2, 0.3, 0.25, 0.25],
                        [0.1, 0.4, 0.25, 0.25],
                        [0.25, 0.25, 0.3, 0.2],
                    ],
                    "code": [
                        [0.25, 0.25, 0.25, 0.25],
                        [0.3, 0.2, 0.25, 0.25],
                        [0.3, 0.15, 0.3, 0.25],
                        [0.25, 0.25, 0.2, 0.3],
                    ],
                },
                "between": [0.0, 0.1, 0.25, 0.1],
                "within": [0.01, 0.02, 0.03, 0.02],
                "information": [0.3, 0.2, 0.1, 0.2],
            },
            "sparse_layers": [0, 1, 2, 3],
            "warnings": [
                "the routers' task gradient was 1e-09 of the whole at the start; set upcycle.experts.noise to start "
                "them apart"
            ],
        },
        "variants": {
            "float32": variant(32, 41_900_000, 11.2346, 5e-7, 1.0, [1.0, 1.0, 1.0, 0.99999], 431.0),
            "int8": variant(8, 12_300_000, 11.2411, 6e-4, 0.9961, [0.999, 0.998, 0.9973, 0.9969], 622.0),
            "int4": variant(4, 7_810_000, 11.5123, 9e-3, 0.9512, [0.991, 0.982, 0.9731, 0.9689], 655.0),
        },
    }


def tiered(facts: dict[str, Any]) -> dict[str, Any]:
    """The same facts with what parity's tiers tell."""
    for number, variant in enumerate(facts["variants"].values()):
        found = variant["parity"]["providers"]["CPUExecutionProvider"]
        found["tiers"] = dict.fromkeys(
            ("weights", "operator", "layer", "logits", "language", "routing", "files"), "passed"
        )
        found["limits"] = {
            "logits": {"value": 1.2e-5, "origin": "32 times what float32 differs from float64 on this text"}
        }
        found["noise"] = {"logits": 3.7e-7, "tie_margin": 1e-5, "num_tokens": 512}
        found["places"] = [
            {
                "layer": n,
                "part": part,
                "error": 1e-7 * (1 + n + 4 * (part == "experts")),
                "limit": 3.2e-6,
                "noise": 1e-7 if n else None,
                "num_tokens": 112,
                "num_flips": number * (part == "experts"),
                "factor": 1.0,
                "first_position": None,
                "experts": [],
                "factors": None,
                "factor_limit": None,
            }
            for part in ("router", "experts")
            for n in range(4)
        ]
        head = {
            "layer": -1,
            "part": "head",
            "error": 0.0,
            "limit": 7.6e-6,
            "noise": 1e-7,
            "num_tokens": 112,
            "num_flips": 0,
        }
        found["places"].append(
            {**head, "factor": 1.0, "first_position": None, "experts": [], "factors": None, "factor_limit": None}
        )
        found["weights"] = {"num_rows": 12345, "num_vectors": 9, "num_wrong": 0, "wrong": [], "not_judged": []}
        found["files"] = {"compared": ["tokenizer.json", "config.json"], "missing": [], "differences": []}
        found["logits_factor"] = None
        found["free_run"] = {
            "num_rows": 8,
            "num_tokens": 64,
            "shortest_prefix": 64 - 20 * number,
            "mean_prefix": 64 - 5.5 * number,
            "num_diverged": number,
            "largest_gap": 1e-3 * number,
        }
        found["forced"] = {"kl": 1e-4, "kl_free": 3e-4, "num_tokens": 512}
        found["placement"] = {"CPUExecutionProvider": {"MatMul": 12}}
        found["num_fallback_nodes"] = 0
        agreements = [1 - 0.16 * number, 1 - 0.06 * number, 1 - 0.02 * number, 1.0, 1.0, None]
        edges = [0, 1e-3, 1e-2, 0.1, 0.3, 1, None]
        counts = [40, 400, 3000, 8000, 12000, 0]
        margins = [
            {"least": least, "below": below, "num_choices": count, "agreement": agreed}
            for least, below, count, agreed in zip(edges[:-1], edges[1:], counts, agreements, strict=True)
        ]
        for against in ("twin", "finetuned"):
            found[against] |= {
                "top5_agreement": 0.999,
                "attention_error": [1e-7] * 4,
                "margins": margins,
                "flipped_share": 0.01 * number,
                "kl_flipped": 1e-2,
                "kl_unflipped": 1e-5,
            }
    return facts


def searched(facts: dict[str, Any]) -> dict[str, Any]:
    """The same facts with a search of bits for int4.

    The third point is beaten by the second in both size and figure."""
    tried = (
        (6_000_000, 11.9, "4 bits"),
        (7_000_000, 11.5, "4 bits, attention 8"),
        (8_000_000, 11.6, "half"),
        (9_000_000, 11.3, "8 bits"),
    )
    points = [
        {"package_bytes": size, "figures": figures(p), "label": label, "chosen": size == 7_000_000}
        for size, p, label in tried
    ]
    facts["variants"]["int4"]["quantize"]["search"] = {
        "points": points,
        "reference_figures": figures(11.24),
        "limit": "+3 %",
        "num_tokens": 4096,
        "bits": {"experts": [4], "attention": [8]},
        "sensitivities": [],
    }
    return facts


def set_figure(facts: dict[str, Any], model: str, value: float) -> None:
    """Give a torch model another figure."""
    facts["finetune"]["evaluations"][model]["figures"][0]["value"] = value


def cpu(facts: dict[str, Any], variant: str) -> dict[str, Any]:
    """What parity found on the CPU."""
    found: dict[str, Any] = facts["variants"][variant]["parity"]["providers"]["CPUExecutionProvider"]
    return found


def records(facts: dict[str, Any]) -> ReportFacts:
    """The facts as records, as the commands read them."""
    return read_facts(facts, "quickstart")


def classified(facts: dict[str, Any]) -> dict[str, Any]:
    """The same facts of a classifier, which is judged by its F1.

    It is 1 less a twentieth of each perplexity."""
    for found in _figured(facts):
        for figure in found:
            figure |= {"name": "F1", "value": 1 - figure["value"] / 20, "better": "higher"}
    return facts


def _figured(item: Any) -> Iterator[list[dict[str, Any]]]:
    """Every list of figures in the facts."""
    match item:
        case dict():
            for name, value in item.items():
                if name.endswith("figures"):
                    yield value
                else:
                    yield from _figured(value)
        case list():
            for value in item:
                yield from _figured(value)


def forget(facts: dict[str, Any], *models: str) -> None:
    """The facts of a run that did not train these models."""
    finetune = facts["finetune"]
    for key in ("evaluations", "best_steps", "num_steps", "seconds", "flops"):
        for model in models:
            del finetune[key][model]
    if "fine-tuned" in models:
        finetune["oracle"] = None
    finetune["history"] = [step for step in finetune["history"] if step["model"] not in models]
