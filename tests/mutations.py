"""Mutations of the code that tests must kill: a table, and how its snippets are found.

A mutation is a piece of source text and what it becomes: a sign, a swapped expert, a limit, a missing mask. Its snippet
is looked for in all files of the three packages, so that a file may be moved, and white space, comments and commas
before a closing bracket do not count, so that a line may be wrapped anew. It must be found once.
`benchmarks/mutations.py` makes each of them in a copy of the sources and runs the tests that must fail.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

PACKAGES = ("convert", "upcycle", "export")
_GAP, _APART = r"(?:\s|#[^\n]*\n)*", r"(?:\s|#[^\n]*\n)+"
_CLOSING = (")", "]", "}")


@dataclass(frozen=True)
class Mutation:
    """A mistake in the code: `snippet` becomes `replacement`, and `test` must fail, in whatever file it stands.

    Of a test with many parameters, `only` names those that are run, as pytest's -k does.
    """

    name: str
    snippet: str
    replacement: str
    test: str
    only: str = ""

    @property
    def chosen(self) -> str:
        """The test as an expression of pytest's -k."""
        return f"{self.test} and {self.only}" if self.only else self.test


MUTATIONS = (
    # surgery
    Mutation(
        "gate and up of the experts are exchanged",
        '"expert_gate": "ffn_gate", "expert_up": "ffn_up"',
        '"expert_gate": "ffn_up", "expert_up": "ffn_gate"',
        "test_experts_without_noise_are_the_ffn_and_everything_else_is_unchanged",
    ),
    Mutation(
        "stacked experts have up before gate",
        "self._part(_EXPERT_OF[part], layer, site, expert) for part in parts",
        "self._part(_EXPERT_OF[part], layer, site, expert) for part in reversed(parts)",
        "test_granites_experts_are_stacked_gate_before_up",
    ),
    Mutation(
        "values of a fused attention begin at its keys",
        "start = _key_rows(config)[1]",
        "start = _key_rows(config)[0]",
        "test_phi3s_fused_rows_go_to_the_matrices_that_transformers_splits_them_into",
    ),
    Mutation(
        "a half that a shared expert gives is not left out of the routed ones",
        'return scale / 2 if self.config.shared_expert == "half" else scale',
        "return scale",
        "test_down_projections_are_scaled_by_what_the_router_leaves_of_them",
    ),
    Mutation(
        "a norm's one is not folded in",
        "return weight + 1.0",
        "return weight",
        "test_gemmas_norms_and_embedding_are_folded_in_float32_and_its_head_is_not",
    ),
    Mutation(
        "every part of an FFN has the first neurons",
        "neurons = (part * self.width, (part + 1) * self.width)",
        "neurons = (0, self.width)",
        "test_split_experts_partition_the_neurons",
        "[mixtral]",
    ),
    Mutation(
        "one set of neurons is drawn anew in all layers",
        'axis, neurons, f"{site}.{expert}"',
        'axis, neurons, f"0.{expert}"',
        "test_every_layer_has_sets_of_its_own",
    ),
    Mutation(
        "rows of a router are repeated in turns and not side by side",
        "rows.repeat_interleave(router.repeat, dim=0)",
        "rows.repeat(router.repeat, 1)",
        "test_granular_experts_of_a_drawn_router_are_the_dense_model",
        "[mixtral-4]",
    ),
    Mutation(
        "noise is not relative to the weight's deviation",
        "noise.mul_(relative_std * std)",
        "noise.mul_(relative_std)",
        "test_noise_is_relative_to_the_deviation_that_is_given",
    ),
    Mutation(
        "what was written is not compared when it is read back",
        "if not torch.equal(found, expected):",
        "if len(found) != len(expected):",
        "test_one_bit_of_any_tensor_is_found",
    ),
    # plan and receipt
    Mutation(
        "a tensor without a place in the model is dropped",
        "if name not in expected and name not in dropped:",
        "if name not in expected and name in dropped:",
        "test_a_tensor_that_would_be_lost_is_refused",
    ),
    Mutation(
        "every expert counts as active",
        "experts * self.settings.num_experts_per_tok // self.settings.num_experts",
        "experts",
        "test_active_parameters_leave_out_the_experts_that_a_token_does_not_visit",
    ),
    Mutation(
        "NaN is below every limit of the receipt",
        "if c.limit is not None and not c.rel <= c.limit:",
        "if c.limit is not None and c.rel > c.limit:",
        "test_a_weight_that_is_no_number_is_refused",
    ),
    # gates and balance
    Mutation(
        "a selection bias moves towards the load",
        "(counts.sum() - len(counts) * counts).sign()",
        "(len(counts) * counts - counts.sum()).sign()",
        "test_a_bias_moves_by_the_rate_towards_the_mean_load",
    ),
    Mutation(
        "a load is a count and not a share",
        "F.one_hot(chosen.flatten(), num_experts).float().mean(0)",
        "F.one_hot(chosen.flatten(), num_experts).float().sum(0)",
        "test_load_is_counted_over_tokens_and_slots",
    ),
    Mutation(
        "the z-loss is not squared",
        "router_logits.float().logsumexp(-1).square().mean()",
        "router_logits.float().logsumexp(-1).mean()",
        "test_the_z_loss_and_its_gradient_are_as_by_hand",
    ),
    Mutation(
        "a drawn router takes no account of what it reads",
        "logit_std / max(input_length, 1e-12)",
        "logit_std",
        "test_logits_of_normed_states_have_the_deviation_asked_for",
    ),
    Mutation(
        "weights of chosen experts are multiplied by their sum",
        'graph.op("Div", [scores, total_T1]',
        'graph.op("Mul", [scores, total_T1]',
        "test_every_lowering_computes_every_gate",
        "grouped-sigmoid",
    ),
    Mutation(
        "an exported token visits one expert more",
        'graph.constant("num_experts_per_tok", int64(k))',
        'graph.constant("num_experts_per_tok", int64(k + 1))',
        "test_an_ffn_width_that_no_block_divides_is_computed",
        "[grouped]",
    ),
    Mutation(
        "a selection bias is not exported",
        'graph.op("Add", [scores_TE, bias_1E]',
        'graph.op("Add", [scores_TE, scores_TE]',
        "test_every_lowering_computes_every_gate",
        "grouped-sigmoid",
    ),
    # training
    Mutation(
        "the loss is of the token itself and not of the next",
        "F.cross_entropy(block[:-1].float(), ids[number, 1:])",
        "F.cross_entropy(block[:-1].float(), ids[number, :-1])",
        "test_the_loss_of_two_tokens_is_as_by_hand",
    ),
    Mutation(
        "the temperature of distillation makes the gradient small",
        'reduction="batchmean", log_target=True) * temperature**2',
        'reduction="batchmean", log_target=True)',
        "test_the_temperature_softens_both_and_its_square_keeps_the_gradient",
    ),
    Mutation(
        "each part of an accumulated step is balanced by its own load",
        "loads = self._load_ahead",
        "loads = None",
        "test_losses_and_gradients_are_those_of_the_whole_batch_however_many_parts_it_has",
        "mixture_checkpoint-change0",
    ),
    Mutation(
        "a selection bias counts the last part of a step alone",
        "self._counts[number] + counts if number in self._counts else counts",
        "counts",
        "test_a_step_moves_each_bias_by_the_rate_against_the_load_of_all_its_parts",
        "[4-all]",
    ),
    Mutation(
        "routers learn at the common rate",
        '"routers": settings.router_learning_rate',
        '"routers": settings.learning_rate',
        "test_every_group_has_its_own_rate_and_only_matrices_decay",
    ),
    Mutation(
        "the worst step is kept",
        "return min(evaluations, key=lambda step",
        "return max(evaluations, key=lambda step",
        "test_the_best_weights_are_kept_whole_when_later_ones_are_worse",
    ),
    Mutation(
        "a killed run goes on with a fresh optimizer",
        "fill_optimizer(optimizer, state)",
        "state.clear()",
        "test_a_killed_run_ends_with_the_weights_of_one_that_was_not",
        "[7-mixture_checkpoint]",
    ),
    Mutation(
        "every epoch has the order of the first",
        "self._places = torch.randperm(self.num_blocks, generator=self._generator)",
        "self._places = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(0))",
        "test_the_order_is_drawn_epoch_by_epoch_and_is_that_of_all_drawn_at_once",
    ),
    Mutation(
        "a divided tensor is collected as one process's part",
        "found.full_tensor() if found.numel()",
        "found.to_local() if found.numel()",
        "test_two_processes_share_words_and_the_parts_of_a_tensor",
    ),
    Mutation(
        "sorted tokens meet the weights of unsorted ones",
        "top_k_weights.flatten().index_select(0, order)",
        "top_k_weights.flatten()",
        "test_values_and_gradients_are_those_of_all_experts_on_all_tokens",
    ),
    # data
    Mutation(
        "a held-out file may be trained on",
        'trained = {file.resolve() for file in files["train"]}',
        "trained: set[Path] = set()",
        "test_a_held_out_file_that_is_also_trained_on_is_refused",
    ),
    Mutation(
        "all documents are trained on, the held-out ones too",
        "_hashed_split(piece.text.strip(), held_out) == split if",
        '_hashed_split(piece.text.strip(), held_out) in (split, "test") if',
        "test_without_held_out_files_the_hash_of_a_document_decides",
    ),
    Mutation(
        "a block ends with the first token of the next",
        "tokens[: len(tokens) // block_size * block_size].view(-1, block_size)",
        "tokens[: len(tokens) // block_size * block_size].view(-1, block_size).roll(1, 1)",
        "test_blocks_hold_every_token_in_order",
    ),
    Mutation(
        "routers read padding",
        "return states[mask.bool()].to(torch.float32)",
        "return states.flatten(0, 1).to(torch.float32)",
        "test_real_tokens_are_those_of_the_mask_in_float32",
    ),
    # checkpoints
    Mutation(
        "tensors that overlap in a file are read",
        "if begin != position:",
        "if begin > position:",
        "test_spans_that_do_not_tile_the_data_are_refused",
    ),
    Mutation(
        "a truncated file of weights is read",
        "if 8 + length + position != size:",
        "if 8 + length + position < size:",
        "test_a_truncated_file_and_one_with_trailing_bytes_are_refused",
    ),
    Mutation(
        "infinite weights pass",
        "int((~torch.isfinite(chunk)).sum())",
        "int(torch.isnan(chunk).sum())",
        "test_values_that_are_not_finite_are_refused_with_their_count",
    ),
    Mutation(
        "a damaged folder is taken up again",
        "or _checksum(found[name], advance) != checksum",
        "or _checksum(found[name], advance) < 0",
        "test_damage_to_a_sealed_folder_is_told_in_a_line_and_the_folder_goes",
    ),
    # quantization
    Mutation(
        "weights are rounded down",
        "return (w * inverse).round().clamp(",
        "return (w * inverse).floor().clamp(",
        "test_every_weight_within_the_range_of_integers_is_off_by_at_most_half_a_step",
    ),
    Mutation(
        "the zero point is one less",
        "return 1 << (bits - 1)",
        "return (1 << (bits - 1)) - 1",
        "test_matmul_n_bits_reads_the_codes_as_dequantize_does",
    ),
    Mutation(
        "integers are clamped one too late",
        "clamp(-zero, (1 << bits) - 1 - zero)",
        "clamp(-zero, (1 << bits) - zero)",
        "test_no_block_is_worse_than_rounding_to_the_nearest_with_the_largest_weight_at_an_end",
    ),
    Mutation(
        "a last block that is not full is left out",
        "return math.ceil(width / block_size)",
        "return width // block_size",
        "test_num_blocks_counts_the_padded_one",
    ),
    Mutation(
        "GPTQ adds an error to later columns",
        "left[later].addcmul_(rows[column, :, later].transpose(0, 1), error, value=-1)",
        "left[later].addcmul_(rows[column, :, later].transpose(0, 1), error, value=1)",
        "test_integers_are_those_of_the_formula_with_the_inverse_taken_anew",
    ),
    Mutation(
        "integers are recovered by rounding down",
        "cut(weight, block_size) / scale).round()",
        "cut(weight, block_size) / scale).floor()",
        "test_integers_follow_from_the_weights_and_their_scales",
    ),
    # graph
    Mutation(
        "the mask hides real tokens and shows padding",
        'graph.op("Where", [is_padding, masked, open_]',
        'graph.op("Where", [is_padding, open_, masked]',
        "test_a_padded_batch_generates_what_each_prompt_does_alone_and_transformers_does",
    ),
    Mutation(
        "a window is one token wider",
        '"GreaterOrEqual", [distance_ST',
        '"Greater", [distance_ST',
        "test_a_float32_package_equals_transformers",
        "mistral",
    ),
    Mutation(
        "positions of tokens, and not of padding, are one more",
        '"slot_after"), one], "slots"',
        '"slot_after"), zero], "slots"',
        "test_a_padded_batch_generates_what_each_prompt_does_alone_and_transformers_does",
    ),
    Mutation(
        "rotary embeddings turn backwards",
        "return cos.contiguous(), sin.contiguous()",
        "return cos.contiguous(), -sin.contiguous()",
        "test_heads_tied_or_not_equal_transformers",
        "[True-grouped]",
    ),
    Mutation(
        "a head of its own is passed over for the embedding",
        'family.name("embedding" if c.tie_word_embeddings else "head")',
        'family.name("embedding")',
        "test_heads_tied_or_not_equal_transformers",
        "[False-grouped]",
    ),
    Mutation(
        "the long factors of a longrope begin a token early",
        'graph.op("Greater", [longest, bound]',
        'graph.op("GreaterOrEqual", [longest, bound]',
        "test_a_longrope_switches_its_factors_where_transformers_does",
        "[8]",
    ),
    # lowerings
    Mutation(
        "the fused operator has up before gate",
        "torch.stack([_read(e.gate), _read(e.up)], dim=1)",
        "torch.stack([_read(e.up), _read(e.gate)], dim=1)",
        "test_an_expert_may_get_no_token",
        "[moe-chosen0]",
    ),
    Mutation(
        "sorted rows are not brought back in order",
        'graph.op("Gather", [down_RH, inverse_R]',
        'graph.op("Gather", [down_RH, order_R]',
        "test_an_expert_may_get_no_token",
        "[grouped-chosen0]",
    ),
    Mutation(
        "a second expert overwrites what the first gave",
        '{"reduction": "add"}',
        '{"reduction": "none"}',
        "test_an_expert_may_get_no_token",
        "[unrolled-chosen0]",
    ),
    Mutation(
        "the factor on the weights of a gate is lost",
        "np.array(gate.scale, np.float32)",
        "np.array(1.0, np.float32)",
        "test_every_lowering_computes_every_gate",
        "grouped-softmax",
    ),
    Mutation(
        "a shared expert's weight is no sigmoid",
        'graph.op("Sigmoid", [gate]',
        'graph.op("Tanh", [gate]',
        "test_a_float32_package_equals_transformers",
        "half",
    ),
    # runtime
    Mutation(
        "padding of a prompt is a token",
        "= 1 if mask is None else mask",
        "= 1",
        "test_a_padded_batch_generates_what_each_prompt_does_alone_and_transformers_does",
    ),
    Mutation(
        "a nucleus has one token more at its boundary",
        "(before_BN < top_p * total_B1)",
        "(before_BN <= top_p * total_B1)",
        "test_a_nucleus_whose_tokens_hold_just_its_share_has_no_more",
    ),
    Mutation(
        "the temperature sharpens what it is to soften",
        "(logits - logits.max(axis=1, keepdims=True)) / temperature",
        "(logits - logits.max(axis=1, keepdims=True)) * temperature",
        "test_tokens_are_drawn_by_their_probabilities",
    ),
    Mutation(
        "the seed changes nothing",
        "np.random.default_rng([seed, count, *prompt])",
        "np.random.default_rng([0, count, *prompt])",
        "test_numbers_depend_on_the_seed_and_the_prompt_alone",
    ),
    Mutation(
        "text goes on after its end",
        "running = [runs and token not in stop for",
        "running = [runs and token is not stop for",
        "test_generation_ends_after_the_first_stop_token",
    ),
    # parity
    Mutation(
        "the limit of logits is a hundred times as wide",
        "config.noise_multiple * max(noise, _LEAST_NOISE)",
        "100 * config.noise_multiple * max(noise, _LEAST_NOISE)",
        "test_a_limit_is_a_multiple_of_the_noise_and_says_so",
    ),
    Mutation(
        "the tier of files is not judged",
        "_task, _routing, _files)",
        "_task, _routing)",
        "test_wrong_rows_and_files_have_a_line_each_and_what_is_more_is_counted",
    ),
    Mutation(
        "errors of padding are judged",
        "return mask.bool() & (flips.cumsum(1) == 0)",
        "return flips.cumsum(1) == 0",
        "test_what_stands_at_padding_is_not_judged",
    ),
    Mutation(
        "near-ties are faults",
        "& (margin < tie_margin)",
        "& (margin < 0)",
        "test_what_follows_a_near_tie_flip_is_not_judged_and_a_clear_flip_is",
    ),
    Mutation(
        "the margin of a near-tie is ten thousand times as wide",
        "return max(TIE_MARGIN, _TIE_MULTIPLE * noise)",
        "return 1e4 * max(TIE_MARGIN, _TIE_MULTIPLE * noise)",
        "test_the_margin_of_a_near_tie_grows_with_the_noise_and_not_with_flips",
    ),
    # artifacts
    Mutation(
        "files of an artifact are not compared with their digests",
        '(found := digest(path)) != record["sha256"]',
        '(found := digest(path)) == ""',
        "test_damage_is_found",
    ),
    Mutation(
        "an artifact is renamed before its manifest is on the disk",
        "sync(self.directory / MANIFEST_NAME)",
        "sync(self.directory)",
        "test_all_is_forced_to_disk_before_the_name_and_the_name_after",
    ),
    Mutation(
        "two runs hold one work directory",
        "fcntl.flock(file, how | fcntl.LOCK_NB)",
        "fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "test_the_lock_keeps_others_out_until_its_holder_is_killed",
    ),
    Mutation(
        "a changed setting makes no new artifact",
        '"settings": dict(settings), "code": code',
        '"settings": {}, "code": code',
        "test_the_key_is_the_digest_of_canonical_json",
    ),
    # recipe and commands
    Mutation(
        "a key of a recipe that is given twice counts once",
        "if word in values:",
        "if word in self._lines:",
        "test_a_key_given_twice_is_refused_with_both_lines",
    ),
    Mutation(
        "an unknown key of upcycling or fine-tuning is accepted",
        'extra="forbid") def named_value(record',
        'extra="ignore")\n\n\ndef named_value(record',
        "test_an_unknown_key_names_the_one_that_was_meant",
    ),
    Mutation(
        "a signal ends a command as an error does",
        "self.exit_code = 128 + number",
        "self.exit_code = 1",
        "test_a_signal_ends_a_command_in_one_line_and_its_own_code",
    ),
    # report
    Mutation(
        "a figure that is worse is called better",
        "'better' if gain > 0 else 'worse'} than",
        "'worse' if gain > 0 else 'better'} than",
        "test_the_verdict_compares_each_variant_with_float32_onnx",
    ),
    Mutation(
        "a report's routing agreement is its best layer's",
        "min(agreement.routing_agreement, default=None)",
        "max(agreement.routing_agreement, default=None)",
        "test_a_variant_row_takes_its_worst_layer_and_its_agreement_with_the_fine_tuned_model",
    ),
    Mutation(
        "the smallest model of a report may be one that failed",
        "for name, found in facts.variants.items() if found.parity.passed}",
        "for name, found in facts.variants.items()}",
        "test_the_smallest_model_of_the_tiles_has_passed",
    ),
    Mutation(
        "a ratio of two runs is upside down",
        "second / first:.2f",
        "first / second:.2f",
        "test_every_figure_has_its_ratio",
    ),
)


def find_tests(root: Path) -> dict[str, list[str]]:
    """The names of the files of tests below `root` that each test stands in."""
    found: dict[str, list[str]] = {}
    for file in sorted((root / "tests").glob("test_*.py")):
        for test in re.findall(r"^(?:async )?def (test_\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE):
            found.setdefault(test, []).append(file.name)
    return found


def read_sources(root: Path) -> dict[Path, str]:
    """The text of every Python file of the three packages below `root`, by its path there."""
    files = (file for package in PACKAGES for file in sorted((root / package).rglob("*.py")))
    return {file.relative_to(root): file.read_text(encoding="utf-8") for file in files}


def locate(snippet: str, sources: Mapping[Path, str]) -> Iterator[tuple[Path, int, int]]:
    """Every place where the snippet stands: the file, where it begins there, and where it ends."""
    pattern = _compile(snippet)
    for path, text in sources.items():
        yield from ((path, *found.span()) for found in pattern.finditer(text))


def mutate(mutation: Mutation, sources: Mapping[Path, str]) -> tuple[Path, str]:
    """The file that a mutation changes, and its text with the mutation in it.

    Raises:
        LookupError: the snippet stands nowhere, or more than once.
    """
    places = list(locate(mutation.snippet, sources))
    if len(places) != 1:
        where = ", ".join(f"{path}:{sources[path].count(chr(10), 0, start) + 1}" for path, start, _ in places)
        raise LookupError(
            f"'{mutation.name}': its snippet is found {f'in {where}' if places else 'nowhere'}; it must be found once: "
            f"{mutation.snippet}"
        )
    path, start, stop = places[0]
    return path, sources[path][:start] + mutation.replacement + sources[path][stop:]


def _compile(snippet: str) -> re.Pattern[str]:
    """What matches the snippet's words and signs with any space, comment or trailing comma between them."""
    words = re.findall(r"\w+|[^\w\s]", snippet)
    parts = [re.escape(words[0])]
    for before, word in pairwise(words):
        parts.append(_APART if before[-1].isalnum() and word[0].isalnum() else _GAP)
        parts.append((rf"(?:,{_GAP})?" if word in _CLOSING else "") + re.escape(word))
    return re.compile(
        (r"\b" if words[0][0].isalnum() else "") + "".join(parts) + (r"\b" if words[-1][-1].isalnum() else "")
    )
