#!/usr/bin/env bash
# Everything that only an NVIDIA card can say, in one call: the kernels' and the engine's tests on it, memory errors, times.
# Needs torch, triton, pytest and this repository, and for the engine four packages more; nothing is installed. Results go to $OUT (by default ./card).
#
#     bash tests/on_card.sh
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-card}
mkdir -p "$OUT"
export PYTHONPATH=. TRITON_INTERPRET=0
python3 -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())' || exit 4
suite=(python3 -m pytest -q --noconftest -W default -p no:cacheprovider -k "not machine" --ignore-glob="*kernels_cpu*")
failed=0
"${suite[@]}" tests/test_kernels_*.py 2>&1 | tee "$OUT/tests.log" || failed=1
# The whole engine beside the CPU's, every family and precision; of the rest of k2batch it needs what reads checkpoints.
if python3 -c 'import fsspec, gguf, numpy, safetensors, tokenizers' 2> /dev/null; then
    K2BATCH_CACHE="$OUT/cache" python3 -m pytest -q --noconftest -W default -p no:cacheprovider tests/test_k2model_card.py 2>&1 \
        | tee "$OUT/engine.log" || failed=1
else
    echo "the engine was not tried: pip install fsspec gguf safetensors tokenizers" | tee "$OUT/engine.log"
    failed=1
fi
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "${suite[@]}" -x tests/test_kernels_{experts,int8_gemm}.py > "$OUT/$tool.log" 2>&1 || failed=1
        tail -n 3 "$OUT/$tool.log"
    done
fi
python3 -m jobs.bench_kernels > "$OUT/kernels.json" && python3 - "$OUT/kernels.json" <<'PYTHON' || failed=1
import json, sys
from jobs.bench_kernels import as_text
print(as_text(json.load(open(sys.argv[1]))))
PYTHON
exit $failed
