#!/usr/bin/env bash
# What does a policy lose that is rewarded for verifiable answers alone, and what does preference give back? PPO from the quickstart's
# run after SFT on verifiable rewards, on preference, and on both; three seeds; accuracy, reply length, diversity and preference over
# training, measured on held-out prompts about real clips. Meant for ten minutes; not timed yet.
#
#   bash examples/studies/reward_trap.sh [RUN] [key=value ...]
#
# Needs the quickstart to have run; RUN is the run to start from (default runs/quickstart/sft). A program judges in training; with
# rl.judge.run=runs/quickstart/reward a reward model does. Writes runs/studies/reward-trap: results.json and report.html.
# Safe to interrupt and run again: arms that are finished are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/studies/study.sh
study reward-trap rl.iterations=4 "$@"
