"""Files of the study's forms, made up but for their shape (spec/metrics.md 5.2 and 6): recipes, scores, mappings."""

from __future__ import annotations

KEEP24 = """\
schema_version: 1
kind: reap_recipe
name: eaftreap_keepfrac075_keep24_uniform
description: >
  EAFT-REAP at keep_frac=0.75,
  with a few core experts.
source:
  recipe_intent: "reproducible"
  created_from_artifacts:
    manifest_json: artifacts/manifest.json
model:
  base_model_id: openai/gpt-oss-20b
  pruned_model_label: calib_union_keep24of32_k75_eaftreap
  keep_frac_requested: 0.75
  keep_n: 24
  num_experts: 32
  uniform_keep_n_across_layers: true
  top_k_unchanged: true
  notes:
    - "uniform"
scoring:
  method: eaftreap
  top_k: 4
  entropy_topk: 20
  cc_quantile: 0.15
  uncertain_quantile: 0.85
  weights:
    w_good: 1.0
    w_uncertain: 0.25
    w_conflict: -2.0
  score_key: eaft_gate_norm_sum
  score_definition: "w * g * norm"
profiling_data:
  dataset_repo: somebody/packs
  pack_files:
    - packs/a.parquet
  sampling:
    strategy: per_file
    num_rows: 2000
    seed: 3407
    prompt_hash: "462c003d9956eb2223db203402fbe55b"
  max_seq_length: 4096
  batch_size: 1
selection_constraints:
  keep_n_multiple_of: 4
  core_experts:
    core_pos_top_m: 4
    core_count_top_m: 0
    notes:
      - "by positive mass"
structural_rewrite:
  writer: safetensors
  max_shard_size_gb: 5.0
  shard_bytes_definition: "decimal_gb"
  mapping_file_in_model_dir: expert_mapping.json
evaluation:
  gates_json: near_lossless_gates.json
execution:
  modal:
    commands:
      - "rm -rf everything"
"""
"""The first shape, with everything."""

KEEP20 = """\
schema_version: 1
kind: reap_recipe
name: eaftreap_keepfrac060_keep20
description: 0.60, as 20 of 32
source:
  manifest_json: artifacts/manifest.json
  scores_yaml: null
model:
  base_model_id: openai/gpt-oss-20b
  pruned_model_label: calib_union_keep20of32_k62_eaftreap
  keep_frac_requested: 0.60
  keep_frac_actual: 0.625
  keep_n: 20
  num_experts: 32
  uniform_keep_n_across_layers: true
  top_k_unchanged: true
  constraints:
    keep_n_multiple_of: 4
profiling_data:
  dataset_repo: somebody/packs
  eaft:
    entropy_topk: 20
    cc_quantile: 0.15
    uncertain_quantile: 0.85
    w_good: 1.0
    w_uncertain: 0.25
    w_conflict: -2.0
evaluation:
  status: PENDING
execution:
  modal:
    note: "if there is budget"
"""
"""The first shape, whose EAFT numbers stand with the profile, and which names no method."""

FLAT = """\
schema_version: 1
name: eaftreap_keepfrac
method: eaftreap
base_model: openai/gpt-oss-20b
constraints:
  top_k_unchanged: true
  keep_n_same_per_layer: true
  keep_n_multiple_of: 4
profiling:
  kind: eaftreap
  num_rows: 2000
  max_seq_length: 4096
  batch_size: 1
  eaft: {entropy_topk: 20, cc_quantile: 0.15, uncertain_quantile: 0.85, w_good: 1.0, w_uncertain: 0.25, w_conflict: -1.0}
  calib_packs: [a.parquet]
variants:
  calib_union_keep24of32_k75_eaftreap: /models/keep24
  calib_union_keep20of32_k62_eaftreap: /models/keep20
keep:
  calib_union_keep24of32_k75_eaftreap: {keep_frac_requested: 0.75, keep_frac_actual: 0.75, keep_n: 24, keep_n_multiple_of: 4}
  calib_union_keep20of32_k62_eaftreap: {keep_frac_requested: 0.6, keep_frac_actual: 0.625, keep_n: null, keep_n_multiple_of: 4}
"""
"""The second shape, with two variants."""

SCORES = """\
schema_version: 1
kind: reap_scores
method: eaftreap
score_key: eaft_gate_norm_sum
score_definition: Total expert contribution mass accumulated over selected tokens.
  Summed over tokens where expert j was selected.
inputs:
  saliency_parquet: artifacts/saliency.parquet
profile_meta:
  cc_quantile: 0.15
  num_experts: 4
  num_layers: 2
  p_lo: 0.01829039864242077
  region_counts:
    conflict: 10
  top_k: 2
sample:
  pack_weights:
  - 1.0
  - 3.0
summary:
  num_layers: 2
  num_experts: 4
ranking_by_layer:
- - 2
  - 0
  - 3
  - 1
- - 1
  - 3
  - 2
  - 0
layer_scores:
- layer: 0
  experts:
  - expert: 2
    score: 34297.91015625
    count: 3731
    pos_count: 3698
  - expert: 0
    score: 19022.34765625
    count: 2535
    pos_count: 2516
  - expert: 3
    score: 5.5
    count: 12
    pos_count: 12
  - expert: 1
    score: 5.5
    count: 10
    pos_count: 10
- layer: 1
  experts:
  - expert: 1
    score: 17367.662109375
    count: 2040
    pos_count: 2028
  - expert: 3
    score: 17120.716796875
    count: 2625
    pos_count: 2606
  - expert: 2
    score: 1.25
    count: 3
    pos_count: 2
  - expert: 0
    score: -10.5
    count: 2380
    pos_count: 2372
"""
"""Two layers of four experts, two of them equal and one negative."""
