"""`megatron_tokscale.pretrain` reads or refuses each flag that Megatron itself does not read."""

import ast
from pathlib import Path

import pytest
from jobs import Corpus, run_alone
from megatrons import VERSIONS, scan

from megatron_tokscale import pretrain
from megatron_tokscale.training.data import megatron_datasets
from megatron_tokscale.training.gpt_flags import (
    DATASET_ARGUMENTS,
    MODEL_ARGUMENTS,
    REFUSED,
    flag_refusals,
    is_refused,
    megatron_parser,
)

# Read by nothing in these Megatrons, and without any effect on what is trained: scripts have them.
HARMLESS = (
    *("--use-mcore-models", "--use-flash-attn", "--onnx-safe"),
    "--no-scatter-gather-tensors-in-pipeline",
)

# What pretrain_gpt.py, gpt_builders.py and model_provider.py of 0.18.2, 0.19.0 and main read.
READ_BY_PRETRAIN_GPT = """
    allow_ambiguous_pad_tokens check_for_nan_in_loss_and_grad check_for_spiky_loss
    context_parallel_size create_attention_mask_in_dataloader data_cache_path
    data_parallel_size dataloader_defer_npy_index_mmap dataloader_fast_cache_load
    dataloader_inter_document_masking eod_mask_loss experimental_attention_variant fim_data
    fim_eod_token fim_fragment_rate fim_middle_token fim_no_prefix fim_pad_token
    fim_prefix_token fim_rate fim_split_sample fim_spm_rate fim_suffix_token
    fp16_lm_cross_entropy full_validation heterogeneous_layers_config_path
    hybrid_context_parallel logits_load_decode_threads logits_load_dir
    logits_load_ignore_errors logits_load_kd_loss_alpha logits_load_msc_prefetch_depth
    logits_load_prefetch_factor max_position_embeddings memory_snapshot_path micro_batch_size
    mid_level_dataset_surplus mmap_bin_files mock_data mtp_num_layers multiple_validation_sets
    normalization num_dataset_builder_threads num_experts object_storage_cache_path
    overlap_moe_expert_parallel_comm padded_vocab_size per_dataset_sequences_path
    pipeline_model_parallel_size position_embedding_type qk_l2_norm record_memory_history
    reset_attention_mask reset_position_ids rotary_base rotary_percent
    rotary_seq_len_interpolation_factor seed seq_length sequence_parallel sft spec split
    tensor_model_parallel_size transformer_impl untie_embeddings_and_output_weights
    use_rope_scaling yaml_cfg
"""
# Read of the arguments by what pretrain.py calls: the layer specs read the number of experts from
# the model's configuration, and a snapshot's path is for --record-memory-history.
READ_ELSEWHERE = {"num_experts", "pipeline_model_parallel_size", "memory_snapshot_path"}


@pytest.fixture(params=VERSIONS)
def scanned(request):
    return scan(request.param)


def read_here():
    """The arguments that pretrain.py reads: in tables, and as `args.NAME`.

    Its datasets are configured in megatron_datasets.py, where `plan prepare` finds the same.
    """
    sources = [Path(module.__file__).read_text() for module in (pretrain, megatron_datasets)]
    direct = {
        node.attr
        for node in ast.walk(ast.parse("\n".join(sources)))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "args"
    }
    return direct | {*DATASET_ARGUMENTS.values(), *MODEL_ARGUMENTS.values()}


@pytest.mark.slow
def test_every_flag_is_read_or_refused(scanned):
    read = read_here() | set(scanned["read"])
    dropped = {
        dest: spellings
        for dest, spellings in scanned["flags"].items()
        if dest not in read and not any(is_refused(flag) for flag in spellings)
    }
    assert dropped.pop("help")
    assert [flags for flags in dropped.values() if not {*flags} & {*HARMLESS}] == []
    assert len(scanned["flags"]) > 700


@pytest.mark.slow
def test_the_tables_are_those_of_this_megatron(scanned):
    assert {*DATASET_ARGUMENTS.values(), *MODEL_ARGUMENTS.values()} <= {
        *scanned["flags"],
        "padded_vocab_size",  # set by its validation
        "data_parallel_size",
    }
    assert {*DATASET_ARGUMENTS} <= {*scanned["dataset"]}
    assert {*MODEL_ARGUMENTS} <= {*scanned["model"]}
    assert "get_embedding_ranks" in scanned["pretrain"]


@pytest.mark.slow
def test_every_flag_that_pretrain_gpt_reads_is_read_or_refused():
    flags = {name: "--" + name.replace("_", "-") for name in READ_BY_PRETRAIN_GPT.split()}
    dropped = {name for name, flag in flags.items() if not is_refused(flag)} - read_here()
    assert dropped == READ_ELSEWHERE


@pytest.mark.slow
def test_every_refused_flag_is_one_of_megatrons():
    flags = {
        flag for version in VERSIONS for row in scan(version)["flags"].values() for flag in row
    }
    assert {refusal.flag for refusal in REFUSED} - flags == set()


@pytest.fixture(scope="module")
def parser():
    return megatron_parser()


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("--spec no_such_module x", ["--spec"]),
        ("--fim-data --fim-rate 1.0", ["--fim-data", "--fim-rate"]),
        ("--fim-rate=1.0", ["--fim-rate"]),
        ("--sft", ["--sft"]),
        ("--heterogeneous-layers-config-path file", ["--heterogeneous-layers-config-path"]),
        ("--logits-load-dir folder", ["--logits-load-dir"]),
        ("--yaml-cfg file", ["--yaml-cfg"]),
        ("--experimental-attention-variant dsa", ["--experimental-attention-variant"]),
        ("--transformer-impl inference_optimized", ["--transformer-impl"]),
        ("--openai-gelu --mask-prob 0.2", ["--openai-gelu", "--mask-prob"]),
        ("--transformer-impl local --use-flash-attn --use-mcore-models", []),
        ("--multiple-validation-sets --full-validation --allow-ambiguous-pad-tokens", []),
        ("--object-storage-cache-path folder --use-rope-scaling --rope-scaling-factor 4", []),
        ("--rotary-seq-len-interpolation-factor 2 --mtp-num-layers 1 --log-straggler", []),
    ],
)
def test_flags_of_other_scripts_are_refused(parser, words, flags):
    refusals = flag_refusals(parser, words.split())
    assert [refusal.split()[4].strip(":") for refusal in refusals] == flags
    assert all(refusal.startswith("megatron_tokscale.pretrain does not") for refusal in refusals)


@pytest.mark.megatron
def test_a_job_with_such_a_flag_ends_with_one_line(corpus: Corpus, tmp_path):
    run = ("--tokscale-dir", str(tmp_path / "run"), "--save", str(tmp_path / "save"))
    probe = ("--tokscale-probe-set", str(corpus.probe_set))
    job = run_alone(corpus, *probe, *run, "--train-iters", "2", "--spec", "no_such_module", "x")
    assert job.returncode == 2, job.stderr[-3000:]
    ours = [line for line in job.stderr.splitlines() if line.startswith("megatron-tokscale:")]
    assert len(ours) == 1
    assert "megatron_tokscale.pretrain does not support --spec: " in ours[0]
    assert "Traceback" not in job.stderr
    assert not any(tmp_path.iterdir())
