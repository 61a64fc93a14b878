"""Turns a decoder and its heads into ONNX graphs: traces them once, then rewrites a copy of the trace for each backend.

`trace` exports the module `step.Step`, with the cache and the attention of `row_attention`, and cleans the graph up
(`cleanup`, `rotary_fusion`, `rotary_scaling`). `variants` then applies these modules' rewrites, in this order:

ort-cpu

1. `in_place_kv`: Attention and the Concat of past and new rows become GroupQueryAttention (with `past_lengths`)
2. `fuse`: fewer, larger operators (with `merge_matmuls`)
3. `topk`: ArgMax in two stages
4. `quantise`: the heads in 8 bits, whatever the precision
5. `calibration`, `integer_matmul` (with `integer_weight`): only w8a8
6. `quantise` (with `vocabulary`): only int8, w8a8 and int4
7. `grouped_queries`: query heads of a key head share a matrix multiplication
8. `logits`: rows of one sequence, so that no logits are copied; `skip_draft`: no heads where there is nothing to draft

ort-cuda

1. `freeze_shapes.run_all_heads`: the number of heads that run no longer depends on the tree
2. `cast_precision`: only fp16 and bf16
3. `row_summaries`: the most likely tokens of rows, and two facts about all logits of a row
4. `in_place_kv`, `logits` in fp16 and bf16; `decompose_attention` in fp32
5. `fuse`
6. `causal`: a second graph, for plain decoding and prompts, only in fp16 and bf16 and without sliding windows

tensorrt and tensorrt-rtx, one graph for each step size

1. `freeze_shapes.run_all_heads`, `cast_precision`: as above
2. `merge_matmuls`
3. `freeze_shapes`: B, T, R and N become constants
4. `stack_layers`: one input for the past of all layers, one output for their new rows
5. `topk`: TopK and ArgMax in two stages; `row_summaries`, as above
6. `decompose`, `decompose_attention`, `decompose_norm`, `decompose_rotary` for versions that lack fused operators;
   `attention_masks` for the others

`save` writes all graphs of a bundle, and `check` compares what was written with the contract. `edit` has helpers that
all rewrites share, `lazy_weights`, `weight_columns` and `nbits_weight` hold weights that are computed when they are
written, `rotary_tables` computes cosines and sines, and `memory` frees what tracing and rewriting leave behind.
"""
