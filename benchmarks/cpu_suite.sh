#!/usr/bin/env bash
# The rows of a CPU, unattended and offline, in at most 25 minutes on two idle cores, the most important first:
# what the table of targets asks for, then the paper's sizes, then the axes. Every row is on disk as it is made,
# and what this commit has rows of is not measured again: run it twice, and it goes on. Ends with a short table;
# exits with an error where a case's check failed. Settings: benchmarks/suite.sh; the epoch needs CROSSAN_FAST_DATA,
# the step of IISAN's public code CROSSAN_FAST_IISAN, a clone of github.com/GAIR-Lab/IISAN.
# With arguments, these sets alone: cpu_suite.sh step cache
set -uo pipefail
cd "$(dirname "$0")/.."
device=cpu
total=1500
. benchmarks/suite.sh
quick=(--seconds 1 --minimum 10 --missing)
chosen=" $* "
set_of() { # set_of NAME SECONDS ARGUMENT...: these cases, unless other sets were asked for
  [ "$chosen" = "  " ] || [[ "$chosen" == *" $1 "* ]] || return 0
  cases "$@"
}

set_of targets 200 "side_network/N=704,M=4,D=768,L" --only eager,autocast,compiled,cpp
set_of epoch 180 "epoch/data=scientific" --only eager,cpp
[ -z "${CROSSAN_FAST_IISAN:-}" ] ||
  set_of peers 60 "step/B=64,M=2,D=768," --only eager,cpp,iisan --dtypes fp32
set_of step 120 "step/B=64,*loss=in_batch" --only eager,cpp
set_of mapped 150 "step_mapped/items=10000*" --only eager,cpp
set_of ranking 60 "rank_of_target/users=12076" --only eager,cpp --dtypes fp32
set_of losses 60 "*_loss/rows=640,*" --only eager,cpp
set_of losses 110 "*_loss/rows=10240,*" --only eager,cpp --dtypes fp32
set_of encoder 110 "item_encoder/N=704,M=4,D=768,L" --only eager,autocast,cpp
set_of large-step 150 "step/B=1024" --only eager,cpp --dtypes fp32
set_of catalogue 150 "item_encoder/N=20314" --only eager,cpp --dtypes fp32
set_of catalogue 80 "item_encoder/N=20314" --only cpp
set_of full-step 100 "step/B=256,M=2,D=384,loss=full" --only eager,cpp --dtypes fp32
set_of full-step 100 "step/*loss=full" --only cpp
set_of evaluation 150 --tag evaluation --only eager,cpp
set_of cache 140 --tag cache --only eager,host
set_of catalogue 120 "side_network/N=20314" --only cpp
set_of compiled 100 "item_encoder/N=704,M=4,D=768,L" --only eager,compiled,cpp
set_of compiled 150 "step/B=64,*loss=in_batch" --only eager,compiled,cpp --dtypes fp32
set_of compiled 100 "*_loss/rows=640,*" --only eager,compiled,cpp --dtypes fp32
set_of large-step 120 "step/B=*" --only cpp
set_of basis 60 "side_network/N=704,M=2,*" --tag basis --only eager,cpp --dtypes fp32
set_of axes "$total" --tag paper --tag recipe --tag gather --only eager,cpp
set_of axes "$total" --tag batch --tag modalities --tag width --only eager,cpp
finish
