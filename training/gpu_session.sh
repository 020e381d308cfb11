#!/usr/bin/env bash
# Trains seeds of the recipe smollm2 side by side on one GPU and evaluates them, all under FOLDER.
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
# FOLDER/stored_scores.tar.gz. The passes, in the order of what must not be missed: 100 prompts a
# task and length at the default threshold; the same with other thresholds and static patterns;
# with the variants; 400 prompts. They share scores, so a later pass repeats nothing.
#
# Environment: PYTHON (python3) has torch and the extra `train`. SEEDS ("0 1 2") are trained.
# TRAIN_SECONDS (800) is the time of training, shared by the seeds, without start-up;
# MICRO_BATCH_TOKENS (32768) are computed at once by each: 16 GiB. DRY_RUN=1 prints the commands
# alone.
set -euo pipefail
usage="usage: training/gpu_session.sh FOLDER MODEL CORPUS (the head of the file explains)"
folder=$(realpath -m "${1:?$usage}")
model=$(realpath -m "${2:?$usage}")
corpus=$(realpath -m "${3:?$usage}")
cd "$(dirname "$0")/.."
read -ra seeds <<<"${SEEDS:-0 1 2}"
export OMP_NUM_THREADS=4

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
        --data.corpus "$corpus" --data.workers 4 \
        --optimizer.micro_batch_tokens "${MICRO_BATCH_TOKENS:-32768}" \
        --optimizer.time_limit_s "${TRAIN_SECONDS:-800}" --system.save_every 20
}

evaluate() { # evaluate PASS FLAGS...: all seeds, one after the other: the static baselines are shared
    local pass=$1 reports=() seed
    shift
    [[ -e $folder/$pass.json ]] && return
    for seed in "${seeds[@]}"; do
        training eval --model "$model" --router "$folder/seed$seed" \
            --out "$folder/seed$seed/$pass" --scores "$folder/stored_scores" \
            --data.corpus "$corpus" --data.workers 14 --validation_prompts 20 \
            --random_patterns 6 --variant_prompts 20 "$@"
        reports+=("$folder/seed$seed/$pass/quality.json")
        pack "$seed"
    done
    training join "${reports[@]}" --out "$folder/$pass.json"
}

pack() { # pack SEED: what is worth bringing back
    [[ -n ${DRY_RUN:-} ]] && return
    tar -C "$folder" --exclude=checkpoints -czf "$folder/seed$1.tar.gz" "seed$1"
    [[ ! -d $folder/stored_scores ]] ||
        tar -C "$folder" -czf "$folder/stored_scores.tar.gz" stored_scores
}

[[ -n ${DRY_RUN:-} ]] || "${PYTHON:-python3}" -c 'import matplotlib, torch, transformers'
processes=()
for seed in "${seeds[@]}"; do
    if [[ -n ${DRY_RUN:-} ]]; then
        train "$seed"
        continue
    fi
    mkdir -p "$folder/seed$seed"
    train "$seed" 2>>"$folder/seed$seed/train.log" &
    processes+=($!)
done
failed=
for process in "${processes[@]}"; do wait "$process" || failed=1; done
[[ -z $failed ]] || { echo "a training failed: see $folder/seed*/train.log" >&2; exit 1; }
for seed in "${seeds[@]}"; do pack "$seed"; done
evaluate default_100 --prompts 100 --variants --shares
evaluate prompts_100 --prompts 100 --variants
evaluate variants --prompts 100
evaluate prompts_400 --prompts 400
echo "done: $folder"
