#!/usr/bin/env bash
# Run all stages, or one of them, on several GPUs of a machine.
#
#   GPUS=8 examples/multi_gpu.sh runs/mine.yaml                          all stages, a process on each GPU
#   GPUS=8 STAGE=train FSDP=1 examples/multi_gpu.sh runs/mine.yaml       one stage, the model sharded block by block
#   GPUS=8 examples/multi_gpu.sh runs/mine.yaml --train.max_train_steps 500
#
# Pairs in a step: train.train_batch_size x train.gradient_accumulation_steps x GPUS. Kill it at any time: the same
# command continues, in `train` with as many processes as before. Precision and compilation are settings of `train`; the
# launcher's own would be refused. docs/distributed.md says more, also of several machines.
set -euo pipefail
config=${1:?usage: GPUS=8 $0 CONFIG.yaml [--section.setting value ...]}
shift
how=(--multi_gpu)
if [[ ${FSDP:-0} == 1 ]]; then how=(--use_fsdp --fsdp_version 2); fi
exec accelerate launch "${how[@]}" --num_processes "${GPUS:-2}" --num_machines 1 --mixed_precision no \
    --dynamo_backend no --main_process_port "${PORT:-29500}" -m halo_fast "${STAGE:-run}" "$config" "$@"
