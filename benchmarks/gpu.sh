#!/usr/bin/env bash
# Run all GPU benchmarks of the documentation:   benchmarks/gpu.sh MODEL HEADS PROMPTS.jsonl OUT
#
# MODEL is a hub name, a folder or a GGUF file. The folder OUT gets a log, a JSON file for each benchmark, and report.html.
# PYTHON needs medusa-export with the extras gpu and export. TRT_PYTHON, which may be the same, needs the extra tensorrt
# (TensorRT 8.6 needs a separate Python environment); without TRT_PYTHON, TensorRT is skipped. LAYERS is the number of
# layers of the 7B shape; 0 skips it. A TensorRT engine of 30 layers takes up to six minutes, all together over an hour.
set -euo pipefail
[ $# -eq 4 ] || { sed -n '2,7s/^# *//p' "$0" >&2; exit 2; }
model=$1 heads=$2 prompts=$3 out=$4
python=${PYTHON:-python3} trt=${TRT_PYTHON:-} layers=${LAYERS:-8}
here=$(cd "$(dirname "$0")" && pwd)
bundle=$out/bundle
log=$out/log.txt mark="== benchmarks/gpu.sh"
if [ -s "$log" ] && ! head -n 1 "$log" | grep -q "^$mark"; then
    echo "$log exists and was not written by benchmarks/gpu.sh; it would be overwritten: use another OUT" >&2
    exit 2
fi
mkdir -p "$out"
exec > >(tee "$log") 2>&1
echo "$mark $*"

failed=0
run() { "$@" || { failed=1; echo "FAILED: $*"; }; }  # and continue with the other benchmarks
ours() { run "$python" -m medusa_exporter "$@"; }
theirs() { [ -z "$trt" ] || run "$trt" -m medusa_exporter "$@"; }
short=(--prompts "$prompts" --limit 2 --steps 3 --profile tree-16)
long=(--prompts "$prompts" --turns first)

if [ -n "$trt" ]; then
    echo "== a small model with a residual stream as large as in real models: is this TensorRT stable in fp16?"
    run "$python" "$here/random_model.py" --shape small --stream 25000 --context 1024 -o "$out/small"
    ours build "$out/small/model" --heads "$out/small/heads" -o "$out/small/bundle" --backend ort-cpu,tensorrt \
        --precision fp32,fp16 --profile tree-16 --no-engines
    ours compare "$out/small/bundle" --backends ort-cpu:fp32 --save "$out/small/reference"
    theirs engines "$out/small/bundle" --backend tensorrt --precision fp16
    theirs compare "$out/small/bundle" --backends tensorrt:fp16 --against "$out/small/reference"
fi

echo "== bundle and engines"
ours build "$model" --heads "$heads" -o "$bundle" --backend "ort-cpu,ort-cuda${trt:+,tensorrt}" --precision fp32,fp16 \
    --profile tree-16,tree-64 --no-engines
for precision in fp32 fp16; do
    theirs engines "$bundle" --backend tensorrt --precision "$precision" --step prefill --step t64
    echo "== $precision, plain decoding with the engine of the tree"
    theirs bench "$bundle" --backends tensorrt --precision "$precision" --profile tree-64 "${long[@]}" --limit 20 \
        --json "$out/$precision-tensorrt-one-engine.json"
    theirs engines "$bundle" --backend tensorrt --precision "$precision" --step plain
done

echo "== all tensors, compared with fp32 on the CPU"
ours compare "$bundle" --backends ort-cpu:fp32 "${short[@]}" --save "$out/reference"
for precision in fp32 fp16; do
    ours compare "$bundle" --backends "ort-cuda:$precision" --against "$out/reference"
    theirs compare "$bundle" --backends "tensorrt:$precision" --against "$out/reference"
done

echo "== answers: fp32 on the GPU gives the same tokens as on the CPU"
ours bench "$bundle" --backends ort-cpu,ort-cuda --precision fp32 --profile tree-64 "${long[@]}" --limit 20 \
    --json "$out/fp32.json"
theirs bench "$bundle" --backends tensorrt --precision fp32 --profile tree-64 "${long[@]}" --limit 20 \
    --json "$out/fp32-tensorrt.json"

echo "== speed"
for size in "" "--prompt-length 128,512,1024,2048,4096 --max-new-tokens 64"; do
    name=fp16${size:+-lengths} limit=$([ -z "$size" ] && echo 40 || echo 2)
    # shellcheck disable=SC2086
    ours bench "$bundle" --backends ort-cuda --precision fp16 --profile tree-16,tree-64 "${long[@]}" --limit "$limit" \
        $size --json "$out/$name.json"
    # shellcheck disable=SC2086
    theirs bench "$bundle" --backends tensorrt --precision fp16 --profile tree-16,tree-64 "${long[@]}" \
        --limit "$limit" $size --json "$out/$name-tensorrt.json"
done
run "$python" "$here/hugging_face.py" "$bundle" --model "$model" --prompts "$prompts" --backends ort-cuda --limit 8 \
    --json "$out/hugging-face.json"
run "$python" "$here/gpu_kernels.py" "$bundle"
[ -z "$trt" ] || run "$trt" "$here/gpu_kernels.py" "$bundle" --backend tensorrt
run "$python" "$here/attention.py"
ours report "$out"/fp16*.json "$out"/fp32*.json -o "$out/report.html"

if [ "$layers" -gt 0 ]; then
    echo "== the 7B shape, $layers layers, random weights, acceptance as recorded above"
    run "$python" "$here/random_model.py" --shape 7b --layers "$layers" --context 4608 \
        --draft-vocabulary 16384 -o "$out/random"
    ours build "$out/random/model" --heads "$out/random/heads" -o "$out/7b" --backend "ort-cuda${trt:+,tensorrt}" \
        --precision fp16 --profile tree-64 --no-engines
    theirs engines "$out/7b" --backend tensorrt
    sizes=(--prompt-length "256,1024,4096" --max-new-tokens 64 --limit 2 --forced "$out/fp16.json" --profile tree-64)
    ours bench "$out/7b" --backends ort-cuda "${long[@]}" "${sizes[@]}" --json "$out/7b.json"
    theirs bench "$out/7b" --backends tensorrt "${long[@]}" "${sizes[@]}" --json "$out/7b-tensorrt.json"
fi
exit "$failed"
