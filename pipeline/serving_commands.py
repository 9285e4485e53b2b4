"""How servers load an exported draft: a command for each that takes it, and what each does otherwise than here.

What vLLM 0.32.0 and 0.33.0, SGLang 0.5.23 and TensorRT-LLM's sources do with the files; docs/serving.md says how that
was found out.
"""

import json
import shlex
from dataclasses import dataclass
from textwrap import dedent

from transformers import Qwen3Config

from stages.evaluate.calibration import CALIBRATION_FILE
from stages.train.export import SPECULATORS_VERSION, Form

VLLM, SGLANG, TENSORRT = SERVERS = ("vLLM", "SGLang", "TensorRT-LLM")
LAYOUT_SOURCES: dict[Form, str] = {
    "dspark": "the layout of the published Qwen3 DSpark drafts of deepseek-ai/DeepSpec",
    "speculators": f"the layout of vllm-project/speculators {SPECULATORS_VERSION}, which vLLM alone reads",
}


@dataclass(frozen=True, kw_only=True)
class ServedDraft:
    """What a command is made of: the config as it was trained, target and folder as a user types them."""

    form: Form
    config: Qwen3Config
    target: str
    folder: str
    has_calibration: bool

    @property
    def head(self) -> str:
        """The kind of Markov head that the files have: a draft without one is written with an empty vanilla one."""
        return str(self.config.markov_head_type) if self.config.markov_rank > 0 else "vanilla"


def describe_serving(draft: ServedDraft) -> list[str]:
    """Paragraphs in Markdown: where the files were loaded, what to know, and the commands."""
    refusals = find_refusals(draft)
    commands = {VLLM: _vllm, SGLANG: _sglang, TENSORRT: _tensorrt}
    offered = [paragraph for server in SERVERS if server not in refusals for paragraph in commands[server](draft)]
    refused = "; ".join(f"{server} ({reason})" for server, reason in refusals.items())
    parts = [
        f"None of these commands was run with this draft. The form is {LAYOUT_SOURCES[draft.form]}.",
        *_describe_evidence(draft, refusals),
        *(f"* {note}" for note in find_notes(draft, refusals)),
        *([f"* It cannot be loaded by {refused}."] if refused else []),
        *offered,
    ]
    if not offered:
        parts.append("No server that is known loads this draft in this form.")
    if draft.form == "speculators":
        parts.append("For other servers export with `--format dspark`.")
    elif draft.head == "vanilla":
        parts += _llama_cpp(draft)
    return parts


def find_refusals(draft: ServedDraft) -> dict[str, str]:
    """Servers that cannot load the draft, and why."""
    config, found = draft.config, {}
    if draft.head != "vanilla":
        found = dict.fromkeys((VLLM, TENSORRT), f"vanilla Markov heads only, this is `{draft.head}`")
    if -1 in config.target_layer_ids:
        found[SGLANG] = "refuses -1, the target's embeddings, among the layers"
    elif config.num_target_layers - 1 in config.target_layer_ids:
        found[SGLANG] = "cannot capture the output of the target's last block"
    if draft.form == "speculators":
        found |= dict.fromkeys((SGLANG, TENSORRT), "does not read this form")
    return {server: found[server] for server in SERVERS if server in found}


def find_notes(draft: ServedDraft, refusals: dict[str, str]) -> list[str]:
    """What a server that loads the draft computes otherwise than it was trained, or takes with a condition."""
    config, notes = draft.config, []
    scale, softcap = (getattr(config, name, None) for name in ("logit_scale", "final_logit_softcapping"))
    if config.markov_rank == 0:
        notes.append(
            "Trained without a Markov head, and written with one of rank 1 whose weights are zero, since vLLM and "
            "SGLang load no draft without: the logits are the same."
        )
    if scale is not None and softcap is None:
        notes.append(
            f"The target scales its logits by {scale:g}. vLLM applies that to the Markov bias too, so "
            "`markov_head.markov_w2` is written divided by it. SGLang does not scale: there the draft's logits are the "
            f"trained ones divided by {scale:g}, and fewer sampled tokens are accepted."
        )
    if softcap is not None:
        scaled = "" if scale is None else f" scales by {scale:g} (vLLM: the Markov bias too, SGLang: neither) and"
        notes.append(
            f"The target{scaled} caps its logits at {softcap:g}; neither vLLM nor SGLang caps the draft's, so fewer "
            "tokens may be accepted than were measured."
        )
    if not config.enable_confidence_head and SGLANG not in refusals:
        notes.append(
            "No confidence head: SGLang loads it in its default mode alone, `SGLANG_RAGGED_VERIFY_MODE=static`."
        )
    return notes


def _describe_evidence(draft: ServedDraft, refusals: dict[str, str]) -> list[str]:
    """What was seen of drafts like this one."""
    if VLLM not in refusals:
        seen = (
            "vLLM 0.32.0 loaded drafts of dspark-offline in this form unchanged, and its greedy decoding accepted "
            "token for token what `dspark evaluate --decode` accepts; 0.33.0 has the same reader."
        )
        others = " SGLang 0.5.23 and TensorRT-LLM were not run; their readers fit the files, field by field."
        return [seen + (others if draft.form == "dspark" else "")]
    if SGLANG not in refusals:
        return ["SGLang 0.5.23 was not run; its head classes gave the trained biases from tensors like these."]
    return []


def _vllm(draft: ServedDraft) -> list[str]:
    size = draft.config.block_size
    speculative = {"method": "dspark", "model": draft.folder, "num_speculative_tokens": size}
    sampled = json.dumps(speculative | {"draft_sample_method": "probabilistic"})
    older = ""
    if draft.form == "speculators":
        older = " v0.26 and before ignore this form's `sample_from_anchor` (a note on vLLM's pull request 48639)."
    return [
        "vLLM",
        _code(f"vllm serve {shlex.quote(draft.target)} --speculative-config {shlex.quote(sampled)}"),
        "Without `draft_sample_method` vLLM's draft is a greedy one: it takes its most likely token at every "
        f"temperature. Sampling it takes memory for max_num_seqs x {size} x {draft.config.vocab_size:,} logits. "
        f"`num_speculative_tokens` may be less than {size}.{older}",
    ]


def _sglang(draft: ServedDraft) -> list[str]:
    command = (
        f"python3 -m sglang.launch_server --model-path {shlex.quote(draft.target)} --speculative-algorithm DSPARK \\\n"
        f"    --speculative-draft-model-path {shlex.quote(draft.folder)} "
        f"--speculative-dspark-block-size {draft.config.block_size}"
    )
    parts = ["SGLang, whose draft samples (`SGLANG_DSPARK_USE_GREEDY_DRAFT` unset)", _code(command)]
    if draft.has_calibration:
        file = shlex.quote(f"{draft.folder}/{CALIBRATION_FILE}")
        parts += [
            f"The same with verify lengths by confidence: SGLang reads `{CALIBRATION_FILE}` as it is. It needs your "
            "server's cost table too, of `python3 -m sglang.benchmark.dspark_sps_profiler`; without, it verifies all.",
            _code(
                f"SGLANG_RAGGED_VERIFY_MODE=compact {command} \\\n    --speculative-dspark-confidence-sts-path {file} "
                "--speculative-dspark-sps-table-path COST_TABLE.json"
            ),
        ]
    return parts


def _tensorrt(draft: ServedDraft) -> list[str]:
    return [
        f"TensorRT-LLM: `trtllm-serve {shlex.quote(draft.target)} --config dspark.yaml`, with `dspark.yaml`",
        _code(
            f"""
            speculative_config:
              decoding_type: DSpark
              speculative_model: {json.dumps(draft.folder)}
              max_draft_len: {draft.config.block_size}
            """
        ),
        f"`max_draft_len` must be {draft.config.block_size}. With `use_rejection_sampling: true` its draft samples.",
    ]


def _llama_cpp(draft: ServedDraft) -> list[str]:
    return [
        "llama.cpp reads DSpark drafts since its pull request 25173; not tried with a draft of dspark-offline",
        _code(
            f"""
            convert_hf_to_gguf.py {shlex.quote(draft.folder)} --target-model-dir TARGET_FOLDER
            llama-server -m TARGET.gguf -md DRAFT.gguf --spec-type draft-dspark \\
                --spec-draft-n-max {draft.config.block_size}
            """
        ),
    ]


def _code(text: str) -> str:
    return "```\n" + dedent(text).strip() + "\n```"
