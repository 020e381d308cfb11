#!/usr/bin/env bash
# Trains seeds of the recipe smollm2 and evaluates them, all under FOLDER. Each visible GPU has its
# share of the seeds; those of one GPU run side by side, and all share stored scores.
#
#   training/gpu_session.sh FOLDER MODEL CORPUS
#
# Start it again with the same arguments after a cut: training resumes from its checkpoints,
# evaluation from its stored scores, and what is done is skipped. It prints `done` at the end. Where
# a command may take 10 minutes:
#
#   timeout 570 training/gpu_session.sh runs/long MODEL CORPUS
#   cp runs/long/*.tar.gz runs/long/*.json ELSEWHERE
#
# Results: FOLDER/seed0.tar.gz and so on (router, log, figures), FOLDER/PASS.json (seeds joined),
# FOLDER/stored_scores.tar.gz. The passes, in the order of what must not be missed: default_100,
# 100 prompts a task and length at the default threshold; prompts_400, 400 prompts of the retrieval
# and local tasks with other thresholds and static patterns, chosen on 20 validation prompts a task
# and length; variants, 50 prompts a task and length under each variant. What one pass scored on
# test prompts the next looks up, but for the variants' own prompts: 50 of a cell fill no piece of
# 100. One file of them all:
#
#   python -m training join FOLDER/seed*/prompts_400/quality.json --out quality.json \
#       --beside prompts_100=FOLDER/default_100.json variants_50=FOLDER/variants.json
#
# Environment: PYTHON (python3) has torch and the extra `train`. SEEDS ("0 1 2") are trained.
# TRAIN_SECONDS (0: no limit) ends trainings early, which cannot be repeated step for step.
# MICRO_BATCH_TOKENS (65536) are computed at once by each training: 33 GiB. DRY_RUN=1 prints the
# commands alone.
set -euo pipefail
usage="usage: training/gpu_session.sh FOLDER MODEL CORPUS (the head of the file explains)"
folder=$(realpath -m "${1:?$usage}")
model=$(realpath -m "${2:?$usage}")
corpus=$(realpath -m "${3:?$usage}")
cd "$(dirname "$0")/.."
read -ra seeds <<<"${SEEDS:-0 1 2}"
export OMP_NUM_THREADS=4

graded=(needle multi_key variable_tracking repeat_end list_end continue_text code_completion)

training() { # training ARGUMENTS...: one command of the package
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' -m training "$@"
        echo
    else
        "${PYTHON:-python3}" -m training "$@"
    fi
}

train() { # train SEED
    [[ -e $folder/seed$1/flux_router.safetensors ]] && return
    training train --recipe smollm2 --model "$model" --out "$folder/seed$1" --seed "$1" \
        --data.corpus "$corpus" --data.workers 8 \
        --optimizer.micro_batch_tokens "${MICRO_BATCH_TOKENS:-65536}" \
        --optimizer.time_limit_s "${TRAIN_SECONDS:-0}" --system.save_every 40
}

evaluate() { # evaluate SEED PASS FLAGS...
    local seed=$1 pass=$2
    shift 2
    [[ -e $folder/$pass.json ]] && return
    training eval --model "$model" --router "$folder/seed$seed" \
        --out "$folder/seed$seed/$pass" --scores "$folder/stored_scores" \
        --data.corpus "$corpus" --data.workers 8 --micro_batch_tokens 32768 \
        --validation_prompts 20 --random_patterns 30 --variant_prompts 50 "$@"
}

for_all() { # for_all NAME FUNCTION FLAGS...: call FUNCTION SEED FLAGS... for every seed
    local name=$1 function=$2 at seed failed='' processes=()
    shift 2
    for at in "${!seeds[@]}"; do
        seed=${seeds[at]}
        if [[ -n ${DRY_RUN:-} ]]; then
            "$function" "$seed" "$@"
            continue
        fi
        mkdir -p "$folder/seed$seed"
        CUDA_VISIBLE_DEVICES=${visible[at % ${#visible[@]}]} "$function" "$seed" "$@" \
            2>>"$folder/seed$seed/$name.log" &
        processes+=($!)
    done
    for process in "${processes[@]}"; do wait "$process" || failed=1; done
    [[ -z $failed ]] || { echo "$name failed: see $folder/seed*/$name.log" >&2; exit 1; }
}

pass() { # pass NAME FLAGS...: evaluate all seeds, and join what was found
    for_all "$1" evaluate "$@"
    local reports=("${seeds[@]/#/$folder/seed}")
    [[ -e $folder/$1.json ]] ||
        training join "${reports[@]/%//$1/quality.json}" --out "$folder/$1.json"
}

pack() { # what is worth bringing back, also of a session that was cut
    local seed
    for seed in "${seeds[@]}"; do
        [[ ! -d $folder/seed$seed ]] ||
            tar -C "$folder" --exclude=checkpoints -czf "$folder/seed$seed.tar.gz" "seed$seed"
    done
    [[ ! -d $folder/stored_scores ]] ||
        tar -C "$folder" --exclude="*.begun" -czf "$folder/stored_scores.tar.gz" stored_scores
}

gpus=1
if [[ -z ${DRY_RUN:-} ]]; then
    "${PYTHON:-python3}" -c 'import matplotlib, torch, transformers'
    gpus=$("${PYTHON:-python3}" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
[[ -n ${DRY_RUN:-} ]] || trap pack EXIT
for_all train train
pass default_100 --prompts 100 --variants --shares
pass prompts_400 --prompts 400 --variants --shares 0.6 0.75 --data.tasks "${graded[@]}"
pass variants --prompts 100 --shares
echo "done: $folder"
